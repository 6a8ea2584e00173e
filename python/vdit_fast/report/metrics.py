"""Quality of a clip against a reference clip, in plain torch: no weights, no downloads.

Clips are [T, C, H, W], floats in [0, 1] or uint8 (divided by 255). The usual convention is followed: the same prompt,
seed and steps with and without acceleration, metrics per frame, then averaged over the frames.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .clips import check_pair
from .jsonio import json_safe

SSIM_WINDOW, SSIM_SIGMA, SSIM_K1, SSIM_K2 = 11, 1.5, 0.01, 0.03
MAPS_PIXELS = 1 << 22  # pixels per SSIM chunk: bounds memory to a few hundred MB


def _to_db(mse: Tensor) -> Tensor:
    return -10.0 * torch.log10(mse)  # log10(0) = -inf gives +inf dB


def _frame_mse(a: Tensor, b: Tensor) -> Tensor:
    # one frame at a time keeps the fp64 copy small; fp64 keeps PSNR of nearly equal clips exact
    return torch.stack([(x.double() - y.double()).square().mean() for x, y in zip(a, b, strict=True)])


def psnr(clip: Any, reference: Any) -> Tensor:
    """Peak signal-to-noise ratio per frame: -10 log10(mean squared error), peak 1, in dB.

    Returns float64 [T]; a frame identical to the reference gives +inf.
    Raises TypeError or ValueError when the clips are not two clips of one shape (see clips.check_clip).
    """
    return _to_db(_frame_mse(*check_pair(clip, reference)))


def flicker_psnr(clip: Any, reference: Any) -> Tensor:
    """PSNR between temporal differences, clip[t+1] - clip[t] against reference[t+1] - reference[t], in dB, peak 1.

    Low values mean motion that the reference does not have (flicker); a constant offset in brightness does not count.
    Returns float64 [T-1]; equal differences give +inf. Raises ValueError for fewer than two frames.
    """
    a, b = check_pair(clip, reference)
    if a.shape[0] < 2:
        raise ValueError("clip has 1 frame; flicker_psnr compares neighbouring frames, so it needs at least 2")
    error = [(a[t + 1].double() - a[t].double()) - (b[t + 1].double() - b[t].double()) for t in range(a.shape[0] - 1)]
    mse = torch.stack([e.square().mean() for e in error])
    # rounding of the inputs (a constant offset in float32) is not flicker: below it, the differences are equal
    floor = torch.finfo(a.dtype).eps ** 2
    return _to_db(torch.where(mse <= floor, torch.zeros_like(mse), mse))


def _gaussian(x: Tensor) -> Tensor:
    """``x`` [N, 1, H, W] filtered by the 11 x 11 Gaussian window, valid part only."""
    half = SSIM_WINDOW // 2
    taps = torch.arange(-half, half + 1, device=x.device, dtype=torch.float64)
    window = torch.exp(-taps.square() / (2 * SSIM_SIGMA**2))
    window = (window / window.sum()).to(x.dtype)
    return F.conv2d(F.conv2d(x, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))


def _ssim_chunk(a: Tensor, b: Tensor) -> Tensor:
    n, _, height, width = a.shape
    a, b = a.double(), b.double()  # in fp32 the variances of flat regions drown in rounding next to K2**2
    planes = [p.reshape(-1, 1, height, width) for p in (a, b, a * a, b * b, a * b)]
    mu_a, mu_b, aa, bb, ab = (_gaussian(p) for p in planes)
    var_a, var_b, cov = aa - mu_a * mu_a, bb - mu_b * mu_b, ab - mu_a * mu_b
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    luminance = (2 * mu_a * mu_b + c1) / (mu_a * mu_a + mu_b * mu_b + c1)
    structure = (2 * cov + c2) / (var_a + var_b + c2)
    return (luminance * structure).view(n, -1).double().mean(dim=1)


def ssim(clip: Any, reference: Any) -> Tensor:
    """Structural similarity per frame (Wang et al. 2004): Gaussian 11 x 11, sigma 1.5, K1 0.01, K2 0.03, peak 1.

    Averaged over channels and over the pixels whose window lies inside the frame. Returns float64 [T], at most 1.
    Raises ValueError for frames under 11 pixels in height or width, and as psnr does.
    """
    a, b = check_pair(clip, reference)
    if min(a.shape[2:]) < SSIM_WINDOW:
        raise ValueError(
            f"clip has frames of {a.shape[2]} x {a.shape[3]} pixels; ssim needs at least {SSIM_WINDOW} x {SSIM_WINDOW}"
        )
    step = max(1, MAPS_PIXELS // a[0].numel())
    return torch.cat([_ssim_chunk(a[t : t + step], b[t : t + step]) for t in range(0, a.shape[0], step)])


def _flat_pair(x: Any, reference: Any) -> tuple[Tensor, Tensor]:
    for name, value in (("x", x), ("reference", reference)):
        if not isinstance(value, Tensor) or value.is_complex():
            raise TypeError(f"{name} is {getattr(value, 'dtype', type(value).__name__)}; pass a real torch tensor")
    if x.shape != reference.shape or x.numel() == 0:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and reference {tuple(reference.shape)};"
            " pass two tensors of one non-empty shape"
        )
    if x.device != reference.device:
        raise ValueError(f"x is on {x.device} but reference on {reference.device}; move one with .to()")
    a, b = x.detach().double().flatten(), reference.detach().double().flatten()
    for name, value in (("x", a), ("reference", b)):
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} holds NaN or infinite values; compare finite tensors")
    return a, b


def relative_l2(x: Any, reference: Any) -> float:
    """||x - reference|| / ||reference|| over all elements, any shape (latents, attention outputs), in fp64.

    A zero reference gives 0.0 when x is zero too, else inf. Raises TypeError or ValueError for unequal shapes.
    """
    a, b = _flat_pair(x, reference)
    error, scale = float((a - b).norm()), float(b.norm())
    if scale == 0.0:
        return 0.0 if error == 0.0 else math.inf
    return error / scale


def cosine(x: Any, reference: Any) -> float:
    """Cosine of the angle between two tensors of one shape, in [-1, 1], in fp64.

    Two zero tensors give 1.0, one zero tensor 0.0. Raises TypeError or ValueError like relative_l2.
    """
    a, b = _flat_pair(x, reference)
    norms = float(a.norm()), float(b.norm())
    if 0.0 in norms:
        return 1.0 if norms == (0.0, 0.0) else 0.0
    return max(-1.0, min(1.0, float((a / norms[0]) @ (b / norms[1]))))


def mean_db(values: Tensor) -> float:
    """Mean of per-frame dB values; +inf entries (identical frames) are left out, all of them inf gives inf.

    Leaving them out understates quality, never overstates it: one identical frame would otherwise make the mean inf.
    """
    finite = values[torch.isfinite(values)]
    return float(finite.mean()) if finite.numel() else math.inf


@dataclass(frozen=True)
class ClipComparison:
    """A clip against its reference. PSNR in dB; ``psnr`` is mean_db of the frames, ``psnr_pooled`` from the clip's MSE.

    ``ssim`` is None for frames under 11 pixels, ``flicker_psnr`` for a single frame.
    """

    frames: int
    channels: int
    height: int
    width: int
    identical: bool
    psnr: float
    psnr_pooled: float
    ssim: float | None
    flicker_psnr: float | None
    relative_l2: float
    cosine: float
    psnr_per_frame: tuple[float, ...]
    ssim_per_frame: tuple[float, ...]
    flicker_psnr_per_frame: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; an infinite PSNR (identical frames) is the string ``"inf"``, which float() reads."""
        return dict(json_safe(self))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ClipComparison:
        """The inverse of to_dict. Raises ValueError when a field is missing or unknown."""
        names = set(cls.__dataclass_fields__)
        if set(data) != names:
            wrong = ", ".join(sorted(set(data) ^ names))
            raise ValueError(
                f"data is not a clip comparison (missing or unknown: {wrong}); pass ClipComparison.to_dict()"
            )
        values: dict[str, Any] = {}
        for name, value in data.items():
            if name.endswith("_per_frame"):
                values[name] = tuple(float(v) for v in value)
            elif name in ("frames", "channels", "height", "width"):
                values[name] = int(value)
            else:
                values[name] = value if isinstance(value, bool) or value is None else float(value)
        return cls(**values)

    def summary(self) -> str:
        """One line for people."""
        if self.identical:
            return f"identical ({self.frames} frames, {self.height}x{self.width})"
        parts = [f"PSNR {self.psnr:.2f} dB"]
        if self.ssim is not None:
            parts.append(f"SSIM {self.ssim:.4f}")
        if self.flicker_psnr is not None:
            parts.append(f"flicker PSNR {self.flicker_psnr:.2f} dB")
        return ", ".join([*parts, f"relative L2 {self.relative_l2:.3g}", f"cosine {self.cosine:.5f}"])


def compare_clips(clip: Any, reference: Any) -> ClipComparison:
    """Every metric of this module for ``clip`` against ``reference``, both [T, C, H, W]. Errors as psnr."""
    a, b = check_pair(clip, reference)
    frames, channels, height, width = a.shape
    mse = _frame_mse(a, b)
    frame_psnr = _to_db(mse)
    frame_ssim = ssim(a, b) if min(height, width) >= SSIM_WINDOW else mse.new_empty(0)
    flicker = flicker_psnr(a, b) if frames > 1 else mse.new_empty(0)
    return ClipComparison(
        frames=frames,
        channels=channels,
        height=height,
        width=width,
        identical=bool((mse == 0).all()),
        psnr=mean_db(frame_psnr),
        psnr_pooled=float(_to_db(mse.mean())),
        ssim=float(frame_ssim.mean()) if frame_ssim.numel() else None,
        flicker_psnr=mean_db(flicker) if flicker.numel() else None,
        relative_l2=relative_l2(a, b),
        cosine=cosine(a, b),
        psnr_per_frame=tuple(frame_psnr.tolist()),
        ssim_per_frame=tuple(frame_ssim.tolist()),
        flicker_psnr_per_frame=tuple(flicker.tolist()),
    )
