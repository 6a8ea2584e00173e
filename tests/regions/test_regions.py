"""handle.regions: masks in real models equal explicit ones, hold in their steps only, and leave nothing behind."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from tiny import Band

from vdit_fast.accelerate import accelerate
from vdit_fast.config import Config
from vdit_fast.positions import AnchoredBoxes, anchored_rows, take_rows
from vdit_fast.regions import Regions, region_labels
from vdit_fast.streaming import causal_frames
from vdit_fast.subset import RAS

GRID = (3, 5, 7)
BOXES = [(0, 0, 3, 3), (1, 2, 4, 6), (2, 4, 5, 7)]
WORDS = 12
TIMES = (900.0, 700.0, 500.0, 300.0)


def text(channels: int = 16, words: int = WORDS, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, words, channels)


def build(kind: str) -> Any:
    model, inputs = tiny.build(kind)
    inputs = tiny.regrid(inputs, GRID)
    if kind.startswith(("wan", "sky")):
        inputs["encoder_hidden_states"] = text(words=512 if "encoder_hidden_states_image" in inputs else WORDS)
    return model, inputs


def plugged(model: Any, config: Any = "exact") -> Any:
    """With a schedule of four steps, as in a pipeline."""
    return accelerate(
        SimpleNamespace(transformer=model, scheduler=SimpleNamespace(timesteps=torch.tensor(TIMES))), config
    )


def masked_stock(model: Any, inputs: dict[str, Any], self_mask: Any, cross_mask: Any, rows: Any = None) -> torch.Tensor:
    """The stock model with boolean masks for calls of their sizes, and rotary tables with exchanged rows."""
    real = torch.nn.functional.scaled_dot_product_attention

    def masked(query: Any, key: Any, value: Any, attn_mask: Any = None, **options: Any) -> Any:
        for mask in (self_mask, cross_mask):
            if mask is not None and (query.shape[2], key.shape[2]) == tuple(mask.shape):
                attn_mask = mask
        return real(query, key, value, attn_mask=attn_mask, **options)

    hook = None
    if rows is not None and hasattr(model, "rope"):
        hook = model.rope.register_forward_hook(lambda module, args, out: take_rows(out, rows))
    elif rows is not None:
        inputs = {**inputs, "image_rotary_emb": take_rows(inputs["image_rotary_emb"], rows)}
    torch.nn.functional.scaled_dot_product_attention = masked
    try:
        return tiny.run(model, inputs)
    finally:
        torch.nn.functional.scaled_dot_product_attention = real
        if hook is not None:
            hook.remove()


def self_mask(context: int = 0, first: bool = False) -> torch.Tensor:
    labels = region_labels(GRID, BOXES)
    labels = torch.nn.functional.pad(labels, (context, 0) if first else (0, context))
    pair = labels[:, None] * 3 + labels
    return (pair != 1 * 3 + 2) & (pair != 2 * 3 + 1)


def cross_mask() -> torch.Tensor:
    """Background prompt first, as the two are concatenated."""
    inside = region_labels(GRID, BOXES) == 1
    foreground = torch.arange(2 * WORDS) >= WORDS
    return inside[:, None] == foreground


@pytest.mark.parametrize("kind", ["wan_t2v", "wan_ti2v", "skyreels_df", "cogvideox_5b"])
def test_self_attention_is_masked_in_the_first_steps(kind: str) -> None:
    model, inputs = build(kind)
    if kind == "skyreels_df":
        inputs["timestep"] = torch.full((1, 3), 500.0)
    context = inputs["encoder_hidden_states"].shape[1] if kind.startswith("cog") else 0
    steps = [tiny.at(inputs, t) for t in (TIMES[0], TIMES[0], *TIMES[1:])]
    stock = [tiny.run(model, step) for step in steps]
    rows = anchored_rows(GRID, BOXES)
    want = [masked_stock(model, step, self_mask(context, True), None, rows) for step in steps]
    anchored_only = masked_stock(model, steps[0], None, None, rows)
    handle = plugged(model)
    assert handle.regions(Regions(BOXES, position_steps=0.5)) is handle  # 2 of 4
    got = [tiny.run(model, step) for step in steps]
    for number, out in enumerate(got):
        assert tiny.relative(out, want[number] if number < 3 else stock[number]) < 3e-6, number
    assert tiny.relative(want[0], anchored_only) > 1e-3 and tiny.relative(want[0], stock[0]) > 1e-3
    assert handle.stats()["regions"] == {"masked": {0: 2, 1: 1}, "prompted": {}}
    assert "self-attention masked in 3 forwards, two prompts in 0" in handle.report()
    handle.regions(None)
    assert handle.stats()["regions"] is None and handle.stats()["positions"] is None
    assert tiny.relative(tiny.run(model, steps[0]), stock[0]) < 3e-6
    handle.regions(Regions(BOXES, position_steps=2))
    handle.remove()
    assert torch.equal(tiny.run(model, steps[0]), stock[0])


@pytest.mark.parametrize("text_kv", [False, True])
@pytest.mark.parametrize("kind", ["wan_t2v", "skyreels_df"])
def test_cross_attention_reads_two_prompts(kind: str, text_kv: bool) -> None:
    """Concatenated keys under a boolean mask, in the conditional branch of the first steps; beside text_kv, too."""
    model, inputs = build(kind)
    if kind == "skyreels_df":
        inputs["timestep"] = torch.full((1, 3), 500.0)
    stock_processors = tiny.processors(model)
    regions = Regions(BOXES, text(), text(), position_steps=0, text_steps=2)
    both = torch.cat((regions.background, regions.foreground), dim=1)
    blank = {"encoder_hidden_states": torch.zeros_like(inputs["encoder_hidden_states"])}
    handle = plugged(model, Config(text_kv=text_kv))
    handle.regions(regions)
    got = [tiny.run(model, tiny.at({**inputs, **branch}, t)) for t in TIMES for branch in ({}, blank)]
    assert handle.stats()["regions"] == {"masked": {}, "prompted": {0: 1, 1: 1}}
    if text_kv:
        assert handle.stats()["text_kv"]["reused"] > 0 and not handle.stats()["text_kv"]["refused"]
    handle.remove()
    assert tiny.processors(model) == stock_processors
    for number, t in enumerate(TIMES):
        call = tiny.at(inputs, t)
        masked = masked_stock(model, {**call, "encoder_hidden_states": both}, None, cross_mask())
        plain = tiny.run(model, call)
        assert tiny.relative(got[2 * number], masked if number < 2 else plain) < 3e-6
        assert tiny.relative(masked, plain) > 1e-3
        assert tiny.relative(got[2 * number + 1], tiny.run(model, {**call, **blank})) < 3e-6


def test_image_keys_are_read_by_all() -> None:
    """Wan I2V tells image keys from text keys by the text's length: both calls must have it."""
    model, inputs = build("wan_i2v")
    regions = Regions(BOXES, text(words=512), text(words=512), position_steps=0, text_steps=9)
    handle = accelerate(model)
    handle.regions(regions)
    got = tiny.run(model, inputs)
    inside = (region_labels(GRID, BOXES) == 1).view(1, 1, *GRID).repeat_interleave(2, 3).repeat_interleave(2, 4)
    handle.regions(None)
    # one block deep every token's output depends on other tokens through self-attention only in the next block
    model, inputs = build("wan_i2v")
    model.blocks = model.blocks[:1]
    handle = accelerate(model).regions(regions)
    got = tiny.run(model, inputs)
    handle.regions(None)
    alone = [
        tiny.run(model, {**inputs, "encoder_hidden_states": prompt})
        for prompt in (regions.background, regions.foreground)
    ]
    want = torch.where(inside, alone[1], alone[0])
    assert tiny.relative(got, want) < 3e-6 and tiny.relative(got, alone[0]) > 1e-3


