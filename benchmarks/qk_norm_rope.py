"""QK norm + RoPE + placement on a CPU: the fused pass beside each model's own expression, eager and compiled.

    python benchmarks/qk_norm_rope.py --out benchmarks/results/cpu

All contenders run in turn in one process, so that a slow spell of the machine hits all alike; ratios are medians of the
rounds' own ratios, with their minimum and maximum. Bytes are the floor: q, k (and v where it is moved) read and written
once, the table read once.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from harness import in_turns, parser, write
from pages import SETTINGS, keep_pages
from torch import Tensor
from torch.nn import functional

from vdit_fast import report
from vdit_fast.ops import qk_norm_rope

FUSED, EAGER, COMPILED = "fused", "eager", "torch.compile"


@dataclass
class Family:
    """The width of a model, its expression, and the call that replaces it."""

    name: str
    heads: int
    dim: int
    tokens: int
    expression: Callable[..., Any]
    options: dict[str, Any]
    text: int = 0
    joint: bool = False
    head_tables: bool = False
    half_table: bool = False


def _torch_rms(x: Tensor, weight: Tensor) -> Tensor:
    return functional.rms_norm(x, (x.shape[-1],), weight, 1e-6)


def _diffusers_rms(x: Tensor, weight: Tensor) -> Tensor:
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return (x * torch.rsqrt(variance + 1e-6)).to(weight.dtype) * weight


def _neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return (x.float() * cos + torch.stack([-b, a], -1).flatten(-2).float() * sin).to(x.dtype)


def _halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return (x.float() * cos + torch.cat([-b, a], -1).float() * sin).to(x.dtype)


def _strided(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    out, c, s = torch.empty_like(x), cos[..., 0::2], sin[..., 1::2]
    out[..., 0::2] = a * c - b * s
    out[..., 1::2] = a * s + b * c
    return out


def _pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack([(a * cos - b * sin).to(x.dtype), (a * sin + b * cos).to(x.dtype)], -1).flatten(-2)


def wan(q: Tensor, k: Tensor, v: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    heads = q.shape[2:]
    return *(_strided(_torch_rms(x.flatten(2), w).unflatten(2, heads), cos, sin) for x in (q, k)), v


def hunyuan(q: Tensor, k: Tensor, v: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """Text of 256 tokens behind the video: norm, rotation of the video, concatenation."""
    video = cos.shape[1]
    normed = (_diffusers_rms(x, w) for x in (q, k))
    return *(torch.cat([_neighbours(x[:, :video], cos, sin), x[:, video:]], 1) for x in normed), v.clone()


def cogvideox(q: Tensor, k: Tensor, v: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    out = []
    for x in (q, k):
        y = functional.layer_norm(x, (x.shape[-1],), w, w, 1e-6)
        y[:, -cos.shape[1] :] = _neighbours(y[:, -cos.shape[1] :], cos, sin)
        out.append(y)
    return *out, v


def ltx(q: Tensor, k: Tensor, v: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    heads = q.shape[2:]
    tables = cos.flatten(2), sin.flatten(2)
    return *(_neighbours(_torch_rms(x.flatten(2), w), *tables).unflatten(2, heads) for x in (q, k)), v


def mochi(q: Tensor, k: Tensor, v: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    out = []
    for x in (q, k):
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        out.append(_pairs((x * torch.rsqrt(variance + 1e-6) * w).to(x.dtype), cos, sin))
    return *out, v


def cosmos(q: Tensor, k: Tensor, v: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    return *(_halves(_diffusers_rms(x, w), cos, sin) for x in (q, k)), v


RMS = {"norm": "rms", "round_before_weight": True}
FAMILIES = [
    Family("Wan 14B", 40, 128, 8192, wan, {"norm": "rms_across"}),
    Family("HunyuanVideo", 24, 128, 8192, hunyuan, {**RMS, "rope_start": 0}, text=256, joint=True),
    Family("CogVideoX 5B", 48, 64, 8192, cogvideox, {"norm": "layer", "rope_start": 226}, text=226),
    Family("LTX 0.9", 32, 64, 9240, ltx, {"norm": "rms_across"}, head_tables=True),
    Family("Mochi", 24, 128, 8192, mochi, {"norm": "rms"}, head_tables=True, half_table=True),
    Family("Cosmos 7B", 32, 128, 8192, cosmos, {**RMS, "rope": "half"}),
]


def build(family: Family, device: str = "cpu") -> tuple[int, dict[str, Callable[[], Any]]]:
    """Bytes of the floor, and the calls by name."""
    tokens, heads, dim = family.tokens + family.text, family.heads, family.dim
    qkv = torch.randn(1, tokens, 3 * heads * dim, device=device).bfloat16()
    q, k, v = (t.unflatten(2, (heads, dim)) for t in qkv.chunk(3, -1))
    weight = torch.randn(heads * dim if family.options["norm"] == "rms_across" else dim, device=device).bfloat16()
    width = dim // 2 if family.half_table else dim
    angles = torch.rand(1, family.tokens, heads if family.head_tables else 1, dim // 2, device=device) * 6
    if width == dim:
        half = family.options.get("rope") == "half"
        angles = torch.cat([angles, angles], -1) if half else angles.repeat_interleave(2, -1)
    cos, sin = angles.cos(), angles.sin()
    joint = torch.empty(3, 1, tokens, heads, dim, device=device).bfloat16()
    options = dict(family.options)
    if family.options["norm"] == "layer":
        options |= {"q_bias": weight, "k_bias": weight}

    def fused(rounding: str) -> Any:
        outs = {"v": v, "q_out": joint[0], "k_out": joint[1], "v_out": joint[2]} if family.joint else {}
        return qk_norm_rope(
            q, k, q_weight=weight, k_weight=weight, cos=cos, sin=sin, rounding=rounding, **outs, **options
        )

    compiled = torch.compile(family.expression, dynamic=False)
    moved = q.numel() * 2 * 2 * (3 if family.joint else 2) + 2 * cos.numel() * 4
    return moved, {
        FUSED: lambda: fused("fast"),
        "fused, eager rounding": lambda: fused("eager"),
        COMPILED: lambda: compiled(q, k, v, weight, cos, sin),
        EAGER: lambda: family.expression(q, k, v, weight, cos, sin),
    }


def measure(family: Family, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    moved, calls = build(family)
    times = in_turns(calls, rounds)
    rows = []
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times[FUSED], strict=True)]
        rows.append({
            "name": name,
            "seconds": statistics.median(seconds),
            "min": min(seconds),
            "max": max(seconds),
            "gbytes_per_second": moved / statistics.median(seconds) / 1e9,
            "of_fused": statistics.median(ratios),
            "of_fused_min": min(ratios),
            "of_fused_max": max(ratios),
        })  # fmt: skip
    shape = {"heads": family.heads, "dim": family.dim, "tokens": family.tokens, "text": family.text}
    return {"family": family.name, **shape, "bytes": moved, "threads": torch.get_num_threads(), "rows": rows}


def main() -> None:
    ap = parser(__doc__, rounds=15)
    ap.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    args = ap.parse_args()
    keep_pages()
    load = os.getloadavg()[1]  # what else the machine is doing
    results = []
    with torch.no_grad():
        for threads in args.threads:
            torch.set_num_threads(threads)
            for family in FAMILIES:
                result = measure(family, args.rounds)
                results.append(result)
                print(f"\n{family.name}: {result['bytes'] / 1e6:.0f} MB, bf16, {threads} threads")
                rows = [
                    (
                        row["name"],
                        report.format_seconds(row["seconds"]),
                        f"{row['gbytes_per_second']:.2f}",
                        f"{row['of_fused']:.2f} ({row['of_fused_min']:.2f}-{row['of_fused_max']:.2f})",
                    )
                    for row in result["rows"]
                ]
                print(report.table(rows, ("", "median", "GB/s", "of fused")), flush=True)
    document = {
        "kind": "vdit_fast.qk_norm_rope",
        "settings": {"dtype": "bfloat16", "rounds": args.rounds, "seed": 0, "threads": args.threads},
        "allocator": {name: os.environ.get(name) for name in SETTINGS},
        "load_average_5_min": load,
        "results": results,
        "command": f"python benchmarks/qk_norm_rope.py --rounds {args.rounds}",
    }
    write(args.out / "qk_norm_rope.json", document)


if __name__ == "__main__":
    main()
