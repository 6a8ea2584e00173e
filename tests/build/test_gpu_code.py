"""Gates on the compiled CUDA kernels: no local memory, the right instructions, registers as recorded."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import vdit_fast

sys.path.insert(0, str(Path(__file__).parent))

import gpu_code  # the path is set above
from gpu_code import ROOT, Kernel

HAS_CUDA = vdit_fast.build_info()["cuda"] is not None
TOOLS = [name for name in ("cuobjdump", "nvdisasm") if gpu_code.find_tool(name) is None]
TOOLS += [] if shutil.which("c++filt") else ["c++filt"]

cuda_build = pytest.mark.skipif(not HAS_CUDA, reason="a CPU-only build has no CUDA kernels")
needs_tools = pytest.mark.skipif(
    bool(TOOLS), reason=f"needs {', '.join(TOOLS)} (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm; binutils)"
)
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


@pytest.fixture(scope="module")
def kernels(request: pytest.FixtureRequest) -> list[Kernel]:
    """Kernels of the installed library, with the instructions of the bf16 ones for its oldest GPUs and for Hopper.

    The fp16 kernels are the same but for one letter. Disassembling takes many seconds, so the result is kept in
    pytest's cache for as long as the library is the same.
    """
    sources = (gpu_code.library(), Path(gpu_code.__file__))
    key = hashlib.sha256(b"".join(f.read_bytes() for f in sources)).hexdigest()
    if cached := request.config.cache.get("vdit/gpu_code", {}).get(key):
        return [Kernel(**{**fields, "counts": Counter(fields["counts"])}) for fields in cached]
    found = gpu_code.read_kernels(gpu_code.library(), sass=("sm_80", "sm_90a"), name="BF16")
    request.config.cache.set("vdit/gpu_code", {key: [{**vars(k), "counts": dict(k.counts)} for k in found]})
    return found


def attention(kernels: list[Kernel], arch: str) -> list[Kernel]:
    found = [k for k in kernels if k.arch == arch and gpu_code.is_attention(k) and "BF16" in k.name]
    if not found and arch not in {k.arch for k in kernels}:
        pytest.skip(f"this build has no code for {arch}")
    assert found, f"no attention kernel among {[str(k) for k in kernels if k.arch == arch]}"
    return found


@cuda_build
@needs_tools
def test_no_kernel_uses_local_memory(kernels: list[Kernel]) -> None:
    assert kernels
    assert gpu_code.local_memory(kernels) == []


@cuda_build
@needs_tools
def test_portable_attention_runs_on_tensor_cores(kernels: list[Kernel]) -> None:
    assert gpu_code.portable_instructions(attention(kernels, "sm_80")) == []


@cuda_build
@needs_tools
def test_hopper_attention_keeps_wgmma_in_flight(kernels: list[Kernel]) -> None:
    assert gpu_code.hopper_instructions(attention(kernels, "sm_90a")) == []


@cuda_build
def test_the_compiler_has_no_performance_message() -> None:
    printed = gpu_code.compiler_output()
    if not printed:
        pytest.skip("what nvcc printed is kept for builds in this checkout only")
    assert gpu_code.compiler_messages(printed) == []


@cuda_build
@needs_tools
def test_registers_are_as_recorded(kernels: list[Kernel]) -> None:
    recorded = json.loads(gpu_code.RECORD.read_text())
    version = vdit_fast.build_info()["cuda"]
    if not version.startswith(recorded["nvcc"] + "."):
        pytest.skip(f"recorded with nvcc {recorded['nvcc']}, built with {version}")
    changes = gpu_code.register_changes(kernels, recorded["registers"])
    assert changes == [], f"if this is meant: {gpu_code.UPDATE}"


def test_library_stays_small() -> None:
    files = [gpu_code.library(), Path(vdit_fast._info.__file__)]
    assert sum(f.stat().st_size for f in files) <= 20e6


# ---- the gates themselves

PLANTED = """
#include "arch/arch.h"
// An array that is indexed at run time lies in local memory.
VD_KERNEL(32, 1) stack(float* io, int i) {
  float v[64];
  for (int k = 0; k < 64; ++k) v[k] = io[k * 32 + threadIdx.x];
  v[i & 63] = 2.0f;
  io[threadIdx.x] = v[(i * 7) & 63] + v[(i * 11) & 63];
}
// The accumulator is touched before the wait, and every instruction is a batch of its own.
VD_KERNEL(128, 1) forward_serial(float* io, uint64_t a, uint64_t b) {
  float d[32];
  for (int i = 0; i < 32; ++i) d[i] = io[threadIdx.x * 32 + i];
  for (int k = 0; k < 4; ++k) {
    arch::wgmma_fence();
    arch::wgmma_ss<arch::BF16, 0, 0>(d, a + k, b + k, 1);
    arch::wgmma_commit();
    d[3] += 1.0f;
    arch::wgmma_wait<0>();
  }
  for (int i = 0; i < 32; ++i) io[threadIdx.x * 32 + i] = d[i];
}
"""


@pytest.mark.slow
@needs_nvcc
@needs_tools
def test_planted_kernels_are_found(tmp_path: Path) -> None:
    source, target = tmp_path / "planted.cu", tmp_path / "planted.o"
    source.write_text(PLANTED)
    command = ["nvcc", "-std=c++17", "-I", str(ROOT / "csrc"), "--expt-relaxed-constexpr"]
    command += ["-gencode", "arch=compute_90a,code=sm_90a", "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = {k.name: k for k in gpu_code.read_kernels(target, sass=("sm_90a",))}
    assert set(found) == {"stack", "forward_serial"}
    (line,) = gpu_code.local_memory(list(found.values()))
    assert line.startswith("stack (sm_90a): stack frame 256")
    text = "\n".join(gpu_code.hopper_instructions([found["forward_serial"]]))
    assert "no USETMAXREG, UTMALDG or LDGSTS" in text
    assert "4 batches for 4 HGMMA, so wgmma is serialised" in text
    assert len(gpu_code.portable_instructions([found["stack"]])) == 1
    assert "C7517" in gpu_code.compiler_messages({"planted": done.stdout + done.stderr})[0]


def test_injected_waits_are_found() -> None:
    counts = {"HGMMA": 16, "gsb0": 2, "USETMAXREG": 2, "LDGSTS": 1, "WARPGROUP.ARRIVE": 2, "WARPGROUP.DEPBAR": 2}
    kernel = Kernel("sm_90a", "forward", counts=Counter(counts))
    assert gpu_code.hopper_instructions([kernel]) == []
    kernel.counts["WARPGROUP.DEPBAR"] = 3
    assert gpu_code.hopper_instructions([kernel]) == ["forward (sm_90a): 3 waits for 2 batches, so waits were injected"]


def test_register_changes_are_named() -> None:
    recorded = {"sm_80": {"kept": 100, "grown": 100, "gone": 20}, "sm_90": {"other": 7}}
    now = [Kernel("sm_80", "kept", 108), Kernel("sm_80", "grown", 109), Kernel("sm_80", "added", 30)]
    assert gpu_code.register_changes(now, recorded) == [
        "sm_80 added: new, 30 registers",
        "sm_80 gone: gone",
        "sm_80 grown: 100 -> 109 registers",
    ]
