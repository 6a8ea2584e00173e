"""FreeLong: Training-Free Long Video Generation with SpectralBlend Temporal Attention (arXiv 2407.19918).

In temporal attention the same queries, keys and values attend over the whole clip and over a window of 16 frames; of
the first the low frequencies over time, height and width are kept, of the second the high ones.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from vdit_fast.accelerate import accelerate
from vdit_fast.config import Config
from vdit_fast.hooks import SpectralBlend
from vdit_fast.hooks.spectral_blend import low_pass, spectral_blend, temporal_window
from vdit_fast.models.heads import HeadsCall
from vdit_fast.planners import Draft

pytest.importorskip("diffusers")

GRIDS = [(12, 6, 8), (12, 5, 8), (7, 5, 3), (1, 2, 2), (4, 1, 1), (2, 3, 1)]
"""Even and odd sizes along each axis; 5 x 8 is a level of the paper's UNet."""


def centred_filter(grid: tuple[int, int, int], cutoff: float = 0.25) -> Tensor:
    """The authors' filter on a centred spectrum, moved to the transform's own order."""
    axes = [((2 * torch.arange(n, dtype=torch.float64) / n - 1) / cutoff).square() for n in grid]
    square = axes[0][:, None, None] + axes[1][None, :, None] + axes[2]
    return torch.fft.ifftshift(torch.exp(-0.5 * square))


def three_transforms(whole: Tensor, local: Tensor) -> Tensor:
    """The authors' form: complex transforms of both, the imaginary part of the inverse dropped. [F, H, W, C]."""
    keep = centred_filter(tuple(whole.shape[:3]))[..., None]  # type: ignore[arg-type]
    spectra = (torch.fft.fftn(x.double(), dim=(0, 1, 2)) for x in (whole, local))
    high, low = (part * spectrum for part, spectrum in zip((keep, 1 - keep), spectra, strict=True))
    return torch.fft.ifftn(high + low, dim=(0, 1, 2))


def pair(grid: tuple[int, int, int], channels: int = 3) -> tuple[Tensor, Tensor]:
    whole, local = torch.randn(2, *grid, channels, dtype=torch.float64)
    return whole, local


def blended(whole: Tensor, local: Tensor, cutoff: float = 0.25) -> Tensor:
    return spectral_blend(whole, local, low_pass(tuple(whole.shape[:3]), cutoff, cutoff))  # type: ignore[arg-type]


@pytest.mark.parametrize("grid", GRIDS)
def test_equal_attentions_blend_to_themselves(grid: tuple[int, int, int]) -> None:
    """F1a."""
    whole, _ = pair(grid)
    torch.testing.assert_close(blended(whole, whole), whole, atol=1e-12, rtol=0)


def test_the_mean_comes_from_the_whole_clip_for_even_sizes() -> None:
    """F1b."""
    whole, local = pair((12, 6, 8))
    torch.testing.assert_close(blended(whole, local).mean((0, 1, 2)), whole.mean((0, 1, 2)), atol=1e-12, rtol=0)


@pytest.mark.parametrize("grid", GRIDS)
def test_one_pair_of_real_transforms_is_the_authors_form(grid: tuple[int, int, int]) -> None:
    """F1c, also where the filter is lopsided and their inverse transform has an imaginary part."""
    whole, local = pair(grid)
    want = three_transforms(whole, local)
    torch.testing.assert_close(blended(whole, local), want.real, atol=1e-12, rtol=0)
    single = blended(whole.float(), local.float())
    assert single.dtype == torch.float32 and tiny.relative(single, want.real) < 1e-6


def test_the_dropped_imaginary_part() -> None:
    """F1d: nothing for even sizes; F1f: something for an odd one."""
    assert three_transforms(*pair((12, 6, 8))).imag.abs().max() < 1e-13
    assert three_transforms(*pair((12, 5, 8))).imag.abs().max() > 1e-3


