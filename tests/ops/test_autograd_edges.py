"""Where autograd cannot follow an operator it is told so, or the operator complains: nothing is dropped in silence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import vdit_fast
from vdit_fast import ops

X = torch.randn(2, 6, 2, 8, generator=torch.Generator().manual_seed(0))


def _rows(x: Tensor) -> Tensor:
    return x.flatten(2)


DIFFERENTIABLE: dict[str, Callable[[Tensor], Tensor]] = {
    "adaln_modulate": lambda x: ops.adaln_modulate(_rows(x), _rows(x)),
    "gate_residual": lambda x: ops.gate_residual(_rows(X), _rows(X), (x[0, 0].flatten(), _rows(X))),
    "gate_residual_norm": lambda x: ops.gate_residual_norm(_rows(X), _rows(x), _rows(x))[1],
    "qk_norm_rope": lambda x: ops.qk_norm_rope(x, x, norm="rms")[1],
}
REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "attention": lambda x: vdit_fast.attention(X, x, X),
    "merge": lambda x: ops.merge([X, x], [X[..., 0].transpose(1, 2)] * 2)[0],
    "permute_tokens": lambda x: ops.permute_tokens(x, torch.arange(6, dtype=torch.int32).expand(2, 2, 6).contiguous()),
    "short_attention": lambda x: ops.short_attention(X, X, x),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_forward_mode_runs_the_reference(name: str) -> None:
    call, tangent = DIFFERENTIABLE[name], torch.randn_like(X)
    want = (call(X + 1e-3 * tangent) - call(X - 1e-3 * tangent)) / 2e-3
    torch.testing.assert_close(torch.func.jvp(call, (X,), (tangent,))[1], want, rtol=1e-2, atol=2e-2)
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(call(forward_ad.make_dual(X, tangent))).tangent is not None
        assert forward_ad.unpack_dual(call(X)).tangent is None


@pytest.mark.parametrize("name", REFUSED)
def test_forward_mode_is_refused(name: str) -> None:
    call = REFUSED[name]
    with pytest.raises(RuntimeError, match=f"{name} has no forward-mode derivative"):
        torch.func.jvp(call, (X,), (torch.randn_like(X),))
    with forward_ad.dual_level():
        assert torch.isfinite(call(X)).all()  # nothing is differentiated


def test_a_destination_counts_as_changed() -> None:
    leaf = torch.ones(2, 6, 2, 8, requires_grad=True)
    saved = 2 * leaf
    loss = saved.square().sum()
    with torch.no_grad():
        ops.qk_norm_rope(X, q_out=saved)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        assert torch.equal(ops.qk_norm_rope(X, q_out=torch.empty_like(X))[0], X)
