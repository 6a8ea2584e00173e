"""Stand-ins: the mean of a block in place of its tokens, against the joint softmax written out."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vdit_fast
from vdit_fast import AttentionPlan, reference

D = 16


def tensors(
    seed: int, batch: int, heads: int, kv_heads: int, lq: int, lk: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, lq, heads, D), (batch, lk, kv_heads, D), (batch, lk, kv_heads, D)
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return (2 * q).to(dtype), k.to(dtype), v.to(dtype)


def clusters(seed: int, batch: int, heads: int, lq: int, lk: int, count: int) -> AttentionPlan:
    """A random map over clusters of random sizes, some of them empty, in random orders."""
    generator = torch.Generator().manual_seed(seed)

    def cut(length: int) -> Tensor:
        inner = torch.randint(0, length + 1, (batch, heads, count - 1), generator=generator).sort(-1).values
        edges = torch.nn.functional.pad(inner, (1, 1))
        edges[..., -1] = length
        return edges.diff(dim=-1)

    def order(length: int) -> Tensor:
        return torch.rand(batch, heads, length, generator=generator).argsort(-1)

    keep = torch.rand(batch, heads, count, count, generator=generator) < 0.4
    return AttentionPlan.from_clusters(keep, cut(lq), cut(lk), order(lq), order(lk), compensate=True).validate()


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, blocks: list[Tensor]) -> tuple[Tensor, Tensor]:
    """One head, fp64: softmax over the tokens read and, with weight n, over the means of the blocks that are not."""
    q, k, v = q.double(), k.double(), v.double()
    out, lse = torch.zeros(len(q), q.shape[1], dtype=torch.float64), torch.full((len(q),), -math.inf).double()
    for i in range(len(q)):
        keys, values, weights = [], [], []
        for tokens in blocks:
            if len(tokens) == 0:
                continue
            if mask[i, tokens[0]]:
                keys += [k[t] for t in tokens]
                values += [v[t] for t in tokens]
                weights += [1.0] * len(tokens)
            else:
                keys.append(k[tokens].mean(0))
                values.append(v[tokens].mean(0))
                weights.append(float(len(tokens)))
        score = torch.stack(keys) @ q[i] * D**-0.5 + torch.tensor(weights, dtype=torch.float64).log()
        lse[i] = score.logsumexp(0)
        out[i] = (score - lse[i]).exp() @ torch.stack(values)
    return out, lse


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20), lq=st.integers(1, 40), lk=st.integers(1, 60), count=st.integers(1, 7))
def test_against_the_formula(seed: int, lq: int, lk: int, count: int) -> None:
    plan = clusters(seed, 1, 1, lq, lk, count)
    q, k, v = tensors(seed, 1, 1, 1, lq, lk)
    got, lse = vdit_fast.attention(q, k, v, plan, return_lse=True)
    assert plan.stand_ins is not None and plan.kv_order is not None
    blocks = list(plan.kv_order[0, 0].long().split(plan.stand_ins.lengths[0, 0].tolist()))
    want, want_lse = written_out(q[0, :, 0], k[0, :, 0], v[0, :, 0], plan.to_mask()[0, 0], blocks)
    torch.testing.assert_close(got[0, :, 0].double(), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse[0, 0].double(), want_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 2])
def test_operator_and_reference_agree(dtype: torch.dtype, batch: int) -> None:
    for seed in range(4):
        plan = clusters(seed, batch, 4, 70, 90, 6)
        q, k, v = tensors(seed, batch, 4, 2, 70, 90, dtype)
        kv_len = torch.tensor([90, 31])[:batch] if seed % 2 else None
        rho = torch.rand(batch, 4, 70, generator=torch.Generator().manual_seed(seed)) if seed > 1 else None
        segments = [tuple(x[:, :5] * 0.5 for x in (k, v))] if seed == 3 else None
        got, lse = vdit_fast.attention(q, k, v, plan, kv_len=kv_len, row_scale=rho, segments=segments, return_lse=True)
        more = None if segments is None else [tuple(x.double() for x in pair) for pair in segments]
        want, want_lse = reference.attention(
            q.double(), k.double(), v.double(), plan, kv_len=kv_len, row_scale=rho, segments=more, return_lse=True
        )
        eps = torch.finfo(dtype).eps
        assert float((got.double() - want).norm() / want.norm()) < 4 * eps
        assert float((lse - want_lse).abs().max()) < 4 * eps * float(want_lse.abs().max())


def test_equal_keys_and_values_in_a_block_make_it_exact() -> None:
    q, k, v = tensors(1, 1, 2, 2, 24, 8)
    k, v = (x.repeat_interleave(5, 1) for x in (k, v))
    keep = torch.eye(3, 8, dtype=torch.bool)
    plan = AttentionPlan.from_block_mask(keep, 8, 5, compensate=True)
    torch.testing.assert_close(vdit_fast.attention(q, k, v, plan), vdit_fast.attention(q, k, v), rtol=1e-5, atol=1e-5)
    assert float((vdit_fast.attention(q, k, v, AttentionPlan.from_block_mask(keep, 8, 5)) - q).norm()) > 0.1


def test_better_than_dropping_and_exact_with_a_full_map() -> None:
    q, k, v = tensors(2, 1, 2, 2, 64, 64)
    generator = torch.Generator().manual_seed(2)
    shared = torch.randn(2, 1, 8, 1, 2, D, generator=generator).expand(2, 1, 8, 8, 2, D).reshape(2, 1, 64, 2, D)
    k, v = 0.5 * k + shared[0], 0.5 * v + shared[1]  # tokens of a block resemble each other
    dense = vdit_fast.attention(q, k, v)
    keep = torch.rand(8, 8, generator=generator) < 0.3
    errors = [
        float((vdit_fast.attention(q, k, v, AttentionPlan.from_block_mask(keep, 8, 8, compensate=c)) - dense).norm())
        for c in (False, True)
    ]
    assert errors[1] < 0.7 * errors[0]
    full = AttentionPlan.from_block_mask(torch.ones(8, 8, dtype=torch.bool), 8, 8, compensate=True)
    torch.testing.assert_close(vdit_fast.attention(q, k, v, full), dense, rtol=1e-5, atol=1e-6)


def test_gradients() -> None:
    plan = clusters(5, 2, 2, 20, 30, 4)
    leaves = [x.requires_grad_() for x in tensors(5, 2, 2, 1, 20, 30)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    upstream = torch.randn(2, 20, 2, D, generator=torch.Generator().manual_seed(6))
    kv_len = torch.tensor([30, 17])
    found = torch.autograd.grad(vdit_fast.attention(*leaves, plan, kv_len=kv_len), leaves, upstream)
    wanted = torch.autograd.grad(reference.attention(*exact, plan, kv_len=kv_len), exact, upstream.double())
    for mine, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine.double(), want, rtol=1e-3, atol=1e-5)


def test_density_counts_a_stand_in_as_one_key() -> None:
    keep = torch.zeros(4, 4, dtype=torch.bool)
    keep[:, 0] = True
    plan = AttentionPlan.from_block_mask(keep, 16, 16, compensate=True)
    assert plan.density == pytest.approx(0.25 + 3 / 64)
    assert plan.exact_density == 0.25
    assert "stand-ins" in repr(plan) and plan.nbytes > AttentionPlan.from_block_mask(keep, 16, 16).nbytes


def test_what_is_refused(tmp_path: Path) -> None:
    keep = torch.eye(4, dtype=torch.bool)
    plan = AttentionPlan.from_block_mask(keep, 8, 8, compensate=True)
    q, k, v = tensors(0, 1, 1, 1, 32, 32)
    with pytest.raises(ValueError, match="scale is 0"):
        vdit_fast.attention(q, k, v, plan, scale=0.0)
    wide = torch.randn(1, 32, 1, 256)
    with pytest.raises(ValueError, match="at most 248"):
        vdit_fast.attention(wide, wide, wide, plan)
    with pytest.raises(ValueError, match="compensate"):
        plan.save(tmp_path / "plan.npz")
    with pytest.raises(ValueError, match="compensate"):
        _ = plan | plan
    with pytest.raises(RuntimeError, match="row_scale"):
        vdit_fast.attention(q, k, v, plan, row_scale=torch.ones(1, 1, 31))


def test_negative_and_odd_scales() -> None:
    plan = clusters(9, 1, 2, 40, 40, 5)
    q, k, v = tensors(9, 1, 2, 2, 40, 40)
    for scale in (-0.3, 0.01, 3.0):
        got = vdit_fast.attention(q, k, v, plan, scale=scale)
        want = reference.attention(q.double(), k.double(), v.double(), plan, scale=scale)
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_empty_rows_stay_empty_and_extreme_scales_stay_finite() -> None:
    plan = clusters(4, 2, 2, 20, 30, 4)
    q, k, v = tensors(4, 2, 2, 2, 20, 30)
    kv_len = torch.tensor([30, 0])
    for attend in (vdit_fast.attention, reference.attention):
        out, lse = attend(q, k, v, plan, kv_len=kv_len, return_lse=True)
        assert bool((out[1] == 0).all()) and bool((lse[1] == -math.inf).all()) and bool(lse[0].isfinite().all())
    half = [x.half() for x in (q, k, v)]
    for scale in (1e-6, 1e-4, 30.0):
        got = vdit_fast.attention(*half, plan, scale=scale)
        want = reference.attention(*(x.double() for x in half), plan, scale=scale)
        assert float((got.double() - want).norm() / want.norm()) < 4e-3


def test_an_empty_batch() -> None:
    plan = AttentionPlan.from_block_mask(torch.eye(4, dtype=torch.bool), 8, 8, compensate=True)
    q, k, v = (x[:0] for x in tensors(0, 1, 1, 1, 32, 32))
    assert vdit_fast.attention(q, k, v, plan).shape == (0, 32, 1, D)
