"""Frequencies and cos/sin tables of rotary position embeddings (RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["frequencies", "rope_tables", "take_rows"]

LAYOUTS = ("interleaved", "half", "compact")


def check_axis(width: int, theta: float) -> None:
    """Raise when an axis cannot have frequencies."""
    if isinstance(width, bool) or not isinstance(width, int):
        raise TypeError(f"width must be an even integer, got {width!r}")
    if width < 0 or width % 2:
        raise ValueError(f"width must be even and at least 0, got {width}: RoPE turns pairs of channels")
    if not (math.isfinite(theta) and theta > 0):
        raise ValueError(f"theta must be a finite number above 0, got {theta!r}")


def frequencies(
    width: int, theta: float = 10000.0, *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
) -> Tensor:
    """One axis' angles per unit of position: theta ** (-2 i / width).

    Args:
        width: channels of the head that the axis turns, even.
        theta: the base.
        dtype: precision of the angles in ``rope_tables``. Wan computes them in float64, HunyuanVideo and CogVideoX in
            float32, whose last bits differ.

    Returns:
        [width // 2] in ``dtype``, falling from 1.
    """
    check_axis(width, theta)
    return 1.0 / theta ** (torch.arange(0, width, 2, dtype=dtype, device=device) / max(width, 1))


def rope_tables(ids: Tensor, axes: Sequence[Tensor], layout: str = "interleaved") -> tuple[Tensor, Tensor]:
    """cos and sin of every token's angles, axis after axis.

    Args:
        ids: [..., N, A] positions, integers or real numbers. Position 0 is the identity.
        axes: one tensor of frequencies [w_a // 2] for each of the A axes, as ``frequencies`` or ``scaling`` make them.
            Angles are computed in their dtype; an axis that turns no channel has an empty one.
        layout: how channels pair up. "interleaved": neighbours, every value twice (Wan, HunyuanVideo, CogVideoX);
            "half": channel c with c + D/2, the values followed by themselves (Cosmos); "compact": every value once
            (Mochi, LTX-2).

    Returns:
        float32 cos and sin, [..., N, D] with D the sum of the w_a, or [..., N, D // 2] for "compact".

    Raises:
        ValueError: the number of axes does not fit the ids, or the layout is unknown.
        TypeError: frequencies are not floating point.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}")
    if ids.dim() < 2 or ids.shape[-1] != len(axes):
        raise ValueError(f"ids {tuple(ids.shape)} must be [..., N, {len(axes)}]: {len(axes)} axes have frequencies")
    for axis, steps in enumerate(axes):
        if not steps.is_floating_point() or steps.dim() != 1:
            raise TypeError(f"axes[{axis}] must be a floating-point vector, got {steps.dtype} {tuple(steps.shape)}")
    angles = torch.cat(
        [ids[..., axis, None].to(steps.dtype) * steps.to(ids.device) for axis, steps in enumerate(axes)], dim=-1
    )
    cos, sin = angles.cos().float(), angles.sin().float()
    if layout == "interleaved":
        return cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)
    if layout == "half":
        return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)
    return cos, sin


def take_rows(tables: tuple[Tensor, Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
    """Tables in which token n has the position of token ``rows[n]``.

    Args:
        tables: cos and sin with one dimension of N tokens, wherever the model has it ([N, D], [1, N, 1, D], ...).
        rows: int [N].

    Raises:
        ValueError: no dimension, or more than one, has N entries.
    """
    cos, sin = tables
    dims = [dim for dim, size in enumerate(cos.shape[:-1]) if size == len(rows)]
    if len(dims) != 1:
        raise ValueError(
            f"rows has {len(rows):,} tokens, and {len(dims)} dimensions of the tables {tuple(cos.shape)} have as many; "
            "expected one"
        )
    rows = rows.to(cos.device)
    return cos.index_select(dims[0], rows), sin.index_select(dims[0], rows)
