"""Low frequencies of attention over the whole clip, high ones of attention over a window of frames (FreeLong)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from vdit_fast.context import StepContext
from vdit_fast.models.hooks import HookPlace, HookRows
from vdit_fast.plan import AttentionPlan

__all__ = ["SpectralBlend", "low_pass", "spectral_blend", "temporal_window"]


@dataclass(frozen=True)
class SpectralBlend:
    """SpectralBlend temporal attention (FreeLong, arXiv 2407.19918), a hook at "attention_heads".

    The same queries, keys and values attend once as configured and once within a window of frames; per channel, the
    low frequencies of the first over (frames, height, width) and the high ones of the second make the result.

    In factorised models (AnimateDiff, Latte, Stable Video Diffusion) hook the temporal layers
    (``layers="*temporal*"`` or ``"*motion_modules*"``); in models that attend to the whole video at once the window
    holds all tokens of its frames and all text, and text rows stay as they are.

    Args:
        window: frames; every frame reads at least so many, the window shifts at the ends of the clip.
        cutoff_time, cutoff_space: widths of the Gaussian filter, as fractions of the highest frequency.
        most_places: layers of more than so many places per frame attend within the window only (the paper leaves the
            blend out at the UNet's largest level); None: blends everywhere.

    A clip that the window covers is left as it is. The filter runs in fp32 (float64 where the model does): two
    transforms of the rows' size.
    """

    where: ClassVar[str] = "attention_heads"

    window: int = 16
    cutoff_time: float = 0.25
    cutoff_space: float = 0.25
    most_places: int | None = None
    _kept: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1:
            raise ValueError(f"window must be a positive number of frames, got {self.window!r}")
        for name in ("cutoff_time", "cutoff_space"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")

    def __call__(self, step: StepContext, place: HookPlace, rows: HookRows) -> Tensor | None:
        if place.over == "frame":
            raise ValueError(f"SpectralBlend: {place.name} sees one frame at a time; hook the temporal layers")
        if place.grid is None:
            raise RuntimeError(
                f"SpectralBlend: the token grid of {place.name} is unknown; run the whole transformer, and compile its "
                "blocks instead of the whole"
            )
        frames, height, width = place.grid
        device = rows.video.device
        mask = temporal_window(frames, self.window)
        if bool(mask.all()):
            return None
        local = rows.attend(self._plan(place, rows, mask, device)).video
        if self.most_places is not None and height * width > self.most_places:
            return local
        dtype = torch.float64 if local.dtype == torch.float64 else torch.float32
        key = place.grid, device, dtype
        if key not in self._kept:
            self._kept[key] = low_pass(place.grid, self.cutoff_time, self.cutoff_space).to(device, dtype)
        blended = spectral_blend(_volume(rows.video, place), _volume(local, place), self._kept[key])
        return _rows(blended, place, rows.video)

    def _plan(self, place: HookPlace, rows: HookRows, mask: Tensor, device: torch.device) -> AttentionPlan:
        geometry = place.geometry
        key = place.over, place.grid, geometry, device
        if key not in self._kept:
            with torch.inference_mode(False):
                self._kept[key] = _window_plan(place, mask).to(device)
        plan: AttentionPlan = self._kept[key]
        return plan


def temporal_window(frames: int, window: int) -> Tensor:
    """bool [frames, frames] on the CPU, True where a frame reads another: ``window // 2`` to either side, and at the
    ends of the clip the nearest ``window`` frames."""
    keep = torch.zeros(frames, frames, dtype=torch.bool)
    for frame in range(frames):
        first, last = max(0, frame - window // 2), min(frames, frame + window // 2 + 1)
        if last - first < window:
            first, last = (0, window) if first == 0 else (max(frames - window, 0), frames)
        keep[frame, first:last] = True
    return keep


def low_pass(grid: tuple[int, int, int], cutoff_time: float, cutoff_space: float) -> Tensor:
    """The Gaussian low-pass filter for ``spectral_blend``: float64 [frames, height, width // 2 + 1] on the CPU.

    Frequency i of n in a centred spectrum has the coordinate 2i/n - 1, which for odd n misses zero by 1/n: the filter
    is lopsided, and the inverse transform has an imaginary part, which is dropped. The real part is what the filter's
    mean with its own mirror image gives, so one transform of real numbers is exact for odd sizes too.
    """
    cutoffs = (cutoff_time, cutoff_space, cutoff_space)
    square = torch.zeros((), dtype=torch.float64)
    for axis, (size, cutoff) in enumerate(zip(grid, cutoffs, strict=True)):
        coordinate = 2 * torch.arange(size, dtype=torch.float64) / size - 1
        shape = [1, 1, 1]
        shape[axis] = size
        square = square + (coordinate / cutoff).square().view(shape)
    full = torch.fft.ifftshift(torch.exp(-0.5 * square))
    mirrored = full.flip(0, 1, 2).roll((1, 1, 1), (0, 1, 2))
    return ((full + mirrored) / 2)[:, :, : grid[2] // 2 + 1].contiguous()


def spectral_blend(whole: Tensor, local: Tensor, keep: Tensor) -> Tensor:
    """``local + filter(whole - local)`` over the first three of the last four dimensions.

    Args:
        whole, local: [..., frames, height, width, C].
        keep: what ``low_pass`` gives, on their device; its dtype is that of the transforms.

    Returns:
        the blend in ``local``'s dtype.
    """
    difference = (whole.to(keep.dtype) - local.to(keep.dtype)).movedim(-1, -4)
    spectrum = torch.fft.rfftn(difference, dim=(-3, -2, -1)) * keep
    low = torch.fft.irfftn(spectrum, s=difference.shape[-3:], dim=(-3, -2, -1)).movedim(-4, -1)
    return (local.to(keep.dtype) + low).to(local.dtype)


def _volume(x: Tensor, place: HookPlace) -> Tensor:
    """Rows [B, N, H, D], or [B · places, frames, H, D], as [B, frames, height, width, H · D]."""
    assert place.grid is not None
    frames, height, width = place.grid
    x = x.flatten(2)
    if place.over == "video":
        return x.unflatten(1, (frames, height, width))
    return x.unflatten(0, (-1, height, width)).movedim(3, 1)


def _rows(x: Tensor, place: HookPlace, like: Tensor) -> Tensor:
    """Undoes ``_volume``."""
    if place.over != "video":
        x = x.movedim(1, 3)
    return x.reshape(like.shape)


def _window_plan(place: HookPlace, mask: Tensor) -> AttentionPlan:
    """The window over frames as a plan of one layer's sequence."""
    if place.over == "frames":
        return AttentionPlan.from_mask(mask)
    geometry = place.geometry
    assert geometry is not None and geometry.text is not None
    frames, height, width = geometry.grid
    before, after = geometry.history, geometry.text
    if geometry.text_first:
        before, after = before + after, 0
    lengths = [before, *[height * width] * frames, after]
    keep = torch.nn.functional.pad(mask, (1, 1, 1, 1), value=True)
    return AttentionPlan.from_block_mask(keep, lengths, lengths)
