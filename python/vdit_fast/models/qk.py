"""Queries and keys from projection to attention: norm, RoPE and placement, in one pass or by the model's modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vdit_fast.models.fusion import rounding_for
from vdit_fast.ops.qk_norm_rope import qk_norm_rope

if TYPE_CHECKING:
    from vdit_fast.models.base import ServedProcessor

__all__ = [
    "BeforeRotation",
    "Heads",
    "Norms",
    "Rotary",
    "fused_options",
    "joint_heads",
    "normed",
    "pair_rotary",
    "rotate_pairs",
    "turn",
    "turn_keys",
    "turned_heads",
]

Heads = tuple[Tensor, Tensor, Tensor]
"""q, k, v [B, N, H, D]."""
Norms = tuple[Any, Any]
"""The norm modules of q and k; None where a model has none."""


BeforeRotation = Callable[["ServedProcessor", Heads, Norms, "Rotary | None", bool], Heads]
"""Takes the place of ``turn`` where keys are kept as they are before RoPE; may return more keys than queries."""


@dataclass(frozen=True)
class Rotary:
    """How a family rotates: its tables for ``qk_norm_rope``, and its own arithmetic where that cannot run."""

    cos: Tensor
    sin: Tensor
    rotate: Callable[[Tensor], Tensor]
    """x [B, N, H, D] -> the same, rotated with the model's own rounding."""
    layout: str = "interleaved"
    axes: Sequence[int] | None = None
    start: int | None = None
    """First token that is rotated; those beyond the table are not. None: all are."""
    round_products: bool = False

    def stock(self, x: Tensor) -> Tensor:
        """x with the rotated range exchanged."""
        if self.start is None:
            return self.rotate(x)
        end = self.start + self.cos.shape[0 if self.cos.ndim == 2 else 1]
        parts = (x[:, : self.start], self.rotate(x[:, self.start : end]), x[:, end:])
        return torch.cat([part for part in parts if part.shape[1]], dim=1)

    def arguments(self) -> dict[str, Any]:
        return {
            "cos": self.cos,
            "sin": self.sin,
            "rope": self.layout,
            "axes": self.axes,
            "rope_start": self.start,
            "round_products": self.round_products,
        }


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs the way diffusers' ``apply_rotary_emb`` rounds it: fp32, then x's dtype.

    Args:
        x: [B, N, H, D].
        cos, sin: [1 or B, N, 1 or H, D], every value repeated for the two channels of its pair.
    """
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-odd, even), dim=-1).flatten(-2)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def pair_rotary(tables: tuple[Tensor, Tensor] | None, tokens: Tensor, start: int | None = None) -> Rotary | None:
    """The rotation of diffusers' ``apply_rotary_emb`` with tables [N, D], on the device of the tokens."""
    if tables is None:
        return None
    cos, sin = (table.to(tokens.device)[None, :, None] for table in tables)
    return Rotary(cos, sin, lambda x: rotate_pairs(x, cos, sin), start=start)


def turned_heads(
    processor: ServedProcessor, heads: Heads, norms: Norms, rotary: Rotary | None, *, across: bool = False
) -> Heads:
    """q, k and v that attention gets: q and k after norm and RoPE; ``Session.before_rotation`` may add keys of other
    tokens. ``across``: the norms run over all heads' channels."""
    other = processor.session.before_rotation
    if other is not None:
        return other(processor, heads, norms, rotary, across)
    return turn(processor, heads, norms, rotary, across)


def turn(processor: ServedProcessor, heads: Heads, norms: Norms, rotary: Rotary | None, across: bool = False) -> Heads:
    """q and k after norm and RoPE, v as it is."""
    query, key, value = heads
    options = fused_options(processor, query, norms, across)
    if options is not None:
        query, new_key, _ = qk_norm_rope(query, key, **options, **(rotary.arguments() if rotary else {}))
        assert new_key is not None
        return query, new_key, value
    query, key = normed(query, norms[0], across), normed(key, norms[1], across)
    if rotary is not None:
        query, key = rotary.stock(query), rotary.stock(key)
    return query, key, value


