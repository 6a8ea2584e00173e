"""What ``doctor`` looks at: each function returns checks, worst first decides the verdict."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

OK, INFO, WARN, FAIL = "ok", "info", "warning", "failure"
EXIT_CODES = {OK: 0, INFO: 0, WARN: 1, FAIL: 2}
OLDEST_DIFFUSERS = (0, 35)


@dataclass(frozen=True)
class Check:
    """One line of the examination; ``remedy`` says what to do about a warning or a failure."""

    group: str
    name: str
    status: str
    detail: str
    remedy: str = ""
    value: Any = None


def verdict(checks: Sequence[Check]) -> tuple[int, str]:
    """Exit code (0 healthy, 1 degraded, 2 broken) and one line."""
    failures = [c for c in checks if c.status == FAIL]
    warnings = [c for c in checks if c.status == WARN]
    if failures:
        return 2, f"broken: {failures[0].name}: {failures[0].detail}" + _more(failures)
    if warnings:
        return 1, f"degraded: {warnings[0].name}: {warnings[0].detail}" + _more(warnings)
    return 0, "healthy: everything this machine can run is native and numerically sound"


def _more(found: Sequence[Check]) -> str:
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""


def versions() -> list[Check]:
    """Python, torch, the build."""
    from vdit_fast import build_info

    build = build_info()
    group = "versions"
    return [
        Check(group, "python", OK, f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Check(group, "torch", OK, f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"),
        Check(
            group,
            "vdit_fast",
            OK,
            f"{build['version']}, {build['build_type']} build, {build['compiler']}, torch ABI {build['torch_target']}",
            value=dict(build),
        ),
    ]


def hardware() -> list[Check]:
    """The CPU's instruction set, the GPUs, and whether the build has kernels for them."""
    from vdit_fast import _info, build_info

    build, probe = build_info(), _info.device_probe()
    group = "hardware"
    isas = list(build["cpu_isas"])
    best = isas[-1] if isas else "none"
    checks = [
        Check(
            group,
            "cpu",
            OK,
            f"kernels for {probe['cpu_isa']} are used (built: {', '.join(isas)}), "
            f"{torch.get_num_threads()} of {os.cpu_count()} threads",
            value={"isa": probe["cpu_isa"], "best_built": best, "threads": torch.get_num_threads()},
        )
    ]
    targets = list(build["cuda_targets"])
    for index, device in enumerate(probe["cuda_devices"]):
        name = f"gpu {index}"
        label = f"{device['name']} (sm_{device['capability'][0]}{device['capability'][1]})"
        if build["cuda"] is None:
            checks.append(
                Check(group, name, WARN, f"{label}: this build has no CUDA kernels", "build it where nvcc is found")
            )
        elif not torch.cuda.is_available():
            checks.append(
                Check(group, name, WARN, f"{label}: torch {torch.__version__} cannot use it", "install a CUDA torch")
            )
        else:
            status, how = gpu_target(tuple(device["capability"]), targets)
            remedy = "rebuild with this architecture in VDIT_CUDA_ARCHS" if status != OK else ""
            checks.append(Check(group, name, status, f"{label}: {how}", remedy))
    if not probe["cuda_devices"]:
        built = f"built for {' '.join(targets)} with CUDA {build['cuda']}" if build["cuda"] else "CPU-only build"
        checks.append(Check(group, "gpu", INFO, f"none ({probe['cuda_status']}); {built}"))
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count > 1:
        pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
        direct = sum(torch.cuda.can_device_access_peer(a, b) for a, b in pairs)
        checks.append(Check(group, "peer access", INFO, f"{direct} of {len(pairs)} GPU pairs"))
    return checks


