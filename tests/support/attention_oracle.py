"""Attention by plain torch operators: in fp64 the oracle, in the tested dtype the error that tolerances derive from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Problem:
    """One attention call: tensors, the boolean mask ``[B, H, Lq, Lk + segments]`` it means, and its options."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor
    segments: list[tuple[Tensor, Tensor]]
    row_scale: Tensor | None
    scale: float

    def leaves(self) -> list[Tensor]:
        return [self.q, self.k, self.v, *(t for s in self.segments for t in s)]

    def joined(self, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """Fresh leaves in ``dtype`` and q, k, v ``[B, H, L, D]`` with segments appended and kv heads repeated."""
        leaves = [t.detach().to(dtype).requires_grad_() for t in self.leaves()]
        q, k, v, *rest = leaves
        batch, groups = q.shape[0], q.shape[2] // k.shape[2]
        k = torch.cat([k, *(s.expand(batch, -1, -1, -1) for s in rest[0::2])], 1)
        v = torch.cat([v, *(s.expand(batch, -1, -1, -1) for s in rest[1::2])], 1)
        k, v = (t.transpose(1, 2).repeat_interleave(groups, 1) for t in (k, v))
        return leaves, q.transpose(1, 2), k, v


def plain(problem: Problem, dtype: torch.dtype, dout: Tensor, dlse: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """out, lse and the gradients by plain torch operators in ``dtype``; empty rows are 0 and -inf."""
    leaves, q, k, v = problem.joined(dtype)
    scores = (q @ k.mT * problem.scale).masked_fill(~problem.mask, -torch.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.where(problem.mask, torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]), 0.0)
    out = (weights @ v).transpose(1, 2)
    if problem.row_scale is not None:
        out = out * problem.row_scale.to(dtype).transpose(1, 2)[..., None]
    total = (out * dout.to(dtype)).sum() + torch.where(lse == -torch.inf, 0.0, lse * dlse.to(dtype)).sum()
    return out.detach(), lse.detach(), list(torch.autograd.grad(total, leaves))


def worst(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want.detach().double()).abs().max()) if got.numel() else 0.0


def magnitudes(problem: Problem, dout: Tensor, dlse: Tensor) -> tuple[float, float]:
    """What rounding errors of the output and of the gradients are relative to.

    The output is a mean of values, so its error is relative to the largest value even where the mean is small. A
    gradient of a score is a difference of products dout . v, so its error is relative to the largest such product.
    """
    leaves = [t.detach().double().abs() for t in problem.leaves()]
    value = max(float(t.max()) for t in leaves[2::2])
    point = max(float(t.max()) for t in (leaves[0], *leaves[1::2]))
    product = float(dout.double().abs().sum(-1).max()) * value + float(dlse.abs().max())
    return value, max(product * point * problem.scale, float(dout.abs().max()))


def allowance(torch_path: float, want: Tensor, magnitude: float, dtype: torch.dtype) -> float:
    """Twice the error of torch's own path, and at least two fp32 roundings of the magnitude and two of the result."""
    top = float(want.abs().max()) if want.numel() else 0.0
    return 2 * max(torch_path, torch.finfo(torch.float32).eps * magnitude + torch.finfo(dtype).eps * top)
