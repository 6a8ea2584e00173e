"""Per-frame noise schedules and region masks on a CPU: what kept frames, windows and class masks save.

    python benchmarks/frame_schedules.py --out benchmarks/results/cpu

Three tables, each with sides that take turns within a round after one unmeasured run of each:

* AR-Diffusion: one clip of the demo model, frame blocks behind each other. ``SDPA mask``: the stock model whose
  self-attention reads a boolean N x N mask, the whole clip every time; ``plan``: the same by ``causal_frames``;
  ``window``: without the frames that wait; ``kept``: finished frames in a cache. All four draw the same clip.
* StreamDiT: the first chunk's latency and frames per second of the demo model behind a moving buffer, dense and with
  shifted windows.
* DiTraj: one attention call of Wan's 480p frame size: dense, ``SDPA mask`` and ``class plan``.

The demo model was not trained for such schedules: this is about time, not about pictures.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
from harness import parser, write
from torch import Tensor

import vdit_fast
from vdit_fast import accelerate
from vdit_fast.config import Config
from vdit_fast.demo.model import load_demo_model
from vdit_fast.demo.prompts import embed
from vdit_fast.planners import ShiftedWindow
from vdit_fast.regions import region_labels, region_plan
from vdit_fast.streaming import (
    ARDiffusion,
    ARSchedule,
    BufferSchedule,
    CausalFrames,
    FlowEuler,
    FrameModel,
    StreamBuffer,
    causal_frames,
)

TEXT = {"encoder_hidden_states": embed("red circle right, blue square up")[None]}
PAGE = 256
Sides = dict[str, Callable[[], Any]]


def take_turns(sides: Sides, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Numbers of every side and round; a side returns its own, and its seconds are added."""
    for run in sides.values():
        run()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            begin = time.perf_counter()
            numbers = run()
            seconds = {"seconds": time.perf_counter() - begin}
            found[name].append(seconds | numbers if isinstance(numbers, dict) else seconds)
    return found


def euler(steps: int) -> FlowEuler:
    return FlowEuler(torch.linspace(1, 0, steps + 1).tolist(), "sample", floor=0.05)


def table(name: str, found: dict[str, list[dict[str, float]]], **facts: Any) -> dict[str, Any]:
    rows = []
    for side, rounds in found.items():
        middle = {key: statistics.median(row[key] for row in rounds) for key in rounds[0]}
        rows.append({"side": side, "median": middle, "rounds": rounds})
        print(f"{name:14s} {side:24s}", {key: round(value, 4) for key, value in middle.items()}, flush=True)
    return {"name": name, **facts, "rows": rows}


# ---------------------------------------------------------------------- AR-Diffusion
def masked_by_sdpa(model: Any, schedule: ARSchedule, noise: Tensor) -> Tensor:
    """The same schedule by the stock model: the whole clip at every iteration, a boolean mask in every layer."""
    sampler = euler(schedule.steps)
    block = torch.arange(schedule.frames).repeat_interleave(PAGE) // schedule.block
    mask, real = block[:, None] >= block, functional.scaled_dot_product_attention

    def masked(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **options: Any) -> Tensor:
        return real(query, key, value, attn_mask=mask if query.shape[2] == key.shape[2] else attn_mask, **options)

    clip, times = noise.clone(), torch.tensor([*sampler.timesteps, 0.0])
    functional.scaled_dot_product_attention = masked
    try:
        for iteration in schedule:
            t = times[list(iteration.done)].repeat_interleave(PAGE)[None]
            predicted = model(clip, t, **TEXT, return_dict=False)[0]
            moving = clip[:, :, iteration.active.start : iteration.active.stop]
            own = predicted[:, :, iteration.active.start : iteration.active.stop]
            moving.copy_(sampler.move(moving, own, iteration.done[iteration.active.start : iteration.active.stop]))
    finally:
        functional.scaled_dot_product_attention = real
    return clip


