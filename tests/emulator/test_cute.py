"""CuTe's layouts, an independent implementation, agree with the emulator about descriptors, swizzles and fragments.

Needs the headers of CUTLASS (``pip install nvidia-cutlass``, or VDIT_CUTLASS_INCLUDE) and of CUDA (CUDA_HOME, or nvcc).
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
from pathlib import Path

import pytest

import emulator
from emulator import LAZY_FORWARD, Policy


def cutlass_include() -> Path | None:
    spec = importlib.util.find_spec("cutlass_library")
    roots = [Path(p) / "source" / "include" for p in (spec.submodule_search_locations or [])] if spec else []
    if "VDIT_CUTLASS_INCLUDE" in os.environ:
        roots.insert(0, Path(os.environ["VDIT_CUTLASS_INCLUDE"]))
    return next((r for r in roots if (r / "cute" / "tensor.hpp").exists()), None)


def cuda_include() -> Path | None:
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", nvcc and Path(nvcc).resolve().parents[1]]
    folders = [Path(home) / "include" for home in homes if home]
    return next((f for f in folders if (f / "cuda_runtime_api.h").exists()), None)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    cutlass, cuda = cutlass_include(), cuda_include()
    if cutlass is None:
        pytest.skip("no CUTLASS headers: pip install nvidia-cutlass, or set VDIT_CUTLASS_INCLUDE")
    if cuda is None:
        pytest.skip("no CUDA headers: set CUDA_HOME")
    folders = [cutlass, cuda, *(p for p in [cuda / "cccl"] if p.exists())]
    path = emulator.build("cute", "-DEMU_CUTE_INCLUDE=" + ";".join(map(str, folders)))
    return ctypes.CDLL(str(path))


def compare(library: ctypes.CDLL, index: int, policy: Policy) -> tuple[str, float] | None:
    name, worst, c_policy = ctypes.c_char_p(), ctypes.c_double(float("nan")), emulator.c_policy(policy)
    error = ctypes.create_string_buffer(4096)
    pointers = (ctypes.byref(x) for x in (name, worst, c_policy))
    code = library.vdit_emu_cute(index, *pointers, error, ctypes.c_size_t(len(error)))
    assert code in (0, 2), f"{name.value!r}: {error.value.decode()}"
    return None if code == 2 else ((name.value or b"").decode(), worst.value)


@pytest.mark.slow  # compiling CuTe takes half a minute
@pytest.mark.parametrize("policy", [LAZY_FORWARD, Policy("eager", emulator.EAGER)], ids=str)
def test_layouts_agree_with_cute(library: ctypes.CDLL, policy: Policy) -> None:
    index = 0
    while (result := compare(library, index, policy)) is not None:
        name, worst = result
        assert worst < 1e-3, f"{name}: off by {worst}"  # an error of a layout is of the size of the numbers, 1
        index += 1
    assert index == 13
