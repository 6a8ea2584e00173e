"""Gradients of the shared cases: the fp64 answer, torch's own error in the same dtype, and the comparison.

Shared by the emulated kernels (tests/emulator) and the tests on a CUDA device (tests/ops).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from cases import BF16, Problem, strided
from torch import Tensor

from vdit_fast import reference

KERNEL_DIM = 128  # gradients on CUDA exist up to this head dim


@dataclass
class Solution:
    """What the backward is given beside the problem, and what must come out (fp64), by name."""

    dout: Tensor
    dlse: Tensor | None
    out: Tensor
    lse: Tensor
    want: dict[str, Tensor]
    torch_error: dict[str, float]
    zero_queries: Tensor  # [B, H, Lq]: rows whose gradient is exactly 0
    zero_keys: Tensor  # [B, Lk, Hkv]


def solve(p: Problem, *, with_dlse: bool) -> Solution:
    """Random gradients of the outputs, and the gradients of the inputs."""
    case = p.case
    g = torch.Generator().manual_seed(len(case.name) + 31)
    dout = torch.randn(case.batch, case.lq, case.heads, case.dim, generator=g).to(case.dtype)
    dlse = torch.randn(case.batch, case.heads, case.lq, generator=g) if with_dlse else None

    inputs = _leaves(p, torch.float64)
    segments = list(zip(inputs[3::2], inputs[4::2], strict=True))
    options = dict(p.options, segments=segments)
    out, lse = reference.attention(*inputs[:3], p.plan, return_lse=True, **options)
    want = _gradients(inputs, out, lse, dout, dlse)
    names = ["dq", "dk", "dv", *(f"segment {i} d{n}" for i in range(len(segments)) for n in "kv")]

    leaves = _leaves(p, case.dtype)
    plain = _gradients(leaves, *_same_dtype(p, leaves), dout, dlse)
    errors = {name: relative(t, w) for name, t, w in zip(names, plain, want, strict=True)}
    read = p.mask.reshape(case.batch, p.k.shape[2], -1, case.lk).any(2).transpose(1, 2)
    return Solution(
        strided(dout, case.stride),
        dlse,
        out.detach().to(case.dtype),
        lse.detach().float(),
        dict(zip(names, want, strict=True)),
        errors,
        lse.detach() == -torch.inf,
        ~read,
    )


def _leaves(p: Problem, dtype: torch.dtype) -> list[Tensor]:
    tensors = [p.q, p.k, p.v, *(t for pair in p.options["segments"] for t in pair)]
    return [t.detach().to(dtype, copy=True).requires_grad_() for t in tensors]


def _gradients(inputs: list[Tensor], out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None) -> list[Tensor]:
    empty = (lse == -torch.inf).detach()
    loss = (out * dout.to(out.dtype).masked_fill(empty.transpose(1, 2)[..., None], 0)).sum()
    if dlse is not None:
        loss = loss + (lse.masked_fill(empty, 0) * dlse).sum()
    grads = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, grads, strict=True)]


def _same_dtype(p: Problem, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention as plain torch operations in the dtype of the inputs."""
    case = p.case
    q, (keys, values) = (
        inputs[0].transpose(1, 2),
        (
            torch.cat([t.expand(case.batch, -1, -1, -1) for t in inputs[first::2]], 1)
            .repeat_interleave(case.heads // p.k.shape[2], 2)
            .transpose(1, 2)
            for first in (1, 2)
        ),
    )
    mask = torch.cat([p.mask, p.mask.new_ones(*p.mask.shape[:3], keys.shape[2] - case.lk)], -1)
    empty = ~mask.any(-1)
    unread = ~mask.any(2)[..., None]
    keys, values = keys.masked_fill(unread, 0), values.masked_fill(unread, 0)
    scale = case.dim**-0.5 if case.scale is None else case.scale
    scores = (q @ keys.transpose(-1, -2) * scale).masked_fill(~(mask | empty[..., None]), -torch.inf)
    out = scores.softmax(-1) @ values
    if case.row_scale:
        out = out * p.options["row_scale"].to(out.dtype)[..., None]
    return out.transpose(1, 2), scores.float().logsumexp(-1).masked_fill(empty, -torch.inf)


def relative(got: Tensor, want: Tensor) -> float:
    """Relative L2 error; absolute where the answer is 0."""
    norm = float(want.norm())
    error = float((got.double() - want).norm())
    return error / norm if norm > 0 else error


def check_gradients(p: Problem, s: Solution, got: dict[str, Tensor]) -> None:
    """AssertionError with the numbers unless every gradient is right and exactly 0 where nothing is read."""
    assert got.keys() == s.want.keys()
    cap, ulp = (5e-3, 2.0**-9) if p.case.dtype == BF16 else (1e-3, 2.0**-12)
    for name, want in s.want.items():
        t = got[name].cpu()
        assert t.dtype == p.case.dtype and t.shape == want.shape
        assert t.isfinite().all(), f"{int((~t.isfinite()).sum())} elements of {name} are not finite"
        error = relative(t, want)
        limit = max(min(cap, 2 * s.torch_error[name]), 0.75 * ulp)
        if float(want.norm()) == 0:  # <dout, v> - <dout, out> of a single key: fp32 sums in different orders
            limit = 1e-6 * float(s.dout.norm())
        assert error <= limit, f"error of {name} {error:.2e}, limit {limit:.2e}, torch {s.torch_error[name]:.2e}"
    assert not got["dq"].cpu().transpose(1, 2)[s.zero_queries].any(), "dq of empty rows is not 0"
    for name in ("dk", "dv"):
        assert not got[name].cpu()[s.zero_keys].any(), f"{name} of keys that nobody reads is not 0"
