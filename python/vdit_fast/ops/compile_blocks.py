"""From a boolean map of query and key blocks to the lists of an AttentionPlan."""

from __future__ import annotations

import torch
from torch import Tensor


def compile_blocks(
    keep: Tensor, q_len: Tensor, kv_len: Tensor, lq: int, q_tile: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """List the tiles of a block map, most work first, and their runs of neighbouring key blocks.

    Blocks may be empty: a query block without rows gives no work, a key block without keys does not cut a run. On a
    CPU the lists have the needed length. On a GPU their length depends on shapes only, nothing is read back: tiles in
    excess have no rows, and runs beyond ``run_ptr[-1]`` are unused.

    Args:
        keep: bool ``[G, nq, nk]``, G = batch * heads: the query block reads the key block.
        q_len: int64 ``[1|G, nq]``, rows of every query block.
        kv_len: int64 ``[1|G, nk]``, keys of every key block.
        lq: rows of the sequence; only the capacity depends on it.
        q_tile: cut query blocks into tiles of at most this many rows; None keeps them whole.

    Returns:
        ``tiles`` int32 ``[T, 3]``, ``run_ptr`` int32 ``[T + 1]`` and ``runs`` int32 ``[R, 3]`` as in docs/plan.md. Not
        differentiable.

    Raises:
        RuntimeError: dtype, shape or device do not fit, or there are more runs than int32 can index.
    """
    return torch.ops.vdit_fast.compile_blocks(keep, q_len, kv_len, lq, q_tile)


@torch.library.register_fake("vdit_fast::compile_blocks")
def _fake(
    keep: Tensor, q_len: Tensor, kv_len: Tensor, lq: int, q_tile: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    groups, nq, nk = keep.shape
    tiles: int | torch.SymInt = groups * (nq if q_tile is None else nq + lq // q_tile)
    runs: int | torch.SymInt = tiles * ((nk + 1) // 2)
    if keep.device.type == "cpu":  # as many as there are
        context = torch.library.get_ctx()
        tiles, runs = context.new_dynamic_size(), context.new_dynamic_size()

    def ints(*shape: int | torch.SymInt) -> Tensor:
        return keep.new_empty(shape, dtype=torch.int32)

    return ints(tiles, 3), ints(tiles + 1), ints(runs, 3)