def test_a_box_that_is_the_whole_frame() -> None:
    """Ids unchanged, nothing forbidden; the foreground prompt alone is read."""
    model, inputs = build("wan_t2v")
    handle = accelerate(model)
    plain = tiny.run(model, inputs)
    boxes = [(0, 0, *GRID[1:])] * 3
    handle.regions(Regions(boxes, position_steps=9))
    assert torch.equal(tiny.run(model, inputs), plain)
    prompt = text()
    want = tiny.run(model, {**inputs, "encoder_hidden_states": prompt})
    handle.regions(Regions(boxes, prompt, text(), position_steps=0, text_steps=9)).reset()
    assert tiny.relative(tiny.run(model, inputs), want) < 1e-6


def test_planners_wait_until_the_mask_is_gone() -> None:
    model, inputs = build("wan_t2v")
    handle = plugged(model, Config(attention=Band(width=20)))
    handle.regions(Regions(BOXES, position_steps=2))
    for t in TIMES:
        tiny.run(model, tiny.at(inputs, t))
    assert [step for _, step, _, _ in handle.roots[0].session.state["seen"]] == [2, 2, 3, 3]
    assert handle.stats()["layers"][0]["unasked"] == {"regions: box tokens do not read redundant ones": 2}


CACHES = ["taylorseer model", "taylorseer block", "taylorseer module", "teacache span"]


