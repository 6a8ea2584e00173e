"""The adaptive norms against the chains of the model families, through the norm modules of diffusers.

Every case builds a family's modules in bf16 and yields what they compute next to the operator call that replaces it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from adaln_cases import BF16, F32, double, draw, outputs
from torch import Tensor, nn

from vdit_fast import ops, reference

pytest.importorskip("diffusers")

B, N, D, T = 2, 30, 192, 64  # T: width of the timestep embedding
Step = tuple[tuple[Tensor, ...], str, dict[str, Any]]  # what the family gets, the operator, its arguments


def tokens(seed: int) -> Tensor:
    return draw(seed, B, N, D, dtype=BF16, mean=0.3)


def module(made: nn.Module, dtype: torch.dtype = BF16) -> Any:
    """With random parameters, also where the constructor sets ones and zeros."""
    generator = torch.Generator().manual_seed(0)
    for p in made.parameters():
        p.data = torch.randn(p.shape, generator=generator) * (0.4 if p.dim() == 1 else p.shape[-1] ** -0.5)
        p.requires_grad_(False)
        if p.dim() == 1:
            p.data += 0.5
    return made.to(dtype)


def layer_norm(eps: float = 1e-6, affine: bool = False) -> Any:
    return module(nn.LayerNorm(D, eps, elementwise_affine=affine))


def wan(per_token: bool = False) -> Iterator[Step]:
    # WanTransformerBlock: fp32 up to each type_as; the table and the norms stay fp32.
    from diffusers.models.normalization import FP32LayerNorm

    x, y, z = map(tokens, range(3))
    table, norm = draw(3, 1, 6, D) / D**0.5, FP32LayerNorm(D, 1e-6, elementwise_affine=False)
    norm2 = module(FP32LayerNorm(D, 1e-6, elementwise_affine=True), F32)
    temb = draw(4, B, N, 6, D, dtype=BF16) if per_token else draw(4, B, 6, D, dtype=BF16)
    rows = (table.unsqueeze(0) + temb.float()) if per_token else (table + temb.float()).unsqueeze(1)
    shift, scale, gate, c_shift, c_scale, c_gate = rows.unbind(2)
    parts = temb.unbind(2) if per_token else temb.unbind(1)
    pairs = [(table[0, i], parts[i]) for i in range(6)]

    h = (norm(x.float()) * (1 + scale) + shift).type_as(x)
    yield (h,), "adaln_modulate", {"x": x, "scale": pairs[1], "shift": pairs[0]}
    x1 = (x.float() + y * gate).type_as(x)
    h = norm2(x1.float()).type_as(x)
    affine = {"weight": norm2.weight, "bias": norm2.bias}
    yield (x1, h), "gate_residual_norm", {"x": x, "y": y, "gate": pairs[2], **affine}
    x2 = x1 + z
    h = (norm(x2.float()) * (1 + c_scale) + c_shift).type_as(x)
    yield (x2, h), "gate_residual_norm", {"x": x1, "y": z, "scale": pairs[4], "shift": pairs[3]}
    yield ((x.float() + y.float() * c_gate).type_as(x),), "gate_residual", {"x": x, "y": y, "gate": pairs[5]}


def skyreels_df() -> Iterator[Step]:
    # SkyReelsV2TransformerBlock with timesteps per frame: temb is [B, 6, N, D].
    from diffusers.models.normalization import FP32LayerNorm

    x, y, table, temb = tokens(0), tokens(1), draw(3, 1, 6, D) / D**0.5, draw(4, B, 6, N, D, dtype=BF16)
    rows = [e.squeeze(1) for e in (table.unsqueeze(2) + temb.float()).chunk(6, dim=1)]
    pairs = [(table[0, i], temb[:, i]) for i in range(6)]
    h = (FP32LayerNorm(D, 1e-6, elementwise_affine=False)(x.float()) * (1 + rows[1]) + rows[0]).type_as(x)
    yield (h,), "adaln_modulate", {"x": x, "scale": pairs[1], "shift": pairs[0]}
    yield ((x.float() + y * rows[2]).type_as(x),), "gate_residual", {"x": x, "y": y, "gate": pairs[2]}


def hunyuan_video() -> Iterator[Step]:
    from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle

    x, y, temb = tokens(0), tokens(1), draw(4, B, D, dtype=BF16)
    norm1, norm2 = module(AdaLayerNormZero(D)), layer_norm()
    h, gate, shift, scale, c_gate = norm1(x, emb=temb)
    rows = norm1.linear(norm1.silu(temb)).chunk(6, dim=1)
    yield (h,), "adaln_modulate", {"x": x, "scale": rows[1], "shift": rows[0]}
    x1 = x + y * gate.unsqueeze(1)
    h = norm2(x1) * (1 + scale[:, None]) + shift[:, None]
    yield (x1, h), "gate_residual_norm", {"x": x, "y": y, "gate": gate, "scale": scale, "shift": shift}
    yield (x + c_gate.unsqueeze(1) * y,), "gate_residual", {"x": x, "y": y, "gate": c_gate}
    single = module(AdaLayerNormZeroSingle(D))
    h, gate = single(x, emb=temb)
    shift, scale, _ = single.linear(single.silu(temb)).chunk(3, dim=1)
    yield (h,), "adaln_modulate", {"x": x, "scale": scale, "shift": shift}


def hunyuan_token_replace() -> Iterator[Step]:
    # The first frame has rows of its own: slices and a concatenation, here an index.
    from diffusers.models.transformers import transformer_hunyuan_video as hunyuan

    x, temb, other = tokens(0), draw(4, B, D, dtype=BF16), draw(5, B, D, dtype=BF16)
    norm = module(hunyuan.HunyuanVideoTokenReplaceAdaLayerNormZero(D))
    table = torch.stack([norm.linear(norm.silu(t)) for t in (other, temb)], dim=1).unflatten(2, (6, D)).unbind(2)
    index = (torch.arange(N) >= 7).to(torch.int32)
    h = norm(x, temb, other, 7)[0]
    yield (h,), "adaln_modulate", {"x": x, "scale": table[1], "shift": table[0], "index": index}


def cogvideox() -> Iterator[Step]:
    from diffusers.models.normalization import CogVideoXLayerNormZero

    x, e, y, temb = tokens(0), tokens(1)[:, :5], tokens(2), draw(4, B, T, dtype=BF16)
    norm = module(CogVideoXLayerNormZero(T, D))
    rows = norm.linear(norm.silu(temb)).chunk(6, dim=1)
    h, h_text, gate, text_gate = norm(x, e, temb)
    affine = {"weight": norm.norm.weight, "bias": norm.norm.bias, "eps": 1e-5}
    yield (h,), "adaln_modulate", {"x": x, "scale": rows[1], "shift": rows[0], **affine}
    yield (h_text,), "adaln_modulate", {"x": e, "scale": rows[4], "shift": rows[3], **affine}
    x1, second = x + gate * y, draw(5, B, T, dtype=BF16)
    h = norm(x1, e, second)[0]
    shift, scale, *_ = norm.linear(norm.silu(second)).chunk(6, dim=1)
    yield (x1, h), "gate_residual_norm", {"x": x, "y": y, "gate": rows[2], "scale": scale, "shift": shift, **affine}
    yield (e + text_gate * y[:, :5],), "gate_residual", {"x": e, "y": y[:, :5], "gate": rows[5]}


def _table_family(norm: Any, kind: str, temb: Tensor, gate_first: bool, eps: float) -> Iterator[Step]:
    """LTX, LTX-2, Allegro, Sana-Video, Latte: a bf16 table + bf16 temb [B, 1 or N, 6, D]."""
    x, y, table = tokens(0), tokens(1), (draw(3, 6, D) / D**0.5).to(BF16)
    shift, scale, gate, c_shift, c_scale, c_gate = (table[None, None] + temb).unbind(2)
    pairs = [(table[i], temb[:, :, i]) for i in range(6)]
    how = {"norm": kind, "eps": eps}
    yield (norm(x) * (1 + scale) + shift,), "adaln_modulate", {"x": x, "scale": pairs[1], "shift": pairs[0], **how}
    x1 = x + (gate * y if gate_first else y * gate)
    h = norm(x1) * (1 + c_scale) + c_shift
    modulation = {"gate": pairs[2], "scale": pairs[4], "shift": pairs[3], **how}
    yield (x1, h), "gate_residual_norm", {"x": x, "y": y, **modulation}
    yield (x + y * c_gate,), "gate_residual", {"x": x, "y": y, "gate": pairs[5]}


def ltx(rows: int = 1) -> Iterator[Step]:
    from diffusers.models.normalization import RMSNorm

    norm = RMSNorm(D, eps=1e-6, elementwise_affine=False)
    return _table_family(norm, "rms", draw(4, B, rows, 6, D, dtype=BF16), False, 1e-6)


def allegro() -> Iterator[Step]:  # also Latte's and PixArt's ada_norm_single
    return _table_family(layer_norm(), "layer", draw(4, B, 6, D, dtype=BF16).unsqueeze(1), True, 1e-6)


def sana_video() -> Iterator[Step]:
    return _table_family(layer_norm(1e-6), "layer", draw(4, B, N, 6, D, dtype=BF16), True, 1e-6)


def mochi() -> Iterator[Step]:
    # fp32 inside the norms although rows are bf16: scale is passed as the fp32 it becomes there.
    from diffusers.models.transformers.transformer_mochi import MochiModulatedRMSNorm, MochiRMSNormZero

    x, y, temb = tokens(0), tokens(1), draw(4, B, T, dtype=BF16)
    norm1, norm = module(MochiRMSNormZero(T, 4 * D)), MochiModulatedRMSNorm(1e-5)
    scale, gate, c_scale, c_gate = norm1.linear(norm1.silu(temb)).chunk(4, dim=1)
    rms = {"norm": "rms", "eps": 1e-5}
    yield (norm1(x, temb)[0],), "adaln_modulate", {"x": x, "scale": scale.float(), **rms}
    post = {"gate_activation": "tanh", "post_norm": "rms", "post_eps": 1e-5}
    x1 = x + norm(y, torch.tanh(gate).unsqueeze(1))
    yield (x1,), "gate_residual", {"x": x, "y": y, "gate": gate, **post}
    h = norm(x1, 1 + c_scale.unsqueeze(1).to(F32))
    yield (h,), "adaln_modulate", {"x": x1, "scale": c_scale.float(), **rms}
    yield (x + norm(y, torch.tanh(c_gate).unsqueeze(1)),), "gate_residual", {"x": x, "y": y, "gate": c_gate, **post}


def lumina() -> Iterator[Step]:
    from diffusers.models.normalization import LuminaRMSNormZero, RMSNorm

    x, y, temb = tokens(0), tokens(1), draw(4, B, D, dtype=BF16)
    norm1, norm2, ffn_norm1 = module(LuminaRMSNormZero(D, 1e-5, True)), *(module(RMSNorm(D, 1e-5)) for _ in range(2))
    h, gate, c_scale, _ = norm1(x, temb)
    scale = norm1.linear(norm1.silu(temb)).chunk(4, dim=1)[0]
    rms = {"norm": "rms", "eps": 1e-5}
    yield (h,), "adaln_modulate", {"x": x, "scale": scale, "weight": norm1.norm.weight, **rms}
    x1 = x + gate.unsqueeze(1).tanh() * norm2(y)
    h = ffn_norm1(x1) * (1 + c_scale.unsqueeze(1))
    post = {"gate_activation": "tanh", "post_norm": "rms", "post_eps": 1e-5, "post_weight": norm2.weight}
    both = {"gate": gate, "scale": c_scale, "weight": ffn_norm1.weight, **rms, **post}
    yield (x1, h), "gate_residual_norm", {"x": x, "y": y, **both}
    # the refiner without modulation: sandwich norms only
    del post["gate_activation"]
    yield (x + norm2(y),), "gate_residual", {"x": x, "y": y, **post}


def cosmos(per_token: bool = False) -> Iterator[Step]:
    from diffusers.models.transformers.transformer_cosmos import CosmosAdaLayerNorm, CosmosAdaLayerNormZero

    x, y = tokens(0), tokens(1)
    lead = (B, N) if per_token else (B,)
    emb, temb = draw(4, *lead, D, dtype=BF16), draw(5, *lead, 3 * D, dtype=BF16)
    norm, last = module(CosmosAdaLayerNormZero(D, T)), module(CosmosAdaLayerNorm(D, T))
    h, gate = norm(x, emb, temb)
    low = norm.linear_2(norm.linear_1(norm.activation(emb)))
    shift, scale, gate_row = (low + temb).chunk(3, dim=-1)
    yield (h,), "adaln_modulate", {"x": x, "scale": scale, "shift": shift}
    x1 = x + gate * y
    h = last(x1, emb, temb)
    shift, scale = (last.linear_2(last.linear_1(last.activation(emb))) + temb[..., : 2 * D]).chunk(2, dim=-1)
    yield (x1, h), "gate_residual_norm", {"x": x, "y": y, "gate": gate_row, "scale": scale, "shift": shift}


def easyanimate() -> Iterator[Step]:
    from diffusers.models.normalization import FP32LayerNorm
    from diffusers.models.transformers.transformer_easyanimate import EasyAnimateLayerNormZero

    x, y, temb = tokens(0), tokens(1), draw(4, B, T, dtype=BF16)
    norm, norm3 = module(EasyAnimateLayerNormZero(T, D)), module(FP32LayerNorm(D, 1e-5))
    h, _, gate, _ = norm(x, x[:, :3], temb)
    rows = norm.linear(norm.silu(temb)).chunk(6, dim=1)
    affine = {"weight": norm.norm.weight, "bias": norm.norm.bias, "eps": 1e-5}
    yield (h,), "adaln_modulate", {"x": x, "scale": rows[1], "shift": rows[0], **affine}
    yield (x + gate.unsqueeze(1) * y,), "gate_residual", {"x": x, "y": y, "gate": gate}
    post = {"post_norm": "layer", "post_eps": 1e-5, "post_weight": norm3.weight, "post_bias": norm3.bias}
    yield (x + gate.unsqueeze(1) * norm3(y),), "gate_residual", {"x": x, "y": y, "gate": gate, **post}


FAMILIES: dict[str, Callable[[], Iterator[Step]]] = {
    "allegro": allegro,
    "cogvideox": cogvideox,
    "cosmos": cosmos,
    "cosmos per token": lambda: cosmos(per_token=True),
    "easyanimate": easyanimate,
    "hunyuan_video": hunyuan_video,
    "hunyuan_video token replace": hunyuan_token_replace,
    "ltx": ltx,
    "ltx per token": lambda: ltx(rows=N),
    "lumina": lumina,
    "mochi": mochi,
    "sana_video": sana_video,
    "skyreels_df": skyreels_df,
    "wan": wan,
    "wan per token": lambda: wan(per_token=True),
}


def ulp_of_largest_term(want: Tensor, op: str, kwargs: dict[str, Any], last: bool) -> Tensor:
    """bf16's spacing at the larger of the result and the two terms of the last sum: a sum that cancels has theirs."""
    if op == "gate_residual" or not last:
        addend = kwargs["x"].double()
    elif kwargs.get("shift") is None:
        addend = torch.zeros(())
    else:
        table = reference.adaln.table_rows(kwargs["shift"], N, kwargs.get("index"), "eager", torch.float64)
        addend = table.expand_as(want) if table.shape[1] in (1, want.shape[1]) else table
    largest = torch.stack([t.double().abs().expand_as(want) for t in (want, addend, want.double() - addend)]).amax(0)
    return torch.exp2(largest.clamp(min=1e-30).log2().floor()) * torch.finfo(BF16).eps


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_family(family: str) -> None:
    try:
        steps = list(FAMILIES[family]())
    except ImportError as error:
        pytest.skip(f"this diffusers has no such module: {error}")
    for theirs, op, kwargs in steps:
        fast, eager = (outputs(getattr(ops, op)(**kwargs, rounding=r)) for r in ("fast", "eager"))
        exact = outputs(getattr(reference, op)(**{k: v for k, v in double(kwargs).items() if k != "rounding"}))
        for i, (want, a, b, c) in enumerate(zip(theirs, fast, eager, exact, strict=True)):
            assert want.dtype == a.dtype == b.dtype == BF16
            allowed = 2 * (want.double() - c).abs().max()
            assert (a.double() - c).abs().max() <= allowed, (op, i)
            assert (b.double() - c).abs().max() <= allowed, (op, i)
            ulp = ulp_of_largest_term(want, op, kwargs, i == len(theirs) - 1)
            assert ((b.double() - want.double()).abs() <= ulp).all(), (op, i)
            assert (b == want).double().mean() > 0.995, (op, i)
