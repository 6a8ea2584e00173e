"""Models with factorised attention: which kernel runs where, what is never planned, what is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from tiny import Band
from torch import Tensor

from vdit_fast.accelerate import accelerate
from vdit_fast.config import Config
from vdit_fast.models import heads

FAMILIES = sorted(tiny.WITHOUT_GRID)
TEMPORAL = "temporal attention: one short sequence per place"


def watch(patch: pytest.MonkeyPatch, name: str) -> list[tuple[int, ...]]:
    """Shapes of the queries that reach an attention operator."""
    seen: list[tuple[int, ...]] = []
    stock = getattr(heads, name)

    def spy(q: Tensor, *args: Any, **kw: Any) -> Any:
        seen.append(tuple(q.shape))
        return stock(q, *args, **kw)

    patch.setattr(heads, name, spy)
    return seen


@pytest.mark.parametrize(
    ("kind", "largest"),
    [("svd", (2 * 64, 5, 2, 16)), ("animatediff", (2 * 64, 4, 2, 16)), ("latte", (2 * 16, 5, 2, 12))],
)
def test_frames_go_through_short_attention(
    kind: str, largest: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = tiny.build(kind)
    handle = accelerate(model, Config(attention=Band(width=1)))
    short = watch(monkeypatch, "short_attention")
    tiny.run(model, inputs)
    found = [layer for layer in handle.stats()["layers"] if TEMPORAL in layer["dense"]]
    assert found and all("temporal_transformer" in layer["name"] or "motion" in layer["name"] for layer in found)
    assert largest in short
    assert len([shape for shape in short if shape[1] == largest[1]]) == len(found)


def test_large_frames_go_through_dense_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny.build("svd")
    inputs["sample"] = torch.randn(2, 5, 8, 16, 16)
    stock = tiny.run(model, inputs)
    accelerate(model)
    dense, short = watch(monkeypatch, "attention"), watch(monkeypatch, "short_attention")
    assert tiny.relative(tiny.run(model, inputs), stock) < 1e-5
    assert (10, 256, 2, 16) in dense and (2 * 256, 5, 2, 16) in short
    assert not any(shape[1] <= 64 for shape in dense)


@pytest.mark.parametrize("kind", FAMILIES)
def test_no_planner_is_asked(kind: str) -> None:
    class Never(Band):
        def plan(self, q: Tensor, k: Tensor, ctx: Any) -> Any:
            raise AssertionError("there is no video grid")

    model, inputs = tiny.build(kind)
    stock = tiny.run(model, inputs)
    handle = accelerate(model, Config(attention=Never(), on_unsupported="error"))
    assert tiny.relative(tiny.run(model, inputs), stock) < 1e-5
    stats = handle.stats()
    assert all(layer["sparse_calls"] == 0 and sum(layer["dense"].values()) == 1 for layer in stats["layers"])
    assert TEMPORAL in handle.report() and "spatial attention: one frame at a time" in handle.report()
    handle.reconfigure(Config(attention=Never(width=2)))  # the records begin anew, the reasons stay
    tiny.run(model, inputs)
    assert any(TEMPORAL in layer["dense"] for layer in handle.stats()["layers"])


def test_one_key_needs_no_queries() -> None:
    model, inputs = tiny.build("svd")
    stock = tiny.run(model, inputs)
    calls: list[str] = []
    for name, module in model.named_modules():
        if name.endswith(("attn2.to_q", "attn2.to_k", "attn2.to_v")):
            module.register_forward_hook(lambda *_, part=name[-4:]: calls.append(part))
    handle = accelerate(model)
    assert tiny.relative(tiny.run(model, inputs), stock) < 1e-5
    assert set(calls) == {"to_v"} and len(calls) == len([n for n, _ in model.named_modules() if n.endswith("attn2")])
    more = {**inputs, "encoder_hidden_states": torch.randn(2, 3, 16)}
    handle.remove()
    want = tiny.run(model, more)
    handle = accelerate(model)
    assert tiny.relative(tiny.run(model, more), want) < 1e-5
    (reason,) = {r for layer in handle.stats()["layers"] for r in layer["fallbacks"]}
    assert reason == "cross-attention to 3 keys instead of one"


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_older_processor(kind: str) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    model, inputs = tiny.build(kind)
    for module in model.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(AttnProcessor())
    stock = tiny.run(model, inputs)
    handle = accelerate(model)
    assert tiny.relative(tiny.run(model, inputs), stock) < 1e-5
    assert all(layer["calls"] == 1 for layer in handle.stats()["layers"])
    handle.remove()
    next(m for n, m in model.named_modules() if n.endswith("attn1")).scale_qk = False
    assert "the scores are not scaled by head_dim ** -0.5" in accelerate(model).stats()["skipped"]


def test_what_cannot_be_served_is_counted() -> None:
    model, _ = tiny.build("latte")
    handle = accelerate(model)
    attn = model.temporal_transformer_blocks[0].attn1
    rows = torch.randn(3, 5, 24)
    mask = torch.zeros(3, 1, 5)
    with torch.no_grad():
        assert torch.equal(attn(rows, attention_mask=mask), attn.processor.stock(attn, rows, attention_mask=mask))
    layer = next(layer for layer in handle.stats()["layers"] if layer["name"] == "temporal_transformer_blocks.0.attn1")
    assert layer["fallbacks"] == {"an attention mask of this form is not understood": 1}
    wide, wide_inputs = tiny.build("latte", heads=1, dim=264)
    stock = tiny.run(wide, wide_inputs)
    handle = accelerate(wide, Config(fuse="off"))
    assert torch.equal(tiny.run(wide, wide_inputs), stock)
    assert all(layer["fallbacks"] == {"head dimension 264 > 256": 1} for layer in handle.stats()["layers"])


def test_other_models_with_this_processor_are_left_alone() -> None:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 32), layers_per_block=1, cross_attention_dim=16, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=2,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=r"x AttnProcessor2_0.*UNet2DConditionModel is not one of .*UNetMotionModel"):
        accelerate(model)
    svd, _ = tiny.build("svd")
    with pytest.raises(RuntimeError, match="is not one of"):
        accelerate(svd.mid_block)  # without the model nobody knows what its attention is


@pytest.mark.parametrize("kind", FAMILIES)
def test_compiled_blocks(kind: str) -> None:
    torch._dynamo.reset()
    model, inputs = tiny.build(kind)
    stock = tiny.run(model, inputs)
    handle = accelerate(model)
    for module in model.modules():
        if type(module).__name__ in ("BasicTransformerBlock", "TemporalBasicTransformerBlock"):
            module.compile(fullgraph=True, backend="aot_eager")
    assert tiny.relative(tiny.run(model, inputs), stock) < 1e-5
    assert all(layer["calls"] == 1 for layer in handle.stats()["layers"])
    torch._dynamo.reset()
