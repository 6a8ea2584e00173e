"""Sana-Video and Sana: layers that are linear by themselves run through ``linear_attention``; no planner is asked."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import torch
from families.base import from_diffusers
from families.sana import sana, sana_video
from tiny import Band
from torch import Tensor, nn

from vdit_fast import accelerate
from vdit_fast.config import Config
from vdit_fast.linear import FeatureMap, LinearAttention, SelectiveTransfer, save_feature_maps
from vdit_fast.models import linear_layers
from vdit_fast.regions.regions import Regions

KINDS = sorted(tiny.LINEAR)
REASON = "linear attention: not softmax"
NORMS = {"sana": (None, "rms_norm_across_heads"), "sana_video": ("rms_norm_across_heads", None)}
BUILD = {"sana": sana, "sana_video": sana_video}


@contextmanager
def no_narrowing(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the stock processors compute in fp64 what they take to fp32 by ``.float()``."""
    stock = Tensor.float
    with patch.context() as inside:
        inside.setattr(Tensor, "float", lambda x: x if x.dtype == torch.float64 else stock(x))
        yield


def layer_inputs(kind: str, model: Any, tokens: tuple[int, int, int] = (5, 8, 8)) -> dict[str, Any]:
    """Arguments of a self-attention module."""
    frames, height, width = tokens
    inputs: dict[str, Any] = {"hidden_states": torch.randn(2, frames * height * width, 32)}
    if kind == "sana_video":
        inputs["rotary_emb"] = model.rope(torch.empty(1, 4, frames, 2 * height, 2 * width))
    return inputs


def taken_to(inputs: dict[str, Any], dtype: torch.dtype, tables: bool) -> dict[str, Any]:
    new = {"hidden_states": inputs["hidden_states"].to(dtype)}
    if "rotary_emb" in inputs:
        new["rotary_emb"] = tuple(t.to(dtype) if tables else t for t in inputs["rotary_emb"])
    return new


