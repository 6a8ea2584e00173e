"""Where hooks are called, what they see, what they change, and that nothing of them is left."""

from __future__ import annotations

import copy
import pickle
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from vdit_fast.accelerate import accelerate
from vdit_fast.caching import TaylorSeer
from vdit_fast.config import Config
from vdit_fast.hooks import TemporalAdapter
from vdit_fast.models.geometry import Geometry
from vdit_fast.models.hooks import WHERE, HookPlace, HookRows
from vdit_fast.plan import AttentionPlan
from vdit_fast.planners import SVG2, Draft

ATTENTION = [where for where in WHERE if where.startswith("attention")]


class Seen:
    """Notes what a hook is given, and changes nothing, or what ``change`` makes of it."""

    def __init__(self, change: Any = None) -> None:
        self.calls: list[tuple[Any, HookPlace, HookRows]] = []
        self.change = change

    def __call__(self, step: Any, place: HookPlace, rows: HookRows) -> Any:
        self.calls.append((step, place, rows))
        return None if self.change is None else self.change(rows)


@pytest.mark.parametrize("where", WHERE)
def test_every_family_shows_its_rows_and_keeps_its_bits(family: str, where: str) -> None:
    model, inputs = tiny.build(family)
    handle = accelerate(model)
    plain = tiny.run(model, inputs)
    hook = Seen()
    if where == "block_output" and not handle.roots[0].adapter.block_lists:
        with pytest.raises(RuntimeError, match="no blocks"):
            handle.hook(where, hook)
        return
    remove = handle.hook(where, hook)
    assert torch.equal(tiny.run(model, inputs), plain)
    places = sorted((place.index, place.name) for _, place, _ in hook.calls)  # a UNet's middle was made last
    assert places == list(enumerate(remove.names)) and len(places) == hook.calls[0][1].count
    for step, place, rows in hook.calls:
        assert step.timestep == 500 and place.where == where and place.family == handle.roots[0].adapter.family
        assert place.grid is not None and rows.video.shape[1] in (
            place.grid[0], place.grid[1] * place.grid[2], place.grid[0] * place.grid[1] * place.grid[2],
        )  # fmt: skip
        if where in ("attention_output", "block_output"):
            assert rows.video_input is not None and rows.video_input.shape[:2] == rows.video.shape[:2]
            assert (rows.context is None) == (rows.context_input is None)
    assert handle.stats()["hooks"] == {where: len(hook.calls)}
    remove()
    assert torch.equal(tiny.run(model, inputs), plain)
    assert all("forward" not in m.__dict__ for name, m in model.named_modules() if name.rpartition(".")[2] == "attn1")


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("name", ["wan_t2v", "cogvideox_5b", "hunyuan_video", "hunyuan_framepack", "latte"])
def test_what_a_hook_returns_goes_on(name: str, where: str) -> None:
    model, inputs = tiny.build(name)
    handle = accelerate(model)
    if where == "block_output" and not handle.roots[0].adapter.block_lists:
        return
    plain = tiny.run(model, inputs)
    same = handle.hook(where, lambda step, place, rows: rows.video.clone())
    assert torch.equal(tiny.run(model, inputs), plain)
    same()
    with handle.hook(where, lambda step, place, rows: rows.video.flip(-1), layers=-1):
        changed = tiny.run(model, inputs)
        assert tiny.relative(changed, plain) > 1e-4
    assert torch.equal(tiny.run(model, inputs), plain)
    handle.remove()
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_keys_of_the_same_rows_change_with_them() -> None:
    """Lumina-Next gives its attention the same rows twice, for queries and for keys."""
    model, inputs = tiny.build("lumina_next")
    handle = accelerate(model)

    def both(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        rows = kwargs["hidden_states"].flip(-1)
        return args, kwargs | {"hidden_states": rows, "encoder_hidden_states": rows}

    attn = model.get_submodule("layers.0.attn1")
    before = attn.register_forward_pre_hook(both, with_kwargs=True)
    want = tiny.run(model, inputs)
    before.remove()
    handle.hook("attention_input", lambda step, place, rows: rows.video.flip(-1), layers=0)
    assert torch.equal(tiny.run(model, inputs), want)


@pytest.mark.parametrize("name", ["cogvideox_5b", "hunyuan_video"])
def test_text_and_video_are_told_apart(name: str) -> None:
    """The joint sequence behind the softmax is cut where the streams of the module end."""
    model, inputs = tiny.build(name)
    handle = accelerate(model)
    text = inputs["encoder_hidden_states"].shape[1]
    heads, outputs, blocks = Seen(), Seen(), Seen()
    handle.hook("attention_heads", heads, layers=0)
    handle.hook("attention_output", outputs, layers=0)
    handle.hook("block_output", blocks, layers=0)
    tiny.run(model, inputs)
    video = 3 * 4 * 4 if name == "hunyuan_video" else heads.calls[0][1].geometry.n_video  # type: ignore[union-attr]
    for seen in (heads, outputs, blocks):
        _, _, rows = seen.calls[0]
        assert rows.video.shape[1] == video and rows.context is not None and rows.context.shape[1] == text
    attn = model.get_submodule(outputs.calls[0][1].name)
    rows = heads.calls[0][2]
    projected = attn.to_out[0](rows.video.flatten(2))  # type: ignore[operator, index]
    assert tiny.relative(projected, outputs.calls[0][2].video) < 1e-6


def test_changed_text_rows() -> None:
    model, inputs = tiny.build("cogvideox_5b")
    handle = accelerate(model)
    plain = tiny.run(model, inputs)
    for where in WHERE:
        assert tiny.relative(changed(handle, model, inputs, where, lambda r: (None, r.context.flip(-1))), plain) > 1e-5


def changed(handle: Any, model: nn.Module, inputs: dict[str, Any], where: str, change: Any) -> Tensor:
    with handle.hook(where, Seen(change), layers=0):
        return tiny.run(model, inputs)


@pytest.mark.parametrize("where", WHERE)
def test_rows_are_in_the_models_order_whatever_a_planner_permutes(where: str) -> None:
    """A hook that depends on where a row lies, under planners that permute tokens but keep every pair."""
    answers = []
    ramp = torch.linspace(0.5, 1.5, 3 * 4 * 4)
    for planner in (None, Draft(sparsity=0.0, pool=(2, 2)), SVG2(top_p=1.0, q_clusters=4, k_clusters=4)):
        model, inputs = tiny.wan()
        handle = accelerate(model, Config(attention=planner))
        handle.hook(where, lambda step, place, rows: rows.video * ramp.view(1, -1, *[1] * (rows.video.ndim - 2)))
        answers.append(tiny.run(model, inputs))
        if planner is not None:
            assert all(layer["sparse_calls"] == 1 for layer in handle.stats()["layers"])
    assert tiny.relative(answers[1], answers[0]) < 1e-5 and tiny.relative(answers[2], answers[0]) < 1e-5


def test_framepacks_earlier_clips_are_no_video_rows() -> None:
    model, inputs = tiny.build("hunyuan_framepack")
    handle = accelerate(model, Config(attention=tiny.Band(width=200)))
    hooks = {where: Seen() for where in WHERE}
    for where, hook in hooks.items():
        handle.hook(where, hook)
    tiny.run(model, inputs)
    for where, hook in hooks.items():
        for _, place, rows in hook.calls:
            assert place.geometry is not None and place.geometry.history == 38, where
            assert rows.video.shape[1] == place.geometry.n_video == 48, where


def test_a_second_attention_over_another_plan() -> None:
    model, inputs = tiny.wan()
    handle = accelerate(model)
    plain = tiny.run(model, inputs)
    mask = torch.ones(48, 48, dtype=torch.bool).tril()

    def same(step: Any, place: HookPlace, rows: HookRows) -> Tensor:
        again = rows.attend(None)
        torch.testing.assert_close(again.video, rows.video, atol=1e-6, rtol=1e-5)
        return again.video

    with handle.hook("attention_heads", same):
        assert tiny.relative(tiny.run(model, inputs), plain) < 1e-6
    with handle.hook("attention_heads", lambda step, place, rows: rows.attend(AttentionPlan.from_mask(mask)).video):
        causal = tiny.run(model, inputs)
    assert tiny.relative(causal, plain) > 1e-3
    handle.hook("attention_output", lambda step, place, rows: rows.attend(None).video)
    with pytest.raises(RuntimeError, match="attention_heads"):
        tiny.run(model, inputs)


def test_hooks_of_one_place_in_the_order_they_were_made() -> None:
    model, inputs = tiny.wan()
    handle = accelerate(model)
    first, second = Seen(lambda rows: rows.video + 1), Seen()
    handle.hook("block_output", first, layers=0)
    handle.hook("block_output", second, layers=[0, "blocks.0"])
    tiny.run(model, inputs)
    assert torch.equal(second.calls[0][2].video, first.calls[0][2].video + 1) and len(second.calls) == 1


def test_layers_by_index_pattern_or_several() -> None:
    model, _ = tiny.wan(layers=4)
    handle = accelerate(model)
    names = [f"blocks.{index}.attn1" for index in range(4)]
    for layers, want in (
        (None, [0, 1, 2, 3]),
        (-1, [3]),
        ((0, -1), [0, 3]),
        ("*.[12].attn1", [1, 2]),
        (range(2), [0, 1]),
    ):
        with handle.hook("attention_output", Seen(), layers=layers) as remove:
            assert remove.names == [names[index] for index in want]


@pytest.mark.parametrize(
    ("where", "fn", "layers", "error", "match"),
    [
        ("attn_out", Seen(), None, ValueError, "attention_output"),
        ("block_output", 3, None, TypeError, "step, place, rows"),
        ("block_output", Seen(), 7, ValueError, "none of the 2"),
        ("attention_input", Seen(), "blocks.9.*", ValueError, "0 blocks.0.attn1"),
        ("attention_input", Seen(), 1.5, TypeError, "layers"),
        ("attention_input", Seen(), [True], TypeError, "True"),
    ],
)
def test_what_cannot_be_hooked(where: str, fn: Any, layers: Any, error: Any, match: str) -> None:
    model, inputs = tiny.wan()
    handle = accelerate(model)
    plain = tiny.run(model, inputs)
    with pytest.raises(error, match=match):
        handle.hook(where, fn, layers)
    assert torch.equal(tiny.run(model, inputs), plain)
    handle.remove()
    with pytest.raises(RuntimeError, match="removed"):
        handle.hook("block_output", Seen())


@pytest.mark.parametrize(
    ("answer", "error", "match"),
    [
        (lambda rows: rows.video[:, :-1], ValueError, r"video rows are torch.float32 \[1, 47, 32\], expected .*48"),
        (lambda rows: rows.video.double(), ValueError, "torch.float64"),
        (lambda rows: (None, rows.video), ValueError, "no such rows"),
        (lambda rows: [rows.video], TypeError, "got list"),
        (lambda rows: "x", TypeError, "got str"),
    ],
)
def test_what_a_hook_may_not_return(answer: Any, error: Any, match: str) -> None:
    model, inputs = tiny.wan()
    accelerate(model).hook("attention_output", Seen(answer))
    with pytest.raises(error, match=match):
        tiny.run(model, inputs)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="notes at exceptions are new in Python 3.11")
