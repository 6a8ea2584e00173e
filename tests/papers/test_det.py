"""DeT: Decouple and Track, Benchmarking and Improving Video Diffusion Transformers for Motion Transfer
(arXiv 2503.17350).

Two temporal convolutions beside self-attention in the first blocks: they read attention's input (video rows, after norm
and modulation) and add to its output. The authors deliver the trained weights inside an attention processor, which must
not be replaced.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from vdit_fast.accelerate import NothingServed, accelerate
from vdit_fast.config import Config
from vdit_fast.hooks import TemporalAdapter
from vdit_fast.models.base import set_processor
from vdit_fast.planners import SVG2, Draft

pytest.importorskip("diffusers")

FAMILIES = ("cogvideox_5b", "wan_t2v", "hunyuan_video", "ltx_video")
PERMUTING = {
    "dense": None,
    "SVG2": SVG2(top_p=1.0, q_clusters=4, k_clusters=4),
    "Draft": Draft(sparsity=0.0, pool=(2, 2)),
}


class AdaptedProcessor(nn.Module):
    """The authors' form: a processor that holds the convolutions and calls the stock attention."""

    def __init__(self, stock: Any, channels: int, frames: int) -> None:
        super().__init__()
        self.stock, self.frames = stock, frames
        self.down = nn.Conv1d(channels, 128, 3, padding="same", bias=False)
        self.up = nn.Conv1d(128, channels, 3, padding="same", bias=False)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Any = None,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        out, text = self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        batch, tokens, channels = hidden_states.shape
        x = hidden_states.view(batch, self.frames, -1, channels).permute(0, 2, 3, 1).flatten(0, 1)
        x = self.up(functional.gelu(self.down(x)))
        return out + x.view(batch, -1, channels, self.frames).permute(0, 3, 1, 2).reshape(batch, tokens, channels), text


def adapter(channels: int, trained: bool = True) -> TemporalAdapter:
    made = TemporalAdapter(channels)
    if trained:
        nn.init.normal_(made.conv_out.weight, std=0.05)
    return made.eval().requires_grad_(False)


def adapted(layers: int = 2) -> tuple[nn.Module, dict[str, Any], list[AdaptedProcessor]]:
    """A CogVideoX whose first blocks carry the authors' processors."""
    model, inputs = tiny.build("cogvideox_5b", layers=layers + 1)
    processors = []
    for index in range(layers):
        attn = model.get_submodule(f"transformer_blocks.{index}.attn1")
        processors.append(AdaptedProcessor(attn.processor, 32, inputs["hidden_states"].shape[1]).eval())
        set_processor(attn, processors[-1])
    return model.requires_grad_(False), inputs, processors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_second_convolution_at_zero_changes_no_bit(family: str, dtype: torch.dtype) -> None:
    model, inputs = tiny.build(family)
    model, inputs = model.to(dtype), tiny.cast(inputs, dtype)
    handle = accelerate(model)
    plain = tiny.run(model, inputs)
    remove = handle.hook("attention_output", adapter(32, trained=False).to(dtype))
    assert torch.equal(tiny.run(model, inputs), plain) and handle.stats()["hooks"]["attention_output"] >= 2
    remove()
    handle.hook("attention_output", adapter(32).to(dtype))
    assert tiny.relative(tiny.run(model, inputs), plain) > 1e-2


def test_an_impulse_reaches_five_frames() -> None:
    """G1: an impulse in frame 2 of 6 reaches the frames 0 to 4, and its own place only."""
    made = adapter(8)
    nn.init.normal_(made.conv_in.weight)
    x = torch.zeros(1, 6, 3, 8)
    x[:, 2, 1] = torch.randn(8)
    reached = made.features(x).abs().amax(-1)[0] > 0
    assert reached[:, 1].tolist() == [True] * 5 + [False] and not reached[:, [0, 2]].any()


