"""What the model families do to q and k before attention: their eager expression, and the call that replaces it.

Every chain is built from random inputs of one dtype. Modules and functions of diffusers are used where they can be
imported; the rotation inside Wan's, Sana-Video's and Mochi's processors is local to them and written out here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TEXT, GRID = 5, (2, 3, 4)
VIDEO = 24


@dataclass
class Chain:
    """``eager()`` and ``fused(rounding)`` give q and k [B, N, H, D]; ``exact()`` the same in fp64, unrounded."""

    eager: Callable[[], list[Tensor]]
    fused: Callable[[str], list[Tensor]]
    exact: Callable[[], list[Tensor]]
    partner: Tensor  # [D], the other channel of each pair


def _angles(*shape: int) -> tuple[Tensor, Tensor]:
    angles = torch.rand(shape) * 6 - 3
    return angles.cos(), angles.sin()


def _twice(*shape: int) -> tuple[Tensor, Tensor]:
    cos, sin = _angles(*shape[:-1], shape[-1] // 2)
    return cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)


def _randomise(module: nn.Module, dtype: torch.dtype) -> Any:
    for parameter in module.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.dim() else 0.0, 0.3)
    return module.to(dtype)


def _wan_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    c, s = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = even * c - odd * s
    out[..., 1::2] = even * s + odd * c
    return out


def _mochi_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack([(even * cos - odd * sin).to(x.dtype), (even * sin + odd * cos).to(x.dtype)], -1).flatten(-2)


def _chain(
    streams: list[Tensor],
    norms: list[Any],
    eager: Callable[[Tensor, Any, int], Tensor],
    kind: str,
    tables: list[tuple[Tensor, Tensor] | None],
    **options: Any,
) -> Chain:
    """q and k as two separate streams with norms and tables of their own; eager(x, norm, which) is the model's."""
    from vdit_fast.ops import qk_norm_rope
    from vdit_fast.reference.qk_norm_rope import qk_norm_rope as exact
    from vdit_fast.reference.qk_norm_rope import rotation_partner

    q, k = streams
    weights = [getattr(norm, "weight", None) for norm in norms]
    biases = [getattr(norm, "bias", None) for norm in norms]
    eps = norms[0].eps if norms[0] is not None else 1e-6

    def fused(rounding: str) -> list[Tensor]:
        named: dict[str, Any] = {}
        for prefix, table in zip(("", "k_"), tables, strict=True):
            if table is not None:
                named |= {f"{prefix}cos": table[0], f"{prefix}sin": table[1]}
        with torch.no_grad():
            out = qk_norm_rope(
                q, k, norm=kind, q_weight=weights[0], k_weight=weights[1], q_bias=biases[0], k_bias=biases[1], eps=eps,
                rounding=rounding, **named, **options,
            )  # fmt: skip
        return [t for t in out if t is not None]

    def fp64() -> list[Tensor]:
        results = []
        for x, weight, bias, table in zip(streams, weights, biases, tables, strict=True):
            cos, sin = (None, None) if table is None else (_four(t) for t in table)
            widths = options.get("axes") or ([x.shape[-1]] if options.get("rope") == "half" else [])
            results.append(
                exact(
                    x.double(), norm=kind, weight=None if weight is None else weight.double(),
                    bias=None if bias is None else bias.double(), eps=eps, cos=cos, sin=sin, axes=widths,
                    rotary=0 if table is None else x.shape[-1], start=options.get("rope_start") or 0,
                    relu=options.get("relu", False),
                ).detach()
            )  # fmt: skip
        return results

    def run_eager() -> list[Tensor]:
        with torch.no_grad():
            return [eager(x, norm, i) for i, (x, norm) in enumerate(zip(streams, norms, strict=True))]

    dim = q.shape[-1]
    widths = options.get("axes") or ([dim] if options.get("rope") == "half" else [])
    return Chain(run_eager, fused, fp64, rotation_partner(dim, widths, q.device)[0])


def _four(t: Tensor) -> Tensor:
    return t[None, :, None] if t.dim() == 2 else t.unsqueeze(2) if t.dim() == 3 else t


