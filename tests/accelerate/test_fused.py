"""Fused operators in models: where they run, what they round, and when the stock code must run instead."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vdit_fast.accelerate import accelerate
from vdit_fast.config import Config
from vdit_fast.models.joint import join

BLOCKS = {
    "wan_t2v": "WanTransformerBlock",
    "wan_ti2v": "WanTransformerBlock",
    "hunyuan_video": "HunyuanVideoTransformerBlock",
    "cogvideox_5b": "CogVideoXBlock",
}


class Calls(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def calls(model: nn.Module, inputs: dict[str, Any]) -> Counter[str]:
    with Calls() as seen:
        tiny.run(model, inputs)
    return seen.names


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__ in BLOCKS.values()]


UNETS = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
"""Their convolutions and group norms amplify the order of sums; and of 20,000 norms in bf16 one rounds the other way,
which the rest of the network makes visible. ``test_fused_factorised`` holds their blocks to the stock bits."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_eager_rounding_is_the_stock_model_s(family: str, dtype: torch.dtype) -> None:
    """Every block rounds as the stock block does: what is left is the order of sums in a norm, far below an ulp."""
    model, inputs = tiny.build(family)
    model, inputs = model.to(dtype), tiny.cast(inputs, dtype)
    if family in tiny.LINEAR:  # the first block gets a transposed view, of which torch's bf16 products round otherwise
        first = model.transformer_blocks[0]
        first.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    handle = accelerate(model, Config(fuse="off"))
    stock = tiny.run(model, inputs)
    handle.reconfigure(Config(fuse="eager"))
    # In diffusers 0.35 the first block gets a transposed view: another order of sums, of which bf16 may round one up.
    flips = 1e-3 if dtype == torch.bfloat16 and diffusers.__version__.startswith("0.35.") else 0.0
    if family in ("animatediff", "svd"):
        flips = UNETS[dtype]
    ulps = 3 if family in ("ltx2", "ltx2_3", "lumina_next") else 2  # more norms per block
    assert tiny.relative(tiny.run(model, inputs), stock) <= ulps * torch.finfo(torch.float32).eps + flips


@pytest.mark.parametrize("kind", sorted(BLOCKS))
def test_blocks_run_through_the_fused_operators(kind: str) -> None:
    model, inputs = tiny.build(kind)
    stock = calls(model, inputs)
    handle = accelerate(model)
    fused = calls(model, inputs)
    blocks = len([module for module in model.modules() if "forward" in module.__dict__])
    assert blocks and sum(handle.stats()["fused"]["blocks"].values()) == blocks
    assert not handle.stats()["fused"]["unfused"] and f"{BLOCKS[kind]}" in handle.report()
    assert fused["adaln_modulate"] >= blocks and fused["gate_residual"] >= blocks and fused["qk_norm_rope"] >= blocks
    for name in ("mul", "add", "native_layer_norm", "cat"):
        assert fused[name] <= stock[name], name
    assert fused["mul"] + fused["add"] < 0.5 * (stock["mul"] + stock["add"])
    handle.reconfigure({"fuse": "off"})
    off = calls(model, inputs)
    assert not off["adaln_modulate"] and not off["qk_norm_rope"]


def test_every_block_is_fused(family: str) -> None:
    model, inputs = tiny.build(family)
    handle = accelerate(model)
    ran = calls(model, inputs)
    fused = handle.stats()["fused"]
    served = {name.rpartition(".")[0] for name in (layer["name"] for layer in handle.stats()["layers"])}
    assert sum(fused["blocks"].values()) == len(served) and not fused["left"] and not fused["unfused"]
    assert ran["adaln_modulate"] >= len(served)
    assert ran["gate_residual"] + ran["gate_residual_norm"] >= len(served)
    if family not in tiny.WITHOUT_GRID:  # no norm of q and k there, and no RoPE
        assert ran["qk_norm_rope"] >= len(served)


def test_a_block_without_a_fused_forward_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from vdit_fast.models.wan import WanAdapter

    monkeypatch.setattr(WanAdapter, "blocks", {})
    model, inputs = tiny.wan()
    handle = accelerate(model)
    assert not calls(model, inputs)["adaln_modulate"]
    reason = "WanTransformerBlock has no fused forward"
    assert handle.stats()["fused"] == {"blocks": {}, "left": {reason: 2}, "unfused": {}}
    assert "blocks left with their own forward" in handle.report() and reason in handle.report()


