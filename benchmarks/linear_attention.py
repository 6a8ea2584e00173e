"""Linear attention on a CPU beside plain torch, eager and compiled, and beside dense attention of the same length.

    python benchmarks/linear_attention.py --part speed --out benchmarks/results/cpu
    python benchmarks/linear_attention.py --part exact --out benchmarks/results/cpu

"speed": hedgehog with a weight per head, one head of growing length, then the other maps at one length; contenders
run in turn in one process, so that a slow spell of the machine hits all alike, and ratios are medians of the rounds'
own ratios with their minimum and maximum. Dense attention of more than 8k tokens runs once, torch.compile of 16k tokens
only. In bfloat16, which takes plain torch very long on a CPU without bfloat16 arithmetic, torch runs up to 16k tokens
and dense attention not at all.

"exact": 40 heads of 75,600 tokens and 128 channels, four heads at a time for their memory, against the explicit matrix
of weights in fp64 on sampled rows; plain torch beside it on the first four heads.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
from harness import parser, write
from torch import Tensor

from vdit_fast import linear_attention, reference, report

LENGTHS = (8192, 16384, 32768, 65536)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DENSE_EVERY_ROUND = 8192
COMPILED_AT = 16384
OWN, EAGER, COMPILED, DENSE = "linear_attention", "torch", "torch.compile", "dense attention (torch SDPA)"
EXACT = (40, 75_600, 128)  # heads, tokens, dim


def _features(x: Tensor, feature_map: str, weight: Tensor | None) -> Tensor:
    if feature_map == "hedgehog":
        y = x if weight is None else x @ weight
        return torch.cat((y.softmax(-1), (-y).softmax(-1)), -1)
    return {"relu": torch.relu, "elu": lambda x: functional.elu(x) + 1, "identity": lambda x: x}[feature_map](x)


def eager(
    q: Tensor, k: Tensor, v: Tensor, feature_map: str, q_weight: Tensor | None, k_weight: Tensor | None
) -> Tensor:
    """Plain torch in the tokens' dtype, [B, N, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    phi_q, phi_k = _features(q, feature_map, q_weight), _features(k, feature_map, k_weight)
    state, sums = phi_k.mT @ v, phi_k.sum(-2, dtype=torch.float32).to(q.dtype)
    out = (phi_q @ state) / ((phi_q @ sums.unsqueeze(-1)) + 1e-15)
    return out.transpose(1, 2)