@pytest.mark.parametrize("fuse", ["fast", "eager", "off"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("kind", "norm"), [(k, n) for k in KINDS for n in NORMS[k]])
def test_a_layer_is_as_exact_as_the_stock_one(
    kind: str, norm: str | None, dtype: torch.dtype, fuse: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = BUILD[kind](norm=norm)
    attn = model.transformer_blocks[1].attn1
    inputs = layer_inputs(kind, model)
    for tables in (False, True) if kind == "sana_video" else (False,):  # a model in 16 bits may have such tables
        narrow = taken_to(inputs, dtype, tables)
        with no_narrowing(monkeypatch), torch.no_grad():
            truth = copy.deepcopy(attn).to(dtype).double()(**taken_to(narrow, torch.float64, True))
        assert truth.dtype == torch.float64
        low = model.to(dtype)
        layer = low.transformer_blocks[1].attn1
        with torch.no_grad():
            stock = layer(**narrow)
            handle = accelerate(low, Config(fuse=fuse))
            got = layer(**narrow)
            handle.remove()
            assert torch.equal(layer(**narrow), stock)
        assert got.dtype == stock.dtype == dtype and got.shape == stock.shape
        own, error = tiny.relative(stock, truth), tiny.relative(got, truth)
        assert error <= own + torch.finfo(torch.float32).eps, f"error {error:.3g}, the stock layer has {own:.3g}"
        model, _ = BUILD[kind](norm=norm)
        attn = model.transformer_blocks[1].attn1


def test_denominators_do_not_overflow_in_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stock layer sums the keys of the denominator in fp16, and draws zeros where that is infinite."""
    model, _ = sana_video(norm=None)
    attn = model.transformer_blocks[0].attn1
    attn.to_k.weight.data.mul_(600)
    inputs = layer_inputs("sana_video", model)
    narrow = taken_to(inputs, torch.float16, False)
    with no_narrowing(monkeypatch), torch.no_grad():
        truth = copy.deepcopy(attn).half().double()(**taken_to(narrow, torch.float64, True))
    model.half()
    with torch.no_grad():
        lost = attn(**narrow)
        accelerate(model)
        assert tiny.relative(lost, truth) > 0.1
        assert tiny.relative(attn(**narrow), truth) < 16 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_served_is_told(kind: str) -> None:
    model, inputs = tiny.build(kind, layers=3)
    handle = accelerate(model)
    tiny.run(model, inputs)
    stats = handle.stats()
    assert stats["linear"] == {"transformer": [0, 1, 2]}
    assert stats["skipped"] == {"cross-attention": [f"transformer_blocks.{i}.attn2" for i in range(3)]}
    for row in stats["layers"]:
        assert (row["family"], row["calls"], row["sparse_calls"], row["mean_density"]) == ("sana", 1, 0, None)
        assert not row["dense"] and not row["fallbacks"] and row["attention_seconds"] > 0
    report = handle.report()
    assert "linear attention: 3 of 3 layers of transformer: 0, 1, 2" in report
    assert "3 x cross-attention" in report and "fallback" not in report
    handle.reconfigure(Config(fuse="off"))
    assert handle.stats()["linear"] == {"transformer": [0, 1, 2]}
    twin = copy.deepcopy(model)
    assert accelerate(twin, Config(fuse="off")).stats()["linear"] == {"transformer": [0, 1, 2]}


@pytest.mark.parametrize("kind", KINDS)
def test_no_planner_is_asked(kind: str) -> None:
    class Never(Band):
        def plan(self, q: Tensor, k: Tensor, ctx: Any) -> Any:
            raise AssertionError("there is no softmax")

    model, inputs = tiny.build(kind)
    exact = accelerate(model)
    want = tiny.run(model, inputs)
    exact.remove()
    handle = accelerate(model, Config(attention=Never(), on_unsupported="error"))
    assert torch.equal(tiny.run(model, inputs), want)
    assert all(row["dense"] == {REASON: 1} and not row["sparse_calls"] for row in handle.stats()["layers"])
    assert REASON in handle.report()
    handle.reconfigure("balanced")
    tiny.run(model, inputs)
    assert all(row["dense"] == {REASON: 1} for row in handle.stats()["layers"])


def test_the_operator_runs_with_separate_denominators(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    stock = linear_layers.linear_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.append({"q": q, "k": k, **options})
        return stock(q, k, v, **options)

    monkeypatch.setattr(linear_layers, "linear_attention", spy)
    model, inputs = sana_video()
    accelerate(model)
    tiny.run(model, inputs)
    assert len(seen) == 2
    for call in seen:
        assert call["feature_map"] == "identity" and call["q"].shape == call["q_den"].shape == (2, 48, 2, 16)
        assert (call["q_den"] >= 0).all() and (call["k_den"] >= 0).all() and (call["q"] < 0).any()
        pairs = [x.unflatten(-1, (-1, 2)).norm(dim=-1) for x in (call["q"], call["q_den"])]  # rotated, and nothing else
        torch.testing.assert_close(*pairs)
    seen.clear()
    model, inputs = sana()
    accelerate(model)
    tiny.run(model, inputs)
    assert [(call["feature_map"], call["q_den"]) for call in seen] == [("relu", None)] * 2


def test_timesteps_per_token() -> None:
    """Sana-Video's image pipeline gives the first frame the timestep 0, as a grid [B, 1, F, H, W]."""
    model, inputs = sana_video()
    times = torch.full((2, 1, 3, 4, 4), 700.0)
    times[:, :, 0] = 0
    inputs = {**inputs, "timestep": times}
    stock, even = tiny.run(model, inputs), tiny.run(model, {**inputs, "timestep": torch.full((2,), 700.0)})
    assert tiny.relative(stock, even) > 1e-3
    handle = accelerate(model)
    assert tiny.relative(tiny.run(model, inputs), stock) < 5e-6
    session = handle.roots[0].session
    assert session.forward is not None and session.forward._distinct is not None
    assert len(session.forward._distinct[0]) == 4 and not handle.stats()["fused"]["unfused"]
    handle.remove()
    cache = {"method": "taylorseer", "granularity": "module", "first_full": 1, "interval": 2, "order": 0}
    cached = accelerate(model, {"cache": {**cache, "last_full": 0}})
    made = [tiny.run(model, {**inputs, "timestep": times * part}) for part in (1, 0.999999)]
    assert cached.stats()["cache"]["forecast"] == {1: 1} and tiny.relative(made[1], made[0]) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_without_cross_attention(kind: str) -> None:
    model, inputs = tiny.build(kind)
    for block in model.transformer_blocks:
        block.attn2 = None
    stock = tiny.run(model, inputs)
    handle = accelerate(model)
    assert tiny.relative(tiny.run(model, inputs), stock) < 5e-6 and not handle.stats()["fused"]["unfused"]


@pytest.mark.parametrize("granularity", ["model", "span", "block", "module"])
@pytest.mark.parametrize("kind", KINDS)
def test_caches_of_every_granularity(kind: str, granularity: str) -> None:
    """What is kept at order 0 is the last step's: a forecast with the same timestep is that step again."""
    model, inputs = tiny.build(kind)
    cache = {"method": "taylorseer", "granularity": granularity, "order": 0, "first_full": 1, "interval": 2}
    handle = accelerate(model, {"cache": {**cache, "last_full": 0}, "fuse": "eager"})
    first, again = (tiny.run(model, tiny.at(inputs, t)) for t in (700.0, 699.999))
    stats = handle.stats()["cache"]
    assert stats["granularity"] == granularity and sum(stats["forecast"].values()) == 1
    assert tiny.relative(again, first) < 1e-4
    assert all(row["calls"] == 1 for row in handle.stats()["layers"])
    handle.remove()
    stock = tiny.run(model, tiny.at(inputs, 699.999))
    assert tiny.relative(again, stock) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(kind: str, checkpointing: bool) -> None:
    model, inputs = tiny.build(kind)
    model.requires_grad_()
    want = tiny.gradients(model, [inputs, tiny.at(inputs, 300.0)])
    handle = accelerate(model, {"attention": {"method": "test_band"}})
    if checkpointing:
        model.enable_gradient_checkpointing()
    tiny.same_gradients(tiny.gradients(model, [inputs, tiny.at(inputs, 300.0)]), want)
    assert all(row["calls"] == 2 for row in handle.stats()["layers"])  # recomputation does not count


@pytest.mark.parametrize("kind", KINDS)
def test_text_keys_once_per_prompt(kind: str) -> None:
    model, inputs = tiny.build(kind)
    accelerate(model).remove()
    handle = accelerate(model)
    plain = [tiny.run(model, tiny.at(inputs, t)) for t in (900.0, 500.0)]
    handle.reconfigure(Config(text_kv=True))
    got = [tiny.run(model, tiny.at(inputs, t)) for t in (900.0, 500.0)]
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))
    text = handle.stats()["text_kv"]
    assert (text["computed"], text["reused"], text["refused"]) == (2, 2, {})
    inputs = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"].flip(0)}
    want = tiny.run(model, tiny.at(inputs, 300.0))
    handle.reconfigure("exact")
    assert torch.equal(tiny.run(model, tiny.at(inputs, 300.0)), want)


