"""Layers that compute what a router chose, on a CPU: beside the same layers that compute everything, and beside loops.

    python benchmarks/experts.py --out benchmarks/results/cpu

Experts: `GroupedExperts` beside the loop of the released code (argsort, one SwiGLU per expert, scatter-add), the dense
mixture (every expert for every token, weights of the others 0), and one token after another. `combine_rows` beside the
torch operators it replaces, eager and compiled. DyDiT's layers beside the same layers with masks. All contenders run in
turn in one process, on one thread, and CPU time is counted: on a shared machine the wall clock of threads that wait for
each other mostly measures the neighbours. Ratios are medians of the rounds' own ratios, with their minimum and maximum.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from harness import in_turns, parser, write
from torch import Tensor
from torch.nn.functional import silu

from vdit_fast import report
from vdit_fast.dynamic import DynamicAttention, DynamicMlp, GroupedExperts, TokenSubset, Units, group_by_expert, route
from vdit_fast.ops import combine_rows

Calls = dict[str, Callable[[], Any]]

# C, H, experts; DiT-MoE S and B with 1024 tokens (512 x 512)
EXPERTS = {"DiT-MoE S": (384, 1536, 8), "DiT-MoE B": (768, 3072, 8), "DiT-MoE S, 16 experts": (384, 1536, 16)}
TOKENS = 1024
LOOPED = 32  # tokens of the loop over tokens, whose time is scaled up
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (x @ gate_up.T).chunk(2, -1)
    return (silu(gate) * up) @ down.T


def released(layer: GroupedExperts, x: Tensor) -> Tensor:
    """The order of operations of the released inference code."""
    experts, weights = route(layer.gate(x), layer.top_k)
    flat, weights = experts.flatten().long(), weights.to(x.dtype).flatten()[:, None]
    order = flat.argsort()
    ends = flat.bincount(minlength=len(layer.down)).cumsum(0).tolist()
    tokens, out, start = order // layer.top_k, torch.zeros_like(x), 0
    for e, end in enumerate(ends):
        if end > start:
            own = tokens[start:end]
            rows = swiglu(x[own], layer.gate_up[e], layer.down[e]) * weights[order[start:end]]
            out.scatter_reduce_(0, own[:, None].expand(-1, x.shape[1]), rows, reduce="sum")
        start = end
    assert layer.shared_experts is not None
    return out + layer.shared_experts(x)


def dense(layer: GroupedExperts, x: Tensor) -> Tensor:
    experts, weights = route(layer.gate(x), layer.top_k)
    full = torch.zeros(len(x), len(layer.down)).scatter_(1, experts.long(), weights).to(x.dtype)
    assert layer.shared_experts is not None
    out = layer.shared_experts(x)
    for e in range(len(layer.down)):
        out = out + full[:, e, None] * swiglu(x, layer.gate_up[e], layer.down[e])
    return out


def by_token(layer: GroupedExperts, x: Tensor) -> Tensor:
    experts, weights = route(layer.gate(x), layer.top_k)
    assert layer.shared_experts is not None
    rows = []
    for token, own, factors in zip(x, experts.tolist(), weights.to(x.dtype), strict=True):
        parts = [w * swiglu(token, layer.gate_up[e], layer.down[e]) for w, e in zip(factors, own, strict=True)]
        rows.append(sum(parts) + layer.shared_experts(token))
    return torch.stack(rows)


def expert_calls(name: str, dtype: torch.dtype) -> Calls:
    dim, hidden, experts = EXPERTS[name]
    layer = GroupedExperts(dim, hidden, experts, 2, shared_hidden=2 * dim, dtype=dtype)
    x = torch.randn(TOKENS, dim).to(dtype)
    return {
        "grouped": lambda: layer(x),
        "released loop": lambda: released(layer, x),
        "dense mixture": lambda: dense(layer, x),
        f"token by token, {LOOPED} of them": lambda: by_token(layer, x[:LOOPED]),
    }


def combine_calls(dim: int, dtype: torch.dtype) -> Calls:
    """The end of a block: two rows per token by weight, the shared expert's, times the gate, and the residual."""
    batch, tokens = 2, 4096
    n = batch * tokens
    experts, weights = route(torch.randn(n, 8), 2)
    groups = group_by_expert(experts, 8)
    rows, base, residual = (torch.randn(count, dim).to(dtype) for count in (2 * n, n, n))
    gate, index, factors = torch.randn(batch, dim).to(dtype), groups.slots.flatten().long(), weights.to(dtype)

    def plain() -> Tensor:
        routed = (rows[index].view(n, 2, dim) * factors[..., None]).sum(1)
        branch = (routed + base).view(batch, tokens, dim)
        return residual.view(batch, tokens, dim) + gate[:, None] * branch

    compiled = torch.compile(plain, dynamic=False, fullgraph=True)
    return {
        "combine_rows": lambda: combine_rows(rows, groups.slots, weights, base=base, residual=residual, gate=gate),
        "eager torch": plain,
        "torch.compile": compiled,
    }


