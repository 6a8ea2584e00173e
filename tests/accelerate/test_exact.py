"""The exact preset answers like the stock model, on every family, and remove() gives the stock model back."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import tiny
import torch

from vdit_fast.accelerate import accelerate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_output_is_within_the_eager_path_s_own_rounding(family: str, dtype: torch.dtype) -> None:
    model, inputs = tiny.build(family)
    model, inputs = model.to(dtype), tiny.cast(inputs, dtype)
    truth = tiny.run(tiny.double(model), tiny.cast(inputs, torch.float64))
    eager = tiny.run(model, inputs)
    handle = accelerate(model, "exact")
    got = tiny.run(model, inputs)
    assert got.dtype == eager.dtype and got.shape == eager.shape
    tiny.exact_enough(got, eager, truth)
    layers = handle.stats()["layers"]
    assert layers and all(layer["calls"] == 1 and not layer["fallbacks"] for layer in layers)


def test_remove_restores_everything(family: str) -> None:
    model, inputs = tiny.build(family)
    before, weights = tiny.processors(model), {k: v.clone() for k, v in model.state_dict().items()}
    attributes, reference = set(model.__dict__), tiny.run(model, inputs)
    handle = accelerate(model)
    assert list(model.state_dict()) == list(weights)
    tiny.run(model, inputs)
    handle.remove()
    handle.remove()
    after = tiny.processors(model)
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert not model._forward_pre_hooks and not model._forward_pre_hooks_with_kwargs
    assert set(model.__dict__) == attributes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(tiny.run(model, inputs), reference)
    assert not handle.active and "removed" in handle.report()


def test_two_runs_give_the_same_bits(family: str) -> None:
    model, inputs = tiny.build(family)
    handle = accelerate(model)
    runs = [torch.stack([tiny.run(model, tiny.at(inputs, t)) for t in (900, 500, 100)]) for _ in range(2)]
    assert torch.equal(runs[0], runs[1])
    assert handle.stats()["generations"] == 2 and handle.stats()["steps"] == 3


def test_positional_arguments_are_understood(family: str) -> None:
    model, inputs = tiny.build(family)
    handle = accelerate(model)
    reference = tiny.run(model, inputs)
    names = [name for name in inspect.signature(type(model).forward).parameters if name in inputs]
    head = names[: names.index("timestep") + 1]
    with torch.no_grad():
        again = model(*(inputs[name] for name in head), **{k: v for k, v in inputs.items() if k not in head})[0]
    assert torch.equal(again, reference)
    assert handle.roots[0].session.forward.step.branch == 1


def self_attention(model: Any, inputs: dict[str, Any]) -> set[str]:
    """Paths of the attention modules whose queries and keys are projected from the same tensor, by watching them."""
    read: dict[tuple[str, str], torch.Tensor] = {}
    hooks = []
    for name in tiny.processors(model):
        module = model.get_submodule(name)
        for part in ("to_q", "to_k"):
            hooks.append(
                getattr(module, part).register_forward_pre_hook(
                    lambda _, args, place=(name, part): read.__setitem__(place, args[0])
                )
            )
    tiny.run(model, inputs)
    for hook in hooks:
        hook.remove()
    return {name for name, part in read if read[name, "to_q"] is read[name, "to_k"]}


def test_only_self_and_joint_attention_is_touched(family: str) -> None:
    model, inputs = tiny.build(family)
    before, own = tiny.processors(model), self_attention(model, inputs)
    handle = accelerate(model)
    after = tiny.processors(model)
    changed = {name for name in before if before[name] is not after[name]}
    assert changed == set(tiny.served(model))
    changed = {name for name in changed if after[name].attends}  # not those that norm and rotate for a stock processor
    assert changed
    reasons = {name: reason for reason, names in handle.stats()["skipped"].items() for name in names}
    assert set(reasons) == set(before) - changed, "every module is served or left alone with a reason"
    # SVD's cross-attention to one key is served too
    assert changed <= own or family == "svd", "served modules make queries and keys of the same tokens"
    for name in own - changed:  # refiners of text or audio, which have another processor
        assert "refiner" in name or "connector" in name or "is not of a known family" in reasons[name], name
    for name in set(before) - own - changed:
        assert "cross-attention" in reasons[name], name


def test_text_padding_does_not_reach_the_video() -> None:
    model, inputs = tiny.build("hunyuan_video")
    accelerate(model)
    reference = tiny.run(model, inputs)
    moved = inputs["encoder_hidden_states"].clone()
    moved[0, 5:] += 10  # item 0 has 5 valid text tokens, item 1 has 9
    assert tiny.relative(tiny.run(model, {**inputs, "encoder_hidden_states": moved}), reference) < 1e-6
    moved[1, 5:] += 10
    changed = tiny.run(model, {**inputs, "encoder_hidden_states": moved})
    assert tiny.relative(changed[0], reference[0]) < 1e-6 and tiny.relative(changed[1], reference[1]) > 1e-4


def test_joint_blocks_agree_also_in_the_padded_text_rows() -> None:
    model, inputs = tiny.build("hunyuan_video")
    outputs: list[torch.Tensor] = []
    model.transformer_blocks[0].register_forward_hook(lambda *call: outputs.append(call[2][1]))
    tiny.run(model, inputs)
    with accelerate(model):
        tiny.run(model, inputs)
    assert tiny.relative(outputs[1], outputs[0]) < 1e-5


def test_a_double_precision_model_runs_the_stock_way_and_says_so() -> None:
    model, inputs = tiny.build("wan_t2v")
    model, inputs = model.double(), tiny.cast(inputs, torch.float64)
    reference = tiny.run(model, inputs)
    handle = accelerate(model)
    assert torch.equal(tiny.run(model, inputs), reference)
    assert all(layer["fallbacks"] == {"dtype float64 has no kernel": 1} for layer in handle.stats()["layers"])
    handle.remove()
    accelerate(model, {"on_unsupported": "error"})
    with pytest.raises(RuntimeError, match=r"blocks\.0\.attn1 cannot be served: dtype float64.*on_unsupported"):
        tiny.run(model, inputs)
