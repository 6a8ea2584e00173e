"""What a video clip is: checks and conversions shared by metrics, video files and plots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

FLOAT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
RANGE_SLACK = 1e-3  # decoders overshoot by a rounding step; a wrong scale overshoots by far more


def check_clip(clip: Any, name: str) -> Tensor:
    """``clip`` as floats in [0, 1], shape [T, C, H, W]; uint8 is divided by 255, 16-bit floats become float32.

    Raises TypeError for anything but a uint8 or floating tensor, ValueError for another rank, an empty or
    channels-last clip, values outside [0, 1] or not finite.
    """
    if not isinstance(clip, Tensor):
        raise TypeError(
            f"{name} is a {type(clip).__name__}; pass a torch tensor [T, C, H, W] (report.to_clip converts)"
        )
    if clip.dtype != torch.uint8 and clip.dtype not in FLOAT_TYPES:
        raise TypeError(f"{name} has dtype {clip.dtype}; pass uint8 in 0..255 or floats in [0, 1]")
    shape = tuple(clip.shape)
    if clip.ndim != 4:
        raise ValueError(
            f"{name} has shape {shape}; expected [T, C, H, W] (add or select the missing or batch dimension)"
        )
    if clip.numel() == 0:
        raise ValueError(f"{name} has shape {shape}, which holds no pixels; pass at least one frame")
    if shape[1] not in (1, 2, 3, 4):
        hint = "; it looks channels-last, use clip.permute(0, 3, 1, 2)" if shape[3] in (1, 3, 4) else ""
        raise ValueError(f"{name} has shape {shape}, so {shape[1]} channels; expected [T, C, H, W] with C 1 to 4{hint}")
    if clip.dtype == torch.uint8:
        return clip.detach().float() / 255.0
    clip = clip.detach()
    clip = clip if clip.dtype == torch.float64 else clip.float()
    low, high = (float(x) for x in clip.aminmax())
    if not (low >= -RANGE_SLACK and high <= 1 + RANGE_SLACK):  # also true for NaN
        raise ValueError(
            f"{name} has values from {low:.4g} to {high:.4g}; expected finite values in [0, 1]"
            " (a clip in [-1, 1] needs x / 2 + 0.5, one in 0..255 needs .byte())"
        )
    return clip


def check_pair(clip: Any, reference: Any) -> tuple[Tensor, Tensor]:
    """Both clips checked, of one shape, on one device and in one dtype (the wider of the two)."""
    a, b = check_clip(clip, "clip"), check_clip(reference, "reference")
    if a.shape != b.shape:
        raise ValueError(
            f"clip has shape {tuple(a.shape)} but reference {tuple(b.shape)}; compare clips of the same frames and size"
        )
    if a.device != b.device:
        raise ValueError(f"clip is on {a.device} but reference on {b.device}; move one with .to()")
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)


def to_uint8(clip: Any, name: str = "clip") -> Tensor:
    """``clip`` [T, C, H, W] as uint8 in 0..255, rounded to nearest. Same errors as check_clip."""
    if isinstance(clip, Tensor) and clip.dtype == torch.uint8:
        check_clip(clip[:1], name)
        return clip.detach()
    return check_clip(clip, name).clamp(0, 1).mul(255).round().to(torch.uint8)


def to_clip(frames: Any) -> Tensor:
    """A pipeline's frames as a clip tensor [T, C, H, W].

    Takes a tensor [T, C, H, W], an array [T, H, W, C], or a list of images (PIL or arrays [H, W, C]); uint8 stays
    uint8, floats in [0, 1] stay floats. Raises TypeError or ValueError like check_clip.
    """
    if isinstance(frames, Tensor):
        clip = frames
    else:
        if isinstance(frames, Sequence) and not isinstance(frames, (str, bytes)):
            if not frames:
                raise ValueError("frames is empty; pass at least one frame")
            arrays = [np.asarray(frame) for frame in frames]
            if len({a.shape for a in arrays}) > 1:
                raise ValueError(f"frames differ in shape ({arrays[0].shape}, ...); pass frames of one size")
            frames = np.stack(arrays)
        if not isinstance(frames, np.ndarray):
            raise TypeError(f"frames is a {type(frames).__name__}; pass a tensor, an array or a list of images")
        if frames.ndim == 3:
            frames = frames[..., None]
        if frames.ndim != 4:
            raise ValueError(f"frames has shape {frames.shape}; expected [T, H, W, C] (select one video of the batch)")
        clip = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).contiguous()
    check_clip(clip, "frames")
    return clip
