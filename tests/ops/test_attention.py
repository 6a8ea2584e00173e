"""attention against fp64: every builder, random shapes, strides, dtypes, options, empty rows, tails."""

from __future__ import annotations

import pytest
import torch
from attention_oracle import Problem, allowance, magnitudes, plain, worst
from hypothesis import given, settings
from hypothesis import strategies as st

import vdit_fast
from vdit_fast.plan import AttentionPlan

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BUILDERS = (
    "none",
    "dense",
    "blocks",
    "ragged_blocks",
    "clusters",
    "mask",
    "windows",
    "partition",
    "causal",
    "classes",
    "union",
)
LENGTHS = (1, 2, 15, 16, 17, 31, 63, 64, 65, 96, 97, 101, 130, 193)


def sizes_of(total: int, count: int, g: torch.Generator) -> torch.Tensor:
    """``count`` block lengths, zeros among them, that add up to ``total``."""
    cuts = torch.randint(0, total + 1, (count - 1,), generator=g).sort().values
    return torch.diff(torch.cat([torch.tensor([0]), cuts, torch.tensor([total])]))


def make_plan(kind: str, batch: int, heads: int, lq: int, lk: int, g: torch.Generator) -> AttentionPlan | None:
    def coin(*shape: int, p: float = 0.5) -> torch.Tensor:
        return torch.rand(*shape, generator=g) < p

    if kind == "none":
        return None
    if kind == "dense":
        return AttentionPlan.dense(lq, lk)
    if kind == "blocks":
        size_q, size_k = (int(torch.randint(1, 70, (), generator=g)) for _ in range(2))
        shape = (batch, heads, -(-lq // size_q), -(-lk // size_k))
        return AttentionPlan.from_block_mask(coin(*shape), size_q, size_k, lq=lq, lk=lk)
    if kind == "ragged_blocks":
        q_sizes, k_sizes = sizes_of(lq, 4, g), sizes_of(lk, 5, g)
        return AttentionPlan.from_block_mask(coin(heads, 4, 5), q_sizes, k_sizes)
    if kind == "clusters":
        q_sizes = torch.stack([sizes_of(lq, 3, g) for _ in range(batch * heads)]).view(batch, heads, 3)
        k_sizes = torch.stack([sizes_of(lk, 6, g) for _ in range(batch * heads)]).view(batch, heads, 6)
        orders = [
            torch.stack([torch.randperm(n, generator=g) for _ in range(batch * heads)]).view(batch, heads, n).int()
            for n in (lq, lk)
        ]
        return AttentionPlan.from_clusters(coin(batch, heads, 3, 6), q_sizes, k_sizes, *orders)
    if kind == "mask":
        return AttentionPlan.from_mask(coin(batch, 1, lq, lk, p=0.3), block=(32, 48))
    grid = (2, 3, 5)  # the builders below are for self-attention
    if kind == "windows":
        return AttentionPlan.windows3d(grid, (1, 3, 3), tile=(1, 2, 2), text=lq - 30, text_first=bool(coin(1)))
    if kind == "partition":
        return AttentionPlan.windows3d(grid, (2, 2, 2), shift=(0, 1, 1), mode="partition", text=lq - 30)
    if kind == "causal":
        return AttentionPlan.block_causal(sizes_of(lq, 5, g).clamp(min=0).tolist(), window=2, sinks=1)
    if kind == "classes":
        return AttentionPlan.from_classes(coin(3, 3), torch.randint(0, 3, (batch, lq), generator=g))
    a, b = (AttentionPlan.from_block_mask(coin(heads, 3, 4), sizes_of(lq, 3, g), sizes_of(lk, 4, g)) for _ in range(2))
    return a | b


def strided(t: torch.Tensor, kind: str) -> torch.Tensor:
    """The same values behind other strides."""
    if kind == "heads_first":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "dim_strided":
        return torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]
    if kind == "sliced":
        wide = torch.cat([torch.full_like(t, torch.nan), t, torch.full_like(t, torch.nan)], 3)
        return wide[..., t.shape[3] : 2 * t.shape[3]]
    return t


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(BUILDERS),
    dtype=st.sampled_from(sorted(DTYPES)),
    batch=st.integers(1, 2),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
    lq=st.sampled_from(LENGTHS),
    lk=st.sampled_from(LENGTHS),
    dim=st.sampled_from([40, 64, 72, 80, 96, 112, 128, 160]),
    stride=st.sampled_from(["plain", "heads_first", "dim_strided", "sliced"]),
    options=st.sets(st.sampled_from(["kv_len", "row_scale", "segments", "scale"])),
    seed=st.integers(0, 2**16),
)
def test_every_builder_against_fp64(kind, dtype, batch, heads, lq, lk, dim, stride, options, seed):
    g = torch.Generator().manual_seed(seed)
    if kind in ("windows", "partition", "causal", "classes"):
        lq = lk = max(lq, 31)
    h, h_kv = heads
    dt = DTYPES[dtype]

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(dt)

    plan = make_plan(kind, batch, h, lq, lk, g)
    mask = torch.ones(batch, h, lq, lk, dtype=torch.bool)
    if plan is not None:
        mask = plan.validate().to_mask().expand(batch, h, lq, lk).clone()
    kv_len = None
    if "kv_len" in options:
        kv_len = torch.randint(0, lk + 1, (batch,), generator=g)
        mask &= (torch.arange(lk) < kv_len[:, None])[:, None, None]
    segments = (
        [(rand(b, n, h_kv, dim), rand(b, n, h_kv, dim)) for b, n in ((1, 5), (batch, 33))]
        if "segments" in options
        else []
    )
    mask = torch.cat([mask, torch.ones(batch, h, lq, sum(s[0].shape[1] for s in segments), dtype=torch.bool)], -1)
    row_scale = torch.rand(batch, h, lq, generator=g) if "row_scale" in options else None
    scale = 0.05 if "scale" in options else dim**-0.5
    q, k, v = (rand(batch, n, heads_of, dim) for n, heads_of in ((lq, h), (lk, h_kv), (lk, h_kv)))
    problem = Problem(q, k, v, mask, segments, row_scale, scale)

    leaves = [strided(t, stride).requires_grad_() for t in problem.leaves()]
    pairs = list(zip(leaves[3::2], leaves[4::2], strict=True))
    out, lse = vdit_fast.attention(
        *leaves[:3], plan, scale=scale, row_scale=row_scale, kv_len=kv_len, segments=pairs, return_lse=True
    )
    dout, dlse = rand(*out.shape), torch.randn(lse.shape, generator=g)
    grads = torch.autograd.grad([out, lse], leaves, [dout, dlse], allow_unused=False)

    want, want_lse, want_grads = plain(problem, torch.float64, dout, dlse)
    base, _, base_grads = plain(problem, dt, dout, dlse)
    base_error = max(worst(a, b) for a, b in zip(base_grads, want_grads, strict=True))
    assert out.shape == want.shape and out.dtype == dt
    value, product = magnitudes(problem, dout, dlse)
    assert worst(out, want) <= allowance(worst(base, want), want, value, dt)
    assert torch.equal(lse == -torch.inf, ~mask.any(-1))
    full = torch.isfinite(want_lse)
    assert worst(lse[full], want_lse[full]) <= 2e-6 * max(1.0, float(want_lse[full].abs().max()) if full.any() else 1.0)
    assert not out.transpose(1, 2)[~mask.any(-1)].any()
    for got, want_grad in zip(grads, want_grads, strict=True):
        assert worst(got, want_grad) <= allowance(base_error, want_grad, product, dt)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("dim", [64, 72])  # v of 64 fp32 columns is read in place
