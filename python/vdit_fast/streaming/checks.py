"""Checks of a K/V cache's settings and inputs; every message names the argument, its value and the remedy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vdit_fast.caching.checks import count

__all__ = ["as_queries", "check_budget", "check_positions", "no_gradient"]


def no_gradient(**arguments: Any) -> None:
    if not torch.is_grad_enabled():
        return
    for name, t in arguments.items():
        if isinstance(t, Tensor) and t.requires_grad:
            raise RuntimeError(f"{name} records gradients, which a cache cannot hold; run under torch.no_grad()")


def as_queries(options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``qk_norm_rope`` for k, for a call that has no q: k takes its place."""
    unknown = [name for name in options if name.startswith("q_")]
    if unknown:
        raise ValueError(f"{', '.join(unknown)} belong to queries, and none are given; pass q, or leave them out")
    return {"q_" + name[2:] if name in ("k_weight", "k_bias") else name: value for name, value in options.items()}


def check_positions(store: str, positions: str, table: int | None, capacity: int) -> None:
    if table is not None:
        count("table", table, 1)
    if positions == "relative" and store == "post_rope":
        raise ValueError(
            'positions is "relative", which change as frames leave, but store is "post_rope", whose keys keep the '
            'position they were written at; use store="pre_rope"'
        )
    if positions == "cyclic" and table is None:
        raise ValueError('positions is "cyclic", but table is None; give the number of positions of the cycle')
    if positions != "absolute" and table is not None and capacity > table:
        raise ValueError(
            f"capacity is {capacity} frames, but the table has {table} positions and every frame held needs its own; "
            f"use at most {table}"
        )


def check_budget(
    needed: int, limit: int, shape: dict[str, int], store: str, dtype: torch.dtype, setting: str = "capacity"
) -> None:
    """Raise where the frames of a cache take more than ``limit`` bytes; users call their number ``setting``."""
    if needed <= limit:
        return
    frames = shape["capacity"]
    fits, tensors = limit // (needed // frames), 2 * shape["layers"] + (store == "pre_rope")
    remedy = f"{setting}={fits} fits" if fits else "not even one frame fits: smaller frames or a smaller batch"
    raise ValueError(
        f"max_bytes is {limit:,}, but keys and values of {frames} frames take {needed:,} bytes, {needed // frames:,} a "
        f"frame ({tensors} tensors of batch {shape['batch']} · {shape['page']} tokens · {shape['heads']} heads · "
        f"{shape['head_dim']} channels · {dtype.itemsize} bytes); {remedy}"
    )
