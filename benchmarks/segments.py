"""What tokens beside the video cost attention on a CPU: memory rows, dense or sparse, and segments that are shared.

    python benchmarks/segments.py --rounds 5 --out benchmarks/results/cpu

"memory": one head of Wan 2.1 1.3B at 480p (32,760 tokens, 128 channels) with and without M rows of memory, as a segment
and concatenated, dense and over a plan of a quarter of the blocks; expected are (N + M)/N and (d·N + M)/(d·N).
"chunks": a long clip at once, or in overlapping chunks that read 512 interface tokens, which are one segment for all of
them or copied for each. Contenders run in turn within a round; ratios are medians of the rounds' own ratios with their
minimum and maximum.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from typing import Any

import torch
from harness import in_turns, parser
from torch import Tensor

from vdit_fast import AttentionPlan, attention, report
from vdit_fast.segments import Chunks

TOKENS, DIM, MEMORY, DENSITY, BLOCK = 32_760, 128, (256, 512, 1000, 2000), 0.25, 64
CLIP = {"frames": 44, "length": 20, "overlap": 8, "tokens": 512}
Contenders = dict[str, Callable[[], Any]]


def rows(length: int, batch: int = 1, heads: int = 1) -> Tensor:
    return torch.randn(batch, length, heads, DIM)


def quarter(tokens: int) -> AttentionPlan:
    """A plan of a quarter of the blocks of 64, the same number in every row."""
    blocks = -(-tokens // BLOCK)
    keep = torch.zeros(blocks, blocks, dtype=torch.bool)
    keep.scatter_(1, torch.rand(blocks, blocks).argsort(1)[:, : round(DENSITY * blocks)], True)
    return AttentionPlan.from_block_mask(keep, BLOCK, BLOCK, lq=tokens, lk=tokens)


def memory(tokens: int, rounds: int) -> list[dict[str, Any]]:
    q, k, v = (rows(tokens) for _ in range(3))
    found = []
    for name, plan in (("dense", None), ("sparse", quarter(tokens))):
        extra = {m: (rows(m), rows(m)) for m in MEMORY}
        contenders: Contenders = {"none": lambda plan=plan: attention(q, k, v, plan)}
        for m, pair in extra.items():
            contenders[f"segment of {m}"] = lambda pair=pair, plan=plan: attention(q, k, v, plan, segments=[pair])
        if plan is None:
            joint = [torch.cat([x, y], 1) for x, y in zip((k, v), extra[1000], strict=True)]
            contenders["1000 concatenated"] = lambda joint=joint: attention(q, *joint)
        keys = tokens if plan is None else tokens * float(plan.density)
        expected = {f"segment of {m}": 1 + m / keys for m in MEMORY} | {"1000 concatenated": 1 + 1000 / keys}
        found += listed(f"memory, {name}", in_turns(contenders, rounds, warm=1), expected)
    return found


def chunks(tokens_per_frame: int, rounds: int) -> list[dict[str, Any]]:
    cut = Chunks(CLIP["frames"], CLIP["length"], CLIP["overlap"])
    whole, part = CLIP["frames"] * tokens_per_frame, CLIP["length"] * tokens_per_frame
    long, short = [rows(whole) for _ in range(3)], [rows(part, cut.count) for _ in range(3)]
    z = rows(CLIP["tokens"]), rows(CLIP["tokens"])
    copied = tuple(x.repeat(cut.count, 1, 1, 1) for x in z)
    expanded = tuple(x.expand(cut.count, -1, -1, -1) for x in z)
    contenders: Contenders = {
        "the clip at once": lambda: attention(*long),
        "chunks alone": lambda: attention(*short),
        "chunks, one segment": lambda: attention(*short, segments=[z]),
        "chunks, segment of stride 0": lambda: attention(*short, segments=[expanded]),
        "chunks, copied segment": lambda: attention(*short, segments=[copied]),
    }
    pairs = {name: cut.count * part * (part + CLIP["tokens"]) / whole**2 for name in list(contenders)[2:]}
    pairs["chunks alone"] = cut.count * part**2 / whole**2
    found = listed("chunks", in_turns(contenders, rounds, warm=1), pairs)
    for item in found:
        item["segment_bytes"] = sum(x.nbytes for x in copied) if "copied" in item["name"] else sum(x.nbytes for x in z)
    return found


def listed(part: str, seconds: dict[str, list[float]], expected: dict[str, float]) -> list[dict[str, Any]]:
    base = next(iter(seconds))
    found = []
    for name, spent in seconds.items():
        ratios = [b / a for a, b in zip(seconds[base], spent, strict=True)]
        found.append({
            "part": part, "name": name, "seconds": spent, "median_seconds": statistics.median(spent),
            "ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)],
            "expected_ratio": expected.get(name, 1.0),
        })  # fmt: skip
    return found


def main() -> None:
    ap = parser(__doc__, rounds=5)
    ap.add_argument("--tokens", type=int, default=TOKENS)
    ap.add_argument("--frame", type=int, default=240, help="tokens of a frame of the clip in chunks")
    ap.add_argument("--threads", type=int, default=1)
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    results = memory(args.tokens, args.rounds) + chunks(args.frame, args.rounds)
    table = [
        (f"{r['part']}: {r['name']}", f"{r['median_seconds']:.3f} s", f"{r['ratio']:.3f}",
         "{:.3f} - {:.3f}".format(*r["ratio_range"]), f"{r['expected_ratio']:.3f}")
        for r in results
    ]  # fmt: skip
    print(report.table(table, ("", "seconds", "ratio", "range", "by keys read")))
    document = {
        "kind": "vdit_fast.segments_bench",
        "version": 1,
        "settings": {
            "tokens": args.tokens, "dim": DIM, "heads": 1, "dtype": "float32", "threads": args.threads,
            "rounds": args.rounds, "density": DENSITY, "block": BLOCK, "clip": CLIP, "tokens_per_frame": args.frame,
        },
        "results": results,
        "command": f"python benchmarks/segments.py --rounds {args.rounds} --tokens {args.tokens} --frame {args.frame}",
        "environment": report.environment() | {"omp_num_threads": os.environ.get("OMP_NUM_THREADS")},
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    print("written:", report.write_json(args.out / "segments.json", document))


if __name__ == "__main__":
    main()
