"""Calls of the adaptive norms in all their mixtures, for tests on every device, and how their results are judged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
OPS = ("adaln_modulate", "gate_residual", "gate_residual_norm")
VARIANTS = range(24)


def draw(seed: int, *shape: int, dtype: torch.dtype = F32, mean: float = 0.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + mean).to(dtype)


def arguments(
    dim: int, dtype: torch.dtype, rows: torch.dtype, rounding: str, variant: int, tokens: int = 5
) -> dict[str, Any]:
    """Of ``gate_residual_norm``: every variant is another mixture of what may be there."""
    batch, table = 2, 3
    six = draw(1, batch if variant % 2 else 1, table, 6, dim, dtype=rows).unbind(2)  # strided views
    base = draw(2, 6, dim, dtype=F32 if variant % 3 == 0 else rows)
    gate, scale, shift = ((base[i], six[i]) if variant & 4 else six[i] for i in range(3))
    norm = ["layer", "rms", "none"][variant % 3]
    post = ["none", "rms", "layer"][variant // 3 % 3]
    affine = variant % 4 < 2
    vectors = draw(3, 4, dim, dtype=F32 if variant % 5 == 0 else dtype)
    index = torch.randint(0, table, (batch, tokens), generator=torch.Generator().manual_seed(variant))
    return {
        "x": draw(4, batch, tokens, dim, dtype=dtype, mean=1.0),
        "y": draw(5, batch, tokens, dim, dtype=F32 if variant % 7 == 0 else dtype),
        "gate": None if variant % 8 == 0 else gate,
        "scale": None if variant % 8 == 1 else scale,
        "shift": None if variant % 4 == 2 else shift,
        "index": (index if variant % 2 else index[0]).to(torch.int32),
        "gate_activation": "tanh" if variant & 2 else None,
        "post_norm": post,
        "post_eps": 0.25 if variant % 2 else 1e-6,
        "post_weight": vectors[0] if affine and post != "none" else None,
        "post_bias": vectors[1] if affine and post == "layer" else None,
        "norm": norm,
        "eps": 1e-6 if variant % 2 else 0.5,
        "weight": vectors[2] if affine and norm != "none" else None,
        "bias": vectors[3] if affine and norm == "layer" else None,
        "rounding": rounding,
    }


def part(kwargs: dict[str, Any], op: str) -> dict[str, Any]:
    """What of it ``op`` takes."""
    names = {
        "adaln_modulate": "x scale shift index norm eps weight bias rounding",
        "gate_residual": "x y gate index gate_activation post_norm post_eps post_weight post_bias rounding",
    }
    return {n: kwargs[n] for n in names.get(op, " ".join(kwargs)).split()}


def convert(kwargs: dict[str, Any], function: Any) -> dict[str, Any]:
    def one(v: Any) -> Any:
        if isinstance(v, tuple):
            return tuple(function(t) for t in v)
        return function(v) if isinstance(v, Tensor) else v

    return {k: one(v) for k, v in kwargs.items()}


def double(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same in fp64, where nothing is rounded."""
    return convert(kwargs, lambda t: t.double() if t.is_floating_point() else t) | {"rounding": "fast"}


def outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def within(got: Tensor, want: Tensor, exact: Tensor, factor: float = 2.0) -> None:
    """Error against fp64 at most `factor` times the reference's."""
    assert got.dtype == want.dtype and got.shape == want.shape and got.is_contiguous()
    if not got.numel():
        return
    error, allowed = ((t.double() - exact).abs().max() for t in (got, want))
    assert error <= factor * allowed + 4 * torch.finfo(F32).eps * exact.abs().max(), (error, allowed)
