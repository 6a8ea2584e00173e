"""The adaptive norms (csrc/kernels/fused), emulated: against fp64, and rounded where the reference rounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adaln_cases import BF16, F16, F32, OPS, VARIANTS, arguments, double, draw, outputs, part, within
from emulator_adaln import run
from torch import Tensor

from emulator import RANDOMS, EmulatorError, Policy
from vdit_fast import reference


def check(kwargs: dict[str, Any], op: str, policy: Policy, processors: int = 1) -> None:
    chosen = part(kwargs, op)
    got = run(op, **chosen, policy=policy, processors=processors)
    want, exact = (outputs(getattr(reference, op)(**args)) for args in (chosen, double(chosen)))
    for a, b, c in zip(got, want, exact, strict=True):
        within(a, b, c)
        if chosen["rounding"] == "eager" and a.dtype != F32 and a.numel() > 4000:
            assert (a == b).double().mean() > 0.98


@pytest.mark.parametrize("rounding", ["fast", "eager"])
@pytest.mark.parametrize("dim", [8, 13, 264, 1152])
def test_mixtures(policy: Policy, dim: int, rounding: str) -> None:
    for variant in VARIANTS:
        dtype = (BF16, F16, F32)[variant % 3 if variant < 12 else 0]
        rows = F32 if variant % 6 == 5 else dtype
        kwargs = arguments(dim, dtype, rows, rounding, variant, tokens=2)
        check(kwargs, OPS[variant % 3] if dim == 1152 else "gate_residual_norm", policy)
        if dim == 264:
            check(kwargs, "adaln_modulate", policy)


@pytest.mark.parametrize("dim", [1, 256, 1024, 1032, 5120, 5121, 5128, 16384])
def test_widths_at_which_the_work_is_cut_differently(dim: int) -> None:
    for variant in (4, 7, 9) if dim > 1 else (4, 10):
        for op in ("adaln_modulate", "gate_residual_norm"):
            check(arguments(dim, BF16, BF16, "eager", variant, tokens=1), op, RANDOMS[variant % 3])


@pytest.mark.parametrize("op", OPS)
def test_neighbouring_rows_of_one_block(policy: Policy, op: str) -> None:
    # 40 rows on one multiprocessor: five rows per block, whose rows of the tables change inside and between blocks.
    kwargs = arguments(40, BF16, BF16, "eager", 7, tokens=20)
    runs = torch.tensor([0] * 3 + [1] * 6 + [2] * 2 + [0] * 9, dtype=torch.int32)
    for index in (runs, torch.stack([runs, runs.flip(0)]), kwargs["index"]):
        check(kwargs | {"index": index}, op, policy)
    single = {n: (kwargs[n][0], kwargs[n][1][:, :1]) for n in ("gate", "scale", "shift")}
    check(kwargs | single | {"index": None}, op, policy)
    each = {n: draw(9, 2, 20, 40, dtype=BF16) for n in ("gate", "scale", "shift")}
    check(kwargs | each | {"index": None}, op, policy)


@pytest.mark.parametrize("offset", [0, 1, 4, 8])
def test_misaligned_rows(offset: int) -> None:
    # Each tensor by itself begins or steps beside 16 bytes.
    vectors = draw(8, 4, 64, dtype=BF16)
    names = ("weight", "bias", "post_weight", "post_bias")
    kwargs = arguments(64, BF16, BF16, "fast", 6, tokens=2) | dict(zip(names, vectors, strict=True))

    def moved(t: Tensor) -> Tensor:
        wide = t.new_zeros(*t.shape[:-1], t.shape[-1] + offset)
        wide[..., offset:] = t
        return wide[..., offset:]

    base, rows = kwargs["gate"]
    changes = [{name: moved(kwargs[name])} for name in ("x", "y", *names)]
    for change in [*changes, {"gate": (moved(base), rows)}, {"gate": (base, moved(rows))}]:
        check(kwargs | change, "gate_residual_norm", RANDOMS[0])


def test_a_single_row_that_ends_inside_a_piece() -> None:
    # No stride tells that such rows are not made of whole pieces; NaN lies behind.
    row = torch.full((1, 1, 16), torch.nan)
    row[..., :13] = draw(1, 13)
    (h,) = run("adaln_modulate", row[..., :13])
    torch.testing.assert_close(h, reference.adaln_modulate(row[..., :13]))


@pytest.mark.parametrize("row", [-1, 3, 2**31 - 1, -(2**31)])
def test_an_index_outside_the_table_reads_its_last_row(row: int) -> None:
    kwargs = arguments(40, F32, F32, "fast", 7)
    index = torch.full((5,), row, dtype=torch.int32)
    got = run("gate_residual_norm", **kwargs | {"index": index})
    want = run("gate_residual_norm", **kwargs | {"index": torch.full_like(index, 2)})
    assert all(map(torch.equal, got, want))


def test_nan_stays_in_its_row() -> None:
    x, row = draw(0, 1, 9, 1100, dtype=BF16), draw(1, 1, 1, 1100, dtype=BF16)
    bad = x.clone()
    bad[0, 1, 3], bad[0, 2, 1099] = torch.nan, torch.inf
    (h,), (clean,) = (run("adaln_modulate", t, None, None, row, row) for t in (bad, x))
    assert h[0, 1:3].isnan().all() and torch.equal(h[0, 3:], clean[0, 3:]) and torch.equal(h[0, 0], clean[0, 0])


def test_nothing_to_do_and_too_much() -> None:
    empty = draw(0, 1, 0, 8)
    assert run("gate_residual_norm", empty, empty)[1].shape == (1, 0, 8)
    wide = torch.zeros(1, 1, 16385)
    with pytest.raises(EmulatorError, match="error code 1"):
        run("adaln_modulate", wide)
