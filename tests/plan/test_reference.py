"""The pure-torch attention and merge against torch's own functions in fp64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vdit_fast.plan import dense, from_block_mask, from_mask
from vdit_fast.reference import attention, merge

FAST = settings(max_examples=25, deadline=None)


def tensors(batch, lq, lk, heads, kv_heads, dim, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, lq, heads, dim), (batch, lk, kv_heads, dim), (batch, lk, kv_heads, dim))
    return tuple(torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)


def expected(q, k, v, mask, scale):
    """SDPA on rows with keys, 0 and -inf elsewhere."""
    repeat = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), *(t.transpose(1, 2).repeat_interleave(repeat, 1) for t in (k, v))
    mask = mask.expand(q.shape[0], q.shape[1], -1, -1)
    empty = ~mask.any(-1)
    safe = mask | empty[..., None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=safe, scale=scale).masked_fill(empty[..., None], 0)
    lse = torch.logsumexp((q @ k.mT * scale).masked_fill(~mask, -torch.inf), -1)
    return out.transpose(1, 2), lse


@FAST
@given(
    st.integers(1, 2),
    st.integers(1, 20),
    st.integers(1, 40),
    st.sampled_from([(1, 1), (4, 2), (3, 3), (3, 1)]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.integers(0, 2**31),
)
def test_against_sdpa(batch, lq, lk, heads, per_head, use_len, use_segment, keep, seed):
    generator = torch.Generator().manual_seed(seed)
    h, kv_h = heads
    q, k, v = tensors(batch, lq, lk, h, kv_h, 8, seed)
    mask = torch.rand(batch, h if per_head else 1, lq, lk, generator=generator) < keep
    plan = from_mask(mask if per_head else mask[:, :1], block=(8, 16))
    length = torch.randint(0, lk + 1, (batch,), generator=generator)
    segments, k_all, v_all, full = None, k, v, mask
    if use_len:
        full = full & (torch.arange(lk) < length[:, None, None, None])
    if use_segment:
        _, k_s, v_s = tensors(1, 1, 5, h, kv_h, 8, seed + 1)
        segments = [(k_s, v_s), (k_s[:, :2] + 1, v_s[:, :2])]
        plan = plan.with_segments([5, 2])
        k_all = torch.cat([k, *(s[0].expand(batch, -1, -1, -1) for s in segments)], 1)
        v_all = torch.cat([v, *(s[1].expand(batch, -1, -1, -1) for s in segments)], 1)
        full = F.pad(full, (0, 7), value=True)
    row_scale = torch.rand(batch, h, lq, generator=generator)
    out, lse = attention(
        q,
        k,
        v,
        plan,
        scale=0.7,
        row_scale=row_scale,
        kv_len=length if use_len else None,
        segments=segments,
        return_lse=True,
    )
    want, want_lse = expected(q, k_all, v_all, full, 0.7)
    assert out.dtype == lse.dtype == torch.float64
    torch.testing.assert_close(out, want * row_scale.double().transpose(1, 2)[..., None], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(lse, want_lse, rtol=1e-12, atol=1e-13)


def test_no_plan_is_a_dense_plan():
    q, k, v = tensors(2, 7, 9, 2, 1, 4)
    want, _ = expected(q, k, v, torch.ones(1, 1, 7, 9).bool(), 0.5)
    torch.testing.assert_close(attention(q, k, v), want, rtol=1e-12, atol=1e-13)
    assert torch.equal(attention(q, k, v), attention(q, k, v, dense(7, 9)))


def test_permuted_plans_answer_in_original_order():
    q, k, v = tensors(1, 24, 24, 2, 2, 4)
    blocks = torch.rand(2, 3, 3) < 0.5
    order = torch.stack([torch.randperm(24) for _ in range(2)])[None]
    plan = from_block_mask(blocks, 8, 8, q_order=order, kv_order=order)
    out = attention(q, k, v, plan)
    for h in range(2):
        p = order[0, h]
        inner = attention(q[:, p, h : h + 1], k[:, p, h : h + 1], v[:, p, h : h + 1], from_block_mask(blocks[h], 8, 8))
        torch.testing.assert_close(out[:, p, h : h + 1], inner)


def test_kv_len_counts_original_tokens():
    q, k, v = tensors(1, 6, 6, 1, 1, 4)
    plan = from_block_mask(torch.ones(1, 1).bool(), 6, 6, kv_order=torch.arange(6).flip(0))
    short = attention(q, k[:, :4], v[:, :4])
    torch.testing.assert_close(attention(q, k, v, plan, kv_len=torch.tensor([4])), short)


def test_unread_keys_may_hold_anything():
    q, k, v = tensors(1, 8, 8, 1, 1, 4)
    k[:, 6:], v[:, 6:] = torch.nan, torch.inf
    assert attention(q, k, v, kv_len=torch.tensor([6])).isfinite().all()
    first_six = (torch.arange(8) < 6).expand(8, 8)
    assert attention(q, k, v, from_mask(first_six)).isfinite().all()
    assert attention(q, k, v, from_mask(first_six & torch.ones(8, 8).tril().bool())).isfinite().all()


def test_sixteen_bit_inputs_are_computed_in_fp32():
    q, k, v = tensors(1, 9, 33, 2, 2, 16, dtype=torch.bfloat16)
    out, lse = attention(q, k, v, return_lse=True)
    exact, exact_lse = attention(q.double(), k.double(), v.double(), return_lse=True)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert torch.equal(out, exact.to(torch.bfloat16)) or (out - exact).abs().max() <= exact.abs().max() * 2**-8
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=1e-5)


def test_gradients_with_empty_rows():
    q, k, v = tensors(1, 5, 6, 1, 1, 3)
    plan = from_mask(torch.rand(5, 6) < 0.4)
    segment = tensors(1, 1, 2, 1, 1, 3, seed=3)[1:]
    leaves = [t.requires_grad_() for t in (q, k, v, *segment)]
    mask = plan.to_mask()
    mask[..., 0, :] = False
    plan = from_mask(mask)
    assert torch.autograd.gradcheck(lambda q, k, v, *_: attention(q, k, v, plan, return_lse=False), leaves)
    assert torch.autograd.gradcheck(lambda q, k, v, a, b: attention(q, k, v, plan, segments=[(a, b)]), leaves)


@FAST
@given(st.integers(1, 4), st.integers(0, 2**31))
def test_merge_is_attention_over_all_keys(parts, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = tensors(2, 11, 40, 2, 2, 4, seed)
    owner = torch.randint(0, parts + 1, (11, 40), generator=generator)
    owner[0] = parts  # an empty row in every part
    owner[1] = 0
    results = [attention(q, k, v, from_mask(owner == p), return_lse=True) for p in range(parts)]
    out, lse = merge([r[0] for r in results], [r[1] for r in results])
    want, want_lse = attention(q, k, v, from_mask(owner < parts), return_lse=True)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(lse, want_lse, rtol=1e-12, atol=1e-13)
    assert (out[:, 0] == 0).all() and (lse[:, :, 0] == -torch.inf).all()


def test_merge_ignores_what_empty_parts_hold():
    out, lse = torch.randn(1, 3, 1, 4), torch.randn(1, 1, 3)
    nothing = torch.full_like(out, torch.nan), torch.full_like(lse, -torch.inf)
    merged = merge([out, nothing[0]], [lse, nothing[1]])
    torch.testing.assert_close(merged[0], out)
    torch.testing.assert_close(merged[1], lse)


def test_bad_calls():
    q, k, v = tensors(2, 4, 6, 4, 2, 8)
    wrong = [
        (lambda: attention(q, k, v[:, :5]), "k and v must be"),
        (lambda: attention(q[:, :, :3], k, v), "not a multiple of the 2 heads"),
        (lambda: attention(q, k, v, dense(4)), "plan is for"),
        (lambda: attention(q, k, v, dense(4, 6, heads=3)), "plan is for"),
        (lambda: attention(q, k, v, dense(4, 6).with_segments([3])), "needs segments of lengths"),
        (lambda: attention(q, k, v, segments=[(k, v[:, :3])]), "a segment must be"),
        (lambda: attention(q, k, v, row_scale=torch.ones(2, 4)), "row_scale"),
        (lambda: attention(q, k, v, kv_len=torch.ones(3).int()), "kv_len"),
        (lambda: merge([], []), "at least one"),
        (lambda: merge([q], [q]), "expected"),
    ]
    for call, message in wrong:
        with pytest.raises(ValueError, match=message):
            call()
