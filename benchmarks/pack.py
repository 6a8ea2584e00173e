"""Times pack_slices and unpack_slices on this machine beside torch, eager and compiled, and the error of compression.

    python benchmarks/pack.py --rounds 15 --out benchmarks/results/cpu

Contenders take turns within a round and change places from round to round, so that a slow spell of the machine hits all
alike. Times are CPU seconds of the one thread that works; ratios are medians of the rounds' own ratios, with their
minimum and maximum. Errors are those of the demo model's own hidden states behind every block, in one forward.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from harness import parser, write
from torch import Tensor

from vdit_fast import ops, report
from vdit_fast.demo.model import load_demo_model
from vdit_fast.demo.prompts import embed

Contenders = dict[str, Callable[[], Any]]
OWN, TORCH, COMPILED = "vdit_fast", "torch", "torch.compile"


@dataclass(frozen=True)
class Size:
    """Rows of a rank, heads that the ranks divide."""

    batch: int = 2
    rows: int = 1560
    heads: int = 12
    dim: int = 128
    ranks: int = 4

    @property
    def cut(self) -> list[int]:
        return [self.heads // self.ranks] * self.ranks


def run(calls: Contenders, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every contender in every round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
        call()
    for turn in range(rounds):
        names = list(calls)[:: 1 if turn % 2 else -1]
        for name in names:
            start = time.thread_time()
            calls[name]()
            times[name].append(time.thread_time() - start)
    return times


def torch_pack(size: Size, *x: Tensor) -> Tensor:
    """The slices of q, k and v for every rank, one behind the other."""
    parts = zip(*(t.split(size.cut, 2) for t in x), strict=True)
    return torch.cat([part.flatten() for of_rank in parts for part in of_rank])


def torch_unpack(size: Size, buffer: Tensor) -> list[Tensor]:
    """q, k and v of all rows and this rank's heads, from the equal parts of all ranks."""
    parts = buffer.view(size.ranks, 3, size.batch, size.rows, size.heads // size.ranks, size.dim)
    return [parts[:, i].movedim(0, 1).flatten(1, 2) for i in range(3)]


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


def torch_to_bf16(x: Tensor) -> Tensor:
    return x.bfloat16().flatten()


PROBLEMS = ("q, k, v to ranks", "q, k, v of ranks", "to e4m3", "from e4m3", "to bf16")


def contenders(problem: str, size: Size, dtype: torch.dtype, device: str = "cpu") -> tuple[int, Contenders]:
    """The bytes that must move, and who moves them."""
    own: Callable[[], Any]
    other: Callable[..., Any]
    given: tuple[Any, ...]
    if problem in PROBLEMS[:2]:
        whole = torch.randn(size.batch, size.rows, 3, size.heads, size.dim, device=device).to(dtype)
        qkv = whole.unbind(2)
        buffer = ops.pack_slices(qkv, size.cut, 2)
        moved = 2 * buffer.numel() * buffer.element_size()
        if problem == PROBLEMS[0]:
            own, other, given = lambda: ops.pack_slices(qkv, size.cut, 2), partial(torch_pack, size), qkv
        else:
            shapes = [(size.batch, size.ranks * size.rows, size.heads // size.ranks, size.dim)] * 3
            own = lambda: ops.unpack_slices(buffer, shapes, [size.rows] * size.ranks)  # noqa: E731
            other, given = partial(torch_unpack, size), (buffer,)
    else:
        x = torch.randn(size.batch, size.rows, size.heads * size.dim, device=device).to(dtype)
        coded = ops.pack_slices(x, compression="bf16" if problem == "to bf16" else "e4m3")
        moved = x.numel() * x.element_size() + coded.numel() * coded.element_size()
        if problem == "to e4m3":
            own, other, given = lambda: ops.pack_slices(x, compression="e4m3"), torch_to_e4m3, (x,)
        elif problem == "from e4m3":
            own = lambda: ops.unpack_slices(coded, x.shape, compression="e4m3", dtype=dtype)  # noqa: E731
            other, given = torch_from_e4m3, (coded, x)
        else:
            own, other, given = lambda: ops.pack_slices(x, compression="bf16"), torch_to_bf16, (x,)
    compiled = torch.compile(other, fullgraph=True)
    return moved, {OWN: own, TORCH: lambda: other(*given), COMPILED: lambda: compiled(*given)}


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
    args = parser(__doc__, rounds=15).parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    size, results, rows = Size(), [], []
    for dtype in (torch.float32, torch.bfloat16):
        name_of = str(dtype).removeprefix("torch.")
        for name in PROBLEMS:
            if name == "to bf16" and dtype is torch.bfloat16:
                continue
            moved, calls = contenders(name, size, dtype)
            times = run(calls, args.rounds)
            own = times[OWN]
            result: dict[str, Any] = {"problem": name, "dtype": name_of, "bytes": moved, "seconds": times}
            cells = [name, name_of, report.format_seconds(statistics.median(own))]
            cells.append(f"{moved / statistics.median(own) / 1e9:.1f} GB/s")
            for other in (TORCH, COMPILED):
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
        held = f"{some[0]['bytes per number']:.4f} bytes per number"
        print(f"{how[0]} of {how[1]}: {held}, error {worst[0]:.5f} of the norm, {worst[1]:.5f} of the largest")
    document = {
        "kind": "vdit_fast.pack_bench",
        "version": 1,
        "settings": {
            **asdict(size), "rounds": args.rounds, "threads": 1, "clock": "CPU seconds of the working thread",
        },
        "results": results,
        "errors": lost,
        "command": f"python benchmarks/pack.py --rounds {args.rounds}",
    }  # fmt: skip
    write(args.out / "pack.json", document)


if __name__ == "__main__":
    main()
