"""Make the demo model causal: a short fine-tuning with the teacher-forcing mask, so that it can stream.

    python examples/causal/train.py --out build/causal

Every step runs [clean copy, noisy copy] of a clip through ``teacher_forcing``: each chunk of three frames has a noise
level of its own and sees the clean frames that a rollout's cache would hold (CausVid, arXiv 2412.07772; diffusion
forcing, arXiv 2407.01392). The clean copy gets a little noise too, and is told so: in a rollout it is the model's own
work. This is what Self Forcing starts from; its own training, on rollouts, comes after it and is not done here.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vdit_fast import accelerate
from vdit_fast.demo.architecture import SHIFT
from vdit_fast.demo.model import load_demo_model, save_demo_model
from vdit_fast.demo.prompts import embed
from vdit_fast.handle import Handle
from vdit_fast.streaming import per_frame, teacher_forcing

sys.path.insert(0, str(Path(__file__).parents[1] / "demo_model"))  # for the clips
from data import sample_clip

CHUNK, HELD = 3, 9
"""Frames of a chunk, and frames that the rollout's cache holds."""
SIZES = ((2, 12, 32), (1, 15, 32), (1, 12, 48))
"""(batch, frames, side in pixels), drawn evenly."""
HELD_OUT_CLIPS = 12
LR, WARMUP, PROMPT_DROP, CONTEXT_NOISE, EMA_DECAY = 5e-4, 50, 0.1, 0.15, 0.99


def batch_of(size: tuple[int, int, int], rng: random.Random) -> tuple[Tensor, Tensor]:
    """(clips [B, 3, F, H, W] in [-1, 1], text)."""
    count, frames, side = size
    clips, prompts = zip(*(sample_clip(frames, side, side, rng) for _ in range(count)), strict=True)
    return torch.stack(clips), torch.stack([embed("" if rng.random() < PROMPT_DROP else p) for p in prompts])


def shifted(u: Tensor) -> Tensor:
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def causal_loss(handle: Handle, x0: Tensor, text: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
    """Weighted squared error of the predicted clean chunks, one value per item and frame [B, F].

    Args:
        x0: [B, 3, F, H, W].
        sigma: noise level of every frame [B, F], the same within a chunk.
        context: of the clean copy [B, 1].
    """
    frames = x0.shape[2]
    levels = torch.cat((context.expand(-1, frames), sigma), 1)
    s = levels[:, None, :, None, None]
    both = torch.cat((x0, x0), 2)
    both = both * (1 - s) + torch.randn_like(both) * s
    (model,) = handle.modules
    with teacher_forcing(handle, chunk_frames=CHUNK, cache_frames=HELD):
        timesteps = per_frame(handle, 1000 * levels, both)
        out = model(hidden_states=both, encoder_hidden_states=text, **timesteps, return_dict=False)[0]
    return (out[:, :, frames:] - x0).square().mean((1, 3, 4)) / (sigma.square() + 0.05)


def levels_of(x0: Tensor) -> tuple[Tensor, Tensor]:
    """A noise level for every chunk [B, F], and one for the clean copy [B, 1]."""
    batch, frames = x0.shape[0], x0.shape[2]
    sigma = shifted(torch.rand(batch, -(-frames // CHUNK))).repeat_interleave(CHUNK, 1)[:, :frames]
    return sigma, CONTEXT_NOISE * torch.rand(batch, 1) * (torch.rand(batch, 1) < 0.5)


@torch.no_grad()
def held_out(model: nn.Module, seed: int = 10_000) -> dict[str, float]:
    """Mean loss of a first chunk and of those behind clean frames, on clips that training never sees."""
    torch.manual_seed(seed)
    rng, rows = random.Random(seed), []
    with accelerate(model) as handle:
        for _ in range(HELD_OUT_CLIPS):
            x0, text = batch_of((1, 12, 40), rng)
            sigma, context = levels_of(x0)
            rows.append(causal_loss(handle, x0, text, sigma, 0 * context)[0])
    loss = torch.stack(rows).mean(0)
    return {"first_chunk": float(loss[:CHUNK].mean()), "later_chunks": float(loss[CHUNK:].mean())}


def main(arguments: list[str] | None = None) -> None:
    ap = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    ap.add_argument("--steps", type=int, default=1200, help="of the training, one to two seconds each")
    ap.add_argument("--out", type=Path, default=Path("build/causal"), help="folder of the weights")
    ap.add_argument("--threads", type=int, default=1, help="of torch")
    ap.add_argument("--seed", type=int, default=0, help="of clips and noise")
    args = ap.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    model: Any = load_demo_model().requires_grad_(True)
    before = held_out(model)
    print("before", before, flush=True)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimiser = torch.optim.AdamW(model.parameters(), LR, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    handle = accelerate(model)
    running, begin = [], time.monotonic()
    for step in range(1, args.steps + 1):
        rate = min(1.0, step / WARMUP, 2 * (1 - step / args.steps))
        optimiser.param_groups[0]["lr"] = LR * max(rate, 0.02)
        x0, text = batch_of(rng.choice(SIZES), rng)
        loss = causal_loss(handle, x0, text, *levels_of(x0)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        running.append(loss.item())
        with torch.no_grad():
            for kept, new in zip(ema.parameters(), model.parameters(), strict=True):
                kept.lerp_(new, 1 - min(EMA_DECAY, (1 + step) / (10 + step)))
        if step % 25 == 0:
            seconds = round(time.monotonic() - begin)
            print({"step": step, "seconds": seconds, "loss": round(sum(running) / len(running), 4)}, flush=True)
            running.clear()
    handle.remove()
    after = held_out(ema)
    facts = {"steps": args.steps, "chunk": CHUNK, "held": HELD, "before": before, "after": after}
    print("after", after, flush=True)
    save_demo_model(ema.state_dict(), args.out / "weights.safetensors", metadata={"causal_training": json.dumps(facts)})


if __name__ == "__main__":
    main()
