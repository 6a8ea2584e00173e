"""handle.positions: a user's rotary tables reach every served layer, once per forward, and only when asked for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from tiny import Band, gradients, same_gradients

from vdit_fast.accelerate import accelerate
from vdit_fast.config import Config
from vdit_fast.positions import AnchoredBoxes, anchored_rows, take_rows

FAMILIES = ["wan_t2v", "wan_ti2v", "hunyuan_video", "cogvideox_5b"]
BOXES = [(0, 0, 3, 3), (1, 1, 4, 4), (0, 1, 3, 4)]


def shuffled(step: Any, geometry: Any, tables: Any) -> Any:
    """Every token gets another one's position."""
    generator = torch.Generator().manual_seed(7)
    return take_rows(tables, torch.randperm(geometry.n_video, generator=generator))


def with_stock_tables(kind: str, model: Any, inputs: dict[str, Any], fn: Any) -> Any:
    """The stock model's output when its own module (or argument) makes the tables that ``fn`` would."""
    from types import SimpleNamespace

    frames, size = inputs["hidden_states"].shape[1 if kind.startswith("cog") else 2], 4
    geometry = SimpleNamespace(grid=(frames, size, size), n_video=frames * size * size)
    if kind.startswith("cog"):
        return tiny.run(model, {**inputs, "image_rotary_emb": fn(None, geometry, inputs["image_rotary_emb"])})
    hook = model.rope.register_forward_hook(lambda module, args, out: fn(None, geometry, out))
    try:
        return tiny.run(model, inputs)
    finally:
        hook.remove()


@pytest.mark.parametrize("kind", FAMILIES)
def test_all_layers_use_the_tables(kind: str) -> None:
    model, inputs = tiny.build(kind)
    stock, want = tiny.run(model, inputs), with_stock_tables(kind, model, inputs, shuffled)
    assert tiny.relative(stock, want) > 1e-2
    handle = accelerate(model)
    assert handle.positions(shuffled) is handle
    assert tiny.relative(tiny.run(model, inputs), want) < 2e-6
    assert sum(handle.stats()["positions"].values()) == 1
    assert "rotary tables exchanged in 1 forwards" in handle.report()
    handle.positions(None)
    assert tiny.relative(tiny.run(model, inputs), stock) < 2e-6
    assert handle.stats()["positions"] is None and "rotary" not in handle.report()
    handle.positions(shuffled)
    kept = next(iter(handle.roots[0].processors().values()))
    handle.remove()
    assert torch.equal(tiny.run(model, inputs), stock)
    own = (torch.zeros(48, 16), torch.zeros(48, 16))
    assert kept.tables(own, torch.zeros(1)) is own  # somebody may still hold the processor


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_models_own_tables_change_nothing(kind: str) -> None:
    model, inputs = tiny.build(kind)
    handle = accelerate(model)
    before = tiny.run(model, inputs)
    handle.positions(lambda step, geometry, tables: tables)
    assert torch.equal(tiny.run(model, inputs), before)
    handle.positions(lambda step, geometry, tables: None)
    assert torch.equal(tiny.run(model, inputs), before)
    assert handle.stats()["positions"] == {}
    handle.positions(AnchoredBoxes([BOXES[1]] * 3, steps=9))  # boxes that stand still
    assert torch.equal(tiny.run(model, inputs), before)


@pytest.mark.parametrize("kind", ["cosmos", "easyanimate", "hunyuan_video15", "ltx_video", "mochi", "skyreels"])
def test_other_families_turn_by_the_tables_their_stock_processors_would(kind: str) -> None:
    model, inputs = tiny.build(next(name for name in sorted(tiny.BUILDERS) if name.startswith(kind)))
    stock = tiny.run(model, inputs)
    handle = accelerate(model).positions(shuffled)
    got = tiny.run(model, inputs)
    assert sum(handle.stats()["positions"].values()) == 1
    assert tiny.relative(got, stock) > 1e-3
    for processor in handle.roots[0].processors().values():
        processor.stands_aside = lambda *args, **kwargs: True  # type: ignore[method-assign]
    assert tiny.relative(got, tiny.run(model, inputs)) < 5e-6


