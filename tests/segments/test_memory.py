"""Memory rows in models: every family's recipe, what shares them, and what refuses them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from families.skyreels_v2 import skyreels
from torch import Tensor, nn

from vdit_fast.accelerate import accelerate
from vdit_fast.config import Config
from vdit_fast.models.memory import Memory
from vdit_fast.subset import RAS

M = 40
SERVED = (
    "allegro", "cogvideox_2b", "cogvideox_5b", "consisid", "easyanimate", "hunyuan_framepack", "hunyuan_token_replace",
    "hunyuan_video", "hunyuan_video15", "ltx_video", "mochi", "skyreels_df", "wan_animate", "wan_i2v", "wan_t2v",
    "wan_ti2v",
)  # fmt: skip


def width(model: nn.Module) -> int:
    name = next(name for name in tiny.served(model))
    found: int = model.get_submodule(name).to_k.in_features
    return found


class _Reached(Exception):
    pass


def stock_input(block: nn.Module, attention: str, arguments: dict[str, Any]) -> Tensor:
    """What the stock block hands its attention."""
    seen: list[Tensor] = []

    def stop(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
        raise _Reached

    hook = block.get_submodule(attention).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        type(block).forward(block, **arguments)
    except _Reached:
        pass
    finally:
        hook.remove()
    return seen[0]


@pytest.mark.parametrize("kind", SERVED)
def test_keys_are_those_of_rows_in_place_of_the_video(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stock block that is given the memory rows as its video hands its attention what memory's keys are made of."""
    model, inputs = tiny.build(kind)
    handle = accelerate(model, Config(fuse="off"))
    plain = tiny.run(model, inputs)
    handle.memory(torch.randn(M, width(model)))
    keys, seen = Memory._keys, []

    def noted(self: Memory, call: Any, layer: int, modules: Any, rows: Tensor, forward: Any) -> tuple[Tensor, Tensor]:
        k, v = keys(self, call, layer, modules, rows, forward)
        layout, batch = modules.memory, k.shape[0]
        x = rows.expand(batch, -1, -1)
        arguments = layout.arguments(call.arguments, call.block.streams[0], x, forward)
        if "token_replace_emb" in arguments:  # no row of memory is one of the first frame
            arguments |= {"token_replace_emb": call.arguments["token_replace_emb"], "num_tokens": 0}
        h = stock_input(call.module, layout.attention, arguments)
        attn = call.module.get_submodule(layout.attention)
        want_k, want_v = attn.to_k(h), attn.to_v(h).unflatten(2, (attn.heads, -1))
        norm = attn.norm_k
        if norm is not None and layout.across:
            want_k = norm(want_k)
        want_k = want_k.unflatten(2, (attn.heads, -1))
        if norm is not None and not layout.across:
            want_k = norm(want_k)
        assert tiny.relative(k, want_k) < 1e-5 and tiny.relative(v, want_v) < 1e-5
        seen.append(layer)
        return k, v

    monkeypatch.setattr(Memory, "_keys", noted)
    got = tiny.run(model, inputs)
    assert sorted(seen) == [layer["layer"] for layer in handle.stats()["layers"]]
    assert got.isfinite().all() and tiny.relative(got, plain) > 1e-3
    handle.memory(None)
    assert torch.equal(tiny.run(model, inputs), plain)


def test_every_family_serves_memory_or_says_why_not() -> None:
    for kind in tiny.BUILDERS:
        if kind in SERVED:
            continue
        model, _ = tiny.build(kind)
        handle = accelerate(model)
        with pytest.raises(RuntimeError, match="memory: "):
            handle.memory(torch.randn(M, 32))
        assert handle.stats()["memory"] is None


@pytest.mark.parametrize("kind", ["wan", "hunyuan_video", "cogvideox"])
def test_batch_items_differ(kind: str) -> None:
    """Rows, prompts and padding of their own: the batch is what each item is alone."""
    build: dict[str, Callable[[], tiny.Built]] = {
        "wan": lambda: tiny.wan(batch=2), "hunyuan_video": lambda: tiny.hunyuan(lengths=(5, 9)),
        "cogvideox": tiny.cogvideox,
    }  # fmt: skip
    model, inputs = build[kind]()
    rows = torch.randn(2, M, 32)
    handle = accelerate(model).memory(rows)
    both = tiny.run(model, inputs)
    for i in range(2):
        one = {
            name: value[i : i + 1] if isinstance(value, Tensor) and value.shape[:1] == (2,) else value
            for name, value in inputs.items()
        }
        handle.memory(rows[i])
        assert tiny.relative(both[i : i + 1], tiny.run(model, one)) < 1e-5


