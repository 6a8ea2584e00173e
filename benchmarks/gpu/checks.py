"""Sections "primitives", "tests" and "sanitizer": is the code right on this GPU?"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from . import primitives
from .machine import ROOT
from .pytest_runs import run_tests, verdict
from .supervise import Journal, tail, watch

Outcome = tuple[str, str | None, dict[str, Any] | None]  # status, reason, result
NO_GPU: Outcome = ("skipped", "needs a CUDA device", None)
TOOLS = ("memcheck", "synccheck", "racecheck")
FOUND = 9  # exit code of compute-sanitizer when it has something to report


def run_primitives(folder: Path, device: str, seconds: float) -> Outcome:
    """Build the probes with nvcc and run the primitives' tests on them."""
    if device != "cuda":
        return NO_GPU
    start = time.monotonic()
    library, printed = primitives.build(folder / "logs", seconds)
    if library is None:
        missing = printed.startswith("no nvcc")
        return ("skipped" if missing else "failed"), f"the probes were not built: {printed[-600:]}", None
    result = run_tests(
        [primitives.TESTS, "-k", f"not ({primitives.HOST_ONLY})"],
        folder / "logs",
        "primitives",
        seconds=seconds - (time.monotonic() - start),
        test_limit=30,
        env={"VDIT_PRIMITIVES": str(library)},
    )
    return *verdict(result), {**result, "nvcc": printed}


def run_gpu_tests(folder: Path, device: str, seconds: float) -> Outcome:
    """The tests marked gpu."""
    if device != "cuda":
        return NO_GPU
    result = run_tests(
        [*map(str, gpu_test_files()), "-m", "gpu and not slow"],
        folder / "logs",
        "tests",
        seconds=seconds,
        test_limit=90,
    )
    return *verdict(result), result


def gpu_test_files() -> list[Path]:
    """Test files with such tests: the others may need packages that are not on this machine."""
    files = sorted((ROOT / "tests").glob("*/test_*.py"))
    return [f.relative_to(ROOT) for f in files if "gpu_suite" not in f.parts and "pytest.mark.gpu" in f.read_text()]


def run_sanitizer(folder: Path, device: str, seconds: float, tool: str) -> Outcome:
    """The kernels of this library on small problems under compute-sanitizer."""
    if device != "cuda":
        return NO_GPU
    program = shutil.which("compute-sanitizer")
    if program is None:
        return "skipped", "compute-sanitizer is not on PATH", None
    log, journal = folder / "logs" / f"{tool}.log", Journal(folder / "logs" / f"{tool}.journal")
    log.unlink(missing_ok=True)
    journal.clear()
    command = [program, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20", *_only_ours(program)]
    command += [sys.executable, "-m", "benchmarks.gpu.sanitize", "--seconds", f"{0.5 * seconds:.0f}"]
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # an access past a tensor is one past its allocation
    ended = watch(command, journal, seconds=seconds, log=log, env=env)
    return read_sanitizer(log, ended.how, ended.code)


def _only_ours(program: str) -> list[str]:
    """The option that limits the tool to this library's kernels; its name changed between versions."""
    done = subprocess.run([program, "--help"], capture_output=True, text=True, timeout=60)
    for option in ("--kernel-name", "--kernel-regex", "--filter"):
        if re.search(rf"{option}\b(?!-)", done.stdout):
            return [option, "kns=vdit"]
    return []


def read_sanitizer(log: Path, how: str, code: int | None) -> Outcome:
    """What a run of compute-sanitizer says."""
    text = log.read_text(errors="replace") if log.is_file() else ""
    lines = text.splitlines()
    cases = next((json.loads(line) for line in reversed(lines) if line.startswith('{"cases"')), None)
    result = {
        "cases": cases,
        "summary": [line.lstrip("= ") for line in lines if "SUMMARY" in line],
        "findings": [line for line in lines if line.startswith("=========")][:60],
        "log": tail(log, 15),
    }
    if "not supported" in text and cases is None:
        return "skipped", "the tool does not support this device or driver", result
    if how == "budget":
        return "skipped", "budget: it did not end in time", result
    if code == FOUND:
        return "failed", (result["summary"] or ["it reports errors"])[-1], result
    if code != 0 or cases is None:
        return "failed", f"it ended with exit code {code}", result
    return "ok", None, result
