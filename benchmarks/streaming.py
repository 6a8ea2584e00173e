"""Streams the demo model chunk by chunk: latency of the first chunk, frames per second, memory, against its peers.

    python benchmarks/streaming.py --out benchmarks/results/cpu

Sides, all of them the same rollout with the same noise (chunks of frames, four denoise steps and a pass over the clean
chunk, as Self Forcing has it):

* ``vdit_fast``: ``stream`` with keys after RoPE, and with keys before it;
* ``shift-left cache``: the stock model whose processors keep keys and values in one buffer that is shifted left when
  frames leave, read by torch's SDPA: the form of the published code;
* ``recomputed``: the stock model without a cache; every denoise step runs the window of frames again. Its frames see
  later ones of the window, so it draws other clips; it is here for its time, and measured once.

Each eager and with compiled blocks (inductor), the last without. Frames are latent frames, which are those of the clip
for this model. Sides take turns within a round, after one unmeasured round. The memory run goes ten cache
lengths far. The demo model was not trained to be causal: this is about time and memory, not about pictures.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from harness import parser, write
from torch import Tensor, nn

from vdit_fast import accelerate, stream
from vdit_fast.demo.model import load_demo_model
from vdit_fast.demo.prompts import embed
from vdit_fast.models.wan import rotate
from vdit_fast.streaming import SelfForcing

PROMPT, SEED = "red circle right, blue square up", 0
SHAPE, PAGE = (1, 3, 64, 64), 256
TEXT = embed(PROMPT)[None]
SLOW = "recomputed"
"""Measured once, without a rollout before."""


class ShiftLeft:
    """Self-attention of one layer over a dense buffer of keys after RoPE and values, shifted left when it is full."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.end = capacity * PAGE, 0
        self.k: Tensor | None = None
        self.new = False

    def __call__(
        self, attn: Any, hidden_states: Tensor, text: Any = None, mask: Any = None, rotary_emb: Any = None
    ) -> Tensor:
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(attn.to_k(hidden_states)).unflatten(2, (attn.heads, -1))
        value = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))
        out = self.attend(rotate(query, *rotary_emb), rotate(key, *rotary_emb), value)
        return attn.to_out[1](attn.to_out[0](out.flatten(2, 3)))

    @torch.compiler.disable(reason="the buffer changes from call to call")
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.k is None:
            self.k = key.new_zeros(1, self.capacity, *key.shape[2:])
            self.v = torch.zeros_like(self.k)
        rows = key.shape[1]
        if self.new:
            over = max(0, self.end + rows - self.capacity)
            if over:
                for buffer in (self.k, self.v):
                    buffer[:, : self.end - over] = buffer[:, over : self.end].clone()
            self.end += rows - over
            self.new = False
        self.k[:, self.end - rows : self.end] = key
        self.v[:, self.end - rows : self.end] = value
        q, k, v = (x.transpose(1, 2) for x in (query, self.k[:, : self.end], self.v[:, : self.end]))
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class ShiftedRope(nn.Module):
    """The model's tables from another frame on."""

    def __init__(self, rope: Any) -> None:
        super().__init__()
        self.rope, self.first = rope, 0

    def forward(self, x: Tensor) -> Any:
        longer = x.new_empty(1, 1, self.first + x.shape[2], *x.shape[3:])
        rows = x.shape[2] * PAGE
        return tuple(table[:, -rows:] for table in self.rope(longer))


def sampled(settings: SelfForcing, predict: Callable[[Tensor, float], Tensor], frames: int, noise: Any) -> Tensor:
    """The denoise steps of one chunk."""
    x = torch.randn(*SHAPE[:2], frames, *SHAPE[2:], generator=noise)
    for step, sigma in enumerate(settings.sigmas):
        clean = predict(x, 1000 * sigma)
        if step + 1 < len(settings.sigmas):
            after = settings.sigmas[step + 1]
            x = (1 - after) * clean + after * torch.randn(x.shape, generator=noise)
    return clean


