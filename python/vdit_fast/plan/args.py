"""Checks and normal forms of the builders' arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .check import is_permutation

Blocks = int | Sequence[int] | Tensor


def positive(name: str, value: int) -> None:
    """Raise unless ``value`` is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def cut(length: int, block: int) -> list[int]:
    """Lengths of the blocks that cut ``length``: equal ones and a shorter tail."""
    return [min(block, length - start) for start in range(0, length, block)]


def equal_lengths(length: int, block: int, device: torch.device) -> Tensor:
    """``cut`` as an int64 tensor made on ``device``, without a copy from the host."""
    starts = torch.arange(0, length, block, device=device)
    return (length - starts).clamp(max=block)


def block_map(mask: Tensor, name: str) -> Tensor:
    """Bool ``[nq, nk]``, ``[H, nq, nk]`` or ``[B, H, nq, nk]`` as 4-D."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a torch.bool tensor, got {kind}; compare or convert with .bool() first")
    if mask.dim() not in (2, 3, 4) or 0 in mask.shape:
        raise ValueError(
            f"{name} must be [q, kv], [heads, q, kv] or [batch, heads, q, kv] and not empty, got {list(mask.shape)}"
        )
    return mask.reshape((1,) * (4 - mask.dim()) + mask.shape)


def as_order(name: str, order: Tensor | None, device: torch.device) -> Tensor | None:
    """Order as contiguous int32 ``[1|B, 1|H, L]``; checked to be permutations on a CPU."""
    if order is None:
        return None
    if not isinstance(order, Tensor) or order.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be an int32 or int64 tensor, got {getattr(order, 'dtype', type(order).__name__)}")
    if order.dim() not in (1, 3) or order.numel() == 0:
        raise ValueError(f"{name} must be [L] or [1 or batch, 1 or heads, L], got {list(order.shape)}")
    order = same_device(name, order, device).reshape((1,) * (3 - order.dim()) + order.shape)
    if device.type == "cpu":
        flat = order.reshape(-1, order.shape[-1]).long()
        inside = int(flat.min()) >= 0 and int(flat.max()) < flat.shape[1]
        if not inside or not is_permutation(flat):
            raise ValueError(f"{name} is not a permutation of 0..{flat.shape[1] - 1}; use the result of argsort")
    return order.to(torch.int32).contiguous()


def same_device(name: str, value: Tensor, device: torch.device) -> Tensor:
    """Raise unless ``value`` is on ``device``."""
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, the rest is on {device}; move it with .to({str(device)!r})")
    return value


def check_lengths(name: str, lengths: Tensor, total: int) -> None:
    """Raise unless every row of int64 ``[N, n]`` is non-negative and sums to ``total``. Synchronises."""
    if int(lengths.min()) < 0:
        raise ValueError(f"{name} holds {int(lengths.min())}; lengths must be 0 or more")
    sums = lengths.sum(-1)
    wrong = (sums != total).nonzero()
    if len(wrong):
        raise ValueError(f"{name} sum to {int(sums[wrong[0, 0]])}, but the sequence has {total} tokens")


def block_lengths(
    name: str,
    block: Blocks,
    count: int,
    length_name: str,
    length: int | None,
    order: Tensor | None,
    device: torch.device,
) -> tuple[Tensor, int]:
    """Lengths of ``count`` blocks as int64 ``[1, count]`` on ``device``, and the sequence length."""
    if length is not None:
        positive(length_name, length)
    if order is not None:
        if length is not None and length != order.shape[-1]:
            raise ValueError(f"{length_name} is {length} but the order has {order.shape[-1]} tokens")
        length = order.shape[-1]
    if isinstance(block, int):
        positive(name, block)
        length = count * block if length is None else length
        if not (count - 1) * block < length <= count * block:
            raise ValueError(
                f"{length_name} = {length} needs {-(-length // block)} blocks of {name} = {block}, "
                f"but the mask has {count}"
            )
        return equal_lengths(length, block, device)[None], length
    lengths = torch.as_tensor(block)
    if lengths.dim() != 1 or lengths.dtype == torch.bool or lengths.is_floating_point() or len(lengths) != count:
        kind = f"{lengths.dtype} {list(lengths.shape)}"
        raise ValueError(f"{name} must be one length or {count} integer lengths, got {kind}")
    if lengths.device.type == "cpu":
        length = int(lengths.sum()) if length is None else length
        check_lengths(name, lengths[None].long(), length)
        if length < 1:
            raise ValueError(f"{name} sum to 0; a plan needs at least one token on each axis")
    elif length is None:
        raise ValueError(f"{length_name} must be given when {name} is on {lengths.device}, where it is not read back")
    return lengths.long()[None].to(device), length
