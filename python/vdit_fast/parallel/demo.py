"""A long clip of the demo model through a stage pipeline: ``python -m vdit_fast.parallel.demo``, alone or by torchrun.

torchrun --nproc-per-node 2 -m vdit_fast.parallel.demo --check
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vdit_fast import report
from vdit_fast.accelerate import accelerate
from vdit_fast.demo.architecture import SIGMA_FLOOR
from vdit_fast.demo.model import load_demo_model
from vdit_fast.demo.prompts import embed, parse
from vdit_fast.demo.sampler import check_sizes, make_scheduler
from vdit_fast.parallel.arguments import RankParser, after_the_first
from vdit_fast.parallel.checkpoint import Checkpoint
from vdit_fast.parallel.refusals import check_settings, staged_root
from vdit_fast.parallel.sampler import SchedulerSampler
from vdit_fast.parallel.schedule import Schedule, split_layers
from vdit_fast.parallel.stages import StagePipeline
from vdit_fast.parallel.transport import Alone
from vdit_fast.parallel.watch import CAUSE, RankFailed

__all__ = ["main", "x0_sampler"]

PATIENCE = 10.0
START = 25.0
"""Seconds within which all ranks must have found each other."""


def x0_sampler(steps: int) -> SchedulerSampler:
    """The demo model's schedule: it predicts the clean clip, which is turned into a velocity above the noise floor."""
    scheduler = make_scheduler()
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    sigmas = scheduler.sigmas.tolist()

    def velocity(x0: Tensor, latents: Tensor, step: int) -> Tensor:
        return (latents - x0) / max(sigmas[step], SIGMA_FLOOR)

    return SchedulerSampler(scheduler, velocity, last=lambda x0, made: x0)


