"""Metrics against closed forms and, where installed, against torchmetrics and scikit-image."""

from __future__ import annotations

import json
import math

import pytest
import torch

from vdit_fast import report


def clip_pair(seed: int, frames: int = 3, height: int = 24, width: int = 33, noise: float = 0.05):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(frames, 3, 5, 6, generator=generator)
    clip = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    return (clip + noise * torch.randn(clip.shape, generator=generator)).clamp(0, 1), clip


def test_constant_offset_has_the_known_psnr_and_no_flicker():
    reference = torch.rand(4, 3, 12, 14) * 0.8
    offset = torch.tensor([0.1, 0.1, 0.1, 0.1]).view(-1, 1, 1, 1)
    torch.testing.assert_close(report.psnr(reference + offset, reference), torch.full((4,), 20.0, dtype=torch.float64))
    assert torch.isinf(report.flicker_psnr(reference + offset, reference)).all()


def test_flicker_of_a_blinking_offset():
    reference = torch.rand(5, 1, 8, 8, dtype=torch.float64) * 0.5
    blink = 0.1 * torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0], dtype=torch.float64).view(-1, 1, 1, 1)
    found = report.flicker_psnr(reference + blink, reference)
    torch.testing.assert_close(found, torch.full((4,), 20.0, dtype=torch.float64))


def test_psnr_of_a_hand_computed_frame():
    reference = torch.zeros(1, 1, 2, 2)
    clip = torch.tensor([[[[0.0, 0.2], [0.4, 0.0]]]])
    expected = -10 * math.log10((0.04 + 0.16) / 4)
    assert report.psnr(clip, reference).item() == pytest.approx(expected, abs=1e-5)


def test_ssim_of_constant_frames_is_the_luminance_term():
    a, b = torch.full((1, 1, 11, 11), 0.25), torch.full((1, 1, 11, 11), 0.75)
    expected = (2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4)
    assert report.ssim(a, b).item() == pytest.approx(expected, abs=1e-4)


def test_ssim_of_one_window_by_hand():
    clip, reference = (torch.rand(1, 1, 11, 11, dtype=torch.float64) for _ in range(2))
    taps = [math.exp(-(i**2) / (2 * 1.5**2)) for i in range(-5, 6)]
    total = sum(taps) ** 2
    pixels = [(y, x, taps[y] * taps[x] / total) for y in range(11) for x in range(11)]
    a, b = clip[0, 0].tolist(), reference[0, 0].tolist()
    mu_a, mu_b = sum(w * a[y][x] for y, x, w in pixels), sum(w * b[y][x] for y, x, w in pixels)
    var_a = sum(w * (a[y][x] - mu_a) ** 2 for y, x, w in pixels)
    var_b = sum(w * (b[y][x] - mu_b) ** 2 for y, x, w in pixels)
    cov = sum(w * (a[y][x] - mu_a) * (b[y][x] - mu_b) for y, x, w in pixels)
    expected = (2 * mu_a * mu_b + 1e-4) * (2 * cov + 9e-4) / ((mu_a**2 + mu_b**2 + 1e-4) * (var_a + var_b + 9e-4))
    assert report.ssim(clip, reference).item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_matches_scikit_image(seed):
    metrics = pytest.importorskip("skimage.metrics")
    clip, reference = clip_pair(seed)
    kind = {
        "channel_axis": 0,
        "data_range": 1.0,
        "gaussian_weights": True,
        "sigma": 1.5,
        "use_sample_covariance": False,
    }
    for t in range(clip.shape[0]):
        a, b = clip[t].numpy(), reference[t].numpy()
        assert report.psnr(clip, reference)[t].item() == pytest.approx(
            metrics.peak_signal_noise_ratio(b, a, data_range=1.0), abs=1e-4
        )
        assert report.ssim(clip, reference)[t].item() == pytest.approx(
            metrics.structural_similarity(b, a, **kind), abs=1e-4
        )


def test_matches_torchmetrics():
    try:  # a torchvision made for another torch breaks this import with a RuntimeError
        import torchmetrics.functional.image as image
    except Exception as error:
        pytest.skip(f"torchmetrics does not import: {error}")
    clip, reference = clip_pair(7)
    expected = image.peak_signal_noise_ratio(clip, reference, data_range=1.0, dim=(1, 2, 3), reduction="none")
    torch.testing.assert_close(report.psnr(clip, reference).float(), expected, atol=1e-4, rtol=0)
    _, full = image.structural_similarity_index_measure(clip, reference, data_range=1.0, return_full_image=True)
    inside = full[..., 5:-5, 5:-5].flatten(1).mean(dim=1)  # without the windows that reach over the border
    torch.testing.assert_close(report.ssim(clip, reference).float(), inside, atol=1e-4, rtol=0)


