"""QK norm and RoPE, with the rounding points of the models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NORMS = ("none", "rms", "rms_across", "layer")


def rotation_partner(rotary: int, axes: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Per rotated channel: the other channel of its pair, and whether it is the first of the two."""
    channel = torch.arange(rotary, device=device)
    if not axes:
        return channel ^ 1, channel % 2 == 0
    partner, first, start = channel.clone(), torch.zeros_like(channel, dtype=torch.bool), 0
    for width in axes:
        here, half = slice(start, start + width), width // 2
        partner[here] = start + torch.arange(width, device=device).roll(half)
        first[start : start + half] = True
        start += width
    return partner, first


def spread_table(table: Tensor, rotary: int, axes: Sequence[int]) -> Tensor:
    """A table with one value per pair, as one with a value per channel; a table of the latter kind as it is."""
    if table.shape[-1] == rotary:
        return table
    if not axes:
        return table.repeat_interleave(2, -1)
    return torch.cat([part for t in table.split([w // 2 for w in axes], -1) for part in (t, t)], -1)


def qk_norm(
    x: Tensor,
    norm: str,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    rounding: str = "fast",
    round_before_weight: bool = False,
    relu: bool = False,
) -> Tensor:
    """The norm of one tensor ``[B, N, H, D]``, in fp32 (fp64 stays fp64), rounded as the arguments say."""
    wide = torch.promote_types(x.dtype, torch.float32)
    shape = x.shape
    y = x.to(wide)

    def rounded(t: Tensor) -> Tensor:
        return t.to(x.dtype).to(wide)

    if norm == "rms_across":
        y = y.flatten(2)
    if norm in ("rms", "rms_across"):
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    elif norm == "layer":
        y = y - y.mean(-1, keepdim=True)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    eager = rounding == "eager" and norm != "none"
    each = eager and round_before_weight and (weight is None or weight.dtype == x.dtype)
    steps = [y]
    if weight is not None:
        steps.append(weight.to(wide))
    if bias is not None:
        steps.append(bias.to(wide))
    y = rounded(y) if each else y
    for index, step in enumerate(steps[1:]):
        y = y * step if index == 0 else y + step
        y = rounded(y) if each else y
    if eager and not round_before_weight:
        y = rounded(y)
    y = y.view(shape)
    return y.relu() if relu else y


def rotate(
    y: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    rotary: int,
    axes: Sequence[int] = (),
    positions: Tensor | None = None,
    start: int = 0,
    round_products: torch.dtype | None = None,
) -> Tensor:
    """RoPE of ``[B, N, H, D]``; ``cos`` and ``sin`` are ``[1|B, rows, 1|H, rotary or rotary / 2]``."""
    batch, tokens, heads, _ = y.shape
    cos, sin = (spread_table(t, rotary, axes).to(y.dtype) for t in (cos, sin))
    rows = cos.shape[1]
    if positions is None:
        positions = torch.arange(-start, tokens - start, device=y.device).view(1, 1, tokens)
    positions = positions.expand(batch, heads, tokens).transpose(1, 2).long()
    turned = ((positions >= 0) & (positions < rows))[..., None]
    if rows == 0:
        return y
    index = positions.clamp(0, rows - 1)[..., None].expand(-1, -1, -1, rotary)
    cos, sin = (t.expand(batch, rows, heads, rotary).gather(1, index) for t in (cos, sin))
    partner, first = rotation_partner(rotary, axes, y.device)
    head = y[..., :rotary]
    other = head[..., partner]
    left, right = head * cos, torch.where(first, -other, other) * sin
    if round_products is not None:
        left, right = left.to(round_products).to(y.dtype), right.to(round_products).to(y.dtype)
    return torch.cat([torch.where(turned, left + right, head), y[..., rotary:]], -1)


def scatter_rows(x: Tensor, rows: Tensor | None, out: Tensor | None) -> Tensor:
    """Tokens of ``[B, N, H, D]`` at ``rows [1|B, 1|H, N]`` of ``out``, or of a new tensor of N tokens."""
    if rows is None:
        return x if out is None else out.copy_(x)
    batch, tokens, heads, dim = x.shape
    index = rows.expand(batch, heads, tokens).transpose(1, 2)[..., None].expand(-1, -1, -1, dim).long()
    return (torch.zeros_like(x) if out is None else out).scatter_(1, index, x)


def qk_norm_rope(
    x: Tensor,
    *,
    norm: str = "none",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    rotary: int = 0,
    axes: Sequence[int] = (),
    positions: Tensor | None = None,
    start: int = 0,
    rounding: str = "fast",
    round_before_weight: bool = False,
    round_products: bool = False,
    relu: bool = False,
) -> Tensor:
    """One of q and k of ``ops.qk_norm_rope``: new tensor ``[B, N, H, D]``, differentiable, any floating dtype.

    ``cos``, ``sin`` and ``positions`` have the shapes that ``rotate`` takes.
    """
    y = qk_norm(x, norm, weight, bias, eps=eps, rounding=rounding, round_before_weight=round_before_weight, relu=relu)
    if cos is not None and sin is not None and rotary > 0:
        products = x.dtype if round_products and rounding == "eager" else None
        y = rotate(y, cos, sin, rotary=rotary, axes=axes, positions=positions, start=start, round_products=products)
    return y.to(x.dtype)
