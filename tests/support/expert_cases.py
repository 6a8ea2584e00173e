"""Grouped experts by one token and one expert after another, and their inputs."""

from __future__ import annotations

import torch
from torch import Tensor

C, H = 24, 40


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def by_token(x: Tensor, gate_up: Tensor, down: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """One token and one expert after another, in fp64."""
    x, gate_up, down, weights = (t.double() for t in (x, gate_up, down, weights))
    out = torch.zeros_like(x)
    for n in range(len(x)):
        for j in range(experts.shape[1]):
            gate, up = (gate_up[experts[n, j]] @ x[n]).chunk(2)
            out[n] += weights[n, j] * (down[experts[n, j]] @ (silu(gate) * up))
    return out


def weights_of(experts: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return (torch.randn(experts, 2 * H, C) / C**0.5).to(dtype), (torch.randn(experts, C, H) / H**0.5).to(dtype)


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    scale = float(want.abs().max())
    tolerance = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    assert got.dtype == dtype and float((got.double() - want).abs().max()) <= tolerance * scale
