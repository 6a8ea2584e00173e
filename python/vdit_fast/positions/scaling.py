"""Frequencies for grids larger than those a model was trained on (Lumina-Next, arXiv 2406.18583, section 2.3).

``factor`` is s = size / trained size of one axis, at least 1; everything returns the stock frequencies at factor 1.
Exponents are written e = 2 i / width, so that the stock frequency is theta ** -e and its wavelength 2 pi theta ** e.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .tables import frequencies

__all__ = ["frequency_aware", "interpolated", "ntk", "proportional_scale", "time_aware"]


def _check_factor(factor: float) -> None:
    if not (math.isfinite(factor) and factor >= 1):
        raise ValueError(f"factor must be a finite number of at least 1 (size / trained size), got {factor!r}")


def interpolated(width: int, theta: float, factor: float, *, device: torch.device | str = "cpu") -> Tensor:
    """Position interpolation: all frequencies divided by ``factor``. float64 [width // 2]."""
    _check_factor(factor)
    return frequencies(width, theta, device=device) / factor


def ntk(width: int, theta: float, factor: float, *, device: torch.device | str = "cpu") -> Tensor:
    """NTK-aware scaling in the released form: the base is theta * ``factor``. float64 [width // 2]."""
    _check_factor(factor)
    return frequencies(width, theta * factor, device=device)


def time_aware(
    width: int,
    theta: float,
    factor: float,
    t: float,
    *,
    watershed: float | None = None,
    head_dim: int | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Interpolation while the layout forms, NTK scaling while details do.

    Args:
        width, theta, factor: the axis.
        t: flow time, 0 for noise and 1 for the clean video; 1 - ``StepContext.sigma``.
        watershed: interpolate below this time, scale as NTK from it on (the released sampler). None: the paper's
            gradual form, base theta * s ** (head_dim / d_t) with d_t = (head_dim - 1) t + 1, and no frequency below its
            interpolated one. That is NTK at t = 1, and at t = 0 interpolation of all frequencies but the first, which
            the change of base leaves at 1.
        head_dim: channels of a head, for the gradual form; ``width`` by default, which is right for one axis.

    Returns:
        float64 [width // 2].
    """
    _check_factor(factor)
    if not (math.isfinite(t) and 0 <= t <= 1):
        raise ValueError(f"t must be in [0, 1] (0 noise, 1 clean), got {t!r}")
    if watershed is not None:
        return (interpolated if t < watershed else ntk)(width, theta, factor, device=device)
    dim = width if head_dim is None else head_dim
    if dim < 1 and width:
        raise ValueError(f"head_dim must be at least 1, got {head_dim!r}")
    return _rescaled(width, theta, factor, dim / ((dim - 1) * t + 1) if width else 1.0, device)


def frequency_aware(
    width: int, theta: float, factor: float, length: float, *, device: torch.device | str = "cpu"
) -> Tensor:
    """Interpolation of the wavelengths that training never saw in full, less and less of the shorter ones.

    The base becomes theta * s ** (1 / e*), where theta ** e* * 2 pi = ``length``: at that wavelength it is exactly
    interpolation, at the shortest nothing. Longer wavelengths are interpolated.

    Args:
        length: trained tokens of the axis.

    Returns:
        float64 [width // 2].
    """
    _check_factor(factor)
    if not (math.isfinite(length) and length > 0):
        raise ValueError(f"length must be a finite number above 0 (trained tokens of the axis), got {length!r}")
    stock = frequencies(width, theta, device=device)
    turns = length / (2 * math.pi)
    if turns <= 1 or theta <= 1:  # every wavelength is longer than the trained axis
        return stock / factor
    return _rescaled(width, theta, factor, math.log(theta) / math.log(turns), device)


def _rescaled(width: int, theta: float, factor: float, power: float, device: torch.device | str) -> Tensor:
    """theta * factor ** power as the base, and interpolation as the lower bound.

    In logarithms, as factor ** power leaves the range of floats for head dimensions of a few hundred.
    """
    exponent = torch.arange(0, width, 2, dtype=torch.float64, device=device) / max(width, 1)
    slowed = torch.exp(exponent * (-power * math.log(factor)))
    return frequencies(width, theta, device=device) * slowed.clamp(min=1 / factor)


def proportional_scale(length: int, trained_length: int, head_dim: int) -> float:
    """Softmax scale sqrt(log_{L0}(L) / d) that keeps the entropy of attention over more tokens; 1/sqrt(d) at L = L0.

    Args:
        length: L, tokens of the sequence.
        trained_length: L0, at least 2.
        head_dim: d.

    Returns:
        the ``scale`` of ``vdit_fast.attention``.
    """
    if length < 1 or trained_length < 2 or head_dim < 1:
        raise ValueError(
            f"length {length} and head_dim {head_dim} must be at least 1 and trained_length {trained_length} at least 2"
        )
    return math.sqrt(math.log(length) / math.log(trained_length) / head_dim)
