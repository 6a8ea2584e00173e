"""Feature caches around blocks, on tiny models of the real classes: what is left out, what comes out, and when."""

from __future__ import annotations

import copy
import json
import pickle
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from vdit_fast.accelerate import accelerate
from vdit_fast.caching import TaylorSeer
from vdit_fast.config import Config
from vdit_fast.handle import Handle
from vdit_fast.models.blocks import BlockCall, streams, transformer_blocks, with_streams
from vdit_fast.models.row_layout import RowLayout

TIMES = (900.0, 700.0, 500.0, 300.0, 100.0)
KNOBS: dict[str, Any] = {"first_full": 2, "last_full": 0, "interval": 2}
COMPUTED = (0, 1, 3)


def policy(granularity: str, **knobs: Any) -> TaylorSeer:
    return TaylorSeer(**({"granularity": granularity, "damping": 1.0} | KNOBS | knobs))


def generate(model: nn.Module, inputs: dict[str, Any], branches: int = 1) -> list[Tensor]:
    return [
        tiny.run(model, tiny.at({**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"] * (1 + b)}, t))
        for t in TIMES
        for b in range(branches)
    ]


def equal(got: list[Tensor], want: list[Tensor], tolerance: float = 0.0) -> bool:
    pairs = zip(got, want, strict=True)
    return all(torch.equal(a, b) if tolerance == 0 else tiny.relative(a, b) < tolerance for a, b in pairs)


def blocks_of(handle: Handle) -> int:
    root = handle.roots[0]
    module = root.module()
    return len(transformer_blocks(module, root.adapter)) if module is not None else 0


class Plain:
    """The same method in a few lines: every block runs in computed steps; in the others offsets are linear in the step
    through the last two computed ones."""

    def __init__(self, span: tuple[int, int] | None, of_span: bool) -> None:
        self.span, self.of_span = span, of_span
        self.step, self.branch = 0, 0
        self.offsets: dict[tuple[int, int, int, int], Tensor] = {}

    def __call__(self, call: BlockCall, proceed: Callable[[], Any]) -> Any:
        index, inputs = call.block.index, call.inputs
        first, end = self.span or (0, call.block.count)
        if self.step in COMPUTED or not first <= index < end:
            output = proceed()
            for stream, y in enumerate(streams(output)):
                self.offsets[self.branch, self.step, index, stream] = y.double() - inputs[stream].double()
            self.form = output
            return output
        output = proceed()  # only its form is used
        new = [x for x, _ in zip(inputs, streams(output), strict=False)]
        if not self.of_span:
            new = [self.linear(index, stream, x) for stream, x in enumerate(new)]
        elif index == first:
            for at in range(first, end):
                new = [self.linear(at, stream, x) for stream, x in enumerate(new)]
        return with_streams(output, [x.to(y.dtype) for x, y in zip(new, inputs, strict=False)])

    def linear(self, index: int, stream: int, x: Tensor) -> Tensor:
        last = max(s for s in COMPUTED if s < self.step)
        before = max(s for s in COMPUTED if s < last)
        new, old = (self.offsets[self.branch, s, index, stream] for s in (last, before))
        return x.double() + new + (new - old) * (self.step - last) / (last - before)

    def fresh(self) -> Plain:
        return Plain(self.span, self.of_span)


def expected(model: nn.Module, inputs: dict[str, Any], plain: Plain, branches: int = 1) -> list[Tensor]:
    with accelerate(model) as handle:
        handle.roots[0].session.around["cache"] = plain
        handle.roots[0].wrap()
        handle.roots[0].session.around["cache"] = plain
        handle.roots[0].wrap()
        found = []
        for plain.step, t in enumerate(TIMES):
            for plain.branch in range(branches):
                text = inputs["encoder_hidden_states"] * (1 + plain.branch)
                found.append(tiny.run(model, tiny.at({**inputs, "encoder_hidden_states": text}, t)))
    return found


@pytest.mark.parametrize("granularity", ["span", "block"])
def test_forecasts_of_every_family(family: str, granularity: str) -> None:
    model, inputs = tiny.build(family)
    with accelerate(model) as handle:
        count = blocks_of(handle)
    if not count:
        with pytest.raises(RuntimeError, match=rf"granularity '{granularity}'.*there it is 'model'"):
            accelerate(model, Config(cache=policy(granularity)))
        assert not tiny.served(model)
        return
    want = expected(model, inputs, Plain(None, granularity == "span"), branches=2)
    with accelerate(model, Config(cache=policy(granularity))) as handle:
        for _ in range(2):  # a second generation starts from nothing and gives the same
            handle.reset()
            assert equal(generate(model, inputs, branches=2), want, 2e-5)
        stats = handle.stats()["cache"]
        assert stats["forecast"] == {2: 4, 4: 4} and sum(stats["full"].values()) == 12
        assert stats["hooked"] == {"blocks": count} and stats["granularity"] == granularity
        assert stats["blocks_left_out"] == 8 * count and stats["blocks_run"] == 12 * count
        assert handle.stats()["layers"][0]["calls"] == 12
        assert "8 of 20 forwards forecast" in handle.report() and f"around {count:,} blocks" in handle.report()
        json.dumps(handle.stats())
    assert all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("span", [(0, 1), (1, 3), (1, 2)])
def test_spans_leave_out_their_blocks_only(span: tuple[int, int]) -> None:
    for family in ("wan", "hunyuan_video"):
        model, inputs = tiny.wan(layers=3) if family == "wan" else tiny.hunyuan()
        if family == "hunyuan_video":
            span = (1, 2)
        want = expected(model, inputs, Plain(span, True))
        with accelerate(model, Config(cache=policy("span", blocks=span))) as handle:
            assert equal(generate(model, inputs), want, 2e-5)
            stats = handle.stats()["cache"]
            assert stats["blocks_left_out"] == 2 * (span[1] - span[0])


@pytest.mark.parametrize("granularity", ["model", "span", "block"])
def test_interval_1_changes_no_bit(granularity: str) -> None:
    for build in (tiny.wan, tiny.hunyuan, tiny.cogvideox):
        model, inputs = build()
        with accelerate(model):
            plain = generate(model, inputs, branches=2)
        with accelerate(model, Config(cache=policy(granularity, interval=1, first_full=0))):
            assert equal(generate(model, inputs, branches=2), plain)


def test_one_computed_step_is_reused_and_same_inputs_give_the_same() -> None:
    """With inputs that stand still, an offset reused is the computed one."""
    model, inputs = tiny.wan(layers=3)
    with accelerate(model):
        plain = tiny.run(model, tiny.at(inputs, 500.0))
    for granularity in ("span", "block"):
        with accelerate(model, Config(cache=policy(granularity, first_full=1, interval=9))) as handle:
            tiny.run(model, tiny.at(inputs, 500.0))
            again = tiny.run(model, tiny.at(inputs, 499.999))
            assert handle.stats()["cache"]["forecast"] == {1: 1}
            assert tiny.relative(again, plain) < 1e-3


@pytest.mark.parametrize("granularity", ["span", "block"])
def test_memory_is_the_closed_form(granularity: str) -> None:
    model, inputs = tiny.wan(layers=3)
    handle = accelerate(model, Config(cache=policy(granularity, order=2)))
    generate(model, inputs, branches=2)
    batch, _, frames, height, width = inputs["hidden_states"].shape
    features = batch * frames * height * width // 4 * 32
    assert handle.stats()["cache"]["nbytes"] == 2 * 3 * (3 if granularity == "block" else 1) * features * 4
    handle.remove()
    assert handle.stats()["cache"]["nbytes"] == 0


def test_what_the_model_adds_between_blocks_flows_and_counts_once() -> None:
    """VACE adds its control states between blocks: a forecast has the current ones."""
    model, inputs = tiny.build("wan_vace", layers=1)
    for granularity in ("span", "block"):
        with accelerate(model, Config(cache=policy(granularity))) as handle:
            for t in TIMES[:2]:
                tiny.run(model, tiny.at(inputs, t))
            control = inputs["control_hidden_states"]
            same = tiny.run(model, tiny.at(inputs, TIMES[2]))
            handle.reset()
            for t in TIMES[:2]:
                tiny.run(model, tiny.at(inputs, t))
            other = tiny.run(model, tiny.at({**inputs, "control_hidden_states": control * 3}, TIMES[2]))
            assert handle.stats()["cache"]["forecast"] == {2: 2}
            assert tiny.relative(other, same) > 1e-4


def test_a_model_that_changes_its_stream_in_place() -> None:
    model, inputs = tiny.wan(layers=3)
    model.get_submodule("blocks.0").register_forward_hook(lambda module, args, output: output.add_(0.25))
    want = expected(model, inputs, Plain(None, True))
    handle = accelerate(model, Config(cache=policy("span")))
    generate(model, inputs)  # the first computed step finds out, and is not forecast from
    for _ in range(2):
        handle.reset()
        assert equal(generate(model, inputs), want, 2e-5)
    assert handle.stats()["cache"]["forecast"] == {2: 3, 4: 3}


@pytest.mark.parametrize("granularity", ["span", "block"])
def test_inference_mode_and_back(granularity: str) -> None:
    model, inputs = tiny.wan(layers=3)
    want = expected(model, inputs, Plain(None, granularity == "span"))
    handle = accelerate(model, Config(cache=policy(granularity)))
    with torch.inference_mode():
        assert equal([tiny.run(model, tiny.at(inputs, t)) for t in TIMES], want, 2e-5)
    assert equal(generate(model, inputs), want, 2e-5)
    assert handle.stats()["cache"]["forecast"] == {2: 2, 4: 2}


@pytest.mark.parametrize("granularity", ["span", "block"])
def test_half_precision_keeps_the_models_dtype(granularity: str) -> None:
    model, inputs = tiny.wan(layers=3)
    want = expected(model, inputs, Plain(None, granularity == "span"))
    model.to(torch.bfloat16)
    small = tiny.cast(inputs, torch.bfloat16)
    held = {}
    for storage in ("auto", "bf16", "fp32"):
        with accelerate(model, Config(cache=policy(granularity, storage=storage))) as handle:
            assert equal(generate(model, small), want, 0.05)
            held[storage] = handle.stats()["cache"]["nbytes"]
    assert held["auto"] == held["bf16"] == held["fp32"] // 2
    handle = accelerate(model, Config(cache=policy(granularity, storage="fp16")))
    with pytest.raises(ValueError, match="storage is 'fp16' but the model computes in bfloat16"):
        tiny.run(model, small)


def test_another_size_and_another_generation_begin_anew() -> None:
    model, inputs = tiny.wan()
    other = tiny.wan(size=12)[1]
    for granularity in ("span", "block"):
        with accelerate(model, Config(cache=policy(granularity))) as handle:
            for t in TIMES[:2]:
                tiny.run(model, tiny.at(inputs, t))
            assert tiny.run(model, tiny.at(other, TIMES[2])).shape == other["hidden_states"].shape
            tiny.run(model, tiny.at(inputs, 950.0))  # higher noise
            assert handle.stats()["cache"]["forecast"] == {}


def test_training_is_computed_and_differentiable() -> None:
    model, inputs = tiny.wan()
    model.requires_grad_(True)
    handle = accelerate(model, Config(cache=policy("block")))
    for t in TIMES:
        model(**tiny.at(inputs, t))[0].square().mean().backward()
    stats = handle.stats()["cache"]
    assert stats["full"] == {"gradients are recorded": 5} and stats["nbytes"] == 0 and stats["forecast"] == {}


def test_experts_do_not_mix() -> None:
    first, second = tiny.wan()[0], tiny.wan()[0]
    inputs = tiny.wan()[1]
    handle = accelerate(SimpleNamespace(transformer=first, transformer_2=second), Config(cache=policy("block")))
    for t in TIMES[:2]:
        tiny.run(first, tiny.at(inputs, t))
    tiny.run(second, tiny.at(inputs, TIMES[2]))  # its first call is computed, whatever the step
    assert handle.stats()["cache"]["forecast"] == {} and handle.stats()["cache"]["hooked"] == {"blocks": 4}


@pytest.mark.parametrize("granularity", ["span", "block"])
def test_copies_and_pickles(granularity: str) -> None:
    model, inputs = tiny.wan()
    stock = generate(model, inputs)
    config = Config(cache=policy(granularity))
    handle = accelerate(model, config)
    got = generate(model, inputs)
    twin = copy.deepcopy(model)
    own = accelerate(twin, config)
    assert own is not handle and own.stats()["cache"]["nbytes"] == 0
    assert equal(generate(twin, inputs), got)
    assert own.stats()["cache"]["forecast"] == {2: 1, 4: 1} == handle.stats()["cache"]["forecast"]
    assert equal(generate(pickle.loads(pickle.dumps(model)), inputs), stock)
    own.remove()
    assert equal(generate(twin, inputs), stock)
    assert equal(generate(model, inputs), got)  # still accelerated


def test_reconfigure_moves_between_granularities() -> None:
    model, inputs = tiny.wan()
    handle = accelerate(model, Config(cache=policy("block")))
    want = {}
    for granularity in ("block", "model", "span"):
        handle.reconfigure(Config(cache=policy(granularity)))
        want[granularity] = generate(model, inputs)
        assert ("forward" in model.__dict__) == (granularity == "model")
    for granularity in ("span", "block", "model"):
        handle.reconfigure(Config(cache=policy(granularity)))
        assert equal(generate(model, inputs), want[granularity])
        assert handle.stats()["cache"]["granularity"] == granularity
    handle.reconfigure("exact")
    assert "cache" not in handle.roots[0].session.around


def test_a_wrapper_that_goes_takes_the_cache_along_for_one_step() -> None:
    model, inputs = tiny.wan()
    handle = accelerate(model, Config(cache=policy("block")))
    generate(model, inputs)
    for block in model.blocks:
        del block.__dict__["forward"]  # whoever wrapped blocks earlier and puts the class's own back
    handle.reset()
    generate(model, inputs)  # the first forward is missed; the second puts the cache back and is its first
    assert handle.stats()["cache"]["forecast"] == {2: 1, 4: 1, 3: 1}


def test_blocks_called_outside_of_a_forward_are_their_own() -> None:
    model, inputs = tiny.wan()
    handle = accelerate(model, Config(cache=policy("block")))
    seen: list[Any] = []
    hook = model.blocks[1].register_forward_pre_hook(lambda module, args: seen.append(args))
    for t in TIMES[:3]:
        tiny.run(model, tiny.at(inputs, t))
    hook.remove()
    assert handle.stats()["cache"]["forecast"] == {2: 1}
    with torch.no_grad():
        again = model.blocks[1](*seen[0])
    with accelerate(copy.deepcopy(model.blocks[1])) as plain, torch.no_grad():
        assert tiny.relative(again, plain.modules[0](*seen[0])) < 1e-5
    assert handle.stats()["cache"]["blocks_left_out"] == 2


def test_a_budget_is_checked_before_anything_is_kept() -> None:
    model, inputs = tiny.wan(layers=3)
    tokens = inputs["hidden_states"].numel() // 16
    one = 2 * tokens * 32 * 4  # order 1, one feature
    limit = 3 * one - 1
    handle = accelerate(model, Config(cache=policy("block", max_bytes=limit)))
    with pytest.raises(ValueError, match=rf"needs {3 * one:,} bytes.*max_bytes is {limit:,}.*'span' \({one:,}\)"):
        tiny.run(model, inputs)
    assert handle.stats()["cache"]["nbytes"] == 0
    handle.remove()
    with accelerate(model, Config(cache=policy("block", max_bytes=6 * one))) as handle:
        generate(model, inputs, branches=2)
        assert handle.stats()["cache"]["nbytes"] == 6 * one
    handle = accelerate(model, Config(cache=policy("block", max_bytes=6 * one - 1)))
    with pytest.raises(ValueError, match=rf"needs {6 * one:,} bytes.*2 guidance branches.*'span' \({2 * one:,}\)"):
        generate(model, inputs, branches=2)
    assert handle.stats()["cache"]["nbytes"] == 3 * one
    handle.remove()
    guided = SimpleNamespace(transformer=model, do_classifier_free_guidance=True)  # says it before the first forward
    handle = accelerate(guided, Config(cache=policy("block", max_bytes=6 * one - 1)))
    with pytest.raises(ValueError, match=rf"needs {6 * one:,} bytes.*2 guidance branches"):
        tiny.run(model, inputs)
    assert handle.stats()["cache"]["nbytes"] == 0
    handle.remove()
    guided.do_classifier_free_guidance = False
    with accelerate(guided, Config(cache=policy("block", max_bytes=3 * one))):
        generate(model, inputs)
    output = inputs["hidden_states"].numel() * 4 * 2
    handle = accelerate(model, Config(cache=policy("span", max_bytes=one - 1)))
    with pytest.raises(ValueError, match=rf"; granularity 'model' \({output:,}\) would fit"):
        tiny.run(model, inputs)
    handle.remove()
    with accelerate(model, Config(cache=policy("model", max_bytes=output))):
        generate(model, inputs)
    handle = accelerate(model, Config(cache=policy("model", max_bytes=output - 1)))
    with pytest.raises(ValueError, match=rf"needs {output:,} bytes"):
        tiny.run(model, inputs)


def test_a_refusal_has_the_bytes_of_the_output_too(family: str) -> None:
    """By a closed form, as blocks are asked before there is an output."""
    model, inputs = tiny.build(family)
    handle = accelerate(model, Config(cache=policy("model")))
    if not isinstance(handle.roots[0].adapter.rows, RowLayout):
        pytest.skip("nobody knows what the family's output is made of")
    tiny.run(model, inputs)
    held = handle.stats()["cache"]["nbytes"]
    handle.remove()
    for limit in (held, 1):
        with accelerate(model, Config(cache=policy("block", max_bytes=limit))):
            with pytest.raises(ValueError, match=r"needs [\d,]+ bytes at granularity 'block'") as error:
                tiny.run(model, inputs)
            assert limit == 1 or f"'model' ({held:,})" in str(error.value)
    words = r"no granularity with any storage fits: the least is '(\w+)' with storage '(\w+)', which max_bytes of (\S+)"
    granularity, storage, text = re.search(words, str(error.value)).groups()  # type: ignore[union-attr]
    count = int(text.replace(",", ""))
    with accelerate(model, Config(cache=policy(granularity, storage=storage, max_bytes=count))) as handle:
        tiny.run(model, inputs)
        assert handle.stats()["cache"]["nbytes"] == count
    accelerate(model, Config(cache=policy(granularity, storage=storage, max_bytes=count - 1)))
    with pytest.raises(ValueError, match=f"needs {count:,} bytes.*no granularity with any storage fits"):
        tiny.run(model, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["span", "block"])
def test_with_compiled_blocks(granularity: str) -> None:
    model, inputs = tiny.wan(layers=3)
    with accelerate(model, Config(cache=policy(granularity))):
        want = generate(model, inputs)
    handle = accelerate(model, Config(cache=policy(granularity)))
    for block in model.blocks:
        block.compile(backend="aot_eager")
    for _ in range(2):
        handle.reset()
        assert equal(generate(model, inputs), want, 1e-5)
    assert handle.stats()["cache"]["forecast"] == {2: 2, 4: 2}
