"""What users combine with an accelerated model: adapters, caches, offloading, casting, checkpointing, pipelines."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from tiny import Band, gradients, same_gradients

from vdit_fast.accelerate import accelerate
from vdit_fast.config import Config

LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def agree(got: torch.Tensor, want: torch.Tensor) -> None:
    assert tiny.relative(got, want) < 2e-6, tiny.relative(got, want)


class InjectedLora:
    """What diffusers' methods of the same names do, for the transformers without them (Allegro, EasyAnimate)."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def add_adapter(self, config: Any) -> None:
        import peft

        peft.inject_adapter_in_model(config, self.model)

    def _each(self, name: str, *args: Any) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        for module in self.model.modules():
            if isinstance(module, BaseTunerLayer):
                getattr(module, name)(*args)

    def disable_adapters(self) -> None:
        self._each("enable_adapters", False)

    def enable_adapters(self) -> None:
        self._each("enable_adapters", True)

    def fuse_lora(self) -> None:
        self._each("merge")


def test_lora_on_off_and_fused(family: str) -> None:
    peft = pytest.importorskip("peft")
    model, inputs = tiny.build(family)
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=LORA_TARGETS, init_lora_weights=False)
    lora = model if hasattr(model, "add_adapter") else InjectedLora(model)
    plain = tiny.run(model, inputs)
    handle = accelerate(model)  # before the adapter comes, as load_lora_weights would
    lora.add_adapter(config)
    with_lora = tiny.run(model, inputs)
    lora.disable_adapters()
    without = tiny.run(model, inputs)
    lora.enable_adapters()
    handle.remove()
    stock = tiny.run(model, inputs)
    agree(with_lora, stock)
    agree(without, plain)
    assert tiny.relative(with_lora, plain) > 1e-2
    handle = accelerate(model)  # after it
    agree(tiny.run(model, inputs), stock)
    lora.fuse_lora()
    agree(tiny.run(model, inputs), stock)


@pytest.mark.parametrize("when", ["before", "after"])
def test_first_block_cache(when: str) -> None:
    from diffusers import FirstBlockCacheConfig

    def generate(model: Any) -> list[torch.Tensor]:
        out = []
        for t in (900, 890, 880, 100):
            for name in ("cond", "uncond"):
                with model.cache_context(name):
                    out.append(tiny.run(model, tiny.at(inputs, t)))
        return out

    model, inputs = tiny.wan(layers=4)
    stock = copy.deepcopy(model)
    stock.enable_cache(FirstBlockCacheConfig(threshold=0.3))
    expected = generate(stock)
    if when == "before":
        model.enable_cache(FirstBlockCacheConfig(threshold=0.3))
    handle = accelerate(model)
    if when == "after":
        model.enable_cache(FirstBlockCacheConfig(threshold=0.3))
    for got, want in zip(generate(model), expected, strict=True):
        agree(got, want)
    calls = [layer["calls"] for layer in handle.stats()["layers"]]
    assert calls[0] == 8 and calls[-1] < 8, "the cache must have skipped something"


def test_sequential_offload(family: str) -> None:
    offload = pytest.importorskip("accelerate")
    model, inputs = tiny.build(family)
    stock = tiny.run(model, inputs)
    handle = accelerate(model)
    offload.cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.parameters()).device.type == "meta"
    agree(tiny.run(model, inputs), stock)
    assert accelerate(model) is handle
    handle.remove()
    accelerate(model)  # weights on "meta" are no reason to refuse
    agree(tiny.run(model, inputs), stock)