def gpu_target(capability: tuple[int, ...], targets: Sequence[str]) -> tuple[str, str]:
    """Which of the targets (``90-real``, ``90a-real``, ``90-virtual``) serves a GPU: ``(status, words)``."""
    major, minor = capability[:2]
    number = 10 * major + minor
    real, virtual = [], []
    for target in targets:
        match = re.fullmatch(r"(?:sm_|compute_)?(\d+)([af]?)(?:-(real|virtual))?", target)
        if match is None:
            continue
        arch = int(match[1])
        if match[2]:  # an architecture-specific target runs on exactly that one
            if arch == number:
                real.append((arch + 0.5, target))
            continue
        if match[3] != "virtual" and arch // 10 == major and arch <= number:
            real.append((arch, target))
        if match[3] != "real" and arch <= number:
            virtual.append((arch, target))
    if real:
        return OK, f"native kernels, target {max(real)[1]}"
    if virtual:
        return (
            WARN,
            f"no native kernels: the driver compiles PTX {max(virtual)[1]} (slow first run, not the fastest code)",
        )
    return FAIL, f"sm_{number} is not served by the targets {' '.join(targets) or '(none)'}"


def kernels() -> list[Check]:
    """Which operators have compiled kernels, per device, and why not."""
    from vdit_fast import _info

    catalogue = _info.kernel_catalogue()
    checks = []
    for op in sorted({k["op"] for k in catalogue}):
        parts, value = [], {}
        for device in sorted({k["device"] for k in catalogue if k["op"] == op}):
            variants = [k for k in catalogue if k["op"] == op and k["device"] == device]
            compiled = [k for k in variants if k["compiled"]]
            dtypes = sorted({d for k in compiled for d in k["dtypes"]})
            reason = "built without CUDA" if device == "cuda" else "not built"
            parts.append(f"{device}: native ({', '.join(dtypes)})" if compiled else f"{device}: none, {reason}")
            value[device] = {"native": bool(compiled), "dtypes": dtypes, "reason": None if compiled else reason}
        missing_cpu = not value.get("cpu", {}).get("native", False)
        needs_gpu = torch.cuda.is_available() and not value.get("cuda", {}).get("native", False)
        status = WARN if missing_cpu or needs_gpu else OK
        remedy = "vdit_fast.reference has this operator in plain torch" if status == WARN else ""
        checks.append(Check("kernels", op, status, "; ".join(parts), remedy, value))
    if not checks:
        checks.append(Check("kernels", "catalogue", FAIL, "the build lists no kernels", "reinstall the package"))
    return checks


