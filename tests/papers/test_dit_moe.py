"""DiT-MoE: Scaling Diffusion Transformers to 16 Billion Parameters (arXiv 2407.11633).

Every MLP is a mixture: softmax over 8 or 16 SwiGLU experts, the best two by their own weights, and a shared SwiGLU that
every token takes.
"""

from __future__ import annotations

import pytest
import torch
from paper_checks import Operators, distance
from torch import nn
from torch.nn.functional import layer_norm, silu

from vdit_fast.dynamic import GroupedExperts
from vdit_fast.ops import adaln_modulate

B, N, C = 2, 30, 48


@pytest.fixture(autouse=True)
def _no_gradients():
    torch.manual_seed(35)
    with torch.no_grad():
        yield


class Mlp(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(C, hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(hidden, C, bias=False)


class Layer(nn.Module):
    """The paper's layer, parameters by their released names: experts of 4 C, two shared ones as one of 2 C."""

    def __init__(self, experts):
        super().__init__()
        self.experts = nn.ModuleList(Mlp(4 * C) for _ in range(experts))
        self.gate = nn.Linear(C, experts, bias=False)
        self.shared_experts = Mlp(2 * C)
        self.num_experts_per_tok = 2
        nn.init.normal_(self.gate.weight, std=0.3)

    def forward(self, x, renormalised=False):
        """One token and one expert after another, in fp64."""
        state = {name: weight.double() for name, weight in self.state_dict().items()}

        def mlp(name, token):
            gate, up, down = (state[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
            return down @ (silu(gate @ token) * (up @ token))

        rows = []
        for token in x.double().reshape(-1, C):
            weights, chosen = (state["gate.weight"] @ token).softmax(0).topk(2)
            if renormalised:
                weights = weights / weights.sum()
            routed = sum(w * mlp(f"experts.{int(e)}", token) for w, e in zip(weights, chosen, strict=True))
            rows.append(routed + mlp("shared_experts", token))
        return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize("experts", [8, 16])
def test_grouped_is_a_loop_over_tokens(experts):
    """B3. Weights are those of the softmax over all experts: a layer that renormalises the two is another one."""
    layer, x = Layer(experts), torch.randn(B, N, C)
    grouped = GroupedExperts.from_layer(layer)
    with Operators() as seen:
        got = grouped(x)
    assert seen.ran["counting_sort"] == 1 and seen.ran["combine_rows"] == 1
    assert distance(got, layer(x)) < 1e-6
    assert distance(got, layer(x, renormalised=True)) > 0.05
    kept = layer.gate(x).softmax(-1).topk(2).values.sum(-1)
    assert (kept < 1).all() and kept.min() < 0.8


@pytest.mark.parametrize("experts", [8, 16])
def test_experts_that_nobody_chooses(experts):
    layer, x = Layer(experts), torch.randn(B, N, C)
    x[..., 0] = 3
    layer.gate.weight[:, 0] = torch.where(torch.arange(experts) % 4 == 1, 4.0, -4.0)  # 1, 5, ... take all
    chosen = layer.gate(x).topk(2).indices.flatten()
    assert chosen.unique().numel() <= experts // 4
    assert distance(GroupedExperts.from_layer(layer)(x), layer(x)) < 5e-6  # logits are large


def test_all_tokens_to_one_expert():
    layer, x = Layer(8), torch.randn(B, N, C)
    x[..., 0] = 3
    layer.gate.weight[5, 0] = 30
    layer.num_experts_per_tok = 1
    expert, shared = layer.experts[5], layer.shared_experts
    want = sum(m.down_proj(silu(m.gate_proj(x)) * m.up_proj(x)) for m in (expert, shared))
    assert distance(GroupedExperts.from_layer(layer)(x), want) < 1e-6  # its weight is 1 up to rounding


def test_all_experts_are_the_dense_mixture():
    layer, x = Layer(8), torch.randn(B, N, C)
    layer.num_experts_per_tok = 8
    got = GroupedExperts.from_layer(layer)(x)
    every = torch.stack([e.down_proj(silu(e.gate_proj(x)) * e.up_proj(x)) for e in layer.experts], -1)
    shared = layer.shared_experts
    want = (every * layer.gate(x).softmax(-1)[..., None, :]).sum(-1)
    want = want + shared.down_proj(silu(shared.gate_proj(x)) * shared.up_proj(x))
    assert distance(got, want) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_block_that_it_ends(dtype):
    """adaLN-Zero: ``x + gate * moe(modulated x)``, the experts' weights, the shared expert, gate and residual in one
    pass; twice the same bits."""
    layer, x = Layer(8).to(dtype), torch.randn(B, N, C).to(dtype)
    shift, scale, gate = torch.randn(3, B, C).to(dtype).unbind()
    grouped = GroupedExperts.from_layer(layer)
    h = adaln_modulate(x, scale, shift)
    got = grouped(h, residual=x, gate=gate)
    by_hand = layer_norm(x.double(), (C,), eps=1e-6) * (1 + scale.double()[:, None]) + shift.double()[:, None]
    assert distance(h, by_hand) < (1e-6 if dtype == torch.float32 else 5e-3)
    want = x.double() + gate.double()[:, None] * layer(h)
    assert distance(got, want) < (1e-6 if dtype == torch.float32 else 5e-3)
    assert torch.equal(got, grouped(h, residual=x, gate=gate))
