"""Forms of masks, guidance and inputs that single families have: served where understood, else the stock way."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import tiny
import torch
from families.allegro import allegro
from families.base import from_diffusers
from families.cosmos import cosmos
from families.easyanimate import easyanimate
from families.ltx2 import ltx2
from families.ltx_video import ltx_video
from families.mochi import mochi
from tiny import Band
from torch import Tensor, nn

from vdit_fast.accelerate import accelerate
from vdit_fast.config import Config
from vdit_fast.context import LayerContext
from vdit_fast.plan import AttentionPlan
from vdit_fast.planners.base import Planner

SERVED: dict[str, Any] = {"on_unsupported": "error"}


def outputs(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        found: tuple[Tensor, ...] = model(**inputs)
    return found


def same_outputs(model: nn.Module, inputs: dict[str, Any], config: Any = SERVED) -> None:
    """Accelerated with ``config`` the model answers in every output as it did before."""
    stock = outputs(model, inputs)
    with accelerate(model, config):
        for got, want in zip(outputs(model, inputs), stock, strict=True):
            assert tiny.relative(got, want) < 2e-6


def fallbacks(model: nn.Module, inputs: dict[str, Any]) -> list[dict[str, int]]:
    """Reasons per layer of one forward, which must give what the stock one gives."""
    stock = outputs(model, inputs)
    with accelerate(model) as handle:
        for got, want in zip(outputs(model, inputs), stock, strict=True):
            assert tiny.relative(got, want) < 2e-6
        return [layer["fallbacks"] for layer in handle.stats()["layers"]]


@pytest.mark.parametrize(
    "rows",
    [
        ["111110000", "111111111"],  # padded on the right, as the tokenizer does
        ["000000000", "000000001"],  # an empty prompt, which the pipeline makes of ""
        ["010110010", "001111100"],  # anything else
    ],
)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
def test_mochi_gathers_the_valid_text_tokens(rows: list[str], dtype: torch.dtype) -> None:
    model, inputs = mochi()
    inputs["encoder_attention_mask"] = torch.tensor([[int(bit) for bit in row] for row in rows]).to(dtype)
    if dtype == torch.int64:  # the caption's pool takes no integers, the processor does
        model.time_embed.pooler.register_forward_pre_hook(lambda _, args: (args[0], args[1].float()))
    text: list[Tensor] = []
    model.transformer_blocks[0].register_forward_hook(lambda *call: text.append(call[2][1]))
    same_outputs(model, inputs)
    assert tiny.relative(text[1], text[0]) < 2e-6


def test_mochi_with_a_mask_of_another_length_is_left_to_the_stock_processor() -> None:
    model, _ = mochi()
    attn = model.transformer_blocks[0].attn1
    call = {
        "hidden_states": torch.randn(1, 12, 32),
        "encoder_hidden_states": torch.randn(1, 4, 24),
        "attention_mask": torch.ones(1, 3, dtype=torch.bool),
    }
    stock = outputs(attn, call)
    with accelerate(model) as handle:
        assert all(torch.equal(got, want) for got, want in zip(outputs(attn, call), stock, strict=True))
        assert sum(handle.stats()["layers"][0]["fallbacks"].values()) == 1


def test_allegro_drops_a_mask_that_hides_nothing() -> None:
    model, inputs = allegro(mask=True)
    seen: list[Any] = []
    model.transformer_blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    same_outputs(model, inputs)
    assert seen[0] is not None and seen[1] is None
    inputs["attention_mask"] = None
    same_outputs(model, inputs)


def test_allegro_with_hidden_tokens_runs_the_stock_way() -> None:
    model, inputs = allegro(mask=True)
    inputs["attention_mask"][1, :, 4:] = 0
    for reasons in fallbacks(model, inputs):
        ((reason, count),) = reasons.items()
        assert "video tokens are masked" in reason and count == 1


def test_allegro_reads_no_mask_off_the_cpu() -> None:
    from vdit_fast.models.allegro import AllegroAdapter

    model, inputs = allegro(mask=True)
    inputs["attention_mask"] = torch.ones(2, 3, 8, 8, device="meta")  # a read would raise
    assert AllegroAdapter().simplify(model, inputs) == {}


@pytest.mark.parametrize("mmdit_layers", [0, 2])
def test_easyanimate_with_and_without_projections_for_the_text(mmdit_layers: int) -> None:
    model, inputs = easyanimate(mmdit_layers=mmdit_layers)
    same_outputs(model, inputs)
    del inputs["encoder_hidden_states_t5"]
    same_outputs(model, inputs, SERVED | {"attention": {"method": "test_band", "width": 200}})


def test_cosmos_with_image_context() -> None:
    from diffusers import CosmosTransformer3DModel

    if "img_context_dim_in" not in inspect.signature(CosmosTransformer3DModel).parameters:
        pytest.skip("this diffusers has no Cosmos 2.5")
    model, inputs = cosmos(image=True)
    same_outputs(model, inputs)
    skipped = accelerate(model).stats()["skipped"]
    assert skipped == {"cross-attention to text and image context": [f"transformer_blocks.{i}.attn2" for i in range(2)]}


def stg(**more: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda inputs: {**inputs, "spatio_temporal_guidance_blocks": [1], **more}


@pytest.mark.parametrize(
    "change",
    [
        lambda inputs: inputs,
        lambda inputs: {**inputs, "isolate_modalities": True},
        stg(),  # all items are perturbed
        stg(perturbation_mask=torch.tensor([0.0, 1.0])),
        stg(perturbation_mask=torch.ones(2)),
    ],
    ids=["plain", "isolated", "all perturbed", "one perturbed", "none perturbed"],
)
@pytest.mark.parametrize("newer", [False, True])
def test_ltx2_serves_both_streams(newer: bool, change: Any) -> None:
    model, inputs = ltx2(newer=newer)
    same_outputs(model, change(inputs))


def test_ltx2_perturbed_layers_do_not_attend() -> None:
    model, inputs = ltx2(newer=True)
    handle = accelerate(model)
    outputs(model, stg()(inputs))
    assert [layer["calls"] for layer in handle.stats()["layers"]] == [1, 1, 0, 0]


def test_ltx2_perturbation_off_the_cpu_is_not_read() -> None:
    from vdit_fast.models.ltx2 import _all_perturbed

    nothing = torch.zeros(2, 1, 1)
    assert _all_perturbed(nothing, None) and not _all_perturbed(nothing + 1, None) and not _all_perturbed(None, None)
    assert _all_perturbed(nothing, True) and not _all_perturbed(nothing, torch.tensor(False))
    assert not _all_perturbed(nothing.to("meta"), None)  # a read would raise
    # Without a look at the mask, the attention runs and the mask takes it away.
    model, inputs = ltx2(newer=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vdit_fast.models.ltx2._all_perturbed", lambda *_: False)
        same_outputs(model, stg()(inputs))


def test_ltx2_masked_video_runs_the_stock_way() -> None:
    model, inputs = ltx2()
    inputs["video_self_attention_mask"] = torch.rand(2, 48, 48).round()
    video, audio, *_ = fallbacks(model, inputs)
    assert list(video) == ["an attention mask of this form is not understood"] and not audio


def test_ltx2_planners_see_the_video_layers_only() -> None:
    model, inputs = ltx2(layers=3)
    handle = accelerate(model, Config(attention=Band(width=2, dense_layers=(-1,)), on_unsupported="error"))
    tiny.run(model, inputs)
    assert [entry[0] for entry in handle.roots[0].session.state["seen"]] == [0, 1]
    layers = handle.stats()["layers"]
    assert [layer["layer"] for layer in layers] == list(range(6))
    assert [layer["sparse_calls"] for layer in layers] == [1, 0, 1, 0, 0, 0]
    for layer in layers[1::2]:
        assert layer["name"].endswith("audio_attn1") and layer["dense"] == {"audio tokens have no video grid": 1}
    handle.reconfigure(Config(attention=Band(width=2)))
    tiny.run(model, inputs)
    assert [layer["sparse_calls"] for layer in handle.stats()["layers"]] == [1, 0] * 3


@pytest.mark.parametrize("preset", ["exact", "balanced", "fast"])
def test_ltx2_takes_the_presets(preset: str) -> None:
    model, inputs = ltx2()
    times = torch.linspace(1000, 100, 9)
    handle = accelerate(SimpleNamespace(transformer=model, scheduler=SimpleNamespace(timesteps=times)), preset)
    for t in times:
        video, audio = outputs(model, tiny.at(inputs, float(t)))
        assert video.shape == inputs["hidden_states"].shape and audio.shape == inputs["audio_hidden_states"].shape
    forecast = (handle.stats()["cache"] or {"forecast": {}})["forecast"]
    assert bool(forecast) == (preset != "exact")


def test_ltx2_text_connectors_are_left_alone() -> None:
    from vdit_fast.models.ltx2 import LTX2Adapter

    from_diffusers("LTX2VideoTransformer3DModel")
    module = ltx2()[0].transformer_blocks[0].attn1
    name = "video_connector.transformer_blocks.0.attn1"
    assert "text" in str(LTX2Adapter().skip_reason(name, module, module.processor))


@dataclass(frozen=True, kw_only=True)
class Watch(Planner):
    """Notes the queries of the first layer, and what it is told about them."""

    name: ClassVar[str] = "test_watch"

    def plan(self, q: Tensor, k: Tensor, ctx: LayerContext) -> AttentionPlan:
        if ctx.layer == 0:
            ctx.state.setdefault("seen", []).append((q.clone(), ctx))
        return AttentionPlan.from_mask(torch.ones(ctx.num_tokens, ctx.num_tokens, dtype=torch.bool), block=(8, 8))


@pytest.mark.parametrize(
    "kind",
    ["allegro", "cogvideox_5b", "cosmos_1", "easyanimate", "hunyuan_video", "ltx2", "ltx_video", "mochi", "wan_t2v"],
)
def test_geometry_says_where_every_token_is(kind: str) -> None:
    """One latent patch changes one query of the first layer, the one that the grid puts there; text changes text."""
    model, inputs = tiny.build(kind)
    inputs = tiny.regrid(inputs, (3, 4, 6))
    handle = accelerate(model, Config(attention=Watch(), on_unsupported="error"))
    tiny.run(model, inputs)
    ((before, ctx),) = handle.roots[0].session.state["seen"]
    frames, height, width = ctx.grid
    assert ctx.grid == (3, 4, 6)
    index = 2 * height * width + 1 * width + 2
    latents = inputs["hidden_states"].clone()
    if latents.ndim == 3:
        latents[:, index] += 1
    else:
        video = latents if latents.shape[2] == frames else latents.transpose(1, 2)
        video[:, :, 2, 2:4, 4:6] += 1
    tiny.run(model, {**inputs, "hidden_states": latents})
    changed = (handle.roots[0].session.state["seen"][1][0] != before).any(-1).any(-1)
    want = torch.zeros_like(changed)
    want[:, ctx.video_slice.start + index] = True
    assert torch.equal(changed, want)
    if ctx.text:
        tiny.run(model, {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"] + 1})
        changed = (handle.roots[0].session.state["seen"][2][0] != before).any(-1).any(-1)
        assert int(changed[:, ctx.text_slice].sum()) == inputs["encoder_hidden_states"].shape[:2].numel()


@pytest.mark.parametrize("builder", [ltx_video, ltx2])
def test_coordinates_instead_of_sizes_tell_no_grid(builder: Any) -> None:
    """Condition pipelines prepend tokens and give coordinates: no grid, so planners are not asked."""
    model, inputs = builder()
    frames, height, width = (inputs.pop(name) for name in ("num_frames", "height", "width"))
    axes = [torch.arange(size, dtype=torch.float32) for size in (frames, height, width)]
    coords = torch.cartesian_prod(*axes).T.expand(inputs["hidden_states"].shape[0], 3, -1)
    inputs["video_coords"] = torch.stack((coords, coords + 1), -1) if builder is ltx2 else coords
    stock = outputs(model, inputs)
    handle = accelerate(model, Config(attention=Band(width=1)))
    for got, want in zip(outputs(model, inputs), stock, strict=True):
        assert tiny.relative(got, want) < 2e-6
    assert "no known video grid" in handle.report()
