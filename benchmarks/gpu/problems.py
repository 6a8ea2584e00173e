"""What is timed: a declarative table. The order is the order of the run, so what matters most comes first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
RATE = 3e14  # FLOP/s that estimates assume: low, so that a run stays inside its budget


@dataclass(frozen=True)
class Problem:
    """One attention problem of batch 1 and what it is compared with."""

    name: str
    kind: str  # dense, blocks, clusters, stand-ins
    heads: int
    length: int
    dim: int
    block: int = 0  # blocks, stand-ins: side of the square blocks
    density: float = 1.0  # asked for; the one achieved is in the result
    clusters: tuple[int, int] = (0, 0)  # of queries and keys
    backward: bool = False
    goal: float | None = None  # executed TFLOP/s on an H200

    @property
    def flop(self) -> float:
        """FLOP of the dense problem: two products forward, five backward."""
        return (10 if self.backward else 4) * self.heads * float(self.length) ** 2 * self.dim

    def spec(self, dtype: str) -> dict[str, Any]:
        return {**asdict(self), "clusters": list(self.clusters), "dtype": dtype}

    def estimate(self, calls: int) -> float:
        """Seconds of the whole item, generously: about three contenders do the dense work."""
        return 8 + 3 * calls * self.flop / RATE + (40 if self.kind == "blocks" else 0)


DENSE = (
    ("wan-14b", 40, 32_760, 128, 750),
    ("wan-14b", 40, 17_160, 128, 755),
    ("wan-14b", 40, 75_600, 128, 675),
    ("cogvideox", 48, 17_776, 64, 500),
    ("wan-1.3b", 12, 32_760, 128, 750),
    ("hunyuanvideo", 24, 118_800, 128, 675),
    ("ltx-2", 32, 30_240, 128, 719),
    ("wan-14b", 40, 7_800, 128, 755),
    ("ltx-2", 32, 6_144, 128, 741),
)
EXACT_LENGTH, EXACT_BLOCKS = 109_632, 64  # 64 key blocks of 64 for each of 1,713 rows of blocks


def full() -> Iterator[Problem]:
    """Every problem of the suite."""
    for model, heads, length, dim, goal in DENSE[:2]:
        yield Problem(f"dense/{model}-{length}", "dense", heads, length, dim, goal=goal)
    yield exact_blocks()
    for block in (128, 64):
        for density in (0.3, *(d for d in DENSITIES if d != 0.3)):
            yield blocks(block, density)
    yield Problem("clusters/wan-14b-32760", "clusters", 40, 32_760, 128, density=0.3, clusters=(300, 1000), goal=620)
    for model, heads, length, dim, goal in DENSE[2:]:
        yield Problem(f"dense/{model}-{length}", "dense", heads, length, dim, goal=goal)
    yield Problem("stand-ins/wan-14b-32760", "stand-ins", 40, 32_760, 128, block=128, density=0.2)
    yield Problem("backward/dense", "dense", 40, 17_160, 128, backward=True)
    yield Problem("backward/blocks-0.3", "blocks", 40, 17_160, 128, block=128, density=0.3, backward=True)


def exact_blocks() -> Problem:
    """The one sparse shape with a published rate on this GPU."""
    density = EXACT_BLOCKS / -(-EXACT_LENGTH // 64)
    return Problem("blocks/published-7x109632", "blocks", 7, EXACT_LENGTH, 128, block=64, density=density, goal=520)


def blocks(block: int, density: float) -> Problem:
    name = f"blocks/wan-14b-32760-{block}-{density:g}"
    return Problem(name, "blocks", 40, 32_760, 128, block=block, density=density)


def quick() -> Iterator[Problem]:
    """One small problem of every kind, for a machine without a GPU."""
    yield Problem("dense/small", "dense", 2, 200, 64, goal=1.0)
    yield Problem("dense/narrow", "dense", 2, 150, 16)
    for density in (0.25, 0.5, 1.0):
        yield Problem(f"blocks/small-32-{density:g}", "blocks", 2, 250, 64, block=32, density=density)
    yield Problem("clusters/small", "clusters", 2, 300, 32, density=0.3, clusters=(7, 20))
    yield Problem("stand-ins/small", "stand-ins", 2, 250, 32, block=32, density=0.3)
    yield Problem("backward/dense", "dense", 1, 160, 32, backward=True)
    yield Problem("backward/blocks-0.3", "blocks", 1, 160, 32, block=16, density=0.3, backward=True)


def problems(small: bool) -> list[Problem]:
    return list(quick() if small else full())
