"""GSFixer: Improving 3D Gaussian Splatting with Reference-Guided Video Diffusion Priors (arXiv 2508.09667).

A CogVideoX whose sequence is [226 text, R reference rows, video]: features of reference views (2-D ones of DINOv2, 3-D
ones of VGGT), projected by the paper's own layers, run with the text. They are conditions and must never be sparsified.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from planner_settings import GRID, PLANNERS, TIMES, config, plugged, setting
from torch import Tensor, nn

import vdit_fast
from vdit_fast.accelerate import accelerate
from vdit_fast.caching import TaylorSeer
from vdit_fast.config import Config

pytest.importorskip("diffusers")

TEXT = 226
R = 37  # no multiple of 16, and neither is 226 + 37


class WithReferences(nn.Module):
    """A patch embedding that puts the rows between text and video: the stock model then runs the paper's sequence. The
    text comes in longer, as the stock forward takes its length from it."""

    def __init__(self, inner: Any, rows: Tensor) -> None:
        super().__init__()
        self.inner, self.rows = inner, rows

    def forward(self, text: Tensor, video: Tensor) -> Tensor:
        length = text.shape[1] - self.rows.shape[1]
        x = self.inner(text[:, :length], video)
        rows = self.rows.to(x).expand(x.shape[0], -1, -1)
        return torch.cat([x[:, :length], rows, x[:, length:]], dim=1)


def build(grid: tuple[int, int, int] = GRID, **kw: Any) -> tiny.Built:
    model, inputs = tiny.build("cogvideox_5b", **kw)
    inputs = tiny.regrid(inputs, grid)
    inputs["encoder_hidden_states"] = torch.randn(inputs["hidden_states"].shape[0], TEXT, 16)
    return model, inputs


def stock(model: nn.Module, inputs: dict[str, Any], rows: Tensor) -> Tensor:
    model = copy.deepcopy(model)
    model.patch_embed = WithReferences(model.patch_embed, rows)
    longer = nn.functional.pad(inputs["encoder_hidden_states"], (0, 0, 0, rows.shape[1]))
    return tiny.run(model, {**inputs, "encoder_hidden_states": longer})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, R, 64])
def test_same_as_the_stock_model_with_rows_behind_the_text(length: int, dtype: torch.dtype) -> None:
    model, inputs = build((3, 4, 4))
    rows = torch.randn(2, length, 32)  # batch items that differ
    truth = stock(tiny.double(model), tiny.cast(inputs, torch.float64), rows.double())
    model, inputs, rows = model.to(dtype), tiny.cast(inputs, dtype), rows.to(dtype)
    eager, plain = stock(model, inputs, rows), tiny.run(model, inputs)
    handle = accelerate(model, Config(fuse="eager")).references(rows)
    tiny.exact_enough(tiny.run(model, inputs), eager, truth)
    assert tiny.relative(eager, plain) > 1e-3
    assert f"references: {length} rows" in handle.report()
    handle.references(None)
    without = tiny.run(model, inputs)
    assert tiny.relative(without, plain) < (1e-5 if dtype == torch.float32 else 2e-2)
    handle.references(rows)
    handle.remove()
    assert torch.equal(tiny.run(model, inputs), plain)


@pytest.mark.parametrize("way", ["references", "encoder_hidden_states"])
@pytest.mark.parametrize("planner", PLANNERS)
def test_reference_rows_are_never_sparsified(planner: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the planner leaves out, every query reads all text and reference rows, and these read every key; the
    answer is masked dense attention. Rows of the text encoder's width may come as part of the text: the grid says what
    is video."""
    model, inputs = build()
    handle = plugged(model, config(planner))
    if way == "references":
        handle.references(torch.randn(R, 32))
    else:
        inputs["encoder_hidden_states"] = torch.randn(2, TEXT + R, 16)
    context, sparse = TEXT + R, 0

    def checked(q: Tensor, k: Tensor, v: Tensor, plan: Any = None, **options: Any) -> Any:
        nonlocal sparse
        result = vdit_fast.attention(q, k, v, plan, **options)
        if plan is not None:
            mask = plan.to_mask()
            assert k.shape[1] == context + 5 * 7 * 9 and mask.shape[-1] == k.shape[1]
            assert mask[..., :context].all() and mask[..., :context, :].all() and not mask.all()
            if options.get("row_scale") is None and plan.stand_ins is None:
                out = result[0] if isinstance(result, tuple) else result
                want = nn.functional.scaled_dot_product_attention(
                    *(x.double().transpose(1, 2) for x in (q, k, v)), attn_mask=mask
                )
                assert tiny.relative(out, want.transpose(1, 2)) < 1e-5
            sparse += 1
        return result

    monkeypatch.setattr("vdit_fast.models.heads.attention", checked)
    for t in TIMES:
        assert tiny.run(model, tiny.at(inputs, t)).isfinite().all()
    assert sparse > 0 and not any(layer["fallbacks"] for layer in handle.stats()["layers"])


