"""TaylorSeer: From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers (arXiv 2503.06923)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vdit_fast.accelerate import accelerate
from vdit_fast.caching import Stream, TaylorSeer, budget
from vdit_fast.caching.stream import Factors
from vdit_fast.config import Config
from vdit_fast.context import StepContext

TIMES = (900.0, 800.0, 700.0, 600.0, 500.0, 400.0, 300.0)


def paper(**knobs: Any) -> TaylorSeer:
    """The paper's formula: no damping, and every ``interval``-th step from the first on."""
    return TaylorSeer(**({"damping": 1.0, "first_full": 1, "last_full": 0, "granularity": "module"} | knobs))


def predicted(order: int, steps: list[int], feature: Any, ahead: int) -> Tensor:
    policy = paper(order=order)
    factors = Factors(feature(0).shape, order, torch.float64, torch.device("cpu"))
    for step in steps:
        factors.update(step, feature(step))
    return factors.forecast(policy.weights(ahead, factors.known), torch.float64)


def schedule(total: int, **knobs: Any) -> list[int]:
    policy, stream, found = paper(**knobs), Stream(), []
    for step in range(total):
        if policy.decide(StepContext(step=step, num_steps=total), stream) is not None:
            found.append(step)
            stream.begin(step)
    return found


def wan(layers: int = 2) -> Any:
    tiny = pytest.importorskip("tiny")
    return tiny.wan(layers=layers)


def clip(model: Any, inputs: dict[str, Any], scale: float = 1.0) -> list[Tensor]:
    import tiny

    text = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"] * scale}
    return [tiny.run(model, tiny.at(text, t)) for t in TIMES]


def test_t1a_order_1_is_exact_for_linear_features() -> None:
    a, b = torch.randn(2, 7, dtype=torch.float64)
    for ahead in range(1, 5):
        found = predicted(1, [0, 5], lambda s: a * s + b, ahead)
        torch.testing.assert_close(found, a * (5 + ahead) + b)


@pytest.mark.parametrize("n", [1, 4, 5])
def test_t1b_and_t1c_errors_of_quadratic_features(n: int) -> None:
    """Every order divides by the latest distance: order 2 misses c s² by -c N k, order 1 by -c k (k + N)."""
    c, t = torch.randn(7, dtype=torch.float64), 2 * n
    for k in (1, 2, 3):
        true = c * (t + k) ** 2
        for order, error in ((2, -c * n * k), (1, -c * k * (k + n))):
            found = predicted(order, [0, n, 2 * n], lambda s: c * s**2, k)
            torch.testing.assert_close(found - true, error)


def test_t1d_one_computed_step_is_reused() -> None:
    x = torch.randn(7, dtype=torch.float64)
    assert torch.equal(predicted(3, [0], lambda s: x, 4), x)


def test_t1e_to_t1h_schedules() -> None:
    assert schedule(50, interval=5) == list(range(0, 50, 5))  # Wan 2.1, HunyuanVideo: 5.00x fewer
    assert schedule(50, interval=6, first_full=3) == [0, 1, 2, 8, 14, 20, 26, 32, 38, 44]  # FLUX
    assert len(schedule(50, interval=4, first_full=2)) == 14  # DiT-XL: 3.57x
    assert len(schedule(50, interval=5, first_full=3, last_full=1)) == 13  # as many as diffusers' default


def test_t1i_modules_are_hooked_or_it_is_an_error() -> None:
    """Name patterns that match nothing made another implementation do nothing, silently, on these very models."""
    tiny = pytest.importorskip("tiny")
    for build, modules in ((tiny.wan, 3 * 2), (tiny.cogvideox, 2 * 2), (tiny.hunyuan, 3 + 1)):
        model, _ = build()
        with accelerate(model, Config(cache=paper())) as handle:
            assert handle.stats()["cache"]["hooked"] == {"blocks": 2, "modules": modules}
            assert f"{modules} modules" in handle.report()
    model, _ = tiny.build("svd")
    with pytest.raises(RuntimeError, match=r"granularity 'module', which .* does not have: there it is 'model'"):
        accelerate(model, Config(cache=paper()))


