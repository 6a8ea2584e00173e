"""Section "ceilings": what this GPU does at most, measured with torch: the two rates every result is compared to."""

from __future__ import annotations

from typing import Any

import torch

from .timing import Effort, interleaved, summary


def run(device: str, effort: Effort, quick: bool) -> dict[str, Any]:
    """Rate of a large matrix product (FLOP/s) and of a large copy (bytes read and written per second)."""
    n = 256 if quick else 8192
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    source = torch.randn(2**20 if quick else 2**30, device=device)
    target = torch.empty_like(source)
    times = interleaved({"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}, effort, device)
    found = {name: summary(series) for name, series in times.items()}
    found["matmul"]["tflops"] = 2 * n**3 / found["matmul"]["ms"] / 1e9
    found["copy"]["tb_per_s"] = 2 * source.numel() * 4 / found["copy"]["ms"] / 1e9
    return {"matmul_size": n, "dtype": str(dtype).removeprefix("torch."), **found}
