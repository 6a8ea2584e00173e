"""Export the trained demo model and show what it learned: held-out loss, attention recall, samples.

    python examples/demo_model/evaluate.py --run build/demo_model --out docs/assets/demo_model

Writes the package's weight file, a contact sheet, recall pictures and ``evaluation.json``.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from data import sample_clip
from diffusers import WanTransformer3DModel
from recall import measure
from train import init_local_attention

from vdit_fast import report
from vdit_fast.demo.architecture import FRAMES, HEIGHT, TRANSFORMER_CONFIG, WIDTH
from vdit_fast.demo.model import WEIGHTS, load_demo_model, save_demo_model
from vdit_fast.demo.prompts import embed
from vdit_fast.demo.sampler import DemoPipeline

SIGMAS = (0.95, 0.8, 0.6, 0.4, 0.2)
PROMPTS = (
    "red circle right",
    "blue square up, yellow ring left",
    "green triangle down, white circle right",
    "purple ring left, green square right",
    "white triangle up",
    "yellow circle down, red square left",
)
HELD_OUT_SEED = 1_000_003  # no training run reaches it


def held_out_calls(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Clips and prompts that training has not seen."""
    rng = random.Random(HELD_OUT_SEED)
    pairs = (sample_clip(FRAMES, HEIGHT, WIDTH, rng) for _ in range(count))
    return [(clip[None], embed(prompt)[None]) for clip, prompt in pairs]


def call_arguments(clip: torch.Tensor, text: torch.Tensor, sigma: float, seed: int) -> dict[str, Any]:
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(seed))
    return {
        "hidden_states": clip * (1 - sigma) + noise * sigma,
        "timestep": torch.tensor([sigma * 1000]),
        "encoder_hidden_states": text,
        "return_dict": False,
    }


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, clips: int) -> dict[str, dict[str, float]]:
    """Mean squared error of the predicted clean clip, beside predictors that need no network."""
    rows: dict[str, dict[str, float]] = {}
    for sigma in SIGMAS:
        errors: dict[str, list[float]] = {}
        for seed, (clip, text) in enumerate(held_out_calls(clips)):
            args = call_arguments(clip, text, sigma, seed)
            noisy = args["hidden_states"]
            gain = float((noisy * clip).sum() / noisy.square().sum())
            guesses = {
                "model": model(**args)[0],
                "model, no prompt": model(**{**args, "encoder_hidden_states": text * 0})[0],
                "noisy clip": noisy,
                "noisy clip, best gain": noisy * gain,
                "mean colour of the true clip": clip.mean((2, 3, 4), keepdim=True).expand_as(clip),
            }
            for name, guess in guesses.items():
                errors.setdefault(name, []).append(float((guess - clip).square().mean()))
        rows[f"{sigma:g}"] = {name: sum(e) / len(e) for name, e in errors.items()}
    return rows


def mean(recall: list[list[float]]) -> float:
    return sum(map(sum, recall)) / sum(map(len, recall))


def main() -> None:
    ap = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    ap.add_argument("--run", type=Path, default=Path("build/demo_model"), help="folder that train.py wrote")
    ap.add_argument("--out", type=Path, default=Path("docs/assets/demo_model"))
    ap.add_argument("--clips", type=int, default=4, help="held-out clips")
    ap.add_argument("--trained-on", default="CPU", help="hardware, for the record")
    args = ap.parse_args()
    if not (args.run / "checkpoint.pt").is_file():
        ap.error(f"--run: {args.run} has no checkpoint.pt; train first: python examples/demo_model/train.py")
    args.out.mkdir(parents=True, exist_ok=True)

    saved = torch.load(args.run / "checkpoint.pt", weights_only=True)
    counts = {"steps": saved["step"], "clips": saved["seen"], "seconds": round(saved["spent"])}
    training = {key: n + saved["before"].get(key, 0) for key, n in counts.items()} | {"on": args.trained_on}
    save_demo_model(saved["ema"], metadata={"training": json.dumps(training)})
    model = load_demo_model()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{WEIGHTS.name}: {parameters:,} parameters, {WEIGHTS.stat().st_size / 2**20:.1f} MB; {training}", flush=True)

    torch.manual_seed(0)
    untrained = WanTransformer3DModel(**TRANSFORMER_CONFIG).eval()
    fresh = WanTransformer3DModel(**TRANSFORMER_CONFIG).eval()
    init_local_attention(fresh)
    calls = [
        call_arguments(clip, text, sigma, seed)
        for seed, (clip, text) in enumerate(held_out_calls(1))
        for sigma in (0.9, 0.6, 0.3)
    ]
    recalls = {
        name: measure(net, calls)
        for name, net in (("trained", model), ("at the start of training", fresh), ("random weights", untrained))
    }
    for name, found in recalls.items():
        print(name, {order: round(mean(values), 3) for order, values in found.items()}, flush=True)
    report.density_heatmap(
        recalls["trained"]["best order of each head"],
        args.out / "recall.png",
        title="attention mass in the best 25 % of the blocks",
    )

    losses = held_out_loss(model, args.clips)
    headers = ["sigma", *next(iter(losses.values()))]
    print(report.table([[s, *(f"{v:.4f}" for v in row.values())] for s, row in losses.items()], headers), flush=True)

    pipe = DemoPipeline(model)
    clips = {}
    for seed, prompt in enumerate(PROMPTS):
        clips[prompt] = pipe(prompt, seed=seed).clip
        print("drawn:", prompt, flush=True)
    report.contact_sheet(clips, args.out / "contact_sheet.png", frames=6, scale=2, title="samples, one row a prompt")

    report.write_json(
        args.out / "evaluation.json",
        {
            "parameters": parameters,
            "file_bytes": WEIGHTS.stat().st_size,
            "training": training,
            "held_out_loss": losses,
            "recall": {n: {"mean": {o: mean(v) for o, v in f.items()}, "layer_head": f} for n, f in recalls.items()},
            "environment": report.environment(),
        },
    )


if __name__ == "__main__":
    main()