def combine_bytes(dim: int, dtype: torch.dtype) -> dict[str, int]:
    """What the algorithms read and write, in rows of the tensors: fused 2 + 1 + 1 + 1; eager torch gathers (2 + 2),
    weights (2 + 2), sums (2 + 1), adds the base (2 + 1), gates (1 + 1) and adds the residual (2 + 1)."""
    row = 2 * 4096 * dim * dtype.itemsize
    return {"combine_rows": 5 * row, "eager torch": 19 * row}


def width_calls(on: int, dtype: torch.dtype) -> Calls:
    """DyDiT on DiT-XL's layer: 16 heads of 72, hidden 4608, 16 groups."""
    dim, heads, tokens = 1152, 16, 512
    attn, mlp = DynamicAttention(dim, heads, dtype=dtype), DynamicMlp(dim, 4 * dim, heads, dtype=dtype)
    x = torch.randn(1, tokens, dim).to(dtype)
    picked = torch.zeros(heads, dtype=torch.bool)
    picked[torch.randperm(heads)[:on]] = True
    picked[0] = True
    picked[picked.nonzero()[on:].flatten()] = False
    units = Units(tuple(picked.tolist()))
    masks = [picked.to(dtype).repeat_interleave(n) for n in (dim // heads, 4 * dim // heads)]

    def masked_attention() -> Tensor:
        return attn.proj(attn._attend(attn.qkv(x), heads) * masks[0])

    def masked_mlp() -> Tensor:
        return mlp.fc2(mlp.act(mlp.fc1(x) * masks[1]))

    return {
        "attention: cut": lambda: attn(x, units),
        "attention: masked": masked_attention,
        "mlp: cut": lambda: mlp(x, units),
        "mlp: masked": masked_mlp,
    }


def token_calls(share: float, dtype: torch.dtype) -> Calls:
    """The MLP of DiT-XL for some tokens: choosing, gathering and putting back included."""
    dim, tokens = 1152, 512
    mlp, x, residual = DynamicMlp(dim, 4 * dim, 16, dtype=dtype), *torch.randn(2, 1, tokens, dim).to(dtype).unbind()
    selected, gate = torch.rand(1, tokens) < share, torch.randn(1, dim).to(dtype)

    def some() -> Tensor:
        subset = TokenSubset.of(selected)
        assert subset is not None
        return subset.add(residual, mlp(subset.gather(x), None, subset), gate)

    return {
        "tokens: selected": some,
        "tokens: masked": lambda: residual + selected[..., None] * (gate[:, None] * mlp(x)),
    }


def measure(calls: Calls, rounds: int, first: str) -> list[dict[str, Any]]:
    with torch.inference_mode():
        times = in_turns(calls, rounds, time.process_time)
    rows = []
    for name, seconds in times.items():
        own = times[first if first in times else next(n for n in times if n.split(":")[0] == name.split(":")[0])]
        ratios = [a / b for a, b in zip(seconds, own, strict=True)]
        rows.append({
            "name": name, "seconds": statistics.median(seconds), "min": min(seconds), "max": max(seconds),
            "of_first": statistics.median(ratios), "of_first_min": min(ratios), "of_first_max": max(ratios),
        })  # fmt: skip
    return rows


Case = tuple[Callable[[], Calls], str, dict[str, Any]]


def cases() -> dict[str, Case]:
    """(contenders, the first of them, further numbers) by name. 16-bit matrix products are no CPU's strength."""
    f32, found = torch.float32, dict[str, Case]()
    for name in EXPERTS:
        found[f"{name}, {TOKENS} tokens"] = functools.partial(expert_calls, name, f32), "grouped", {}
    for kind, dtype in DTYPES.items():
        for dim in (1152, 2048):
            moved = {"bytes": combine_bytes(dim, dtype)}
            make = functools.partial(combine_calls, dim, dtype)
            found[f"end of a block, 2x4096x{dim}, {kind}"] = make, "combine_rows", moved
    for on in (4, 8, 12):
        found[f"DiT-XL, {on} of 16 on"] = functools.partial(width_calls, on, f32), "", {}
    for share in (0.25, 0.5, 0.75):
        found[f"DiT-XL, {share:.0%} of 512 tokens"] = functools.partial(token_calls, share, f32), "", {}
    return found


def main() -> None:
    ap = parser(__doc__, rounds=9)
    ap.add_argument("--only", default="", help="cases whose name contains this")
    args = ap.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[1]  # what else the machine is doing
    results = []
    for name, (make, first, more) in cases().items():
        if args.only not in name:
            continue
        torch.manual_seed(0)
        torch._dynamo.reset()
        rows = measure(make(), args.rounds, first)
        results.append({"case": name, "rows": rows, **more})
        print(f"\n{name}")
        shown = [
            (
                row["name"],
                report.format_seconds(row["seconds"]),
                f"{row['of_first']:.2f} ({row['of_first_min']:.2f}-{row['of_first_max']:.2f})",
            )
            for row in rows
        ]
        print(report.table(shown, ("", "median CPU time", "of the first")))
    document = {
        "kind": "vdit_fast.experts",
        "settings": {"rounds": args.rounds, "seed": 0, "threads": 1, "clock": "CPU time"},
        "load_average_5_min": load,
        "results": results,
        "command": f"python benchmarks/experts.py --rounds {args.rounds}",
    }
    write(args.out / "experts.json", document)


if __name__ == "__main__":
    main()
