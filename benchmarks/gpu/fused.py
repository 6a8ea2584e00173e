"""Section "fused": the memory-bound operators beside the models' own chains, eager and compiled, at the models' sizes.

python -m benchmarks.gpu.fused --out DIR --device cuda --until EPOCH NAME...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from benchmarks import adaln, cache, kv_cache, linear_attention, pack, qk_norm_rope, short_attention
from torch import Tensor

from . import machine, timing
from .items import arguments, guarded
from .store import Store
from .supervise import Journal
from .timing import FULL, QUICK

SECTION = "fused"

Calls = dict[str, Callable[[], Any]]
OWN, OWN_EAGER, TORCH, COMPILED = "vdit_fast", "vdit_fast, eager rounding", "torch", "torch.compile"


@dataclass(frozen=True)
class Case:
    """One operator at one model's size.

    ``shape``: (rows, width), (tokens,) of a sequence or of a frame, linear attention's (heads, tokens, dim), short
    attention's four sizes, or those of ``pack.Size``.
    """

    operator: str
    model: str
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.operator}/{self.model}"


FULL_CASES = (
    *(Case(op, chain, (75_600, 5120)) for op in adaln.OPERATORS for chain in ("wan", "hunyuan_video")),
    *(Case("cache", name, (75_600, 5120)) for name in ("update, order 1", "three modules, order 1")),
    *(
        Case("cache", name, (75_600, 5120))
        for name in ("update, order 1, e4m3", "three modules in place, order 1, e4m3")
    ),
    Case("qk_norm_rope", "Wan 14B", (75_600,)),
    Case("qk_norm_rope", "HunyuanVideo", (118_800,)),
    Case("qk_norm_rope", "CogVideoX 5B", (17_550,)),
    Case("qk_norm_rope", "LTX 0.9", (13_376,)),
    Case("qk_norm_rope", "Mochi", (44_520,)),
    Case("qk_norm_rope", "Cosmos 7B", (56_320,)),
    *(Case("kv_cache", case.name, (kv_cache.PAGE,)) for case in kv_cache.NAMED.values() if case.capacity == 21),
    Case("linear_attention", "Wan 14B", (40, 75_600, 128)),
    Case("linear_attention", "Wan 1.3B", (12, 32_760, 128)),
    *(Case("pack", problem, (2, 9450, 40, 128, 8)) for problem in pack.PROBLEMS[:4]),  # Wan 14B at 720p on 8 ranks
    Case("short_attention", "Stable Video Diffusion", (25, 18_432, 5, 64)),
    Case("short_attention", "AnimateDiff, 320 wide", (16, 8192, 8, 40)),
    Case("short_attention", "Latte", (16, 2048, 16, 72)),
)
QUICK_CASES = (
    Case("cache", "three modules, order 1", (50, 64)),
    Case("cache", "update, order 1, e4m3", (50, 64)),
    Case("cache", "three modules in place, order 1, e4m3", (50, 64)),
    Case("gate_residual_norm", "wan", (50, 64)),
    Case("qk_norm_rope", "HunyuanVideo", (40,)),
    Case("kv_cache", "roll, 21 frames", (16,)),
    Case("linear_attention", "Wan 1.3B", (2, 100, 64)),
    *(Case("pack", problem, (1, 16, 4, 128, 2)) for problem in pack.PROBLEMS[:4]),
    Case("short_attention", "Latte", (5, 12, 2, 24)),
)


def cases(quick: bool) -> tuple[Case, ...]:
    return QUICK_CASES if quick else FULL_CASES


def item_name(case: Case) -> str:
    return f"{SECTION}/{case.name}"


def journal_path(folder: Path) -> Path:
    return folder / "logs" / "fused.journal"


def build(case: Case, device: str) -> tuple[int, Calls]:
    """Bytes that must be moved, and the calls; everything in bf16."""
    if case.operator == "qk_norm_rope":
        family = next(family for family in qk_norm_rope.FAMILIES if family.name == case.model)
        moved, calls = qk_norm_rope.build(replace(family, tokens=case.shape[0]), device)
        names = (qk_norm_rope.FUSED, "fused, eager rounding", qk_norm_rope.EAGER, qk_norm_rope.COMPILED)
    elif case.operator == "short_attention":
        frames, places, heads, dim = case.shape
        moved = 4 * frames * places * heads * dim * 2
        calls = short_attention.contenders((frames, places, heads, dim), torch.bfloat16, device)
        prefix = "frames first: "
        names = (prefix + "short_attention", "", prefix + "torch", prefix + "torch.compile")
    elif case.operator == "cache":
        rows, width = case.shape
        moved, calls = cache.contenders(
            replace(cache.NAMED[case.model], rows=rows, width=width), torch.bfloat16, device
        )
        names = (cache.OWN, "", cache.TORCH, cache.COMPILED)
    elif case.operator == "kv_cache":
        moved, calls = kv_cache.contenders(kv_cache.NAMED[case.model], torch.bfloat16, device, case.shape[0])
        names = (kv_cache.OWN, "", kv_cache.TORCH, kv_cache.COMPILED)
    elif case.operator == "pack":
        moved, calls = pack.contenders(case.model, pack.Size(*case.shape), torch.bfloat16, device)
        names = (pack.OWN, "", pack.TORCH, pack.COMPILED)
    elif case.operator == "linear_attention":
        heads, tokens, dim = case.shape
        moved = 4 * heads * tokens * dim * 2
        calls = linear_attention.contenders(heads, tokens, dim, torch.bfloat16, device=device)
        names = (linear_attention.OWN, "", linear_attention.EAGER, linear_attention.COMPILED)
    else:
        chain = getattr(adaln, case.model)
        rows, width = case.shape
        moved, calls = adaln.contenders(chain, case.operator, width, rows, torch.bfloat16, device)
        names = ("fast", "eager rounding", "torch", "torch.compile")
    own = dict(zip((OWN, OWN_EAGER, TORCH, COMPILED), names, strict=True))
    if device != "cuda":
        own.pop(COMPILED)  # minutes of compiling, for a run that only tries the suite out
    return moved, {name: calls[key] for name, key in own.items() if key}


def difference(got: Any, want: Any) -> float:
    """Largest relative difference of the tensors that both calls return, in a list those that codes and scales stand
    for."""
    pairs = [(a, b) for a, b in zip(_tuple(got), _tuple(want), strict=True) if a is not None and b is not None]
    return max(float((a - b).norm() / b.norm()) for a, b in [(_value(a), _value(b)) for a, b in pairs])


def limit(case: Case) -> float:
    """Of the difference between the contenders."""
    if case.operator == "cache" and case.model.startswith("update") and cache.NAMED[case.model].coded:
        # Both sides round to e4m3, each with its own scales. Codes in [2^e, 2^(e + 1)) are 2^(e - 3) apart, so an
        # error's rms is 2^(e - 3) / sqrt(12), at most 2^-3 / sqrt(12) of a number; two independent ones, times sqrt(2).
        return 2**-3 / 6**0.5
    return 2e-2


def _tuple(result: Any) -> tuple[Any, ...]:
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def _value(result: Any) -> Tensor:
    if isinstance(result, tuple):
        codes, scales = result
        return codes.double() * scales
    return result.double()


def measure(case: Case, device: str, quick: bool) -> tuple[dict[str, Any], str | None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    with torch.no_grad():
        moved, calls = build(case, device)
        found = difference(calls[OWN](), calls[TORCH]())
        times = timing.interleaved(calls, QUICK if quick else FULL, device)
    contenders = {}
    for name, series in times.items():
        contenders[name] = timing.summary(series)
        contenders[name]["tb_per_s"] = moved / contenders[name]["ms"] / 1e9
        if name != OWN:
            contenders[name]["ratio"] = timing.ratio(series, times[OWN])
    result = {"bytes": moved, "difference": found, "contenders": contenders}
    return result, None if found < limit(case) else f"differs from the model's own chain by {found:.3g}"


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    store, journal = Store(args.out, machine.identity(args.device)), Journal(journal_path(args.out))
    table = {case.name: case for case in cases(args.quick)}
    for name in args.names:
        case = table[name]
        spec = asdict(case) | {"shape": list(case.shape)}
        guarded(
            item_name(case), spec, store, journal, args, 20, lambda case=case: measure(case, args.device, args.quick)
        )


if __name__ == "__main__":
    main()
