"""The CMake switches. Only configures; nothing is compiled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("c++")), reason="needs cmake and a compiler"),
]


def configure(build: Path, *options: str, **environment: str) -> tuple[int, str]:
    command = ["cmake", "-S", str(ROOT), "-B", str(build), f"-DPython_EXECUTABLE={sys.executable}", *options]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300)
    return result.returncode, " ".join((result.stdout + result.stderr).split())  # CMake wraps its messages


@pytest.fixture
def no_nvcc(tmp_path: Path) -> dict[str, str]:
    """An environment whose only nvcc does not work, as a broken CUDA installation has it."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    return {"CUDACXX": str(nvcc)}


def test_cuda_off(tmp_path: Path) -> None:
    code, text = configure(tmp_path / "build", "-DVDIT_CUDA=OFF")
    assert code == 0, text
    assert "CUDA kernels OFF (VDIT_CUDA=OFF): CPU-only build" in text


def test_cuda_auto_without_nvcc(tmp_path: Path, no_nvcc: dict[str, str]) -> None:
    code, text = configure(tmp_path / "build", "-DVDIT_CUDA=AUTO", **no_nvcc)
    assert code == 0, text
    assert "CUDA kernels OFF (no working nvcc found; set CUDACXX or CUDA_HOME if there is one): CPU-only build" in text


def test_cuda_on_without_nvcc(tmp_path: Path, no_nvcc: dict[str, str]) -> None:
    code, text = configure(tmp_path / "build", "-DVDIT_CUDA=ON", **no_nvcc)
    assert code != 0
    assert "VDIT_CUDA=ON, but no working nvcc was found. Set CUDACXX" in text


def test_unknown_switch(tmp_path: Path) -> None:
    code, text = configure(tmp_path / "build", "-DVDIT_CUDA=maybe")
    assert code != 0
    assert "VDIT_CUDA is 'maybe'; it must be AUTO, ON or OFF" in text


def test_without_torch(tmp_path: Path) -> None:
    code, text = configure(tmp_path / "build", "-DVDIT_CUDA=OFF", VDIT_TORCH_DIR=str(tmp_path))
    assert code != 0
    assert "needs an installed torch >= 2.10" in text and "pip install --no-build-isolation ." in text


def test_with_an_old_torch(tmp_path: Path) -> None:
    header = tmp_path / "include" / "torch" / "csrc" / "stable" / "library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    (tmp_path / "version.py").write_text("__version__ = '2.9.1+cpu'\n")
    code, text = configure(tmp_path / "build", "-DVDIT_CUDA=OFF", VDIT_TORCH_DIR=str(tmp_path))
    assert code != 0
    assert "torch 2.9.1+cpu" in text and "older than 2.10" in text
