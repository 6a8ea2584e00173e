"""A stream under sequence parallelism: every rank holds the keys of its heads, of all frames."""

from __future__ import annotations

from pathlib import Path

import forked_ranks
import pytest
import torch
from rollouts import clip_of, model_of

from vdit_fast import accelerate
from vdit_fast.streaming import KVCache

pytest.importorskip("diffusers")


def test_two_ranks_are_one_process(tmp_path: Path) -> None:
    from stream_workers import FRAMES, SETTINGS

    ranks = forked_ranks.start("stream_workers:shared", tmp_path, 2)
    model, rest = model_of("wan_t2v")
    want = clip_of(accelerate(model), SETTINGS, rest, FRAMES)
    ranks.finish(120)
    half = KVCache.bytes(layers=2, capacity=6, page=16, batch=1, heads=1, head_dim=16, dtype=torch.float32)
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        torch.testing.assert_close(found["clip"], want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found["alone"], want, atol=1e-5, rtol=1e-5)
        assert found["held"] == half
