"""Procedural clips for the demo model: textured shapes that pass in front of each other over a panning background."""

from __future__ import annotations

import math
import random

import torch

from vdit_fast.demo.prompts import COLOURS, DIRECTIONS, SHAPES


def _inside(shape: str, dx: torch.Tensor, dy: torch.Tensor, r: float) -> torch.Tensor:
    """Signed coverage in [0, 1] of a shape of radius ``r`` pixels, with a one-pixel soft edge."""
    if shape == "circle":
        dist = (dx * dx + dy * dy).sqrt() - r
    elif shape == "ring":
        dist = ((dx * dx + dy * dy).sqrt() - 0.78 * r).abs() - 0.26 * r
    elif shape == "square":
        dist = torch.maximum(dx.abs(), dy.abs()) - 0.85 * r
    else:  # triangle, point up
        dist = torch.maximum(dx.abs() * 0.87 - (dy + r) * 0.45, dy - 0.75 * r)
    return (0.5 - dist).clamp(0, 1)


def sample_clip(frames: int, height: int, width: int, rng: random.Random) -> tuple[torch.Tensor, str]:
    """One clip ``[3, frames, height, width]`` in [-1, 1] and its prompt; objects have the same size on every canvas."""
    t = torch.arange(frames, dtype=torch.float32).view(-1, 1, 1)
    yy, xx = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    pan = rng.uniform(-0.5, 0.5), rng.uniform(-0.5, 0.5)
    angle, freq = rng.uniform(0, math.pi), rng.uniform(0.25, 0.5)
    phase = math.cos(angle) * (xx + pan[0] * t) + math.sin(angle) * (yy + pan[1] * t)
    wave = torch.sin(freq * phase + rng.uniform(0, 6.28))
    base = torch.tensor([rng.uniform(-0.7, -0.1) for _ in range(3)]).view(3, 1, 1, 1)
    clip = base + 0.15 * wave

    count = 1 if rng.random() < 0.4 else 2
    words = []
    colours = rng.sample(list(COLOURS), count)
    for index in reversed(range(count)):  # the first object of the prompt is drawn last: it is the nearest
        colour, shape, direction = colours[index], rng.choice(SHAPES), rng.choice(list(DIRECTIONS))
        radius, speed = rng.uniform(7.5, 11.0), rng.uniform(0.6, 1.3)
        vx, vy = DIRECTIONS[direction][0] * speed, DIRECTIONS[direction][1] * speed
        x_mid, y_mid = rng.uniform(0.3, 0.7) * width, rng.uniform(0.3, 0.7) * height
        dx = xx - (x_mid + vx * (t - frames / 2))
        dy = yy - (y_mid + vy * (t - frames / 2))
        alpha = _inside(shape, dx, dy, radius)
        texture = 0.12 * torch.sin(0.9 * dx) * torch.sin(0.9 * dy)
        paint = torch.tensor(COLOURS[colour]).view(3, 1, 1, 1) + texture
        clip = clip * (1 - alpha) + paint * alpha
        words.insert(0, f"{colour} {shape} {direction}")
    return clip.clamp(-1, 1), ", ".join(words)