def test_an_error_inside_a_hook_says_where() -> None:
    model, inputs = tiny.wan()

    def fails(*_: Any) -> None:
        raise KeyError("mine")

    accelerate(model).hook("block_output", fails)
    with pytest.raises(KeyError, match="mine") as caught:
        tiny.run(model, inputs)
    assert "in a hook at 'block_output' of blocks.0, step " in caught.value.__notes__[0]


def test_removing_twice_and_after_the_handle() -> None:
    model, inputs = tiny.wan()
    stock = tiny.run(model, inputs)
    handle = accelerate(model)
    hook = Seen()
    remove = handle.hook("block_output", hook)
    handle.hook("attention_output", hook)
    handle.remove()
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not handle.roots[0].session.hooks.entries  # nor does the handle hold on to what they hold
    remove()
    remove()
    assert torch.equal(tiny.run(model, inputs), stock) and not hook.calls


def test_reconfigure_keeps_hooks() -> None:
    model, inputs = tiny.wan()
    handle = accelerate(model)
    hooks = {where: Seen() for where in WHERE}
    for where, hook in hooks.items():
        handle.hook(where, hook)
    handle.reconfigure(Config(attention=tiny.Band()))
    tiny.run(model, inputs)
    assert all(len(hook.calls) == 2 for hook in hooks.values())