@pytest.mark.parametrize("planner", PLANNERS)
def test_the_loosest_planner_is_the_dense_model(planner: str) -> None:
    loose = setting(planner).loose
    if loose is None:
        pytest.skip("no knob of this planner keeps everything")
    model, inputs = build((3, 4, 6))
    rows = torch.randn(1, R, 32)
    want = [stock(model, tiny.at(inputs, t), rows) for t in TIMES]
    plugged(model, config(planner, **loose)).references(rows)
    for t, dense in zip(TIMES, want, strict=True):
        assert tiny.relative(tiny.run(model, tiny.at(inputs, t)), dense) < 1e-4


def test_hooks_see_the_references_behind_the_text() -> None:
    model, inputs = build((3, 4, 4))
    rows, seen = torch.randn(1, R, 32), []
    twin = copy.deepcopy(model)
    twin.transformer_blocks[0].register_forward_hook(lambda module, args, output: seen.append(output[1]))
    stock(twin, inputs, rows)
    handle = accelerate(model).references(rows)
    handle.hook("block_output", lambda step, place, rows: seen.append(rows.context), layers=0)
    tiny.run(model, inputs)
    assert seen[0].shape == (2, TEXT + R, 32) and tiny.relative(seen[1], seen[0]) < 1e-5


@pytest.mark.parametrize(("kind", "channels"), [("cogvideox_2b", 32), ("consisid", 48)])
def test_relatives(kind: str, channels: int) -> None:
    """CogVideoX 2B adds a table of exactly its text length and the video's: rows can enter behind it only. ConsisID
    joins both streams again behind the blocks: there the rows must have left."""
    model, inputs = tiny.build(kind)
    rows = torch.randn(1, R, channels)
    want = stock(model, inputs, rows)
    accelerate(model).references(rows)
    assert tiny.relative(tiny.run(model, inputs), want) < 1e-5


@pytest.mark.parametrize("granularity", ["span", "block", "module"])
def test_caches_see_the_longer_text(granularity: Any) -> None:
    """A forecast block returns reference rows too; other rows begin anew."""
    model, inputs = build((3, 4, 4), layers=3)
    policy = TaylorSeer(granularity=granularity, first_full=1, last_full=0, interval=9, min_steps=1, order=0)
    handle = accelerate(model, Config(cache=policy)).references(torch.randn(R, 32))
    want = tiny.run(model, tiny.at(inputs, 900.0))
    got = tiny.run(model, tiny.at(inputs, 890.0))
    assert handle.stats()["cache"]["forecast"] == {1: 1} and tiny.relative(got, want) < 0.2
    handle.references(torch.randn(R, 32))
    tiny.run(model, tiny.at(inputs, 880.0))
    assert handle.stats()["cache"]["forecast"] == {1: 1}


def test_refusals() -> None:
    model, inputs = build((3, 4, 4))
    handle = accelerate(model)
    with pytest.raises(TypeError, match="floating tensor"):
        handle.references(torch.ones(3, 32, dtype=torch.int64))
    with pytest.raises(ValueError, match="not empty"):
        handle.references(torch.ones(0, 32))
    handle.references(torch.randn(R, 16))
    with pytest.raises(ValueError, match=r"pass \[R, 32\]"):
        tiny.run(model, inputs)
    other, _ = tiny.wan()
    with pytest.raises(RuntimeError, match="'wan': reference rows stand behind the text"):
        accelerate(other).references(torch.randn(R, 32))
    handle.remove()
    with pytest.raises(RuntimeError, match="was removed"):
        handle.references(torch.randn(R, 32))