@pytest.mark.parametrize("stride", ["plain", "heads_first", "dim_strided", "sliced"])
def test_few_queries_are_rows_of_many(dtype, stride, dim):
    """Keys that are read once are packed as they are read, others beforehand: the same bits."""
    g = torch.Generator().manual_seed(0)
    batch, heads, lk, few = 2, 2, 333, 5

    def rand(*shape: int) -> torch.Tensor:
        return strided(torch.randn(*shape, generator=g).to(DTYPES[dtype]), stride)

    q, k, v = (rand(batch, n, heads, dim) for n in (500, lk, lk))
    segments = [(rand(n, length, heads, dim), rand(n, length, heads, dim)) for n, length in ((1, 9), (batch, 70))]
    sizes = [1, 3, 20, 40, 5, 6, 37, 100, 2, 119]
    keep = torch.rand(heads, 1, len(sizes), generator=g) < 0.75
    order = torch.stack([torch.randperm(lk, generator=g) for _ in range(batch * heads)]).view(batch, heads, lk).int()
    k_sizes = torch.tensor(sizes).expand(batch, heads, -1)

    def clusters(lq: int) -> AttentionPlan:
        rows = torch.arange(lq, dtype=torch.int32).expand(batch, heads, -1)
        q_sizes = torch.full((batch, heads, 1), lq)
        return AttentionPlan.from_clusters(keep.expand(batch, -1, -1, -1), q_sizes, k_sizes, rows, order)

    plans = (lambda lq: None, lambda lq: AttentionPlan.from_block_mask(keep, [lq], sizes), clusters)
    for plan in plans:
        for more in ({}, {"kv_len": torch.tensor([200, lk])}, {"segments": segments}):
            many = vdit_fast.attention(q, k, v, plan(500), return_lse=True, **more)
            one = vdit_fast.attention(q[:, :few], k, v, plan(few), return_lse=True, **more)
            assert torch.equal(one[0], many[0][:, :few]) and torch.equal(one[1], many[1][:, :, :few])


