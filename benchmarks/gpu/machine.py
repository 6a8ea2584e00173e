"""Facts about the machine and the code under test. Reads settings of the GPU, never changes one."""

from __future__ import annotations

import hashlib
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CLOCKS = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "power_w": "power.draw",
    "temperature_c": "temperature.gpu",
    "utilisation_percent": "utilization.gpu",
}


def query(fields: tuple[str, ...]) -> list[str] | None:
    """``nvidia-smi --query-gpu`` of the first GPU; None where there is none."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return [part.strip() for part in done.stdout.strip().split(",")]


def clocks() -> dict[str, float] | None:
    """SM and memory clock, power, temperature and load now; what nvidia-smi does not know is left out."""
    values = query(tuple(CLOCKS.values()))
    if values is None or len(values) != len(CLOCKS):
        return None
    found = {}
    for name, value in zip(CLOCKS, values, strict=True):
        try:
            found[name] = float(value)
        except ValueError:
            continue  # [N/A]
    return found


def gpu() -> dict[str, str] | None:
    """Name, driver, memory, and the highest clocks of the GPU."""
    names = ("name", "driver_version", "memory.total", "clocks.max.sm", "clocks.max.memory", "power.limit")
    values = query(names)
    return dict(zip(names, values, strict=True)) if values and len(values) == len(names) else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


LIBRARY = ("csrc/arch", "csrc/kernels", "csrc/ops", "python/vdit_fast/ops", "python/vdit_fast/plan")


@cache
def code_hash(folders: tuple[str, ...] = LIBRARY, root: Path = ROOT) -> str:
    """One hash over the sources in these folders: by default those that decide what a call of the library does."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".h", ".cpp", ".cu", ".py"):
                digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def identity(device: str) -> dict[str, str | None]:
    """What must be equal for a stored result to count: code, GPU, torch."""
    found = gpu() if device == "cuda" else None
    return {"code": code_hash(), "device": found["name"] if found else device, "torch": _version("torch")}


def describe(device: str, command: str) -> dict[str, Any]:
    """Everything worth knowing about a run besides its results."""
    import torch

    from vdit_fast import report

    facts = report.environment()
    facts["command"] = command
    facts["nvidia_smi"] = gpu()
    facts["cudnn"] = torch.backends.cudnn.version() if device == "cuda" else None
    facts["triton"], facts["flashinfer"] = _version("triton"), _version("flashinfer-python")
    return facts


def alive(device: str) -> bool:
    """False once a kernel has broken this process's CUDA context."""
    import torch

    if device != "cuda":
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
