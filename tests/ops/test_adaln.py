"""The adaptive norms against their torch twins, as operators, and with bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adaln_cases import BF16, F16, F32, OPS, VARIANTS, arguments, double, draw, outputs, part, within
from torch import Tensor

import vdit_fast
from vdit_fast import ops, reference

ROUNDINGS = ["fast", "eager"]
DIMS = [1, 7, 8, 13, 129, 264]  # tails of every vector length, multiples of 8


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("dim", DIMS)
def test_equals_the_reference(dim: int, dtype: torch.dtype, rounding: str) -> None:
    for variant in VARIANTS:
        rows = F32 if variant % 6 == 5 else dtype
        kwargs = arguments(dim, dtype, rows, rounding, variant)
        for op in OPS:
            chosen = part(kwargs, op)
            if dim == 1 and chosen.get("norm") == "layer":
                continue  # a variance of nothing: every difference is rounding
            got, want, exact = (
                outputs(getattr(module, op)(**args))
                for module, args in ((ops, chosen), (reference, chosen), (reference, double(chosen)))
            )
            for a, b, c in zip(got, want, exact, strict=True):
                within(a, b, c)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_eager_rounds_where_the_reference_does(dtype: torch.dtype) -> None:
    # One rounding that is missing or too many shows in a fifth of the results or more; sums differ in few.
    for variant in VARIANTS:
        kwargs = arguments(1152, dtype, dtype, "eager", variant)
        for op in OPS:
            chosen = part(kwargs, op)
            got, want = (outputs(getattr(module, op)(**chosen)) for module in (ops, reference))
            for a, b in zip(got, want, strict=True):
                assert (a == b).double().mean() > 0.98, (variant, op)


def test_parts_agree_with_the_whole() -> None:
    for variant in VARIANTS:
        kwargs = arguments(264, BF16, BF16, "eager", variant)
        x_new, h = ops.gate_residual_norm(**kwargs)
        assert torch.equal(x_new, ops.gate_residual(**part(kwargs, "gate_residual")))
        assert torch.equal(h, ops.adaln_modulate(**part(kwargs | {"x": x_new}, "adaln_modulate")))


def test_results_beyond_the_caches_agree_with_pieces() -> None:
    # Large fp32 results are written past the caches; pieces of the same rows are not.
    x, y, gate, scale = draw(0, 1, 4099, 2056), draw(1, 1, 4099, 2056), draw(2, 1, 2056), draw(3, 1, 2056)
    whole = ops.gate_residual_norm(x, y, gate, scale)
    pieces = [ops.gate_residual_norm(a, b, gate, scale) for a, b in zip(x.split(999, 1), y.split(999, 1), strict=True)]
    for result, parts in zip(whole, zip(*pieces, strict=True), strict=True):
        assert torch.equal(result, torch.cat(parts, 1))


def test_closed_forms() -> None:
    x, y = draw(0, 2, 3, 16), draw(1, 2, 3, 16)
    assert torch.equal(ops.gate_residual(x, y), x + y)
    assert torch.equal(ops.adaln_modulate(x, norm="none"), x)
    ones = torch.ones(16)
    torch.testing.assert_close(ops.adaln_modulate(x, ones, -3 * ones, norm="none"), 2 * x - 3)
    torch.testing.assert_close(ops.gate_residual(x, y, 0.5 * ones, gate_activation="tanh"), x + y * 0.46211716)
    h = ops.adaln_modulate(1000 * x + 5, eps=0.0)
    torch.testing.assert_close(h.mean(-1), torch.zeros(2, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(h.square().mean(-1), torch.ones(2, 3), atol=1e-5, rtol=0)
    constant = ops.adaln_modulate(torch.full((1, 2, 16), 7.0), ones, 3 * ones)
    assert torch.equal(constant, torch.full((1, 2, 16), 3.0))


def test_variance_is_exact_far_from_zero() -> None:
    x = draw(0, 1, 4, 1024) + 3000
    exact = reference.adaln_modulate(x.double(), eps=1e-6)
    assert (ops.adaln_modulate(x).double() - exact).abs().max() < 2e-3  # x itself is rounded to 2e-4
    assert torch.equal(ops.adaln_modulate(x, norm="rms").isfinite(), torch.ones(1, 4, 1024, dtype=torch.bool))


@pytest.mark.parametrize("op", ["adaln_modulate", "gate_residual_norm"])
def test_forms_of_a_table(op: str) -> None:
    x, y, rows = draw(0, 2, 6, 24), draw(1, 2, 6, 24), draw(2, 2, 6, 24)

    def run(scale: Any, index: Tensor | None = None) -> Tensor:
        if op == "adaln_modulate":
            return ops.adaln_modulate(x, scale, index=index)
        return ops.gate_residual_norm(x, y, scale, scale, index=index)[1]

    assert torch.equal(run(rows[0, 0]), run(rows[:1, :1].expand(2, 6, 24)))
    assert torch.equal(run(rows[:, 0]), run(rows[:, :1]))
    every = torch.arange(6, dtype=torch.int32)
    assert torch.equal(run(rows), run(rows, every))
    assert torch.equal(run(rows), run(rows.transpose(1, 2).contiguous().transpose(1, 2).contiguous(), every))
    assert torch.equal(run(rows[:, :1], every), run(rows[:, 0]))  # one row: the index does not matter
    frames = every // 2
    assert torch.equal(run(rows[:, :3], frames), run(rows[:, :3].repeat_interleave(2, 1)))
    base = draw(3, 24)
    torch.testing.assert_close(run((base, rows)), run(rows + base))
    torch.testing.assert_close(run((base[None, None], rows[:, 0])), run(rows[:, 0] + base))
    per_item = torch.stack([every // 2, 2 - every // 2])
    flipped = torch.stack([rows[0, :3].repeat_interleave(2, 0), rows[1, :3].flip(0).repeat_interleave(2, 0)])
    assert torch.equal(run(rows[:, :3], per_item), run(flipped))


def test_strides() -> None:
    wide = draw(0, 3, 10, 5, 80)
    x, y = wide[::2, 1::3, 2, 8:72], wide.transpose(1, 2)[::2, :3, 4, :64]
    rows = draw(1, 3, 3, 9, 70).transpose(0, 2)[:2, :, 1, 3:67]
    index = torch.tensor([[0, 9, 2, 9, 1, 9], [2, 9, 1, 9, 0, 9]], dtype=torch.int32)[:, ::2]
    copies = [t.contiguous() for t in (x, y, rows, index)]
    for a, b in zip(
        ops.gate_residual_norm(x, y, rows, rows, rows, index=index),
        ops.gate_residual_norm(copies[0], copies[1], *[copies[2]] * 3, index=copies[3]),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(1, 1, 8), (0, 4, 8), (2, 0, 8), (1, 1, 16384), (3, 1, 5)], ids=str)
def test_edges(shape: tuple[int, int, int]) -> None:
    x, row = draw(0, *shape, dtype=BF16), draw(1, shape[2], dtype=BF16)
    x_new, h = ops.gate_residual_norm(x, x, row, row, row)
    want = reference.gate_residual_norm(x, x, row, row, row)
    exact = reference.gate_residual_norm(*(t.double() for t in (x, x, row, row, row)))
    within(x_new, want[0], exact[0])
    within(h, want[1], exact[1])
    if shape[1]:
        index = torch.zeros(shape[1], dtype=torch.int32)
        assert torch.equal(ops.adaln_modulate(x, row.expand(1, 2, -1), index=index), ops.adaln_modulate(x, row))


def test_nan_stays_in_its_row() -> None:
    for dtype in (F32, BF16, F16):
        x, row = draw(0, 1, 4, 40, dtype=dtype), draw(1, 40, dtype=dtype)
        bad = x.clone()
        bad[0, 1, 3], bad[0, 2, 17] = torch.nan, torch.inf
        for rounding in ROUNDINGS:
            h, clean = (ops.adaln_modulate(t, row, row, rounding=rounding) for t in (bad, x))
            assert h[0, 1:3].isnan().all() and torch.equal(h[0, ::3], clean[0, ::3])
            x_new = ops.gate_residual(x, bad, row, rounding=rounding)
            assert torch.equal(x_new.isfinite(), bad.isfinite())


def test_threads_and_repeats_change_nothing() -> None:
    x, y = draw(0, 2, 700, 72, dtype=BF16), draw(1, 2, 700, 72, dtype=BF16)
    rows = draw(2, 2, 9, 72, dtype=BF16)
    index = torch.randint(0, 9, (2, 700), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(ops.gate_residual_norm(x, y, rows, rows, rows, index=index, rounding="eager"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for r in results for a, b in zip(r, results[0], strict=True))


def test_gradients_come_from_the_reference() -> None:
    kwargs = arguments(16, F32, F32, "fast", 7)
    leaves = [kwargs[n].requires_grad_() for n in ("x", "y")] + [t.requires_grad_() for t in kwargs["gate"]]
    loss = sum((t * t).sum() for t in ops.gate_residual_norm(**kwargs))
    assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in torch.autograd.grad(loss, leaves))
    x, scale = draw(0, 1, 3, 5).double().requires_grad_(), draw(1, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, s: ops.adaln_modulate(x, s, s), (x, scale))
    assert torch.autograd.gradcheck(lambda x, s: ops.gate_residual(x, x * x, s, gate_activation="tanh"), (x, scale))
    with torch.no_grad():
        assert not ops.adaln_modulate(kwargs["x"], kwargs["gate"][0]).requires_grad


def raw(name: str, device: str = "cpu") -> list[Any]:
    kwargs = arguments(40, BF16, BF16, "fast", 7)
    move = {k: tuple(t.to(device) for t in v) if isinstance(v, tuple) else v for k, v in kwargs.items()}
    x, y, index = (kwargs[n].to(device) for n in ("x", "y", "index"))
    (gb, g), (sb, s), (tb, t) = move["gate"], move["scale"], move["shift"]
    w = x.new_ones(40)
    return {
        "adaln_modulate": [x, s, t, sb, tb, index, 2, 1e-6, w, None, True],
        "gate_residual": [x, y, g, gb, index, True, 1, 1e-6, w, None, True],
        "gate_residual_norm": [x, y, g, s, t, gb, sb, tb, index, True, 1, 1e-6, w, None, 2, 1e-6, w, w, True],
    }[name]


@pytest.mark.parametrize("name", OPS)
def test_raw_operators(name: str) -> None:
    op = getattr(torch.ops.vdit_fast, name)
    torch.library.opcheck(op, tuple(raw(name)))
    args = raw(name)
    args[0] = args[0].requires_grad_()
    with pytest.raises(RuntimeError, match=f"{name}: the raw operator has no gradient"):
        outputs(op(*args))[-1].sum().backward()


def test_compiles_to_one_graph() -> None:
    kwargs = arguments(40, BF16, BF16, "eager", 7)

    def block(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x, h = vdit_fast.gate_residual_norm(**(kwargs | {"x": x, "y": y}))
        return vdit_fast.gate_residual(x, h), vdit_fast.adaln_modulate(h, kwargs["scale"], index=kwargs["index"])

    with torch.no_grad():
        got = torch.compile(block, fullgraph=True, backend="aot_eager")(kwargs["x"], kwargs["y"])
        assert all(map(torch.equal, got, block(kwargs["x"], kwargs["y"])))


X = torch.randn(2, 6, 24)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.adaln_modulate(X[0]), r"adaln_modulate: x has shape \[6, 24\]; expected \[batch, tokens, dim\]"),
        (lambda: ops.adaln_modulate(torch.randn(1, 1, 16385)), "dim from 1 to 16384"),
        (lambda: ops.adaln_modulate(X.double()), "x is float64"),
        (lambda: ops.adaln_modulate(X.transpose(1, 2)), "x has stride 24 in its last dimension"),
        (lambda: ops.adaln_modulate(X, X[..., :8]), r"scale has shape \[2, 6, 8\]; expected \[1 or 2, rows, 24\]"),
        (lambda: ops.adaln_modulate(X, torch.randn(3, 24)), r"scale has shape \[3, 1, 24\]"),
        (lambda: ops.adaln_modulate(X, X[:, :3]), "scale has 3 rows for 6 tokens; pass one row, one per token, or an"),
        (lambda: ops.adaln_modulate(X, X, X[:, :1].half()), "shift is float16 but another table is not"),
        (lambda: ops.adaln_modulate(X.bfloat16(), X.half()), "scale is float16 beside the other 16-bit dtype"),
        (lambda: ops.adaln_modulate(X, index=torch.zeros(6)), "index is float32; convert it to int32"),
        (lambda: ops.adaln_modulate(X, index=torch.zeros(5, dtype=torch.int32)), r"index has shape \[5\]; expected"),
        (lambda: ops.adaln_modulate(X, X, index=torch.full((6,), 6, dtype=torch.int32)), "index 6 of token 0 is"),
        (lambda: ops.adaln_modulate(X, X, index=torch.full((6,), -1, dtype=torch.int32)), "index -1 of token 0"),
        (lambda: ops.adaln_modulate(X, X[:, :0], index=torch.zeros(6, dtype=torch.int32)), "scale has no rows"),
        (lambda: ops.adaln_modulate(X, weight=X[0, 0, :5]), r"weight has shape \[5\]; expected \[24\]"),
        (lambda: ops.adaln_modulate(X, norm="none", weight=X[0, 0]), "weight needs a norm"),
        (lambda: ops.adaln_modulate(X, norm="rms", bias=X[0, 0]), "bias needs the layer norm"),
        (lambda: ops.adaln_modulate(X, weight=X[0, 0], bias=X[0, 0].half()), "bias is float16 but weight is float32"),
        (lambda: ops.adaln_modulate(X, eps=-1.0), "eps is -1; expected 0 or more"),
        (lambda: ops.adaln_modulate(X, (X[0, 0], X), (X[0, 0].half(), X)), "shift_base is float16 but another base"),
        (lambda: ops.gate_residual(X, X[:, :3]), r"gate_residual: y has shape \[2, 3, 24\] but x has \[2, 6, 24\]"),
        (lambda: ops.gate_residual(X, X, post_weight=X[0, 0]), "post_weight needs a norm"),
        (
            lambda: ops.gate_residual_norm(X, X, X, X[:, :3], index=torch.zeros(6, dtype=torch.int32)),
            "scale has 3 rows but another table 6",
        ),
    ],
)  # fmt: skip
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"norm": "group"}, "norm is 'group'; expected one of 'none', 'rms', 'layer'"),
        ({"rounding": "exact"}, "rounding is 'exact'"),
        ({"gate_activation": "silu"}, "gate_activation is 'silu'"),
        ({"scale": X[None]}, r"scale has shape \[1, 2, 6, 24\]"),
        ({"scale": (X[0, :2], X)}, r"base of scale has shape \[2, 24\]; expected one row"),
        ({"gate": (X[0, 0, 0], X)}, r"base of gate has shape \[\]; expected one row"),
        ({"shift": (X[0, 0], X, X)}, "shift is a tuple of 3; expected a tensor or a pair"),
    ],
)
def test_bad_choices(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.gate_residual_norm(X, X, **kwargs)
