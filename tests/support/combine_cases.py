"""Inputs of combine_rows and the comparison with its torch twin, for CPU, emulator and device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vdit_fast import reference

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = [F32, F16, BF16]


def draw(dim: int, dtype: torch.dtype, k: int, parts: int, *, rows: int = 12, seed: int = 0) -> dict[str, Tensor]:
    """Arguments; the bits of ``parts`` say which of weights, base, residual and gate there are. A fifth of the slots
    name nothing."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(dtype)

    slots = torch.randint(0, rows + 3, (rows, k), generator=random, dtype=torch.int32)
    slots[torch.rand(rows, k, generator=random) < 0.2] = -1
    kwargs = {"rows": normal(rows + 3, dim), "slots": slots}
    optional = {"weights": torch.rand(rows, k, generator=random), "base": normal(rows, dim),
                "residual": normal(rows, dim), "gate": normal(3, dim)}  # fmt: skip
    return kwargs | {name: x for i, (name, x) in enumerate(optional.items()) if parts >> i & 1}


def check(run: Callable[..., Tensor], kwargs: dict[str, Tensor]) -> None:
    """As near to fp64 as the twin of the same dtype, whose sums have the same order, and a few roundings of fp32."""
    exact = reference.combine_rows(**{n: x.double() if x.is_floating_point() else x for n, x in kwargs.items()})
    want, got = reference.combine_rows(**kwargs), run(**kwargs)
    assert got.shape == want.shape and got.dtype == want.dtype and got.is_contiguous()
    size = sum(x.double().abs().amax() for x in kwargs.values() if x.is_floating_point()) ** 2
    allowed = 2 * float((want.double() - exact).abs().max()) + 8 * torch.finfo(F32).eps * float(size)
    assert float((got.double() - exact).abs().max()) <= allowed