def main(arguments: list[str] | None = None) -> int:
    """Draw the clip; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    _check_options(parser, options, ranks)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if ranks > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=START))
    return _draw(parser, options, device)


def _check_options(parser: RankParser, options: argparse.Namespace, ranks: int) -> None:
    """End on all ranks, before they wait for each other, where the options cannot be meant."""
    parser.needs(options, "resume", "checkpoint", "it goes on from the state that a run has left in that folder")
    parser.needs(options, "every", "checkpoint", "it says how often the state is kept there")
    parser.needs(options, "tolerance", "check", "nothing is compared")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no GPU; use cpu")
    model: Any = load_demo_model()
    try:
        with accelerate(model, options.config) as handle:
            staged_root(handle)
            check_settings(handle.config, options.num_cat, bool(options.checkpoint), options.resume)
        split_layers(len(model.blocks), ranks)
        frames = Schedule(options.steps, options.blocks, options.num_per_block, options.num_cat).frames
        check_sizes(model, options.steps, options.guidance, frames, options.height, options.width)
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        parser.wrong(error)


def _draw(parser: RankParser, options: argparse.Namespace, device: torch.device) -> int:
    model: Any = load_demo_model()
    model = model.to(device)
    pipeline = StagePipeline(accelerate(model, options.config), release=True, patience=PATIENCE)
    _hear_of_failures(pipeline)
    began = time.perf_counter()
    try:
        checkpoint = Checkpoint(options.checkpoint, options.every) if options.checkpoint else None
        blocks = dict(_blocks(pipeline, options, checkpoint, options.resume))
    except (ValueError, OSError) as error:
        if pipeline.begun:
            raise
        parser.wrong(error)  # a folder of another run, or one that cannot be written to
    except RankFailed:
        if not pipeline.begun:
            after_the_first()
        raise
    seconds = time.perf_counter() - began
    folder = Path(options.out)
    pipeline.trace.write(folder, pipeline.facts())
    if pipeline.rank != 0:
        return 0
    if options.resume and not pipeline.facts()["schedule"]["first"]:
        print(f"nothing to resume: {options.checkpoint} has no state of an earlier run, so all was drawn")
    drawn = sorted(blocks)
    for index in range(options.blocks):  # what the run before the restart had finished
        if index not in blocks:
            assert checkpoint is not None
            blocks[index] = checkpoint.block(index)
    clip = torch.cat([blocks[index].cpu() for index in range(options.blocks)], dim=2)
    _write_clip(clip, folder)
    _print(pipeline, clip, seconds, drawn)
    return _check(options, clip) if options.check else 0


def _blocks(pipeline: StagePipeline, options: argparse.Namespace, checkpoint: Checkpoint | None, resume: bool) -> Any:
    text = embed(options.prompt)[None]
    return pipeline.generate(
        x0_sampler(options.steps),
        (3, options.height, options.width),
        {"encoder_hidden_states": torch.cat((text, torch.zeros_like(text)))},
        blocks=options.blocks,
        num_per_block=options.num_per_block,
        num_cat=options.num_cat,
        guidance=options.guidance,
        seed=options.seed,
        checkpoint=checkpoint,
        resume=resume,
    )


def _print(pipeline: StagePipeline, clip: Tensor, seconds: float, drawn: list[int]) -> None:
    facts, expected, run = pipeline.facts(), pipeline.expected(), pipeline.facts()["schedule"]
    total = run["steps"] + run["blocks"] - 1
    print(f"{facts['ranks']} ranks, transformer blocks per rank {[len(layers) for layers in pipeline.layers]}")
    print(f"frames {clip.shape[2]}, frame blocks drawn {len(drawn)} of {run['blocks']}")
    assert pipeline.queue is not None
    done = pipeline.queue.iteration - run["first"]
    began = f" after a restart at iteration {run['first']}" if run["first"] else ""
    print(f"iterations {done}{began}, T + n - 1 = {total}")
    for way in ("sent", "received"):
        messages, size = facts[way]
        agree = "equal" if facts[way] == expected[way] else "DIFFERENT"
        want = f"formula {expected[way][0]} and {expected[way][1]:,}: {agree}"
        print(f"rank 0 {way} {messages} messages, {size:,} bytes ({want})")
    print(f"a message to the next stage has {facts['hop_bytes']:,} bytes")
    print(f"weights on rank 0: {pipeline.stage.weight_bytes:,} bytes")
    kinds = ", ".join(f"{kind} {pipeline.trace.seconds(kind):.2f}" for kind in ("compute", "send", "result", "step"))
    print(f"{seconds:.2f} s; on rank 0: {kinds}", flush=True)


def _check(options: argparse.Namespace, clip: Tensor) -> int:
    """Draw the clip again in this process alone and compare."""
    model = load_demo_model()
    alone = StagePipeline(accelerate(model, options.config), transport=Alone())
    began = time.perf_counter()
    blocks = dict(_blocks(alone, options, None, False))
    again = torch.cat([blocks[index] for index in sorted(blocks)], dim=2)
    difference = float((again - clip).abs().max())
    seconds = time.perf_counter() - began
    same = again.shape == clip.shape and difference <= options.tolerance
    words = "equal within" if same else "NOT equal within"
    print(f"one process: {seconds:.2f} s, {again.shape[2]} frames, largest difference {difference:g}, {words} rounding")
    return 0 if same else 1


def _write_clip(clip: Tensor, folder: Path) -> None:
    frames = ((clip[0].clamp(-1, 1) + 1) / 2).movedim(1, 0).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(clip, folder / "clip.pt")
    try:
        print(f"clip: {report.write_video(folder / 'clip.mkv', frames, fps=12)}")
    except ImportError as error:
        print(f"clip: {folder / 'clip.pt'}; no film, as {error}")


def _hear_of_failures(pipeline: StagePipeline) -> None:
    """A launcher that sees one rank die ends the others: say first which one it was."""

    def ended(number: int, frame: Any) -> None:
        until = time.monotonic() + CAUSE + 2
        try:
            while time.monotonic() < until:
                pipeline.transport.check()
                time.sleep(0.1)
            print(f"[rank {pipeline.rank}] ended by the launcher", file=sys.stderr, flush=True)
        except RankFailed as error:
            print(f"[rank {pipeline.rank}] {error}", file=sys.stderr, flush=True)
        os._exit(1)

    signal.signal(signal.SIGTERM, ended)


def _parser() -> RankParser:
    parser = RankParser(
        prog="python -m vdit_fast.parallel.demo",
        description="A long clip of the demo model through a stage pipeline: in this process, or in those of "
        "`python -m torch.distributed.run --nproc-per-node N -m vdit_fast.parallel.demo`.",
    )
    words = "one or two objects, each 'colour shape direction'"
    parser.add_argument("--prompt", default="red circle right, blue square up", type=_prompt, help=words)
    parser.add_argument("--steps", type=int, default=6, help="denoising steps of a frame block")
    parser.add_argument("--blocks", type=int, default=6, help="frame blocks")
    parser.add_argument("--num-per-block", type=int, default=6, help="frames of a block")
    parser.add_argument("--num-cat", type=int, default=2, help="frames that a block sees of its neighbours")
    parser.add_argument("--height", type=int, default=64, help="pixels, a multiple of 4")
    parser.add_argument("--width", type=int, default=64, help="pixels, a multiple of 4")
    parser.add_argument("--guidance", type=float, default=3.0, help="classifier-free guidance scale; 1 switches it off")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--config", default="exact", help="preset, YAML or JSON file for accelerate, without a cache")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=_count, default=1, help="of each rank; the same for equal bits")
    parser.add_argument("--out", default="outputs/parallel", help="folder of the clip and the traces")
    parser.add_argument("--checkpoint", help="folder that the state is kept in")
    parser.add_argument("--every", type=_count, default=1, help="iterations from one state to the next")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --checkpoint, if it has one")
    parser.add_argument("--check", action="store_true", help="compare with the run of one process")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="largest difference that --check allows")
    return parser


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)


def _prompt(text: str) -> str:
    try:
        parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


if __name__ == "__main__":
    try:
        code = main()
    except RankFailed as error:
        print(f"[rank {os.environ.get('RANK', '0')}] {error}", file=sys.stderr)
        code = 1
    except SystemExit as error:  # --help, or a bad argument
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a thread may sit in a call that waits for a rank that is gone
