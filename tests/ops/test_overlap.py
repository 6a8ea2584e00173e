"""Operators that write where they are told refuse memory that is also read, and take views that only interleave."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from vdit_fast import ops

B, N, D = 2, 6, 8
WEIGHTS = [1.0, 0.5]


def places(x: Tensor) -> set[int]:
    """Addresses of a view's bytes."""
    at, size = torch.zeros((), dtype=torch.int64), x.element_size()
    for count, stride in zip(x.shape, x.stride(), strict=True):
        at = at.unsqueeze(-1) + torch.arange(count) * (stride * size)
    first = (x.data_ptr() + at).unsqueeze(-1) + torch.arange(size)
    return set(first.flatten().tolist())


def accepted(call: Callable[[], object]) -> bool:
    try:
        call()
    except RuntimeError as error:
        assert "overlaps" in str(error), error
        return False
    return True


BUFFER = (2, 4, 12, 40)
"""[batch, heads, tokens, channels] of which the views below are made."""
VIEWS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], bool]] = {
    # (out, x, whether they share memory); none of them is the other
    "columns beside columns": (lambda t: t[:, 0, :N, :D], lambda t: t[:, 0, :N, D : 2 * D], False),
    "columns over columns": (lambda t: t[:, 0, :N, :D], lambda t: t[:, 0, :N, D - 1 : 2 * D - 1], True),
    "columns just wrapped": (lambda t: t[:, 0, :N, -D:], lambda t: t[:, 0, 1 : N + 1, :D], False),
    "every second token": (lambda t: t[:, 0, ::2, :D], lambda t: t[:, 0, 1::2, :D], False),
    "every second token, the same": (lambda t: t[:, 0, ::2, :D], lambda t: t[:, 0, : 2 * N : 2, 1 : D + 1], True),
    "every second and every third": (lambda t: t[:, 0, :12:2, :D], lambda t: t[0, :, 1:12:4, :D][:2, :3], False),
    "heads beside heads": (lambda t: t[:, 1, :N, :D], lambda t: t[:, 3, :N, :D], False),
    "tokens of two heads": (lambda t: t[:, 1, :N, :D], lambda t: t[:, 1, N:, :D], False),
    "tokens that run into others": (lambda t: t[:, 1, :N, :D], lambda t: t[:, 1, N - 1 : 2 * N - 1, :D], True),
    "another batch stride": (lambda t: t[:, 0, :N, :D], lambda t: t[0, 1:3, :N, :D], False),
    "another batch stride, the same": (lambda t: t[:, 0, :N, :D], lambda t: t[0, :2, :N, :D], True),
    "expanded and apart": (lambda t: t[:, 0, 1 : N + 1, :D], lambda t: t[0, 0, 0, :D].expand(B, N, D), False),
    "expanded and inside": (lambda t: t[:, 0, 1 : N + 1, :D], lambda t: t[1, 0, 3, :D].expand(B, N, D), True),
    "behind each other": (lambda t: t[0, :2, :N, :D], lambda t: t[1, :2, :N, :D], False),
}


@pytest.mark.parametrize("name", VIEWS)
def test_result_and_input_of_a_forecast(name: str) -> None:
    make_out, make_x, shared = VIEWS[name]
    buffer = torch.randn(BUFFER)
    out, x = make_out(buffer), make_x(buffer)
    shape = tuple(min(pair) for pair in zip(out.shape, x.shape, strict=True))
    out, x = (t[tuple(slice(size) for size in shape)] for t in (out, x))
    assert bool(places(out) & places(x)) == shared
    factors = torch.randn(2, *shape)
    want = ops.forecast_gate_add(x.clone(), factors, weights=WEIGHTS)
    if shared:
        with pytest.raises(RuntimeError, match="out overlaps x without being it"):
            ops.forecast_gate_add(x, factors, weights=WEIGHTS, out=out)
        return
    beside = buffer.clone()
    assert torch.equal(ops.forecast_gate_add(x, factors, weights=WEIGHTS, out=out), want)
    make_out(beside)[tuple(slice(size) for size in shape)] = want
    assert torch.equal(buffer, beside), "something beside the result was written"


def test_the_same_view_is_in_place_and_another_order_of_it_is_not() -> None:
    x = torch.randn(8, 8, 8)
    factors = torch.randn(2, 8, 8, 8)
    want = ops.forecast_gate_add(x.clone(), factors, weights=WEIGHTS)
    turned = x.transpose(0, 1)
    with pytest.raises(RuntimeError, match="out overlaps x without being it"):
        ops.forecast_gate_add(turned, factors, weights=WEIGHTS, out=x)
    with pytest.raises(RuntimeError, match="out overlaps x without being it"):
        ops.forecast_gate_add(x[:4], factors[:, :4], weights=WEIGHTS, out=x[2:6])
    again = x.view(64, 8).view(8, 8, 8)
    assert torch.equal(ops.forecast_gate_add(x, factors, weights=WEIGHTS, out=again), want)
    assert torch.equal(x, want)