def test_group_offload(family: str) -> None:
    from diffusers import __version__
    from diffusers.hooks import apply_group_offloading

    if __version__.startswith("0.35.") and not torch.accelerator.is_available():
        pytest.skip("group offloading of diffusers 0.35 needs an accelerator to be there")
    model, inputs = tiny.build(family)
    stock = tiny.run(model, inputs)
    accelerate(model)
    apply_group_offloading(
        model, onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    agree(tiny.run(model, inputs), stock)


def test_layerwise_fp8_casting(family: str) -> None:
    model, inputs = tiny.build(family)
    model, inputs = model.to(torch.bfloat16), tiny.cast(inputs, torch.bfloat16)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    stock = tiny.run(model, inputs)
    weights = [module.to_q.weight.dtype for module in model.modules() if hasattr(module, "to_q")]
    assert torch.float8_e4m3fn in weights
    accelerate(model)
    assert tiny.relative(tiny.run(model, inputs), stock) < 2e-2


def test_fused_projections() -> None:
    model, inputs = tiny.wan()
    handle = accelerate(model)
    expected = tiny.run(model, inputs)
    for block in model.blocks:
        block.attn1.fuse_projections()
    assert hasattr(model.blocks[0].attn1, "to_qkv")
    agree(tiny.run(model, inputs), expected)
    handle.remove()
    agree(tiny.run(model, inputs), expected)


def test_autocast() -> None:
    model, inputs = tiny.wan()
    with torch.autocast("cpu", torch.bfloat16):
        stock = tiny.run(model, inputs)
        handle = accelerate(model)
        assert tiny.relative(tiny.run(model, inputs), stock) < 2e-2
    assert not handle.stats()["layers"][0]["fallbacks"]


def test_planners_run_without_autocast() -> None:
    seen = []

    class Watched(Band):
        def plan(self, q: torch.Tensor, k: torch.Tensor, ctx: Any) -> Any:
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().plan(q, k, ctx)

    model, inputs = tiny.wan()
    accelerate(model, Config(attention=Watched()))
    with torch.autocast("cpu", torch.bfloat16):
        tiny.run(model, inputs)
    assert seen and not any(seen)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_gradients_equal_the_stock_ones(family: str, checkpointing: bool) -> None:
    model, inputs = tiny.build(family)
    if checkpointing and not model._supports_gradient_checkpointing:
        pytest.skip(f"{type(model).__name__} has no gradient checkpointing")
    model.requires_grad_(True).train()
    stock = gradients(model, [inputs])
    handle = accelerate(model)
    if checkpointing:
        model.enable_gradient_checkpointing()
    same_gradients(gradients(model, [inputs]), stock)
    assert all(layer["calls"] == 1 for layer in handle.stats()["layers"]), "recomputation does not count"


@pytest.mark.parametrize("kind", ["wan_t2v", "hunyuan_video"])
def test_checkpointing_recomputes_with_the_plan_of_its_own_forward(kind: str) -> None:
    # The band grows with the step; both forwards are pending when backward begins.
    model, inputs = tiny.build(kind)
    model.requires_grad_(True).train()
    runs = [tiny.at(inputs, 900), tiny.at(inputs, 500), tiny.at(inputs, 100)]
    handle = accelerate(model, Config(attention=Band(width=1)))
    plain = gradients(model, runs)
    handle.reset()
    model.enable_gradient_checkpointing()
    same_gradients(gradients(model, runs), plain)


def pipeline(**kw: Any) -> tuple[Any, dict[str, Any]]:
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    first, inputs = tiny.wan()
    second = copy.deepcopy(first)
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=first, transformer_2=second, boundary_ratio=0.5,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **kw,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    call = {
        "prompt_embeds": inputs["encoder_hidden_states"],
        "negative_prompt_embeds": inputs["encoder_hidden_states"] * 0.5,
        "height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 6, "guidance_scale": 3.0,
        "output_type": "latent", "latents": inputs["hidden_states"],
    }  # fmt: skip
    return pipe, call


def test_both_experts_of_a_pipeline() -> None:
    pipe, call = pipeline()
    stock = pipe(**call).frames
    handle = accelerate(pipe)
    agree(pipe(**call).frames, stock)
    stats = handle.stats()
    assert {layer["expert"] for layer in stats["layers"]} == {"transformer", "transformer_2"}
    assert (stats["generations"], stats["steps"], stats["forwards"], stats["host_reads"]) == (1, 6, 12, 0)
    agree(pipe(**call).frames, stock)
    assert handle.stats()["generations"] == 2
    handle.remove()
    assert torch.equal(pipe(**call).frames, stock)


def test_steps_run_through_both_experts_and_both_branches() -> None:
    pipe, call = pipeline()
    handle = accelerate(pipe, Config(attention=Band(dense_steps=0.5)))
    pipe(**call)
    seen = [entry for root in handle.roots for entry in root.session.state.get("seen", ()) if entry[0] == 0]
    assert [entry[:3] for entry in seen] == [(0, step, branch) for step in (3, 4, 5) for branch in (0, 1)]
    assert {entry[3] for entry in seen} == {"transformer", "transformer_2"}
    first = [layer for layer in handle.stats()["layers"] if layer["expert"] == "transformer"]
    assert first[0]["calls"] > 0 and all("of 6" in reason for reason in first[0]["dense"])


def test_copied_pipeline_has_one_handle_of_its_own() -> None:
    pipe, call = pipeline()
    handle = accelerate(pipe)
    twin = copy.deepcopy(pipe)
    other = accelerate(twin)
    assert other is not handle and len(other.roots) == 2
    twin(**call)
    assert other.stats()["forwards"] == 12 and other.stats()["steps"] == 6 and handle.stats()["forwards"] == 0