def ar_diffusion(frames: int, steps: int, ar_step: int, block: int, rounds: int) -> dict[str, Any]:
    noise = torch.randn(1, 3, frames, 64, 64, generator=torch.Generator().manual_seed(0))
    schedule = ARSchedule(frames, steps, ar_step, block)
    windowed = ARSchedule(frames, steps, ar_step, block, window=frames)
    clips: dict[str, Tensor] = {}

    def side(name: str, order: ARSchedule, keep: bool) -> Callable[[], None]:
        model = load_demo_model()
        handle = accelerate(model, Config(text_kv=True))
        if not keep:
            causal_frames(handle, CausalFrames(block))
        draw = ARDiffusion(FrameModel(handle, TEXT), order, euler(steps), keep=keep)
        return lambda: clips.update({name: draw(noise)})

    stock = load_demo_model()
    sides: Sides = {
        "SDPA mask": lambda: clips.update({"SDPA mask": masked_by_sdpa(stock, schedule, noise)}),
        "plan": side("plan", schedule, keep=False),
        "window": side("window", windowed, keep=False),
        "kept": side("kept", schedule, keep=True),
    }
    found = take_turns(sides, rounds)
    want = clips["SDPA mask"]
    off = {name: float((clip - want).norm() / want.norm()) for name, clip in clips.items()}
    print("relative difference of the clips", {name: f"{value:.1e}" for name, value in off.items()})
    shown = {"frames": frames, "steps": steps, "ar_step": ar_step, "block": block, "iterations": len(schedule)}
    return table("AR-Diffusion", found, **shown, difference=off)


# ---------------------------------------------------------------------- StreamDiT
def stream_dit(chunks: int, chunk: int, micro_steps: int, count: int, rounds: int) -> dict[str, Any]:
    schedule = BufferSchedule(chunks, chunk, micro_steps)

    def side(config: Config) -> Callable[[], dict[str, float]]:
        transformer = load_demo_model()
        model = FrameModel(accelerate(transformer, config), TEXT)

        def run() -> dict[str, float]:
            begin = time.perf_counter()
            buffer = StreamBuffer(model, schedule, euler(schedule.steps), (1, 3, 64, 64), generator=torch.Generator())
            ready = [time.perf_counter() - begin for _ in itertools.islice(buffer.stream(), count)]
            return {
                "first_chunk_seconds": ready[0],
                "frames_per_second": chunk * (count - 1) / (ready[-1] - ready[0]),
            }

        return run

    found = take_turns(
        {
            "dense": side(Config(text_kv=True)),
            "shifted windows 4 x 8 x 8": side(Config(attention=ShiftedWindow(window=(4, 8, 8)), text_kv=True)),
        },
        rounds,
    )
    return table("StreamDiT", found, chunks=chunks, chunk=chunk, micro_steps=micro_steps, tokens=schedule.frames * PAGE)


# ---------------------------------------------------------------------- DiTraj
def ditraj(frames: int, heads: int, rounds: int) -> dict[str, Any]:
    grid = frames, 30, 52
    boxes = [(6, 2 + f, 20, 20 + f) for f in range(frames)]
    labels = region_labels(grid, boxes)
    plan, tokens = region_plan(labels), len(labels)
    q, k, v = torch.randn(3, 1, tokens, heads, 64, generator=torch.Generator().manual_seed(0)).unbind()
    pair = labels[:, None] * 3 + labels
    mask = (pair != 1 * 3 + 2) & (pair != 2 * 3 + 1)
    by_head = [x.transpose(1, 2) for x in (q, k, v)]
    found = take_turns(
        {
            "dense": lambda: vdit_fast.attention(q, k, v),
            "SDPA mask": lambda: functional.scaled_dot_product_attention(*by_head, attn_mask=mask),
            "class plan": lambda: vdit_fast.attention(q, k, v, plan),
        },
        rounds,
    )
    assert plan is not None
    sizes = {"mask_bytes": mask.nbytes, "plan_bytes": plan.nbytes, "density": plan.density}
    return table("DiTraj", found, grid=grid, heads=heads, head_dim=64, **sizes)


@torch.no_grad()
def main() -> None:
    ap = parser(__doc__, rounds=3)
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--quick", action="store_true", help="small sizes, to try the script")
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    if args.quick:
        tables = [
            ar_diffusion(4, 2, 1, 2, args.rounds),
            stream_dit(2, 1, 1, 3, args.rounds),
            ditraj(2, 1, args.rounds),
        ]
    else:
        tables = [
            ar_diffusion(16, 8, 4, 2, args.rounds),
            stream_dit(4, 2, 1, 8, args.rounds),
            ditraj(8, 1, args.rounds),
        ]
    document = {
        "kind": "frame_schedules",
        "threads": args.threads,
        "rounds": args.rounds,
        "tables": tables,
    }
    write(args.out / "frame_schedules.json", document)


if __name__ == "__main__":
    main()
