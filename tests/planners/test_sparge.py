"""SpargeAttn: smoothed keys, self-similarity, fixed blocks, both ways of selecting."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vdit_fast.planners import Sparge, sparge
from vdit_fast.reference import attention

GRID = (4, 8, 10)  # 320 tokens: blocks of 32 and 16, no tail


def blocks(x, size):
    """[1, N, H, D] → list of [H, n, D]."""
    return [part[0].transpose(0, 1) for part in x.split(size, 1)]


def alike(count, size, heads=2, dim=16, noise=0.0):
    """Tokens that are equal inside each block, up to noise: [1, count · size, heads, dim]."""
    x = torch.randn(1, count, heads, dim).repeat_interleave(size, 1)
    return x + noise * torch.randn_like(x)


def test_self_similarity_is_the_mean_of_the_cosine_gram_matrix(context):
    ctx, planner = context((5, 7, 9), 3, text_first=True), Sparge(block=(32, 16))
    x = torch.randn(1, ctx.num_tokens, 3, 8)
    rows, columns = planner._strips(ctx, x.device)
    for strips, size in ((rows, 32), (columns, 16)):
        want = []
        for part in blocks(x[:, ctx.video_slice].double(), size):
            unit = part / part.norm(dim=-1, keepdim=True)
            want.append((unit @ unit.mT).mean((1, 2)))
        got = planner._similarity(x, strips, ctx)[0].double()
        torch.testing.assert_close(got, torch.stack(want, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("knobs", [{"sparsity": 0.6}, {"top_p": 0.7}])
@pytest.mark.parametrize("similarity", [0.0, 0.5])
def test_adding_a_constant_to_all_keys_changes_nothing(context, knobs, similarity):
    ctx, planner = context(GRID, 7), Sparge(block=(32, 16), similarity=similarity, **knobs)
    q = torch.cat([alike(10, 32, noise=0.3), torch.randn(1, 7, 2, 16)], 1)
    k = torch.cat([alike(20, 16, noise=0.8), torch.randn(1, 7, 2, 16)], 1)
    plan = planner.plan(q, k, ctx)
    assert plan.density < 1
    moved = planner.plan(q, k + 3 * torch.randn(1, 1, 2, 16), ctx)
    assert torch.equal(plan.to_mask(), moved.to_mask())


def test_blocks_unlike_themselves_make_it_dense(context):
    ctx = context((1, 8, 16))
    x = torch.eye(16).repeat(8, 1)[None, :, None].expand(1, 128, 2, 16)  # 16 orthogonal tokens per block
    y = alike(8, 16)
    planner = Sparge(block=(16, 16), sparsity=0.8, similarity=0.5)
    assert planner.plan(x, y, ctx).density == 1  # every query block is fixed
    assert planner.plan(y, x, ctx).density == 1  # every key block is
    assert planner.plan(y, y + 0.01 * torch.randn_like(y), ctx).density == pytest.approx(1 / 8)


def test_fixed_blocks_are_always_read_and_take_no_part(context):
    ctx = context(GRID)
    q, k = alike(10, 32), alike(20, 16, noise=0.01)
    k[:, 5 * 16 : 6 * 16] = 30 * torch.randn(1, 16, 2, 16)  # unlike, and would take all the mass
    q[:, 3 * 32 : 4 * 32] = torch.randn(1, 32, 2, 16)
    for knobs, count in (({"sparsity": 0.8}, 4), ({"top_p": 0.0}, 1)):
        keep = Sparge(block=(32, 16), similarity=0.5, **knobs).select(q, k, ctx)
        assert keep[0, :, 3].all() and keep[0, :, :, 5].all()
        others = [i for i in range(10) if i != 3]
        assert (keep[0, :, others].sum(-1) == count + 1).all()
        off = Sparge(block=(32, 16), **knobs).select(q, k, ctx)
        assert (off.sum(-1) == count).all()


def test_equal_tokens_make_the_estimate_exact(context):
    """With constant blocks, top_p keeps that share of the true attention mass, with as few blocks as possible."""
    ctx = context((5, 7, 9))  # 315 tokens: the last blocks are shorter
    q, k = alike(10, 32)[:, :315], alike(20, 16)[:, :315]
    exact = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / 4, -1)
    mass = torch.stack([part.sum(-1) for part in exact.split(16, -1)], -1)[:, :, ::32]
    keep = Sparge(block=(32, 16), top_p=0.6).select(q, k, ctx)
    held = (mass * keep).sum(-1)
    weakest = mass.masked_fill(~keep, math.inf).amin(-1)
    assert (held > 0.6).all() and (held - weakest <= 0.6 + 1e-6).all()
    assert (weakest >= mass.masked_fill(keep, 0).amax(-1) - 1e-9).all()


@pytest.mark.parametrize(("sparsity", "kept"), [(0.5, 10), (0.72, 5), (0.75, 5), (0.7, 6), (0.999, 1), (0.0, 20)])
def test_number_of_kept_blocks(context, sparsity, kept):
    q, k = torch.randn(2, 1, 320, 2, 8).unbind()
    keep = Sparge(sparsity=sparsity, block=(32, 16)).select(q, k, context(GRID))
    assert (keep.sum(-1) == kept).all()


def test_padding_blocks_are_read_last(context):
    ctx = context(GRID, kv_len=torch.tensor([150]))  # 10 of 20 key blocks hold a real key
    q, k, v = torch.randn(3, 1, 320, 2, 8).unbind()
    for knobs in ({"sparsity": 0.5}, {"top_p": 0.999}):
        assert not Sparge(block=(32, 16), **knobs).select(q, k, ctx)[..., 10:].any()
    plan = Sparge(block=(32, 16), sparsity=0.5).plan(q, k, ctx)
    out = attention(q, k, v, plan, kv_len=ctx.kv_len)
    torch.testing.assert_close(out, attention(q, k, v, kv_len=ctx.kv_len))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_similarity_is_fp32_whatever_the_inputs(context, dtype):
    """The same bits as from the fp32 values, also around a mean key that is much larger than what is left."""
    ctx, planner = context(GRID, kv_len=torch.tensor([320, 170])), Sparge(block=(32, 16), similarity=0.2)
    strips = planner._strips(ctx, torch.device("cpu"))[1]
    x = (torch.cat([alike(20, 16, noise=1.0), alike(20, 16, noise=0.3)]) + 30).to(dtype)
    centre = x.float().mean(1, keepdim=True).transpose(1, 2)
    for shift in (None, centre):
        exact = planner._similarity(x.float(), strips, ctx, shift)
        assert torch.equal(planner._similarity(x, strips, ctx, shift), exact)
    y = x.double() - centre.transpose(1, 2).double()
    unit = y / y.norm(dim=-1, keepdim=True)
    want = torch.stack([part.mean(1).square().sum(-1) for part in unit[:1].split(16, 1)], 2)
    torch.testing.assert_close(exact[:1].double(), want, rtol=1e-5, atol=1e-6)
    q = torch.randn(2, 320, 2, 16).to(dtype)
    assert torch.equal(planner.select(q, x, ctx), planner.select(q.float(), x.float(), ctx))


class Largest(TorchDispatchMode):
    """The most bytes of one new tensor."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        seen = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for x in out if isinstance(out, tuple) else (out,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in seen:
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