def test_an_odd_height_lets_a_quarter_of_the_windows_mean_through() -> None:
    """F1f: 2i/5 - 1 misses zero by 1/5, so the mean has the gain exp(-0.5 · 0.8²) = 0.726."""
    whole, local = pair((12, 5, 8))
    gain = math.exp(-0.5 * 0.8**2)
    assert abs(gain - 0.726) < 5e-4
    want = gain * whole.mean((0, 1, 2)) + (1 - gain) * local.mean((0, 1, 2))
    torch.testing.assert_close(blended(whole, local).mean((0, 1, 2)), want, atol=1e-12, rtol=0)
    assert abs(float(low_pass((12, 5, 8), 0.25, 0.25)[0, 0, 0]) - gain) < 1e-12


def test_the_window_shifts_at_the_ends_of_the_clip() -> None:
    """F1e: rows of 16 or 17 frames of 128; all frames where the clip is short."""
    rows = temporal_window(128, 16).sum(1)
    assert set(rows.tolist()) == {16, 17} and rows[0] == rows[127] == 16 and rows[64] == 17
    mask = temporal_window(128, 16)
    assert mask[0].nonzero().flatten().tolist() == list(range(16))
    assert mask[100].nonzero().flatten().tolist() == list(range(92, 109))
    assert bool(temporal_window(9, 16).all()) and bool(temporal_window(1, 1).all())
    assert temporal_window(5, 2).sum(1).tolist() == [2, 3, 3, 3, 2]


