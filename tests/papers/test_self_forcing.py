"""Self-Forcing++: Towards Minute-Scale High-Quality Video Generation (arXiv 2510.02283): row 39, checks S1, S2, E1b.

At inference it is Self Forcing (arXiv 2506.08009) with a rolling cache: chunks of frames in four denoise steps, one
pass over the clean chunk that leaves its keys and values, and the oldest frames forgotten. On a tiny Wan of the real
class.
"""

from __future__ import annotations

import gc
import itertools
from typing import Any

import pytest
import torch
from rollouts import TOKENS, Recorded, at_once, chunks_of, model_of
from torch import Tensor

from vdit_fast.accelerate import accelerate
from vdit_fast.ops.qk_norm_rope import qk_norm_rope
from vdit_fast.streaming import KVCache, SelfForcing
from vdit_fast.streaming.attach import CachedAttention

TABLE = 64
"""Positions along time of the tiny Wan; the released models have 1,024."""


def distance(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def rolled(settings: SelfForcing, frames: int) -> tuple[float, float]:
    """Relative distances of the rollout's denoise steps from one forward under the mask, and from one under the mask of
    chunks without a past."""
    model, rest = model_of("wan_t2v")
    handle = accelerate(model)
    run = Recorded(handle, settings, rest, frames)
    alone = SelfForcing(chunk_frames=settings.chunk_frames, cache_frames=settings.chunk_frames)
    errors, without = [], []
    for step, sigma in enumerate(settings.sigmas):
        rows = range(step, len(run.inputs), 5)
        noisy, want = (torch.cat([x[i] for i in rows], 2) for x in (run.inputs, run.outputs))
        errors.append(distance(at_once(handle, run.clip, noisy, 1000 * sigma, settings, rest), want))
        without.append(distance(at_once(handle, run.clip, noisy, 1000 * sigma, alone, rest), want))
    return max(errors), min(without)


@pytest.mark.parametrize("block", [1, 3])
def test_s1_the_cache_rollout_is_the_block_causal_mask(block: int) -> None:
    error, without = rolled(SelfForcing(chunk_frames=block, cache_frames=12), 12)
    assert error < 2e-6 and without > 0.02


def test_s2_sinks_and_a_window_are_a_rolling_cache_that_keeps_its_first_frames() -> None:
    for sinks in (0, 1, 3):
        error, without = rolled(SelfForcing(chunk_frames=2, cache_frames=6, sinks=sinks), 14)
        assert error < 2e-6 and without > 0.01


def held_keys(
    store: str, monkeypatch: pytest.MonkeyPatch, frames: int
) -> tuple[KVCache, CachedAttention, list[Tensor]]:
    """The cache of a rollout, and the keys that every layer's attention read in its last forward."""
    made: list[CachedAttention] = []
    keys: dict[int, Tensor] = {}
    call = CachedAttention.__call__

    def spy(self: CachedAttention, heads: Any, proceed: Any) -> Tensor:
        made.append(self)

        def note() -> Tensor:
            keys[heads.layer] = heads.k.clone()
            return proceed()

        return call(self, heads, note)

    model, rest = model_of("wan_t2v")
    with monkeypatch.context() as patch:
        patch.setattr(CachedAttention, "__call__", spy)
        settings = SelfForcing(cache_frames=6, store=store, timesteps=(1000, 500))
        for _ in chunks_of(accelerate(model), settings, rest, frames):
            pass
    return made[-1].caches[0], made[-1], [keys[layer] for layer in sorted(keys)]


def test_e1b_keys_rotated_at_their_numbers_and_back_are_keys_rotated_where_they_are_now(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After 9 of 15 frames have left: post-RoPE keys turned by -9 frames are the pre-RoPE keys at their new places."""
    absolute, attached, post = held_keys("post_rope", monkeypatch, 15)
    relative, _, pre = held_keys("pre_rope", monkeypatch, 15)
    assert absolute.frames == relative.frames == tuple(range(9, 15))
    assert absolute.ids() == absolute.frames and relative.ids() == tuple(range(6))
    cos, sin = attached.tables._frames[torch.device("cpu")][1]
    back = [table[:, 9] for table in (cos, -sin)]  # of one token: 9 frames along time, 0 along the other axes
    for kept, turned in zip(post, pre, strict=True):
        tables = [table.expand(1, kept.shape[1], -1).contiguous() for table in back]
        moved, _, _ = qk_norm_rope(kept, cos=tables[0], sin=tables[1])
        torch.testing.assert_close(moved, turned, atol=2e-5, rtol=2e-5)
        assert distance(kept, turned) > 0.5


def live_bytes() -> int:
    """Of all tensors that exist."""
    gc.collect()
    storages = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in gc.get_objects() if type(x) is Tensor
    }
    return sum(storages.values())


@pytest.mark.parametrize("store", ["post_rope", "pre_rope"])
def test_ten_times_the_cache_at_constant_memory(store: str) -> None:
    model, rest = model_of("wan_t2v")
    handle = accelerate(model)
    settings = SelfForcing(cache_frames=6, store=store)
    sizes = []
    for chunk in chunks_of(handle, settings, rest, 60):
        assert chunk.latents.isfinite().all() and chunk.first_frame == 3 * chunk.index
        if chunk.index in (2, 9, 18):  # the cache is full with the second chunk
            sizes.append(live_bytes())
    assert chunk.index == 19 and len(set(sizes)) == 1
    streamed = handle.stats()["streaming"]
    sizes_of_it = {"layers": 2, "capacity": 6, "page": TOKENS, "batch": 1, "heads": 2, "head_dim": 16}
    assert streamed.pop("nbytes") == KVCache.bytes(**sizes_of_it, store=store, dtype=torch.float32)
    # four denoise steps and the clean pass for every chunk; the last one's keys are read by nobody
    assert streamed == {"frames": 60, "chunks": 20, "denoise": 80, "write": 19}


def test_beyond_the_models_table() -> None:
    """Absolute numbers end with the table; numbers among the frames held do not."""
    model, rest = model_of("wan_t2v")
    handle = accelerate(model)
    given: list[int] = []
    with pytest.raises(ValueError, match=f"table has {TABLE} entries .*pre_rope"):
        for chunk in chunks_of(handle, SelfForcing(cache_frames=6, timesteps=(1000,)), rest, None):
            given.append(chunk.first_frame)
    assert given == list(range(0, TABLE - 3, 3))
    endless = chunks_of(handle, SelfForcing(cache_frames=6, timesteps=(1000,), store="pre_rope"), rest, None)
    for chunk in itertools.islice(endless, 30):
        assert chunk.latents.isfinite().all()
    assert chunk.first_frame == 87 and chunk.latents.shape[2] * TOKENS == 48


def test_the_clean_pass_is_what_later_chunks_see() -> None:
    """It runs over the finished chunk at context noise 0, after the steps: exchanging its latents changes the rest."""
    model, rest = model_of("wan_t2v")
    handle = accelerate(model)
    run = Recorded(handle, SelfForcing(cache_frames=9), rest, 9)
    assert [round(t) for t in run.timesteps] == [1000, 938, 833, 625, 0] * 2 + [1000, 938, 833, 625]
    for chunk in range(2):
        assert torch.equal(run.inputs[5 * chunk + 4], run.clip[:, :, 3 * chunk : 3 * chunk + 3])
    noisier = Recorded(handle, SelfForcing(cache_frames=9, context_noise=300), rest, 9)
    assert torch.equal(noisier.clip[:, :, :3], run.clip[:, :, :3])
    assert distance(noisier.clip[:, :, 3:], run.clip[:, :, 3:]) > 1e-3
