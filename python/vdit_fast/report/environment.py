"""Where a number was measured: written into every report file."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("numpy", "diffusers", "transformers", "triton", "peft")
# subsets first: the last name found is the widest instruction set
X86_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def _cpu_facts() -> tuple[str, str]:
    """(model name, instruction set) of the processor, from /proc/cpuinfo where there is one."""
    model, flags = platform.processor() or platform.machine() or "unknown", ""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            model = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags = value
            break
    found = [name for name in X86_SETS if name in flags.split()]
    return model, " ".join([platform.machine(), *found])


def _cores() -> int:
    """Cores this process may use (its affinity), not those of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "driver": _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
    }


def _command(*words: str, cwd: Path | None = None) -> str | None:
    try:
        done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _git() -> dict[str, Any] | None:
    """Commit of the checkout this package lies in; None for an installed wheel (or another project's checkout)."""
    here = Path(__file__).resolve().parent
    root = _command("git", "rev-parse", "--show-toplevel", cwd=here)
    if root is None or not (Path(root) / "python" / "vdit_fast").is_dir():
        return None
    commit = _command("git", "rev-parse", "HEAD", cwd=here)
    if commit is None:
        return None
    return {"commit": commit, "modified": _command("git", "status", "--porcelain", "-uno", cwd=here) is not None}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _build_info() -> dict[str, Any] | None:
    """What the compiled library says of itself; None while it cannot be imported or says nothing."""
    module = sys.modules.get("vdit_fast")
    build_info = getattr(module, "build_info", None)
    if not callable(build_info):
        return None
    info = build_info()
    return dict(info) if isinstance(info, dict) else {"text": str(info)}


def environment() -> dict[str, Any]:
    """Date (UTC), versions, processor, threads, instruction set, GPU and commit, as plain JSON types.

    Holds no path, host name or user name. Missing facts are None.
    """
    model, isa = _cpu_facts()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "vdit_fast": _version("vdit-fast"),
        "build": _build_info(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "cpu": {"model": model, "isa": isa, "cores": _cores(), "torch_threads": torch.get_num_threads()},
        "gpu": _gpu(),
        "git": _git(),
    }
