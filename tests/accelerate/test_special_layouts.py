"""What single families have that others do not: masks, history tokens, block-causal frames, scales, grouped heads."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from families.hunyuan_video import framepack, hunyuan
from families.hunyuan_video15 import hunyuan15
from families.lumina_next import lumina_next
from families.skyreels_v2 import skyreels
from families.wan import chronoedit
from planner_settings import PLANNERS, config, plugged
from tiny import Band
from torch import Tensor, nn

from vdit_fast import reference
from vdit_fast.accelerate import accelerate
from vdit_fast.config import Config
from vdit_fast.context import LayerContext
from vdit_fast.models import served
from vdit_fast.models.session import Geometry
from vdit_fast.plan import AttentionPlan


class Seen(Band):
    """Notes what planners are told."""

    def plan(self, q: Tensor, k: Tensor, ctx: LayerContext) -> AttentionPlan:
        ctx.state.setdefault("contexts", []).append((ctx, q.clone(), k.clone()))
        return super().plan(q, k, ctx)


def contexts(model: nn.Module, inputs: dict[str, Any]) -> list[tuple[LayerContext, Tensor, Tensor]]:
    handle = accelerate(model, Config(attention=Seen(width=3), on_unsupported="error"))
    tiny.run(model, inputs)
    seen: list[tuple[LayerContext, Tensor, Tensor]] = handle.roots[0].session.state["contexts"]
    handle.remove()
    return seen


def watch(module: nn.Module) -> list[Any]:
    """The outputs of a module, from now on."""
    outputs: list[Any] = []
    module.register_forward_hook(lambda *call: outputs.append(call[2]))
    return outputs


# ---------------------------------------------------------------------- HunyuanVideo-1.5
def test_no_mask_of_n_by_n_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = hunyuan15()
    sizes: list[int] = []
    stock = torch.Tensor.repeat

    def repeat(x: Tensor, *times: int) -> Tensor:
        out = stock(x, *times)
        sizes.append(out.numel())
        return out

    monkeypatch.setattr(torch.Tensor, "repeat", repeat)
    mask = 2 * (48 + 9 + 4 + 3) ** 2
    tiny.run(model, inputs)
    assert sizes.count(mask) == 2, "the stock blocks make one each"
    sizes.clear()
    accelerate(model)
    tiny.run(model, inputs)
    assert mask not in sizes


@pytest.mark.parametrize("image", [False, True], ids=["t2v", "i2v"])
def test_every_text_stream_counts(image: bool) -> None:
    model, inputs = hunyuan15(image=image)
    ((ctx, _, _), _) = contexts(model, inputs)
    assert (ctx.grid, ctx.n_video, ctx.text, ctx.text_first) == ((3, 4, 4), 48, 9 + 4 + 3, False)
    assert ctx.kv_len is not None
    assert ctx.kv_len.tolist() == [48 + 5 + 0 + 3 * image, 48 + 9 + 3 + 3 * image]


def test_joint_blocks_agree_in_all_rows_also_the_padded() -> None:
    model, inputs = hunyuan15()
    outputs = watch(model.transformer_blocks[0].attn)
    tiny.run(model, inputs)
    accelerate(model)
    tiny.run(model, inputs)
    for got, want in zip(outputs[1], outputs[0], strict=True):
        assert tiny.relative(got, want) < 1e-5


def test_a_mask_with_holes_runs_the_stock_way() -> None:
    model, _ = hunyuan15()
    attn = model.transformer_blocks[0].attn
    video, text = torch.randn(1, 48, 32), torch.randn(1, 6, 32)
    mask = torch.tensor([[True, False, True, True, False, False]])
    with torch.no_grad():
        want = attn(video, text, mask)
        handle = accelerate(model)
        got = attn(video, text, mask)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert handle.stats()["layers"][0]["fallbacks"] == {"an attention mask of this form is not understood": 1}


# ---------------------------------------------------------------------- Framepack
HISTORY = 2 * 16 + 4 + 2


def test_history_is_behind_the_video_for_planners() -> None:
    for lengths, text in (((5, 9), 9 + 3), ((5,), 5 + 3)):  # one clip: the model cuts the padding off
        model, inputs = framepack(lengths=lengths)
        outputs = watch(model.transformer_blocks[0].attn.norm_q)
        seen = contexts(model, inputs)
        for ctx, q, _ in seen:
            assert (ctx.grid, ctx.n_video, ctx.text, ctx.text_first) == ((3, 4, 4), 48, HISTORY + text, False)
            assert ctx.num_tokens == q.shape[1]
        told, own = seen[0][1].norm(dim=-1), outputs[0].norm(dim=-1)  # RoPE keeps the norm, but for averaged tables
        assert torch.allclose(told[:, :48], own[:, HISTORY:], rtol=1e-4)
        assert torch.allclose(told[:, 48 + 6 : 48 + HISTORY], own[:, 6:HISTORY], rtol=1e-4)


def test_the_band_of_a_clip_with_history_is_the_masked_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked against attention in the model's own order with a mask written for it."""
    model, inputs = framepack()
    handle = accelerate(model, Config(attention=Band(width=4)))
    got = tiny.run(model, inputs)
    assert all(0 < layer["mean_density"] < 1 for layer in handle.stats()["layers"])
    from vdit_fast.models import session

    def masked(self: Any, layer: int, q: Tensor, k: Tensor, v: Tensor, kv_len: Any, *_: Any) -> Tensor:
        place = torch.arange(q.shape[1]) - HISTORY
        mask = (place[:, None] - place).abs() <= 4
        dense = (place < 0) | (place >= 48)
        plan = AttentionPlan.from_mask(mask | dense | dense[:, None], block=(8, 8))
        out = reference.attention(q, k, v, plan, kv_len=kv_len)
        assert isinstance(out, Tensor)
        return out

    monkeypatch.setattr(session.Session, "attend", masked)
    assert tiny.relative(got, tiny.run(model, inputs)) < 1e-5