@torch.no_grad()
def shift_left(model: Any, settings: SelfForcing, chunks: int) -> list[tuple[float, Tensor]]:
    """(seconds at which it was ready, chunk) of the published form."""
    layers = [ShiftLeft(settings.cache_frames) for _ in model.blocks]
    stock = [block.attn1.processor for block in model.blocks]
    rope, model.rope = model.rope, ShiftedRope(model.rope)
    for block, layer in zip(model.blocks, layers, strict=True):
        block.attn1.set_processor(layer)

    def run(x: Tensor, t: float) -> Tensor:
        return model(x, torch.tensor([t]), TEXT, return_dict=False)[0]

    made, noise, begin = [], torch.Generator().manual_seed(SEED), time.perf_counter()
    try:
        for number in range(chunks):
            if number:
                run(made[-1][1], settings.context_noise)
            for layer in layers:
                layer.new = True
            model.rope.first = number * settings.chunk_frames
            clean = sampled(settings, run, settings.chunk_frames, noise)
            made.append((time.perf_counter() - begin, clean))
    finally:
        model.rope = rope
        for block, processor in zip(model.blocks, stock, strict=True):
            block.attn1.set_processor(processor)
    return made


@torch.no_grad()
def recomputed(model: Any, settings: SelfForcing, chunks: int) -> list[tuple[float, Tensor]]:
    """The stock model over the window of frames in every denoise step, with a timestep for every frame."""
    made, noise, begin = [], torch.Generator().manual_seed(SEED), time.perf_counter()
    size = settings.chunk_frames
    for _ in range(chunks):
        past = torch.cat([chunk for _, chunk in made] or [torch.empty(*SHAPE[:2], 0, *SHAPE[2:])], 2)
        past = past[:, :, -(settings.cache_frames - size) :]

        def run(x: Tensor, t: float, past: Tensor = past) -> Tensor:
            times = torch.tensor([settings.context_noise] * past.shape[2] + [t] * size).repeat_interleave(PAGE)
            return model(torch.cat([past, x], 2), times[None], TEXT, return_dict=False)[0][:, :, -size:]

        clean = sampled(settings, run, size, noise)
        made.append((time.perf_counter() - begin, clean))
    return made


def streamed(model: Any, settings: SelfForcing, chunks: int) -> list[tuple[float, Tensor]]:
    """By this package; the model is accelerated already."""
    noise, begin = torch.Generator().manual_seed(SEED), time.perf_counter()
    found = stream(
        model,
        settings,
        prompt_embeds=TEXT,
        latent_size=SHAPE[2:],
        frames=chunks * settings.chunk_frames,
        generator=noise,
    )
    return [(time.perf_counter() - begin, chunk.latents) for chunk in found]


def sides(settings: SelfForcing, compiled: bool) -> Iterator[tuple[str, Callable[[int], list[tuple[float, Tensor]]]]]:
    """(name, rollout of so many chunks), each with a model of its own."""
    after, before = (SelfForcing(**vars(settings) | {"store": store}) for store in ("post_rope", "pre_rope"))
    runs: list[tuple[str, Any, SelfForcing, bool]] = [
        ("vdit_fast, keys after RoPE", streamed, after, True),
        ("vdit_fast, keys before RoPE", streamed, before, True),
        ("shift-left cache", shift_left, settings, False),
    ]
    for name, run, chosen, fast in runs:
        for graph in (False, True) if compiled else (False,):
            model = load_demo_model()
            if fast:
                accelerate(model, {"text_kv": True})
            for block in model.blocks if graph else ():
                block.compile()
            label = f"{name}, compiled" if graph else name
            yield label, lambda chunks, run=run, model=model, chosen=chosen: run(model, chosen, chunks)
    model = load_demo_model()
    yield SLOW, lambda chunks: recomputed(model, settings, chunks)


