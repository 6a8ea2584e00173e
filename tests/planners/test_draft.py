"""DraftAttention: token order, draft scores, selection, text, borders."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vdit_fast
from vdit_fast.ops import block_mean
from vdit_fast.planners import Draft
from vdit_fast.planners._tokens import cut, tiling
from vdit_fast.planners.draft import select
from vdit_fast.reference import attention

GRIDS = [((2, 16, 32), (8, 16)), ((2, 45, 80), (8, 16)), ((5, 7, 9), (3, 4)), ((1, 8, 16), (8, 16))]


def patches(grid, planner):
    """Patch number of every video token, the slow and obvious way."""
    edges = [[i for i, n in enumerate(pieces) for _ in range(n)] for pieces in planner.axes(grid)]
    count = [len(p) for p in planner.axes(grid)]
    return torch.tensor([(t * count[1] + y) * count[2] + x for t in edges[0] for y in edges[1] for x in edges[2]])


def test_cut():
    assert cut(48, 8) == (8,) * 6 and cut(45, 8) == (8, 8, 8, 7, 7, 7) and cut(3, 8) == (3,) and cut(1, 1) == (1,)


@given(length=st.integers(1, 300), size=st.integers(1, 40))
def test_cut_is_even(length, size):
    pieces = cut(length, size)
    assert sum(pieces) == length and len(pieces) == math.ceil(length / size)
    assert size >= max(pieces) >= min(pieces) >= max(pieces) - 1 and list(pieces) == sorted(pieces, reverse=True)


@pytest.mark.parametrize(("grid", "size"), GRIDS)
@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize("pool_t", [1, 2])
def test_order_is_a_permutation_and_pooling_is_the_mean_of_neighbours(context, grid, size, text_first, pool_t):
    planner, ctx = Draft(pool=size, pool_t=min(pool_t, grid[0])), context(grid, 5, text_first=text_first)
    x = torch.randn(2, ctx.n_video + 5, 3, 4)
    tiles = tiling(planner.axes(grid), text=5, text_first=text_first)
    order = tiles.order.flatten().long()
    assert torch.equal(order.sort().values, torch.arange(ctx.n_video + 5))
    assert tiles.lengths.sum() == ctx.n_video + 5
    blocks = x[:, order].split(tiles.lengths.tolist(), 1)[tiles.video]
    assert [b.shape[1] for b in blocks] == tiles.lengths[tiles.video].tolist()
    mean = torch.stack([b.double().mean(1) for b in blocks], 2)
    # the means of the tokens of a patch, gathered from the grid in the obvious way
    video, label = x[:, ctx.video_slice].double(), patches(grid, planner)
    torch.testing.assert_close(mean, torch.stack([video[:, label == i].mean(1) for i in range(len(blocks))], 2))
    pooled = block_mean(x, tiles.lengths[None, None], tiles.order)[0][:, :, tiles.video]
    torch.testing.assert_close(pooled.double(), mean, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("grid", "size"), GRIDS)
def test_sparsity_zero_is_dense(context, grid, size):
    q = torch.randn(1, math.prod(grid), 2, 4)
    plan = Draft(pool=size, sparsity=0).plan(q, q, context(grid)).validate()
    assert plan.density == 1


@pytest.mark.parametrize("sparsity", [0.0, 0.001, 0.3, 0.5, 0.75, 0.9, 0.999])
@pytest.mark.parametrize("shape", [(64, 64), (10, 7), (1, 1), (1, 50)])
def test_selection_keeps_the_largest_and_every_row(sparsity, shape):
    scores = torch.randn(2, 3, *shape)
    kept = select(scores, sparsity)
    n = shape[0] * shape[1]
    k = int(sparsity * n)
    for s, m in zip(scores.flatten(0, 1), kept.flatten(0, 1), strict=True):
        ranks = s.flatten().sort(descending=True).values
        largest = s >= ranks[min(n - k, n - 1)]  # the n - k + 1 largest
        assert largest.sum() == min(n - k + 1, n)
        top = s == s.amax(-1, keepdim=True)
        assert torch.equal(m, largest | top)


def test_selection_ties_flat_rows_and_nan():
    tie = torch.tensor([[1.0, 2.0, 2.0, 3.0]])
    assert select(tie, 0.5).tolist() == [[False, True, True, True]]
    weights = torch.softmax(torch.randn(64, 64) * 3, -1)
    weights[0] = 1 / 64  # a flat row loses every block to the global threshold
    kept = select(weights, 0.9)
    assert weights[0, 0] < weights.flatten().kthvalue(int(0.9 * 4096)).values
    assert (kept.sum(-1) > 0).all() and kept[0].all()  # its maximum is everywhere: ties are kept
    assert select(torch.zeros(8, 8), 0.9).all()  # nothing to choose by
    holes = torch.randn(4, 16, 16)
    holes[1, 2, 3] = math.nan
    kept = select(holes, 0.75)
    assert kept[1, 2].all() and torch.equal(kept[2:], select(holes[2:], 0.75))
    holes[:, 4:] = math.nan  # more than stay: the other rows keep their maxima
    kept = select(holes, 0.75)
    assert kept[:, 4:].all() and (kept[0, :4].sum(-1) == 1).all()


@pytest.mark.parametrize(("grid", "size", "pool_t"), [((3, 16, 16), (4, 8), 1), ((5, 7, 9), (3, 4), 2)])
def test_constant_patches_make_the_draft_exact(context, grid, size, pool_t):
    planner, ctx = Draft(pool=size, pool_t=pool_t, sparsity=0.8), context(grid)
    label = patches(grid, planner)
    count = int(label.max()) + 1
    q, k = (torch.randn(1, count, 2, 8)[:, label] * 2 for _ in range(2))
    exact = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / math.sqrt(8), -1)
    draft = planner.draft(q, k, ctx).double().exp()
    torch.testing.assert_close(draft[:, :, label][..., label], exact, atol=1e-7, rtol=1e-4)
    # so the kept pairs are the heaviest ones
    mask = planner.plan(q, k, ctx).to_mask()
    first = torch.tensor([int((label == i).nonzero()[0]) for i in range(count)])
    best = select(exact[:, :, first][..., first].float(), 0.8)
    assert torch.equal(mask, best[:, :, label][..., label])


@pytest.mark.parametrize(("grid", "size"), GRIDS)
@pytest.mark.parametrize(("text", "text_first"), [(0, False), (3, False), (300, True)])
def test_plan_is_the_selected_patch_map(context, grid, size, text, text_first):
    grid = (1, *grid[1:]) if grid[1] == 45 else grid
    planner, ctx = Draft(pool=size, sinks=1), context(grid, text, text_first=text_first)
    q, k = torch.randn(2, 1, ctx.n_video + text, 2, 8).unbind()
    label = patches(ctx.grid, planner)
    keep = select(planner.draft(q, k, ctx), 0.75)
    want = torch.ones(1, 2, ctx.n_video + text, ctx.n_video + text, dtype=torch.bool)
    want[..., ctx.video_slice, ctx.video_slice] = keep[:, :, label][..., label]
    want[..., ctx.video_slice.start : ctx.video_slice.start + ctx.grid[1] * ctx.grid[2]] = True  # sink frame
    plan = planner.plan(q, k, ctx).validate()
    assert torch.equal(plan.to_mask(), want)


def test_720p_frames_need_no_divisibility(context):
    ctx = context((3, 45, 80), 226)
    q, k = torch.randn(2, 1, ctx.num_tokens, 1, 16).unbind()
    plan = Draft(sparsity=0.75).plan(q, k, ctx).validate()
    blocks = 3 * 6 * 5
    assert len(plan.tiles) == blocks + 2 and plan.tiles[:, 2].max() == 128
    video = (ctx.n_video / ctx.num_tokens) ** 2
    assert abs(plan.density - (1 - video + 0.25 * video)) < 0.03


def test_batch_items_and_heads_get_their_own_masks(context):
    grid, planner = (3, 16, 16), Draft(pool=(4, 4))
    q, k = torch.randn(2, 2, 768, 3, 8).unbind()
    q[1] *= 3
    mask = planner.plan(q, k, context(grid)).to_mask()
    assert not torch.equal(mask[0], mask[1]) and not torch.equal(mask[0, 0], mask[0, 1])
    for b in range(2):
        alone = planner.plan(q[b : b + 1], k[b : b + 1], context(grid)).to_mask()
        assert torch.equal(alone[0], mask[b])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_and_strided_views_are_selected_in_fp32(context, dtype):
    grid, planner = (4, 16, 24), Draft(pool=(4, 5))
    joined = torch.randn(1, 1536, 3 * 2 * 16).to(dtype)  # fused qkv: q and k are strided views
    q, k = (joined[..., i * 32 : (i + 1) * 32].unflatten(-1, (2, 16)) for i in range(2))
    ctx = context(grid)
    draft = planner.draft(q, k, ctx)
    assert draft.dtype == torch.float32
    exact = planner.draft(q.float().contiguous(), k.float().contiguous(), ctx)
    torch.testing.assert_close(draft, exact, atol=1e-5, rtol=1e-6)
    assert torch.equal(planner.plan(q, k, ctx).to_mask(), planner.plan(q.float(), k.float(), ctx).to_mask())


def test_grouped_key_heads(context):
    q, k = torch.randn(1, 512, 4, 8), torch.randn(1, 512, 2, 8)
    planner, ctx = Draft(pool=(4, 4)), context((2, 16, 16))
    repeated = planner.plan(q, k.repeat_interleave(2, 2), ctx).to_mask()
    assert torch.equal(planner.plan(q, k, ctx).to_mask(), repeated)


def test_large_scores_do_not_tie_at_zero(context):
    q, k = torch.randn(2, 1, 2048, 1, 16).unbind()
    planner, ctx = Draft(pool=(2, 4)), context((8, 16, 16))
    draft = planner.draft(q * 60, k * 60, ctx)
    assert (draft.exp() == 0).float().mean() > 0.5  # as probabilities most entries underflow
    n = 256 * 256
    assert n - int(0.75 * n) + 1 <= select(draft, 0.75).sum() <= n - int(0.75 * n) + 1 + 256


def test_text_values_do_not_change_the_video_part(context):
    ctx = context((2, 16, 16), 7, text_first=True)
    q, k = torch.randn(2, 1, 519, 2, 8).unbind()
    other = q.clone(), k.clone()
    for x in other:
        x[:, :7] = 100
    planner = Draft(pool=(4, 4))
    assert torch.equal(planner.plan(q, k, ctx).to_mask(), planner.plan(*other, ctx).to_mask())


def test_pool_larger_than_the_grid(context):
    ctx = context((2, 6, 32))
    q = torch.randn(1, 384, 1, 4)
    small = Draft(pool=(2, 2), pool_t=3)
    for planner, words in ((Draft(), "pool .* larger than the 6×32"), (small, "pool_t 3 .* 2 frames")):
        with pytest.raises(ValueError, match=words):
            planner.plan(q, q, ctx)
        assert "larger" in planner.decide(ctx)
    assert Draft(pool=(6, 32), pool_t=2).plan(q, q, ctx).density == 1


def test_nan_token_spoils_only_what_dense_attention_spoils(context):
    ctx = context((2, 16, 16))
    q, k, v = torch.randn(3, 1, 512, 1, 8).unbind()
    q[0, 100] = math.nan
    out = attention(q, k, v, Draft(pool=(4, 4)).plan(q, k, ctx))
    assert torch.equal(out.isnan(), attention(q, k, v).isnan()) and out.isnan().any()


def test_cached_order_survives_inference_mode_and_gradients(context):
    ctx, planner = context((2, 16, 16)), Draft(pool=(4, 4))
    q = torch.randn(1, 512, 1, 8)
    with torch.inference_mode():
        planner.plan(q, q, ctx)
    plan = planner.plan(q.requires_grad_(), q, ctx)
    assert not plan.q_order.is_inference()
    order = plan.q_order.flatten().long()
    q.index_select(1, order).sum().backward()


@pytest.mark.parametrize(("text", "text_first"), [(0, False), (9, True)])
def test_padding_is_left_out_of_the_map(context, text, text_first):
    """The draft of constant patches is exact over the real keys, and the real pairs alone share the budget."""
    grid, planner, first = (5, 7, 9), Draft(pool=(3, 4), sparsity=0.7), text if text_first else 0
    ctx = context(grid, text, text_first=text_first, kv_len=torch.tensor([200, 290, 315 + text, first]))
    label = patches(grid, planner)
    count = int(label.max()) + 1
    q, k = (torch.cat([torch.randn(4, text, 2, 8), torch.randn(4, count, 2, 8)[:, label]], 1) * 2 for _ in range(2))
    draft, mask = planner.draft(q, k, ctx), planner.plan(q, k, ctx).validate().to_mask()[..., first:, first:]
    member = torch.nn.functional.one_hot(label, count).bool()
    some = torch.stack([m.nonzero()[0, 0] for m in member.T])
    kept = mask[:, :, some][..., some]
    for b, length in enumerate(ctx.kv_len.tolist()):
        valid = torch.arange(315) < length - first
        real = (member & valid[:, None]).any(0)
        scores = torch.einsum("qhd,khd->hqk", q[b, first:].double(), k[b, first:].double()) / math.sqrt(8)
        exact = scores[..., valid].log_softmax(-1)
        torch.testing.assert_close(
            draft[b][:, label][..., label][:, valid][..., valid].double(), exact[:, valid], atol=1e-5, rtol=1e-5
        )
        assert (draft[b][:, ~real] == -math.inf).all() and (draft[b][..., ~real] == -math.inf).all()
        inside = draft[b][:, real][..., real]
        want = select(inside, 0.7) if real.any() else inside.bool()
        assert torch.equal(kept[b][:, real][..., real], want)
        assert not kept[b][:, real][..., ~real].any()
        assert torch.equal(kept[b][:, ~real], torch.eye(count)[~real].bool().expand(2, -1, -1))
    whole = planner.plan(q[2:3], k[2:3], context(grid, text, text_first=text_first))
    assert torch.equal(whole.to_mask()[0, :, first:, first:], mask[2])


@settings(max_examples=25, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4)),
    text=st.integers(0, 5),
    text_first=st.booleans(),
    sinks=st.integers(0, 5),
    sparsity=st.floats(0, 0.99),
)
def test_any_shape_gives_a_valid_plan_without_empty_rows(grid, size, text, text_first, sinks, sparsity):
    from vdit_fast.context import LayerContext

    ph, pw, pt = (min(s, n) for s, n in zip(size, (grid[1], grid[2], grid[0]), strict=True))
    ctx = LayerContext(0, 1, "a", grid, math.prod(grid), text, text_first)
    q, k = torch.randn(2, 1, ctx.num_tokens, 2, 4).unbind()
    plan = Draft(pool=(ph, pw), pool_t=pt, sinks=sinks, sparsity=sparsity).plan(q, k, ctx).validate()
    mask = plan.to_mask()
    assert mask.any(-1).all()
    assert mask[..., ctx.text_slice].all() and mask[:, :, ctx.text_slice].all()
    video = mask[..., ctx.video_slice]
    assert video[..., : sinks * grid[1] * grid[2]].all()


@pytest.mark.parametrize(("text", "text_first"), [(0, False), (5, False), (5, True)])
def test_compensate_reads_means_of_dropped_video_patches_only(context, text, text_first) -> None:
    ctx = context((2, 4, 8), text, text_first=text_first)
    q, k, v = torch.randn(3, 1, ctx.num_tokens, 2, 16).unbind(0)
    plain = Draft(pool=(2, 4), sparsity=0.6).plan(q, k, ctx)
    plan = Draft(pool=(2, 4), sparsity=0.6, compensate=True).plan(q, k, ctx).validate()
    assert plan.stand_ins is not None and torch.equal(plan.to_mask(), plain.to_mask())
    order, lengths = plan.stand_ins.kv_order[0, 0].long(), plan.stand_ins.lengths[0, 0]
    read = plain.to_mask()[..., order].split(lengths.tolist(), -1)
    skipped = torch.stack([~block.any(-1) for block in read], -1)
    assert torch.equal(plan.stand_ins.plan.to_mask().expand_as(skipped), skipped)
    torch.testing.assert_close(
        vdit_fast.attention(q, k, v, plan), vdit_fast.reference.attention(q, k, v, plan), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(("grid", "size"), [((2, 45, 20), (8, 16)), ((5, 7, 9), (3, 4))])
def test_frames_that_are_no_multiple_of_the_pool_run_exactly(context, grid, size) -> None:
    """No padding: the plan's attention is dense attention under the selected patches, border patches included."""
    ctx, planner = context(grid, 3), Draft(pool=size, sparsity=0.6)
    q, k, v = torch.randn(3, 1, ctx.num_tokens, 2, 16).unbind()
    plan = planner.plan(q, k, ctx)
    label = patches(grid, planner)
    mask = torch.ones(1, 2, ctx.num_tokens, ctx.num_tokens, dtype=torch.bool)
    mask[..., ctx.video_slice, ctx.video_slice] = select(planner.draft(q, k, ctx), 0.6)[:, :, label][..., label]
    want = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask)
    torch.testing.assert_close(vdit_fast.attention(q, k, v, plan), want.transpose(1, 2), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("compensate", [False, True])
def test_planning_reads_nothing_back(context, compensate) -> None:
    """Tensors without values: any look at one would raise."""
    planner, ctx = Draft(pool=(4, 4), compensate=compensate, sinks=1), context((2, 16, 16), 5)
    q = torch.empty(1, ctx.num_tokens, 2, 8, device="meta")
    plan = planner.plan(q, q, ctx)
    assert plan.device.type == "meta" and plan.shape == (1, 2, ctx.num_tokens, ctx.num_tokens)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; the meta device stands in above")
def test_cuda_planning_does_not_synchronise(context) -> None:
    planner, ctx = Draft(pool=(4, 4), sinks=1), context((2, 16, 16), 5)
    q, k = torch.randn(2, 1, ctx.num_tokens, 2, 8).unbind()
    there = planner.plan(q.cuda(), k.cuda(), ctx)  # makes the tiling of this grid, once
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = planner.plan(q.cuda(non_blocking=True), k.cuda(non_blocking=True), ctx)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(there.to_mask(), again.to_mask())
    assert torch.equal(again.to_mask().cpu(), planner.plan(q, k, ctx).to_mask())