def _pair(dtype: torch.dtype, tokens: int, heads: int, dim: int) -> list[Tensor]:
    """q and k as thirds of one fused projection."""
    qkv = torch.randn(2, tokens, 3 * heads * dim).to(dtype)
    return [t.unflatten(2, (heads, dim)) for t in qkv.chunk(3, -1)[:2]]


def wan(dtype: torch.dtype, table_dtype: torch.dtype = torch.float32) -> Chain:
    heads, dim = 3, 128
    norms = [_randomise(nn.RMSNorm(heads * dim, eps=1e-6), dtype) for _ in range(2)]
    cos, sin = (t.to(table_dtype).view(1, VIDEO, 1, dim) for t in _twice(VIDEO, dim))

    def eager(x: Tensor, norm: Any, _: int) -> Tensor:
        return _wan_rotation(norm(x.flatten(2)).unflatten(2, (heads, dim)), cos, sin)

    return _chain(
        _pair(dtype, VIDEO, heads, dim), norms, eager, "rms_across", [(cos, sin), (cos, sin)],
        round_products=table_dtype == dtype,
    )  # fmt: skip


def wan_cast(dtype: torch.dtype) -> Chain:
    """After model.to(dtype) the table is of 16 bits too."""
    return wan(dtype, dtype)


def _hunyuan(dtype: torch.dtype, heads: int, text: int) -> Chain:
    from diffusers.models.embeddings import apply_rotary_emb
    from diffusers.models.normalization import RMSNorm

    norms = [_randomise(RMSNorm(128, eps=1e-6), dtype) for _ in range(2)]
    table = _twice(VIDEO, 128)

    def eager(x: Tensor, norm: Any, _: int) -> Tensor:
        y = norm(x)
        return torch.cat([apply_rotary_emb(y[:, :VIDEO], table, sequence_dim=1), y[:, VIDEO:]], 1)

    streams = _pair(dtype, VIDEO + text, heads, 128)
    return _chain(streams, norms, eager, "rms", [table, table], rope_start=0, round_before_weight=True)


def hunyuan_video(dtype: torch.dtype) -> Chain:
    """Single blocks: text last in the same tensor. Dual blocks are this without text, twice."""
    return _hunyuan(dtype, 3, TEXT)


def hunyuan_video15(dtype: torch.dtype) -> Chain:
    return _hunyuan(dtype, 2, 0)


def cogvideox(dtype: torch.dtype) -> Chain:
    from diffusers.models.embeddings import apply_rotary_emb

    norms = [_randomise(nn.LayerNorm(64, eps=1e-6), dtype) for _ in range(2)]
    table = _twice(VIDEO, 64)

    def eager(x: Tensor, norm: Any, _: int) -> Tensor:
        y = norm(x.transpose(1, 2))
        y[:, :, TEXT:] = apply_rotary_emb(y[:, :, TEXT:], table)
        return y.transpose(1, 2)

    return _chain(_pair(dtype, TEXT + VIDEO, 3, 64), norms, eager, "layer", [table, table], rope_start=TEXT)


def easyanimate(dtype: torch.dtype) -> Chain:
    """Text has projections and norms of its own: the video's call, which writes into a slice, is this."""
    from diffusers.models.embeddings import apply_rotary_emb

    norms = [_randomise(nn.LayerNorm(64, eps=1e-6), dtype) for _ in range(2)]
    table = _twice(VIDEO, 64)

    def eager(x: Tensor, norm: Any, _: int) -> Tensor:
        return apply_rotary_emb(norm(x.transpose(1, 2)), table).transpose(1, 2)

    return _chain(_pair(dtype, VIDEO, 3, 64), norms, eager, "layer", [table, table])


def ltx_video(dtype: torch.dtype) -> Chain:
    from diffusers.models.transformers.transformer_ltx import apply_rotary_emb

    heads, dim = 4, 64
    norms = [_randomise(nn.RMSNorm(heads * dim, eps=1e-5), dtype) for _ in range(2)]
    table = _twice(2, VIDEO, heads * dim)

    def eager(x: Tensor, norm: Any, _: int) -> Tensor:
        return apply_rotary_emb(norm(x.flatten(2)), table).unflatten(2, (heads, dim))

    split = tuple(t.unflatten(2, (heads, dim)) for t in table)
    return _chain(_pair(dtype, VIDEO, heads, dim), norms, eager, "rms_across", [split, split])