def measured(made: list[tuple[float, Tensor]], settings: SelfForcing) -> dict[str, float]:
    """First chunk, and the pace once the cache is full."""
    ready = [seconds for seconds, _ in made]
    full = -(-settings.cache_frames // settings.chunk_frames)
    gaps = [b - a for a, b in zip(ready[full - 1 :], ready[full:], strict=False)]
    return {
        "first_chunk_s": ready[0],
        "frames_per_second": settings.chunk_frames / statistics.median(gaps),
        "whole_frames_per_second": settings.chunk_frames * len(made) / ready[-1],
    }


def resident() -> int:
    """Bytes of the process."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def tensor_bytes() -> int:
    """Of all tensors that exist."""
    gc.collect()
    found = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in gc.get_objects() if type(x) is Tensor
    }
    return sum(found.values())


def memory(settings: SelfForcing) -> dict[str, Any]:
    """A stream of ten cache lengths: what is allocated and resident from the moment the cache is full."""
    model = load_demo_model()
    endless = SelfForcing(**vars(settings) | {"store": "pre_rope"})
    frames = 10 * settings.cache_frames
    frames -= frames % settings.chunk_frames
    rows = []
    with accelerate(model, {"text_kv": True}) as handle:
        for chunk in stream(handle, endless, prompt_embeds=TEXT, latent_size=SHAPE[2:], frames=frames):
            shown = chunk.first_frame + settings.chunk_frames
            if shown >= settings.cache_frames and shown % settings.cache_frames < settings.chunk_frames:
                rows.append({"frames": shown, "tensors": tensor_bytes(), "resident": resident()})
        counted = handle.stats()["streaming"]
    assert counted["frames"] == frames
    return {"cache_frames": settings.cache_frames, "passes": counted, "points": rows}


def main() -> None:
    ap = parser(__doc__, rounds=3)
    ap.add_argument("--chunk", type=int, nargs="+", default=[3, 1], help="frames per chunk")
    ap.add_argument("--cache", type=int, default=21, help="frames held")
    ap.add_argument("--frames", type=int, default=42, help="frames of a clip, at most the model's table of 64")
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--no-compile", action="store_true")
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    problems = []
    for chunk in args.chunk:
        settings = SelfForcing(chunk_frames=chunk, cache_frames=args.cache, prediction="x0", shift=3.0)
        chunks = args.frames // chunk
        runs = dict(sides(settings, not args.no_compile))
        clips: dict[str, Tensor] = {}
        numbers: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
        for number in range(args.rounds + 1):
            for name, run in runs.items():
                if name == SLOW and number != 1:
                    continue
                made = run(chunks)
                clips[name] = torch.cat([latents for _, latents in made], 2)
                if number:
                    numbers[name].append(measured(made, settings))
        want = clips["shift-left cache"]
        held = slice(0, args.cache)  # nothing has left: all caches hold the same
        rows = []
        for name, found in numbers.items():
            middle = {key: statistics.median(row[key] for row in found) for key in found[0]}
            off = float((clips[name] - want)[:, :, held].abs().max())
            rows.append({"side": name, "median": middle, "rounds": found, "largest_difference_to_shift_left": off})
            print(f"chunk {chunk}  {name:40s}", {k: round(v, 3) for k, v in middle.items()}, f"{off:.1e}", flush=True)
        problems.append({"chunk_frames": chunk, "cache_frames": args.cache, "frames": args.frames, "rows": rows})
    held = memory(SelfForcing(cache_frames=args.cache, prediction="x0", shift=3.0))
    for point in held["points"]:
        print(point, flush=True)
    facts = {"threads": args.threads, "tokens_per_frame": PAGE, "layers": 6, "steps": 4}
    results = {"kind": "streaming", **facts, "problems": problems, "memory": held}
    write(args.out / "streaming.json", results)


if __name__ == "__main__":
    main()