def test_copies_have_the_same_hooks_and_pickles_none() -> None:
    model, inputs = tiny.wan()
    handle = accelerate(model)
    plain = tiny.run(model, inputs)
    hooks = {where: Seen(lambda rows: rows.video * 0.5) for where in WHERE}
    for where, hook in hooks.items():
        handle.hook(where, hook)
    want = tiny.run(model, inputs)
    twin, part = copy.deepcopy(model), copy.deepcopy(model.get_submodule("blocks.0"))
    handle.remove()
    assert all(len(hook.calls) == 2 for hook in hooks.values())
    assert torch.equal(tiny.run(twin, inputs), want) and all(len(hook.calls) == 4 for hook in hooks.values())
    stock = pickle.loads(pickle.dumps(twin))
    assert tiny.relative(tiny.run(stock, inputs), plain) < 1e-5
    assert isinstance(part, nn.Module) and all(len(hook.calls) == 4 for hook in hooks.values())


def test_forecast_steps_call_no_hook_of_what_does_not_run() -> None:
    """A policy that forecasts the transformer's output runs no block: hooks act through what was computed."""
    model, inputs = tiny.wan()
    handle = accelerate(model, Config(cache=TaylorSeer(first_full=1, last_full=0, interval=2, order=0)))
    hook = Seen(lambda rows: rows.video + 1)
    handle.hook("block_output", hook)
    outs = [tiny.run(model, tiny.at(inputs, t)) for t in (900.0, 800.0)]
    assert torch.equal(outs[0], outs[1]) and [step.step for step, _, _ in hook.calls] == [0, 0]