def test_called_once_per_forward_with_the_step() -> None:
    model, inputs = tiny.wan(layers=3)
    handle = accelerate(model)
    seen: list[Any] = []

    def positions(step: Any, geometry: Any, tables: Any) -> Any:
        seen.append((step.step, step.branch, geometry.grid, tuple(tables[0].shape)))
        return None

    handle.positions(positions)
    for t in (900, 900, 500):
        tiny.run(model, tiny.at(inputs, t))
    assert seen == [(step, branch, (3, 4, 4), (1, 48, 1, 16)) for step, branch in ((0, 0), (0, 1), (1, 0))]


def test_first_steps_of_a_run() -> None:
    """DiTraj's ids in the first two of four steps, whatever the number of calls; then the model's own."""
    model, inputs = tiny.wan()
    handle = accelerate(model)
    runs = [tiny.at(inputs, t) for t in (900, 900, 700, 500, 300)]
    stock = [tiny.run(model, at) for at in runs]
    handle.reset()
    handle.positions(AnchoredBoxes(BOXES, steps=2))
    moved = [tiny.run(model, at) for at in runs]
    rows = anchored_rows((3, 4, 4), BOXES)
    handle.positions(lambda step, geometry, tables: take_rows(tables, rows)).reset()
    always = [tiny.run(model, at) for at in runs]
    for index, (got, own, anchored) in enumerate(zip(moved, stock, always, strict=True)):
        assert torch.equal(got, anchored if index < 3 else own)
        assert tiny.relative(own, anchored) > 1e-3
    assert handle.stats()["positions"] == {0: 2, 1: 1, 2: 1, 3: 1}


def test_a_stock_processor_that_runs_instead_gets_them_too() -> None:
    model, inputs = tiny.hunyuan()
    want = with_stock_tables("hunyuan_video", model, inputs, shuffled)
    handle = accelerate(model).positions(shuffled)
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.attn.processor.stands_aside = lambda mask=None: True
    assert tiny.relative(tiny.run(model, inputs), want) < 2e-6
    assert all(layer["calls"] == 0 for layer in handle.stats()["layers"])


def test_planners_see_the_new_positions() -> None:
    model, inputs = tiny.wan()
    handle = accelerate(model, Config(attention=Band(width=2)))
    own = tiny.run(model, inputs)
    assert tiny.relative(tiny.run(model, inputs), own) == 0
    handle.positions(shuffled)
    assert tiny.relative(tiny.run(model, inputs), own) > 1e-3
    assert handle.stats()["layers"][0]["sparse_calls"] == 3


@pytest.mark.parametrize(
    ("returned", "error", "words"),
    [
        (torch.zeros(48, 16), TypeError, "Tensor"),
        ((torch.zeros(48, 16),), TypeError, "1 values"),
        ((torch.zeros(47, 16),) * 2, ValueError, r"cos is torch.float32 \[47, 16\].*\[1, 48, 1, 16\]"),
        ((torch.zeros(48, 16), torch.zeros(16, 48)), ValueError, "sin"),
        ((torch.zeros(48, 16, dtype=torch.int64),) * 2, ValueError, "int64"),
    ],
)
def test_wrong_tables_are_named(returned: Any, error: Any, words: str) -> None:
    model, inputs = tiny.wan()
    accelerate(model).positions(lambda step, geometry, tables: returned)
    with pytest.raises(error, match=words):
        tiny.run(model, inputs)


