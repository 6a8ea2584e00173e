"""The attention benchmark: this library against torch SDPA in one process, interleaved, medians.

Speeds are given twice: FLOP/s of the dense problem (what a user gains) and FLOP/s that were executed.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

KIND = "vdit_fast.bench"
DENSITIES = (1.0, 0.5, 0.25, 0.1)


@dataclass(frozen=True)
class Shape:
    """One attention problem: batch, heads, sequence length, head dim."""

    batch: int
    heads: int
    length: int
    dim: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read ``"batch x heads x length x dim"``, e.g. ``1x2x4096x64``.

        Raises:
            ValueError: not four positive integers.
        """
        parts = text.lower().replace(",", "x").split("x")
        if len(parts) != 4 or not all(p.strip().isdigit() and int(p) > 0 for p in parts):
            raise ValueError(f"shape: {text!r} is not BATCHxHEADSxLENGTHxDIM; write for example 1x2x4096x64")
        return cls(*(int(p) for p in parts))

    @property
    def flop(self) -> int:
        """FLOP of the dense problem: two matrix products."""
        return 4 * self.batch * self.heads * self.length * self.length * self.dim

    def __str__(self) -> str:
        return f"{self.batch}x{self.heads}x{self.length}x{self.dim}"


SUITES: dict[str, tuple[Shape, ...]] = {
    "quick": (Shape(1, 2, 2048, 64),),
    "demo": (Shape(1, 2, 6144, 64),),
    "cpu": (Shape(1, 2, 6144, 64), Shape(1, 1, 4096, 128), Shape(1, 2, 6144, 128)),
    "wan-1.3b-480p": (Shape(1, 12, 32760, 128),),
    "wan-14b-720p": (Shape(1, 40, 75600, 128),),
    "hunyuan-720p": (Shape(1, 24, 119056, 128),),
    "cogvideox-5b": (Shape(1, 48, 17776, 64),),
}


