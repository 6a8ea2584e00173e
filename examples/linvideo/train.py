"""Convert layers of the demo model from softmax to linear attention (LinVideo, arXiv 2510.08318), and say what it cost.

    python examples/linvideo/train.py                      # some half an hour on one core; writes build/linvideo
    python examples/linvideo/train.py --minutes 5 --clips 1 --prompts 1

The time is shared by five stages: answered calls of the original; feature maps of every candidate by itself; the choice
of layers (selective transfer); the converted layers by themselves, projections included; the whole model by
any-timestep matching. Then the files are loaded as a user would, and measured: held-out loss and clips beside the
original's.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "demo_model"))  # its data, training and evaluation

from converted import load_converted, save_converted
from quality import change, compared, draw, held_out_loss
from stages import Clock, Pool, layers_alone, match, select

from vdit_fast import accelerate, report
from vdit_fast.demo.architecture import FRAMES, HEIGHT
from vdit_fast.demo.model import load_demo_model
from vdit_fast.linear import SelectiveTransfer

SIZES = ((16, 40), (FRAMES, HEIGHT), (20, 48))  # frames, side in pixels
# Share of the time at which each stage ends.
POOL, ALONE, SELECT, AGAIN, OWN, MATCH = 0.15, 0.27, 0.45, 0.53, 0.58, 1.0
ALONE_RATE, AGAIN_RATE, MUON_RATE, ADAM_RATE = 0.01, 1e-3, 0.002, 5e-4


def main() -> None:
    ap = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    ap.add_argument("--minutes", type=float, default=20, help="training time; the evaluation comes on top")
    ap.add_argument("--layers", type=int, default=2, help="layers to convert, of the candidates 1 to 5")
    ap.add_argument("--out", type=Path, default=Path("build/linvideo"))
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--clips", type=int, default=4, help="held-out clips of the evaluation")
    ap.add_argument("--prompts", type=int, default=2, help="clips to draw")
    ap.add_argument("--steps", type=int, default=12, help="denoising steps of a clip")
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    original, student = load_demo_model(), load_demo_model()
    config = student.config
    shape = {"heads": int(config.num_attention_heads), "head_dim": int(config.attention_head_dim)}
    # The first layer stays softmax, as in the paper.
    transfer = SelectiveTransfer(range(1, int(config.num_layers)), target=args.layers, **shape)
    handle = accelerate(student)
    names = {layer["layer"]: layer["name"] for layer in handle.stats()["layers"]}
    transfer.attach(handle)
    clock = Clock(60 * args.minutes)
    pool = Pool(original, SIZES, random.Random(args.seed))

    def maps_of(layer: int) -> list[torch.nn.Parameter]:
        place = transfer.layers.index(layer)
        return [transfer.q_maps[place], transfer.k_maps[place]]

    def all_of(layer: int) -> list[torch.nn.Parameter]:
        return [*maps_of(layer), *student.blocks[layer].attn1.parameters()]

    pool.grow(clock, POOL)
    transfer.round_(transfer.layers)
    alone = layers_alone(
        original, student, transfer.layers, maps_of, pool, clock, ALONE, stage="alone", rate=ALONE_RATE
    )
    transfer.blend_(0.5)
    layers = select(student, transfer, pool, clock, SELECT)
    ratios = [float(r) for r in transfer.ratio]
    clock.log("chosen", len(layers), layers=list(layers))
    with clock.paused():
        stages = {"maps only": held_out_loss(student, args.clips)}

    trained = [name for name, _ in student.named_parameters() if any(name.startswith(f"blocks.{i}.") for i in layers)]
    parameters = [student.get_parameter(name).requires_grad_() for name in trained]
    again = layers_alone(original, student, layers, all_of, pool, clock, AGAIN, stage="again", rate=AGAIN_RATE)
    pool.grow(clock, OWN, student)
    maps = [parameter for layer in layers for parameter in maps_of(layer)]
    matched = match(student, parameters, maps, pool, clock, MATCH, muon_rate=MUON_RATE, rate=ADAM_RATE)
    seconds = time.monotonic() - clock.started

    record = {"layers": list(layers), "minutes": round(seconds / 60, 1), "seed": args.seed}
    files = save_converted(args.out, transfer.feature_maps(names), student, trained, record)
    handle.remove()

    converted, linear = load_converted(args.out)
    losses = {"original": held_out_loss(original, args.clips), **stages}
    originals = draw(original, args.prompts, args.steps)
    with accelerate(converted, linear) as handle:
        losses["converted"] = held_out_loss(converted, args.clips)
        clips = draw(converted, args.prompts, args.steps)
        print(handle.report(), flush=True)
    changes = {name: change(loss, losses["original"]) for name, loss in losses.items() if name != "original"}
    print(report.table([[name, *loss.values()] for name, loss in losses.items()], ["sigma", *losses["original"]]))
    print({name: found["mean"] for name, found in changes.items()}, flush=True)
    sheet = {
        f"{prompt} ({kind})": c[prompt] for prompt in clips for kind, c in (("softmax", originals), ("linear", clips))
    }
    report.contact_sheet(sheet, args.out / "contact_sheet.png", frames=6, scale=2, title="original and converted")
    document: dict[str, Any] = {
        "kind": "vdit_fast.linvideo",
        "layers": {"linear": list(layers), "of": int(config.num_layers)},
        "settings": {"minutes": args.minutes, "threads": args.threads, "seed": args.seed, "sizes": SIZES},
        "files": {file.name: file.stat().st_size for file in files},
        "transfer": {"candidates": list(transfer.layers), "rounded": ratios, "alone": alone, "again": again},
        "matching_loss": matched,
        "seconds": seconds,
        "held_out_loss": losses,
        "change": changes,
        "clips": compared(clips, originals),
        "log": clock.rows,
        "command": f"python examples/linvideo/train.py --minutes {args.minutes:g} --layers {args.layers}",
        "environment": report.environment(),
    }
    print("written:", report.write_json(args.out / "linvideo.json", report.json_safe(document)))


if __name__ == "__main__":
    main()