def test_a_predicted_step_is_a_sum_of_cached_outputs_under_current_gates() -> None:
    """x + Σ_l [g_sa(t) · P_sa + P_ca + g_ff(t) · P_ff], with order 0 and by hand."""
    import tiny

    model, inputs = wan()
    rows: list[Any] = []
    outputs: dict[Any, Tensor] = {}
    for index, block in enumerate(model.blocks):
        for name in ("attn1", "attn2", "ffn"):
            getattr(block, name).register_forward_hook(
                lambda module, args, output, key=(index, name): outputs.__setitem__(key, output)
            )
    accelerate(model, Config(cache=paper(order=0, interval=9)))
    model.condition_embedder.register_forward_hook(lambda module, args, output: rows.append(output[1]))
    model.norm_out.register_forward_pre_hook(lambda module, args: rows.append(args[0]))
    model.patch_embedding.register_forward_hook(
        lambda module, args, output: rows.append(output.flatten(2).transpose(1, 2))
    )
    tiny.run(model, tiny.at(inputs, TIMES[0]))
    rows.clear()
    tiny.run(model, tiny.at(inputs, TIMES[1]))
    x, temb, end = (item.double() for item in rows)
    for index, block in enumerate(model.blocks):
        gates = block.scale_shift_table.double() + temb.unflatten(1, (6, -1))
        x = x + gates[:, 2, None] * outputs[index, "attn1"] + outputs[index, "attn2"]
        x = x + gates[:, 5, None] * outputs[index, "ffn"]
    assert tiny.relative(end, x) < 1e-6


@pytest.mark.parametrize("granularity", ["model", "span", "block", "module"])
def test_interval_1_is_no_cache_and_two_runs_give_the_same_clip(granularity: str) -> None:
    model, inputs = wan()
    with accelerate(model):
        plain = clip(model, inputs)
    with accelerate(model, Config(cache=paper(granularity=granularity, interval=1))):
        assert all(torch.equal(a, b) for a, b in zip(clip(model, inputs), plain, strict=True))
    with accelerate(model, Config(cache=paper(granularity=granularity, interval=3))):
        first, second = clip(model, inputs), clip(model, inputs)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert not torch.equal(first[-2], plain[-2])


@pytest.mark.parametrize("granularity", ["model", "span", "block", "module"])
def test_guidance_branches_do_not_mix(granularity: str) -> None:
    """Two prompts in turns give what each gives alone."""
    import tiny

    model, inputs = wan()
    config = Config(cache=paper(granularity=granularity, interval=3))
    alone = []
    for scale in (1.0, -2.0):
        with accelerate(model, config):
            alone.append(clip(model, inputs, scale))
    with accelerate(model, config):
        for step, t in enumerate(TIMES):
            for branch, scale in enumerate((1.0, -2.0)):
                text = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"] * scale}
                assert torch.equal(tiny.run(model, tiny.at(text, t)), alone[branch][step])


def test_memory_of_the_papers_models() -> None:
    """The closed form at the published sizes, two guidance branches, order 1, bf16."""
    policy = paper()
    for layers, tokens, width, gigabytes in (
        (30, 32_760, 1536, 36.2),  # Wan 2.1 1.3B, 480p
        (40, 32_760, 5120, 161.0),  # 14B, 480p
        (40, 75_600, 5120, 371.6),  # 14B, 720p
    ):
        found = 2 * budget.nbytes(policy, layers * 3 * tokens * width, torch.bfloat16) / 1e9
        assert abs(found - gigabytes) < 0.06
    span = 2 * budget.nbytes(paper(granularity="span"), 75_600 * 5120, torch.bfloat16)
    assert abs(span / 1e9 - 3.1) < 0.06  # 120 times less


def test_the_estimate_is_what_is_allocated() -> None:
    model, inputs = wan(layers=3)
    tokens = inputs["hidden_states"].numel() // 16
    for granularity, features in (("module", 9), ("block", 3), ("span", 1)):
        policy = paper(granularity=granularity, order=2)
        want = budget.nbytes(policy, features * tokens * 32, torch.float32)
        with accelerate(model, Config(cache=policy)) as handle:
            clip(model, inputs)
            assert handle.stats()["cache"]["nbytes"] == want
        small = paper(granularity=granularity, order=2, max_bytes=want - 1)
        with accelerate(model, Config(cache=small)) as handle:
            with pytest.raises(ValueError, match=f"needs {want:,} bytes"):
                clip(model, inputs)
            assert handle.stats()["cache"]["nbytes"] == 0