def test_another_librarys_wrapper_outside_ours_does_not_call_hooks_twice() -> None:
    model, inputs = tiny.wan()
    handle = accelerate(model)
    first, second = Seen(), Seen()
    handle.hook("block_output", first)
    block = model.get_submodule("blocks.0")
    ours = block.forward
    object.__setattr__(block, "forward", lambda *args, **kwargs: ours(*args, **kwargs))
    handle.hook("block_output", second)
    tiny.run(model, inputs)
    assert len(first.calls) == len(second.calls) == 2


@pytest.mark.parametrize("where", WHERE)
def test_gradients_reach_a_hooks_weights_also_under_checkpointing(where: str) -> None:
    def train(checkpoint: bool) -> tuple[list[int], Tensor]:
        model, inputs = tiny.wan()
        model.train()
        handle = accelerate(model)
        weight = torch.nn.Parameter(torch.tensor(1.1))
        steps: list[int] = []

        def hook(step: Any, place: HookPlace, rows: HookRows) -> Tensor:
            steps.append(int(step.timestep))
            return rows.video * weight

        handle.hook(where, hook, layers=0)
        if checkpoint:
            model.enable_gradient_checkpointing()  # type: ignore[operator]
        losses = [model(**tiny.at(inputs, t))[0].square().mean() for t in (900.0, 400.0)]
        (losses[0] + 2 * losses[1]).backward()
        assert weight.grad is not None
        return steps, weight.grad

    plain, want = train(False)
    steps, grad = train(True)
    assert plain == [900, 400] and sorted(steps) == [400, 400, 900, 900]
    torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("where", WHERE)
