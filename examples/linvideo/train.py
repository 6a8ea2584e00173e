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

from converted import load_converted, resume, save_converted, spent
from quality import change, compared, draw, held_out_loss
from stages import Clock, Pool, layers_alone, match, select

from vdit_fast import accelerate, report
from vdit_fast.demo.architecture import FRAMES, HEIGHT
from vdit_fast.demo.model import load_demo_model
from vdit_fast.linear import SelectiveTransfer

# (frames, side in pixels): how often it is drawn
SIZES = {(12, 32): 0.3, (16, 40): 0.35, (20, 48): 0.2, (FRAMES, HEIGHT): 0.15}
SAMPLED = ((12, 32), (16, 40))
# Share of the time at which each stage ends.
POOL, MAPS, SELECT, BLOCKS, OWN = 0.08, 0.18, 0.30, 0.55, 0.59
MAP_RATE, WEIGHT_RATE = 0.015, 1e-3  # of single layers


def attention(model: Any, layer: int) -> torch.nn.Module:
    part: torch.nn.Module = model.blocks[layer].attn1
    return part


def block(model: Any, layer: int) -> torch.nn.Module:
    part: torch.nn.Module = model.blocks[layer]
    return part


class Conversion:
    """The original, the student that becomes the converted model, and what both stages of training share."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.original, self.student = load_demo_model(), load_demo_model()
        config = self.student.config
        self.depth = int(config.num_layers)
        shape = {"heads": int(config.num_attention_heads), "head_dim": int(config.attention_head_dim)}
        # The first layer stays softmax, as in the paper.
        self.transfer = SelectiveTransfer(range(1, self.depth), target=args.layers, **shape)
        self.handle = accelerate(self.student)
        self.transfer.attach(self.handle)
        self.clock = Clock(60 * args.minutes)
        self.pool = Pool(self.original, SIZES, SAMPLED, random.Random(args.seed))
        self.notes: dict[str, Any] = {}

    def maps_of(self, layer: int) -> list[torch.nn.Parameter]:
        place = self.transfer.layers.index(layer)
        return [self.transfer.q_maps[place], self.transfer.k_maps[place]]

    def weights_of(self, layer: int) -> dict[str, torch.nn.Parameter]:
        """The weights that are trained when a layer becomes linear: its whole block's."""
        block = self.student.blocks[layer]
        return {f"blocks.{layer}.{name}": p.requires_grad_() for name, p in block.named_parameters()}

    def alone(self, stage: str, layers: tuple[int, ...], end: float, *, weights: bool) -> None:
        rate = MAP_RATE / 3 if weights else MAP_RATE
        groups = {layer: [{"params": self.maps_of(layer), "lr": rate}] for layer in layers}
        for layer in layers if weights else ():
            groups[layer].append({"params": list(self.weights_of(layer).values()), "lr": WEIGHT_RATE})
        part = block if weights else attention
        found = layers_alone(self.original, self.student, part, groups, self.pool, self.clock, end, stage=stage)
        self.notes[stage] = found

    def fresh(self) -> tuple[int, ...]:
        """Find the layers and train them by themselves."""
        self.pool.grow(self.clock, POOL)
        self.transfer.round_(self.transfer.layers)
        self.alone("maps", self.transfer.layers, MAPS, weights=False)
        self.transfer.blend_(0.5)
        layers = select(self.student, self.transfer, self.pool, self.clock, SELECT)
        self.clock.log("chosen", len(layers), layers=list(layers))
        with self.clock.paused():
            self.notes["maps_only"] = held_out_loss(self.student, self.args.clips)
        self.alone("blocks", layers, BLOCKS, weights=True)
        self.pool.grow(self.clock, OWN, self.student)
        return layers

    def resumed(self, folder: Path) -> tuple[int, ...]:
        """Go on with a conversion that this wrote."""
        layers = resume(folder, self.student, self.transfer)
        self.alone("blocks", layers, BLOCKS, weights=True)
        self.pool.grow(self.clock, OWN, self.student)
        return layers

    def run(self) -> dict[str, Any]:
        """Train, write the converted model, and return what the training noted."""
        layers = self.fresh() if self.args.init is None else self.resumed(self.args.init)
        weights = {name: p for layer in layers for name, p in self.weights_of(layer).items()}
        maps = [w for layer in layers for w in self.maps_of(layer)]
        matched = match(self.student, list(weights.values()), maps, self.pool, self.clock, 1.0)
        names = {row["layer"]: row["name"] for row in self.handle.stats()["layers"]}
        minutes = self.args.minutes + (spent(self.args.init) if self.args.init is not None else 0)
        record = {"layers": list(layers), "minutes": minutes, "seed": self.args.seed}
        files = save_converted(self.args.out, self.transfer.feature_maps(names), self.student, weights, record)
        calls = {f"{frames}x{side}": len(found) for (frames, side), found in self.pool.calls.items()}
        seconds = {"wall": self.clock.rows[-1]["seconds"], "processor": round(time.process_time(), 1)}
        return {
            "layers": {"linear": list(layers), "of": self.depth},
            "files": {file.name: file.stat().st_size for file in files},
            "minutes": minutes,
            "seconds": seconds,
            "calls": calls,
            "matching_loss": matched,
            **self.notes,
            "log": self.clock.rows,
        }