def test_what_cannot_be_served_is_an_error() -> None:
    for kind in ("allegro", "ltx2", "lumina_next"):
        model, _ = tiny.build(next(name for name in sorted(tiny.BUILDERS) if name.startswith(kind)))
        with pytest.raises(RuntimeError, match="takes rotary tables"):
            accelerate(model).positions(shuffled)
    model, inputs = tiny.build("cogvideox_2b")
    handle = accelerate(model).positions(shuffled)
    with pytest.raises(RuntimeError, match="no rotary tables"):
        tiny.run(model, inputs)
    with pytest.raises(TypeError, match="positions: pass a function"):
        handle.positions(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"called with \(step, geometry, tables\)"):
        handle.positions(lambda step: None)  # type: ignore[arg-type, misc]
    model, inputs = tiny.wan()
    handle = accelerate(model)
    for block in model.blocks:
        block.attn1.processor.takes_positions = False
    with pytest.raises(RuntimeError, match="family 'wan'"):
        handle.positions(shuffled)
    part = tiny.wan()[0].blocks
    accelerate(part).positions(shuffled)
    with pytest.raises(RuntimeError, match=r"positions: .* outside a forward"):
        part[0].attn1.processor.tables((torch.zeros(48, 16),) * 2, torch.zeros(1))
    model, inputs = tiny.wan()
    accelerate(model).positions(shuffled)
    for block in model.blocks:
        block.attn1.processor._parallel_config = object()
    with pytest.raises(RuntimeError, match="positions: context parallelism"):
        tiny.run(model, inputs)


@pytest.mark.parametrize("kind", ["wan_t2v", "hunyuan_video"])
def test_gradient_checkpointing(kind: str) -> None:
    """The second run of a block uses the tables of its own forward, although another forward came between."""
    model, inputs = tiny.build(kind)
    model.requires_grad_(True)

    def positions(step: Any, geometry: Any, tables: Any) -> Any:
        return None if step.step else shuffled(step, geometry, tables)

    runs = [tiny.at(inputs, 900), tiny.at(inputs, 500)]
    handle = accelerate(model).positions(positions)
    want = gradients(model, runs)
    handle.reset()
    model.enable_gradient_checkpointing()
    same_gradients(gradients(model, runs), want)


def test_copies_keep_them() -> None:
    model, inputs = tiny.wan()
    accelerate(model).positions(shuffled)
    want = tiny.run(model, inputs)
    assert torch.equal(tiny.run(copy.deepcopy(model), inputs), want)