@pytest.mark.parametrize("length", [1, 7, 97, 509])
def test_odd_lengths_against_fp64(length):
    g = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(1, length, 2, 80, generator=g).double().requires_grad_() for _ in range(3))
    q32, k32, v32 = (t.detach().float().requires_grad_() for t in (q, k, v))
    plan = AttentionPlan.from_mask(torch.rand(length, length, generator=g) < 0.4)
    want = vdit_fast.reference.attention(q, k, v, plan)
    out = vdit_fast.attention(q32, k32, v32, plan)
    assert worst(out, want) < 3e-6
    dout = torch.randn(out.shape, generator=g)
    got = torch.autograd.grad(out, (q32, k32, v32), dout)
    for a, b in zip(got, torch.autograd.grad(want, (q, k, v), dout.double()), strict=True):
        assert worst(a, b) < 2e-5


def test_keys_out_of_reach_never_touch_the_result():
    """NaN and infinity behind kv_len, in unselected blocks and in unselected neighbours within one panel."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 100, 2, 64) for _ in range(3))
    mask = torch.zeros(100, 100, dtype=torch.bool)
    mask[:, 3:50] = True  # starts and ends inside a panel of 8, 16 or 32 keys
    plan = AttentionPlan.from_block_mask(torch.tensor([[False, True, False]]), [100], [3, 47, 50])
    clean = vdit_fast.attention(q, k, v, plan, kv_len=torch.tensor([45, 50]), return_lse=True)
    for poison in (torch.nan, torch.inf, 3e38):
        k2, v2 = k.clone(), v.clone()
        for t in (k2, v2):
            t[:, :3] = poison
            t[:, 50:] = poison
            t[0, 45:] = poison
        dirty = vdit_fast.attention(q, k2, v2, plan, kv_len=torch.tensor([45, 50]), return_lse=True)
        assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


def test_gaps_between_runs_in_one_stage_are_not_read():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 64, 1, 64) for _ in range(3))
    for gap in ([10, 10, 44], [15, 1, 48], [16, 1, 47], [31, 2, 31], [5, 50, 9]):
        plan = AttentionPlan.from_block_mask(torch.tensor([[True, False, True]]), [64], gap)
        hole = slice(gap[0], gap[0] + gap[1])
        dirty_k, dirty_v = k.clone(), v.clone()
        dirty_k[:, hole], dirty_v[:, hole] = torch.nan, torch.nan
        assert torch.equal(vdit_fast.attention(q, k, v, plan), vdit_fast.attention(q, dirty_k, dirty_v, plan)), gap


def test_nan_and_inf_arrive_where_softmax_puts_them():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 70, 1, 64) for _ in range(3))
    q[0, 5] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # the NaN that GPUs make
    v[0, 9, 0, 3] = torch.inf
    k[0, 11, 0, 0] = -torch.inf  # scores of +-inf
    plan = AttentionPlan.from_block_mask(torch.eye(7, dtype=torch.bool), 10, 10)
    out = vdit_fast.attention(q, k, v, plan)
    # Block by block: plain torch multiplies the zero weights of unselected keys with their infinities.
    rows = [slice(i, i + 10) for i in range(0, 70, 10)]
    want = torch.cat(
        [vdit_fast.reference.attention(q[:, r].double(), k[:, r].double(), v[:, r].double()) for r in rows], 1
    )
    assert torch.equal(out.isnan(), want.isnan())
    assert torch.equal(out.isinf(), want.isinf())
    assert out.isnan().any() and out.isinf().any() and out.isfinite().any()


def test_repeatable_and_independent_of_threads():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 700, 2, 64, requires_grad=True) for _ in range(3))
    plan = AttentionPlan.from_block_mask(torch.rand(2, 11, 11) < 0.5, 64, 64, lq=700, lk=700)
    dout = torch.randn(1, 700, 2, 64)

    def run() -> list[torch.Tensor]:
        out, lse = vdit_fast.attention(q, k, v, plan, return_lse=True)
        return [out, lse, *torch.autograd.grad(out, (q, k, v), dout)]

    first, threads = run(), torch.get_num_threads()
    try:
        for n in (1, 2, 3, 2, 1):
            torch.set_num_threads(n)
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    finally:
        torch.set_num_threads(threads)


def test_large_sums_do_not_overflow():
    """Scores of thousands: the running maximum must be subtracted before any exponential."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 50, 1, 64) * 60, torch.randn(1, 333, 1, 64) * 60, torch.randn(1, 333, 1, 64)
    out, lse = vdit_fast.attention(q, k, v, return_lse=True)
    want, want_lse = vdit_fast.reference.attention(q.double(), k.double(), v.double(), return_lse=True)
    assert worst(out, want) < 2e-3 and worst(lse, want_lse) < 1e-2  # scores of 1e4 carry fp32 errors of 1e-3
    increasing = (torch.arange(333.0) * 40).view(1, 333, 1, 1).expand(1, 333, 1, 64) / 64
    out, lse = vdit_fast.attention(torch.ones(1, 1, 1, 64), increasing, v, scale=1.0, return_lse=True)
    assert torch.allclose(out[0, 0, 0], v[0, -1, 0]) and torch.allclose(lse, torch.tensor(332 * 40.0))