def test_ssim_in_chunks_equals_ssim_at_once(monkeypatch):
    clip, reference = clip_pair(3, frames=5)
    whole = report.ssim(clip, reference)
    monkeypatch.setattr("vdit_fast.report.metrics.MAPS_PIXELS", 2 * clip[0].numel())
    torch.testing.assert_close(report.ssim(clip, reference), whole, atol=1e-6, rtol=0)


def test_identical_clips():
    clip, _ = clip_pair(1)
    found = report.compare_clips(clip, clip.clone())
    assert found.identical and found.psnr == found.psnr_pooled == found.flicker_psnr == math.inf
    assert found.ssim == pytest.approx(1.0, abs=1e-6)
    assert found.relative_l2 == 0.0 and found.cosine == pytest.approx(1.0)
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert json.loads(text)["psnr"] == "inf"
    assert report.ClipComparison.from_dict(json.loads(text)) == found
    assert "identical" in found.summary()


def test_an_identical_frame_does_not_raise_the_mean():
    clip, reference = clip_pair(2, frames=4)
    clip[0] = reference[0]
    found = report.compare_clips(clip, reference)
    assert math.isinf(found.psnr_per_frame[0]) and not found.identical
    assert found.psnr == pytest.approx(sum(found.psnr_per_frame[1:]) / 3)
    assert report.ClipComparison.from_dict(found.to_dict()) == found


def test_small_and_single_frames_leave_out_what_cannot_be_measured():
    found = report.compare_clips(torch.rand(1, 1, 8, 8), torch.rand(1, 1, 8, 8))
    assert found.ssim is None and found.flicker_psnr is None and found.ssim_per_frame == ()
    assert "SSIM" not in found.summary()


def test_uint8_equals_its_float():
    a, b = (torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8) for _ in range(2))
    assert report.compare_clips(a, b) == report.compare_clips(a.float() / 255, b.float() / 255)
    assert report.compare_clips(a, b.float() / 255) == report.compare_clips(a, b)


def test_half_precision_is_measured_in_full():
    clip, reference = clip_pair(4)
    wide = report.psnr(clip.half().float(), reference)
    torch.testing.assert_close(report.psnr(clip.half(), reference), wide)


def test_relative_l2_and_cosine():
    x, y = torch.tensor([3.0, 0.0, 4.0]), torch.tensor([0.0, 0.0, 4.0])
    assert report.relative_l2(x, y) == pytest.approx(0.75)
    assert report.cosine(x, y) == pytest.approx(0.8)
    assert report.cosine(x, -x) == pytest.approx(-1.0)
    zero = torch.zeros(3)
    assert (report.relative_l2(zero, zero), report.cosine(zero, zero)) == (0.0, 1.0)
    assert (report.relative_l2(x, zero), report.cosine(x, zero)) == (math.inf, 0.0)


GOOD = torch.rand(2, 3, 16, 16)


@pytest.mark.parametrize(
    ("clip", "error", "words"),
    [
        (GOOD.numpy(), TypeError, "clip is a ndarray"),
        (GOOD.to(torch.int32), TypeError, "clip has dtype torch.int32"),
        (GOOD[0], ValueError, r"clip has shape \(3, 16, 16\)"),
        (GOOD.permute(0, 2, 3, 1), ValueError, "channels-last"),
        (GOOD[:0], ValueError, "no pixels"),
        (GOOD * 2 - 1, ValueError, r"x / 2 \+ 0.5"),
        (GOOD * 255, ValueError, r"expected finite values in \[0, 1\]"),
        (torch.full_like(GOOD, math.nan), ValueError, "expected finite"),
        (GOOD[:1], ValueError, r"but reference \(2, 3, 16, 16\)"),
        (GOOD[..., :8], ValueError, "but reference"),
    ],
)
def test_bad_clips_are_named(clip, error, words):
    with pytest.raises(error, match=words):
        report.compare_clips(clip, GOOD)


def test_other_bad_inputs_are_named():
    with pytest.raises(ValueError, match="at least 2"):
        report.flicker_psnr(GOOD[:1], GOOD[:1])
    with pytest.raises(ValueError, match="at least 11 x 11"):
        report.ssim(GOOD[..., :10], GOOD[..., :10])
    with pytest.raises(ValueError, match="one non-empty shape"):
        report.relative_l2(torch.rand(3), torch.rand(4))
    with pytest.raises(ValueError, match="NaN"):
        report.cosine(torch.tensor([math.nan]), torch.ones(1))
    with pytest.raises(TypeError, match="x is list"):
        report.relative_l2([1.0], torch.ones(1))
    with pytest.raises(ValueError, match="missing or unknown"):
        report.ClipComparison.from_dict({"psnr": 1.0})
