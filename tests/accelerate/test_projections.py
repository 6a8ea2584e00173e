"""Projections fused by diffusers, when adapters or weights change behind them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from vdit_fast.accelerate import accelerate

peft = pytest.importorskip("peft")

FAMILIES = ("wan_t2v", "wan_i2v", "skyreels_df")
STALE = "unfuse_qkv_projections"


def built(name: str) -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = tiny.build(name)
    if not hasattr(model, "fuse_qkv_projections"):
        pytest.skip(f"{type(model).__name__} of this diffusers has no fuse_qkv_projections()")
    return model.requires_grad_(False), inputs


def with_adapter(model: nn.Module) -> nn.Module:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    model.add_adapter(config, "detail")  # type: ignore[operator]
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_behind_fused_projections_is_refused(name: str) -> None:
    """Switched off, or with scale 0, it adds nothing and the fused weights still hold."""
    model, inputs = built(name)
    plain = tiny.run(model, inputs)
    model.fuse_qkv_projections()  # type: ignore[operator]
    handle = accelerate(model)
    assert tiny.relative(tiny.run(model, inputs), plain) < 1e-5
    with_adapter(model)
    with pytest.raises(RuntimeError, match=STALE):
        tiny.run(model, inputs)
    model.disable_adapters()  # type: ignore[operator]
    assert tiny.relative(tiny.run(model, inputs), plain) < 1e-5
    model.enable_adapters()  # type: ignore[operator]
    model.set_adapters("detail", weights=0.0)  # type: ignore[operator]
    assert tiny.relative(tiny.run(model, inputs), plain) < 1e-5
    model.set_adapters("detail", weights=1.0)  # type: ignore[operator]
    with pytest.raises(RuntimeError, match=r"attn\d\.to_"):
        tiny.run(model, inputs)
    handle.remove()
    tiny.run(model, inputs)  # the stock model is left to itself


@pytest.mark.parametrize("name", FAMILIES)
def test_unfused_the_adapter_is_followed(name: str) -> None:
    model, inputs = built(name)
    twin = with_adapter(copy.deepcopy(model))
    want = tiny.run(twin, inputs)
    model.fuse_qkv_projections()  # type: ignore[operator]
    accelerate(model)
    tiny.run(model, inputs)
    with_adapter(model)
    model.unfuse_qkv_projections()  # type: ignore[operator]
    model.load_state_dict(twin.state_dict())
    assert tiny.relative(tiny.run(model, inputs), want) < 1e-5


def test_weights_folded_in_or_loaded_after_fusing() -> None:
    model, inputs = built("wan_t2v")
    with_adapter(model)
    want = tiny.run(model, inputs)
    model.disable_adapters()  # type: ignore[operator]
    model.fuse_qkv_projections()  # type: ignore[operator]
    accelerate(model)
    tiny.run(model, inputs)
    model.enable_adapters()  # type: ignore[operator]
    model.fuse_lora()  # type: ignore[operator]
    with pytest.raises(RuntimeError, match="weight has changed since"):
        tiny.run(model, inputs)
    model.unfuse_qkv_projections()  # type: ignore[operator]
    model.fuse_qkv_projections()  # type: ignore[operator]
    assert tiny.relative(tiny.run(model, inputs), want) < 1e-5
    attn = model.get_submodule("blocks.0.attn1")
    with torch.no_grad():
        attn.to_k.bias.add_(1.0)  # type: ignore[union-attr, operator]
    with pytest.raises(RuntimeError, match="bias has changed since"):
        tiny.run(model, inputs)


def test_unchanged_weights_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = built("wan_t2v")
    model.fuse_qkv_projections()  # type: ignore[operator]
    accelerate(model)
    tiny.run(model, inputs)
    monkeypatch.setattr(torch, "equal", lambda *_: pytest.fail("compared again"))
    tiny.run(model, inputs)
