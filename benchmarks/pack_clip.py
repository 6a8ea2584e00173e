"""What compressed messages between stages do to a clip of the demo model.

    python benchmarks/pack_clip.py --out benchmarks/results/cpu

One process draws a clip of several frame blocks four times: plain, and with the hidden states at the ends of the stages
of 2 or 4 ranks packed and unpacked as ``parallel.packing.Compressed`` does, bit for bit what the ranks would compute
from their messages. Quality is against the plain clip of the same seed.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from harness import parser, write
from torch import Tensor

from vdit_fast import report
from vdit_fast.accelerate import accelerate
from vdit_fast.demo.model import load_demo_model
from vdit_fast.demo.prompts import embed
from vdit_fast.parallel import StagePipeline, split_layers
from vdit_fast.parallel.demo import x0_sampler
from vdit_fast.parallel.packing import Compressed, Packing

PROMPT = "red circle right, blue square up"
PACKINGS: dict[str, Packing] = {
    "bf16": Compressed("bf16"),
    "e4m3 of 128": Compressed("e4m3", 128),
    "e4m3 of 32": Compressed("e4m3", 32),
}


def draw(packing: Packing | None, ranks: int, options: argparse.Namespace) -> Tensor:
    """The clip [F, C, H, W] in [0, 1]."""
    model: Any = load_demo_model()

    def pass_on(_module: Any, _inputs: Any, out: Tensor) -> Tensor:
        assert packing is not None
        return packing.unpack(packing.pack(out), out.shape, out.dtype)

    if packing is not None:
        for own in split_layers(len(model.blocks), ranks)[:-1]:
            model.blocks[own[-1]].register_forward_hook(pass_on)
    pipeline = StagePipeline(accelerate(model, "exact"))
    text = embed(PROMPT)[None]
    made = pipeline.generate(
        x0_sampler(options.steps),
        (3, options.size, options.size),
        {"encoder_hidden_states": torch.cat((text, torch.zeros_like(text)))},
        blocks=options.blocks, num_per_block=8, num_cat=4, guidance=3.0, seed=options.seed,
    )  # fmt: skip
    blocks = dict(made)
    clip = torch.cat([blocks[index] for index in sorted(blocks)], dim=2)
    return ((clip[0].clamp(-1, 1) + 1) / 2).movedim(1, 0).contiguous()


def main() -> None:
    ap = parser(__doc__)
    ap.add_argument("--steps", type=int, default=8)
    ap.add_argument("--blocks", type=int, default=3)
    ap.add_argument("--size", type=int, default=64)
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--ranks", type=int, nargs="+", default=[4])
    options = ap.parse_args()
    torch.set_num_threads(1)
    plain, results = draw(None, 1, options), []
    for ranks in options.ranks:
        for name, packing in PACKINGS.items():
            clip = draw(packing, ranks, options)
            frames = report.psnr(clip, plain)
            results.append({
                "packing": name, "ranks": ranks, "psnr": float(frames.mean()), "psnr_min": float(frames.min()),
                "ssim": float(report.ssim(clip, plain).mean()),
                "largest": float((clip - plain).abs().max()),
            })  # fmt: skip
            print(results[-1], flush=True)
    document = {
        "kind": "vdit_fast.pack_clip",
        "version": 1,
        "settings": {k: getattr(options, k) for k in ("steps", "blocks", "size", "seed")} | {"guidance": 3.0},
        "frames": plain.shape[0],
        "results": results,
        "command": "python benchmarks/pack_clip.py",
    }
    write(options.out / "pack_clip.json", document)


if __name__ == "__main__":
    main()
