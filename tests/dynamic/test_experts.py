"""Grouped experts: against a loop over tokens, the edges of grouping, gradients, and the published layer's weights."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from expert_cases import C, H, by_token, close, silu, weights_of
from torch import Tensor, nn

from vdit_fast.dynamic import GroupedExperts, group_by_expert, grouped_experts, route
from vdit_fast.dynamic.grouped import grouped_linear, has_grouped_gemm


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [8, 16])
def test_grouped_is_a_loop_over_tokens(count: int, top_k: int, dtype: torch.dtype) -> None:
    for n in (1, 37):
        x, (gate_up, down) = torch.randn(n, C).to(dtype), weights_of(count, dtype)
        experts, weights = route(torch.randn(n, count), top_k)
        got = grouped_experts(x, gate_up, down, experts, weights)
        close(got, by_token(x, gate_up, down, experts, weights), dtype)
        again = grouped_experts(x, gate_up, down, experts, weights)
        assert torch.equal(got, again)


def test_routing_is_softmax_over_all_and_keeps_its_weights() -> None:
    logits = torch.randn(50, 8).bfloat16()
    experts, weights = route(logits, 2)
    probabilities = logits.float().softmax(-1)
    assert weights.dtype == torch.float32 and experts.dtype == torch.int32
    assert torch.equal(weights, probabilities.gather(1, experts.long()))
    assert (weights[:, 0] >= weights[:, 1]).all() and (weights.sum(1) < 1).all()
    rest = probabilities.scatter(1, experts.long(), 0)
    assert (rest.amax(1) <= weights[:, 1]).all()


@pytest.mark.parametrize(
    "experts",
    [
        torch.full((40, 1), 3),
        torch.full((40, 2), 7),
        torch.arange(40)[:, None] % 2 * 7,
        torch.zeros(1, 4),
        torch.zeros(0, 2),
    ],
    ids=["all to one", "the last, twice", "all but two are empty", "one token", "no token"],
)
def test_empty_experts(experts: Tensor) -> None:
    experts = experts.int()
    x, (gate_up, down) = torch.randn(len(experts), C), weights_of(8)
    weights = torch.rand(experts.shape)
    want = by_token(x, gate_up, down, experts, weights)
    got = grouped_experts(x, gate_up, down, experts, weights)
    assert got.shape == want.shape
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


def test_groups() -> None:
    experts = torch.randint(0, 5, (30, 3)).int()
    groups = group_by_expert(experts, 6)
    assert groups.counts.tolist() == torch.bincount(experts.flatten().long(), minlength=6).tolist()
    expert_of_row = torch.arange(6).repeat_interleave(groups.counts.long())
    assert torch.equal(expert_of_row[groups.slots.long()], experts.long())
    assert torch.equal(groups.tokens[groups.slots.long()], torch.arange(30).int()[:, None].expand(-1, 3))
    for expert in range(6):  # stable: by token
        assert groups.tokens[expert_of_row == expert].diff().ge(0).all()


def test_the_end_of_a_block_in_one_pass() -> None:
    x, (gate_up, down) = torch.randn(2 * 9, C), weights_of(4)
    base, residual, gate = torch.randn(18, C), torch.randn(18, C), torch.randn(2, C)
    experts, weights = route(torch.randn(18, 4), 2)
    want = residual + gate.repeat_interleave(9, 0) * (base + by_token(x, gate_up, down, experts, weights))
    got = grouped_experts(x, gate_up, down, experts, weights, base=base, residual=residual, gate=gate)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


def test_gradients() -> None:
    x, (gate_up, down) = torch.randn(6, 5).double(), (torch.randn(3, 8, 5).double(), torch.randn(3, 5, 4).double())
    experts = torch.tensor([[0, 2], [2, 0], [0, 0], [2, 2], [0, 2], [2, 0]]).int()  # nobody takes expert 1
    weights = torch.rand(6, 2).double()
    leaves = [t.requires_grad_() for t in (x, gate_up, down, weights)]

    def call(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor) -> Tensor:
        return grouped_experts(x, gate_up, down, experts, weights, base=x.sin(), residual=x.cos())

    assert torch.autograd.gradcheck(call, leaves)


def test_gradients_of_the_layer() -> None:
    layer, x = GroupedExperts(C, H, 8, 2, shared_hidden=2 * C), torch.randn(2, 11, C, requires_grad=True)
    layer(x, residual=x, gate=torch.randn(2, C)).square().sum().backward()
    assert x.grad is not None and all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer(x.detach()))


class Published(nn.Module):
    """The parameters of DiT-MoE's layer, and its result by a loop over tokens."""

    class Expert(nn.Module):
        def __init__(self, hidden: int) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = (nn.Linear(C, hidden, bias=False) for _ in range(2))
            self.down_proj = nn.Linear(hidden, C, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))

    class Gate(nn.Module):
        def __init__(self, experts: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(experts, C))
            self.norm_topk_prob = False

    def __init__(self, experts: int = 8, top_k: int = 2, shared: bool = True) -> None:
        super().__init__()
        self.num_experts_per_tok = top_k
        self.experts = nn.ModuleList(self.Expert(H) for _ in range(experts))
        self.gate = self.Gate(experts)
        if shared:
            self.shared_experts = self.Expert(2 * C)

    def forward(self, x: Tensor) -> Tensor:
        rows = []
        for token in x.reshape(-1, C):
            probabilities = (self.gate.weight @ token).softmax(0)
            weights, chosen = probabilities.topk(self.num_experts_per_tok)
            row = sum(w * self.experts[int(e)](token) for w, e in zip(weights, chosen, strict=True))
            rows.append(row + self.shared_experts(token) if hasattr(self, "shared_experts") else row)
        return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize("shared", [True, False])