def ltx2(dtype: torch.dtype) -> Chain:
    """Queries of one stream and keys of another, each with the table of its own positions."""
    from diffusers.models.transformers.transformer_ltx2 import apply_split_rotary_emb

    heads, dim, audio = 4, 64, 7
    norms = [_randomise(nn.RMSNorm(heads * dim, eps=1e-6), dtype) for _ in range(2)]
    tables = [_angles(2, heads, n, dim // 2) for n in (VIDEO, audio)]
    streams = [torch.randn(2, n, heads, dim).to(dtype) for n in (VIDEO, audio)]

    def eager(x: Tensor, norm: Any, which: int) -> Tensor:
        return apply_split_rotary_emb(norm(x.flatten(2)), tables[which]).unflatten(2, (heads, dim))

    split = [tuple(t.transpose(1, 2) for t in table) for table in tables]
    return _chain(streams, norms, eager, "rms_across", split, rope="half")


def mochi(dtype: torch.dtype) -> Chain:
    from diffusers.models.normalization import MochiRMSNorm

    heads = 3
    norms = [_randomise(MochiRMSNorm(128, 1e-5), dtype) for _ in range(2)]
    table = _angles(VIDEO, heads, 64)

    def eager(x: Tensor, norm: Any, _: int) -> Tensor:
        return _mochi_rotation(norm(x), *table)

    own = tuple(t[None] for t in table)
    return _chain(_pair(dtype, VIDEO, heads, 128), norms, eager, "rms", [own, own])


def cosmos(dtype: torch.dtype) -> Chain:
    from diffusers.models.embeddings import apply_rotary_emb
    from diffusers.models.normalization import RMSNorm

    norms = [_randomise(RMSNorm(128, eps=1e-5), dtype) for _ in range(2)]
    cos, sin = (torch.cat([t, t], -1) for t in _angles(VIDEO, 64))

    def eager(x: Tensor, norm: Any, _: int) -> Tensor:
        return apply_rotary_emb(norm(x.transpose(1, 2)), (cos, sin), use_real_unbind_dim=-2).transpose(1, 2)

    streams = _pair(dtype, VIDEO, 3, 128)
    tables = [(cos, sin), (cos, sin)]
    return _chain(streams, norms, eager, "rms", tables, rope="half", round_before_weight=True)


def allegro(dtype: torch.dtype) -> Chain:
    from diffusers.models.embeddings import apply_rotary_emb_allegro

    axes = [tuple(torch.cat([t, t], -1) for t in _angles(n, 16)) for n in GRID]
    places = torch.cartesian_prod(*(torch.arange(n) for n in GRID))
    positions = [p[None] for p in places.unbind(-1)]
    cos, sin = (torch.cat([axis[i][p[0]] for axis, p in zip(axes, positions, strict=True)], -1) for i in range(2))

    def eager(x: Tensor, _: Any, __: int) -> Tensor:
        return apply_rotary_emb_allegro(x.transpose(1, 2), axes, positions).transpose(1, 2)

    tables = [(cos, sin), (cos, sin)]
    return _chain(_pair(dtype, VIDEO, 3, 96), [None, None], eager, "none", tables, rope="half", axes=(32, 32, 32))


def sana_video(dtype: torch.dtype) -> Chain:
    from diffusers.models.normalization import RMSNorm

    heads, dim = 3, 112
    norms = [_randomise(RMSNorm(heads * dim, eps=1e-5), dtype) for _ in range(2)]
    cos, sin = (t.view(1, VIDEO, 1, dim) for t in _twice(VIDEO, dim))

    def eager(x: Tensor, norm: Any, _: int) -> Tensor:
        return _wan_rotation(norm(x.flatten(2)).unflatten(2, (heads, dim)).relu(), cos, sin)

    return _chain(
        _pair(dtype, VIDEO, heads, dim), norms, eager, "rms_across", [(cos, sin), (cos, sin)],
        round_before_weight=True, relu=True,
    )  # fmt: skip


CHAINS: dict[str, Callable[[torch.dtype], Chain]] = {
    f.__name__: f
    for f in (
        wan, wan_cast, hunyuan_video, hunyuan_video15, cogvideox, easyanimate, ltx_video, ltx2, mochi, cosmos, allegro,
        sana_video,
    )
}  # fmt: skip
