"""``--device`` and ``--dtype``: names to what torch understands, with ``auto``."""

from __future__ import annotations

import torch

from vdit_fast.models.kernels import missing_device_kernel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str) -> str:
    """``auto`` is the GPU if torch has one and this build has an attention kernel for it, else the CPU.

    Raises:
        ValueError: an unknown device, or cuda where there is none.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() and missing_device_kernel("cuda") is None else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise ValueError(f"device: {name!r} is not a device; use cpu, cuda or auto") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {name!r}, but this torch sees no GPU; use cpu")
    return name


def resolve_dtype(name: str, device: str) -> torch.dtype:
    """``auto`` is bf16 on a GPU and fp32 on a CPU.

    Raises:
        ValueError: an unknown dtype.
    """
    if name == "auto":
        return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise ValueError(f"dtype: {name!r} is unknown; use auto, {', '.join(DTYPES)}")
    return DTYPES[name]