def test_branches_share_nothing_where_the_prompt_enters_the_modulation() -> None:
    """HunyuanVideo adds the pooled prompt to the timestep."""
    model, inputs = tiny.hunyuan(lengths=(9,))
    assert inputs["timestep"].numel() == 1
    other = {**inputs, "pooled_projections": torch.randn_like(inputs["pooled_projections"])}
    handle = accelerate(model).memory(torch.randn(M, 32))
    tiny.run(model, inputs)
    got = tiny.run(model, other)
    handle.reset()
    assert torch.equal(tiny.run(model, other), got) and handle.stats()["memory"]["shared"] == 0


def test_guidance_branches_share_until_weights_change() -> None:
    """A timestep that comes again is taken for another branch, whatever happened to the weights between the calls."""
    model, inputs = tiny.wan()
    rows = torch.randn(M, 32)
    handle = accelerate(model).memory(rows)
    for path in ("condition_embedder.time_proj.weight", "blocks.0.scale_shift_table", "blocks.1.attn1.to_k.weight",
                 "blocks.0.attn1.norm_k.weight", "blocks.1.attn1.to_v.bias"):  # fmt: skip
        tiny.run(model, inputs)
        shared = handle.stats()["memory"]["shared"]
        tiny.run(model, inputs)
        assert handle.stats()["memory"]["shared"] == shared + 2
        with torch.no_grad():
            model.get_parameter(path).mul_(3)
        got = tiny.run(model, inputs)
        handle.memory(None)
        handle.memory(rows)
        assert torch.equal(got, tiny.run(model, inputs)), path
    model.blocks[0].attn1.fuse_projections()
    assert tiny.relative(tiny.run(model, inputs), got) < 1e-5


def test_a_new_generation_lets_go_of_what_is_kept() -> None:
    model, inputs = tiny.wan()
    handle = accelerate(model).memory(torch.randn(M, 32))

    def held() -> int:
        found: int = handle.stats()["memory"]["nbytes"]
        return found

    tiny.run(model, inputs)
    layer = 2 * M * 32 * 4
    assert held() == 2 * layer
    handle.reset()
    assert held() == 0
    tiny.run(model, inputs)
    handle.reconfigure(Config(fuse="off"))
    assert held() == 0
    tiny.run(model, tiny.at(inputs, 300.0))
    seen: list[int] = []
    handle.hook("block_output", lambda step, place, rows: seen.append(held()), layers=0)
    tiny.run(model, tiny.at(inputs, 900.0))  # more noise
    assert seen == [layer] and held() == 2 * layer


def test_names_of_weights_and_steps_share_nothing() -> None:
    """Strong and weak (W2SD) compute the same timesteps in turn; steps of equal timesteps are steps of their own."""
    model, inputs = tiny.wan()
    handle = accelerate(model).memory(torch.randn(M, 32))
    seen = []
    for step, name in ((0, "strong"), (0, "strong"), (0, "weak"), (0, "strong"), (1, "strong"), (1, "weak")):
        shared = handle.stats()["memory"]["shared"]
        with handle.step(step, timestep=500.0, model=name):
            tiny.run(model, inputs)
        seen.append(handle.stats()["memory"]["shared"] - shared)
    assert seen == [0, 2, 0, 0, 0, 0]


def test_an_adapter_of_another_scale_is_another_model() -> None:
    peft = pytest.importorskip("peft")
    model, inputs = tiny.wan()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["attn1.to_v"], init_lora_weights=False))
    handle = accelerate(model).memory(torch.randn(M, 32))
    first = tiny.run(model, inputs)
    assert torch.equal(tiny.run(model, inputs), first) and handle.stats()["memory"]["shared"] == 2
    for change in (lambda: model.set_adapters("default", 5.0), model.disable_adapters):
        change()
        got = tiny.run(model, inputs)
        assert tiny.relative(got, first) > 1e-3
        handle.reset()
        assert torch.equal(got, tiny.run(model, inputs))


