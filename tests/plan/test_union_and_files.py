"""Union, files, segments, device moves."""

import io
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vdit_fast.plan import AttentionPlan, block_causal, dense, from_block_mask, from_classes, from_mask, windows3d
from vdit_fast.plan.union import MASK_LIMIT

FAST = settings(max_examples=20, deadline=None)
SEEDS = st.integers(0, 2**31)


@FAST
@given(st.integers(1, 5), st.integers(1, 9), st.booleans(), SEEDS)
def test_union_of_one_tiling_merges_runs(agrees, nq, nk, permuted, seed):
    generator = torch.Generator().manual_seed(seed)
    q_sizes = torch.randint(0, 6, (nq,), generator=generator)
    kv_sizes = torch.randint(0, 6, (nk,), generator=generator)
    q_sizes[0] += 1
    kv_sizes[0] += 1
    orders = {}
    if permuted:
        orders["q_order"] = torch.randperm(int(q_sizes.sum()), generator=generator)
        orders["kv_order"] = torch.randperm(int(kv_sizes.sum()), generator=generator)
    a, b = (torch.rand(2, nq, nk, generator=generator) < 0.4 for _ in range(2))
    left, right = (from_block_mask(m, q_sizes, kv_sizes, **orders) for m in (a, b))
    both = from_block_mask(a | b, q_sizes, kv_sizes, **orders)
    joined = left | right
    agrees(joined, left.to_mask() | right.to_mask())
    # the same plan as building from the united blocks, up to the order of tiles with equal work
    assert joined.mask_bits is None
    assert torch.equal(joined.tiles.sort(0).values, both.tiles.sort(0).values)
    assert sorted(map(tuple, joined.runs.tolist())) == sorted(map(tuple, both.runs.tolist()))


@FAST
@given(SEEDS, st.integers(1, 40), st.integers(1, 40))
def test_union_of_anything_small(agrees, seed, lq, lk):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(2, lq, lk, generator=generator) < 0.2
    allow = torch.rand(3, 3, generator=generator) < 0.4
    labels = [torch.randint(0, 3, (n,), generator=generator) for n in (lq, lk)]
    pairs = [
        (from_mask(mask), from_mask(mask.roll(1, 1), block=(16, 7))),
        (from_classes(allow, *labels), from_mask(mask[:1])),
        (from_classes(allow, *labels), from_classes(~allow, *labels)),
        (from_classes(allow, *labels), from_classes(allow.roll(1, 0), *labels, q_tile=5)),
    ]
    for a, b in pairs:
        agrees(a | b, a.to_mask() | b.to_mask())
        assert torch.equal((b | a).to_mask(), a.to_mask() | b.to_mask())


def test_union_keeps_shared_orders_and_segments():
    labels = torch.randint(0, 4, (40,))
    a = from_classes(torch.eye(4).bool(), labels).with_segments([3])
    b = from_classes(torch.ones(4, 4).bool().triu(), labels, q_tile=7).with_segments([3])
    joined = (a | b).validate()
    assert joined.segments == (3,)
    assert torch.equal(joined.q_order, a.q_order)


def test_union_that_would_need_too_large_a_mask():
    length = int(MASK_LIMIT**0.5) + 200
    a, b = dense(length), dense(length, q_tile=64)
    with pytest.raises(ValueError, match="same blocks and orders"):
        a | b
    assert (a | a).density == 1.0


def test_union_of_unlike_plans():
    with pytest.raises(ValueError, match="same shape"):
        dense(4) | dense(5)
    with pytest.raises(ValueError, match="with_segments after"):
        dense(4).with_segments([2]) | dense(4)
    with pytest.raises(TypeError):
        dense(4) | None


PLANS = {
    "dense": lambda: dense(70, 30, batch=2, heads=3),
    "bits": lambda: from_mask(torch.rand(2, 70, 50) < 0.5),
    "permuted": lambda: windows3d((2, 3, 4), (1, 2, 2), tile=(1, 2, 2), text=3).with_segments([4, 5]),
    "empty": lambda: from_mask(torch.zeros(3, 3).bool()),
    "causal": lambda: block_causal([4, 0, 5]),
}


@pytest.mark.parametrize("name", PLANS)
def test_save_and_load(tmp_path, name):
    plan = PLANS[name]()
    path = tmp_path / "plan.bin"  # the name is used as it is
    plan.save(path)
    again = AttentionPlan.load(path)
    assert (again.shape, again.segments) == (plan.shape, plan.segments)
    for a, b in zip(plan.op_args(), again.op_args(), strict=True):
        assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b))


def test_files_that_are_not_plans(tmp_path):
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    array = io.BytesIO()
    np.save(array, np.zeros(3))
    plan = io.BytesIO()
    dense(4).save(tmp_path / "whole")
    plan = (tmp_path / "whole").read_bytes()
    wrong = [b"", b"hello", pickle.dumps({1: 2}), buffer.getvalue(), array.getvalue(), plan[: len(plan) // 2]]
    for i, content in enumerate(wrong):
        path = tmp_path / f"file{i}"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"is not a plan file; write one with AttentionPlan.save"):
            AttentionPlan.load(path)
    with pytest.raises(FileNotFoundError):
        AttentionPlan.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": np.array(2)}, "version 2"),
        ({"shape": np.array([1, 1, 4])}, "damaged"),
        ({"shape": np.array([1, 1, 3, 4])}, "damaged: tiles"),
        ({"runs": np.array([["a", "b", "c"]])}, "damaged"),
        ({"runs": np.array([[0.0, 4.0, -1.0]])}, "damaged: runs must be torch.int32"),
        ({"format": np.array("other")}, "not a plan file"),
    ],
)
def test_damaged_files(tmp_path, change, message):
    dense(4).save(tmp_path / "plan")
    with np.load(tmp_path / "plan") as file:
        data = {name: file[name] for name in file.files}
    with open(tmp_path / "plan", "wb") as out:
        np.savez(out, **(data | change))
    with pytest.raises(ValueError, match=message):
        AttentionPlan.load(tmp_path / "plan")


def test_segments():
    plan = dense(4).with_segments([5, 1])
    assert plan.segments == (5, 1)
    for wrong in ([0], [-1], [1.5], [True]):
        with pytest.raises(ValueError, match="segments"):
            dense(4).with_segments(wrong)


def test_to_device_and_size():
    plan = PLANS["bits"]()
    moved = plan.to("meta")
    assert moved.device.type == "meta" and all(t is None or t.device.type == "meta" for t in moved.op_args())
    assert plan.nbytes == sum(4 * t.numel() for t in plan.op_args() if t is not None)
    assert "tiles=" in repr(plan) and replace(plan) != plan
