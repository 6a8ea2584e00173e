"""Numbers that every comparison of drawn clips has: quality against the stock clips, and ratios of seconds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from vdit_fast import report
from vdit_fast.demo.numbers import spread
from vdit_fast.demo.sampler import Sample


def mean_quality(drawn: Sequence[Sample], stock: Sequence[Sample], prompts: Sequence[str]) -> dict[str, Any]:
    """PSNR, SSIM, flicker PSNR and the latent error, means over the prompts, and ``per_prompt``.

    The clips of round i are of prompt i modulo their number, and those of one prompt are the same in every round.
    """
    prompts = prompts[: len(drawn)]
    found = [report.compare_clips(a.clip, b.clip).to_dict() for a, b in zip(drawn, stock, strict=True)]
    found = [
        {key: float(row[key]) for key in ("psnr", "ssim", "flicker_psnr") if row.get(key) is not None}
        | {"latent_relative_l2": report.relative_l2(a.latents[-1], b.latents[-1])}
        for row, a, b in zip(found, drawn, stock, strict=True)
    ][: len(prompts)]
    mean = {key: statistics.fmean(row[key] for row in found) for key in found[0]}
    return mean | {"per_prompt": [{"prompt": p} | row for p, row in zip(prompts, found, strict=True)]}


def ratios(base: Sequence[Sample], drawn: Sequence[Sample]) -> dict[str, Any]:
    """Speed-up over a baseline, from the rounds' own ratios: a slow round slows both sides."""
    return spread([b.seconds / d.seconds for b, d in zip(base, drawn, strict=True)])