@pytest.mark.parametrize("form", [list, torch.tensor])
def test_another_frame_rate_is_another_modulation(form: Any) -> None:
    """SkyReels-V2 adds the frame rate to the timestep."""
    model, inputs = skyreels(sample_info=True)
    handle = accelerate(model).memory(torch.randn(M, 32))
    slow, fast = form([0]), form([1])
    for fps, shared in ((slow, 0), (slow, 2), (fast, 2)):
        got = tiny.run(model, {**inputs, "fps": fps})
        assert handle.stats()["memory"]["shared"] == shared
    handle.reset()
    assert torch.equal(got, tiny.run(model, {**inputs, "fps": fast}))
    if isinstance(fast, Tensor):
        fast.zero_()
        assert tiny.relative(tiny.run(model, {**inputs, "fps": fast}), got) > 1e-3
        assert handle.stats()["memory"]["shared"] == 2


def test_gradients_reach_rows_and_weights() -> None:
    model, inputs = tiny.wan()
    model.requires_grad_(True)
    rows = torch.randn(1, M, 32, requires_grad=True)
    handle = accelerate(model)

    def loss(rows: Tensor) -> Tensor:
        handle.memory(rows)
        found: Tensor = model(**inputs)[0].square().mean()
        return found

    loss(rows).backward()
    assert rows.grad is not None
    direction, step = torch.randn_like(rows), 1e-2
    with torch.no_grad():
        slope = (loss(rows + step * direction) - loss(rows - step * direction)) / (2 * step)
    assert float(slope) == pytest.approx(float((rows.grad * direction).sum()), rel=2e-2)


def test_training_after_inference_mode() -> None:
    model, inputs = tiny.cogvideox()  # whose norm has weights
    model.requires_grad_(True)
    accelerate(model).memory(torch.randn(M, 32, dtype=torch.float64))
    with torch.inference_mode():
        want = model(**inputs)[0]
    got = model(**inputs)[0]
    got.square().mean().backward()
    assert tiny.relative(got.detach(), want) < 1e-5
    assert model.get_parameter("transformer_blocks.0.norm1.norm.weight").grad is not None


def test_gradient_checkpointing_makes_the_same_keys_again() -> None:
    model, inputs = tiny.wan()
    model.requires_grad_(True)
    calls: list[int] = []

    def rows(step: Any) -> Tensor:
        calls.append(step.step)
        return torch.randn(M, 32, generator=torch.Generator().manual_seed(len(calls)))

    handle = accelerate(model).memory(rows)
    runs = [tiny.at(inputs, t) for t in (900.0, 500.0)]
    want = tiny.gradients(model, runs)
    calls.clear()
    handle.reset()
    model.enable_gradient_checkpointing()
    model.train()
    tiny.same_gradients(tiny.gradients(model, runs), want)
    assert calls == [0, 1]  # and not once more in backward


def test_a_function_is_asked_once_per_forward() -> None:
    model, inputs = tiny.wan()
    asked: list[tuple[int, int]] = []

    def rows(step: Any) -> Tensor | None:
        asked.append((step.step, step.branch))
        return None if step.branch else torch.ones(M, 32)

    handle = accelerate(model)
    plain = tiny.run(model, inputs)
    handle.memory(rows)
    with_rows, without = tiny.run(model, inputs), tiny.run(model, inputs)
    assert asked == [(0, 0), (0, 1)] and torch.equal(without, plain) and not torch.equal(with_rows, plain)
    with pytest.raises(TypeError, match="called with"):
        handle.memory(lambda: None)
    handle.memory(lambda step: "rows")
    with pytest.raises(TypeError, match="floating tensor"):
        tiny.run(model, inputs)