def run_bench(
    shapes: Sequence[Shape],
    *,
    densities: Sequence[float] = DENSITIES,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    block: int = 64,
    repeats: int = 5,
    seed: int = 0,
    flex: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Time dense and block-sparse attention on random inputs.

    Every contender runs once per round and the rounds repeat, so that a slow spell of the machine hits all alike.

    Args:
        densities: shares of the key blocks that each query block reads, in (0, 1]; 1 is the dense call without a plan.
        block: side of the square blocks.
        repeats: timed rounds after one warm-up round.
        flex: also time compiled FlexAttention on the same blocks at the first density up to 0.25; on a CPU its blocks
            must be multiples of 128. Compiling takes about a minute.

    Returns:
        A JSON-ready document of kind ``vdit_fast.bench``.

    Raises:
        ValueError: a density outside (0, 1], fewer than one repeat, or a block that is not positive.
    """
    for density in densities:
        if not 0 < density <= 1:
            raise ValueError(f"densities: {density}; each must be in (0, 1]")
    if repeats < 1:
        raise ValueError(f"repeats: {repeats}; at least 1 is needed")
    if block < 1:
        raise ValueError(f"block: {block}; must be positive")
    results, done = [], 0
    total = len(shapes) * (repeats + 1)
    for shape in shapes:
        contenders = _contenders(shape, densities, dtype, torch.device(device), block, seed, flex)
        times: dict[str, list[float]] = {row["name"]: [] for row, _ in contenders}
        for round_ in range(repeats + 1):
            for row, call in contenders:
                seconds = _timed(call, torch.device(device))
                if round_:
                    times[row["name"]].append(seconds)
            done += 1
            if progress is not None:
                progress(done, total, f"attention {shape}")
        results.append({"shape": vars(shape) | {"label": str(shape)}, "rows": _rows(contenders, times, shape)})
    return {
        "kind": KIND,
        "version": 1,
        "settings": {
            "dtype": str(dtype).removeprefix("torch."),
            "device": str(device),
            "block": block,
            "repeats": repeats,
            "seed": seed,
            "threads": torch.get_num_threads(),
        },
        "results": results,
    }


def draw(document: dict[str, Any], folder: Path) -> list[Path]:
    """Draw speed-up over density, one curve per shape."""
    from vdit_fast import report

    curves: dict[str, dict[str, list[float]]] = {}
    for result in document["results"]:
        own = sorted((r for r in result["rows"] if r["own"]), key=lambda r: r["density"])
        if len(own) < 2 or "over_own_dense" not in own[0]:
            continue
        curves[result["shape"]["label"]] = {
            "density": [r["density"] for r in own],
            "speedup": [r["over_own_dense"] for r in own],
            "low": [r["over_own_dense_min"] for r in own],
            "high": [r["over_own_dense_max"] for r in own],
        }
    if not curves:
        return []
    return [report.speed_curve(curves, folder / "speed.png", title="speed-up over own dense attention")]


Contender = tuple[dict[str, Any], Callable[[], Any]]


def _contenders(
    shape: Shape,
    densities: Sequence[float],
    dtype: torch.dtype,
    device: torch.device,
    block: int,
    seed: int,
    flex: bool,
) -> list[Contender]:
    from vdit_fast import attention
    from vdit_fast.plan import AttentionPlan

    generator = torch.Generator().manual_seed(seed)
    size = (shape.batch, shape.length, shape.heads, shape.dim)
    q, k, v = (torch.randn(size, generator=generator).to(device, dtype) for _ in range(3))
    qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
    found: list[Contender] = []
    for name, backend in _sdpa_backends(device):
        found.append(({"name": name, "density": 1.0, "own": False}, _sdpa(qt, kt, vt, None, backend)))
    masked = False
    for density in sorted(densities, reverse=True):
        if density == 1:
            found.append(({"name": "vdit_fast dense", "density": 1.0, "own": True}, _own(attention, q, k, v, None)))
            continue
        mask = random_block_mask(shape, density, block, generator)
        plan = AttentionPlan.from_block_mask(mask, block, block, lq=shape.length, lk=shape.length).to(device)
        row = {"name": f"vdit_fast {density:g}", "density": float(plan.density), "asked": density, "own": True}
        found.append((row, _own(attention, q, k, v, plan)))
        if not masked and density <= 0.25 and shape.length**2 * shape.heads * shape.batch <= 2**28:
            masked = True  # its time hardly depends on the density: once is enough
            full = plan.to_mask()
            row = {"name": f"torch SDPA, mask {density:g}", "density": row["density"], "own": False}
            found.append((row, _sdpa(qt, kt, vt, full, None)))
            if flex and (call := _flex(qt, kt, vt, mask.to(device), block)) is not None:
                row = {"name": f"FlexAttention, compiled {density:g}", "density": float(plan.density), "own": False}
                found.append((row, call))
    return found


def _flex(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, block: int
) -> Callable[[], Any] | None:
    """Compiled FlexAttention on these blocks, or None with a warning where it does not compile."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def keep(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return mask[h, i // block, j // block]

    length = q.shape[2]
    blocks = create_block_mask(keep, 1, mask.shape[0], length, length, device=str(q.device), BLOCK_SIZE=block)
    compiled = torch.compile(flex_attention, dynamic=False)
    try:
        with torch.no_grad():
            compiled(q, k, v, block_mask=blocks)
    except Exception as error:  # the compiler's own: without it the other contenders still stand
        warnings.warn(
            f"FlexAttention is left out, it does not compile here: {str(error).splitlines()[0]}", stacklevel=2
        )
        return None
    return lambda: compiled(q, k, v, block_mask=blocks)


def random_block_mask(shape: Shape, density: float, block: int, generator: torch.Generator) -> torch.Tensor:
    """Return bool ``[heads, blocks, blocks]``: every query block reads its own and random other key blocks."""
    n = -(-shape.length // block)
    scores = torch.rand(shape.heads, n, n, generator=generator)
    scores.diagonal(dim1=1, dim2=2).fill_(2.0)
    keep = max(1, round(density * n))
    return torch.zeros(shape.heads, n, n, dtype=torch.bool).scatter_(2, scores.topk(keep, dim=2).indices, True)


def _own(attention: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Any) -> Callable[[], Any]:
    return lambda: attention(q, k, v, plan)


def _sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, backend: Any
) -> Callable[[], Any]:
    from torch.nn.attention import sdpa_kernel

    def call() -> torch.Tensor:
        if backend is None:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return call


def _sdpa_backends(device: torch.device) -> list[tuple[str, Any]]:
    """The default SDPA, and on a GPU the cuDNN one too, which is often twice as fast."""
    from torch.nn.attention import SDPBackend

    found: list[tuple[str, Any]] = [("torch SDPA", None)]
    if device.type == "cuda" and torch.backends.cudnn.is_available():
        found.append(("torch SDPA, cuDNN", SDPBackend.CUDNN_ATTENTION))
    return found


def _timed(call: Callable[[], Any], device: torch.device) -> float:
    with torch.no_grad():
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


def _rows(contenders: list[Contender], times: dict[str, list[float]], shape: Shape) -> list[dict[str, Any]]:
    own = times.get("vdit_fast dense")
    rows = []
    for row, _ in contenders:
        series = times[row["name"]]
        median = statistics.median(series)
        rows.append(
            row
            | {
                "seconds": median,
                "min": min(series),
                "max": max(series),
                "all": series,
                "effective_gflops": shape.flop / median / 1e9,
                "executed_gflops": (1.0 if "SDPA" in row["name"] else row["density"]) * shape.flop / median / 1e9,
                **_ratios("speedup", times["torch SDPA"], series),
                **(_ratios("over_own_dense", own, series) if own is not None else {}),
            }
        )
    return rows


def _ratios(name: str, base: list[float], series: list[float]) -> dict[str, float]:
    """Median, minimum and maximum of the rounds' own ratios: a slow round slows both sides."""
    ratios = [b / t for b, t in zip(base, series, strict=True)]
    return {name: statistics.median(ratios), f"{name}_min": min(ratios), f"{name}_max": max(ratios)}
