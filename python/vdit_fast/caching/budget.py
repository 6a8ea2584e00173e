"""What a feature cache will keep, as a closed form, and the refusal of more than its budget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from .base import GRANULARITIES
from .checks import size

if TYPE_CHECKING:
    from .base import CachePolicy

__all__ = ["Sizes", "check", "nbytes", "storage_dtype"]

Sizes = Mapping[str, int]
"""Granularity -> elements of all its features in one guidance branch, as far as they are known."""

_STORAGE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def storage_dtype(policy: CachePolicy, dtype: torch.dtype, granularity: str | None = None) -> torch.dtype:
    """In which features of a dtype are kept.

    Raises:
        ValueError: a storage of another 16-bit dtype than the features'.
    """
    if policy.storage == "auto":
        return torch.float32 if (granularity or policy.granularity) == "model" else dtype
    wanted = _STORAGE[policy.storage]
    if wanted != dtype and wanted.itemsize == dtype.itemsize == 2:
        raise ValueError(
            f"storage is {policy.storage!r} but the model computes in {str(dtype).removeprefix('torch.')}; set storage "
            "to 'auto' or 'fp32'"
        )
    return wanted


def nbytes(policy: CachePolicy, elements: int, dtype: torch.dtype, granularity: str | None = None) -> int:
    """Bytes of the factors of so many elements in one guidance branch: (order + 1) · elements · itemsize.

    Args:
        elements: of all features together.
        dtype: of the features.
        granularity: where it is not the policy's.
    """
    return (policy.degree + 1) * elements * storage_dtype(policy, dtype, granularity).itemsize


def check(policy: CachePolicy, sizes: Sizes, dtype: torch.dtype, held: int = 0, branches: int = 1) -> None:
    """Raise ValueError where a new stream of features does not fit beside ``held`` bytes of the others, or where so
    many guidance branches will not.

    The message names the bytes that are needed, and the granularities of the policy that would fit.
    """
    if policy.max_bytes is None:
        return
    limit, own = size("max_bytes", policy.max_bytes), policy.granularity
    elements = sizes[own]
    new = nbytes(policy, elements, dtype)
    needs = max(held + new, branches * new)
    if needs <= limit:
        return
    streams = max(branches, 1 + round(held / new))
    others = [name for name in GRANULARITIES if name in sizes and name in policy.granularities and name != own]
    needed = {name: streams * nbytes(policy, sizes[name], dtype, name) for name in others}
    fitting = [f"{name!r} ({count:,})" for name, count in needed.items() if count <= limit]
    remedy = f"granularity {' or '.join(fitting)} would fit" if fitting else "no other granularity of blocks fits"
    if own != "model" and "model" in policy.granularities:
        remedy += "; 'model' keeps the least, the transformer's output"
    raise ValueError(
        f"the cache {policy.name!r} needs {needs:,} bytes at granularity {own!r}: {streams} guidance branches of "
        f"{policy.degree + 1} factors · {elements:,} elements · {storage_dtype(policy, dtype).itemsize} bytes, but "
        f"max_bytes is {limit:,}; {remedy}"
    )
