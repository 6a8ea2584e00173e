"""From a boolean map of query and key blocks to the lists of an AttentionPlan."""

from __future__ import annotations

import torch
from torch import Tensor

from ._no_gradient import carries_no_gradient


def compile_blocks(
    keep: Tensor, q_len: Tensor, kv_len: Tensor, lq: int, q_tile: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """List the tiles of a block map, most work first, and their runs of neighbouring key blocks.

    Blocks may be empty: a query block without rows gives no work, a key block without keys does not cut a run. On a
    CPU the lists have the needed length. On a GPU their length depends on shapes only, nothing is read back: tiles in
    excess have no rows, runs beyond ``run_ptr[-1]`` are unused, and a negative length counts as 0.

    Args:
        keep: bool ``[G, nq, nk]``, G = batch * heads: the query block reads the key block.
        q_len: int64 ``[1|G, nq]``, rows of every query block.
        kv_len: int64 ``[1|G, nk]``, keys of every key block.
        lq: rows of the sequence, at most 2^31 - 1; only the capacity depends on it.
        q_tile: cut query blocks into tiles of at most this many rows; None keeps them whole.

    Returns:
        ``tiles`` int32 ``[T, 3]``, ``run_ptr`` int32 ``[T + 1]`` and ``runs`` int32 ``[R, 3]`` as in docs/plan.md. Not
        differentiable.

    Raises:
        RuntimeError: dtype, shape or device do not fit, or there are more runs than int32 can index. On a CPU also: a
            length is negative, ``q_len`` sums to more than lq, or ``kv_len`` to more than int32 holds.
    """
    return torch.ops.vdit_fast.compile_blocks(keep, q_len, kv_len, lq, q_tile)


carries_no_gradient("compile_blocks")


@torch.library.register_fake("vdit_fast::compile_blocks")
def _fake(
    keep: Tensor, q_len: Tensor, kv_len: Tensor, lq: int, q_tile: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    groups, nq, nk = keep.shape
    if q_tile is not None and q_tile < 1:
        raise RuntimeError(f"vdit_fast: compile_blocks: q_tile is {q_tile}; expected at least 1")
    most = 0 if nq == 0 else nq if q_tile is None else nq + lq // q_tile
    tiles: int | torch.SymInt = groups * most
    runs: int | torch.SymInt = tiles * ((nk + 1) // 2)
    if keep.device.type == "cpu":  # as many as there are
        context = torch.library.get_ctx()
        tiles, runs = context.new_dynamic_size(), context.new_dynamic_size()

    def ints(*shape: int | torch.SymInt) -> Tensor:
        return keep.new_empty(shape, dtype=torch.int32)

    return ints(tiles, 3), ints(tiles + 1), ints(runs, 3)
