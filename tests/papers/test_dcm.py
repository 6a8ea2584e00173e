"""DCM: Dual-Expert Consistency Model (arXiv 2506.03123).

Above timestep 978 the semantic expert runs: the student without adapters. At and below it the detail expert: a LoRA on
every projection of attention, and a condition embedder, an output norm and an output projection of its own. Four steps.
"""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from torch import Tensor, nn

from vdit_fast.accelerate import accelerate
from vdit_fast.caching import TaylorSeer
from vdit_fast.config import Config
from vdit_fast.context import StepContext
from vdit_fast.planners import Draft

pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

SWITCH = 978.0
TIMESTEPS = (1000.0, 979.0, 978.0, 500.0)
PARTS = ("condition_embedder", "norm_out", "proj_out")
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
CONFIGS = {
    "exact": Config(),
    "text_kv": Config(text_kv=True),
    "sparse": Config(attention=Draft(sparsity=0.5, pool=(2, 2))),
    "eager": Config(fuse="eager"),
}


def changed(part: nn.Module) -> nn.Module:
    twin = copy.deepcopy(part)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.3)
    return twin


class DualExpert:
    """One transformer with both experts' parts."""

    def __init__(self) -> None:
        self.model, self.inputs = tiny.wan()
        self.inputs["encoder_hidden_states"] = torch.randn(1, 9, 16)
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, init_lora_weights=False)
        self.model.add_adapter(config, "detail")
        self.model.eval().requires_grad_(False)
        self.parts = {
            "semantic": {name: getattr(self.model, name) for name in PARTS},
            "detail": {name: changed(getattr(self.model, name)).eval() for name in PARTS},
        }

    def become(self, expert: str) -> nn.Module:
        for name, part in self.parts[expert].items():
            setattr(self.model, name, part)
        (self.model.enable_adapters if expert == "detail" else self.model.disable_adapters)()
        return self.model

    def at(self, timestep: float) -> Tensor:
        return tiny.run(self.become("detail" if timestep <= SWITCH else "semantic"), tiny.at(self.inputs, timestep))


def fresh(expert: str) -> nn.Module:
    """A model built as one expert alone: the adapter folded into the weights, no trace of the other."""
    torch.manual_seed(0)
    dual = DualExpert()
    model = dual.become(expert)
    if expert == "detail":
        model.fuse_lora()
    model.unload_lora()
    assert not any(hasattr(module, "lora_A") for module in model.modules())
    return model


def want(config: Config, dual: DualExpert) -> dict[float, Tensor]:
    """What freshly built, freshly accelerated models answer."""
    answers = {}
    for timestep in TIMESTEPS:
        model = fresh("detail" if timestep <= SWITCH else "semantic")
        accelerate(model, config)
        answers[timestep] = tiny.run(model, tiny.at(dual.inputs, timestep))
    return answers


def dual() -> DualExpert:
    torch.manual_seed(0)
    return DualExpert()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(
    "order", [TIMESTEPS, TIMESTEPS[::-1], (978.0, 979.0, 978.0, 979.0)], ids=["down", "up", "turns"]
)
def test_either_side_of_the_switch_is_a_freshly_built_model(config: Config, order: tuple[float, ...]) -> None:
    both = dual()
    answers = want(config, both)
    accelerate(both.model, config)
    got = [both.at(timestep) for timestep in order]
    for timestep, output in zip(order, got, strict=True):
        assert tiny.relative(output, answers[timestep]) < 1e-5
    assert tiny.relative(answers[978.0], answers[979.0]) > 1e-2


def test_the_switch_costs_nothing_that_was_kept() -> None:
    """The semantic expert's answers before and after a turn of the other are the same bits."""
    both = dual()
    accelerate(both.model, Config(text_kv=True))
    first = both.at(979.0)
    both.at(978.0)
    assert torch.equal(both.at(979.0), first)


def test_projections_fused_before_the_switch_do_not_leave_the_adapter_out() -> None:
    """diffusers' fused projections hold the semantic expert's weights: the detail expert is refused, not forgotten."""
    both = dual()
    answers = want(Config(), both)
    both.become("semantic")
    both.model.fuse_qkv_projections()
    handle = accelerate(both.model)
    assert tiny.relative(both.at(979.0), answers[979.0]) < 1e-5
    with pytest.raises(RuntimeError, match="unfuse_qkv_projections"):
        both.at(978.0)
    both.model.unfuse_qkv_projections()
    assert tiny.relative(both.at(978.0), answers[978.0]) < 1e-5
    assert not any(layer["fallbacks"] for layer in handle.stats()["layers"])


def test_experts_by_name_have_histories_of_their_own() -> None:
    """A cache in which each expert would repeat its last output: neither repeats the other's."""
    both = dual()
    handle = accelerate(both.model, Config(cache=TaylorSeer(first_full=1, last_full=0, interval=4, order=0)))
    seen: list[StepContext] = []
    handle.hook("block_output", lambda step, place, rows: seen.append(step), layers=0)
    outputs = []
    for number, timestep in enumerate((1000.0, 979.0, 978.0, 500.0)):
        name = "detail" if timestep <= SWITCH else "semantic"
        with handle.step(number, timestep=timestep, model=name, num_steps=20):
            outputs.append(both.at(timestep))
    assert [(step.expert, step.step) for step in seen] == [("semantic", 0), ("detail", 2)]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[2], outputs[3])
    assert tiny.relative(outputs[2], outputs[1]) > 1e-2


def test_four_steps_are_too_few_for_a_cache() -> None:
    both = dual()
    handle = accelerate(both.model, Config(cache=TaylorSeer(first_full=0.3, interval=2, min_steps=9)))
    for number, timestep in enumerate(TIMESTEPS):
        with handle.step(number, timestep=timestep, num_steps=4):
            both.at(timestep)
    assert not handle.stats()["cache"]["forecast"]