def draw(
    heads: int,
    length: int,
    dim: int,
    dtype: torch.dtype,
    feature_map: str = "hedgehog",
    device: str = "cpu",
    seed: int = 0,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """q, k, v [1, length, heads, dim] and both weights."""
    g = torch.Generator().manual_seed(seed)
    tokens = [torch.randn(1, length, heads, dim, generator=g).to(device, dtype) for _ in range(3)]
    if feature_map != "hedgehog":
        return [x.abs() for x in tokens[:2]] + tokens[2:], [None, None]
    return tokens, [(1.5 * dim**-0.5 * torch.randn(heads, dim, dim, generator=g)).to(device, dtype) for _ in range(2)]


def contenders(
    heads: int, length: int, dim: int, dtype: torch.dtype, feature_map: str = "hedgehog", device: str = "cpu"
) -> dict[str, Callable[[], Any]]:
    (q, k, v), (wq, wk) = draw(heads, length, dim, dtype, feature_map, device)
    compiled = torch.compile(eager, dynamic=False, fullgraph=True)
    dense = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    return {
        OWN: lambda: linear_attention(q, k, v, feature_map=feature_map, q_weight=wq, k_weight=wk),
        EAGER: lambda: eager(q, k, v, feature_map, wq, wk),
        COMPILED: lambda: compiled(q, k, v, feature_map, wq, wk),
        DENSE: lambda: functional.scaled_dot_product_attention(*dense),
    }


def flops(length: int, dim: int, feature_map: str) -> float:
    """Products of one head, a multiply-add being two."""
    features = 2 * dim if feature_map == "hedgehog" else dim
    projections = 4.0 * dim * dim if feature_map == "hedgehog" else 0.0
    return length * (projections + 4.0 * features * dim)


def measure(heads: int, length: int, dim: int, dtype: str, feature_map: str, rounds: int) -> dict[str, Any]:
    torch._dynamo.reset()
    calls = contenders(heads, length, dim, DTYPES[dtype], feature_map)
    if length != COMPILED_AT or feature_map != "hedgehog":
        calls.pop(COMPILED)
    if dtype == "bfloat16" and length > COMPILED_AT:
        calls.pop(EAGER)
    if dtype == "bfloat16" or feature_map != "hedgehog":
        calls.pop(DENSE)
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for round_ in range(-1, rounds):  # the first warms up
            for name, call in calls.items():
                if name == DENSE and (round_ < 0 or (length > DENSE_EVERY_ROUND and round_ > 0)):
                    continue
                start = time.perf_counter()
                call()
                if round_ >= 0:
                    times[name].append(time.perf_counter() - start)
    rows = []
    for name, seconds in times.items():
        if not seconds:
            continue
        ratios = [a / b for a, b in zip(seconds, times[OWN], strict=False)]
        rows.append({
            "name": name,
            "seconds": statistics.median(seconds),
            "min": min(seconds),
            "max": max(seconds),
            "runs": len(seconds),
            "of_own": statistics.median(ratios),
            "of_own_min": min(ratios),
            "of_own_max": max(ratios),
        })  # fmt: skip
    own = rows[0]["seconds"]
    return {
        "heads": heads, "length": length, "dim": dim, "dtype": dtype, "feature_map": feature_map, "rows": rows,
        "gflops": heads * flops(length, dim, feature_map) / own / 1e9, "ns_per_token": own / length / heads * 1e9,
    }  # fmt: skip


def exponent(results: list[dict[str, Any]]) -> float:
    """Slope of log(seconds) over log(length) by least squares; 1 is linear."""
    points = [(math.log(r["length"]), math.log(r["rows"][0]["seconds"])) for r in results]
    x, y = (statistics.fmean(p[i] for p in points) for i in (0, 1))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


def exactness(dtype: str, heads: int, length: int, dim: int, at_once: int = 4, sampled: int = 64) -> dict[str, Any]:
    """Largest and root-mean-square error on sampled rows of every head, and the same of plain torch."""
    rows = torch.linspace(0, length - 1, sampled).long()
    worst, squares, truth = ({OWN: 0.0, EAGER: 0.0} for _ in range(3))
    seconds = 0.0
    for first in range(0, heads, at_once):
        (q, k, v), (wq, wk) = draw(min(at_once, heads - first), length, dim, DTYPES[dtype], seed=1 + first)
        start = time.perf_counter()
        out = linear_attention(q, k, v, q_weight=wq, k_weight=wk)
        seconds += time.perf_counter() - start
        found = {OWN: out[:, rows].double()}
        if first == 0:
            found[EAGER] = eager(q, k, v, "hedgehog", wq, wk)[:, rows].double()
        for h in range(q.shape[2]):
            weights = {"q_weight": wq[h].double(), "k_weight": wk[h].double()}  # type: ignore[index]
            head = (x[:, :, h : h + 1] for x in (q[:, rows], k, v))
            want = reference.linear_attention(*(x.double() for x in head), **weights)[:, :, 0]
            for name, got in found.items():
                difference = got[:, :, h] - want
                worst[name] = max(worst[name], float(difference.abs().max()))
                squares[name] += float(difference.square().sum())
                truth[name] += float(want.square().sum())
    return {
        "dtype": dtype, "heads": heads, "length": length, "dim": dim, "rows_per_head": sampled, "seconds": seconds,
        "rms_of_result": math.sqrt(truth[OWN] / (heads * sampled * dim)),
        **{f"max_error: {name}": x for name, x in worst.items()},
        **{f"relative_error: {name}": math.sqrt(x / truth[name]) for name, x in squares.items()},
    }  # fmt: skip


def print_speed(title: str, results: list[dict[str, Any]]) -> None:
    print(f"\n{title}, {torch.get_num_threads()} threads")
    table = []
    for r in results:
        by_name = {row["name"]: row for row in r["rows"]}
        table.append((
            f"{r['heads']}x{r['length']}x{r['dim']} {r['feature_map']}",
            r["dtype"],
            report.format_seconds(r["rows"][0]["seconds"]),
            f"{r['ns_per_token']:.0f}",
            f"{r['gflops']:.0f}",
            *(f"{w['of_own']:.2f} ({w['of_own_min']:.2f}-{w['of_own_max']:.2f})" if w else "-"
              for w in (by_name.get(n) for n in (EAGER, COMPILED, DENSE))),
        ))  # fmt: skip
    print(report.table(table, ("", "dtype", "own", "ns/token", "GFLOP/s", EAGER, COMPILED, DENSE)))


def speed_part(rounds: int) -> dict[str, Any]:
    speed = [
        measure(1, length, dim, dtype, "hedgehog", rounds)
        for dim in (64, 128)
        for dtype in DTYPES
        for length in LENGTHS
    ]
    print_speed("Hedgehog, growing length", speed)
    growth = []
    for dim, dtype in sorted({(r["dim"], r["dtype"]) for r in speed}):
        power = exponent([r for r in speed if (r["dim"], r["dtype"]) == (dim, dtype)])
        growth.append({"dim": dim, "dtype": dtype, "exponent": power})
        print(f"seconds grow with length to the power {power:.3f}: dim {dim}, {dtype}")
    maps = [
        measure(2, COMPILED_AT, dim, "float32", feature_map, rounds)
        for feature_map in ("relu", "elu", "identity")
        for dim in (64, 112)
    ]
    print_speed("Other maps", maps)
    return {"speed": speed, "growth": growth, "maps": maps}


def exact_part(heads: int) -> dict[str, Any]:
    exact = [exactness(dtype, heads, *EXACT[1:]) for dtype in DTYPES]
    for e in exact:
        print(f"\n{e['heads']} x {e['length']} x {e['dim']}, {e['dtype']}: {report.format_seconds(e['seconds'])}")
        for name in (OWN, EAGER):
            print(f"  {name}: max error {e[f'max_error: {name}']:.2e}, relative {e[f'relative_error: {name}']:.2e}")
    return {"exact": exact}


def main() -> None:
    ap = parser(__doc__)
    ap.add_argument("--part", choices=("speed", "exact"), default="speed")
    ap.add_argument("--rounds", type=int, default=7, help="of the part 'speed'")
    ap.add_argument("--heads", type=int, default=EXACT[0], help="of the part 'exact'")
    args = ap.parse_args()
    load = os.getloadavg()[1]  # what else the machine is doing
    speed = args.part == "speed"
    option = f"--rounds {args.rounds}" if speed else f"--heads {args.heads}"
    document = {
        "kind": "vdit_fast.linear_attention",
        "settings": {"seed": 0, "threads": torch.get_num_threads()},
        "load_average_5_min": load,
        **(speed_part(args.rounds) if speed else exact_part(args.heads)),
        "command": f"python benchmarks/linear_attention.py --part {args.part} {option}",
    }
    name = "linear_attention.json" if speed else "linear_attention_exact.json"
    write(args.out / name, document)


if __name__ == "__main__":
    main()
