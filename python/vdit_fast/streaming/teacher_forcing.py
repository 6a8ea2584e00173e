"""What a rollout computes chunk after chunk, in one forward: for causal training, and to check the rollout.

The sequence is [clean copy, noisy copy] of a clip, each at its own timesteps. A clean chunk reads the clean frames that
the cache would hold when it is written, a noisy chunk itself and the clean frames before it (the teacher-forcing mask
of CausVid, arXiv 2412.07772, and Self Forcing, arXiv 2506.08009).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vdit_fast.caching.checks import count
from vdit_fast.models.callables import check_handle
from vdit_fast.models.heads import HeadsCall
from vdit_fast.models.session import Geometry, Session
from vdit_fast.plan import AttentionPlan
from vdit_fast.plan.args import cut
from vdit_fast.plan.builders import compile_map
from vdit_fast.plan.memo import remembered
from vdit_fast.streaming.families import FrameTables, Tables, check_family

if TYPE_CHECKING:
    from vdit_fast.context import StepContext
    from vdit_fast.handle import Handle

__all__ = ["per_frame", "teacher_forcing", "teacher_forcing_plan"]

PLANNED = "teacher forcing: a mask says which frames are read"


def per_frame(handle: Handle, timesteps: Tensor, latents: Tensor) -> dict[str, Any]:
    """Arguments of the handle's one transformer that give every frame its own timestep.

    Args:
        timesteps: [B, F], in the model's units.
        latents: [B, C, F, H, W], the ``hidden_states`` they are for.

    Raises:
        RuntimeError: the model takes one timestep for all frames.
    """
    module = handle.modules[0]
    return handle.roots[0].adapter.frame_timesteps(module, timesteps, latents)


def teacher_forcing_plan(
    frames: int, tokens: int, *, chunk_frames: int, cache_frames: int | None = None, sinks: int = 0, q_tile: int = 128
) -> AttentionPlan:
    """What the rows of [clean copy, noisy copy] of a clip read.

    Args:
        frames: of the clip.
        tokens: of one frame.
        chunk_frames: frames of a chunk; the last one maybe shorter.
        cache_frames: frames that the cache holds, the chunk's own included; None: all.
        sinks: the first so many frames are never forgotten.
        q_tile: most rows per tile.

    Returns:
        a plan of 2 * frames * tokens queries and keys.
    """
    for name, value in (("frames", frames), ("tokens", tokens), ("chunk_frames", chunk_frames)):
        count(name, value, 1)
    count("sinks", sinks, 0)
    if cache_frames is not None and cache_frames < chunk_frames + sinks:
        raise ValueError(f"cache_frames is {cache_frames}; a chunk of {chunk_frames} and {sinks} sinks must fit")
    lengths = cut(frames, chunk_frames)
    frame = torch.arange(frames)
    ends = torch.tensor(lengths).cumsum(0)[:, None]
    starts = ends - torch.tensor(lengths)[:, None]
    held = torch.ones(len(lengths), frames, dtype=torch.bool)
    if cache_frames is not None:
        held = (frame < sinks) | (frame >= ends - (cache_frames - sinks))
    own = (frame >= starts) & (frame < ends)
    clean = torch.cat((held & (frame < ends), torch.zeros_like(held)), 1)
    noisy = torch.cat((held & (frame < starts), own), 1)
    q_len = torch.tensor([length * tokens for length in lengths * 2])[None]
    kv_len = torch.full((1, 2 * frames), tokens)
    rows = 2 * frames * tokens
    return compile_map(torch.cat((clean, noisy))[None, None], q_len, kv_len, rows, rows, q_tile=q_tile)


class _TeacherForcing:
    """Stands around attention, and gives both copies the positions of the clip's frames."""

    def __init__(self, module: nn.Module, chunk_frames: int, cache_frames: int | None, sinks: int) -> None:
        self.tables = FrameTables(module)
        self.settings = {"chunk_frames": chunk_frames, "cache_frames": cache_frames, "sinks": sinks}
        self._plans: dict[Any, AttentionPlan] = {}

    def fresh(self) -> _TeacherForcing:
        raise RuntimeError("a transformer cannot be copied inside of teacher_forcing")

    def __call__(self, call: HeadsCall, proceed: Callable[[], Tensor]) -> Tensor:
        forward = call.forward
        frames, tokens = self._sizes(forward.geometry if forward is not None else None)
        device = call.q.device
        call.plan = remembered(
            self._plans,
            (frames, tokens, device),
            lambda: teacher_forcing_plan(frames, tokens, **self.settings).to(device),  # type: ignore[arg-type]
        )
        call.planned, call.mask = PLANNED, None
        return proceed()

    def positions(self, step: StepContext, geometry: Geometry, stock: Tables) -> Tables:
        frames, tokens = self._sizes(geometry)
        return self.tables.of((*range(frames), *range(frames)), tokens, stock)

    @staticmethod
    def _sizes(geometry: Geometry | None) -> tuple[int, int]:
        if geometry is None or geometry.grid[0] % 2:
            given = "an input of unknown size" if geometry is None else f"{geometry.grid[0]} frames"
            raise ValueError(f"teacher_forcing: the input is a clean and a noisy copy of all frames, got {given}")
        frames, height, width = geometry.grid
        return frames // 2, height * width


@contextmanager
def teacher_forcing(
    handle: Handle, *, chunk_frames: int, cache_frames: int | None = None, sinks: int = 0
) -> Iterator[None]:
    """Forwards inside take [clean copy, noisy copy] of a clip along the frames and see what a rollout would see.

    The noisy half of the output is what the rollout's denoise step computes from these noisy chunks behind these clean
    frames. Gradients flow; with gradient checkpointing call ``backward`` inside too. Give all frames of both copies
    their timesteps by ``per_frame``.

    Args:
        handle: of one accelerated Wan or SkyReels-V2 transformer.
        chunk_frames, cache_frames, sinks: as in ``teacher_forcing_plan``.

    Raises:
        NotImplementedError: another model.
        RuntimeError: its positions or keys are exchanged by something else.
        ValueError: settings that do not go together; in a forward, an odd number of frames.
    """
    check_handle("teacher_forcing", handle)
    if len(handle.roots) != 1 or (module := handle.roots[0].module()) is None:
        raise NotImplementedError(f"teacher_forcing: one transformer is served at a time, here are {len(handle.roots)}")
    root = handle.roots[0]
    check_family(module, root.adapter.family)
    session: Session = root.session
    if session.exchanged:
        raise RuntimeError("teacher_forcing: positions or keys of this transformer are exchanged by something else")
    teacher_forcing_plan(chunk_frames, 1, chunk_frames=chunk_frames, cache_frames=cache_frames, sinks=sinks)
    around = _TeacherForcing(module, chunk_frames, cache_frames, sinks)
    session.around_heads["streaming"] = around
    session.positions = around.positions
    try:
        yield
    finally:
        del session.around_heads["streaming"]
        session.positions = None
