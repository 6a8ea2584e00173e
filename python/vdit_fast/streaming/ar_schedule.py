"""Which denoising step every frame takes at which iteration, and timestep vectors for training (AR-Diffusion)."""

from __future__ import annotations

import bisect
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from vdit_fast.caching.checks import count

__all__ = ["ARSchedule", "FoPP", "Iteration"]


@dataclass(frozen=True)
class Iteration:
    """One evaluation of the model."""

    done: tuple[int, ...]
    """Denoising steps that every frame of the clip has behind it before this one; never more than the frame before."""
    active: range
    """The frames that take one step; the others are not written."""
    window: range
    """The frames that the model sees."""

    @property
    def after(self) -> tuple[int, ...]:
        """``done`` behind this iteration."""
        return tuple(n + (frame in self.active) for frame, n in enumerate(self.done))


@dataclass(frozen=True)
class ARSchedule(Sequence[Iteration]):
    """The AD scheduler of AR-Diffusion (arXiv 2503.07418): a frame is ``ar_step`` steps behind the one before it.

    ``ar_step`` 0 moves all frames together, ``ar_step`` = ``steps`` finishes a frame before the next begins. There are
    steps + ar_step * (blocks - 1) iterations: 50 + 15 * ar_step for 16 frames and 50 steps.

    Attributes:
        frames: frames of the clip.
        steps: denoising steps of every frame.
        ar_step: 0 ... ``steps``.
        block: frames that move together; the last block may be shorter.
        window: most frames that the model sees at a time. It then sees those up to the last one that moves: frames that
            wait are left out, and finished ones beyond the window. None: the whole clip, every time.

    Raises:
        TypeError, ValueError: a number out of range, or a window in which the frames that move together have no room.
    """

    frames: int
    steps: int
    ar_step: int = 0
    block: int = 1
    window: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("frames", 1), ("steps", 1), ("ar_step", 0), ("block", 1)):
            count(name, getattr(self, name), least)
        if self.ar_step > self.steps:
            raise ValueError(
                f"ar_step is {self.ar_step}, but at {self.steps} (the number of steps) a frame already waits for the "
                "one before it to finish; give 0 ... steps"
            )
        if self.window is None:
            return
        count("window", self.window, 1)
        together = min(self.blocks, -(-self.steps // self.ar_step)) if self.ar_step else self.blocks
        moving = min(together * self.block, self.frames)
        if moving > self.window:
            blocks = max(1, self.window // self.block)
            raise ValueError(
                f"window is {self.window} frames, but with ar_step {self.ar_step} and blocks of {self.block} up to "
                f"{moving} move at a time; give an ar_step of at least {-(-self.steps // blocks)} or a larger window"
            )

    @property
    def blocks(self) -> int:
        """Groups of frames that move together."""
        return -(-self.frames // self.block)

    def __len__(self) -> int:
        return self.steps + self.ar_step * (self.blocks - 1)

    @overload
    def __getitem__(self, index: int) -> Iteration: ...
    @overload
    def __getitem__(self, index: slice) -> list[Iteration]: ...
    def __getitem__(self, index: int | slice) -> Iteration | list[Iteration]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(f"iteration {index} of {len(self)}")
        return self._iteration(number)

    def __iter__(self) -> Iterator[Iteration]:
        return (self._iteration(number) for number in range(len(self)))

    def _iteration(self, number: int) -> Iteration:
        behind = [number - self.ar_step * block for block in range(self.blocks)]
        moving = [block for block, n in enumerate(behind) if 0 <= n < self.steps]
        active = range(moving[0] * self.block, min((moving[-1] + 1) * self.block, self.frames))
        done = tuple(min(max(behind[frame // self.block], 0), self.steps) for frame in range(self.frames))
        seen = range(self.frames)
        if self.window is not None:
            seen = range(max(0, active.stop - self.window), active.stop)
        return Iteration(done, active, seen)


class FoPP:
    """Timestep vectors t_1 <= t_2 <= ... for training (frame-oriented probability propagation, arXiv 2503.07418).

    ``behind[t][f]`` counts the ways to go on from frame f at timestep t: behind[t][f] = behind[t + 1][f] +
    behind[t][f + 1], C(T - 1 - t + F - 1 - f, F - 1 - f) in closed form; all vectors are C(T + F - 1, F). Counts are
    exact integers (1000 timesteps and 16 frames have 10^34 vectors, which floats do not count).

    Args:
        timesteps: T, timesteps are 0 ... T - 1.
        frames: F.
    """

    def __init__(self, timesteps: int, frames: int) -> None:
        count("timesteps", timesteps, 1)
        count("frames", frames, 1)
        self.timesteps, self.frames = timesteps, frames
        rest = range(frames - 1, -1, -1)
        self.behind = [[math.comb(timesteps - 1 - t + n, n) for n in rest] for t in range(timesteps)]
        self.ahead = [[math.comb(t + n, n) for n in range(frames)] for t in range(timesteps)]

    @property
    def total(self) -> int:
        """Number of vectors."""
        return math.comb(self.timesteps + self.frames - 1, self.frames)

    def sample(self, batch: int, *, uniform: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """Draw vectors.

        Args:
            batch: how many.
            uniform: True: every vector is equally likely. False, the paper's: a frame and its timestep are drawn
                uniformly, the others given that, so that every timestep is trained equally often.
            generator: on the CPU.

        Returns:
            int64 [batch, frames] on the CPU.
        """
        count("batch", batch, 1)
        seed = torch.randint(2**63 - 1, (batch,), generator=generator).tolist()
        return torch.tensor([self._draw(random.Random(number), uniform) for number in seed])

    def _draw(self, source: random.Random, uniform: bool) -> list[int]:
        last = self.timesteps - 1
        if uniform:
            at, found = 0, [_choose(source, [row[0] for row in self.behind])]
        else:
            at, found = source.randrange(self.frames), [source.randint(0, last)]
        for frame in range(at - 1, -1, -1):
            found.insert(0, _choose(source, [self.ahead[t][frame] for t in range(found[0] + 1)]))
        for frame in range(at + 1, self.frames):
            low = found[-1]
            found.append(low + _choose(source, [self.behind[t][frame] for t in range(low, last + 1)]))
        return found


def _choose(source: random.Random, weights: list[int]) -> int:
    """An index with a probability of exactly its share of the weights."""
    sums = list(itertools.accumulate(weights))
    return bisect.bisect_right(sums, source.randrange(sums[-1]))
