"""pack_slices and unpack_slices by the emulated kernels, through the host entries of the CUDA operators."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from emulator import DTYPES, LAZY_FORWARD, Policy, c_policy, call, load
from vdit_fast.ops import packed_sizes

INT, LONG, POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
MAX_TENSORS, MAX_SLICES = 4, 64
FORMATS = {None: 0, "bf16": 1, "e4m3": 2}


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", POINTER),
        *((name, LONG) for name in ("batch", "row", "head", "channel")),
        *((name, INT) for name in ("rows", "heads", "dim")),
        ("start", INT * (MAX_SLICES + 1)),
        ("offset", LONG * MAX_SLICES),
    ]


class PackParams(ctypes.Structure):
    """``vdit::PackParams``."""

    _fields_ = [
        ("tensor", _Tensor * MAX_TENSORS),
        ("buffer", POINTER),
        *((name, INT) for name in ("tensors", "slices", "batch", "cut_heads", "element", "dtype", "format", "block")),
    ]


@cache
def _library() -> ctypes.CDLL:
    library = load("pack")
    size = library.vdit_emu_pack_params_bytes()
    assert size == ctypes.sizeof(PackParams), f"pack: Python has {ctypes.sizeof(PackParams)} bytes, C++ {size}"
    return library


def _params(
    x: Sequence[Tensor], buffer: Tensor, sizes: Sequence[Sequence[int]], dim: int, compression: str | None, block: int
) -> PackParams:
    element = x[0].element_size()
    p = PackParams(
        buffer=buffer.data_ptr(), tensors=len(x), slices=len(sizes[0]), batch=x[0].shape[0], cut_heads=int(dim == 2),
        element=element, dtype=DTYPES.get(x[0].dtype, 0), format=FORMATS[compression], block=block,
    )  # fmt: skip
    for i, t in enumerate(x):
        strides = [n * element for n in t.stride()]
        p.tensor[i] = _Tensor(t.data_ptr(), *strides, *t.shape[1:])
        for rank, n in enumerate(sizes[i]):
            p.tensor[i].start[rank + 1] = p.tensor[i].start[rank] + n
    at = 0
    for rank in range(len(sizes[0])):
        for i, t in enumerate(x):
            p.tensor[i].offset[rank] = at
            slice_shape = [*t.shape[:dim], sizes[i][rank], *t.shape[dim + 1 :]]
            at += packed_sizes(slice_shape, compression=compression, block=block)[0] * buffer.element_size()
    return p


def _run(name: str, params: PackParams, buffer: Tensor, policy: Policy) -> None:
    run_policy, size = c_policy(policy), buffer.numel() * buffer.element_size()
    call(
        getattr(_library(), f"vdit_emu_{name}"), policy, ctypes.byref(params), ctypes.c_int64(size),
        ctypes.byref(run_policy),
    )  # fmt: skip


def pack_slices(
    x: Sequence[Tensor],
    sizes: Sequence[Sequence[int]],
    dim: int = 1,
    *,
    compression: str | None = None,
    block: int = 128,
    policy: Policy = LAZY_FORWARD,
) -> Tensor:
    """``vdit_fast.ops.pack_slices`` of [B, N, H, D] by the emulated kernel."""
    length = sum(packed_sizes([list(t.shape) for t in x], sizes, dim, compression=compression, block=block))
    dtype = {None: x[0].dtype, "bf16": torch.bfloat16, "e4m3": torch.uint8}[compression]
    buffer = torch.empty(length, dtype=dtype)
    _run("pack_slices", _params(x, buffer, sizes, dim, compression, block), buffer, policy)
    return buffer


def unpack_slices(
    buffer: Tensor,
    shapes: Sequence[Sequence[int]],
    sizes: Sequence[Sequence[int]],
    dim: int = 1,
    *,
    compression: str | None = None,
    block: int = 128,
    dtype: torch.dtype | None = None,
    policy: Policy = LAZY_FORWARD,
) -> list[Tensor]:
    """``vdit_fast.ops.unpack_slices`` by the emulated kernel."""
    x = [torch.empty(tuple(s), dtype=dtype or buffer.dtype) for s in shapes]
    _run("unpack_slices", _params(x, buffer, sizes, dim, compression, block), buffer, policy)
    return x
