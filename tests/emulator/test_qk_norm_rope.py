"""QK norm and RoPE by the CUDA kernels of csrc/kernels/fused, emulated, against the CPU operator and the families."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulator_qk_norm_rope import Emulated
from qk_cases import CASES, Case
from qk_chains import CHAINS

from emulator import EAGER_SKEW, LAZY_FORWARD, LAZY_REVERSE, RANDOMS, EmulatorError

FOUR = (LAZY_FORWARD, LAZY_REVERSE, EAGER_SKEW, RANDOMS[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case: Case, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    call = case.build(dtype)
    first = None
    for policy in FOUR:
        with Emulated(policy):
            got = call.run()
        call.check(got)
        if first is not None:
            for a, b in zip(first, got, strict=True):
                assert torch.equal(a, b), f"{policy}: results differ from the first policy's"
        first = got


@pytest.mark.parametrize("family", CHAINS)
def test_families(family: str) -> None:
    pytest.importorskip("diffusers", reason="needs diffusers")
    torch.manual_seed(4)
    chain = CHAINS[family](torch.bfloat16)
    with Emulated():
        fast, eager = chain.fused("fast"), chain.fused("eager")
    for got, rounded, model, exact in zip(fast, eager, chain.eager(), chain.exact(), strict=True):
        assert (got.double() - exact).abs().max() <= 2 * (model.double() - exact).abs().max()
        assert (rounded == model).double().mean() > 0.998


@pytest.mark.parametrize("name", ["q", "q_weight", "q_bias", "cos", "sin", "q_out"])
def test_each_tensor_may_begin_beside_16_bytes(name: str) -> None:
    from vdit_fast.ops import qk_norm_rope

    def moved(t: torch.Tensor) -> torch.Tensor:
        wide = t.new_zeros(t.numel() + 1)
        wide[1:] = t.flatten()
        return wide[1:].view(t.shape)

    torch.manual_seed(5)
    call: Any = {n: torch.randn(64).bfloat16() for n in ("q_weight", "q_bias")}
    call |= {n: torch.randn(1, 3, 2, 64).bfloat16() for n in ("q", "q_out")} | {
        n: torch.rand(3, 64) for n in ("cos", "sin")
    }
    call[name] = moved(call[name])
    with torch.no_grad():
        want = qk_norm_rope(**call, norm="layer")[0].clone()
        with Emulated(RANDOMS[0]):
            got = qk_norm_rope(**call, norm="layer")[0]
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)


def test_too_wide_rows_are_refused() -> None:
    from vdit_fast.ops import qk_norm_rope

    wide: Any = torch.randn(1, 2, 1, 264).bfloat16()
    with torch.no_grad(), Emulated(), pytest.raises(EmulatorError, match="error code 1"):
        qk_norm_rope(wide)
