"""Section "primitives": every wrapper of csrc/arch on the GPU, with the tests that its emulated twin passes."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .machine import ROOT

if TYPE_CHECKING:
    from torch import Tensor

BUFFERS, NUMBERS = 4, 16
TESTS = "tests/emulator/test_primitives.py"
HOST_ONLY = "counters or generated or assemble"  # about the emulator or the sources


def command(target: Path) -> list[str]:
    """The nvcc call that builds the probes for Hopper."""
    source = Path(__file__).with_name("primitives.cu")
    flags = ["-O2", "-std=c++17", "--expt-relaxed-constexpr", "-I", str(ROOT / "csrc")]
    code = ["-gencode", "arch=compute_90a,code=sm_90a", "-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    return ["nvcc", *flags, *code, str(source), "-o", str(target)]


def build(folder: Path, seconds: float) -> tuple[Path | None, str]:
    """The library and what nvcc printed; None where it could not be built."""
    if shutil.which("nvcc") is None:
        return None, "no nvcc on PATH"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "libvdit_primitives.so"
    try:
        done = subprocess.run(command(target), capture_output=True, text=True, timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        return None, f"nvcc took more than {seconds:.0f} s"
    printed = (done.stdout + done.stderr)[-4000:]
    return (target if done.returncode == 0 else None), printed


@cache
def _library() -> Any:
    return ctypes.CDLL(os.environ["VDIT_PRIMITIVES"])


def run_case(
    name: str,
    inputs: Sequence[Tensor] = (),
    outputs: Sequence[Tensor] = (),
    numbers: Sequence[int] = (),
    policy: object = None,
) -> None:
    """Stands in for ``emulator.run_case``: the same arguments, run by the GPU."""
    arguments: list[object] = [name.encode()]
    for tensors in (inputs, outputs):
        assert len(tensors) <= BUFFERS and all(t.is_contiguous() and t.device.type == "cpu" for t in tensors)
        pointers = [t.data_ptr() for t in tensors] + [None] * (BUFFERS - len(tensors))
        sizes = [t.numel() * t.element_size() for t in tensors] + [0] * (BUFFERS - len(tensors))
        arguments += [(ctypes.c_void_p * BUFFERS)(*pointers), (ctypes.c_size_t * BUFFERS)(*sizes)]
    error = ctypes.create_string_buffer(1024)
    arguments += [(ctypes.c_int64 * NUMBERS)(*numbers), error, ctypes.c_size_t(len(error))]
    if _library().vdit_gpu_case(*arguments) != 0:
        raise RuntimeError(error.value.decode())