def turn_keys(
    processor: ServedProcessor, key: Tensor, norm: Any, rotary: Rotary | None, across: bool = False
) -> Tensor:
    """Keys [B, N, H, D] alone after norm and RoPE, as ``turn`` makes them."""
    options = fused_options(processor, key, (norm, norm), across)
    if options is not None:  # the norm as that of the kernel's first tensor
        options = {name: value for name, value in options.items() if not name.startswith("k_")}
        return qk_norm_rope(key, **options, **(rotary.arguments() if rotary else {}))[0]
    key = normed(key, norm, across)
    return key if rotary is None else rotary.stock(key)


def joint_heads(
    processor: ServedProcessor,
    video: Heads,
    video_norms: Norms,
    text: Heads,
    text_norms: Norms,
    rotary: Rotary | None,
    *,
    text_first: bool = False,
) -> Heads:
    """q, k, v of [video, text] (or [text, video]), every stream with its own norms, the video rotated."""
    options = fused_options(processor, video[0], video_norms, False)
    text_options = fused_options(processor, text[0], text_norms, False)
    if options is not None and text_options is not None:
        n, m = video[0].shape[1], text[0].shape[1]
        joint = tuple(x.new_empty(x.shape[0], n + m, *x.shape[2:]) for x in video)
        places = [x[:, m:] if text_first else x[:, :n] for x in joint]
        text_places = [x[:, :m] if text_first else x[:, n:] for x in joint]
        rotation = rotary.arguments() if rotary else {}
        qk_norm_rope(
            video[0], video[1], video[2], **options, **rotation, q_out=places[0], k_out=places[1], v_out=places[2]
        )
        qk_norm_rope(
            text[0], text[1], text[2], **text_options, q_out=text_places[0], k_out=text_places[1], v_out=text_places[2]
        )
        return joint[0], joint[1], joint[2]
    video = turn(processor, video, video_norms, rotary)
    text = turn(processor, text, text_norms, None)
    query, key, value = (torch.cat((b, a) if text_first else (a, b), dim=1) for a, b in zip(video, text, strict=True))
    return query, key, value


def normed(x: Tensor, norm: Any, across: bool) -> Tensor:
    """x [B, N, H, D] through the model's own norm module, None where it has none."""
    if norm is None:
        return x
    result: Tensor = norm(x.flatten(2)).view(x.shape) if across else norm(x)
    return result


def fused_options(processor: ServedProcessor, query: Tensor, norms: Norms, across: bool) -> dict[str, Any] | None:
    """Arguments of ``qk_norm_rope`` for these norms, None where the modules must run."""
    present = [norm for norm in norms if norm is not None]
    kind = ("none", False) if not present else _kind(*norms, across)
    reason = None if kind is not None else "the norms of q and k are not of a kind that one call computes"
    rounding = rounding_for(processor.session, query, present, reason=reason)
    if rounding is None or kind is None:
        return None
    if not present:
        return {"norm": "none", "rounding": rounding}
    (norm, round_before_weight), (first, second) = kind, norms
    return {
        "norm": norm,
        "q_weight": first.weight,
        "k_weight": second.weight,
        "q_bias": getattr(first, "bias", None),
        "k_bias": getattr(second, "bias", None),
        "eps": first.eps,
        "rounding": rounding,
        "round_before_weight": round_before_weight,
    }


def _kind(first: Any, second: Any, across: bool) -> tuple[str, bool] | None:
    """(name for ``qk_norm_rope``, whether it rounds before its weight) of both norms, None where they are not alike or
    not known. Classes are compared as they are: a subclass may compute something else."""
    eps = getattr(first, "eps", None)
    if type(first) is not type(second) or not isinstance(eps, float) or eps != second.eps:
        return None
    weights = [getattr(norm, "weight", None) for norm in (first, second)]
    if (weights[0] is None) != (weights[1] is None):
        return None
    name = type(first).__name__
    if type(first) is nn.LayerNorm or name == "FP32LayerNorm":
        return None if across or len(first.normalized_shape) != 1 else ("layer", False)
    rms = "rms_across" if across else "rms"
    if type(first) is nn.RMSNorm or name == "MochiRMSNorm":
        return rms, False
    return (rms, True) if name == "RMSNorm" and getattr(first, "bias", None) is None else None  # diffusers' own