def expected(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, batch: int, grid: tuple[int, int, int], window: int
) -> Tensor:
    """The blend of one temporal layer in fp64, [B · h · w, F, H, D] as the layer has it."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / q.shape[-1] ** 0.5
    parts = []
    for mask in (torch.ones(grid[0], grid[0], dtype=torch.bool), temporal_window(grid[0], window)):
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        parts.append(torch.einsum("bhqk,bkhd->bqhd", weights, v.double()))
    torch.testing.assert_close(out.double(), parts[0], atol=1e-5, rtol=1e-4)
    shape = (batch, grid[1], grid[2], grid[0], -1)
    volumes = [part.flatten(2).view(shape).permute(0, 3, 1, 2, 4) for part in parts]
    blends = [three_transforms(whole, local).real for whole, local in zip(*volumes, strict=True)]
    return torch.stack(blends).permute(0, 2, 3, 1, 4).reshape(out.shape)


@pytest.mark.parametrize(
    ("family", "layers", "levels"),
    [("latte", "temporal*", {(9, 4, 4)}), ("animatediff", "*motion_modules*", {(8, 8, 8), (8, 4, 4)}),
     ("svd", "*temporal*", {(9, 8, 8), (9, 4, 4)})],
)  # fmt: skip
def test_every_temporal_layer_blends_over_its_own_grid(family: str, layers: str, levels: set[Any]) -> None:
    frames = 8 if family == "animatediff" else 9
    model, inputs = tiny.build(family, frames=frames, batch=2)
    handle = accelerate(model)
    plain = tiny.run(model, inputs)
    blend = SpectralBlend(window=4)
    taken: dict[str, tuple[Tensor, ...]] = {}
    session = handle.roots[0].session
    attend = session._softmax

    def spy(call: HeadsCall) -> Tensor:
        taken[session.layers[call.layer].name] = (call.q.clone(), call.k.clone(), call.v.clone())
        return attend(call)

    session._softmax = spy  # type: ignore[method-assign]
    places: list[Any] = []

    def hook(step: Any, place: Any, rows: Any) -> Tensor:
        got = blend(step, place, rows)
        assert got is not None
        places.append(place)
        want = expected(rows.video, *taken[place.name], 2, place.grid, 4)
        assert tiny.relative(got, want) < 1e-5
        return got

    handle.hook("attention_heads", hook, layers=layers)
    assert tiny.relative(tiny.run(model, inputs), plain) > 1e-4
    assert {place.grid for place in places} == levels and {place.over for place in places} == {"frames"}


def test_an_odd_level_of_a_unet() -> None:
    """Trap: 5 x 8 beside 10 x 16; half of an odd size is rounded up."""
    model, inputs = tiny.build("animatediff", frames=6, batch=1)
    inputs["sample"] = torch.randn(1, 4, 6, 9, 5)
    handle = accelerate(model)
    grids: set[Any] = set()
    handle.hook("attention_heads", lambda step, place, rows: grids.add(place.grid), layers="*motion_modules*")
    handle.hook("attention_heads", SpectralBlend(window=2), layers="*motion_modules*")
    tiny.run(model, inputs)
    assert grids == {(6, 9, 5), (6, 5, 3)}


def test_a_window_as_long_as_the_clip_changes_no_bit() -> None:
    model, inputs = tiny.build("latte")
    handle = accelerate(model)
    plain = tiny.run(model, inputs)
    handle.hook("attention_heads", SpectralBlend(), layers="temporal*")
    assert torch.equal(tiny.run(model, inputs), plain)


def test_the_largest_level_may_attend_within_the_window_only() -> None:
    model, inputs = tiny.build("animatediff", frames=8)
    handle = accelerate(model)
    kinds: dict[int, bool] = {}

    def hook(step: Any, place: Any, rows: Any) -> None:
        got = SpectralBlend(window=4, most_places=16)(step, place, rows)
        blend = SpectralBlend(window=4)(step, place, rows)
        assert got is not None and blend is not None
        kinds[place.grid[1]] = torch.equal(got, blend)

    handle.hook("attention_heads", hook, layers="*motion_modules*")
    tiny.run(model, inputs)
    assert kinds == {8: False, 4: True}


@pytest.mark.parametrize("planner", [None, Draft(sparsity=0.0, pool=(2, 2))], ids=["dense", "permuted"])
@pytest.mark.parametrize("family", ["wan_t2v", "cogvideox_5b", "hunyuan_video", "hunyuan_framepack"])
def test_models_that_attend_to_the_whole_video_at_once(family: str, planner: Any) -> None:
    """The window holds every token of its frames, all text and earlier clips; text rows stay as they are."""
    model, inputs = tiny.build(family)
    handle = accelerate(model, Config(attention=planner))
    blend = SpectralBlend(window=1)
    seen: list[Any] = []

    def hook(step: Any, place: Any, rows: Any) -> Tensor | None:
        got = blend(step, place, rows)
        frames, height, width = place.grid
        frame = torch.arange(frames).repeat_interleave(height * width)
        mask = torch.ones(2, 2, dtype=torch.bool)
        history, text = place.geometry.history, place.geometry.text
        total = history + text + len(frame)
        mask = torch.ones(total, total, dtype=torch.bool)
        first = history + (text if place.geometry.text_first else 0)
        inside = slice(first, first + len(frame))
        mask[inside, inside] = frame[:, None] == frame
        local = rows.attend(vdit_plan(mask)).video
        volumes = [x.flatten(2).unflatten(1, place.grid) for x in (rows.video, local)]
        want = torch.stack([three_transforms(a, b).real for a, b in zip(*volumes, strict=True)]).reshape(
            rows.video.shape
        )
        assert got is not None and tiny.relative(got, want) < 1e-5
        seen.append(place.over)
        return got

    plain = tiny.run(model, inputs)
    handle.hook("attention_heads", hook, layers=0)
    assert tiny.relative(tiny.run(model, inputs), plain) > 1e-5 and seen == ["video"]


def vdit_plan(mask: Tensor) -> Any:
    from vdit_fast.plan import AttentionPlan

    return AttentionPlan.from_mask(mask)


def test_where_it_does_not_belong() -> None:
    model, inputs = tiny.build("latte")
    handle = accelerate(model)
    with pytest.raises(ValueError, match="belongs at 'attention_heads'"):
        handle.hook("attention_output", SpectralBlend())
    handle.hook("attention_heads", SpectralBlend(window=2))
    with pytest.raises(ValueError, match="one frame at a time"):
        tiny.run(model, inputs)
    for settings in ({"window": 0}, {"window": 1.5}, {"cutoff_time": 0.0}, {"cutoff_space": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            SpectralBlend(**settings)  # type: ignore[arg-type]


def test_the_stock_processor_is_no_place_behind_the_softmax() -> None:
    """Where it must run the hook would silently do nothing: an error."""
    model, inputs = tiny.build("wan_t2v")
    handle = accelerate(model)
    handle.hook("attention_heads", SpectralBlend(window=1))
    attn = model.get_submodule("blocks.0.attn1")
    mask = torch.zeros(1, 1, 48, 48)
    with pytest.raises(RuntimeError, match="nothing behind its softmax"):
        attn(torch.randn(1, 48, 32), None, mask, None)
    del inputs