def test_compiled_blocks(where: str) -> None:
    model, inputs = tiny.wan(layers=3)
    handle = accelerate(model)
    handle.hook(where, Seen(lambda rows: rows.video * 1.25))
    want = [tiny.run(model, tiny.at(inputs, t)) for t in (900.0, 800.0)]
    torch._dynamo.reset()
    for block in model.get_submodule("blocks").children():
        block.compile(backend="aot_eager")
    got = [tiny.run(model, tiny.at(inputs, t)) for t in (900.0, 800.0)]
    assert all(tiny.relative(a, b) < 1e-5 for a, b in zip(got, want, strict=True))
    assert handle.stats()["hooks"] == {where: 12}


@pytest.mark.parametrize("where", ATTENTION[:1] + ATTENTION[2:])
@pytest.mark.slow
def test_one_graph_per_block_is_refused_by_name(where: str) -> None:
    model, inputs = tiny.wan()
    accelerate(model).hook(where, Seen())
    torch._dynamo.reset()
    for block in model.get_submodule("blocks").children():
        block.compile(backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"hooks.*without fullgraph"):
        tiny.run(model, inputs)


def test_a_part_of_the_rows_has_no_grid() -> None:
    """Who lets a block run for some of its tokens must not have an adapter take them for a smaller video."""
    model, _ = tiny.wan()
    handle = accelerate(model)
    handle.hook("attention_output", TemporalAdapter(32))
    seen = Seen()
    handle.hook("attention_input", seen)
    session = handle.roots[0].session
    session.begin(torch.tensor([500.0]), Geometry((3, 4, 4)))
    attn = model.get_submodule("blocks.0.attn1")
    attn(torch.randn(1, 48, 32), None, None, None)
    with pytest.raises(ValueError, match=r"grid of blocks\.0\.attn1 is unknown"):
        attn(torch.randn(1, 24, 32), None, None, None)
    assert [place.grid for _, place, _ in seen.calls] == [(3, 4, 4), None]


def test_two_transformers_of_a_pipeline() -> None:
    """A hook goes to both experts; the place says which one runs, and layers that only one has are its own."""

    pipe = SimpleNamespace(transformer=tiny.wan(layers=2)[0], transformer_2=tiny.wan(layers=1)[0])
    inputs = tiny.wan()[1]
    handle = accelerate(pipe)
    every, second = Seen(), Seen()
    handle.hook("attention_output", every)
    remove = handle.hook("block_output", second, layers=1)
    assert remove.names == ["blocks.1"]
    tiny.run(pipe.transformer, inputs)
    tiny.run(pipe.transformer_2, inputs)
    assert [place.expert for _, place, _ in every.calls] == ["transformer"] * 2 + ["transformer_2"]
    assert [(place.expert, place.index) for _, place, _ in second.calls] == [("transformer", 1)]
    handle.remove()
    remove()


@pytest.mark.slow
def test_inside_a_transformer_compiled_as_a_whole() -> None:
    torch._dynamo.reset()
    model, inputs = tiny.wan()
    handle = accelerate(model)
    for where in WHERE:
        handle.hook(where, Seen(lambda rows: rows.video * 1.25 + rows.video.flip(-1)))
    want = tiny.run(model, inputs)
    model.compile(backend="aot_eager")
    with torch.no_grad():
        got = [model(**inputs)[0] for _ in range(2)]
    assert all(tiny.relative(output, want) < 1e-5 for output in got)
    assert set(handle.stats()["hooks"].values()) == {6}


def test_every_name_in_a_list_must_name_something() -> None:
    model, _ = tiny.wan()
    handle = accelerate(model)
    for layers, named in (([0, "*.nope"], r"'\*\.nope'"), ([0, 30], "30")):
        with pytest.raises(ValueError, match=f"{named} in layers names none"):
            handle.hook("block_output", lambda step, place, rows: None, layers=layers)