def numerics(seed: int = 0) -> list[Check]:
    """Compare attention, dense and block-sparse, with fp64; the yardstick is torch's own error in the same dtype."""
    from vdit_fast import attention, reference
    from vdit_fast.plan import AttentionPlan

    generator = torch.Generator().manual_seed(seed)
    length, heads, dim, block = 333, 2, 64, 64
    exact = [torch.randn(1, length, heads, dim, generator=generator, dtype=torch.float64) for _ in range(3)]
    mask = torch.rand(heads, -(-length // block), -(-length // block), generator=generator) < 0.5
    mask.diagonal(dim1=1, dim2=2).fill_(True)
    plan = AttentionPlan.from_block_mask(mask, block, block, lq=length, lk=length)
    bools = plan.to_mask()
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    checks = []
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16):
            q, k, v = (x.to(device, dtype) for x in exact)
            q64, k64, v64 = (x.double().cpu() for x in (q, k, v))
            worst, detail = 0.0, []
            name = f"{device} {str(dtype).removeprefix('torch.')}"
            try:
                for label, chosen, allowed in (("dense", None, None), ("sparse", plan.to(device), bools)):
                    truth: Any = reference.attention(q64, k64, v64, None if chosen is None else plan)
                    answer: Any = attention(q, k, v, chosen)
                    error = _error(answer, truth)
                    yard = _error(_torch_attention(q, k, v, allowed), truth)
                    worst = max(worst, error / max(yard, torch.finfo(dtype).eps / 8))
                    detail.append(f"{label} {error:.1e} (torch {yard:.1e})")
            except Exception as error:  # a broken kernel must become a line, whatever it raises
                checks.append(Check("numerics", name, FAIL, f"{type(error).__name__}: {' '.join(str(error).split())}"))
                continue
            status = OK if worst <= 2 else FAIL
            checks.append(Check("numerics", name, status, "largest error: " + ", ".join(detail), value=worst))
    return checks


def _error(out: torch.Tensor, truth: torch.Tensor) -> float:
    return (out.double().cpu() - truth).abs().max().item()


def _torch_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None if mask is None else mask.to(q.device)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def speed() -> list[Check]:
    """A second of copying and of matrix products: is the machine as fast as it should be?"""
    checks = []
    for device in ["cpu"] + (["cuda"] if torch.cuda.is_available() else []):
        size, side, dtype = (2**24, 1024, torch.float32) if device == "cpu" else (2**28, 8192, torch.bfloat16)
        source = torch.ones(size, dtype=torch.float32, device=device)
        target = torch.empty_like(source)
        copy = 2 * 4 * size / _median(lambda a=target, b=source: a.copy_(b), device) / 1e9  # type: ignore[misc]
        a = torch.randn(side, side, device=device).to(dtype)
        product = 2 * side**3 / _median(lambda a=a: a @ a, device) / 1e12  # type: ignore[misc]
        what = str(dtype).removeprefix("torch.")
        detail = f"copy {copy:.3g} GB/s, {what} matrix product {product:.3g} TFLOP/s"
        checks.append(Check("speed", device, INFO, detail, value={"copy_gb_s": copy, "matmul_tflop_s": product}))
        del source, target, a
    return checks


def _median(call: Callable[[], Any], device: str, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def packages() -> list[Check]:
    """Optional packages: which features they switch on, and whether they import."""
    wanted = {
        "diffusers": "accelerate(pipeline), demo, generate",
        "transformers": "generate",
        "peft": "LoRA",
        "accelerate": "offloading",
        "matplotlib": "pictures",
        "av": "video files",
        "PIL": "labels in videos",
        "yaml": "YAML configs",
        "triton": "torch.compile on GPUs",
    }
    checks = [_package(name, use) for name, use in wanted.items()]
    for name in ("torchvision", "flash_attn", "sageattention"):
        found = _package(name, "not needed")
        if found.value is not None or found.status == WARN:
            checks.append(found)
    return checks


def _package(name: str, use: str) -> Check:
    distribution = {"PIL": "pillow", "yaml": "pyyaml", "flash_attn": "flash-attn"}.get(name, name)
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return Check("packages", name, INFO, f"not installed ({use})")
    try:
        importlib.import_module(name)
    except Exception as error:  # a torchvision for another torch raises RuntimeError at import
        detail = f"{version} is installed but does not import: {' '.join(str(error).split())}"
        return Check("packages", name, WARN, detail, f"reinstall {distribution} for this torch, or remove it", version)
    if name == "diffusers" and tuple(int(x) for x in re.findall(r"\d+", version)[:2]) < OLDEST_DIFFUSERS:
        least = ".".join(map(str, OLDEST_DIFFUSERS))
        remedy = f"pip install 'diffusers>={least}'"
        return Check("packages", name, WARN, f"{version} is older than {least}", remedy, version)
    return Check("packages", name, OK, f"{version} ({use})", value=version)


def hazards() -> list[Check]:
    """Things in this process or its environment that change answers or speed."""
    checks = []
    if torch.nn.functional.scaled_dot_product_attention is not torch._C._nn.scaled_dot_product_attention:
        detail = "torch's scaled_dot_product_attention is patched"
        checks.append(Check("hazards", "SDPA", WARN, detail, "find the package that does it"))
    if chosen := os.environ.get("DIFFUSERS_ATTN_BACKEND"):
        detail = f"DIFFUSERS_ATTN_BACKEND={chosen} changes every stock attention, also the dense baseline"
        checks.append(Check("hazards", "diffusers backend", WARN, detail, "unset it"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if torch.get_num_threads() > cores:
        detail = f"torch uses {torch.get_num_threads()} threads on {cores} cores"
        checks.append(Check("hazards", "threads", WARN, detail, f"set OMP_NUM_THREADS={cores}"))
    if torch.are_deterministic_algorithms_enabled():
        detail = "deterministic algorithms are on: some torch operators are slow"
        checks.append(Check("hazards", "determinism", INFO, detail))
    if torch.get_default_dtype() != torch.float32:
        detail = f"it is {torch.get_default_dtype()}, and models load in it"
        checks.append(Check("hazards", "default dtype", WARN, detail, "set it back to float32"))
    return checks or [Check("hazards", "process", OK, "none found")]
