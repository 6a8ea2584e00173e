"""TaylorSeer: the output as a Taylor polynomial in the step index, from differences of computed outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import CachePolicy, Stream


@dataclass(frozen=True, kw_only=True)
class TaylorSeer(CachePolicy):
    """TaylorSeer (Liu et al., arXiv 2503.06923) on the output of the whole transformer.

    At a computed step s, d steps after the last computed one: F_0 is the output and F_{i+1} = (F_i new − F_i old) / d.
    At a forecast step k steps later the output is Σ_i F_i · (damping · k)^i / i!. A forecast costs a few elementwise
    operations; order + 1 fp32 copies of the output are kept per guidance branch.

    The paper caches every module of every block. One output per transformer needs orders of magnitude less memory, and
    the last layers are all that differs.

    Knobs besides those of ``CachePolicy``:
        order: degree of the polynomial, at least 0 (0 repeats the last computed output).
        damping: in [0, 1], shortens the forecast distance; 1 is the paper's formula. Differences are taken over past
            steps while the output bends, so that a shorter step forward is the better guess (HiCache contracts its
            basis for the same reason).

    Raises:
        TypeError, ValueError: a bad knob.
    """

    name: ClassVar[str] = "taylorseer"

    order: int = 1
    damping: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _integer("order", self.order)
        _fraction("damping", self.damping)

    def update(self, stream: Stream, step: int, output: Tensor) -> None:
        distance = step - stream.step
        found = [output.to(torch.float32, copy=True)]  # the caller may write to its output
        for old in stream.factors[: self.order]:
            found.append((found[-1] - old) / distance)
        stream.step, stream.factors = step, found

    def forecast(self, stream: Stream, step: int) -> Tensor:
        reach = self.damping * (step - stream.step)
        result = stream.factors[0].clone()
        for i, factor in enumerate(stream.factors[1:], 1):
            result.add_(factor, alpha=reach**i / math.factorial(i))
        return result


def _integer(knob: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{knob} must be an integer of at least 0, got {value!r}")
    if value < 0:
        raise ValueError(f"{knob} must be at least 0, got {value}")


def _fraction(knob: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{knob} must be a number in [0, 1], got {value!r}")
    if not 0 <= value <= 1:  # also false for NaN
        raise ValueError(f"{knob} must be in [0, 1], got {value}")
