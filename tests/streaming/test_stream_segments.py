"""Memory rows and another transformer's keys inside of a stream: every chunk is that of a rollout whose attention is
given the same keys by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rollouts import clip_of, model_of
from torch import Tensor, nn

import vdit_fast
from vdit_fast import accelerate
from vdit_fast.models.extra_keys import Captured
from vdit_fast.streaming import SelfForcing

FRAMES, HEADS = 9, torch.tensor([0.7, -0.4])
Pair = tuple[Tensor, Tensor]


class ByHand:
    """Stands where regions do, and makes the keys of memory rows before every forward."""

    def __init__(self, model: nn.Module, rest: dict[str, Any], rows: Tensor | None, garment: Captured | None,
                 gate: Tensor | None) -> None:  # fmt: skip
        self.model, self.text, self.rows, self.garment, self.gate = (
            model, rest["encoder_hidden_states"], rows, garment, gate,
        )  # fmt: skip
        self.memory: list[Pair] = []
        model.register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if self.rows is None:
            return
        timestep = kwargs["timestep"].flatten()[:1]
        temb = self.model.condition_embedder(timestep, self.text, None)[1].unflatten(1, (6, -1))
        self.memory = []
        for block in self.model.blocks:
            shift, scale = (block.scale_shift_table + temb).chunk(6, dim=1)[:2]
            h = block.norm1(self.rows[None]) * (1 + scale) + shift
            k, v = block.attn1.norm_k(block.attn1.to_k(h)), block.attn1.to_v(h)
            self.memory.append((k.unflatten(2, (2, -1)), v.unflatten(2, (2, -1))))

    def __call__(self, call: Any, proceed: Callable[[], Tensor]) -> Tensor:
        q = call.q
        if self.rows is not None:
            call.segments.append(self.memory[call.layer])
        if self.garment is None:
            return proceed()
        other = self.garment.keys[call.layer]
        if self.gate is None:
            call.segments.append(other)
            return proceed()
        return proceed() + self.gate.view(-1, 1) * vdit_fast.attention(q, *other)

    def fresh(self) -> ByHand:
        return self


def garment_of(rest: dict[str, Any]) -> Captured:
    garment, _ = model_of("wan_t2v")
    with torch.no_grad():
        for parameter in garment.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        captured = accelerate(garment).capture()
        garment(hidden_states=torch.randn(1, 4, 1, 8, 8), timestep=torch.tensor([0.0]), **rest)
    return captured


@pytest.mark.parametrize("store", ["post_rope", "pre_rope"])
@pytest.mark.parametrize("what", ["memory", "concat", "sum", "memory and concat"])
def test_every_chunk_reads_what_is_given_by_hand(what: str, store: Any) -> None:
    """While frames leave the cache, and in the passes that write keys: those of a layer depend on what the layer before
    read."""
    settings = SelfForcing(cache_frames=6, timesteps=(1000, 500), store=store)
    model, rest = model_of("wan_t2v")
    rows = torch.randn(9, 32) if "memory" in what else None
    garment = garment_of(rest) if what != "memory" else None
    gate = HEADS if what == "sum" else None
    handle = accelerate(model)
    plain = clip_of(handle, settings, rest, FRAMES)
    if rows is not None:
        handle.memory(rows)
    if garment is not None:
        handle.feed(garment, "concat" if gate is None else "sum", 1.0 if gate is None else gate)
    got = clip_of(handle, settings, rest, FRAMES)
    handle.memory(None).feed(None)
    assert torch.equal(clip_of(handle, settings, rest, FRAMES), plain)
    handle.roots[0].session.around_heads["regions"] = ByHand(model, rest, rows, garment, gate)
    want = clip_of(handle, settings, rest, FRAMES)
    for first in range(0, FRAMES, 3):
        a, b, without = (clip[:, :, first : first + 3] for clip in (got, want, plain))
        assert float((a - b).norm() / b.norm()) < 1e-5
        assert float((without - b).norm() / b.norm()) > 1e-2
