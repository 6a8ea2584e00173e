"""What a feature cache will keep, as a closed form, and the refusal of more than its budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..reference.cache import E4M3, MAX_SCALED_ROW
from .base import GRANULARITIES, STORAGE
from .checks import size

if TYPE_CHECKING:
    from .base import CachePolicy

__all__ = ["Size", "Sizes", "check", "check_rows", "nbytes", "size_of", "storage_dtype"]


class Size(NamedTuple):
    """Of features in one guidance branch."""

    elements: int
    rows: int
    """Of their last dimension: each has a scale in float8_e4m3fn."""


Sizes = Mapping[str, Size]
"""By granularity, of all its features, as far as they are known."""

_STORAGE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "float8_e4m3fn": E4M3}
_SCALE = 4  # bytes


def size_of(features: Iterable[Tensor], times: int = 1) -> Size:
    """Of so many times these features together."""
    found = [(x.numel(), x.numel() // max(x.shape[-1], 1) if x.ndim else 1) for x in features]
    return Size(times * sum(elements for elements, _ in found), times * sum(rows for _, rows in found))


def storage_dtype(policy: CachePolicy, dtype: torch.dtype, granularity: str | None = None) -> torch.dtype:
    """In which features of a dtype are kept.

    Raises:
        ValueError: a storage of another 16-bit dtype than the features'.
    """
    return _stored(policy.storage, dtype, granularity or policy.granularity)


def _stored(storage: str, dtype: torch.dtype, granularity: str) -> torch.dtype:
    if storage == "auto":
        return torch.float32 if granularity == "model" else dtype
    wanted = _STORAGE[storage]
    if wanted != dtype and wanted.itemsize == dtype.itemsize == 2:
        raise ValueError(
            f"storage is {storage!r} but the model computes in {str(dtype).removeprefix('torch.')}; set storage "
            "to 'auto' or 'fp32'"
        )
    return wanted


def check_rows(shape: Sequence[int], dtype: torch.dtype) -> None:
    """Raise ValueError where a feature of a shape is not kept in a dtype with advantage: rows with a scale each that
    are too short to save anything over 16 bits, or longer than the kernels take."""
    width = shape[-1] if len(shape) else 1
    if dtype != E4M3 or width + _SCALE < 2 * width <= 2 * MAX_SCALED_ROW:
        return
    why = (
        f"at most {MAX_SCALED_ROW:,} numbers can share a scale"
        if width > MAX_SCALED_ROW
        else f"with a scale of {_SCALE} bytes each they take no less than 16-bit numbers"
    )
    raise ValueError(
        f"storage is 'float8_e4m3fn' but a feature {list(shape)} has rows of {width:,} numbers in its last dimension: "
        f"{why}; set storage to 'auto'"
    )


def nbytes(
    policy: CachePolicy, elements: int, dtype: torch.dtype, granularity: str | None = None, rows: int = 0
) -> int:
    """Bytes of the factors of so many elements in one guidance branch: (order + 1) · elements · itemsize, and in
    float8_e4m3fn (order + 1) · rows · 4 for the scales.

    Args:
        elements: of all features together.
        dtype: of the features.
        granularity: where it is not the policy's.
        rows: of the last dimension of all features together; counts in float8_e4m3fn only.
    """
    kept = storage_dtype(policy, dtype, granularity)
    return (policy.degree + 1) * _one(Size(elements, rows), kept)


def _one(size: Size, kept: torch.dtype) -> int:
    return size.elements * kept.itemsize + (size.rows * _SCALE if kept == E4M3 else 0)


def check(policy: CachePolicy, sizes: Sizes, dtype: torch.dtype, held: int = 0, branches: int = 1) -> None:
    """Raise ValueError where a new stream of features does not fit beside ``held`` bytes of the others, or where so
    many guidance branches will not.

    The message names the bytes that are needed, and the granularities and storages of the policy that would fit; where
    none does, the least of all.
    """
    if policy.max_bytes is None:
        return
    limit, own = size("max_bytes", policy.max_bytes), policy.granularity
    elements, rows = sizes[own]
    new = nbytes(policy, elements, dtype, rows=rows)
    needs = max(held + new, branches * new)
    if needs <= limit:
        return
    streams = max(branches, 1 + -(-held // new))
    kept = storage_dtype(policy, dtype)
    scales = f" and {rows:,} scales of {_SCALE}" if kept == E4M3 else ""
    raise ValueError(
        f"the cache {policy.name!r} needs {needs:,} bytes at granularity {own!r}: {streams} guidance branches of "
        f"{policy.degree + 1} factors · {elements:,} elements · {kept.itemsize} bytes{scales}, but max_bytes is "
        f"{limit:,}; {_remedy(policy, sizes, dtype, streams, limit)}"
    )


def _remedy(policy: CachePolicy, sizes: Sizes, dtype: torch.dtype, streams: int, limit: int) -> str:
    """What would fit, with its bytes; where nothing does, what takes the least."""
    own, needed = policy.granularity, _needed(policy, sizes, dtype, streams)
    fits = {kind: count for kind, count in needed.items() if count <= limit}
    others = [f"{name!r} ({n:,})" for (name, storage), n in fits.items() if storage == policy.storage and name != own]
    narrower = [f"{storage!r} ({n:,})" for (name, storage), n in fits.items() if name == own]
    parts = []
    if others:
        parts.append(f"granularity {' or '.join(others)} would fit")
    if narrower:
        parts.append(f"storage {' or '.join(narrower)} would fit")
    if fits and not parts:
        (name, storage), count = max(fits.items(), key=lambda item: item[1])
        parts.append(f"granularity {name!r} with storage {storage!r} ({count:,}) would fit")
    if not fits:
        (name, storage), count = min(needed.items(), key=lambda item: item[1])
        parts.append(
            f"no granularity with any storage fits: the least is {name!r} with storage {storage!r}, which max_bytes of "
            f"{count:,} would hold"
        )
    if "model" in policy.granularities and "model" not in sizes:
        parts.append("'model' keeps the transformer's output only, whose size is not known here")
    return "; ".join(parts)


def _needed(policy: CachePolicy, sizes: Sizes, dtype: torch.dtype, streams: int) -> dict[tuple[str, str], int]:
    """(granularity, storage) -> bytes of all that is known; one storage of a width."""
    found: dict[tuple[str, str], int] = {}
    for name in GRANULARITIES:
        if name not in sizes or name not in policy.granularities:
            continue
        counts = set()
        for storage in dict.fromkeys((policy.storage, *STORAGE[1:])):
            try:
                kept = _stored(storage, dtype, name)
            except ValueError:  # the other 16-bit dtype
                continue
            one = _one(sizes[name], kept)
            if one not in counts and (kept != E4M3 or one < 2 * sizes[name].elements):
                counts.add(one)
                found[name, storage] = streams * (policy.degree + 1) * one
    return found