def test_positions_turn_the_numerator() -> None:
    model, inputs = sana_video()
    stock = tiny.run(model, inputs)
    turned = lambda step, geometry, tables: tuple(table.flip(1) for table in tables)  # noqa: E731
    handle = accelerate(model).positions(turned)
    got = tiny.run(model, inputs)
    assert tiny.relative(got, stock) > 1e-4
    for processor in handle.roots[0].processors().values():
        processor.stands_aside = lambda *args, **kwargs: True  # type: ignore[method-assign]
    assert tiny.relative(got, tiny.run(model, inputs)) < 5e-6
    image, _ = sana()
    with pytest.raises(RuntimeError, match="takes rotary tables"):
        accelerate(image).positions(turned)


@pytest.mark.parametrize("kind", KINDS)
def test_double_precision_runs_the_stock_way(kind: str) -> None:
    model, inputs = tiny.build(kind)
    model, inputs = model.double(), tiny.cast(inputs, torch.float64)
    stock = tiny.run(model, inputs)
    handle = accelerate(model)
    assert torch.equal(tiny.run(model, inputs), stock)
    assert all(row["fallbacks"] == {"dtype float64 has no kernel": 1} for row in handle.stats()["layers"])


def test_what_reads_masks_or_further_keys_is_refused(tmp_path: Any) -> None:
    (model, _), (other, _) = sana_video(), tiny.wan()
    handle = accelerate(model)
    with pytest.raises(RuntimeError, match="memory: attention of family 'sana' is linear"):
        handle.memory(torch.randn(3, 32))
    with pytest.raises(RuntimeError, match="capture: attention of family 'sana' is linear"):
        handle.capture()
    with pytest.raises(RuntimeError, match="feed: attention of family 'sana' is linear"):
        handle.feed(accelerate(other).capture(), mode="sum")
    with pytest.raises(RuntimeError, match=r"regions: self-attention of family 'sana' is linear"):
        handle.regions(Regions([(0, 0, 2, 2)] * 3, position_steps=2))
    with pytest.raises(ValueError, match=r"layers: \[1\] of family 'sana' are linear by themselves"):
        SelectiveTransfer([1], heads=2, head_dim=16, target=1).attach(handle)
    handle.remove()
    name = "transformer_blocks.0.attn1"
    maps = {"transformer": {0: FeatureMap(name, torch.eye(16).repeat(2, 1, 1), torch.eye(16).repeat(2, 1, 1))}}
    path = save_feature_maps(tmp_path / "maps.safetensors", maps, family="sana", num_layers=2)
    with pytest.raises(ValueError, match="is linear attention already; set linear to null"):
        accelerate(model, Config(linear=LinearAttention(str(path))))
    assert not tiny.served(model)