def measure(args: argparse.Namespace, maps_only: dict[str, float] | None) -> dict[str, Any]:
    """Held-out loss and clips of the converted model as a user loads it, beside the original's."""
    original = load_demo_model()
    losses = {"original": held_out_loss(original, args.clips)}
    losses |= {} if maps_only is None else {"maps only": maps_only}
    originals = draw(original, args.prompts, args.steps)
    converted, linear = load_converted(args.out)
    with accelerate(converted, linear) as handle:
        losses["converted"] = held_out_loss(converted, args.clips)
        clips = draw(converted, args.prompts, args.steps)
        print(handle.report(), flush=True)
    changes = {name: change(loss, losses["original"]) for name, loss in losses.items() if name != "original"}
    print(report.table([[name, *loss.values()] for name, loss in losses.items()], ["sigma", *losses["original"]]))
    print({name: found["mean"] for name, found in changes.items()}, flush=True)
    both = {"original": originals, "converted": clips}
    sheet = {f"{prompt} ({kind})": drawn[prompt] for prompt in clips for kind, drawn in both.items()}
    report.contact_sheet(sheet, args.out / "contact_sheet.png", frames=6, scale=2, title="original and converted")
    return {"held_out_loss": losses, "change": changes, "clips": compared(clips, originals)}


def main() -> None:
    ap = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    ap.add_argument("--minutes", type=float, default=22, help="training time; measuring comes on top")
    ap.add_argument("--layers", type=int, help="layers to convert, of the candidates 1 to 5 (2)")
    ap.add_argument("--init", type=Path, help="folder of an earlier run to go on from, with its layers")
    ap.add_argument("--out", type=Path, default=Path("build/linvideo"))
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--clips", type=int, default=2, help="held-out clips")
    ap.add_argument("--prompts", type=int, default=1, help="clips to draw")
    ap.add_argument("--steps", type=int, default=8, help="denoising steps of a drawn clip")
    args = ap.parse_args()
    if args.init is not None and args.layers is not None:
        ap.error("--layers has no effect with --init: a run is gone on with in the layers that it has converted")
    args.layers = 2 if args.layers is None else args.layers
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    training = Conversion(args).run()
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "init")}
    document = {
        "kind": "vdit_fast.linvideo",
        "settings": settings | {"sizes": [[*size, often] for size, often in SIZES.items()]},
        **training,
        "command": f"python examples/linvideo/train.py --minutes {args.minutes:g} --layers {args.layers}"
        + ("" if args.init is None else " --init EARLIER"),
        "environment": report.environment(),
    }
    report.write_json(args.out / "linvideo.json", report.json_safe(document))  # training is long: nothing is lost
    document |= measure(args, document.pop("maps_only", None))
    print("written:", report.write_json(args.out / "linvideo.json", report.json_safe(document)))


if __name__ == "__main__":
    main()