def compiled(model: Any, blocks: bool) -> None:
    if blocks:
        for block in model.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
    else:
        model.compile(fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("blocks", [True, False])
def test_compiled(blocks: bool) -> None:
    """One graph for all layers, exchanged every step; a whole transformer in one graph too."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, inputs = tiny.wan(layers=3 if blocks else 1)
    handle = accelerate(model).positions(AnchoredBoxes(BOXES, steps=1))
    runs = [tiny.at(inputs, t) for t in (900, 900, 500)]
    want = [tiny.run(model, at) for at in runs]
    handle.reset()
    compiled(model, blocks)
    for at, eager in zip(runs, want, strict=True):
        assert tiny.relative(tiny.run(model, at), eager) < 1e-5
    assert tiny.relative(want[0], want[2]) > 1e-3
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs <= 2  # diffusers 0.35 hands the first block other strides; a whole transformer has its hook besides
    handle.reset()
    handle.positions(AnchoredBoxes(BOXES[::-1], steps=2))  # another function: no new graph
    tiny.run(model, runs[0])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()


def test_operator_registration() -> None:
    model, inputs = tiny.wan()
    accelerate(model).positions(shuffled)
    tiny.run(model, inputs)
    cos, sin = torch.randn(1, 48, 1, 16), torch.randn(1, 48, 1, 16)
    torch.library.opcheck(
        torch.ops.vdit_fast.served_tables,
        (cos, sin, torch.randn(1, 48, 32), model.blocks[0].attn1.processor.handle),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_tables_of_another_size_in_the_same_forward_are_exchanged_for_themselves() -> None:
    from vdit_fast.models.rotary import served_tables

    model, inputs = tiny.build("wan_t2v")
    handle = accelerate(model)
    tiny.run(model, inputs)
    handle.positions(lambda step, geometry, tables: (2 * tables[0], 3 * tables[1]))
    layer = model.blocks[0].attn1.processor.handle
    for size in (5, 7, 5):
        stock = torch.randn(1, size, 1, 16), torch.randn(1, size, 1, 16)
        cos, sin = served_tables(stock, torch.randn(1, size, 32), layer, stock[0])
        assert cos.shape == sin.shape == stock[0].shape
    assert handle.stats()["positions"] == {0: 2}, "one of each size"


CACHES = ["taylorseer model", "taylorseer span", "taylorseer block", "taylorseer module", "teacache span"]


def cached(kind: str) -> tuple[Any, Any, dict[str, Any]]:
    """(handle, model, inputs): everything behind the first step would be forecast."""
    method, granularity = kind.split()
    settings: dict[str, Any] = {"method": method, "granularity": granularity, "first_full": 1, "last_full": 0}
    settings |= {"interval": 99} | ({"threshold": 1e9} if method == "teacache" else {})
    model, inputs = tiny.build("wan_t2v")
    return accelerate(model, Config.from_dict({"cache": settings})), model, inputs


TIMES = [1000.0 - 100 * number for number in range(6)]


def forecast(handle: Any) -> set[int]:
    return set(handle.stats()["cache"]["forecast"])


@pytest.mark.parametrize("kind", CACHES)
def test_nothing_is_forecast_from_features_of_other_tables(kind: str) -> None:
    """Whatever changes between two steps: on, another function, off."""
    handle, model, inputs = cached(kind)
    turned = [None, None, shuffled, shuffled, lambda step, geometry, tables: tables, None]
    got, last = [], None
    for number, (t, fn) in enumerate(zip(TIMES, turned, strict=True)):
        if fn is not last:
            handle.positions(fn)
            last = fn
        with handle.step(number, num_steps=len(TIMES)):
            got.append(tiny.run(model, tiny.at(inputs, t)))
    assert forecast(handle) == {1, 3}
    handle.reconfigure("exact")
    for number in (2, 4, 5):
        handle.positions(turned[number])
        want = tiny.run(model, tiny.at(inputs, TIMES[number]))
        assert tiny.relative(got[number], want) < 3e-6, number
    handle.positions(None)
    assert tiny.relative(got[2], tiny.run(model, tiny.at(inputs, TIMES[2]))) > 1e-3


@pytest.mark.parametrize("kind", CACHES)
def test_caches_do_not_forecast_over_the_end_of_anchored_boxes(kind: str) -> None:
    """A function that says when its steps are of another kind, and one that does not: its changes go with the steps."""
    handle, model, inputs = cached(kind)
    boxes = AnchoredBoxes(BOXES, steps=3)
    silent = lambda step, geometry, tables: boxes(step, geometry, tables)  # noqa: E731
    found = []
    for fn in (boxes, silent):
        handle.positions(fn)
        for number, t in enumerate(TIMES):
            with handle.step(number, num_steps=len(TIMES)):
                last = tiny.run(model, tiny.at(inputs, t))
                found += [last] if number == 3 else []
        assert handle.stats()["positions"] == {0: 1}
    assert handle.stats()["cache"]["forecast"] == {1: 2, 2: 2, 3: 1, 4: 2, 5: 2}
    handle.remove()
    plain = tiny.run(model, tiny.at(inputs, TIMES[3]))
    assert tiny.relative(found[0], plain) < 3e-6 < 1e-3 < tiny.relative(found[1], plain)


def test_a_generation_begins_with_another_function_only() -> None:
    model, inputs = tiny.wan()
    handle = accelerate(model)

    def generations() -> int:
        tiny.run(model, inputs)
        found: int = handle.stats()["generations"]
        return found

    assert generations() == 1
    handle.positions(None)
    assert generations() == 1
    for _ in range(3):
        handle.positions(shuffled)
        assert generations() == 2
    assert sum(handle.stats()["positions"].values()) == 3
    handle.positions(None)
    assert generations() == 3
