"""The two exchanges of sequence parallelism, with gradients, and who takes part in them.

Gradients are those of the sum of all ranks' losses: where ranks share the rows of one clip and average the gradients of
their parameters, as DistributedDataParallel does, they get those of the mean loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Run", "all_gather", "all_sum", "all_to_all", "at_once", "process_group"]


def process_group(group: Any, what: str) -> dist.ProcessGroup:
    """The process group that a caller means.

    Args:
        group: a ``ProcessGroup``, a ``DeviceMesh`` of one dimension, or None for all ranks.
        what: the argument's name for messages.

    Raises:
        RuntimeError: torch.distributed is not available or not initialised, or this rank is not in the group.
        TypeError, ValueError: something else, or a mesh of several dimensions.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            f"{what}: torch.distributed is not initialised; start with torchrun and call "
            "torch.distributed.init_process_group() first"
        )
    if group is None:
        group = dist.group.WORLD
    elif hasattr(group, "get_group") and hasattr(group, "mesh_dim_names"):
        if group.ndim != 1:
            raise ValueError(
                f"{what} is a mesh of {group.ndim} dimensions {group.mesh_dim_names}; pass one of them, "
                'for example mesh["sequence"]'
            )
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{what} must be a ProcessGroup, a DeviceMesh of one dimension or None, got {type(group).__name__}"
        )
    if dist.get_rank(group) < 0:
        raise RuntimeError(f"{what}: rank {dist.get_rank()} is not in this group; call it on the group's ranks only")
    return group


Run = Callable[[Callable[[bool], Any]], None]
"""Runs one collective, which is called with whether it is to be asynchronous; ``Members.run`` of ranks under watch."""


def at_once(collective: Callable[[bool], Any]) -> None:
    """Without a watch over the ranks: a wait for one that has failed ends with the group's time-out."""
    collective(False)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, buffer: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup, run: Run
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.group, ctx.run = send, receive, group, run
        return _exchange(buffer, send, receive, group, run)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        found = _exchange(grads[0].contiguous(), ctx.receive, ctx.send, ctx.group, ctx.run)
        return found, None, None, None, None


def _exchange(buffer: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup, run: Run) -> Tensor:
    found = buffer.new_empty(sum(receive))
    run(lambda later: dist.all_to_all_single(found, buffer, receive, send, group=group, async_op=later))
    return found


def all_to_all(
    buffer: Tensor, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup, run: Run = at_once
) -> Tensor:
    """Every rank's part of the buffer to that rank. Differentiable: gradients go the way back.

    Args:
        buffer: contiguous, one dimension: ``send[r]`` elements for rank r of the group, one rank after the other.
        receive: elements that come from every rank.
        run: runs the collective.

    Returns:
        [sum(receive)], the parts of all ranks in their order.
    """
    if torch.is_grad_enabled() and buffer.requires_grad:
        found: Tensor = _AllToAll.apply(buffer, list(send), list(receive), group, run)
        return found
    return _exchange(buffer, list(send), list(receive), group, run)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], dim: int, group: dist.ProcessGroup, run: Run) -> Tensor:
        rank = dist.get_rank(group)
        ctx.dim, ctx.sizes, ctx.rank, ctx.group, ctx.run = dim, sizes, rank, group, run
        return _gathered(x, sizes, dim, group, run)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        parts = grads[0].split(ctx.sizes, ctx.dim)
        own = parts[ctx.rank]
        send, receive = [part.numel() for part in parts], [own.numel()] * len(parts)
        found = _exchange(torch.cat([part.reshape(-1) for part in parts]), send, receive, ctx.group, ctx.run)
        return found.view(len(parts), *own.shape).sum(0), None, None, None, None


def _gathered(x: Tensor, sizes: list[int], dim: int, group: dist.ProcessGroup, run: Run) -> Tensor:
    most, missing = max(sizes), max(sizes) - x.shape[dim]
    if missing:
        shape = list(x.shape)
        shape[dim] = missing
        x = torch.cat([x, x.new_zeros(shape)], dim)
    found, x = x.new_empty(len(sizes), *x.shape), x.contiguous()
    run(lambda later: dist.all_gather(list(found.unbind(0)), x, group=group, async_op=later))
    if dim == 0 and min(sizes) == most:
        return found.flatten(0, 1)
    return torch.cat([part.narrow(dim, 0, size) for part, size in zip(found, sizes, strict=True)], dim)


def all_gather(x: Tensor, sizes: Sequence[int], dim: int, group: dist.ProcessGroup, run: Run = at_once) -> Tensor:
    """The parts of all ranks side by side. Differentiable: what all ranks' results say of a rank's part, added up.

    Args:
        x: this rank's part.
        sizes: of every rank's part along ``dim``; up to the largest is sent.
        run: runs the collective.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        found: Tensor = _AllGather.apply(x, list(sizes), dim, group, run)
        return found
    return _gathered(x, list(sizes), dim, group, run)


def all_sum(x: Tensor, group: dist.ProcessGroup, run: Run = at_once) -> Tensor:
    """The sum over all ranks, on all ranks. Not differentiable."""
    found = x.clone()
    run(lambda later: dist.all_reduce(found, group=group, async_op=later))
    return found
