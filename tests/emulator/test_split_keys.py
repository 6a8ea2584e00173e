"""Few queries over the pages of a K/V cache, emulated: parts of the keys as the host entry chooses them, stride 0."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from emulator import POLICIES, RANDOMS, attention
from vdit_fast import reference
from vdit_fast.streaming import KVCache

VARIANTS = ["sm80", "sm90a"]
PAGE, DIM = 72, 64


def ring(frames: int, capacity: int, heads: int = 1) -> tuple[KVCache, Tensor]:
    """A cache of bf16 that held so many frames, and queries of the current one."""
    torch.manual_seed(frames)
    cache = KVCache(layers=1, capacity=capacity, page=PAGE, batch=1, heads=heads, head_dim=DIM, sinks=1)
    for _ in range(frames):
        cache.reserve(1)
        cache.write(0, *torch.randn(2, 1, PAGE, heads, DIM).bfloat16().unbind(0))
    return cache, torch.randn(1, PAGE, 2 * heads, DIM).bfloat16()


def close(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(got[0].float(), want[0].float(), atol=1e-2, rtol=2e-2)
    torch.testing.assert_close(got[1], want[1], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_pages_are_read_where_they_lie(variant: str, window: int | None) -> None:
    """After the ring has wrapped around; what left the window may hold anything."""
    cache, q = ring(9, 6)
    plan, (k, v) = cache.plan(PAGE, window=window), cache.keys_values(0)
    if window is not None:
        unread = ~plan.to_mask()[0, 0].any(0)
        assert unread.sum() == 2 * PAGE
        k[:, unread] = v[:, unread] = torch.nan
    want = reference.attention(q, k, v, plan, return_lse=True)
    first = None
    for policy in POLICIES:
        got = attention(q, k, v, plan, variant=variant, policy=policy)
        close(got, want)
        first = first or got
        assert all(torch.equal(a, b) for a, b in zip(got, first, strict=True))


@pytest.mark.parametrize(
    ("variant", "frames", "heads", "processors", "parts"),
    [
        ("sm90a", 36, 1, 1, 1),  # 2 items of 21 stages in two rounds: parts only cost
        ("sm90a", 36, 1, 3, 1),  # 21 + 1 in one round; two rounds of thirds would be 2 (7 + 4)
        ("sm90a", 72, 2, 3, 3),  # 4 items of 41 stages: 2 (41 + 1) in two rounds, 4 (14 + 4) in four of thirds
        ("sm90a", 36, 1, 16, 5),  # one round; parts of at least 4 stages
        ("sm80", 36, 1, 3, 3),  # 4 items of 41 stages, 6 resident: 41 + 1 in one round, 2 (14 + 4) in two of thirds
        ("sm80", 36, 1, 16, 7),  # 28 of 32 resident: 6 stages each, as 8 parts would have
    ],
)
def test_parts_follow_from_the_rounds_of_ctas(
    variant: str, frames: int, heads: int, processors: int, parts: int
) -> None:
    """The host entry's choice gives the bits of that number of parts, and of no other."""
    cache, q = ring(frames, frames, heads)
    plan, (k, v) = cache.plan(PAGE), cache.keys_values(0)
    got = attention(q, k, v, plan, variant=variant, sm_count=processors)
    same = [
        tried
        for tried in range(1, 9)
        if torch.equal(got[0], attention(q, k, v, plan, variant=variant, splits=tried)[0])
    ]
    assert same == [parts]
    close(got, reference.attention(q, k, v, plan, return_lse=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_items_of_a_batch_may_be_the_same_memory(variant: str) -> None:
    """Stride 0 over the batch. Hopper's boxes cannot address it: those rows are gathered."""
    cache, q = ring(4, 4)
    k, v = cache.keys_values(0)
    want = attention(q, k, v, variant=variant, splits=1)
    for policy in RANDOMS:
        wide = [x.expand(3, -1, -1, -1) for x in (q, k, v)]
        out, lse = attention(*wide, variant=variant, policy=policy, splits=1)
        for item in range(3):
            close((out[item : item + 1], lse[item : item + 1]), want)
