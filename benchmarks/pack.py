"""Times pack_slices and unpack_slices on this machine beside torch, eager and compiled, and the error of compression.

    python benchmarks/pack.py --rounds 15 --out benchmarks/results/cpu

Contenders take turns within a round and change places from round to round, so that a slow spell of the machine hits all
alike. Times are CPU seconds of the one thread that works; ratios are medians of the rounds' own ratios, with their
minimum and maximum. Errors are those of the demo model's own hidden states behind every block, in one forward.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdit_fast import ops, report
from vdit_fast.demo.model import load_demo_model
from vdit_fast.demo.prompts import embed

BATCH, ROWS, HEADS, DIM, RANKS, WIDTH = 2, 1560, 12, 128, 4, 1536
CUT = [HEADS // RANKS] * RANKS
Contenders = dict[str, Callable[[], Any]]


def run(contenders: Contenders, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every contender in every round."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
        call()
    for turn in range(rounds):
        names = list(contenders)[:: 1 if turn % 2 else -1]
        for name in names:
            start = time.thread_time()
            contenders[name]()
            times[name].append(time.thread_time() - start)
    return times


def torch_pack(*x: Tensor) -> Tensor:
    """The slices of q, k and v for every rank, one behind the other."""
    return torch.cat([part.flatten() for parts in zip(*(t.split(CUT, 2) for t in x), strict=True) for part in parts])


def torch_unpack(buffer: Tensor) -> list[Tensor]:
    """q, k and v of all rows and this rank's heads, from the equal parts of all ranks."""
    parts = buffer.view(RANKS, 3, BATCH, ROWS, HEADS // RANKS, DIM)
    return [parts[:, i].movedim(0, 1).reshape(BATCH, RANKS * ROWS, HEADS // RANKS, DIM) for i in range(3)]


def torch_to_e4m3(x: Tensor) -> Tensor:
    """The same codes and scales, from torch's own conversion."""
    blocks = x.float().unflatten(-1, (-1, 128))
    largest = blocks.abs().amax(-1, keepdim=True)
    power = torch.exp2(torch.ceil(torch.log2(largest / 448).clamp_min(-126)))
    codes = (blocks / power).to(torch.float8_e4m3fn).view(torch.uint8)
    scales = (power.log2() + 127).to(torch.uint8)
    return torch.cat([codes.flatten(), scales.flatten()])


def torch_from_e4m3(buffer: Tensor, like: Tensor) -> Tensor:
    count = like.numel()
    codes = buffer[:count].view(torch.float8_e4m3fn).float().view(*like.shape[:-1], -1, 128)
    scales = torch.exp2(buffer[count : count + count // 128].float() - 127)
    return (codes * scales.view(*codes.shape[:-1], 1)).flatten(-2).to(like.dtype)


def with_compiled(own: Callable[..., Any], other: Callable[..., Any], *arguments: Any) -> Contenders:
    compiled = torch.compile(other, fullgraph=True)
    return {
        "vdit_fast": own,
        "torch": lambda: other(*arguments),
        "torch.compile": lambda: compiled(*arguments),
    }


def problems(dtype: torch.dtype) -> dict[str, tuple[Contenders, int]]:
    """Contenders by problem, the first of each this library's, and the bytes that must move."""
    torch.manual_seed(0)
    qkv = torch.randn(BATCH, ROWS, 3, HEADS, DIM).to(dtype).unbind(2)
    shapes = [(BATCH, RANKS * ROWS, HEADS // RANKS, DIM)] * 3
    buffer = ops.pack_slices(qkv, CUT, 2)
    x = torch.randn(BATCH, ROWS, WIDTH).to(dtype)
    coded, halved = ops.pack_slices(x, compression="e4m3"), ops.pack_slices(x, compression="bf16")
    size, moved = x.element_size(), buffer.numel() * buffer.element_size()
    rows = [ROWS] * RANKS
    found = {
        "q, k, v to ranks": (with_compiled(lambda: ops.pack_slices(qkv, CUT, 2), torch_pack, *qkv), 2 * moved),
        "q, k, v of ranks": (
            with_compiled(lambda: ops.unpack_slices(buffer, shapes, rows), torch_unpack, buffer), 2 * moved
        ),
        "e4m3": (
            with_compiled(lambda: ops.pack_slices(x, compression="e4m3"), torch_to_e4m3, x),
            x.numel() * size + coded.numel(),
        ),
        "of e4m3": (
            with_compiled(
                lambda: ops.unpack_slices(coded, x.shape, compression="e4m3", dtype=dtype), torch_from_e4m3, coded, x
            ),
            x.numel() * size + coded.numel(),
        ),
    }  # fmt: skip
    if dtype is torch.float32:
        found["bf16"] = (
            with_compiled(lambda: ops.pack_slices(x, compression="bf16"), lambda x: x.bfloat16().flatten(), x),
            x.numel() * 4 + halved.numel() * 2,
        )
    return found


def errors() -> list[dict[str, Any]]:
    """Relative error, in the 2-norm and of the largest element, of the demo model's hidden states."""
    model: Any = load_demo_model()
    states: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _m, _i, out: states.append(out.detach())) for block in model.blocks]
    torch.manual_seed(0)
    text = embed("red circle right, blue square up")[None]
    with torch.no_grad():
        model(torch.randn(1, 3, 24, 64, 64), torch.tensor([500.0]), text, return_dict=False)
    for hook in hooks:
        hook.remove()
    found = []
    for index, x in enumerate(states):
        for compression, block in (("bf16", 128), ("e4m3", 128), ("e4m3", 32)):
            how: dict[str, Any] = {"compression": compression, "block": block}
            buffer = ops.pack_slices(x, **how)
            y = ops.unpack_slices(buffer, x.shape, dtype=torch.float32, **how)
            found.append({
                "behind block": index, **how, "bytes per number": buffer.numel() * buffer.element_size() / x.numel(),
                "error": float((y - x).norm() / x.norm()), "largest": float((y - x).abs().max() / x.abs().max()),
            })  # fmt: skip
    return found


def main() -> None:
    ap = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    ap.add_argument("--rounds", type=int, default=15)
    ap.add_argument("--out", type=Path, default=Path("outputs/bench"))
    args = ap.parse_args()
    torch.set_num_threads(1)
    results, rows = [], []
    for dtype in (torch.float32, torch.bfloat16):
        name_of = str(dtype).removeprefix("torch.")
        for name, (contenders, moved) in problems(dtype).items():
            times = run(contenders, args.rounds)
            own = times["vdit_fast"]
            result: dict[str, Any] = {"problem": name, "dtype": name_of, "bytes": moved, "seconds": times}
            cells = [name, name_of, report.format_seconds(statistics.median(own))]
            cells.append(f"{moved / statistics.median(own) / 1e9:.1f} GB/s")
            for other in ("torch", "torch.compile"):
                ratios = [b / a for a, b in zip(own, times[other], strict=True)]
                middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
                result[other] = {"ratio": middle, "ratio_min": low, "ratio_max": high}
                cells += [
                    report.format_seconds(statistics.median(times[other])),
                    report.format_ratio(middle, low, high),
                ]
            results.append(result)
            rows.append(tuple(cells))
    heads = ("problem", "", "vdit_fast", "", "torch", "over vdit_fast", "compiled", "over vdit_fast")
    print(report.table(rows, heads))
    lost = errors()
    for how in (("bf16", 128), ("e4m3", 128), ("e4m3", 32)):
        some = [e for e in lost if (e["compression"], e["block"]) == how]
        worst = max(e["error"] for e in some), max(e["largest"] for e in some)
        size = f"{some[0]['bytes per number']:.4f} bytes per number"
        print(f"{how[0]} of {how[1]}: {size}, error {worst[0]:.5f} of the norm, {worst[1]:.5f} of the largest")
    document = {
        "kind": "vdit_fast.pack_bench",
        "version": 1,
        "settings": {
            "batch": BATCH, "rows": ROWS, "heads": HEADS, "dim": DIM, "ranks": RANKS, "width": WIDTH,
            "rounds": args.rounds, "threads": 1, "clock": "CPU seconds of the working thread",
        },
        "results": results,
        "errors": lost,
        "command": f"python benchmarks/pack.py --rounds {args.rounds}",
        "environment": report.environment(),
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    print("written:", report.write_json(args.out / "pack.json", document))


if __name__ == "__main__":
    main()
