"""The clustering operators and block means by the emulated kernels, through the host entries of the CUDA operators."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from emulator import DTYPES, LAZY_FORWARD, Policy, c_policy, call, load

INT = ctypes.c_int32


class _Rows(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((f"{n}_stride", ctypes.c_int64) for n in ("batch", "row", "head"))]


class _Ints(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        *((n, ctypes.c_int64) for n in ("batch_stride", "head_stride", "stride")),
        ("bytes", INT),
    ]


class KmeansParams(ctypes.Structure):
    """``vdit::KmeansParams``."""

    _fields_ = [
        ("x", _Rows),
        ("centre", _Rows),
        *((n, INT) for n in ("batch", "tokens", "heads", "dim", "centres", "dtype")),
        ("labels", ctypes.c_void_p),
    ]


class CountingSortParams(ctypes.Structure):
    """``vdit::CountingSortParams``."""

    _fields_ = [
        ("labels", _Ints),
        *((n, INT) for n in ("batch", "heads", "tokens", "classes")),
        ("order", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
    ]


class BlockMeanParams(ctypes.Structure):
    """``vdit::BlockMeanParams``."""

    _fields_ = [
        ("x", _Rows),
        *((n, _Ints) for n in ("lengths", "order", "kv_len")),
        *((n, INT) for n in ("batch", "tokens", "heads", "dim", "blocks", "lengths_batch", "lengths_heads", "dtype")),
        ("means", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
    ]


class PermuteParams(ctypes.Structure):
    """``vdit::PermuteParams``."""

    _fields_ = [
        ("x", _Rows),
        ("order", _Ints),
        *((n, INT) for n in ("batch", "tokens", "heads", "dim", "element_bytes", "inverse")),
        ("out", ctypes.c_void_p),
    ]


@cache
def _library() -> ctypes.CDLL:
    library = load("clusters")
    structures = {
        "kmeans": KmeansParams,
        "counting_sort": CountingSortParams,
        "block_mean": BlockMeanParams,
        "permute": PermuteParams,
    }
    for name, structure in structures.items():
        size = getattr(library, f"vdit_emu_{name}_params_bytes")()
        assert size == ctypes.sizeof(structure), f"{name}: Python has {ctypes.sizeof(structure)} bytes, C++ {size}"
    return library


def _run(name: str, params: ctypes.Structure, policy: Policy) -> None:
    run_policy = c_policy(policy)
    call(getattr(_library(), f"vdit_emu_{name}"), policy, ctypes.byref(params), ctypes.byref(run_policy))


def _rows(t: Tensor) -> _Rows:
    return _Rows(t.data_ptr(), t.stride(0), t.stride(1), t.stride(2))


def _ints(t: Tensor | None) -> _Ints:
    """[1|B, 1|H, n] as the operators pass it: stride 0 where it is broadcast."""
    if t is None:
        return _Ints(bytes=4)
    strides = [0 if t.shape[i] == 1 else t.stride(i) for i in (0, 1)]
    return _Ints(t.data_ptr(), *strides, t.stride(2), t.element_size())


def kmeans_assign(x: Tensor, centroids: Tensor, policy: Policy = LAZY_FORWARD) -> Tensor:
    """``vdit_fast.ops.kmeans_assign`` of CPU tensors (bf16 or fp16) by the emulated kernel."""
    b, n, h, d = x.shape
    labels = torch.empty(b, h, n, dtype=torch.int32)
    sizes = (b, n, h, d, centroids.shape[2], DTYPES[x.dtype])
    _run("kmeans", KmeansParams(_rows(x), _rows(centroids.transpose(1, 2)), *sizes, labels.data_ptr()), policy)
    return labels


def counting_sort(labels: Tensor, classes: int, policy: Policy = LAZY_FORWARD) -> tuple[Tensor, Tensor]:
    """``vdit_fast.ops.counting_sort`` by the emulated kernels."""
    b, h, n = labels.shape
    order, counts = torch.empty(b, h, n, dtype=torch.int32), torch.empty(b, h, classes, dtype=torch.int32)
    ints = _Ints(labels.data_ptr(), *labels.stride(), 4)
    params = CountingSortParams(ints, b, h, n, classes, order.data_ptr(), counts.data_ptr())
    _run("counting_sort", params, policy)
    return order, counts


def block_mean(
    x: Tensor,
    lengths: Tensor,
    order: Tensor | None = None,
    kv_len: Tensor | None = None,
    policy: Policy = LAZY_FORWARD,
) -> tuple[Tensor, Tensor]:
    """``vdit_fast.ops.block_mean`` by the emulated kernels."""
    b, n, h, d = x.shape
    blocks = lengths.shape[2]
    means, counts = torch.empty(b, h, blocks, d), torch.empty(b, h, blocks, dtype=torch.int32)
    limits = _Ints(bytes=4) if kv_len is None else _Ints(kv_len.data_ptr(), 1, 0, 0, kv_len.element_size())
    sizes = (b, n, h, d, blocks, lengths.shape[0], lengths.shape[1], DTYPES[x.dtype])
    params = BlockMeanParams(
        _rows(x), _ints(lengths), _ints(order), limits, *sizes, means.data_ptr(), counts.data_ptr()
    )
    _run("block_mean", params, policy)
    return means, counts


def permute_tokens(x: Tensor, order: Tensor, *, inverse: bool = False, policy: Policy = LAZY_FORWARD) -> Tensor:
    """``vdit_fast.ops.permute_tokens`` by the emulated kernel."""
    out = torch.empty(x.shape, dtype=x.dtype)
    params = PermuteParams(_rows(x), _ints(order), *x.shape, x.element_size(), int(inverse), out.data_ptr())
    _run("permute", params, policy)
    return out
