"""validate() finds every break of the contract and names the field."""

from dataclasses import replace

import pytest
import torch

from vdit_fast.plan import AttentionPlan, from_block_mask, from_mask


def base() -> AttentionPlan:
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]]).bool()
    return from_block_mask(mask, 4, 5, lk=13, q_order=torch.arange(8).flip(0), kv_order=torch.randperm(13)).validate()


def bits() -> AttentionPlan:
    mask = torch.rand(8, 40) < 0.5
    mask[0, 0], mask[0, 1], mask[0, 39] = True, False, False
    return from_mask(mask, block=(8, 40)).validate()


def edited(name: str, place: tuple[int, ...], value: int) -> AttentionPlan:
    plan = base()
    tensor = getattr(plan, name).clone()
    tensor[place] = value
    return replace(plan, **{name: tensor})


def int32(*rows: object) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


WRONG = {
    "batch": (lambda: replace(base(), batch=0), "batch must be an int of at least 1, got 0"),
    "heads": (lambda: replace(base(), heads=True), "heads"),
    "lq": (lambda: replace(base(), lq=2.0), "lq must be an int"),
    "segments": (lambda: replace(base(), segments=[3]), "segments must be a tuple"),
    "not a tensor": (lambda: replace(base(), tiles=[[0, 0, 8]]), "tiles must be a torch.Tensor"),
    "dtype": (lambda: replace(base(), runs=base().runs.long()), "runs must be torch.int32, got torch.int64"),
    "order dtype": (lambda: replace(base(), q_order=base().q_order.long()), "q_order must be torch.int32"),
    "tiles shape": (lambda: replace(base(), tiles=base().tiles[:, :2].contiguous()), "tiles must have shape"),
    "ptr shape": (lambda: replace(base(), run_ptr=base().run_ptr[1:].contiguous()), "run_ptr must have shape"),
    "order shape": (
        lambda: replace(base(), kv_order=base().kv_order[..., 1:].contiguous()),
        "kv_order must have shape",
    ),
    "order batch": (lambda: replace(base(), q_order=base().q_order.repeat(2, 1, 1)), "q_order has shape"),
    "strides": (lambda: replace(base(), runs=base().runs.T.contiguous().T), "runs must be contiguous"),
    "device": (lambda: replace(base(), kv_order=base().kv_order.to("meta")), "kv_order is on meta"),
    "bh": (lambda: edited("tiles", (1, 0), 1), r"tiles\[1, 0\] is 1"),
    "bh negative": (lambda: edited("tiles", (0, 0), -1), r"tiles\[0, 0\] is -1"),
    "row": (lambda: edited("tiles", (0, 2), 9), r"tiles\[0\] covers rows"),
    "negative row": (lambda: edited("tiles", (0, 1), -1), r"tiles\[0\] covers rows"),
    "overlap": (lambda: replace(base(), tiles=int32([0, 0, 5], [0, 4, 4])), "query row 4; a row may be in one tile"),
    "ptr start": (lambda: edited("run_ptr", (0,), 1), r"run_ptr\[0\] is 1"),
    "ptr falls": (lambda: replace(base(), run_ptr=int32(0, 3, 2)), "run_ptr falls from 3 to 2"),
    "ptr end": (lambda: edited("run_ptr", (2,), 9), r"run_ptr\[-1\] is 9 but runs has"),
    "empty run": (lambda: edited("runs", (0, 1), 0), r"runs\[0\] covers keys"),
    "long run": (lambda: edited("runs", (0, 1), 14), r"runs\[0\] covers keys"),
    "negative run": (lambda: edited("runs", (0, 0), -1), r"runs\[0\] covers keys"),
    "runs overlap": (
        lambda: replace(base(), run_ptr=int32(0, 2, 2), runs=int32([0, 5, -1], [4, 5, -1])),
        "overlap or are not sorted",
    ),
    "runs unsorted": (
        lambda: replace(base(), run_ptr=int32(0, 2, 2), runs=int32([6, 5, -1], [0, 5, -1])),
        "overlap or are not sorted",
    ),
    "runs unmerged": (
        lambda: replace(base(), run_ptr=int32(0, 2, 2), runs=int32([0, 5, -1], [5, 5, -1])),
        "full neighbours; merge",
    ),
    "mask value": (lambda: edited("runs", (0, 2), -2), r"runs\[0, 2\] is -2"),
    "no bits": (lambda: edited("runs", (0, 2), 0), "mask_bits is None"),
    "few bits": (lambda: replace(bits(), mask_bits=bits().mask_bits[:-1]), "but mask_bits has 15"),
    "stray bits": (lambda: replace(bits(), mask_bits=bits().mask_bits | -(2**31)), "bits set past the 40 keys"),
    "order range": (lambda: edited("q_order", (0, 0, 0), 8), "q_order holds 8"),
    "order twice": (lambda: edited("kv_order", (0, 0, 0), int(base().kv_order[0, 0, 1])), "kv_order"),
}


@pytest.mark.parametrize("name", WRONG)
def test_broken_plans(name):
    torch.manual_seed(0)
    make, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        make().validate()


def test_unmerged_neighbours_of_two_tiles_are_fine():
    plan = from_block_mask(torch.tensor([[0, 1], [1, 0]]).bool(), 4, 5)
    assert plan.validate().runs.tolist() == [[5, 5, -1], [0, 5, -1]]


def test_capacity_is_fine():
    plan = base()
    runs = torch.cat((plan.runs, torch.zeros(3, 3, dtype=torch.int32)))
    tiles = torch.cat((plan.tiles, torch.zeros(2, 3, dtype=torch.int32)))
    run_ptr = torch.cat((plan.run_ptr, plan.run_ptr[-1:].expand(2)))
    roomy = replace(plan, runs=runs, tiles=tiles, run_ptr=run_ptr).validate()
    assert torch.equal(roomy.to_mask(), plan.to_mask()) and roomy.density == plan.density
    assert torch.equal((roomy | plan).to_mask(), plan.to_mask())
    assert roomy.draw() == plan.draw()