def test_similarity_takes_a_few_heads_at_a_time(context, monkeypatch):
    ctx, planner = context(GRID, kv_len=torch.tensor([320, 170])), Sparge(block=(32, 16), similarity=0.2)
    q, k = torch.randn(2, 2, 320, 6, 16).bfloat16().unbind()
    want = planner.select(q, k, ctx)
    one = 320 * 16 * 4
    for heads in (1, 4):
        monkeypatch.setattr(sparge, "TRANSIENT", heads * one)
        with Largest() as largest:
            assert torch.equal(planner.select(q, k, ctx), want)
        assert one <= largest.bytes <= heads * one


def test_blocks_of_padding_alone_are_never_fixed(context):
    """They have no tokens that could differ: nobody must read them, and they need not read everything."""
    ctx, planner = context(GRID, kv_len=torch.tensor([150])), Sparge(block=(32, 16), similarity=0.2, sparsity=0.8)
    q, k = (1.0 + 0.1 * torch.randn(2, 1, 320, 2, 8)).unbind(0)  # alike: no block is fixed but the keys' own noise
    keep = planner.select(q, k, ctx)
    loose = planner.select(q, 0.01 * torch.randn(1, 320, 1, 8) + k, ctx)
    for found in (keep, loose):
        rows = found.sum(-1)
        assert (rows[:, :, 5:] < found.shape[-1]).all()  # queries 160 ... 319 are padding
    fixed = (keep[:, :, :5].all(2)).any(1)[0]  # key blocks that all real queries read
    assert not fixed[10:].any()
