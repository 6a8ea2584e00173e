"""Clips to and from video files (PyAV), and labelled side-by-side clips (Pillow); extra ``vdit-fast[video]``.

Measure on ``.mkv`` files: FFV1 in RGB is lossless, bit for bit. H.264 ``.mp4`` is for looking at: its own loss
(typically 35 to 45 dB) would drown the difference between two good clips.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .clips import to_uint8

LOSSLESS_SUFFIX = ".mkv"
H264_CRF = "16"  # close to transparent


def _need(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"video files need {module}: pip install 'vdit-fast[video]'") from error


def _rgb(clip: Any, name: str = "clip") -> Tensor:
    """uint8 [T, 3, H, W]: grey is repeated; other channel counts raise ValueError."""
    frames = to_uint8(clip, name).cpu()
    if frames.shape[1] == 1:
        return frames.expand(-1, 3, -1, -1)
    if frames.shape[1] != 3:
        raise ValueError(f"{name} has {frames.shape[1]} channels; video files take 1 (grey) or 3 (RGB)")
    return frames


def _even(frames: Tensor) -> Tensor:
    """Height and width rounded up to even numbers by repeating the last row or column (yuv420p needs it)."""
    if frames.shape[2] % 2:
        frames = torch.cat([frames, frames[:, :, -1:]], dim=2)
    if frames.shape[3] % 2:
        frames = torch.cat([frames, frames[..., -1:]], dim=3)
    return frames


def write_video(path: str | Path, clip: Any, fps: float = 16.0, *, lossless: bool | None = None) -> Path:
    """Writes ``clip`` ([T, C, H, W], C 1 or 3, uint8 or floats in [0, 1]) and returns the path.

    ``.mkv`` is FFV1, lossless; every other suffix PyAV knows (``.mp4``) is H.264 in yuv420p, odd sizes padded by one
    row or column. ``lossless`` overrides the suffix's choice; lossless needs ``.mkv``. Raises ValueError for bad
    clips, fps or suffix, ImportError without PyAV.
    """
    path = Path(path)
    if not 0 < fps <= 1000:
        raise ValueError(f"fps is {fps}; pass frames per second between 0 and 1000, for example 16")
    if path.suffix.lower() not in (".mkv", ".mp4", ".mov"):
        raise ValueError(f"path is {path.name!r}; use .mkv (lossless), .mp4 or .mov")
    lossless = path.suffix.lower() == LOSSLESS_SUFFIX if lossless is None else lossless
    if lossless and path.suffix.lower() != LOSSLESS_SUFFIX:
        raise ValueError(f"path is {path.name!r} but lossless=True; FFV1 lives in {LOSSLESS_SUFFIX} files")
    frames = _rgb(clip)
    av = _need("av")
    frames = frames if lossless else _even(frames)
    path.parent.mkdir(parents=True, exist_ok=True)
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(path), "w") as container:
        if lossless:
            stream = container.add_stream("ffv1", rate=rate)
            stream.pix_fmt = "bgr0"
        else:
            stream = container.add_stream("libx264", rate=rate, options={"crf": H264_CRF, "preset": "medium"})
            stream.pix_fmt = "yuv420p"
        stream.height, stream.width = frames.shape[2:]
        for frame in frames.permute(0, 2, 3, 1).contiguous().numpy():
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def write_mp4(path: str | Path, clip: Any, fps: float = 16.0) -> Path:
    """write_video for an ``.mp4`` file (H.264, for looking at, not for metrics)."""
    if Path(path).suffix.lower() != ".mp4":
        raise ValueError(f"path is {Path(path).name!r}; write_mp4 writes .mp4 files (write_video takes the others)")
    return write_video(path, clip, fps)


def _open(path: str | Path) -> Any:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path {path.name!r} is not a file; pass a video file")
    av = _need("av")
    try:
        container = av.open(str(path))
    except av.error.FFmpegError as error:
        raise ValueError(
            f"path {path.name!r} is not a video file ({error}); pass .mp4, .mkv or another video"
        ) from error
    if not container.streams.video:
        container.close()
        raise ValueError(f"path {path.name!r} has no video stream; pass a video file")
    return container


def read_video(path: str | Path, *, max_frames: int | None = None) -> Tensor:
    """The frames of a video file as uint8 [T, 3, H, W], at most ``max_frames`` of them.

    Raises FileNotFoundError, ValueError for a file that is not a video or holds no frame, ImportError without PyAV.
    """
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"max_frames is {max_frames}; pass at least 1, or None for all frames")
    frames = []
    with _open(path) as container:
        for frame in container.decode(video=0):
            frames.append(torch.from_numpy(frame.to_ndarray(format="rgb24")))
            if len(frames) == max_frames:
                break
    if not frames:
        raise ValueError(f"path {Path(path).name!r} holds no frame; pass a video with at least one")
    return torch.stack(frames).permute(0, 3, 1, 2).contiguous()


def video_fps(path: str | Path) -> float:
    """Average frames per second that the file states. Errors as read_video."""
    with _open(path) as container:
        rate = container.streams.video[0].average_rate
    if rate is None:
        raise ValueError(f"path {Path(path).name!r} states no frame rate; pass the rate yourself")
    return float(rate)


def write_frames_png(folder: str | Path, clip: Any) -> list[Path]:
    """One lossless ``frame_00000.png`` per frame in ``folder`` (made when missing); returns the paths in order."""
    frames = _rgb(clip).permute(0, 2, 3, 1).contiguous().numpy()
    image = _need("PIL.Image")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"frame_{index:05d}.png" for index in range(len(frames))]
    for path, frame in zip(paths, frames, strict=True):
        image.fromarray(frame).save(path)
    return paths


def upscale(clip: Any, factor: int, mode: str = "nearest") -> Tensor:
    """``clip`` enlarged ``factor`` times in height and width, ``mode`` "nearest" or "bicubic"; uint8 [T, C, H, W]."""
    frames = to_uint8(clip)
    if not isinstance(factor, int) or not 1 <= factor <= 16:
        raise ValueError(f"factor is {factor!r}; pass a whole number from 1 to 16")
    if mode not in ("nearest", "bicubic"):
        raise ValueError(f"mode is {mode!r}; pass 'nearest' or 'bicubic'")
    if factor == 1:
        return frames
    if mode == "nearest":
        return frames.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    smooth = F.interpolate(frames.float(), scale_factor=factor, mode="bicubic", align_corners=False)
    return smooth.clamp(0, 255).round().to(torch.uint8)


def _label_bar(text: str, width: int, size: int) -> Tensor:
    """White text on black, uint8 [3, bar height, width]; text too long for the width ends in an ellipsis."""
    image, draw_module, fonts = _need("PIL.Image"), _need("PIL.ImageDraw"), _need("PIL.ImageFont")
    font = fonts.load_default(size)
    bar = image.new("RGB", (width, size * 4 // 5 * 2), (16, 16, 16))
    draw = draw_module.Draw(bar)
    room, shown = width - size // 2, text
    while shown and draw.textlength(shown, font=font) > room:
        text = text[:-1]
        shown = text.rstrip() + "..." if text else ""
    draw.text((width // 2, bar.height // 2), shown, fill=(240, 240, 240), font=font, anchor="mm")
    pixels = torch.frombuffer(bytearray(bar.tobytes()), dtype=torch.uint8)
    return pixels.view(bar.height, width, 3).permute(2, 0, 1).contiguous()


def side_by_side(
    clips: Sequence[Any], labels: Sequence[str] | None = None, *, scale: int = 1, mode: str = "nearest", gap: int = 4
) -> Tensor:
    """Clips of one frame count and height next to each other under text labels; uint8 [T, 3, H', W'], H' and W' even.

    ``scale`` enlarges the pictures (not the text) by a whole factor, ``gap`` is the pixels between them. A clip of one
    frame is repeated. Raises ValueError for unequal clips or a label count that differs, ImportError without Pillow.
    """
    if not clips:
        raise ValueError("clips is empty; pass at least one clip")
    if labels is not None and len(labels) != len(clips):
        raise ValueError(f"labels has {len(labels)} entries for {len(clips)} clips; pass one label per clip")
    if gap < 0:
        raise ValueError(f"gap is {gap}; pass 0 or more pixels")
    parts = [upscale(_rgb(clip, f"clips[{i}]"), scale, mode) for i, clip in enumerate(clips)]
    frames, height = max(p.shape[0] for p in parts), parts[0].shape[2]
    for i, part in enumerate(parts):
        if part.shape[2] != height or part.shape[0] not in (1, frames):
            raise ValueError(
                f"clips[{i}] has {part.shape[0]} frames of height {part.shape[2] // scale}, others {frames} of"
                f" {height // scale}; pass clips of one frame count and height"
            )
    parts = [p.expand(frames, -1, -1, -1) for p in parts]
    if labels is not None:
        size = max(12, min(height // 10, 28))
        bars = [_label_bar(text, part.shape[3], size) for text, part in zip(labels, parts, strict=True)]
        parts = [torch.cat([bar.expand(frames, -1, -1, -1), p], dim=2) for bar, p in zip(bars, parts, strict=True)]
    spacer = torch.full((frames, 3, parts[0].shape[2], gap), 16, dtype=torch.uint8)
    row = [piece for part in parts for piece in (spacer, part)][1:]
    return _even(torch.cat(row, dim=3))