def test_factors_with_something_between_them() -> None:
    buffer = torch.randn(3, 2, B, N, D)
    factors, between, gate = buffer[:, 0], buffer[1, 1], buffer[2, 1, :, :1]
    x = torch.randn(B, N, D)
    want = ops.forecast_gate_add(x, factors.clone(), gate.clone(), weights=WEIGHTS)
    assert torch.equal(ops.forecast_gate_add(x, factors, gate, weights=WEIGHTS, out=between), want)
    with pytest.raises(RuntimeError, match="out overlaps factors"):
        ops.forecast_gate_add(x, factors, weights=WEIGHTS, out=buffer[1, 0])
    with pytest.raises(RuntimeError, match="out overlaps factors"):
        ops.forecast_gate_add(
            x, factors, weights=WEIGHTS, out=buffer.flatten()[B * N * D - 1 :][: B * N * D].view(x.shape)
        )
    with pytest.raises(RuntimeError, match="out overlaps a gate"):
        ops.forecast_gate_add(x, factors, gate, weights=WEIGHTS, out=buffer[2, 1])

    copied = factors.clone()
    ops.factor_update(copied, between.clone(), 2, known=1, minus=gate.expand(B, N, D).clone())
    ops.factor_update(factors, between, 2, known=1, minus=gate.expand(B, N, D))
    assert torch.equal(factors, copied)
    for output in (buffer.flatten()[1:][: B * N * D].view(x.shape), buffer[:2, 1, 0], buffer[:2, 0, 0]):
        shares = bool(places(output) & places(factors))
        assert accepted(partial(ops.factor_update, factors, output, 2, known=1)) != shares
    assert accepted(partial(ops.factor_update, factors, factors[2], 2, known=1)), "a factor itself is no overlap"


def test_columns_of_one_wide_row() -> None:
    """What lies in a row beside another, read as another dtype."""
    wide = torch.randn(B, N, 4 * D)
    x, factors = wide[..., :D], torch.randn(1, B, N, D)
    half = wide[..., D:].view(torch.bfloat16)
    for first, shared in ((0, False), (2, False), (3, False)):
        out = half[..., first : first + D]
        assert bool(places(out) & places(x)) == shared
        same = ops.forecast(factors, weights=[1.0], dtype=torch.bfloat16)
        assert torch.equal(ops.forecast(factors, weights=[1.0], out=out), same)
    index = wide.view(torch.int32)[0, :, 0]
    index.zero_()
    gate = torch.randn(B, 2, D)
    assert accepted(
        lambda: ops.forecast_gate_add(x + 1, factors, gate, weights=[1.0], index=index, out=wide[..., D : 2 * D])
    )
    with pytest.raises(RuntimeError, match="out overlaps index"):
        ops.forecast_gate_add(torch.zeros(B, N, D), factors, gate, weights=[1.0], index=index, out=x)


def nested(rng: random.Random, shape: tuple[int, int, int], room: int) -> tuple[tuple[int, ...], int]:
    """Strides of a view whose elements are its own, and an offset, inside ``room`` elements."""
    batch, tokens, dim = shape
    if rng.random() < 0.5:
        token = dim + rng.randrange(12)
        item = (tokens - 1) * token + dim + rng.randrange(30)
    else:  # batches inside of tokens
        item = dim + rng.randrange(6)
        token = (batch - 1) * item + dim + rng.randrange(20)
    extent = (batch - 1) * item + (tokens - 1) * token + dim
    return (item, token, 1), rng.randrange(room - extent)


@pytest.mark.parametrize("seed", range(6))
def test_random_views_are_refused_exactly_where_they_share_memory(seed: int) -> None:
    rng, seen = random.Random(seed), {True: 0, False: 0}
    for _ in range(120):
        shape = (rng.choice((1, 2, 3)), rng.choice((1, 2, 5)), rng.choice((2, 3, 8)))
        room = 420
        buffer = torch.randn(room)
        out, x = (buffer.as_strided(shape, *nested(rng, shape, room)) for _ in range(2))
        if out.data_ptr() == x.data_ptr():
            continue
        shared = bool(places(out) & places(x))
        seen[shared] += 1
        factors = torch.randn(1, *shape)
        want = ops.forecast_gate_add(x.clone(), factors, weights=[0.5])
        taken = accepted(partial(ops.forecast_gate_add, x, factors, weights=[0.5], out=out))
        assert taken != shared, (shape, out.stride(), out.storage_offset(), x.stride(), x.storage_offset())
        assert not taken or torch.equal(out, want)
    assert min(seen.values()) > 20, seen


@pytest.mark.parametrize("seed", range(3))
def test_random_rows_are_scattered_exactly_where_they_lie_apart(seed: int) -> None:
    rng, seen = random.Random(seed), {True: 0, False: 0}
    rows = torch.tensor([[1, 0]], dtype=torch.int32)
    for _ in range(60):
        shape = (rng.choice((1, 2)), 2, rng.choice((1, 4, 8)))
        room = 300
        buffer = torch.randn(room)
        full, part = (buffer.as_strided(shape, *nested(rng, shape, room)) for _ in range(2))
        shared = bool(places(full) & places(part))
        seen[shared] += 1
        want = part.clone().flip(1)
        taken = accepted(partial(ops.scatter_rows, [full], [part], rows))
        assert taken != shared, (shape, full.stride(), part.stride())
        assert not taken or torch.equal(full, want)
    assert min(seen.values()) > 5, seen
