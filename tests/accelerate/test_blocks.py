"""What stands around the calls of a transformer's blocks: order, arguments, copies, compilation, and the way back."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from vdit_fast.accelerate import accelerate
from vdit_fast.handle import Handle
from vdit_fast.models.blocks import BlockCall, streams, transformer_blocks, with_streams

WITHOUT_LISTS = {"animatediff", "latte", "svd"}


class Recording:
    """Notes every call; ``change`` is applied to the first stream that comes in."""

    def __init__(self, log: list[str], tag: str = "", change: Callable[[Tensor], Tensor] | None = None) -> None:
        self.log, self.tag, self.change = log, tag, change

    def __call__(self, call: BlockCall, proceed: Callable[[], Any]) -> Any:
        self.log.append(f"{self.tag}{call.block.index}")
        assert isinstance(call.inputs[0], Tensor)
        if self.change is not None:
            call.arguments["hidden_states"] = self.change(call.arguments["hidden_states"])
        output = proceed()
        found = streams(output)
        assert [part.shape for part in found] == [part.shape for part in call.inputs[: len(found)] if part is not None]
        return with_streams(output, found)

    def fresh(self) -> Recording:
        return Recording([], self.tag, self.change)


def put(handle: Handle, **around: Recording) -> None:
    for root in handle.roots:
        root.session.around = dict(around)
        root.wrap()


def test_every_block_in_order_and_the_same_bits(family: str) -> None:
    model, inputs = tiny.build(family)
    handle = accelerate(model)
    plain = tiny.run(model, inputs)
    log: list[str] = []
    put(handle, cache=Recording(log))
    root = handle.roots[0]
    found = transformer_blocks(model, root.adapter)
    assert bool(found) != (family in WITHOUT_LISTS or not root.adapter.block_lists)
    assert torch.equal(tiny.run(model, inputs), plain)
    assert log == [str(index) for index in range(len(found))]
    handle.remove()
    assert all("forward" not in block.__dict__ for block in model.modules())


def test_layers_are_entered_from_the_outermost() -> None:
    model, inputs = tiny.wan()
    log: list[str] = []
    put(accelerate(model), subset=Recording(log, "s"), hooks=Recording(log, "h"), cache=Recording(log, "c"))
    tiny.run(model, inputs)
    assert log == ["h0", "c0", "s0", "h1", "c1", "s1"]


def test_arguments_may_be_exchanged() -> None:
    model, inputs = tiny.cogvideox()
    handle = accelerate(model)
    plain = tiny.run(model, inputs)
    put(handle, hooks=Recording([], change=lambda x: x * 1.5))
    assert tiny.relative(tiny.run(model, inputs), plain) > 1e-3


def test_positional_arguments_beyond_the_named_ones() -> None:
    model, _ = tiny.hunyuan()
    handle = accelerate(model)
    block = model.get_submodule("transformer_blocks.0")
    seen: list[tuple[Any, ...]] = []

    def inner(*args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        return x

    x = torch.randn(1, 2, 3)
    put(handle, hooks=Recording([]))
    wrapper = block.__dict__["forward"]
    wrapper._inner = inner
    wrapper(x, 1, 2, 3, 4, 5, 6)
    wrapper(x, 1, temb=2)
    assert seen[0] == ((x, 1, 2, 3, 4, 5, 6), {})
    assert seen[1] == ((), {"hidden_states": x, "encoder_hidden_states": 1, "temb": 2})


def test_copies_and_pickles() -> None:
    model, inputs = tiny.wan()
    handle = accelerate(model)
    plain = tiny.run(model, inputs)
    log: list[str] = []
    put(handle, hooks=Recording(log))
    twin, block = copy.deepcopy(model), copy.deepcopy(model.get_submodule("blocks.0"))
    stock = pickle.loads(pickle.dumps(model))
    assert torch.equal(tiny.run(twin, inputs), plain) and not log
    mine = twin.get_submodule("blocks.0").__dict__["forward"]._session
    assert mine is accelerate(twin).roots[0].session and mine.around["hooks"].log == ["0", "1"]
    assert tiny.relative(tiny.run(stock, inputs), plain) < 1e-5 and not log
    assert not isinstance(block.forward, type(model.get_submodule("blocks.0").forward))
    handle.remove()
    tiny.run(twin, inputs)
    assert mine.around["hooks"].log == ["0", "1"] * 2


def test_a_later_wrapper_stays_and_passes_through() -> None:
    model, inputs = tiny.wan()
    stock = tiny.run(model, inputs)
    handle = accelerate(model)
    log: list[str] = []
    put(handle, hooks=Recording(log))
    block = model.get_submodule("blocks.0")
    ours = block.forward
    object.__setattr__(block, "forward", lambda *args, **kwargs: ours(*args, **kwargs))
    tiny.run(model, inputs)
    handle.remove()
    assert log == ["0", "1"]
    assert torch.equal(tiny.run(model, inputs), stock) and log == ["0", "1"]


@pytest.mark.slow
def test_compiled_blocks_are_cut_at_the_wrapper() -> None:
    model, inputs = tiny.wan(layers=3)
    handle = accelerate(model)
    plain = tiny.run(model, inputs)
    log: list[str] = []
    put(handle, hooks=Recording(log))
    for block in model.get_submodule("blocks").children():
        assert isinstance(block, nn.Module)
        block.compile(backend="aot_eager")
    for _ in range(2):
        assert tiny.relative(tiny.run(model, inputs), plain) < 1e-5
    assert log == ["0", "1", "2"] * 2
