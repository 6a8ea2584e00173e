"""Keys cut into parts: equal to the whole, without a copy of a key."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import vdit_fast
from vdit_fast import reference
from vdit_fast.plan import AttentionPlan
from vdit_fast.streaming.split_kv import choose_parts, split_attention, split_plan


def inputs(lq: int, lk: int, *, batch: int = 1, heads: int = 2, kv_heads: int = 2, dtype=torch.float32):
    q = torch.randn(batch, lq, heads, 16).to(dtype)
    k, v = torch.randn(2, batch, lk, kv_heads, 16).to(dtype).unbind(0)
    return q, k, v


def plans(lq: int, lk: int) -> dict[str, AttentionPlan | None]:
    g = torch.Generator().manual_seed(lk)
    blocks = torch.rand(2, 2, 3, 7, generator=g) < 0.5
    lengths = [lk // 7] * 6 + [lk - 6 * (lk // 7)]
    order = torch.randperm(lq, generator=g)
    cut = (lq + 2) // 3
    return {
        "none": None,
        "dense": AttentionPlan.dense(lq, lk),
        "one": AttentionPlan.from_block_mask(blocks[0, 0], cut, lengths, lq=lq),
        "heads": AttentionPlan.from_block_mask(blocks[0], cut, lengths, lq=lq, q_order=order),
        "items": AttentionPlan.from_block_mask(blocks, cut, lengths, lq=lq),
        "nothing": AttentionPlan.from_block_mask(torch.zeros(3, 7, dtype=torch.bool), cut, lengths, lq=lq),
    }


@pytest.mark.parametrize("parts", [1, 2, 3, 6, 30])
@pytest.mark.parametrize("name", ["none", "dense", "one", "heads", "items", "nothing"])
def test_parts_equal_the_whole(name, parts):
    q, k, v = inputs(7, 60, batch=2, heads=2, kv_heads=1)
    plan = plans(7, 60)[name]
    want = vdit_fast.attention(q, k, v, plan, return_lse=True)
    got = split_attention(q, k, v, plan, parts=parts, return_lse=True)
    for a, b in zip(got, want, strict=True):
        if parts == 1:
            assert torch.equal(a, b)
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)
    if plan is not None:
        whole = split_plan(plan, parts, batch=2).validate().to_mask()
        rejoined = whole.unflatten(0, (2, parts)).permute(0, 2, 3, 1, 4).flatten(3)
        assert torch.equal(rejoined, plan.to_mask().expand_as(rejoined))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_parts_stay_within_the_dtypes_error(dtype):
    q, k, v = inputs(9, 480, heads=4, dtype=dtype)
    exact = reference.attention(*(x.double() for x in (q, k, v)))
    plain = vdit_fast.attention(q, k, v)
    error = [float((out.double() - exact).norm()) for out in (split_attention(q, k, v, parts=8), plain)]
    assert 0 < error[0] < 2 * error[1]


def test_no_key_is_copied():
    q, k, v = inputs(5, 600)
    made = []

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, Tensor) and not func.is_view:
                    made.append(t.nbytes)
            return out

    with Made():
        split_attention(q, k, v, parts=6)
    assert sum(made) < k.nbytes  # six results and their sum


def test_how_many_parts():
    for items, workers, keys, want in (
        ((1, 16, 1), 8, 8192, 8),
        ((1, 16, 1), 2, 8192, 2),
        ((1, 16, 2), 2, 8192, 1),
        ((1, 97, 1), 4, 8192, 2),
        ((1, 16, 1), 64, 32768, 32),  # of merge
        ((1, 16, 1), 64, 1024, 2),  # parts of at least 512 keys
        ((1, 16, 1), 64, 511, 1),
        ((1, 16, 1), 8, 32760, 8),
        ((1, 16, 1), 8, 8191, 1),  # a prime
        ((1, 16, 1), 8, 7805, 7),
    ):
        batch, lq, heads = items
        q, k = torch.empty(batch, lq, heads, 8), torch.empty(batch, keys, heads, 8)
        assert choose_parts(q, k, workers) == want, (items, workers, keys)
    wide = torch.empty(2, 8192, 1, 8)
    q = torch.empty(2, 16, 1, 8)
    assert choose_parts(q, wide, 8) == 4 and choose_parts(q, wide[:, :4096], 8) == 1
    meta = torch.empty(1, 16, 1, 8, device="meta")
    assert choose_parts(meta, meta.expand(1, 16, 1, 8), 8) == 1


def test_bad_input():
    q, k, v = inputs(5, 60)
    bits = AttentionPlan.from_mask(torch.rand(5, 60) < 0.5)
    ordered = AttentionPlan.from_block_mask(torch.ones(1, 2).bool(), 5, 30, kv_order=torch.randperm(60))
    for call, message in (
        (lambda: split_attention(q, k, v, parts=7), "divisor of 60"),
        (lambda: split_attention(q, k, v, parts=60), "at most 32"),
        (lambda: split_plan(AttentionPlan.dense(5, 60), 7), "does not divide 60"),
        (lambda: split_plan(bits, 2), "bit masks"),
        (lambda: split_plan(ordered, 2), "permutation of the keys"),
        (lambda: split_plan(plans(5, 60)["items"], 2, batch=3), "batch 2"),
        (lambda: split_attention(*(x[:, :50] for x in inputs(50, 60, batch=2)), parts=2), "no view"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_cache_splits_by_itself(cache, draw, monkeypatch):
    from vdit_fast.streaming import kv_cache

    rings = [cache(4, batch=1, page=256, heads=1) for _ in range(2)]
    calls = []
    monkeypatch.setattr(kv_cache, "choose_parts", lambda q, k: calls.append(k.shape[1]) or 1)
    q, k, v = torch.randn(1, 256, 3, 16), *torch.randn(2, 1, 256, 1, 16)
    for ring in rings:
        for _ in range(4):
            ring.reserve(1)
            ring.write(0, k, v)
    plain = rings[0].attend(0, q, window=2)
    assert calls == [1024]
    monkeypatch.setattr(kv_cache, "choose_parts", lambda q, k: 4)
    split, kept = rings[1].attend(0, q, window=2), dict(rings[1]._memo)
    torch.testing.assert_close(split, plain, atol=2e-6, rtol=1e-5)
    assert torch.equal(rings[1].attend(0, q, window=2), split) and kept.keys() == rings[1]._memo.keys()
    segment = torch.randn(2, 1, 3, 1, 16).unbind(0)
    assert rings[1].attend(0, q, segments=[segment]).shape == q.shape
