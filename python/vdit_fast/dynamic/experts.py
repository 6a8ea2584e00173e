"""Mixtures of experts: tokens grouped by expert, one matrix product per group, every token gathers its results back.

DiT-MoE (arXiv 2407.11633): softmax over all experts, the two best, their weights not renormalised, SwiGLU experts, and
a shared SwiGLU that every token takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..ops import combine_rows, counting_sort, permute_tokens
from ..reference.combine_rows import combine_rows as plain_combine_rows
from .grouped import group_by_group, grouped_linear, has_grouped_gemm

__all__ = ["ExpertGroups", "GroupedExperts", "SwiGLU", "group_by_expert", "grouped_experts", "route"]

MAX_EXPERTS_PER_TOKEN = 8


@dataclass(frozen=True)
class ExpertGroups:
    """N tokens with K experts each, as T = N * K rows sorted by expert; within an expert by token."""

    tokens: Tensor
    """int32 ``[T]``: the token of every row."""
    slots: Tensor
    """int32 ``[N, K]``: the row of every token's j-th expert."""
    counts: Tensor
    """int32 ``[E]``: rows of every expert."""


def route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Every token's experts and their weights: softmax over all experts in fp32, the ``top_k`` largest, as they are.

    The weights of a token are not renormalised: they sum to less than 1.

    Args:
        logits: ``[N, E]``.
        top_k: experts per token, 1 to 8 and at most E.

    Returns:
        experts int32 ``[N, K]`` and weights float32 ``[N, K]`` (fp64 for fp64 logits), largest first.

    Raises:
        ValueError: there are not so many experts.
    """
    if logits.dim() != 2 or not 1 <= top_k <= min(logits.shape[1], MAX_EXPERTS_PER_TOKEN):
        raise ValueError(
            f"route: top_k is {top_k} for logits {list(logits.shape)}; expected [tokens, experts] and top_k from 1 to "
            f"{MAX_EXPERTS_PER_TOKEN} and at most the number of experts"
        )
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    weights, experts = logits.softmax(-1, dtype=wide).topk(top_k, dim=-1)
    return experts.to(torch.int32), weights


def group_by_expert(experts: Tensor, num_experts: int) -> ExpertGroups:
    """Sort (token, expert) pairs by expert. No host synchronisation.

    Args:
        experts: int32 ``[N, K]`` in [0, num_experts).
        num_experts: E, at least 1.
    """
    if experts.dim() != 2 or experts.dtype != torch.int32:
        raise ValueError(
            f"group_by_expert: experts is {experts.dtype} {list(experts.shape)}; expected torch.int32 [N, K]"
        )
    order, counts = counting_sort(experts.reshape(1, 1, -1), num_experts)
    rows = torch.arange(order.shape[-1], dtype=torch.int32, device=experts.device)
    slots = permute_tokens(rows.view(1, -1, 1, 1), order, inverse=True)
    return ExpertGroups(order.view(-1) // experts.shape[1], slots.view(experts.shape), counts.view(-1))


class _Dispatch(torch.autograd.Function):
    """Rows of tokens, sorted by expert. Backward every token gathers its rows: no atomics, one order of sums."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        return x.index_select(0, tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slots,) = ctx.saved_tensors
        combine = plain_combine_rows if grads[0].dtype == torch.float64 else combine_rows
        return combine(grads[0].contiguous(), slots), None, None


def grouped_experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    experts: Tensor,
    weights: Tensor,
    *,
    base: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """``residual + gate * (base + sum_j weights[:, j] * E_{experts[:, j]}(x))``, E the SwiGLU of an expert.

    Tokens are grouped by expert on the device, each group takes one product per projection, and every token gathers
    its rows back in one pass with weights, base, gate and residual. Deterministic: no atomics, and the sum has one
    order. Differentiable in everything but the choice of experts.

    Args:
        x: ``[N, C]``.
        gate_up: ``[E, 2 H, C]``: the gates' rows, then the others: silu of the first times the second.
        down: ``[E, C, H]``.
        experts: int32 ``[N, K]`` in [0, E), K from 1 to 8.
        weights: ``[N, K]`` float32.
        base, residual, gate: as in ``combine_rows``.

    Returns:
        ``[N, C]`` in x's dtype.

    Raises:
        ValueError, RuntimeError: shapes, dtypes or devices do not fit.
    """
    if gate_up.dim() != 3 or down.dim() != 3 or gate_up.shape[1] != 2 * down.shape[2] or len(gate_up) != len(down):
        raise ValueError(
            f"grouped_experts: gate_up has shape {list(gate_up.shape)} and down {list(down.shape)}; expected "
            "[E, 2 H, C] and [E, C, H]"
        )
    groups = group_by_expert(experts, len(gate_up))
    rows = _Dispatch.apply(x, groups.tokens, groups.slots)
    if has_grouped_gemm(rows, gate_up) and has_grouped_gemm(rows, down):
        rows = grouped_linear(_halves(grouped_linear(rows, gate_up, groups.counts)), down, groups.counts)
    else:  # an expert's hidden values stay in a CPU's caches, and a GPU waits once

        def expert(e: int, own: Tensor) -> Tensor:
            return _halves(own @ gate_up[e].T) @ down[e].T

        rows = group_by_group(rows, groups.counts, x.shape[1], expert)
    return combine_rows(rows, groups.slots, weights, base=base, residual=residual, gate=gate)