@pytest.mark.parametrize("planner", PLANNERS)
def test_every_planner_with_history(planner: str) -> None:
    model, inputs = framepack()
    stock = tiny.run(model, tiny.at(inputs, 700))
    handle = plugged(model, config(planner))
    for t in (900.0, 700.0):
        out = tiny.run(model, tiny.at(inputs, t))
    assert out.isfinite().all() and tiny.relative(out, stock) < 1
    assert not any(layer["fallbacks"] for layer in handle.stats()["layers"])


def test_gradients_with_history_and_checkpointing() -> None:
    model, inputs = framepack()
    model.requires_grad_(True).train()
    runs = [tiny.at(inputs, 900), tiny.at(inputs, 500)]
    handle = accelerate(model, Config(attention=Band(width=1)))
    plain = tiny.gradients(model, runs)
    handle.reset()
    model.enable_gradient_checkpointing()
    tiny.same_gradients(tiny.gradients(model, runs), plain)


def test_without_history() -> None:
    model, inputs = framepack()
    for name in list(inputs):
        if name.startswith(("latents_history", "indices_latents_history")):
            inputs[name] = None
    model.clean_x_embedder = None  # of a model without one the forward cannot run: geometry is asked alone
    session = accelerate(model).roots[0]
    geometry = session.adapter.geometry(model, inputs)
    assert geometry is not None and geometry.history == 32 and geometry.text == 12
    assert session.adapter.geometry(model, {**inputs, "image_embeds": None}) is None


# ---------------------------------------------------------------------- variants of families tested elsewhere
VARIANTS = {
    "chronoedit": (chronoedit, (2, 4, 4)),
    "hunyuan_latent_concat": (lambda: hunyuan(image_condition_type="latent_concat"), (3, 4, 4)),
    "skyreels_i2v": (lambda: skyreels(image=True), (4, 4, 4)),
    "skyreels_t2v": (skyreels, (4, 4, 4)),
}