def test_long_prime_length_on_sampled_rows():
    torch.manual_seed(0)
    n = 32_749
    q, k, v = (torch.randn(1, n, 1, 40) for _ in range(3))
    plan = AttentionPlan.from_block_mask(torch.rand(-(-n // 512), -(-n // 512)) < 0.05, 512, 512, lq=n, lk=n)
    out = vdit_fast.attention(q, k, v, plan)
    rows = torch.tensor([0, 511, 512, 16_000, n - 1])
    blocks = torch.zeros(len(rows), n, dtype=torch.bool)
    tiles, ptr, runs = plan.tiles, plan.run_ptr, plan.runs
    for i, row in enumerate(rows):
        t = int(((tiles[:, 1] <= row) & (row < tiles[:, 1] + tiles[:, 2])).nonzero())
        for start, length, _ in runs[ptr[t] : ptr[t + 1]].tolist():
            blocks[i, start : start + length] = True
    scores = (q[0, rows, 0].double() @ k[0, :, 0].double().T / 40**0.5).masked_fill(~blocks, -torch.inf)
    want = torch.nan_to_num(scores.softmax(-1)) @ v[0, :, 0].double()
    assert worst(out[0, rows, 0], want) < 3e-6


def test_row_scale_has_a_gradient():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 20, 2, 64, requires_grad=True) for _ in range(3))
    rho = torch.rand(1, 2, 20, requires_grad=True)
    dout = torch.randn(1, 20, 2, 64)
    got = torch.autograd.grad(vdit_fast.attention(q, k, v, row_scale=rho), (q, rho), dout)
    want = torch.autograd.grad(vdit_fast.reference.attention(q, k, v, row_scale=rho), (q, rho), dout)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, want, strict=True))


def test_segments_equal_concatenated_keys_also_for_uncovered_rows():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 40, 2, 64) for _ in range(3))
    ks, vs = torch.randn(1, 9, 2, 64), torch.randn(1, 9, 2, 64)
    plan = AttentionPlan.from_block_mask(torch.tensor([[False, True]]), [40], [20, 20])
    partly = AttentionPlan(1, 1, 40, 40, torch.tensor([[0, 0, 30]], dtype=torch.int32), plan.run_ptr, plan.runs)
    out = vdit_fast.attention(q, k, v, partly.with_segments([9]), segments=[(ks, vs)])
    joined_k = torch.cat([k[:, 20:], ks.expand(2, -1, -1, -1)], 1)
    joined_v = torch.cat([v[:, 20:], vs.expand(2, -1, -1, -1)], 1)
    assert torch.allclose(out[:, :30], vdit_fast.attention(q[:, :30], joined_k, joined_v), atol=1e-6)
    only = vdit_fast.attention(q[:, 30:], ks.expand(2, -1, -1, -1), vs.expand(2, -1, -1, -1))
    assert torch.allclose(out[:, 30:], only, atol=1e-6)