def _halves(hidden: Tensor) -> Tensor:
    gates, others = hidden.chunk(2, dim=-1)
    return functional.silu(gates) * others


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``, without biases; parameters named as in DiT-MoE."""

    def __init__(self, dim: int, hidden: int, *, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False, device=device, dtype=dtype)
        self.up_proj = nn.Linear(dim, hidden, bias=False, device=device, dtype=dtype)
        self.down_proj = nn.Linear(hidden, dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class GroupedExperts(nn.Module):
    """DiT-MoE's layer in place of an MLP: routed SwiGLU experts by ``grouped_experts``, plus a shared one.

    Loads and saves the published layer's state: ``gate.weight`` [E, C], ``experts.<e>.{gate_proj,up_proj}.weight``
    [H, C], ``experts.<e>.down_proj.weight`` [C, H] and ``shared_experts.*`` of a SwiGLU. In memory the experts' weights
    are stacked, ``gate_up`` [E, 2 H, C] and ``down`` [E, C, H], so that one grouped product reads them.

    Scores are fp32 (the published layer's are in the model's dtype, so in 16 bits a near tie may choose differently).
    Differentiable; the balance loss of DiT-MoE's training is not added.

    Args:
        dim: C.
        hidden: H, of every routed expert.
        num_experts: E.
        top_k: experts per token, 1 to 8.
        shared_hidden: hidden width of the shared expert, None for none.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        top_k: int = 2,
        shared_hidden: int | None = None,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(dim, hidden, num_experts) < 1 or not 1 <= top_k <= min(num_experts, MAX_EXPERTS_PER_TOKEN):
            raise ValueError(
                f"GroupedExperts: dim {dim}, hidden {hidden}, num_experts {num_experts}, top_k {top_k}; expected "
                f"positive sizes and top_k from 1 to {MAX_EXPERTS_PER_TOKEN} and at most num_experts"
            )
        self.top_k = top_k
        self.gate = nn.Linear(dim, num_experts, bias=False, device=device, dtype=dtype)
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * hidden, dim, device=device, dtype=dtype))
        self.down = nn.Parameter(torch.empty(num_experts, dim, hidden, device=device, dtype=dtype))
        self.shared_experts = None if shared_hidden is None else SwiGLU(dim, shared_hidden, device=device, dtype=dtype)
        for weight in (self.gate_up, self.down):
            bound = weight.shape[-1] ** -0.5  # as nn.Linear
            nn.init.uniform_(weight, -bound, bound)
        self.register_load_state_dict_pre_hook(_stack)
        self.register_state_dict_post_hook(_unstack)

    @classmethod
    def from_layer(cls, layer: nn.Module) -> GroupedExperts:
        """The same function as a published ``SparseMoeBlock``, with copies of its weights.

        Raises:
            ValueError: the layer has no such weights, or renormalises the weights of a token's experts.
        """
        state = layer.state_dict()
        try:
            first = state["experts.0.gate_proj.weight"]
            experts = len(state["gate.weight"])
        except KeyError as missing:
            raise ValueError(
                f"from_layer: {type(layer).__name__} has no weight {missing}; expected DiT-MoE's SparseMoeBlock"
            ) from None
        router: Any = layer.get_submodule("gate")
        top_k = getattr(layer, "num_experts_per_tok", getattr(router, "top_k", 2))
        if getattr(router, "norm_topk_prob", False) and top_k > 1:
            raise ValueError("from_layer: the layer renormalises its weights (norm_topk_prob); DiT-MoE does not")
        shared = state.get("shared_experts.gate_proj.weight")
        new = cls(
            first.shape[1], first.shape[0], experts, top_k, None if shared is None else len(shared),
            device=first.device, dtype=first.dtype,
        )  # fmt: skip
        new.load_state_dict(state)
        return new.train(layer.training)

    def extra_repr(self) -> str:
        experts, width, dim = self.gate_up.shape
        return f"dim={dim}, hidden={width // 2}, num_experts={experts}, top_k={self.top_k}"

    def forward(self, x: Tensor, residual: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
        """The layer's output, or with ``residual`` the whole end of a block: ``residual + gate * output``, in one pass.

        Args:
            x: ``[..., C]``.
            residual: like x, or None.
            gate: ``[B, C]`` for x ``[B, N, C]``, or None for 1.
        """
        flat = x.reshape(-1, x.shape[-1])
        experts, weights = route(self.gate(flat), self.top_k)
        base = None if self.shared_experts is None else self.shared_experts(flat)
        if residual is not None:
            residual = residual.reshape(flat.shape)
        out = grouped_experts(flat, self.gate_up, self.down, experts, weights, base=base, residual=residual, gate=gate)
        return out.view(x.shape)


_NAMES = ("gate_proj", "up_proj", "down_proj")


def _stack(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before loading: the published names become the stacked ones, where all of them are there."""
    count = len(module.gate_up)
    keys = {name: [f"{prefix}experts.{e}.{name}.weight" for e in range(count)] for name in _NAMES}
    if not all(key in state for names in keys.values() for key in names):
        return  # torch names what is missing
    gate, up, down = (torch.stack([state.pop(key) for key in keys[name]]) for name in _NAMES)
    state[f"{prefix}gate_up"] = torch.cat([gate, up], dim=1)
    state[f"{prefix}down"] = down


def _unstack(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """After saving: the stacked weights under the published names, as views."""
    gate_up, down = state.pop(f"{prefix}gate_up"), state.pop(f"{prefix}down")
    for e in range(len(down)):
        parts = (*gate_up[e].chunk(2), down[e])
        for name, part in zip(_NAMES, parts, strict=True):
            state[f"{prefix}experts.{e}.{name}.weight"] = part
