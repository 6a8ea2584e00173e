"""What a conversion costs: held-out loss and clips, beside the original's."""

from __future__ import annotations

import math
from typing import Any

import torch
from evaluate import PROMPTS, SIGMAS, call_arguments, held_out_calls
from torch import Tensor, nn

from vdit_fast import report
from vdit_fast.demo.sampler import DemoPipeline


@torch.no_grad()
def held_out_loss(model: nn.Module, clips: int) -> dict[str, float]:
    """Mean squared error of the predicted clean clip by noise level, on clips that no training has seen."""
    calls = held_out_calls(clips)
    found = {}
    for sigma in SIGMAS:
        errors = [
            (model(**call_arguments(clip, text, sigma, seed))[0] - clip).square().mean()
            for seed, (clip, text) in enumerate(calls)
        ]
        found[f"{sigma:g}"] = float(torch.stack(errors).mean())
    return found


def change(after: dict[str, float], before: dict[str, float]) -> dict[str, Any]:
    """How much a loss by noise level grew: in dB and percent, per level and together.

    ``mean`` compares the means over levels, ``weighted`` those with the training's weight 1 / (sigma² + 0.05).
    """
    weight = {level: 1 / (float(level) ** 2 + 0.05) for level in before}
    sums = {
        "mean": [sum(loss.values()) for loss in (after, before)],
        "weighted": [sum(weight[level] * loss[level] for level in loss) for loss in (after, before)],
    }
    ratios = {level: after[level] / before[level] for level in before}
    ratios |= {name: a / b for name, (a, b) in sums.items()}
    return {name: {"db": 10 * math.log10(r), "percent": 100 * (r - 1)} for name, r in ratios.items()}


def draw(model: nn.Module, prompts: int, steps: int) -> dict[str, Tensor]:
    """Clips of the first held-out prompts."""
    pipe = DemoPipeline(model)
    return {prompt: pipe(prompt, seed=seed, steps=steps).clip for seed, prompt in enumerate(PROMPTS[:prompts])}


def compared(clips: dict[str, Tensor], originals: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """PSNR, SSIM and flicker of clips against the original model's, from the same noise."""
    rows = {}
    for prompt, clip in clips.items():
        found = report.compare_clips(clip, originals[prompt]).to_dict()
        rows[prompt] = {name: found[name] for name in ("psnr", "ssim", "flicker_psnr")}
    return rows
