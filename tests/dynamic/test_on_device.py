"""What runs on a GPU, on a CPU: groups whose sizes the host never learns, through torch's grouped product."""

from __future__ import annotations

import dydit_models as dydit
import pytest
import tiny
import torch
from expert_cases import C, by_token, close, weights_of
from torch import Tensor

from vdit_fast.dynamic import TokenSubset, Units, apply_dydit, grouped, grouped_experts, route, standins, tokens
from vdit_fast.dynamic import experts as experts_module


@pytest.fixture
def grouped_gemm(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """torch's grouped product serves; the list grows with every call."""
    calls: list[int] = []
    for module in (experts_module, grouped, tokens):
        monkeypatch.setattr(module, "has_grouped_gemm", lambda x, weight: bool(calls.append(len(weight))) or True)
    return calls


@pytest.fixture
def unknown_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TokenSubset, "of", TokenSubset.on_device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts(grouped_gemm: list[int], dtype: torch.dtype) -> None:
    x, (gate_up, down) = torch.randn(40, C).to(dtype), weights_of(8, dtype)
    logits = torch.randn(40, 8)
    logits[:, 3] = -30  # nobody's
    experts, weights = route(logits, 2)
    got = grouped_experts(x, gate_up, down, experts, weights)
    close(got, by_token(x, gate_up, down, experts, weights), dtype)
    assert grouped_gemm == [8] * 4


def test_gradients_of_experts(grouped_gemm: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    x, (gate_up, down) = torch.randn(30, C), weights_of(4)
    experts, weights = route(torch.randn(30, 4), 2)
    leaves = [t.requires_grad_() for t in (x, gate_up, down, weights.detach())]
    grads = []
    for served in (True, False):
        for module in (experts_module, grouped):
            monkeypatch.setattr(module, "has_grouped_gemm", lambda *_, served=served: served)
        out = grouped_experts(*leaves[:3], experts, leaves[3])
        grads.append(torch.autograd.grad(out.square().sum(), leaves))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_subsets() -> None:
    selected = torch.rand(3, 17) < 0.4
    known, hidden = TokenSubset.of(selected), TokenSubset.on_device(selected)
    number = int(selected.sum())
    assert known is not None and known.count is None and known.rows.shape == (1, number)
    assert hidden.count is not None and hidden.count.tolist() == [number] and hidden.rows.shape == (1, 51)
    assert torch.equal(hidden.rows[:, :number], known.rows) and torch.equal(hidden.slots, known.slots)
    assert torch.equal(known.rows[0].long(), selected.flatten().nonzero()[:, 0])
    x, gate = torch.randn(3, 17, 5), torch.randn(3, 5)
    rows = hidden.gather(x)
    assert torch.equal(rows[:, :number], known.gather(x)) and not rows[:, number:].any()
    assert torch.equal(known.gather(x)[0], x[selected])
    poisoned = rows.clone()
    poisoned[:, number:] = torch.nan
    for subset, y in ((known, rows[:, :number]), (hidden, poisoned)):
        assert torch.equal(subset.scatter(y), torch.where(selected[..., None], x, 0))
        want = torch.where(selected[..., None], x + gate[:, None] * x, x)
        torch.testing.assert_close(subset.add(x, y, gate), want)
        assert torch.equal(subset.add(x, y, gate)[~selected], x[~selected])
    none = TokenSubset.of(torch.zeros(2, 4, dtype=torch.bool))
    assert none is not None and none.rows.shape == (1, 0) and (none.slots == -1).all()
    assert TokenSubset.of(torch.ones(2, 4, dtype=torch.bool)) is None


def test_units_of_the_items_that_rows_belong_to() -> None:
    # two timesteps, each for two sequences of a folded batch
    units = Units.of([(True, False, True), (True, True, False)], torch.device("cpu"))
    selected = torch.rand(4, 6) < 0.6
    subset = TokenSubset.of(selected)
    assert subset is not None
    hidden = torch.randn(4, 6, 6)
    want = hidden.unflatten(-1, (3, 2)) * torch.tensor([[1, 0, 1], [1, 1, 0]]).repeat_interleave(2, 0)[:, None, :, None]
    assert torch.equal(subset.zeroed(subset.gather(hidden), units), subset.gather(want.flatten(-2)))
    assert torch.equal(units.zeroed(hidden), want.flatten(-2))


@pytest.mark.parametrize("family", dydit.FAMILIES)
@torch.no_grad()
def test_models(family: str, grouped_gemm: list[int], unknown_counts: None) -> None:
    model, inputs = tiny.build({"wan": "wan_t2v"}.get(family, family))
    routers = dydit.draw(model, family)
    with dydit.masked(model, family, routers) as decided:
        want = tiny.run(model, inputs)
        done = sum(int(x.sum()) for name, x in decided.items() if name.endswith("token_selection"))
    with apply_dydit(model, routers) as handle:
        assert tiny.relative(tiny.run(model, inputs), want) < 2e-5
        assert grouped_gemm and set(grouped_gemm) == {1} and done > 0
        assert handle.report()["flop"] < handle.report()["dense_flop"]


@torch.no_grad()
def test_without_a_grouped_product_all_rows_are_computed(
    unknown_counts: None, caplog: pytest.LogCaptureFixture
) -> None:
    grouped._told.clear()
    model, inputs = tiny.build("wan_t2v")
    routers = dydit.draw(model, "wan")
    with dydit.masked(model, "wan", routers):
        want = tiny.run(model, inputs)
    with apply_dydit(model, routers):
        assert tiny.relative(tiny.run(model, inputs), want) < 2e-5
    assert [r.message for r in caplog.records if "not selected are computed too" in r.message] == [
        "vdit_fast: rows of tokens that are not selected are computed too: torch.float32 on cpu (said once)"
    ]


def test_rows_on_the_device_are_counted() -> None:
    work = standins.Work()
    work.add(10, 4)
    count: Tensor = torch.tensor([3], dtype=torch.int32)
    work.add_rows(10, count, 2.0)
    assert work.dense == 20 and work.done == 10
