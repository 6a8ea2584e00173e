"""Stream long clips with the causal demo model and with the one it came from, and measure both.

    python examples/causal/rollout.py                                                # the packaged weights
    python examples/causal/rollout.py --weights build/causal/weights.safetensors     # those of your own training

Writes a contact sheet and ``rollout.json``. Per model: the movement between neighbouring frames where two chunks meet,
over that inside chunks (1 where a cut cannot be seen), and the detail (mean absolute difference of neighbouring pixels)
of the last third of a clip over that of the first third. Clips of the training's kind give the same two numbers to
compare with; their objects leave the canvas too.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vdit_fast import accelerate, report, stream
from vdit_fast.demo.model import CAUSAL_WEIGHTS, load_demo_model
from vdit_fast.demo.prompts import embed
from vdit_fast.streaming import SelfForcing

sys.path.insert(0, str(Path(__file__).parents[1] / "demo_model"))  # for the clips
from data import sample_clip

PROMPTS = ("red circle right", "blue square up, yellow ring left", "green triangle down", "white triangle up")
STEPS = (1000, 875, 750, 625, 500, 375, 250, 125)
"""More than the published four: the model is no distilled student."""


def settings(guidance: float) -> SelfForcing:
    return SelfForcing(
        chunk_frames=3, cache_frames=9, store="pre_rope", prediction="x0", shift=3.0, timesteps=STEPS, guidance=guidance
    )


def draw(model: nn.Module, prompt: str, frames: int, side: int, guidance: float) -> Tensor:
    """[frames, 3, side, side] in [0, 1]."""
    text = embed(prompt)[None]
    chunks = stream(
        model,
        settings(guidance),
        prompt_embeds=text,
        negative_prompt_embeds=torch.zeros_like(text),
        latent_size=(side, side),
        frames=frames,
        generator=torch.Generator().manual_seed(0),
    )
    clip = torch.cat([chunk.latents for chunk in chunks], 2)[0]
    return ((clip.clamp(-1, 1) + 1) / 2).movedim(1, 0)


def numbers(clip: Tensor, chunk: int = 3) -> dict[str, float]:
    """What the page's two columns are made of."""
    moved = (clip[1:] - clip[:-1]).abs().mean((1, 2, 3))
    meets = torch.arange(1, len(clip)) % chunk == 0
    detail = (clip[..., 1:] - clip[..., :-1]).abs().mean((1, 2, 3)) + (clip[:, :, 1:] - clip[:, :, :-1]).abs().mean(
        (1, 2, 3)
    )
    third = len(clip) // 3
    return {
        "border_over_inside": float(moved[meets].mean() / moved[~meets].mean()),
        "detail_last_over_first": float(detail[-third:].mean() / detail[:third].mean()),
    }


def main(arguments: list[str] | None = None) -> None:
    ap = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    ap.add_argument("--weights", type=Path, default=CAUSAL_WEIGHTS, help="what examples/causal/train.py wrote")
    ap.add_argument("--frames", type=int, default=36, help="of a clip, 3 in a chunk")
    ap.add_argument("--side", type=int, default=48, help="of the frames in pixels, a multiple of 4")
    ap.add_argument("--guidance", type=float, default=2.0, help="classifier-free guidance scale; 1 switches it off")
    ap.add_argument("--threads", type=int, default=1, help="of torch")
    ap.add_argument("--out", type=Path, default=Path("outputs/causal"), help="folder of the sheet and the numbers")
    args = ap.parse_args(arguments)
    if not args.weights.is_file():
        ap.error(f"--weights: {args.weights} does not exist; train first: python examples/causal/train.py")
    torch.set_num_threads(args.threads)
    models = {"trained on whole clips": load_demo_model(), "causal": load_demo_model(path=args.weights)}
    clips: dict[str, Tensor] = {}
    rows: dict[str, list[dict[str, float]]] = {"clips of the training's kind": []}
    rng = random.Random(10_000)
    for _ in range(len(PROMPTS)):
        clip, _ = sample_clip(args.frames, args.side, args.side, rng)
        rows["clips of the training's kind"].append(numbers(((clip + 1) / 2).movedim(1, 0)))
    for name, model in models.items():
        rows[name] = []
        with accelerate(model, {"text_kv": True}):
            for prompt in PROMPTS:
                clips[f"{name}: {prompt}"] = draw(model, prompt, args.frames, args.side, args.guidance)
                rows[name].append(numbers(clips[f"{name}: {prompt}"]))
    result: dict[str, Any] = {"frames": args.frames, "side": args.side, "guidance": args.guidance, "steps": STEPS}
    result["models"] = {
        name: {"clips": found, "median": {key: statistics.median(row[key] for row in found) for key in found[0]}}
        for name, found in rows.items()
    }
    for name, found in result["models"].items():
        print(f"{name:30s}", {key: round(value, 3) for key, value in found["median"].items()})
    args.out.mkdir(parents=True, exist_ok=True)
    report.contact_sheet(clips, args.out / "rollout.png", frames=10, scale=1, title="streamed, 3 frames at a time")
    report.write_json(args.out / "rollout.json", result)


if __name__ == "__main__":
    main()
