"""Messages between stages: what fits in their buffers, and what comes out."""

from __future__ import annotations

import pytest
import torch

from vdit_fast.parallel.packing import Compressed, Packing, Plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("packing", "bound"),
    [(Plain(), 0.0), (Compressed("bf16"), 2.0**-8), (Compressed("e4m3"), 2.0**-4), (Compressed("e4m3", 32), 2.0**-4)],
    ids=["plain", "bf16", "e4m3", "e4m3 of 32"],
)
def test_there_and_back(packing: Packing, bound: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for shape in ((2, 37, 128), (1, 1, 7), (2, 0, 8)):
        x = torch.randn(shape).to(dtype)
        message = packing.pack(x)
        buffer = packing.empty(shape, dtype, "cpu")
        assert message.shape == buffer.shape and message.dtype is buffer.dtype and message.is_contiguous()
        assert packing.empty(shape, dtype, "meta").is_meta
        buffer.copy_(message)
        y = packing.unpack(buffer, shape, dtype)
        assert y.dtype is dtype and y.shape == x.shape
        assert ((y - x).abs() <= bound * x.abs().clamp_min(2.0**-6)).all()
    if bound == 2.0**-4 and dtype is torch.float32:
        assert packing.empty((2, 37, 128), dtype, "cpu").numel() < 2 * 37 * 128 * 1.04


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_message_is_not_the_models_own_memory() -> None:
    """A CUDA graph writes its next result to the same place."""
    for x in (torch.randn(2, 3, 8, device="cuda"), torch.randn(2, 8, 3, device="cuda").mT):
        message, want = Plain().pack(x), x.clone()
        x.zero_()
        assert torch.equal(message.view(want.shape), want)


def test_unknown_compressions() -> None:
    with pytest.raises(RuntimeError, match="compression 'e5m2'"):
        Compressed("e5m2")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="block 48"):
        Compressed("e4m3", 48)
