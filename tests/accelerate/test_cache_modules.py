"""Granularity "module" on tiny models of the real classes: cached outputs under the gates of the current step."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from test_cache_blocks import COMPUTED, TIMES, blocks_of, equal, generate, policy
from torch import Tensor, nn

from vdit_fast.accelerate import accelerate
from vdit_fast.config import Config

WITHOUT = {"animatediff", "latte", "svd"}
POST_NORMS = {
    "mochi": ("norm2.norm", "norm4.norm", "norm2_context.norm", "norm4_context.norm"),
    "lumina_next": ("norm2", "ffn_norm2"),
}
"""Norms of branches, whose results a gate multiplies: in Mochi inside of the norm."""


class Exchanged:
    """The same method by other means: in forecast steps the block runs as ever, and forward hooks put the forecast in
    place of what its sub-modules return, so that the block itself gates and adds them."""

    def __init__(self, blocks: list[nn.Module], hooked: Callable[[nn.Module], tuple[str, ...]]) -> None:
        self.step = self.branch = 0
        self.known: dict[Any, list[Tensor]] = {}
        self.calls: dict[int, int] = {}
        for block in blocks:
            for name in hooked(block):
                module = dict(block.named_modules()).get(name)
                if module is not None:
                    module.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        call = self.calls[id(module)] = self.calls.get(id(module), -1) + 1
        key = id(module), call, self.branch
        parts = [output] if isinstance(output, Tensor) else list(output)
        if self.step in COMPUTED:
            for at, part in enumerate(parts):
                self.known[(*key, at, self.step)] = part.double()
            return None
        last = max(s for s in COMPUTED if s < self.step)
        before = max(s for s in COMPUTED if s < last)
        made = []
        for at, part in enumerate(parts):
            new, old = self.known[(*key, at, last)], self.known[(*key, at, before)]
            made.append((new + (new - old) * (self.step - last) / (last - before)).to(part.dtype))
        return made[0] if isinstance(output, Tensor) else tuple(made)


def expected(family: str, branches: int) -> list[Tensor]:
    model, inputs = tiny.build(family)
    with accelerate(model) as handle:
        adapter = handle.roots[0].adapter
    blocks = [block for path in adapter.block_lists for block in model.get_submodule(path).children()]
    known = adapter.block_modules
    exchanged = Exchanged(blocks, lambda block: POST_NORMS.get(family, known[type(block).__name__].hooked))
    found = []
    for exchanged.step, t in enumerate(TIMES):
        for exchanged.branch in range(branches):
            exchanged.calls.clear()
            text = inputs["encoder_hidden_states"] * (1 + exchanged.branch)
            found.append(tiny.run(model, tiny.at({**inputs, "encoder_hidden_states": text}, t)))
    return found


def test_forecasts_of_every_family(family: str) -> None:
    model, inputs = tiny.build(family)
    config = Config(cache=policy("module"))
    if family in WITHOUT or not accelerate(copy.deepcopy(model)).roots[0].adapter.block_lists:
        with pytest.raises(RuntimeError, match=r"granularity 'module'.*there it is 'model'"):
            accelerate(model, config)
        return
    want = expected(family, branches=2)
    with accelerate(model, config) as handle:
        count = blocks_of(handle)
        for _ in range(2):  # a second generation starts from nothing and gives the same
            handle.reset()
            assert equal(generate(model, inputs, branches=2), want, 3e-5)
        stats = handle.stats()["cache"]
        assert stats["forecast"] == {2: 4, 4: 4} and stats["blocks_left_out"] == 8 * count
        assert stats["hooked"]["blocks"] == count and stats["hooked"]["modules"] >= count
        assert handle.stats()["layers"][0]["calls"] == 12
    assert not any(module._forward_hooks for module in model.modules())
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_interval_1_changes_no_bit() -> None:
    for build in (tiny.wan, tiny.hunyuan, tiny.cogvideox):
        model, inputs = build()
        with accelerate(model):
            plain = generate(model, inputs, branches=2)
        with accelerate(model, Config(cache=policy("module", interval=1, first_full=0))):
            assert equal(generate(model, inputs, branches=2), plain)


def test_a_forecast_step_runs_neither_module_nor_norm() -> None:
    model, inputs = tiny.wan()
    ran: list[str] = []
    for name, module in model.blocks.named_modules():
        if "." in name:
            module.register_forward_pre_hook(lambda module, args, name=name: ran.append(name))
    accelerate(model, Config(cache=policy("module")))
    for step, t in enumerate(TIMES):
        ran.clear()
        tiny.run(model, tiny.at(inputs, t))
        assert bool(ran) == (step in COMPUTED)


def test_gates_are_those_of_the_current_step() -> None:
    """With one computed step, modules are reused and only their gates move."""
    model, inputs = tiny.wan()
    with accelerate(model, Config(cache=policy("module", first_full=1, order=0))) as handle:
        first = tiny.run(model, tiny.at(inputs, 900.0))
        gated = tiny.run(model, tiny.at(inputs, 100.0))
        assert handle.stats()["cache"]["forecast"] == {1: 1}
    with accelerate(model, Config(cache=policy("block", first_full=1, order=0))):
        assert torch.equal(tiny.run(model, tiny.at(inputs, 900.0)), first)
        reused = tiny.run(model, tiny.at(inputs, 100.0))
    assert tiny.relative(gated, reused) > 1e-3


def test_memory_is_the_closed_form_and_a_small_budget_is_refused() -> None:
    for build, per_branch in (
        (tiny.wan, lambda x, text: 2 * 3 * x),
        (tiny.hunyuan, lambda x, text: 2 * (x + text) + x + text),  # one dual block, one single block
        (tiny.cogvideox, None),
    ):
        model, inputs = build()
        handle = accelerate(model, Config(cache=policy("module")))
        seen: dict[str, int] = {}

        def note(module: nn.Module, args: Any, kwargs: Any, seen: dict[str, int] = seen) -> None:
            named = dict(zip(("hidden_states", "encoder_hidden_states"), args, strict=False)) | kwargs
            seen.update({name: named[name].numel() for name in ("hidden_states", "encoder_hidden_states")})

        path = handle.roots[0].adapter.block_lists[0]
        hook = model.get_submodule(f"{path}.0").register_forward_pre_hook(note, with_kwargs=True)
        generate(model, inputs, branches=2)
        hook.remove()
        x, text = seen["hidden_states"], seen["encoder_hidden_states"]
        layers = len(model.get_submodule(path))
        want = 2 * 2 * 4 * (per_branch(x, text) if per_branch is not None else layers * 2 * (x + text))
        assert handle.stats()["cache"]["nbytes"] == want
        handle.remove()
        for limit, message in ((want, None), (want - 1, f"needs {want:,} bytes"), (want // 2 - 1, f"{want // 2:,}")):
            with accelerate(model, Config(cache=policy("module", max_bytes=limit))) as small:
                if message is None:
                    generate(model, inputs, branches=2)
                    continue
                with pytest.raises(ValueError, match=rf"{message}.*granularity.*'span' .* would fit"):
                    generate(model, inputs, branches=2)
                assert small.stats()["cache"]["nbytes"] <= want // 2


def test_copies_pickles_and_the_way_back() -> None:
    model, inputs = tiny.wan()
    stock = generate(model, inputs)
    config = Config(cache=policy("module"))
    handle = accelerate(model, config)
    got = generate(model, inputs)
    twin, block = copy.deepcopy(model), copy.deepcopy(model.blocks[0])
    own = accelerate(twin, config)
    assert own is not handle and own.stats()["cache"]["nbytes"] == 0
    assert equal(generate(twin, inputs), got)
    assert own.stats()["cache"]["forecast"] == {2: 1, 4: 1} == handle.stats()["cache"]["forecast"]
    assert equal(generate(pickle.loads(pickle.dumps(model)), inputs), stock)
    x = torch.randn(1, 48, 32)
    with torch.no_grad():
        block.ffn(x)  # its hook belongs to nobody
    own.remove()
    assert equal(generate(twin, inputs), stock)
    assert equal(generate(model, inputs), got)
    handle.reconfigure(Config(cache=policy("block")))
    assert not any(module._forward_hooks for module in model.modules())
    handle.reconfigure(config)
    assert equal(generate(model, inputs), got)


def test_modules_that_run_for_some_rows_only_are_refused() -> None:
    model, inputs = tiny.wan()
    accelerate(model, Config(cache=policy("module")))
    hook = model.blocks[0].ffn._forward_hooks
    (capture,) = hook.values()
    hook.clear()
    model.blocks[0].ffn.register_forward_hook(lambda module, args, output: capture(module, args, output[:, :5]))
    with pytest.raises(RuntimeError, match=r"ffn of blocks\.0 ran for 5 tokens of 48"):
        tiny.run(model, inputs)


def test_a_replaced_module_is_noticed() -> None:
    model, inputs = tiny.wan()
    accelerate(model, Config(cache=policy("module")))
    model.blocks[1].ffn = copy.deepcopy(model.blocks[1].ffn)
    model.blocks[1].ffn._forward_hooks.clear()
    with pytest.raises(RuntimeError, match=r"blocks\.1 ran without its 'ffn'"):
        tiny.run(model, inputs)


@pytest.mark.slow
def test_with_compiled_blocks() -> None:
    torch._dynamo.reset()  # what other tests compiled of these classes has no hooks
    model, inputs = tiny.wan(layers=3)
    with accelerate(model, Config(cache=policy("module"))):
        want = generate(model, inputs)
    handle = accelerate(model, Config(cache=policy("module")))
    for block in model.blocks:
        block.compile(backend="aot_eager")
    for _ in range(2):
        handle.reset()
        assert equal(generate(model, inputs), want, 1e-5)
    assert handle.stats()["cache"]["forecast"] == {2: 2, 4: 2}