@pytest.mark.parametrize("kind", CACHES)
def test_caches_do_not_forecast_over_the_end_of_a_phase(kind: str) -> None:
    """7 steps with the mask, 12 with two prompts, of 16 named ones: the first step behind each is computed, and is what
    it were if there had never been any regions."""
    method, granularity = kind.split()
    model, inputs = build("wan_t2v")
    settings: dict[str, Any] = {"method": method, "granularity": granularity, "first_full": 3, "last_full": 0}
    settings |= {"interval": 99} | ({"threshold": 1e9} if method == "teacache" else {})
    handle = accelerate(model, Config.from_dict({"cache": settings}))
    handle.regions(Regions(BOXES, text(), text(), position_steps=7, text_steps=12))

    def run(steps: range) -> list[torch.Tensor]:
        found = []
        for number in steps:
            with handle.step(number, num_steps=16):
                found.append(tiny.run(model, tiny.at(inputs, 1000.0 - 50 * number)))
        return found

    got = run(range(16))
    skipped = handle.stats()["cache"]["forecast"]
    assert set(skipped) == set(range(16)) - {0, 1, 2, 7, 12}
    handle.remove()
    plain = tiny.run(model, tiny.at(inputs, 1000.0 - 50 * 12))
    assert tiny.relative(got[12], plain) < 3e-6 < 1e-3 < tiny.relative(got[11], plain)


