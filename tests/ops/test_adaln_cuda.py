"""The adaptive norms on a CUDA device: the mixtures of the emulated kernels, and what only a device can show."""

from __future__ import annotations

import pytest
import torch
from adaln_cases import BF16, F16, F32, OPS, VARIANTS, arguments, convert, double, draw, outputs, part, within

from vdit_fast import ops, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; the emulator runs the same cases"),
]


@pytest.mark.parametrize("rounding", ["fast", "eager"])
@pytest.mark.parametrize("dim", [1, 8, 13, 264, 1152, 3072, 5120, 5121, 16384])
def test_mixtures(dim: int, rounding: str) -> None:
    for variant in VARIANTS:
        dtype = (BF16, F16, F32)[variant % 3]
        kwargs = arguments(dim, dtype, F32 if variant % 6 == 5 else dtype, rounding, variant)
        if dim == 1:
            kwargs |= {"norm": "none", "weight": None, "bias": None}
        for op in OPS:
            chosen = part(kwargs, op)
            got = outputs(getattr(ops, op)(**convert(chosen, lambda t: t.cuda())))
            want, exact = (outputs(getattr(reference, op)(**args)) for args in (chosen, double(chosen)))
            for a, b, c in zip(got, want, exact, strict=True):
                within(a.cpu(), b, c)


@pytest.mark.parametrize("op", OPS)
def test_many_rows_repeat_exactly_and_do_not_synchronise(op: str) -> None:
    kwargs = convert(arguments(1536, BF16, BF16, "fast", 7, tokens=9000), lambda t: t.cuda())
    chosen = part(kwargs, op)
    first = outputs(getattr(ops, op)(**chosen))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = outputs(getattr(ops, op)(**chosen))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, first, second))
    want, exact = (outputs(getattr(reference, op)(**args)) for args in (chosen, double(chosen)))
    for a, b, c in zip(first, want, exact, strict=True):
        within(a, b, c)


def test_graph_capture_replays_with_new_contents() -> None:
    kwargs = convert(arguments(264, BF16, BF16, "fast", 7), lambda t: t.cuda())
    ops.gate_residual_norm(**kwargs)  # loads the kernels before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = ops.gate_residual_norm(**kwargs)
    kwargs["x"].copy_(draw(9, *kwargs["x"].shape, dtype=BF16))
    graph.replay()
    assert all(map(torch.equal, found, ops.gate_residual_norm(**kwargs)))


def test_an_index_outside_the_table_reads_its_last_row() -> None:
    kwargs = convert(arguments(264, BF16, BF16, "fast", 7), lambda t: t.cuda())
    for row in (-1, 3, 2**31 - 1):
        index = torch.full((5,), row, dtype=torch.int32, device="cuda")
        got, want = (ops.gate_residual_norm(**kwargs | {"index": i}) for i in (index, torch.full_like(index, 2)))
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("op", OPS)
def test_mixed_devices_are_named(op: str) -> None:
    kwargs = part(convert(arguments(40, BF16, BF16, "fast", 7), lambda t: t.cuda()), op)
    with pytest.raises(RuntimeError, match=f"{op}: index is on cpu but x is on cuda"):
        getattr(ops, op)(**kwargs | {"index": kwargs["index"].cpu()})
