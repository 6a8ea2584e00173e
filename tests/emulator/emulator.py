"""The emulator of the CUDA kernels, from Python: builds its libraries, binds their C entry points, runs attention.

Everything a kernel reads is copied into memory that ends at an unmapped page, its results are filled with NaN before it
runs, and what breaks a rule of the hardware is an :class:`EmulatorError` that names policy, seed, block and thread.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from vdit_fast import AttentionPlan

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(os.environ.get("VDIT_EMULATOR_SOURCE", ROOT / "csrc" / "emulator")).resolve()
BUILD = Path(os.environ.get("VDIT_EMULATOR_BUILD", ROOT / "build" / "emulator")).resolve()

LAZY, EAGER, RANDOM = range(3)
FORWARD, REVERSE, ANY_ORDER = range(3)


class EmulatorError(Exception):
    """A kernel broke a rule, waited for ever, or its host entry refused the call."""


@dataclass(frozen=True)
class Policy:
    """How adversarial the schedule is (csrc/emulator/emu.h has the fields)."""

    name: str = "lazy-forward"
    asynchronous: int = LAZY
    order: int = FORWARD
    preempt: bool = False
    smem_skew: int = 0
    seed: int = 1
    poison: bool = True
    check_areg: bool = True
    threads: int = 1
    cpu_seconds: float = 120.0

    def __str__(self) -> str:
        return f"{self.name} (seed {self.seed})"

    def with_seed(self, seed: int) -> Policy:
        return replace(self, seed=seed)


LAZY_FORWARD = Policy()
LAZY_REVERSE = Policy("lazy-reverse-preempt", LAZY, REVERSE, preempt=True)
EAGER_SKEW = Policy("eager-forward-skew", EAGER, FORWARD, smem_skew=144)
RANDOMS = [Policy(f"random-{seed}", RANDOM, ANY_ORDER, seed=seed) for seed in (1, 2, 3)]
POLICIES = [LAZY_FORWARD, LAZY_REVERSE, EAGER_SKEW, *RANDOMS]


class _Policy(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("asynchronous", "order", "preempt", "poison", "check_areg")),
        *((name, ctypes.c_int32) for name in ("smem_skew", "threads", "reserved")),
        ("seed", ctypes.c_uint64),
        ("cpu_seconds", ctypes.c_double),
    ]


class Stats(ctypes.Structure):
    """Counters since the last ``stats(reset=True)``."""

    _names = (
        "blocks switches collectives mma ldmatrix ldmatrix_conflicts wgmma tma cp_async "
        "ldg128 stg128 ldg64 stg64 ldg32 stg32"  # order of emu.h
    )
    _fields_ = [(name, ctypes.c_uint64) for name in _names.split()]

    def __str__(self) -> str:
        return ", ".join(f"{name} {getattr(self, name)}" for name, _ in self._fields_)


def c_policy(policy: Policy) -> ctypes.Structure:
    """The structure that C entry points take."""
    names = [name for name, _ in _Policy._fields_ if name != "reserved"]
    return _Policy(**{name: getattr(policy, name) for name in names})


# ---- building and loading


def _run(command: Sequence[str | Path]) -> None:
    # ccache: copies of the sources in other folders share their results.
    environment = {**os.environ, "CCACHE_BASEDIR": str(SOURCE.parent), "CCACHE_NOHASHDIR": "1"}
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        output = (done.stdout + done.stderr)[-8000:]
        raise RuntimeError(f"building the emulator failed: {' '.join(map(str, command))}\n{output}")


def build(group: str, *options: str) -> Path:
    """Build one library of csrc/emulator/CMakeLists.txt (``selftest``, ``attention``, ...); returns its path."""
    for tool in ("cmake", "ninja"):
        if shutil.which(tool) is None:
            raise RuntimeError(f"the emulator is built with {tool}, which is not on PATH")
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / ".lock", "w") as lock:  # several test runs may share the folder
        fcntl.flock(lock, fcntl.LOCK_EX)
        if options or not (BUILD / "build.ninja").exists():
            extra = os.environ.get("VDIT_EMULATOR_OPTIONS", "").split()
            _run(["cmake", "-S", SOURCE, "-B", BUILD, "-G", "Ninja", *extra, *options])
        _run(["cmake", "--build", BUILD, "--target", f"vdit_emulator_{group}"])
    return BUILD / f"libvdit_emulator_{group}.so"


@cache
def load(group: str) -> ctypes.CDLL:
    """Build and load a library; the layouts of the shared structures are compared."""
    library = ctypes.CDLL(str(build(group)))
    for function, structure in (("policy", _Policy), ("stats", Stats)):
        size = getattr(library, f"vdit_emu_{function}_bytes")()
        assert size == ctypes.sizeof(structure), f"{function}: Python has {ctypes.sizeof(structure)} bytes, C++ {size}"
    return library


def stats(group: str, reset: bool = True) -> Stats:
    """What the kernels of a library did since the last reset."""
    out = Stats()
    load(group).vdit_emu_stats(ctypes.byref(out), int(reset))
    return out


def call(function: ctypes._CFuncPtr, policy: Policy, *args: object) -> None:
    """Call an entry point whose last arguments are (error text, its size); args may hold the policy structure."""
    error = ctypes.create_string_buffer(8192)
    if function(*args, error, ctypes.c_size_t(len(error))) != 0:
        raise EmulatorError(f"policy {policy}: {error.value.decode()}")


def run_case(
    name: str,
    inputs: Sequence[Tensor] = (),
    outputs: Sequence[Tensor] = (),
    numbers: Sequence[int] = (),
    policy: Policy = LAZY_FORWARD,
) -> None:
    """Run a case of csrc/emulator/selftest; ``outputs`` (contiguous tensors) are updated in place."""
    library = load("selftest")
    buffers, count = 4, 16
    arguments: list[object] = [name.encode()]
    for tensors in (inputs, outputs):
        assert len(tensors) <= buffers and all(t.is_contiguous() for t in tensors)
        pointers = [t.data_ptr() for t in tensors] + [None] * (buffers - len(tensors))
        sizes = [t.numel() * t.element_size() for t in tensors] + [0] * (buffers - len(tensors))
        arguments += [(ctypes.c_void_p * buffers)(*pointers), (ctypes.c_size_t * buffers)(*sizes)]
    run_policy = c_policy(policy)
    arguments += [(ctypes.c_int64 * count)(*numbers), ctypes.byref(run_policy)]
    call(library.vdit_emu_case, policy, *arguments)


# ---- attention (kernels/attention/params.h and forward.h)


class _Rows(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((f"{n}_stride", ctypes.c_int64) for n in ("batch", "row", "head"))]


class _Order(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("batch", ctypes.c_int32), ("heads", ctypes.c_int32)]


class _Segment(ctypes.Structure):
    _fields_ = [("k", _Rows), ("v", _Rows), ("length", ctypes.c_int32)]


class _Plan(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("tiles", "run_ptr", "runs", "mask_bits")),
        *((name, ctypes.c_int32) for name in ("num_tiles", "num_runs")),
        ("num_mask_words", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("batch", "heads")),
        ("q_order", _Order),
        ("kv_order", _Order),
    ]


MAX_SEGMENTS = 8


class AttentionParams(ctypes.Structure):
    """``vdit::gpu::AttentionParams``."""

    _fields_ = [
        *((name, _Rows) for name in "qkv"),
        *((name, ctypes.c_int32) for name in ("batch", "heads", "kv_heads", "dim", "lq", "lk", "dtype")),
        ("scale", ctypes.c_float),
        ("plan", _Plan),
        ("row_scale", ctypes.c_void_p),
        ("kv_len", ctypes.c_void_p),
        ("kv_len_bytes", ctypes.c_int32),
        ("num_segments", ctypes.c_int32),
        ("segment", _Segment * MAX_SEGMENTS),
    ]


class AttentionOutputs(ctypes.Structure):
    """``vdit::gpu::AttentionOutputs``."""

    _fields_ = [("out", ctypes.c_void_p), ("lse", ctypes.c_void_p)]


class ForwardOptions(ctypes.Structure):
    """``vdit::gpu::ForwardOptions``."""

    _fields_ = [
        (name, ctypes.c_int32) for name in ("variant", "compute_capability", "sm_count", "max_shared_bytes", "splits")
    ]


VARIANTS = {"automatic": 0, "sm80": 1, "sm90a": 2}
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def _rows(t: Tensor) -> _Rows:
    """A [B, N, H, D] tensor; a batch of 1 that is broadcast has batch stride 0."""
    return _Rows(t.data_ptr(), t.stride(0), t.stride(1), t.stride(2))


def _order(t: Tensor | None) -> _Order:
    return _Order(None, 1, 1) if t is None else _Order(t.data_ptr(), t.shape[0], t.shape[1])


def _plan(plan: AttentionPlan | None) -> _Plan:
    if plan is None:
        return _Plan(batch=1, heads=1, q_order=_order(None), kv_order=_order(None))
    tiles, run_ptr, runs, mask_bits, q_order, kv_order = plan.op_args()
    words = 0 if mask_bits is None else mask_bits.numel()
    return _Plan(
        # An empty tensor has no address, but a plan without tiles or runs is a plan all the same.
        tiles.data_ptr() or run_ptr.data_ptr(),
        run_ptr.data_ptr(),
        runs.data_ptr() or run_ptr.data_ptr(),
        mask_bits.data_ptr() if mask_bits is not None and words else None,
        len(tiles),
        len(runs),
        words,
        plan.batch,
        plan.heads,
        _order(q_order),
        _order(kv_order),
    )


def attention_params(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan | None,
    scale: float | None,
    row_scale: Tensor | None,
    kv_len: Tensor | None,
    segments: Sequence[tuple[Tensor, Tensor]],
) -> AttentionParams:
    """The C structure; the tensors must outlive it."""
    batch, lq, heads, dim = q.shape
    p = AttentionParams()
    p.q, p.k, p.v = _rows(q), _rows(k), _rows(v)
    p.batch, p.heads, p.kv_heads, p.dim, p.lq, p.lk = batch, heads, k.shape[2], dim, lq, k.shape[1]
    p.dtype = DTYPES[q.dtype]
    p.scale = dim**-0.5 if scale is None else scale
    p.plan = _plan(plan)
    p.row_scale = None if row_scale is None else row_scale.data_ptr()
    p.kv_len = None if kv_len is None else kv_len.data_ptr()
    p.kv_len_bytes = 0 if kv_len is None else kv_len.element_size()
    p.num_segments = len(segments)
    for i, (segment_k, segment_v) in enumerate(segments):
        rows = [_rows(t.expand(batch, -1, -1, -1)) for t in (segment_k, segment_v)]
        p.segment[i] = _Segment(*rows, segment_k.shape[1])
    return p


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan | None = None,
    *,
    scale: float | None = None,
    row_scale: Tensor | None = None,
    kv_len: Tensor | None = None,
    segments: Sequence[tuple[Tensor, Tensor]] = (),
    policy: Policy = LAZY_FORWARD,
    variant: str = "sm80",
    splits: int = 0,
    sm_count: int = 108,
    max_shared_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``vdit_fast.attention`` of CPU tensors (bf16 or fp16) by an emulated kernel; returns out and lse.

    Args:
        variant: ``"sm80"``, ``"sm90a"`` or ``"automatic"``.
        splits: parts the keys of a work item are cut into; 0 lets the host entry choose.
        sm_count, max_shared_bytes: the GPU the host entry believes in.

    Raises:
        EmulatorError: with policy, seed, block and thread.
    """
    library = load("attention")
    for name, structure in (("attention_params", AttentionParams), ("forward_options", ForwardOptions)):
        size = getattr(library, f"vdit_emu_{name}_bytes")()
        assert size == ctypes.sizeof(structure), f"{name}: Python has {ctypes.sizeof(structure)} bytes, C++ {size}"
    batch, lq, heads, dim = q.shape
    out = torch.empty(batch, lq, heads, dim, dtype=q.dtype)
    lse = torch.empty(batch, heads, lq)
    params = attention_params(q, k, v, plan, scale, row_scale, kv_len, segments)
    hopper = variant != "sm80"
    shared = max_shared_bytes if max_shared_bytes is not None else (227 if hopper else 99) * 1024
    options = ForwardOptions(VARIANTS[variant], 90 if hopper else 80, sm_count, shared, splits)
    outputs = AttentionOutputs(out.data_ptr(), lse.data_ptr())
    run_policy = c_policy(policy)
    arguments = (ctypes.byref(x) for x in (params, outputs, run_policy, options))
    call(library.vdit_emu_attention, policy, *arguments)
    return out, lse
