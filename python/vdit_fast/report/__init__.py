"""What was gained and what was lost: metrics, video files, tables, plots and the environment they were measured in.

Metrics and tables need torch alone; video files need ``vdit-fast[video]``, plots ``vdit-fast[plots]``.
"""

from __future__ import annotations

from .clips import to_clip, to_uint8
from .environment import environment
from .jsonio import json_safe, read_json, write_json
from .metrics import ClipComparison, compare_clips, cosine, flicker_psnr, mean_db, psnr, relative_l2, ssim
from .plots import (
    contact_sheet,
    density_heatmap,
    pareto,
    per_frame_psnr,
    plan_heatmap,
    recall_curve,
    replot,
    speed_curve,
    step_timeline,
)
from .raster import plan_raster
from .tables import format_bytes, format_count, format_percent, format_ratio, format_seconds, table
from .video import read_video, side_by_side, upscale, video_fps, write_frames_png, write_mp4, write_video

__all__ = [
    "ClipComparison",
    "compare_clips",
    "contact_sheet",
    "cosine",
    "density_heatmap",
    "environment",
    "flicker_psnr",
    "format_bytes",
    "format_count",
    "format_percent",
    "format_ratio",
    "format_seconds",
    "json_safe",
    "mean_db",
    "pareto",
    "per_frame_psnr",
    "plan_heatmap",
    "plan_raster",
    "psnr",
    "read_json",
    "read_video",
    "recall_curve",
    "relative_l2",
    "replot",
    "side_by_side",
    "speed_curve",
    "ssim",
    "step_timeline",
    "table",
    "to_clip",
    "to_uint8",
    "upscale",
    "video_fps",
    "write_frames_png",
    "write_json",
    "write_mp4",
    "write_video",
]