class Scaled(nn.Module):
    """A wrapper of a norm that computes something else, and hides what it wraps."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.base = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.base(*args, **kwargs)
        return tuple(1.5 * x for x in out) if isinstance(out, tuple) else 1.5 * out


def norms_of_first_blocks(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """(parent, name) of every norm in the first block of each class with a fused forward, norms inside norms too."""
    found: list[tuple[nn.Module, str]] = []
    seen: set[str] = set()
    for block in model.modules():
        if "forward" not in block.__dict__ or type(block).__name__ in seen:
            continue
        seen.add(type(block).__name__)
        for name, child in block.named_children():
            # by the stock forward too, or called as it is
            unused = (type(block).__name__, name) in (
                ("AllegroTransformerBlock", "norm3"),
                ("LuminaNextDiTBlock", "norm1_context"),
            )
            if "norm" in name and not isinstance(child, nn.Identity) and not unused:
                found.append((block, name))
                found += [(child, "norm")] if isinstance(getattr(child, "norm", None), nn.Module) else []
    return found


@pytest.mark.parametrize(
    "kind",
    [
        "allegro",
        "animatediff",
        "cosmos_1",
        "easyanimate",
        "hunyuan_token_replace",
        "latte",
        "ltx2_3",
        "ltx_video",
        "lumina_next",
        "mochi",
        "skyreels_df",
        "svd",
        *sorted(BLOCKS),
    ],
)
def test_another_module_in_a_norm_s_place_runs_the_stock_block(kind: str) -> None:
    """A wrapped norm (adapters, quantisation) computes something else; nothing of it may be read past it."""
    model, inputs = tiny.build(kind)
    handle = accelerate(model)
    for parent, name in norms_of_first_blocks(model):
        own = getattr(parent, name)
        setattr(parent, name, Scaled(own))
        handle.reconfigure({"fuse": "off"})
        stock = tiny.run(model, inputs)
        handle.reconfigure({"fuse": "fast"})
        assert tiny.relative(tiny.run(model, inputs), stock) < 2e-6, name
        assert any("a norm is a Scaled" in reason for reason in handle.stats()["fused"]["unfused"]), name
        setattr(parent, name, own)


def test_another_kind_of_norm_runs_the_stock_block() -> None:
    model, inputs = tiny.wan()
    norm, attn = model.blocks[0].norm3, model.blocks[1].attn1
    model.blocks[0].norm3 = nn.RMSNorm(norm.normalized_shape, eps=norm.eps, elementwise_affine=False)
    attn.norm_k = nn.LayerNorm(attn.norm_k.normalized_shape, eps=attn.norm_k.eps)
    stock = tiny.run(model, inputs)
    handle = accelerate(model)
    assert tiny.relative(tiny.run(model, inputs), stock) < 2e-6
    reasons = handle.stats()["fused"]["unfused"]
    assert reasons == {
        "a norm is a RMSNorm, which the fused forward of WanTransformerBlock does not know": 1,
        "the norms of q and k are not of a kind that one call computes": 1,
    }


@pytest.mark.parametrize(
    "other",
    [nn.LayerNorm(8, eps=1e-3), nn.RMSNorm(8, eps=1e-5), nn.LayerNorm(8, eps=1e-5, elementwise_affine=False)],
    ids=["eps", "class", "weight"],
)
def test_norms_that_differ_are_not_computed_by_one_call(other: nn.Module) -> None:
    from vdit_fast.models.qk import _kind

    class Squared(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).square()

    plain = nn.LayerNorm(8, eps=1e-5)
    assert _kind(plain, plain, False) == ("layer", False) and _kind(plain, plain, True) is None
    assert (
        _kind(plain, other, False) is None and _kind(other, plain, False) is None and _kind(plain, None, False) is None
    )
    assert _kind(Squared(8), Squared(8), False) is None, "a subclass may compute something else"
    assert _kind(nn.RMSNorm(8), nn.RMSNorm(8), False) is None, "eps None depends on the dtype"


@pytest.mark.parametrize("kind", sorted(BLOCKS))
def test_remove_gives_the_blocks_back(kind: str) -> None:
    model, inputs = tiny.build(kind)
    stock, attributes = tiny.run(model, inputs), [set(module.__dict__) for module in model.modules()]
    accelerate(model).remove()
    assert [set(module.__dict__) for module in model.modules()] == attributes
    assert torch.equal(tiny.run(model, inputs), stock)


def test_distinct_timesteps_make_a_small_table() -> None:
    """Per-token timesteps that differ between batch items, in no order: rows by index equal rows by token."""
    model, inputs = tiny.wan(per_token=True, batch=2)
    generator = torch.Generator().manual_seed(3)
    levels = torch.tensor([0.0, 300.0, 700.0])
    for count, few in ((3, True), (inputs["timestep"].shape[1], False)):
        timestep = torch.randint(0, count, inputs["timestep"].shape, generator=generator).float()
        inputs["timestep"] = levels[timestep.long()] if few else 7.0 * timestep
        stock = tiny.run(model, inputs)
        handle = accelerate(model)
        assert tiny.relative(tiny.run(model, inputs), stock) < 2e-6
        found = handle.roots[0].session.forward.distinct(*inputs["timestep"].shape)
        assert (found is not None) == few
        if found is not None:
            batch, token, index = found
            assert len(batch) == 6, "three levels of two batch items"
            assert handle.roots[0].session.forward.distinct(2, index.shape[1] // 2) is None, "of a part of the tokens"
            assert torch.equal(inputs["timestep"][batch, token][index.long()], inputs["timestep"])
            assert torch.equal(batch[index.long()], torch.arange(2)[:, None].expand_as(index))
        handle.remove()


@pytest.mark.parametrize("kind", sorted(BLOCKS))
def test_where_the_stock_blocks_run(kind: str) -> None:
    model, inputs = tiny.build(kind)
    handle = accelerate(model)

    def reasons() -> set[str]:
        found = set(handle.stats()["fused"]["unfused"])
        handle.reconfigure(handle.config)
        return found

    tiny.run(model, inputs)
    assert reasons() == set()
    model(**inputs)  # gradients could be asked for
    assert reasons() == {"gradients are recorded"}
    with torch.autocast("cpu", torch.bfloat16):
        tiny.run(model, inputs)
    assert reasons() == {"autocast chooses the dtypes"}
    seen: list[Any] = []
    norm = blocks_of(model)[0].norm1
    watch = norm.register_forward_hook(lambda *call: seen.append(call))
    stock = tiny.run(model, inputs)
    assert len(seen) == 1 and reasons() == {"a norm is hooked, or its weights lie elsewhere"}
    watch.remove()
    assert tiny.relative(tiny.run(model, inputs), stock) < 2e-6 and len(seen) == 1 and reasons() == set()
    assert "unfused" not in handle.report()


def test_a_wrapped_block_is_left_alone() -> None:
    model, inputs = tiny.wan()
    inner, log = model.blocks[1].forward, []
    object.__setattr__(model.blocks[1], "forward", lambda *args, **kw: (log.append(1), inner(*args, **kw))[1])
    stock = tiny.run(model, inputs)
    handle = accelerate(model)
    assert tiny.relative(tiny.run(model, inputs), stock) < 2e-6 and len(log) == 2
    (reason,) = handle.stats()["fused"]["left"]
    assert "wrapped already" in reason and handle.stats()["fused"]["blocks"] == {"WanTransformerBlock": 1}
    handle.remove()
    assert model.blocks[1].__dict__["forward"] is not inner and torch.equal(tiny.run(model, inputs), stock)


def test_a_block_that_is_wrapped_later_falls_back_to_stock_after_remove() -> None:
    from diffusers import FirstBlockCacheConfig

    model, inputs = tiny.wan(layers=3)
    stock = tiny.run(model, inputs)
    handle = accelerate(model)
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    handle.remove()
    with model.cache_context("cond"), Calls() as seen:
        assert torch.equal(tiny.run(model, inputs), stock)
    assert not seen.names["adaln_modulate"]


def test_a_wrapper_put_around_a_block_later_stays_after_remove() -> None:
    model, inputs = tiny.wan()
    stock = tiny.run(model, inputs)
    handle, log = accelerate(model), []
    inner = model.blocks[1].forward
    wrapper = lambda *args, **kwargs: (log.append(1), inner(*args, **kwargs))[1]  # noqa: E731
    object.__setattr__(model.blocks[1], "forward", wrapper)
    handle.remove()
    assert torch.equal(tiny.run(model, inputs), stock) and len(log) == 1
    assert model.blocks[1].__dict__["forward"] is wrapper and "forward" not in model.blocks[0].__dict__


def test_a_forward_that_a_wrapper_kept_is_replaced() -> None:
    """A block cache puts back what it found, which may be the forward of an acceleration that is gone by then."""
    from diffusers import FirstBlockCacheConfig

    model, inputs = tiny.wan(layers=3)
    handle = accelerate(model)
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    handle.remove()
    model.disable_cache()
    handle = accelerate(model)
    assert handle.stats()["fused"] == {"blocks": {"WanTransformerBlock": 3}, "left": {}, "unfused": {}}
    assert calls(model, inputs)["adaln_modulate"] == 3


def test_reasons_of_blocks_outlive_another_configuration_and_a_copy() -> None:
    model, _ = tiny.wan()
    inner = model.blocks[1].forward
    object.__setattr__(model.blocks[1], "forward", lambda *args: inner(*args))
    handle = accelerate(model)
    left = handle.stats()["fused"]["left"]
    assert sum(left.values()) == 1
    assert handle.reconfigure({"fuse": "eager"}).stats()["fused"]["left"] == left
    assert accelerate(copy.deepcopy(model), {"fuse": "eager"}).stats()["fused"]["left"] == left


def test_blocks_of_a_control_network_run_the_stock_way() -> None:
    model, inputs = tiny.build("cosmos_1")
    block, arguments = model.transformer_blocks[0], []
    if "controlnet_residual" not in inspect.signature(type(block).forward).parameters:
        pytest.skip("this diffusers has no control network for Cosmos")
    watch = block.register_forward_pre_hook(lambda _, args, kwargs: arguments.append((args, kwargs)), with_kwargs=True)
    tiny.run(model, inputs)
    watch.remove()
    ((args, kwargs),) = arguments
    names = ("hidden_states", "encoder_hidden_states", "embedded_timestep", "temb", "image_rotary_emb")
    call = dict(zip(names, args, strict=False)) | kwargs
    call["controlnet_residual"] = torch.randn_like(call["hidden_states"])
    with torch.no_grad():
        stock = block(**call)
        handle = accelerate(model)
        assert tiny.relative(block(**call), stock) < 2e-6
    assert handle.stats()["fused"]["unfused"] == {"a control network is in use": 1}


def test_what_attention_is_told_besides_reaches_it() -> None:
    """CogVideoX hands ``attention_kwargs`` to its attention: here a mask that hides tokens."""
    model, inputs = tiny.cogvideox()
    mask = torch.zeros(2, 1, 7 + 48)
    mask[:, :, 3:40] = -torch.inf
    told = inputs | {"attention_kwargs": {"attention_mask": mask}}
    plain, stock = tiny.run(model, inputs), tiny.run(model, told)
    assert tiny.relative(stock, plain) > 1e-4, "the mask must matter"
    accelerate(model)
    assert tiny.relative(tiny.run(model, told), stock) < 2e-6


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.empty(8, device="meta"), "weights of the block lie elsewhere"),
        (nn.LayerNorm(8, device="meta"), "a norm is hooked, or its weights lie elsewhere"),
        (nn.LayerNorm(8).to(torch.float64), "a norm is hooked, or its weights lie elsewhere"),
        (nn.LayerNorm((2, 4)), "a norm is hooked, or its weights lie elsewhere"),
        (nn.LayerNorm(8), None),
        (torch.empty(8), None),
    ],
    ids=["meta", "norm on meta", "norm in fp64", "norm over two dimensions", "norm", "weight"],
)
def test_weights_that_cannot_be_read(weight: Any, reason: str | None) -> None:
    """Offloaded, cast or unusual weights: only the modules themselves know what to do with them."""
    from vdit_fast.models.fusion import rounding_for
    from vdit_fast.models.session import Session
    from vdit_fast.models.tracker import StepTracker

    session, x = Session(Config(), StepTracker(None), "transformer"), torch.randn(1, 3, 8)
    norms, weights = ((weight,), ()) if isinstance(weight, nn.Module) else ((), (weight,))
    with torch.no_grad():
        assert rounding_for(session, x, norms, *weights) == ("fast" if reason is None else None)
    assert session.unfused == ({} if reason is None else {reason: 1})


def test_copies_and_pickles() -> None:
    model, inputs = tiny.wan()
    stock = tiny.run(model, inputs)
    accelerate(model)
    fused = tiny.run(model, inputs)
    twin = copy.deepcopy(model)
    assert torch.equal(tiny.run(twin, inputs), fused) and twin.blocks[0].forward.__self__ is twin.blocks[0]
    assert calls(twin, inputs)["adaln_modulate"] == calls(model, inputs)["adaln_modulate"] > 0
    assert torch.equal(tiny.run(pickle.loads(pickle.dumps(model)), inputs), stock)
    arguments: list[Any] = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: arguments.append(args))
    tiny.run(model, inputs)
    block = copy.deepcopy(model.blocks[0])
    with torch.no_grad(), Calls() as seen:
        block(*arguments[0])
    assert not seen.names["adaln_modulate"], "a copied part is the stock one"


def test_unknown_forward_of_a_known_class_is_left_alone() -> None:
    class WanTransformerBlock(nn.Module):
        def forward(self, x: Tensor, more: Tensor) -> Tensor:
            return x

    from vdit_fast.models import fusion
    from vdit_fast.models.session import Session
    from vdit_fast.models.tracker import StepTracker
    from vdit_fast.models.wan_block import WAN_BLOCKS

    session, root = Session(Config(), StepTracker(None), "transformer"), nn.Sequential(WanTransformerBlock())
    fusion.attach(root, session, WAN_BLOCKS)
    assert session.left == {"WanTransformerBlock.forward takes (x, more)": 1} and not session.fused


def test_bad_setting() -> None:
    with pytest.raises(ValueError, match=r"fuse is 'quick'.*known: eager, fast, off"):
        Config(fuse="quick")  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [1, 2])
def test_join(batch: int) -> None:
    whole = torch.randn(batch, 7, 2, 3)
    with torch.no_grad():
        for first, second, view in (
            (whole[:, :3], whole[:, 3:], True),
            (whole[:, :3], whole[:, 4:], False),  # a gap
            (whole[:, 3:], whole[:, :3], False),  # the other way round
            (whole[:, :3], whole[:, 3:].clone(), False),
            (whole[:, :0], whole, False),
            (whole[..., :1], whole[..., 1:2], False),
            (whole[:, :3].transpose(2, 3), whole[:, 3:].transpose(2, 3), True),
        ):
            joined = join(first, second)
            assert torch.equal(joined, torch.cat((first, second), dim=1))
            assert (joined.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()) == view
        meta = torch.empty(batch, 3, 4, device="meta"), torch.empty(batch, 3, 4, device="meta")
        assert join(*meta).shape == (batch, 6, 4) and join(*meta).is_contiguous()
    x = whole.requires_grad_()
    join(x[:, :3], x[:, 3:]).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * whole.detach())


def test_yaml_s_off_means_off(tmp_path: Path) -> None:
    path = tmp_path / "off.yaml"
    path.write_text("fuse: off\n")  # PyYAML reads a boolean
    assert Config.from_file(path).fuse == "off" and Config.from_file(path) == Config(fuse="off")


def test_a_dtype_without_a_kernel_is_named() -> None:
    model, inputs = tiny.wan()
    handle = accelerate(model.double())
    tiny.run(model, tiny.cast(inputs, torch.float64))
    assert set(handle.stats()["fused"]["unfused"]) == {"dtype float64 has no fused kernel"}
    with pytest.raises(RuntimeError, match=r"another configuration \(fuse is 'fast', not 'off'\)"):
        accelerate(model, Config(fuse="off"))
    handle.remove()
    with pytest.raises(RuntimeError, match="this handle was removed"):
        handle.positions(lambda step, geometry, tables: None)