@torch.no_grad()
def test_published_layers(shared: bool) -> None:
    published = Published(shared=shared)
    layer, x = GroupedExperts.from_layer(published), torch.randn(2, 9, C)
    torch.testing.assert_close(layer(x), published(x), atol=2e-5, rtol=1e-4)
    state = layer.state_dict()
    assert set(state) == set(published.state_dict())
    assert all(torch.equal(state[name], x) for name, x in published.state_dict().items())
    for strict in (True, False):
        fresh = GroupedExperts(C, H, 8, 2, shared_hidden=2 * C if shared else None)
        fresh.load_state_dict(copy.deepcopy(published.state_dict()), strict=strict)
        assert torch.equal(fresh(x), layer(x))
    twin = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    assert torch.equal(twin(x), layer(x)) and set(twin.state_dict()) == set(state)
    inside = nn.Sequential(nn.Identity(), copy.deepcopy(layer))  # as a part of a model, whose state is untouched
    whole = {f"1.{name}": x.clone() for name, x in published.state_dict().items()}
    names = set(whole)
    inside.load_state_dict(whole)
    assert set(whole) == names and torch.equal(inside(x), layer(x)) and set(inside.state_dict()) == names


def test_layers_that_do_not_fit() -> None:
    with pytest.raises(RuntimeError, match=r"Missing key.*gate_up"):
        GroupedExperts(C, H, 9, 2, shared_hidden=2 * C).load_state_dict(Published(8).state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*experts.8"):
        GroupedExperts(C, H, 8, 2, shared_hidden=2 * C).load_state_dict(Published(9).state_dict())
    with pytest.raises(ValueError, match=r"Linear has no weight 'experts.0"):
        GroupedExperts.from_layer(nn.Linear(2, 2))
    renormalised = Published()
    renormalised.gate.norm_topk_prob = True
    with pytest.raises(ValueError, match="norm_topk_prob"):
        GroupedExperts.from_layer(renormalised)
    with pytest.raises(ValueError, match="top_k 9"):
        GroupedExperts(C, H, 16, 9)
    with pytest.raises(ValueError, match=r"top_k is 3 for logits .4, 2."):
        route(torch.randn(4, 2), 3)


def test_bad_input_of_grouped_products() -> None:
    x, weight, counts = torch.randn(6, 4), torch.randn(2, 3, 4), torch.tensor([2, 4]).int()
    with pytest.raises(ValueError, match=r"x has shape .6, 4. and weight .2, 4, 3."):
        grouped_linear(x, weight.mT, counts)
    with pytest.raises(ValueError, match=r"counts is torch.int64 \[2\]"):
        grouped_linear(x, weight, counts.long())
    with pytest.raises(ValueError, match=r"weight torch.float16"):
        grouped_linear(x, weight.half(), counts)
    assert not has_grouped_gemm(x.bfloat16(), weight.bfloat16())  # not on a CPU
    with pytest.raises(ValueError, match=r"gate_up has shape .2, 3, 4."):
        grouped_experts(x, weight, weight, torch.zeros(6, 1).int(), torch.ones(6, 1))
    with pytest.raises(ValueError, match=r"experts is torch.int64"):
        group_by_expert(torch.zeros(6, 1).long(), 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_beyond_the_groups(dtype: torch.dtype) -> None:
    x, weight = torch.randn(9, 4).to(dtype), torch.randn(3, 8, 4).to(dtype)
    got = grouped_linear(x, weight, torch.tensor([2, 0, 5]).int())
    want = torch.cat([x[:2] @ weight[0].T, x[2:7] @ weight[2].T])
    assert got.shape == (9, 8) and torch.equal(got[:7], want)
