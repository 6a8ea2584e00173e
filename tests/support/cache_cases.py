"""Calls of the feature cache's kernels in all their mixtures, for tests on every device."""

from __future__ import annotations

import math
from typing import Any

import torch
from adaln_cases import BF16, F16, F32, draw
from torch import Tensor

from vdit_fast.reference.cache import E4M3, quantised

__all__ = [
    "E4M3", "FORECASTS", "UPDATES", "coded", "coded_forecast", "coded_update", "double", "forecast_arguments",
    "same_codes", "update_arguments", "values",
]  # fmt: skip

UPDATES = range(20)
FORECASTS = range(24)


def update_arguments(variant: int, shape: tuple[int, ...], device: str = "cpu") -> dict[str, Any]:
    """Of ``factor_update``: every variant is another mixture of order, known factors, dtypes and what may be there."""
    order = variant % 5
    half = (BF16, F16)[variant % 2]
    storage = F32 if variant % 3 == 0 else half
    dtype = F32 if variant % 4 == 1 else half
    factors = draw(variant, order + 1, *shape, dtype=storage)
    known = (variant // 5 + variant) % (order + 2)
    factors[known:] = torch.nan  # whatever is not known must not be read
    minus = draw(variant + 200, *shape, dtype=dtype, mean=1.0) if variant % 3 == 1 else None
    return {
        "factors": factors.to(device),
        "output": draw(variant + 100, *shape, dtype=dtype).to(device),
        "distance": (1.0, 5.0, 3.0, -0.25)[variant % 4],
        "known": known,
        "minus": minus if minus is None else minus.to(device),
    }


def forecast_arguments(
    variant: int, shape: tuple[int, ...], rounding: str = "fast", dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Of ``forecast_gate_add``: modules, factors, gates in all their forms, dtypes; ``dtype`` is that of x."""
    batch, tokens, dim = shape
    modules, terms, table = variant % 3 + 1, (2, 1, 3, 2, 5, 4)[variant // 2 % 6], 3
    half = (BF16, F16)[variant % 2] if dtype in (None, F32) else dtype
    x_dtype = dtype or (F32 if variant % 5 == 0 else half)
    storage = F32 if variant % 4 == 3 else half
    rows = F32 if variant % 4 < 2 else half
    factors = [draw(10 + j, min(terms + j % 2, 5), *shape, dtype=storage) for j in range(modules)]
    for one in factors:
        one[terms:] = torch.nan  # more are held than are asked for
    six = draw(1, batch if variant % 2 else 1, table, 3, dim, dtype=rows).unbind(2)  # strided views
    base = draw(2, 3, dim, dtype=F32 if variant % 3 == 0 else rows)
    gates = [(base[j], six[j]) if variant & 4 else six[j] for j in range(modules)]
    gate = [None if (variant + j) % 4 == 0 else g for j, g in enumerate(gates)]
    index = torch.randint(0, table, (batch, tokens), generator=torch.Generator().manual_seed(variant)).to(torch.int32)
    gated = any(g is not None for g in gate)
    return {
        "x": draw(4, *shape, dtype=x_dtype, mean=1.0),
        "factors": factors if modules > 1 or variant % 2 else factors[0],
        "gate": gate if modules > 1 or variant % 2 else gate[0],
        "weights": [(0.75 + 0.5 * (variant % 3)) ** (i + 1) / math.factorial(i) for i in range(terms)],  # none is 1
        "index": (index if variant % 2 else index[0]) if gated else None,
        "rounding": rounding,
    }


def double(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same in fp64, where nothing is rounded; copies, for what is changed in place."""

    def one(v: Any) -> Any:
        if isinstance(v, (list, tuple)):
            return type(v)(map(one, v))
        return v.to(torch.float64, copy=True) if isinstance(v, Tensor) and v.is_floating_point() else v

    return {k: one(v) for k, v in kwargs.items()} | ({"rounding": "fast"} if "rounding" in kwargs else {})


# ---- factors in e4m3


def coded(factors: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Factors as codes and scales, their rows of very different magnitudes; a factor of NaN stays one, with NaN for its
    scales: whoever reads it shows."""
    rows = torch.randint(-12, 13, factors.shape[:-1], generator=torch.Generator().manual_seed(seed))
    codes, scales = quantised(factors.float() * rows.exp2()[..., None])
    return codes, scales.where(~factors.isnan().all(-1), torch.nan)


def values(codes: Tensor, scales: Tensor) -> Tensor:
    """What they stand for, in fp64, which holds it exactly."""
    return codes.double() * scales.double()[..., None]


def same_codes(a: Tensor, b: Tensor) -> bool:
    """Bit by bit, but for the signs of NaN."""
    x, y = a.view(torch.uint8), b.view(torch.uint8)
    return bool(((x == y) | ((x & 0x7F == 0x7F) & (y & 0x7F == 0x7F))).all())


def coded_update(variant: int, shape: tuple[int, ...]) -> dict[str, Any]:
    """``update_arguments`` with factors in e4m3, and outputs whose rows differ as much as theirs."""
    kwargs = update_arguments(variant, shape)
    for name in ("output", "minus"):
        if kwargs[name] is not None:
            rows = torch.randint(-8, 9, shape[:-1], generator=torch.Generator().manual_seed(variant))
            kwargs[name] = (kwargs[name].float() * rows.exp2()[..., None]).to(kwargs[name].dtype)
    kwargs["factors"], kwargs["scales"] = coded(kwargs["factors"], variant)
    return kwargs


def coded_forecast(
    variant: int, shape: tuple[int, ...], rounding: str = "fast", dtype: torch.dtype | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """``forecast_arguments`` with factors in e4m3, and the same in fp64 with what these stand for."""
    kwargs = forecast_arguments(variant, shape, rounding, dtype)
    modules = kwargs["factors"] if isinstance(kwargs["factors"], list) else [kwargs["factors"]]
    pairs = [coded(factors, variant) for factors in modules]
    exact = double(kwargs) | {"factors": [values(*pair) for pair in pairs]}
    exact["gate"] = exact["gate"] if isinstance(kwargs["factors"], list) else [exact["gate"]]
    codes, scales = ([pair[i] for pair in pairs] for i in (0, 1))
    one = not isinstance(kwargs["factors"], list)
    return kwargs | {"factors": codes[0] if one else codes, "scales": scales[0] if one else scales}, exact
