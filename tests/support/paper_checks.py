"""What tests of the papers share: torch's own error as the measure, and a look at which operators ran."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode


def by_torch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """torch's attention of q [B, Lq, H, D] and k, v [B, Lk, Hkv, D], with a bool mask that broadcasts to scores."""
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def distance(got: Tensor, want: Tensor) -> float:
    """Relative, in the 2-norm."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def rms(x: Tensor) -> float:
    return float(x.detach().square().mean().sqrt())


def as_exact_as_torch(
    got: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> None:
    """At most twice as far from fp64 as torch's attention in the same dtype, or as one fp32 rounding of the values.

    Distances are root mean squares. An output is a mean of values, so its rounding is relative to them even where the
    mean is small.
    """
    exact = by_torch(q.double(), k.double(), v.double(), mask, scale)
    torch_path = rms(by_torch(q, k, v, mask, scale).double() - exact)
    allowed = 2 * max(torch_path, torch.finfo(torch.float32).eps * rms(v.double()))
    assert got.shape == exact.shape and got.dtype == q.dtype
    assert rms(got.double() - exact) <= allowed, f"{rms(got.double() - exact):.3g} > {allowed:.3g}"


class Operators(TorchDispatchMode):
    """Counts, while it is entered, this package's operators by name, and torch's attention as "torch"."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func.name().split("::")
        if namespace == "vdit_fast":
            self.ran[name.partition(".")[0]] += 1
        elif "scaled_dot_product" in name or name.startswith("_safe_softmax"):
            self.ran["torch"] += 1
        return func(*args, **(kwargs or {}))
