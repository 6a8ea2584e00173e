"""Plans as ``.npz`` files."""

from __future__ import annotations

import os
import zipfile
import zlib
from typing import Any

import numpy as np
import torch

from .plan import AttentionPlan

FORMAT = "vdit_fast.AttentionPlan"
VERSION = 1
TENSORS = ("tiles", "run_ptr", "runs", "mask_bits", "q_order", "kv_order")


def save_plan(plan: AttentionPlan, path: str | os.PathLike[str]) -> None:
    """Write ``plan`` to ``path``: format tag, version, logical shape, segments and the tensors that are set."""
    if plan.stand_ins is not None:
        raise ValueError("a plan with stand-ins has no file form; build it again with compensate=True where it is used")
    arrays: dict[str, Any] = {
        name: t.cpu().numpy() for name, t in zip(TENSORS, plan.op_args(), strict=True) if t is not None
    }
    with open(path, "wb") as file:
        np.savez_compressed(
            file,
            format=np.array(FORMAT),
            version=np.array(VERSION),
            shape=np.array(plan.shape, dtype=np.int64),
            segments=np.array(plan.segments, dtype=np.int64),
            **arrays,
        )


def load_plan(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> AttentionPlan:
    """Read a plan and validate it. ValueError: not a plan, of a newer version, or damaged. OSError: cannot be read."""
    name = os.fspath(path)
    not_a_plan = f"{name} is not a plan file; write one with AttentionPlan.save"
    try:
        with np.load(path, allow_pickle=False) as file:
            data = {key: file[key] for key in file.files}
    except (ValueError, EOFError, KeyError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(not_a_plan) from error
    if str(data.get("format")) != FORMAT or not {"version", "shape", "segments", *TENSORS[:3]} <= set(data):
        raise ValueError(not_a_plan)
    if data["version"].tolist() != VERSION:
        raise ValueError(
            f"{name} has plan format version {data['version'].tolist()}, but this package reads {VERSION}; "
            "save the plan again"
        )
    try:
        batch, heads, lq, lk = (int(n) for n in data["shape"])
        segments = tuple(int(n) for n in data["segments"])
        tensors: dict[str, Any] = {key: torch.from_numpy(data[key]) for key in TENSORS if key in data}
        plan = AttentionPlan(batch, heads, lq, lk, **tensors, segments=segments).validate()
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} is damaged: {error}") from error
    return plan.to(device)
