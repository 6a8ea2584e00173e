"""One branch of guidance per rank, and the pipeline none the wiser."""

from __future__ import annotations

from typing import Any

import guidance_cases
import pytest
import ranks
import torch
from ulysses_cases import Case, results

from vdit_fast.parallel.awaited import Awaited, Promise

CALLS: list[Case] = [
    ("svg2 wan", "calls", ("svg2", "wan")),
    ("adaspa hunyuan_video", "calls", ("adaspa", "hunyuan_video", True)),
    ("rettention cogvideox", "calls", ("rettention", "cogvideox", True)),
    ("cached", "calls", ("draft", "wan", False, True)),
]
TWO: list[Case] = [
    *CALLS,
    ("batch", "batch", (4,)),
    ("uneven batch", "batch", (3,)),
    ("misuse", "misuse", ()),
    ("demo", "demo", (2,)),
]


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return ranks.run(2, guidance_cases.run, TWO, seconds=300)


@pytest.fixture(scope="module")
def four() -> list[dict[str, Any]]:
    return ranks.run(4, guidance_cases.run, CALLS[:3], seconds=300)


def check(found: list[dict[str, Any]], name: str) -> None:
    for place, rank in enumerate(results(found, name)):
        assert rank["far"] <= 1e-6 and rank["ended"] <= 1e-6 and rank["plain"] and rank["report"], rank
        assert rank["bytes"], rank
        if name != "cached":
            second = place >= len(found) // 2  # has computed the first branch once, to learn its form
            assert rank["ran"] == (4 + second, 4), rank


@pytest.mark.parametrize("name", [name for name, _, _ in CALLS])
def test_two_ranks(two: list[dict[str, Any]], name: str) -> None:
    check(two, name)


@pytest.mark.parametrize("name", [name for name, _, _ in CALLS[:3]])
def test_two_by_two_ranks(four: list[dict[str, Any]], name: str) -> None:
    """Guidance times sequence."""
    check(four, name)


@pytest.mark.parametrize("name", ["batch", "uneven batch"])
def test_branches_in_one_batch(two: list[dict[str, Any]], name: str) -> None:
    for rank in results(two, name):
        assert rank["far"] <= 1e-6 and "a batch of 1 cannot be split over 2 ranks" in rank["message"], rank


def test_misuse(two: list[dict[str, Any]]) -> None:
    wanted = {
        "three": "branch 2 of step 0 follows branch 1",
        "gradients": "guidance_parallel is for sampling",
        "twice": "its branches are shared already; end that first: call what guidance_parallel returned",
        "subset": "subset chooses its tokens by all branches",
        "adaptive": "decides for all branches by what it sees of the first",
        "split": "split must be one of 'calls', 'batch', got 'halves'",
    }
    first, second = results(two, "misuse")
    for rank in (first, second):
        for name, message in wanted.items():
            assert message in rank[name], (name, rank[name])
    assert "ended after 1 of 2 branches" in first["unguided"]
    assert "is used before branch 1 was called" in second["unguided"]


def test_the_demo(two: list[dict[str, Any]]) -> None:
    assert all(rank["far"] <= 1e-6 for rank in results(two, "demo"))


# ---------------------------------------------------------------------------------------------- awaited tensors
def awaited(x: torch.Tensor) -> tuple[Awaited, Promise]:
    promise = Promise("not yet")
    return Awaited.of(promise, torch.empty_like(x, device="meta"), x.device), promise


def test_operators_wait_for_their_operands() -> None:
    x, y = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    late, promise = awaited(x)
    assert late.shape == x.shape and late.dtype == x.dtype and late.device == x.device
    parts = ((late * 2 + y).double().transpose(1, 2).chunk(2, dim=1), torch.cat([y, late], 1).to(torch.bfloat16))
    assert all(type(part) is Awaited for part in (*parts[0], parts[1]))
    promise.keep(x)
    assert torch.equal(parts[0][1] + 0, (x * 2 + y).double().transpose(1, 2).chunk(2, dim=1)[1])
    got = parts[1] - 1
    assert type(got) is torch.Tensor and torch.equal(got, torch.cat([y, x], 1).to(torch.bfloat16) - 1)
    assert torch.equal(late[0] + 0, x[0]), "views of what has arrived"


def test_what_needs_values_too_early_is_an_error() -> None:
    late, promise = awaited(torch.randn(3))
    for early in (lambda: late.sum().item(), lambda: late.add_(1), lambda: late.nonzero(), lambda: bool(late[0] > 0)):
        with pytest.raises(RuntimeError, match="not yet"):
            early()
    out = torch.zeros(3)
    with pytest.raises(RuntimeError, match="writes to a tensor"):
        out.copy_(late)
    promise.keep(torch.ones(3))
    assert out.copy_(late).sum() == 3


def test_operands_that_change_meanwhile_are_an_error() -> None:
    late, promise = awaited(torch.randn(3))
    other = torch.ones(3)
    noted = late + other
    other += 1
    promise.keep(torch.ones(3))
    with pytest.raises(RuntimeError, match="was written to before"):
        noted + 0
    with torch.inference_mode():  # whose tensors do not tell
        late, promise = awaited(torch.randn(3))
        other = torch.ones(3)
        noted = late + other
        other += 1
        promise.keep(torch.ones(3))
        assert torch.equal(noted + 0, torch.full((3,), 2.0))