def test_keys_of_another_sequence_and_masks_run_the_stock_way() -> None:
    model, _ = sana_video()
    attn, inputs = model.transformer_blocks[0].attn1, layer_inputs("sana_video", model, (2, 4, 4))
    other = torch.randn(2, 32, 32)
    with torch.no_grad():
        stock = attn(**inputs, encoder_hidden_states=other)
        handle = accelerate(model)
        assert torch.equal(attn(**inputs, encoder_hidden_states=other), stock)
    assert handle.stats()["layers"][0]["fallbacks"] == {"keys of another sequence": 1}


def test_hooks_behind_the_sums() -> None:
    model, inputs = sana_video()
    stock = tiny.run(model, inputs)
    handle = accelerate(model)
    seen = []

    def look(step: Any, place: Any, rows: Any) -> None:
        seen.append((place.name, place.grid, tuple(rows.video.shape), rows.context))
        with pytest.raises(RuntimeError, match="is linear and has no attention over a plan"):
            rows.attend(None)

    with handle.hook("attention_heads", look):
        assert tiny.relative(tiny.run(model, inputs), stock) < 5e-6
    assert seen == [(f"transformer_blocks.{i}.attn1", (3, 4, 4), (2, 48, 2, 16), None) for i in range(2)]
    with handle.hook("attention_heads", lambda step, place, rows: torch.zeros_like(rows.video), layers=[0]):
        assert tiny.relative(tiny.run(model, inputs), stock) > 1e-3


def test_whole_model_compiled() -> None:
    torch._dynamo.reset()
    model, inputs = sana_video()
    handle = accelerate(model)
    want = tiny.run(model, inputs)
    compiled: nn.Module = torch.compile(model, backend="eager")  # type: ignore[assignment]
    assert tiny.relative(tiny.run(compiled, inputs), want) < 5e-6
    assert all(row["calls"] == 2 for row in handle.stats()["layers"])
    torch._dynamo.reset()


def test_the_older_diffusers_have_the_image_model_only() -> None:
    import diffusers

    assert hasattr(diffusers, "SanaTransformer2DModel")
    if not diffusers.__version__.startswith("0.35."):
        assert from_diffusers("SanaVideoTransformer3DModel") is not None