def test_rows_are_copied_and_follow_the_models_dtype() -> None:
    model, inputs = tiny.wan()
    model, inputs = model.to(torch.bfloat16), tiny.cast(inputs, torch.bfloat16)
    rows = torch.randn(M, 32)
    accelerate(model).memory(rows)
    want = tiny.run(model, inputs)
    rows.zero_()
    assert torch.equal(tiny.run(model, inputs), want)
    with torch.autocast("cpu", torch.bfloat16):
        assert tiny.run(model, inputs).isfinite().all()


def test_under_autocast() -> None:
    model, inputs = tiny.wan()
    accelerate(model).memory(torch.randn(M, 32))
    want = tiny.run(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert tiny.relative(tiny.run(model, inputs), want) < 0.05


def test_hooks_behind_the_softmax_see_memory_in_every_plan() -> None:
    model, inputs = tiny.wan()
    handle = accelerate(model).memory(torch.randn(M, 32))
    differences: list[float] = []

    def again(step: Any, place: Any, rows: Any) -> None:
        differences.append(tiny.relative(rows.attend(None).video, rows.video))

    handle.hook("attention_heads", again)
    tiny.run(model, inputs)
    assert len(differences) == 2 and max(differences) < 1e-6


def test_subsets_of_the_tokens_read_all_of_memory() -> None:
    """Partial steps of RAS: rows left out keep their keys, memory's are made anew."""
    model, inputs = tiny.wan()
    rows = torch.randn(M, 32)
    dense = accelerate(model).memory(rows)
    want = [tiny.run(model, tiny.at(inputs, t)) for t in (900.0, 800.0, 700.0, 600.0)]
    dense.remove()
    handle = accelerate(model, Config(subset=RAS(sample_ratio=0.5, start=2)))
    handle.memory(rows)
    got = [tiny.run(model, tiny.at(inputs, t)) for t in (900.0, 800.0, 700.0, 600.0)]
    assert set(handle.stats()["subset"]["partial"]) == {2, 3}
    assert all(tiny.relative(a, b) < 1e-5 for a, b in zip(got[:2], want, strict=False))
    assert all(x.isfinite().all() for x in got) and tiny.relative(got[2], want[2]) < 0.3


def test_per_token_timesteps_under_a_subset() -> None:
    model, inputs = tiny.wan(per_token=True)
    handle = accelerate(model, Config(subset=RAS(sample_ratio=0.5, start=2)))
    handle.memory(torch.randn(M, 32))
    for t in (900.0, 800.0, 700.0):
        assert tiny.run(model, tiny.at(inputs, t)).isfinite().all()
    assert handle.stats()["subset"]["partial"]


def test_both_experts_of_a_pipeline_get_it() -> None:
    first, inputs = tiny.wan()
    second, _ = tiny.wan(layers=1)
    pipe = SimpleNamespace(transformer=first, transformer_2=second)
    handle = accelerate(pipe)
    plain = [tiny.run(m, inputs) for m in (first, second)]
    handle.memory(torch.randn(M, 32))
    assert all(not torch.equal(tiny.run(m, inputs), x) for m, x in zip((first, second), plain, strict=True))
    assert handle.stats()["memory"]["computed"] == 3
    handle.memory(None)
    assert all(torch.equal(tiny.run(m, inputs), x) for m, x in zip((first, second), plain, strict=True))


def test_copies_have_it_and_pickles_do_not() -> None:
    model, inputs = tiny.wan()
    stock = tiny.run(model, inputs)
    handle = accelerate(model).memory(torch.randn(M, 32))
    want = tiny.run(model, inputs)
    twin = copy.deepcopy(model)
    assert torch.equal(tiny.run(twin, inputs), want)
    handle.memory(None)
    assert torch.equal(tiny.run(twin, inputs), want)  # a handle of its own
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(tiny.run(loaded, inputs), stock)


def test_fused_projections() -> None:
    model, inputs = tiny.wan()
    rows = torch.randn(M, 32)
    accelerate(model).memory(rows)
    want = tiny.run(model, inputs)
    if not hasattr(model, "fuse_qkv_projections"):
        pytest.skip("this diffusers cannot fuse Wan's projections")
    model.fuse_qkv_projections()
    assert tiny.relative(tiny.run(model, inputs), want) < 1e-5


def test_a_compiled_model() -> None:
    model, inputs = tiny.wan()
    handle = accelerate(model).memory(torch.randn(M, 32))
    want = tiny.run(model, inputs)
    compiled = torch.compile(model, backend="eager")
    assert tiny.relative(tiny.run(compiled, inputs), want) < 1e-6
    torch._dynamo.reset()
    with pytest.raises(Exception, match="compile without fullgraph"):
        tiny.run(torch.compile(model, backend="eager", fullgraph=True), inputs)
    torch._dynamo.reset()
    assert handle.stats()["memory"]["tokens"] == M


def test_a_block_whose_stock_attention_runs_is_an_error() -> None:
    model, inputs = tiny.wan()
    stock = model.blocks[1].attn1.processor
    accelerate(model).memory(torch.randn(M, 32))
    model.blocks[1].attn1.set_processor(stock)
    with pytest.raises(RuntimeError, match="did not read it"):
        tiny.run(model, inputs)


def test_linear_layers_refuse(tmp_path: Any) -> None:
    pytest.importorskip("safetensors")
    from linear_models import save_random_maps

    model, inputs = tiny.wan()
    linear = save_random_maps(tmp_path / "maps.safetensors", model, [1], inputs=inputs)
    handle = accelerate(model, Config(linear=linear))
    with pytest.raises(RuntimeError, match="layers of linear attention"):
        handle.memory(torch.randn(M, 32))
    handle.reconfigure(Config()).memory(torch.randn(M, 32)).reconfigure(Config(linear=linear))
    with pytest.raises(RuntimeError, match="this call has further keys"):
        tiny.run(model, inputs)


@pytest.mark.parametrize(("rows", "error", "match"), [
    ([1.0], TypeError, "got list"), (torch.ones(3, 32, dtype=torch.int32), TypeError, "int32"),
    (torch.ones(32), ValueError, r"\[32\]"), (torch.ones(0, 32), ValueError, "not empty"),
    (torch.ones(1, 2, 3, 32), ValueError, "and not empty"),
    (torch.ones(5, 32).index_fill(0, torch.tensor(3), torch.nan), ValueError,
     r"memory: rows \[5, 32\]: 32 numbers are not finite, the first at \[3, 0\]"),
    (torch.ones(1, 5, 32, dtype=torch.bfloat16).mul(-torch.inf), ValueError,
     r"160 numbers are not finite, the first at \[0, 0, 0\]"),
])  # fmt: skip
def test_bad_rows(rows: Any, error: type[Exception], match: str) -> None:
    model, _ = tiny.wan()
    with pytest.raises(error, match=match):
        accelerate(model).memory(rows)


def test_rows_of_8_bits_are_looked_at_too() -> None:
    model, _ = tiny.wan()
    rows = torch.randn(M, 32).to(torch.float8_e4m3fn)
    accelerate(model).memory(rows)
    rows[0, 1] = torch.nan
    with pytest.raises(ValueError, match=r"1 numbers are not finite, the first at \[0, 1\]"):
        accelerate(model).memory(rows)


@pytest.mark.parametrize("shape", [(M, 16), (3, M, 32)])
def test_rows_of_another_model(shape: tuple[int, ...]) -> None:
    model, inputs = tiny.wan(batch=2)
    handle = accelerate(model).memory(torch.randn(shape))
    with pytest.raises(ValueError, match=r"pass \[M, 32\] or \[2, M, 32\]"):
        tiny.run(model, inputs)
    handle.remove()
    with pytest.raises(RuntimeError, match="was removed"):
        handle.memory(torch.randn(M, 32))
    assert tiny.run(model, inputs).isfinite().all()


def test_tokens_with_timesteps_that_nobody_knows() -> None:
    """A block by itself, or a transformer of which only a part is called: which token is the noisiest is unknown."""
    model, inputs = tiny.wan(per_token=True)
    handle = accelerate(model).memory(torch.randn(M, 32))
    tiny.run(model, inputs)
    handle.roots[0].session.forward.timestep = None  # type: ignore[union-attr]
    x, temb = torch.randn(1, 48, 32), torch.randn(1, 48, 6, 32)
    with pytest.raises(RuntimeError, match="modulation of their own"):
        model.blocks[0](x, torch.randn(1, 5, 32), temb, None)