def test_prompts_of_two_sizes_in_one_handle() -> None:
    """Whoever is called with a batch or a dtype of its own gets the two prompts alike, not those of the call before."""
    model, inputs = build("wan_t2v")
    regions = Regions(BOXES, text(), text(), position_steps=0, text_steps=99)
    twice = {k: torch.cat((v, v)) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    handle = accelerate(model).regions(regions)
    want = tiny.run(model, inputs)
    handle.reset()
    assert tiny.relative(tiny.run(model, twice), torch.cat((want, want))) < 3e-6
    handle.reset()
    assert torch.equal(tiny.run(model, inputs), want)
    model.bfloat16()
    low = {k: v.bfloat16() if k != "timestep" and isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    handle.reset()
    assert tiny.relative(tiny.run(model, low).float(), want) < 0.05
    handle.reset()
    with pytest.raises(ValueError, match="encode it alike"):
        tiny.run(model, low | {"encoder_hidden_states": low["encoder_hidden_states"][:, 1:]})


def test_caches_forget_when_regions_come_and_go() -> None:
    """In the middle of named steps, which no timestep divides into generations."""
    model, inputs = build("wan_t2v")
    steps = [tiny.at(inputs, 900.0 - 100 * number) for number in range(6)]
    want = tiny.run(model, steps[3])
    cache = {"method": "taylorseer", "granularity": "model", "first_full": 1, "interval": 99}
    handle = accelerate(model, Config.from_dict({"cache": cache}))

    def step(number: int) -> torch.Tensor:
        with handle.step(number):
            return tiny.run(model, steps[number])

    step(0), step(1)
    handle.regions(Regions(BOXES, position_steps=99))
    masked = step(2)
    assert handle.stats()["cache"]["forecast"] == {1: 1} and handle.stats()["regions"]["masked"] == {2: 1}
    handle.regions(None)
    assert tiny.relative(step(3), want) < 3e-6 and tiny.relative(masked, want) > 1e-3
    step(4)
    generations = handle.stats()["generations"]
    handle.regions(None)
    step(5)
    assert handle.stats()["generations"] == generations, "nothing was taken off"


def test_no_anchored_positions_ask_for_no_step() -> None:
    """position_steps=0: nothing depends on a step or a grid where there are no prompts either."""
    model, inputs = build("wan_t2v")
    handle = accelerate(model).regions(Regions(BOXES, position_steps=0))
    stock = tiny.run(model, inputs)
    with handle.step(None):
        assert torch.equal(tiny.run(model, inputs), stock)


def test_boxes_are_the_users_no_longer() -> None:
    model, inputs = build("wan_t2v")
    boxes = torch.tensor(BOXES)
    regions = Regions(boxes, position_steps=99), Regions(rows := list(BOXES), position_steps=99)
    boxes.zero_()
    rows.clear()
    outs = [tiny.run(model, inputs) for each in regions if accelerate(model).regions(each)]
    assert torch.equal(*outs)


def test_reconfigure_keeps_the_regions_and_the_memory_of_keys_underneath() -> None:
    model, inputs = build("wan_t2v")
    handle = accelerate(model)
    handle.regions(Regions(BOXES, text(), text(), position_steps=1, text_steps=1))
    want = tiny.run(model, inputs)
    handle.reconfigure(Config(text_kv=True))
    handle.reset()
    assert torch.equal(tiny.run(model, inputs), want)
    assert handle.stats()["text_kv"] is not None and handle.stats()["regions"]["prompted"] == {0: 1}
    tiny.run(model, tiny.at(inputs, 100.0))
    tiny.run(model, tiny.at(inputs, 50.0))
    assert handle.stats()["text_kv"]["reused"] == 2, "behind the steps with two prompts, keys are remembered"


def test_a_copy_has_its_own() -> None:
    model, inputs = build("wan_t2v")
    handle = accelerate(model).regions(Regions(BOXES, text(), text(), position_steps=9, text_steps=9))
    want, twin = tiny.run(model, inputs), copy.deepcopy(model)
    handle.regions(None)
    again = accelerate(twin)
    again.reset()
    assert torch.equal(tiny.run(twin, inputs), want) and not torch.equal(tiny.run(model, inputs), want)
    handle.remove()
    again.reset()
    assert torch.equal(tiny.run(twin, inputs), want)


def test_another_grid_and_batches() -> None:
    """Two clips with prompts of their own; the plan is made anew for another grid."""
    model, inputs = build("wan_t2v")
    inputs = {k: v.repeat(2, *(1,) * (v.ndim - 1)) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    fore, back = text(batch=2), text(batch=2)
    handle = accelerate(model).regions(Regions(BOXES, fore, back, position_steps=9, text_steps=9))
    together = tiny.run(model, inputs)
    for item in range(2):
        one = {k: v[item : item + 1] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        handle.regions(Regions(BOXES, fore[item : item + 1], back[item : item + 1], position_steps=9, text_steps=9))
        handle.reset()
        assert tiny.relative(tiny.run(model, one), together[item : item + 1]) < 1e-5
    handle.regions(Regions(BOXES, fore, back, position_steps=9, text_steps=9)).reset()
    larger = tiny.regrid(inputs, (3, 5, 8)) | {"timestep": inputs["timestep"]}
    assert tiny.run(model, larger).isfinite().all()
    handle.reset()
    assert tiny.relative(tiny.run(model, inputs), together) == 0


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"foreground": torch.zeros(1, 4, 16)}, ValueError, "both prompts"),
        ({"foreground": torch.zeros(4, 16), "background": torch.zeros(4, 16)}, TypeError, "foreground must be text"),
        ({"foreground": torch.zeros(1, 4, 16), "background": torch.zeros(1, 5, 16)}, ValueError, "as many tokens"),
        ({"position_steps": 1.0}, ValueError, "position_steps"),
        ({"text_steps": True}, TypeError, "text_steps"),
        ({"branch": -1}, ValueError, "branch"),
    ],
)
def test_bad_regions(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Regions(BOXES, **options)


def test_what_is_refused() -> None:
    model, inputs = build("wan_t2v")
    handle = plugged(model)
    handle.regions(Regions(BOXES, text(words=WORDS + 1), text(words=WORDS + 1)))
    with pytest.raises(ValueError, match="encode it alike"):
        tiny.run(model, tiny.at(inputs, TIMES[0]))
    with pytest.raises(RuntimeError, match="regions set them"):
        handle.positions(None)
    handle.regions(Regions(BOXES[:2], position_steps=1))
    with pytest.raises(ValueError, match="boxes must be 3"):
        tiny.run(model, tiny.at(inputs, TIMES[0]))
    handle.regions(None).positions(AnchoredBoxes(BOXES))
    with pytest.raises(RuntimeError, match="positions are set already"):
        handle.regions(Regions(BOXES))
    handle.positions(None).regions(Regions(BOXES, position_steps=1))
    causal_frames(handle)
    with pytest.raises(RuntimeError, match="follows causal frames"):
        tiny.run(model, tiny.at(inputs, TIMES[0]))
    handle.remove()
    with pytest.raises(RuntimeError, match="was removed"):
        handle.regions(Regions(BOXES))


def test_models_that_cannot() -> None:
    model, _ = tiny.build("cogvideox_5b")
    with pytest.raises(RuntimeError, match="no cross-attention that reads the text alone"):
        accelerate(model).regions(Regions(BOXES, text(), text()))
    model, _ = tiny.build("latte")
    with pytest.raises(RuntimeError, match="no served layer of family 'factorised' takes rotary tables"):
        accelerate(model).regions(Regions(BOXES))
    model, inputs = tiny.build("wan_t2v")
    with pytest.raises(RuntimeError, match="a subset of the tokens is configured"):
        plugged(model, Config(subset=RAS())).regions(Regions(BOXES))
    handle = accelerate(model := tiny.build("wan_t2v")[0])
    handle.regions(Regions([(0, 0, 2, 2)] * 3))
    with pytest.raises(RuntimeError, match=r"0\.1 is a fraction"):
        tiny.run(model, inputs)


def test_gradients_are_refused_where_there_are_two_prompts() -> None:
    model, inputs = build("wan_t2v")
    accelerate(model).regions(Regions(BOXES, text(), text(), position_steps=9, text_steps=9))
    inputs["hidden_states"].requires_grad_(True)
    with pytest.raises(RuntimeError, match="for inference"):
        model(**inputs)


def test_compiled_blocks() -> None:
    """The mask of self-attention is part of the opaque call; the two prompts break the graph, and say so."""
    torch._dynamo.reset()
    model, inputs = build("wan_t2v")
    handle = accelerate(model).regions(Regions(BOXES, text(), text(), position_steps=1, text_steps=1))
    runs = [tiny.at(inputs, t) for t in (900.0, 500.0)]
    want = [tiny.run(model, at) for at in runs]
    handle.reset()
    for block in model.blocks:
        block.compile(backend="eager")
    got = [tiny.run(model, at) for at in runs]
    assert all(tiny.relative(a, b) < 1e-6 for a, b in zip(got, want, strict=True))
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="regions"):
        tiny.run(model, inputs)
    torch._dynamo.reset()