@pytest.mark.parametrize("kind", VARIANTS)
def test_variants_are_exact_and_their_grids_known(kind: str) -> None:
    builder, grid = VARIANTS[kind]
    model, inputs = builder()
    truth = tiny.run(copy.deepcopy(model).double(), tiny.cast(inputs, torch.float64))
    eager = tiny.run(model, inputs)
    handle = accelerate(model, {"on_unsupported": "error"})
    tiny.exact_enough(tiny.run(model, inputs), eager, truth)
    assert [layer["calls"] for layer in handle.stats()["layers"]] == [1, 1]
    handle.remove()
    assert {ctx.grid for ctx, _, _ in contexts(model, inputs)} == {grid}


# ---------------------------------------------------------------------- SkyReels-V2
@pytest.mark.parametrize("frame_block", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_autoregressive_mask_becomes_a_plan(frame_block: int, dtype: torch.dtype) -> None:
    model, inputs = skyreels(frame_block=frame_block)
    model, inputs = model.to(dtype), tiny.cast(inputs, dtype)
    truth = tiny.run(copy.deepcopy(model).double(), tiny.cast(inputs, torch.float64))
    eager = tiny.run(model, inputs)
    for attention in (None, Band(width=3)):
        handle = accelerate(model, Config(attention=attention, on_unsupported="error"))
        for t in (500, 400):
            got = tiny.run(model, tiny.at(inputs, t))
            if t == 500:
                tiny.exact_enough(got, eager, truth)
        for layer in handle.stats()["layers"]:
            blocks = 4 // frame_block
            assert layer["mean_density"] == pytest.approx((blocks + 1) / 2 / blocks) and layer["sparse_calls"] == 2
            assert bool(layer["unasked"]) == (attention is not None) and not layer["dense"]
        handle.remove()


def test_later_frames_do_not_reach_earlier_blocks() -> None:
    model, inputs = skyreels(frame_block=2)
    accelerate(model)
    first = tiny.run(model, inputs)
    inputs["hidden_states"][:, :, 2:] += 1
    second = tiny.run(model, tiny.at(inputs, 500))
    assert tiny.relative(second[:, :, :2], first[:, :, :2]) < 1e-6
    assert tiny.relative(second[:, :, 2:], first[:, :, 2:]) > 1e-2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_the_autoregressive_model(checkpointing: bool) -> None:
    model, inputs = skyreels(frame_block=2)
    model.requires_grad_(True).train()
    stock = tiny.gradients(model, [inputs])
    accelerate(model)
    if checkpointing:
        model.enable_gradient_checkpointing()
    tiny.same_gradients(tiny.gradients(model, [inputs]), stock)


@pytest.mark.parametrize("where", ["block", "hook", "fp64"])
def test_another_mask_than_the_configured_one_is_obeyed_and_reported(where: str) -> None:
    model, inputs = skyreels(frame_block=2)
    mask, hidden = torch.rand(1, 1, 64, 64) < 0.5, torch.randn(1, 64, 32)
    if where == "hook":  # a mask that comes up inside of the forward
        model.blocks[1].register_forward_pre_hook(lambda block, args: (*args[:4], mask))
    if where == "fp64":
        model, inputs = model.double(), tiny.cast(inputs, torch.float64)

    def call() -> Tensor:
        if where != "block":
            return tiny.run(model, inputs)
        with torch.no_grad():  # outside of a forward nobody knows the frames
            out: Tensor = model.blocks[1].attn1(hidden, attention_mask=mask)
        return out

    want = call()
    handle = accelerate(model)
    assert tiny.relative(call(), want) < 1e-6
    ((reason, number),) = handle.stats()["layers"][1]["fallbacks"].items()
    assert number == 1 and ("dtype" if where == "fp64" else "mask of this form") in reason


def test_the_autoregressive_blocks_share_two_graphs() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, inputs = skyreels(layers=9, frame_block=2)
    handle = accelerate(model, {"on_unsupported": "error"})
    eager = tiny.run(model, inputs)
    for block in model.blocks:
        block.compile(fullgraph=True, backend="eager")
    assert tiny.relative(tiny.run(model, inputs), eager) < 1e-5
    # The transformer hands its first block a transposed view, and fused blocks return contiguous rows.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert handle.stats()["layers"][8]["sparse_calls"] == 2
    torch._dynamo.reset()


# ---------------------------------------------------------------------- Lumina-Next
@pytest.mark.parametrize("base", [None, 4, 4096])
def test_proportional_attention(base: int | None) -> None:
    model, inputs = lumina_next(base=base)
    stock = tiny.run(model, inputs)
    handle = accelerate(model, {"on_unsupported": "error"})
    assert tiny.relative(tiny.run(model, inputs), stock) < 2e-6
    handle.remove()
    model, plain = lumina_next(base=None)
    if base is not None:
        assert tiny.relative(tiny.run(model, plain), stock) > 1e-4, "the scale must matter"


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_planners_get_the_scale_and_grouped_heads(kv_heads: int) -> None:
    model, inputs = lumina_next(base=4, kv_heads=kv_heads)
    scaled = contexts(model, inputs)
    plain = contexts(model, {**inputs, "cross_attention_kwargs": {}})
    (ctx, q, k), (_, q_plain, k_plain) = scaled[0], plain[0]
    assert ctx.grid == (1, 6, 8) and ctx.text == 0 and k.shape[2] == kv_heads and q.shape[2] == 4
    factor = torch.tensor(48.0).log().div(torch.tensor(4.0).log()).sqrt()
    assert torch.equal(k, k_plain) and torch.allclose(q, q_plain * factor, rtol=1e-5)


def test_no_kernel_for_double_precision_keeps_scale_and_groups() -> None:
    model, inputs = lumina_next(base=4)
    model, inputs = model.double(), tiny.cast(inputs, torch.float64)
    stock = tiny.run(model, inputs)
    handle = accelerate(model)
    assert tiny.relative(tiny.run(model, inputs), stock) < 1e-12
    assert "dtype float64 has no kernel" in handle.stats()["layers"][0]["fallbacks"]


# ---------------------------------------------------------------------- compiled
@pytest.mark.parametrize(
    # As many graphs as the stock blocks need; one more where the first block's tokens are a transposed view, whose
    # strides elementwise operators hand on from block to block and fused ones do not.
    ("kind", "sizes", "blocks", "expected"),
    [
        ("hunyuan_framepack", {"layers": 1, "single": 9}, ["transformer_blocks", "single_transformer_blocks"], 3),
        ("hunyuan_video15", {"layers": 10}, ["transformer_blocks"], 2),
        ("lumina_next", {"layers": 10}, ["layers"], 1),
    ],
)
def test_ten_layers_share_one_graph(kind: str, sizes: dict[str, int], blocks: list[str], expected: int) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, inputs = tiny.build(kind, **sizes)
    handle = accelerate(model, Config(attention=Band(width=3)))
    eager = [tiny.run(model, tiny.at(inputs, t)) for t in (900, 500)]
    handle.reset()
    for name in blocks:
        for block in getattr(model, name):
            block.compile(fullgraph=True, backend="eager")
    for want, t in zip(eager, (900, 500), strict=True):
        assert tiny.relative(tiny.run(model, tiny.at(inputs, t)), want) < 1e-5
    assert all(layer["sparse_calls"] == 4 for layer in handle.stats()["layers"])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == expected
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "geometry", [None, Geometry((2, 3, 4)), Geometry((1, 3, 4), 5, True), Geometry((1, 1, 2), None, False, 7, 3)]
)
def test_a_compiled_forward_notes_the_same_layout(geometry: Geometry | None) -> None:
    assert served._geometry(served._layout(geometry)) == geometry
