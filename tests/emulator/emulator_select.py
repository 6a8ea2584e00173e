"""Selection and the compilation of block maps by the emulated kernels, through the host entries of the operators."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from emulator import LAZY_FORWARD, Policy, c_policy, call, load


class SelectParams(ctypes.Structure):
    """``vdit::SelectParams``."""

    _fields_ = [
        ("scores", ctypes.c_void_p),
        ("keep", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "n", "at_least")),
        ("k_rows", ctypes.c_void_p),
        ("k_bytes", ctypes.c_int32),
        ("by_mass", ctypes.c_bool),
        ("p", ctypes.c_double),
    ]


def select(
    scores: Tensor,
    at_least: int | Tensor = 1,
    p: float | None = None,
    policy: Policy = LAZY_FORWARD,
) -> Tensor:
    """``ops.select_top_k(scores, at_least)``, or with ``p`` ``ops.select_top_p(scores, p, at_least)``.

    Raises:
        EmulatorError: with policy, seed, block and thread.
    """
    library = load("select")
    size = library.vdit_emu_select_params_bytes()
    assert size == ctypes.sizeof(SelectParams), f"Python has {ctypes.sizeof(SelectParams)} bytes, C++ {size}"
    scores = scores.contiguous()
    keep = torch.empty(scores.shape, dtype=torch.bool)
    rows = at_least.expand(scores.shape[:-1]).contiguous() if isinstance(at_least, Tensor) else None
    params = SelectParams(scores.data_ptr(), keep.data_ptr(), scores.shape[:-1].numel(), scores.shape[-1])
    params.at_least = 1 if isinstance(at_least, Tensor) else at_least
    if rows is not None:
        params.k_rows, params.k_bytes = rows.data_ptr(), rows.element_size()
    params.by_mass, params.p = p is not None, p or 0.0
    run_policy = c_policy(policy)
    call(library.vdit_emu_select, policy, ctypes.byref(params), ctypes.byref(run_policy))
    return keep


class BlockMap(ctypes.Structure):
    """``vdit::BlockMap``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("keep", "q_len", "kv_len")),
        *((name, ctypes.c_int64) for name in ("groups", "nq", "nk")),
        *((name, ctypes.c_int32) for name in ("q_groups", "kv_groups")),
        *((name, ctypes.c_int64) for name in ("q_tile", "tiles")),
    ]


class PlanLists(ctypes.Structure):
    """``vdit::PlanLists``."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("tiles", "run_ptr", "runs")]


def compile_blocks(
    keep: Tensor,
    q_len: Tensor,
    kv_len: Tensor,
    lq: int,
    q_tile: int | None = None,
    policy: Policy = LAZY_FORWARD,
) -> tuple[Tensor, Tensor, Tensor]:
    """``ops.compile_blocks`` as on a GPU, with capacity to spare.

    Raises:
        EmulatorError: with policy, seed, block and thread.
    """
    library = load("select")
    size = library.vdit_emu_block_map_bytes()
    assert size == ctypes.sizeof(BlockMap), f"Python has {ctypes.sizeof(BlockMap)} bytes, C++ {size}"
    groups, nq, nk = keep.shape
    keep, q_len, kv_len = (t.contiguous() for t in (keep, q_len, kv_len))
    count = groups * (nq if q_tile is None else nq + lq // q_tile) if nq else 0
    lists = [torch.empty(s, dtype=torch.int32) for s in ((count, 3), (count + 1,), (count * ((nk + 1) // 2), 3))]
    pointers = (t.data_ptr() for t in (keep, q_len, kv_len))
    block_map = BlockMap(*pointers, groups, nq, nk, len(q_len), len(kv_len), q_tile or 0, count)
    out = PlanLists(*(t.data_ptr() for t in lists))
    run_policy = c_policy(policy)
    call(library.vdit_emu_compile_blocks, policy, *(ctypes.byref(x) for x in (block_map, out, run_policy)))
    return lists[0], lists[1], lists[2]
