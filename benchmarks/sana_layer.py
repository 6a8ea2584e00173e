"""Sana-Video's self-attention on a CPU: the layer that ``accelerate`` serves beside the stock one, eager and compiled.

    python benchmarks/sana_layer.py --out benchmarks/results/cpu

One layer of the 2B model's width (20 heads of 112 channels) on clips of growing length, as a whole and without its four
projections, which are the same matrix products in all contenders. Contenders run in turn in one process, so that a slow
spell of the machine hits all alike; ratios are medians of the rounds' own ratios with their minimum and maximum. In
bfloat16, which takes torch's products very long on a CPU without bfloat16 arithmetic, the projections are left out.
"""

from __future__ import annotations

import copy
import logging
import os
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import SanaVideoTransformer3DModel
from harness import in_turns, parser, write
from torch import Tensor, nn

from vdit_fast import accelerate, report
from vdit_fast.config import Config

HEADS, DIM = 20, 112
GRIDS = ((3, 15, 26), (6, 15, 26), (6, 30, 52))
"""Frames, height and width in tokens: 480p has 30 x 52."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OWN, EAGER_ROUNDING, EAGER, COMPILED = "accelerated", "accelerated, fuse: eager", "stock", "stock, torch.compile"
Call = Callable[[], Tensor]


def model_of(heads: int, dtype: torch.dtype, projections: bool) -> Any:
    torch.manual_seed(0)
    width = heads * DIM
    model: Any = SanaVideoTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=DIM, num_layers=1, num_cross_attention_heads=heads,
        cross_attention_head_dim=DIM, cross_attention_dim=width, mlp_ratio=0.1,
    )  # fmt: skip
    model = model.to(dtype).eval().requires_grad_(False)
    attn = model.transformer_blocks[0].attn1
    if not projections:
        attn.to_q, attn.to_k, attn.to_v, attn.to_out[0] = (nn.Identity() for _ in range(4))
    return model


def contenders(grid: tuple[int, int, int], heads: int, dtype: torch.dtype, projections: bool) -> dict[str, Call]:
    """The layer by four ways. Its rotary tables are fp32, as in a model that is loaded in 16 bits."""
    frames, height, width = grid
    stock = model_of(heads, dtype, projections)
    tables = tuple(t.float() for t in stock.rope(torch.empty(1, 16, frames, 2 * height, 2 * width)))
    x = torch.randn(1, frames * height * width, heads * DIM).to(dtype)

    def layer(model: Any) -> Any:
        return model.transformer_blocks[0].attn1

    served = {name: copy.deepcopy(stock) for name in (OWN, EAGER_ROUNDING)}
    for name, model in served.items():
        accelerate(model, Config(fuse="eager" if name == EAGER_ROUNDING else "fast"))
    compiled = torch.compile(layer(copy.deepcopy(stock)), dynamic=False, fullgraph=True)
    layers = {name: layer(model) for name, model in served.items()} | {EAGER: layer(stock), COMPILED: compiled}

    def call(name: str) -> Tensor:
        assert len(served) == 2  # keeps the models, which their layers know weakly
        found: Tensor = layers[name](x, rotary_emb=tables)
        return found

    return {name: partial(call, name) for name in layers}


def measure(
    grid: tuple[int, int, int], heads: int, dtype: str, projections: bool, rounds: int, compiled: bool
) -> dict[str, Any]:
    torch._dynamo.reset()
    calls = contenders(grid, heads, DTYPES[dtype], projections)
    if not compiled:
        calls.pop(COMPILED)
    with torch.inference_mode():
        times = in_turns(calls, rounds, warm=1)
    rows = []
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times[OWN], strict=True)]
        rows.append({
            "name": name,
            "seconds": statistics.median(seconds),
            "min": min(seconds),
            "max": max(seconds),
            "of_own": statistics.median(ratios),
            "of_own_min": min(ratios),
            "of_own_max": max(ratios),
        })  # fmt: skip
    return {
        "grid": grid, "tokens": grid[0] * grid[1] * grid[2], "heads": heads, "dim": DIM, "dtype": dtype,
        "projections": projections, "runs": rounds, "rows": rows,
    }  # fmt: skip


def print_rows(results: list[dict[str, Any]]) -> None:
    table = []
    for r in results:
        by_name = {row["name"]: row for row in r["rows"]}
        table.append((
            f"{r['heads']}x{r['tokens']}x{r['dim']}",
            r["dtype"],
            "whole" if r["projections"] else "without projections",
            report.format_seconds(r["rows"][0]["seconds"]),
            *(f"{w['of_own']:.2f} ({w['of_own_min']:.2f}-{w['of_own_max']:.2f})" if w else "-"
              for w in (by_name.get(n) for n in (EAGER_ROUNDING, EAGER, COMPILED))),
        ))  # fmt: skip
    print(report.table(table, ("", "dtype", "layer", OWN, EAGER_ROUNDING, EAGER, COMPILED)))


def main() -> None:
    ap = parser(__doc__, rounds=5)
    ap.add_argument("--heads", type=int, default=HEADS)
    ap.add_argument("--grids", type=int, default=len(GRIDS), help="how many of the clip lengths, from the shortest on")
    ap.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    args = ap.parse_args()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    load = os.getloadavg()[1]  # what else the machine is doing
    kinds = (("float32", True), ("float32", False), ("bfloat16", False))
    results = [
        measure(grid, args.heads, dtype, projections, args.rounds, not args.no_compile)
        for dtype, projections in kinds
        for grid in GRIDS[: args.grids]
    ]
    print_rows(results)
    options = f"--rounds {args.rounds} --heads {args.heads} --grids {args.grids}"
    document = {
        "kind": "vdit_fast.sana_layer",
        "settings": {"seed": 0, "threads": torch.get_num_threads()},
        "load_average_5_min": load,
        "results": results,
        "command": f"python benchmarks/sana_layer.py {options}{' --no-compile' if args.no_compile else ''}",
    }
    write(args.out / "sana_layer.json", document)


if __name__ == "__main__":
    main()
