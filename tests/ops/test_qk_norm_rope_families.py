"""QK norm and RoPE of every model family: the fused pass against the model's own expression and against fp64."""

from __future__ import annotations

import pytest
import torch
from qk_chains import CHAINS
from torch import Tensor

pytest.importorskip("diffusers", reason="needs diffusers")
SIXTEEN = [torch.bfloat16, torch.float16]


def one_ulp(x: Tensor, partner: Tensor) -> Tensor:
    """Distance of neighbouring numbers of x's dtype at the length of each rotated pair, in fp64.

    A rotation may cancel: what the norm rounds differently then shows in units of its inputs, and the rotation keeps
    the pair's length.
    """
    size = torch.hypot(x.double(), x.double()[..., partner]).clamp(min=2.0**-14)
    return 2.0 ** size.log2().floor() * torch.finfo(x.dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN], ids=str)
@pytest.mark.parametrize("family", CHAINS)
def test_error_is_at_most_twice_that_of_the_model(family: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    chain = CHAINS[family](dtype)
    for rounding in ("fast", "eager"):
        for got, eager, exact in zip(chain.fused(rounding), chain.eager(), chain.exact(), strict=True):
            assert got.dtype == dtype and got.shape == exact.shape
            ours, theirs = (got.double() - exact).abs(), (eager.double() - exact).abs()
            assert ours.max() <= 2 * theirs.max()
            assert ours.square().mean() <= 4 * theirs.square().mean()


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("family", CHAINS)
def test_eager_rounding_is_that_of_the_model(family: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    chain = CHAINS[family](dtype)
    for got, eager in zip(chain.fused("eager"), chain.eager(), strict=True):
        assert ((got.double() - eager.double()).abs() <= one_ulp(eager, chain.partner)).all()
        assert (got == eager).double().mean() > 0.998


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("family", CHAINS)
def test_fast_rounding_is_nearer_to_fp64_than_eager(family: str, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    chain = CHAINS[family](dtype)
    for got, eager, exact in zip(chain.fused("fast"), chain.eager(), chain.exact(), strict=True):
        assert (got.double() - exact).square().mean() <= 1.01 * (eager.double() - exact).square().mean()
