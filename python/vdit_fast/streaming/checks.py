"""Checks of a K/V cache's settings and inputs; every message names the argument, its value and the remedy."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from vdit_fast.caching.checks import count

__all__ = [
    "as_queries",
    "check_budget",
    "check_fits",
    "check_positions",
    "check_rows",
    "check_sizes",
    "no_gradient",
]


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


def check_sizes(shape: dict[str, int], sinks: int, dtype: torch.dtype) -> None:
    for name, value in shape.items():
        count(name, value, 1)
    count("sinks", sinks, 0)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype is {dtype}; keys and values are float32, bfloat16 or float16")
    if sinks >= shape["capacity"]:
        raise ValueError(
            f"sinks is {sinks} of a capacity of {shape['capacity']} frames; leave room for at least one other"
        )


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
    if needed > limit:
        raise ValueError(f"max_bytes is {limit:,}, but {_too_many(needed, limit, shape, store, dtype, setting)}")


def check_fits(
    needed: int,
    caches: int,
    shape: dict[str, int],
    store: str,
    dtype: torch.dtype,
    device: torch.device,
    setting: str = "capacity",
) -> None:
    """Raise where the frames of so many caches take more than all the memory of a device."""
    whole = _device_bytes(device)
    if whole is None or caches * needed <= whole:
        return
    each = f" for {caches} branches of guidance" if caches > 1 else ""
    words = _too_many(needed, whole // caches, shape, store, dtype, setting)
    raise ValueError(f"{device} has {whole:,} bytes of memory altogether{each}, but {words}")


def _too_many(needed: int, limit: int, shape: dict[str, int], store: str, dtype: torch.dtype, setting: str) -> str:
    frames = shape["capacity"]
    fits, tensors = limit // (needed // frames), 2 * shape["layers"] + (store == "pre_rope")
    remedy = f"{setting}={fits} fits" if fits else "not even one frame fits: smaller frames or a smaller batch"
    return (
        f"keys and values of {frames} frames take {needed:,} bytes, {needed // frames:,} a frame ({tensors} tensors of "
        f"batch {shape['batch']} · {shape['page']} tokens · {shape['heads']} heads · {shape['head_dim']} channels · "
        f"{dtype.itemsize} bytes); {remedy}"
    )


def _device_bytes(device: torch.device) -> int | None:
    """Memory that a device has, in use or not; None where nobody knows."""
    if device.type == "cuda" and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if device.type == "cpu" else None
    except (AttributeError, ValueError, OSError):  # a system that does not say
        return None


def check_rows(k: Tensor, v: Tensor, shape: tuple[int, ...], held: Tensor, why: str) -> None:
    """Raise where keys and values [batch, tokens, heads, head_dim] are not what the cache ``held`` can take.

    Args:
        shape: that they must have.
        why: where its number of tokens comes from.
    """
    for name, t in (("k", k), ("v", v)):
        if tuple(t.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(t.shape)}; expected [batch, tokens, heads, head_dim] = {shape}: {why}"
            )
        if t.dtype != held.dtype or t.device != held.device:
            raise ValueError(
                f"{name} is {t.dtype} on {t.device}, but the cache is {held.dtype} on {held.device}; make the cache in "
                "the model's dtype and on its device"
            )
    no_gradient(k=k, v=v)
