"""Every builder against a mask written out with Python loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vdit_fast.plan import AttentionPlan, dense, from_block_mask, from_classes, from_clusters, from_mask

FAST = settings(max_examples=25, deadline=None)
LENGTHS = st.sampled_from([1, 2, 7, 13, 31, 33, 41, 64])
SEEDS = st.integers(0, 2**31)


def random_sizes(total: int, count: int, generator: torch.Generator) -> list[int]:
    """``count`` lengths that sum to ``total``, some of them 0."""
    cuts = torch.randint(0, total + 1, (count - 1,), generator=generator).sort().values.tolist()
    return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]


def block_of(position: int, sizes: list[int]) -> int:
    for i, size in enumerate(sizes):
        if position < size:
            return i
        position -= size
    raise AssertionError


def expand(blocks: torch.Tensor, q_sizes: list[int], kv_sizes: list[int]) -> torch.Tensor:
    """Mask ``[lq, lk]`` of one block map, one entry at a time."""
    rows = [block_of(i, q_sizes) for i in range(sum(q_sizes))]
    columns = [block_of(j, kv_sizes) for j in range(sum(kv_sizes))]
    table = blocks.tolist()
    return torch.tensor([[table[r][c] for c in columns] for r in rows])


@FAST
@given(LENGTHS, LENGTHS, st.integers(1, 2), st.integers(1, 3), st.sampled_from([1, 5, 16, 128]))
def test_dense(agrees, lq, lk, batch, heads, q_tile):
    plan = dense(lq, lk, batch=batch, heads=heads, q_tile=q_tile)
    agrees(plan, torch.ones(batch, heads, lq, lk, dtype=torch.bool))
    assert len(plan.tiles) == batch * heads * -(-lq // q_tile)
    assert len(plan.runs) == len(plan.tiles)
    assert plan.density == 1.0


def test_dense_defaults():
    plan = AttentionPlan.dense(300)
    assert plan.shape == (1, 1, 300, 300)
    assert sorted(plan.tiles[:, 2].tolist()) == [44, 128, 128]


@FAST
@given(LENGTHS, LENGTHS, st.integers(1, 20), st.integers(1, 20), st.sampled_from([2, 3, 4]), SEEDS)
def test_equal_blocks_with_tails(agrees, lq, lk, q_block, kv_block, dims, seed):
    generator = torch.Generator().manual_seed(seed)
    nq, nk = -(-lq // q_block), -(-lk // kv_block)
    shape = {2: (), 3: (2,), 4: (2, 3)}[dims]
    blocks = torch.rand(*shape, nq, nk, generator=generator) < torch.rand((), generator=generator)
    plan = from_block_mask(blocks, q_block, kv_block, lq=lq, lk=lk)
    q_sizes = [min(q_block, lq - i * q_block) for i in range(nq)]
    kv_sizes = [min(kv_block, lk - i * kv_block) for i in range(nk)]
    four = blocks.reshape((1,) * (4 - dims) + blocks.shape)
    mask = torch.stack([torch.stack([expand(m, q_sizes, kv_sizes) for m in heads]) for heads in four])
    agrees(plan, mask)


@FAST
@given(LENGTHS, LENGTHS, st.integers(1, 6), st.integers(1, 8), st.booleans(), SEEDS)
def test_unequal_and_empty_blocks(agrees, lq, lk, nq, nk, as_tensor, seed):
    generator = torch.Generator().manual_seed(seed)
    q_sizes, kv_sizes = random_sizes(lq, nq, generator), random_sizes(lk, nk, generator)
    blocks = torch.rand(2, nq, nk, generator=generator) < 0.6
    q_order = torch.randperm(lq, generator=generator)
    kv_order = torch.stack([torch.randperm(lk, generator=generator) for _ in range(2)])[None]
    convert = (lambda x: torch.tensor(x, dtype=torch.int32)) if as_tensor else list
    plan = from_block_mask(blocks, convert(q_sizes), convert(kv_sizes), q_order=q_order, kv_order=kv_order)
    permuted = torch.stack([expand(m, q_sizes, kv_sizes) for m in blocks])[None]
    source, rows = permuted.tolist(), q_order.tolist()
    cells = torch.zeros_like(permuted).tolist()
    for h, columns in enumerate(kv_order[0].tolist()):
        for i in range(lq):
            for j in range(lk):
                cells[0][h][rows[i]][columns[j]] = source[0][h][i][j]
    mask = torch.tensor(cells)
    agrees(plan, mask)
    assert torch.equal(plan.to_mask(permuted=True), permuted)


def test_orders_widen_the_plan(agrees):
    blocks = torch.tensor([[True, False], [True, True]])
    orders = torch.stack([torch.randperm(8) for _ in range(6)]).view(2, 3, 8)
    plan = from_block_mask(blocks, 4, 4, q_order=orders)
    permuted = expand(blocks, [4, 4], [4, 4])
    mask = torch.zeros(2, 3, 8, 8, dtype=torch.bool)
    for b in range(2):
        for h in range(3):
            mask[b, h, orders[b, h]] = permuted
    agrees(plan, mask)


def test_neighbours_merge_across_an_empty_block():
    blocks = torch.tensor([[True, False, True, False, True]])
    plan = from_block_mask(blocks, 4, [3, 0, 5, 2, 1])
    assert plan.runs.tolist() == [[0, 8, -1], [10, 1, -1]]


def test_longest_work_first_and_stable():
    blocks = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 1, 0], [1, 0, 1]]).bool()
    plan = from_block_mask(blocks, 8, 16)
    assert plan.tiles[:, 1].tolist() == [8, 24, 0, 16]


@FAST
@given(st.integers(1, 2), st.integers(1, 3), LENGTHS, LENGTHS, st.integers(1, 5), st.integers(1, 7), SEEDS)
def test_clusters(agrees, batch, heads, lq, lk, cq, ck, seed):
    generator = torch.Generator().manual_seed(seed)
    q_labels = torch.randint(0, cq, (batch, heads, lq), generator=generator)
    kv_labels = torch.randint(0, ck, (batch, heads, lk), generator=generator)
    table = torch.rand(batch, heads, cq, ck, generator=generator) < 0.5
    q_sizes = torch.stack([(q_labels == c).sum(-1) for c in range(cq)], -1)
    kv_sizes = torch.stack([(kv_labels == c).sum(-1) for c in range(ck)], -1)
    plan = from_clusters(table, q_sizes, kv_sizes, q_labels.argsort(-1), kv_labels.argsort(-1))
    mask = torch.zeros(batch, heads, lq, lk, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            rows, columns = q_labels[b, h].tolist(), kv_labels[b, h].tolist()
            lookup = table[b, h].tolist()
            mask[b, h] = torch.tensor([[lookup[r][c] for c in columns] for r in rows])
    agrees(plan, mask)
    assert len(plan.tiles) == int((q_sizes > 0).sum())


@FAST
@given(LENGTHS, LENGTHS, st.integers(1, 4), st.integers(1, 4), st.booleans(), st.sampled_from([1, 4, 128]), SEEDS)
def test_classes(agrees, lq, lk, cq, ck, batched, q_tile, seed):
    generator = torch.Generator().manual_seed(seed)
    allow = torch.rand(cq, ck, generator=generator) < 0.5
    q_labels = torch.randint(0, cq, (2, lq) if batched else (lq,), generator=generator, dtype=torch.int32)
    kv_labels = torch.randint(0, ck, (lk,), generator=generator)
    plan = from_classes(allow, q_labels, kv_labels, q_tile=q_tile)
    lookup = allow.tolist()
    mask = torch.tensor(
        [[[[lookup[r][c] for c in kv_labels.tolist()] for r in row]] for row in q_labels.reshape(-1, lq).tolist()]
    )
    agrees(plan, mask)
    assert int(plan.tiles[:, 2].max()) <= q_tile


def test_classes_of_one_sequence_equal_a_boolean_mask(agrees):
    allow = torch.tensor([[1, 0, 1], [0, 1, 1], [1, 1, 1]]).bool()
    labels = torch.randint(0, 3, (50,))
    agrees(from_classes(allow, labels), allow[labels][:, labels][None, None])


@settings(max_examples=30, deadline=None)
@given(LENGTHS, LENGTHS, st.sampled_from([2, 3, 4]), st.integers(1, 40), st.integers(1, 70), SEEDS)
def test_any_mask(agrees, lq, lk, dims, bq, bk, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = {2: (), 3: (2,), 4: (2, 2)}[dims]
    mask = torch.rand(*shape, lq, lk, generator=generator) < torch.rand((), generator=generator)
    # whole areas on and off, so that full, partial and absent blocks occur together
    mask[..., : lq // 2, : 2 * lk // 3] = True
    mask[..., 2 * lq // 3 :, lk // 2 :] = False
    plan = from_mask(mask, block=(bq, bk))
    agrees(plan, mask.reshape((1,) * (4 - dims) + mask.shape))


def test_mask_without_mixed_blocks_has_no_bits():
    plan = from_mask(torch.ones(70, 70, dtype=torch.bool), block=(32, 32))
    assert plan.mask_bits is None
    assert plan.runs.tolist() == [[0, 70, -1]] * 3


def test_equal_bit_patterns_are_stored_once():
    mask = torch.ones(64, 64, dtype=torch.bool).tril().repeat(1, 5)
    plan = from_mask(mask, block=(64, 64))
    assert plan.mask_bits is not None and plan.mask_bits.numel() == 128
    assert plan.runs[:, 2].tolist() == [0] * 5
    assert torch.equal(plan.to_mask()[0, 0], mask)


def test_nothing_is_read():
    plan = from_mask(torch.zeros(5, 9, dtype=torch.bool)).validate()
    assert plan.runs.shape == (0, 3) and plan.density == 0.0 and plan.exact_density == 0.0
    assert not plan.to_mask().any()


def test_constructors_on_the_class():
    mask = torch.rand(9, 9) < 0.5
    assert torch.equal(AttentionPlan.from_mask(mask).to_mask()[0, 0], mask)
    for name in ("dense", "from_block_mask", "from_clusters", "from_mask", "windows3d", "block_causal", "from_classes"):
        assert callable(getattr(AttentionPlan, name))


def test_draw():
    picture = from_block_mask(torch.tensor([[1, 0], [1, 1]]).bool(), 32, 32).draw(width=8)
    assert picture.splitlines()[1:] == [
        "+--------+",
        "|@@@@    |",
        "|@@@@    |",
        "|@@@@@@@@|",
        "|@@@@@@@@|",
        "+--------+",
    ]
    assert "density 0.750" in picture
    assert "@" not in from_mask(torch.eye(64).bool()).draw(width=8)
    with pytest.raises(ValueError, match="head"):
        dense(4).draw(head=1)


def test_draw_shows_every_read_cell():
    mask = torch.zeros(640, 640, dtype=torch.bool)
    mask[0, 639] = True
    assert dense(1000).draw().count("@") == 24 * 48
    assert from_mask(mask).draw(width=10).splitlines()[2] == "|         .|"
