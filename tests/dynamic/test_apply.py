"""DyDiT around models of diffusers: skipping equals masking, everything on changes no bit, and the way back."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import dydit_models as dydit
import pytest
import tiny
import torch
from torch import Tensor, nn

from vdit_fast.accelerate import accelerate
from vdit_fast.dynamic import DyDiTBlock, DynamicMlp, Layout, apply_dydit
from vdit_fast.dynamic.units import WeightParts, take

KINDS = [(), *((kind,) for kind in dydit.KINDS)]


def build(family: str, batch: int = 2) -> tuple[nn.Module, dict[str, Any]]:
    options = {"batch": batch} if family in ("wan", "latte") else {}
    model, inputs = tiny.build({"wan": "wan_t2v"}.get(family, family), **options)
    return model, inputs


def at(inputs: dict[str, Any], *timesteps: float) -> dict[str, Any]:
    """The inputs with these timesteps, one per item or one for all."""
    now = inputs["timestep"]
    return inputs | {"timestep": torch.tensor(timesteps).to(now.dtype).expand(len(now)).clone()}


@pytest.mark.parametrize("kinds", KINDS, ids=lambda kinds: "+".join(kinds) or "all")
@pytest.mark.parametrize("family", dydit.FAMILIES)
@torch.no_grad()
def test_skipping_is_masking(family: str, kinds: tuple[str, ...]) -> None:
    model, inputs = build(family)
    routers = dydit.draw(model, family, *kinds)
    steps = [at(inputs, t) for t in (900, 500, 60)]
    if len(inputs["timestep"]) == 2:
        steps.append(at(inputs, 900, 60))
    wants, differ = [], 0
    with dydit.masked(model, family, routers) as decided:
        for step in steps:
            wants.append(tiny.run(model, step))
            masks = [x for name, x in decided.items() if name.endswith("rate")]
            differ += sum(not torch.equal(mask[0], mask[-1]) for mask in masks)
    stock = tiny.run(model, steps[0])
    with apply_dydit(model, routers) as handle:
        for step, want in zip(steps, wants, strict=True):
            assert tiny.relative(tiny.run(model, step), want) < 2e-5
        assert tiny.relative(stock, wants[0]) > 1e-3
        assert handle.report()["host_reads"] == 0  # on a CPU
    if len(steps) == 4 and kinds in ((), ("mlp_rate",)):
        assert differ  # items that need different parts were among them


@pytest.mark.parametrize("kinds", KINDS, ids=lambda kinds: "+".join(kinds) or "all")
@pytest.mark.parametrize("family", dydit.FAMILIES)
@torch.no_grad()
def test_everything_on_changes_no_bit(family: str, kinds: tuple[str, ...]) -> None:
    model, inputs = build(family)
    routers = dydit.draw(model, family, *kinds)
    stock = tiny.run(model, inputs)
    for dtype in (torch.float32, torch.bfloat16):
        with apply_dydit(model, dydit.always({name: x.to(dtype) for name, x in routers.items()})):
            assert torch.equal(tiny.run(model, inputs), stock)


@pytest.mark.parametrize("family", dydit.FAMILIES)
@torch.no_grad()
def test_models_in_16_bits(family: str) -> None:
    model, inputs = build(family)
    routers = dydit.draw(model, family, "attn_rate", "mlp_rate")  # near ties of tokens may differ
    exact = []
    for draw in (routers, dydit.always(dydit.draw(model, family))):
        with dydit.masked(model, family, draw):
            exact.append(tiny.run(model, inputs))
    model.bfloat16()
    inputs = tiny.cast(inputs, torch.bfloat16)
    stock = tiny.run(model, inputs)
    with apply_dydit(model, dydit.always(dydit.draw(model, family))):
        assert torch.equal(tiny.run(model, inputs), stock)
    with apply_dydit(model, routers):
        got = tiny.run(model, inputs)
    assert got.dtype == torch.bfloat16
    assert tiny.relative(got, exact[0]) < 2 * tiny.relative(stock, exact[1])
    with apply_dydit(model, dydit.draw(model, family)):
        assert tiny.run(model, inputs).isfinite().all()


@pytest.mark.parametrize("family", dydit.FAMILIES)
@torch.no_grad()
def test_no_token_leaves_the_residual(family: str) -> None:
    model, inputs = build(family)
    routers = dydit.always(dydit.draw(model, family, "token_selection"), on=-9.0)
    with apply_dydit(model, routers):
        got = tiny.run(model, inputs)
    for _, mlp, _ in dydit.blocks(model, family).values():
        for parameter in mlp.parameters():
            parameter.fill_(torch.nan)  # not read by anybody
    with apply_dydit(model, routers):
        assert torch.equal(tiny.run(model, inputs), got)
    for _, mlp, _ in dydit.blocks(model, family).values():
        for parameter in mlp.parameters():
            parameter.zero_()
    assert torch.equal(tiny.run(model, inputs), got)


@pytest.mark.parametrize("family", dydit.FAMILIES)
@torch.no_grad()
def test_work_is_counted(family: str) -> None:
    model, inputs = build(family)
    routers = dydit.draw(model, family)
    shapes: dict[str, torch.Size] = {}

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor]) -> None:
            shapes[path] = args[0].shape

        return hook

    found = dydit.blocks(model, family)
    hooks = [norm.register_forward_pre_hook(note(path)) for path, (_, _, norm) in found.items()]
    with dydit.masked(model, family, routers) as decided:
        tiny.run(model, at(inputs, 700))
    dense, done = dydit.flop(model, family, decided, shapes)
    for hook in hooks:
        hook.remove()
    with apply_dydit(model, routers) as handle:
        tiny.run(model, at(inputs, 700))
        report = handle.report()
    assert report["dense_flop"] == dense and report["flop"] == pytest.approx(done, rel=1e-12) and done < dense
    assert report["forwards"] == 1 and report["blocks"] == len(found)


@torch.no_grad()
def test_schedules_are_decided_beforehand() -> None:
    model, inputs = build("wan", batch=1)
    routers = dydit.draw(model, "wan")
    timesteps = torch.linspace(1000, 20, 50)
    with apply_dydit(model, routers) as handle:
        fresh = [tiny.run(model, at(inputs, float(t))) for t in timesteps[::9]]
        decided = {key: value for key, value in handle._known.items()}
        handle.precompute(timesteps)
        assert len(handle._known) == 50 and all(handle._known[key] == value for key, value in decided.items())
        model.get_submodule(dydit.EMBEDDERS["wan"]).register_forward_hook(
            lambda module, args, out: pytest.fail("decided again") if handle._decided is False else None
        )
        for t, want in zip(timesteps[::9], fresh, strict=True):
            assert torch.equal(tiny.run(model, at(inputs, float(t))), want)
        assert len({str(value) for value in handle._known.values()}) > 3


@torch.no_grad()
def test_removing_gives_the_stock_model_back() -> None:
    model, inputs = build("latte")
    stock = tiny.run(model, inputs)
    before = [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in m.__dict__) for m in model.modules()]
    handle = apply_dydit(model, dydit.draw(model, "latte"))
    with pytest.raises(ValueError, match="applied to this LatteTransformer3DModel already"):
        apply_dydit(model, dydit.draw(model, "latte"))
    assert not torch.equal(tiny.run(model, inputs), stock)
    handle.remove()
    handle.remove()
    after = [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in m.__dict__) for m in model.modules()]
    assert before == after and torch.equal(tiny.run(model, inputs), stock)
    assert all(attn.heads == 2 for attn, _, _ in dydit.blocks(model, "latte").values())


@torch.no_grad()
def test_a_later_wrapper_stays_and_passes_through() -> None:
    model, inputs = build("wan")
    stock = tiny.run(model, inputs)
    handle = apply_dydit(model, dydit.draw(model, "wan"))
    mlp: Any = model.get_submodule("blocks.0.ffn")
    inner, calls = mlp.forward, []

    def outer(x: Tensor) -> Tensor:
        calls.append(x.shape)
        return inner(x)

    mlp.forward = outer
    changed = tiny.run(model, inputs)
    handle.remove()
    assert mlp.forward is outer and torch.equal(tiny.run(model, inputs), stock)
    assert len(calls) == 2 and not torch.equal(changed, stock)


@torch.no_grad()
def test_copies_and_pickles() -> None:
    model, inputs = build("allegro")
    stock = tiny.run(model, inputs)
    handle = apply_dydit(model, dydit.draw(model, "allegro"))
    want = tiny.run(model, inputs)
    twin, part = copy.deepcopy(model), copy.deepcopy(model.get_submodule("transformer_blocks.0.ff"))
    pickled = pickle.loads(pickle.dumps(model))
    assert torch.equal(tiny.run(pickled, inputs), stock)
    x = torch.randn(2, 5, 48)
    before = handle.report()["forwards"], handle.report()["dense_flop"]
    handle.remove()
    assert torch.equal(part(x), model.get_submodule("transformer_blocks.0.ff")(x))
    assert torch.equal(tiny.run(twin, inputs), want) and torch.equal(tiny.run(model, inputs), stock)
    mine = twin.__dict__["_vdit_fast_dydit"]
    assert (handle.report()["forwards"], handle.report()["dense_flop"]) == before
    assert mine.report()["forwards"] == 2 and mine.report()["dense_flop"] > before[1]
    mine.remove()
    assert torch.equal(tiny.run(twin, inputs), stock)


@torch.no_grad()
def test_weights_that_change_are_cut_again() -> None:
    model, inputs = build("wan")
    routers = dydit.draw(model, "wan", "mlp_rate")
    for name, x in routers.items():  # groups 0 and 2: copies, not views
        x.copy_(torch.tensor([-9.0, 9.0, -9.0]) if name.endswith("bias") else torch.zeros_like(x))
    with apply_dydit(model, routers) as handle:
        first = tiny.run(model, inputs)
        assert torch.equal(tiny.run(model, inputs), first)
        mlps = [mlp for _, mlp, _ in dydit.blocks(model, "wan").values()]
        half = sum(layer.weight.numel() for mlp in mlps for layer in (mlp.net[0].proj, mlp.net[2])) // 2
        biases = sum(mlp.net[0].proj.bias.numel() for mlp in mlps) // 2
        assert handle.report()["weight_bytes"] == 4 * (half + biases)
        for mlp in mlps:
            mlp.net[0].proj.weight.mul_(2)
            mlp.net[2].weight = nn.Parameter(mlp.net[2].weight * 2)
        changed = tiny.run(model, inputs)
    with apply_dydit(model, routers):
        assert torch.equal(tiny.run(model, inputs), changed) and not torch.equal(first, changed)


@torch.no_grad()
def test_weights_of_few_masks_are_kept() -> None:
    parts, x = WeightParts(), torch.randn(8, 3)
    masks = [tuple(i == unit or i == 0 for i in range(8)) for unit in range(2, 8)]
    for mask in masks:
        (cut,) = parts.get(mask, (x,), lambda mask=mask: (take(x, 0, mask),))  # type: ignore[misc]
        assert torch.equal(cut, x[list(mask)])
    assert parts.bytes == 4 * 2 * 3 * 4  # four masks of two rows
    again = [parts.get(mask, (x,), lambda: pytest.fail("cut again"))[0] for mask in masks[2:]]
    assert torch.equal(again[-1], x[[0, 7]])
    assert take(x, 0, (True, True, False, False)).untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_gradients_reach_the_model() -> None:
    model, inputs = build("wan")
    routers = dydit.draw(model, "wan")
    model.requires_grad_(True)
    with dydit.masked(model, "wan", routers):
        model(**inputs)[0].square().mean().backward()
    values = [p.grad for p in model.parameters()]
    model.zero_grad()
    with apply_dydit(model, routers):
        model(**inputs)[0].square().mean().backward()
    for want, p in zip(values, model.parameters(), strict=True):
        if want is None:
            assert p.grad is None
        else:
            torch.testing.assert_close(p.grad, want, atol=1e-5 * float(want.abs().max()) + 1e-9, rtol=1e-3)


@pytest.mark.parametrize("first", ["accelerate", "dydit"])
@pytest.mark.parametrize("family", ["allegro", "latte"])
@torch.no_grad()
def test_together_with_accelerate(family: str, first: str) -> None:
    model, inputs = build(family)
    routers = dydit.draw(model, family)
    with apply_dydit(model, routers):
        want = tiny.run(model, inputs)
    if first == "accelerate":
        accelerate(model)
        apply_dydit(model, routers)
    else:
        apply_dydit(model, routers)
        accelerate(model)
    assert tiny.relative(tiny.run(model, inputs), want) < 2e-5


@torch.no_grad()
def test_accelerated_wan_needs_all_heads() -> None:
    model, inputs = build("wan")
    with apply_dydit(model, dydit.draw(model, "wan", "mlp_rate", "token_selection")):
        want = tiny.run(model, inputs)
        with accelerate(model):
            assert tiny.relative(tiny.run(model, inputs), want) < 2e-5
    message = r"blocks.0: its norms of q and k run over all heads.*remove"
    with apply_dydit(model, dydit.draw(model, "wan")), accelerate(model), pytest.raises(RuntimeError, match=message):
        tiny.run(model, inputs)


class Mlp(nn.Module):
    """The MLP of an image DiT."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(24, 48), nn.GELU(approximate="tanh"), nn.Linear(48, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(24), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Small(nn.Module):
    """A model that only a layout makes known."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.embed = nn.Unflatten(0, (-1, 1)), nn.Linear(1, 24)
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = x + self.embed(self.proj(timestep))[:, None]
        for layer in self.layers:
            x = layer(x)
        return x


@torch.no_grad()
def test_a_layout_for_another_model() -> None:
    model, x, t = Small(), torch.randn(2, 9, 24), torch.tensor([0.3, 0.3])
    layout = Layout(("layers",), embedder="embed", projection="proj", mlp="mlp", norm="norm")
    weight = torch.randn(3, 24)
    with pytest.raises(ValueError, match=r"apply_dydit does not know Small.*pass layout"):
        apply_dydit(model, {})
    with apply_dydit(model, {"layers.1.mlp_rate.router.weight": weight}, layout=layout) as handle:
        got = model(x, t)
        assert handle.report()["blocks"] == 1
        handle.precompute(torch.tensor([0.3, 0.8]))
        assert torch.equal(model(x, t), got)
    mask = torch.cat([torch.ones(1), (weight @ model.embed(torch.tensor([0.3])) > 0).float()]).repeat_interleave(12)
    assert 0.2 < mask.mean() < 1
    x = model.layers[0](x + model.embed(t[:, None])[:, None])
    mlp: Any = model.layers[1].mlp
    want = x + mlp.fc2(mlp.act(mlp.fc1(model.layers[1].norm(x))) * mask)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_bad_routers() -> None:
    model, inputs = build("wan")
    good = dydit.draw(model, "wan")

    def refused(message: str, change: dict[str, Tensor], drop: str = "-") -> None:
        routers = {name: x for name, x in (good | change).items() if not name.endswith(drop)}
        with pytest.raises(ValueError, match=message):
            apply_dydit(model, routers)
        assert all("forward" not in m.__dict__ for m in model.modules())

    def pair(name: str, rows: int) -> dict[str, Tensor]:
        return {f"{name}.weight": torch.zeros(rows, 32), f"{name}.bias": torch.zeros(rows)}

    attention = "blocks.0.attn_rate.router"
    misspelt = rf"'{attention}.weigth' is no router's parameter; did you mean '{attention}.weight'"
    refused(misspelt, {f"{attention}.weigth": torch.zeros(1, 32)})
    refused("blocks.1.attn_rate.router decides on 3 heads, the attention has 2", pair("blocks.1.attn_rate.router", 2))
    refused("decides on 7 groups, which do not divide 48 channels", pair("blocks.0.mlp_rate.router", 6))
    refused("has weight .1, 32. and bias .2.", {"blocks.0.attn_rate.router.bias": torch.zeros(2)})
    refused("has a bias and no weight", {}, drop="0.attn_rate.router.weight")
    one_layer = {name: x for name, x in good.items() if "mlp_head.2" not in name}
    with pytest.raises(ValueError, match="needs both of its layers, 0 and 2"):
        apply_dydit(model, one_layer)
    with pytest.raises(ValueError, match="routers is empty"):
        apply_dydit(model, {})
    projection: Any = model.get_submodule("blocks.0.attn1")
    projection.to_v = nn.Sequential(projection.to_v)
    refused("to_v is a Sequential; only plain nn.Linear", {})
    with apply_dydit(model, {k: v for k, v in good.items() if "mlp_rate" in k}) as handle, torch.no_grad():
        per_token = inputs | {"timestep": torch.full((2, 48), 500.0)}
        with pytest.raises(ValueError, match="not one per token"):
            tiny.run(model, per_token)
        with pytest.raises(ValueError, match="timesteps has shape"):
            handle.precompute(torch.zeros(2, 2))


@torch.no_grad()
def test_an_mlp_on_other_tokens_than_its_norm() -> None:
    model, inputs = build("allegro")
    norm: Any = model.get_submodule("transformer_blocks.0.norm2")
    with apply_dydit(model, dydit.draw(model, "allegro", "token_selection")):
        tiny.run(model, inputs)
        with pytest.raises(RuntimeError, match=r"the norm before the MLP never ran"):
            model.get_submodule("transformer_blocks.0.ff")(torch.randn(1, 5, 48))
        norm.forward = lambda x: nn.LayerNorm.forward(norm, x)[:, :-1]
        with pytest.raises(RuntimeError, match=r"transformer_blocks.0: the norm before the MLP saw tokens"):
            tiny.run(model, inputs)


def test_layers_refuse_masks_of_other_sizes() -> None:
    from vdit_fast.dynamic import Units

    units = Units((True, False, True))
    block = DyDiTBlock(32, 4)
    with pytest.raises(ValueError, match="3 heads in the mask, 4 in the layer"):
        block.attn(torch.randn(1, 5, 32), units)
    with pytest.raises(ValueError, match="3 groups in the mask, 4 in the layer"):
        block.mlp(torch.randn(1, 5, 32), units)
    with pytest.raises(ValueError, match="groups 3 does not divide hidden 32"):
        DynamicMlp(8, 32, 3)
    with pytest.raises(ValueError, match="num_heads 3 does not divide dim 32"):
        DyDiTBlock(32, 3)