@pytest.mark.parametrize("frames", [1, 2, 3, 6, 13])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_the_products_in_token_order_are_the_convolutions(frames: int, kernel: int) -> None:
    made = TemporalAdapter(8, width=16, kernel=kernel)
    nn.init.normal_(made.conv_out.weight)
    x = torch.randn(2, frames, 5, 8)
    rows = x.permute(0, 2, 3, 1).flatten(0, 1)
    want = made.conv_out(functional.gelu(made.conv_in(rows))).view(2, 5, 8, frames).permute(0, 3, 1, 2)
    torch.testing.assert_close(made.features(x), want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("planner", PERMUTING.values(), ids=PERMUTING)
def test_same_as_the_authors_processors(planner: Any) -> None:
    """The weights out of the processors, as hooks beside served attention: also where tokens are permuted."""
    model, inputs, processors = adapted()
    want = tiny.run(model, inputs)
    truth = tiny.run(copy.deepcopy(model).double(), tiny.cast(inputs, torch.float64))
    for index, processor in enumerate(processors):
        set_processor(model.get_submodule(f"transformer_blocks.{index}.attn1"), processor.stock)
    handle = accelerate(model, Config(attention=planner, fuse="eager"))
    assert tiny.relative(tiny.run(model, inputs), want) > 1e-2
    for index, processor in enumerate(processors):
        hook = adapter(32)
        hook.conv_in, hook.conv_out = processor.down, processor.up
        handle.hook("attention_output", hook, layers=index)
    got = tiny.run(model, inputs)
    assert tiny.relative(got, truth) <= 4 * tiny.relative(want, truth) + 1e-6


def test_text_rows_stay_as_attention_left_them() -> None:
    model, inputs = tiny.build("cogvideox_5b")
    handle = accelerate(model)
    seen: list[tuple[Tensor, Tensor | None]] = []

    def note(step: Any, place: Any, rows: Any) -> None:
        seen.append((rows.video.clone(), rows.context.clone()))

    handle.hook("attention_output", note, layers=0)
    handle.hook("attention_output", adapter(32), layers=0)
    handle.hook("attention_output", note, layers=0)
    tiny.run(model, inputs)
    (video, text), (new_video, new_text) = seen
    assert text is not None and new_text is not None
    assert torch.equal(text, new_text) and tiny.relative(new_video, video) > 1e-3


def test_processors_with_trained_weights_stay_in_place() -> None:
    """What they hold survives accelerate() and remove(); the other layers are served; the report says why."""
    model, inputs, processors = adapted()
    stock = tiny.run(model, inputs)
    weights = [parameter.clone() for processor in processors for parameter in processor.parameters()]
    handle = accelerate(model)
    assert [layer["name"] for layer in handle.stats()["layers"]] == ["transformer_blocks.2.attn1"]
    (reason,) = handle.stats()["skipped"]
    assert "AdaptedProcessor" in reason and "AdaptedProcessor" in handle.report()
    assert tiny.relative(tiny.run(model, inputs), stock) < 1e-5
    for index, processor in enumerate(processors):
        assert model.get_submodule(f"transformer_blocks.{index}.attn1").processor is processor
    handle.remove()
    assert torch.equal(tiny.run(model, inputs), stock)
    kept = [parameter for processor in processors for parameter in processor.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(weights, kept, strict=True))


def test_nothing_but_trained_processors_is_an_error() -> None:
    model, _, _ = adapted()
    set_processor(model.get_submodule("transformer_blocks.2.attn1"), adapted()[2][0])
    with pytest.raises(NothingServed, match="3 x AdaptedProcessor"):
        accelerate(model)


@pytest.mark.parametrize(("family", "layers"), [("latte", "temporal*"), ("animatediff", "*motion_modules*")])
def test_temporal_layers_of_factorised_models(family: str, layers: str) -> None:
    model, inputs = tiny.build(family)
    handle = accelerate(model)
    plain = tiny.run(model, inputs)
    channels = 24 if family == "latte" else 32
    handle.hook("attention_output", adapter(channels, trained=False), layers=layers)
    assert torch.equal(tiny.run(model, inputs), plain)
    handle.hook("attention_output", adapter(channels), layers="*transformer_blocks.0.attn1")
    with pytest.raises(ValueError, match="one frame at a time"):
        tiny.run(model, inputs)


@pytest.mark.parametrize(("settings", "match"), [((0,), "channels"), ((8, -1), "width"), ((8, 4, 2), "odd")])
def test_bad_settings(settings: tuple[int, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        TemporalAdapter(*settings)
    handle = accelerate(tiny.wan()[0])
    with pytest.raises(ValueError, match="belongs at 'attention_output'"):
        handle.hook("block_output", TemporalAdapter(32))
