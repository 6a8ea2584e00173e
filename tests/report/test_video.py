"""Video files, labels and conversions."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from vdit_fast import report

pytest.importorskip("av")
image_module = pytest.importorskip("PIL.Image")


def smooth_clip(frames: int = 6, height: int = 48, width: int = 64) -> torch.Tensor:
    coarse = torch.rand(1, 3, 3, 4, 4)
    return torch.nn.functional.interpolate(coarse, size=(frames, height, width), mode="trilinear")[0].transpose(0, 1)


@pytest.mark.parametrize("size", [(48, 64), (33, 47), (1, 1)])
def test_lossless_file_is_bit_exact(tmp_path, size):
    clip = torch.randint(0, 256, (4, 3, *size), dtype=torch.uint8)
    path = report.write_video(tmp_path / "sub" / "noise.mkv", clip, fps=23.976)
    assert torch.equal(report.read_video(path), clip)
    assert report.video_fps(path) == pytest.approx(23.976, abs=0.01)
    assert torch.equal(report.read_video(path, max_frames=2), clip[:2])


def test_grey_is_repeated_and_floats_are_rounded(tmp_path):
    clip = torch.rand(2, 1, 16, 16)
    found = report.read_video(report.write_video(tmp_path / "grey.mkv", clip))
    assert torch.equal(found, (clip * 255).round().to(torch.uint8).expand(-1, 3, -1, -1))


def test_mp4_is_close_and_odd_sizes_are_padded(tmp_path):
    clip = smooth_clip(height=47, width=63)
    found = report.read_video(report.write_mp4(tmp_path / "clip.mp4", clip, fps=12))
    assert found.shape == (6, 3, 48, 64)
    quality = report.psnr(found[:, :, :47, :63], clip)
    assert quality.min() > 28 and quality.max() < 80


def test_frames_as_png(tmp_path):
    clip = torch.randint(0, 256, (3, 3, 9, 11), dtype=torch.uint8)
    paths = report.write_frames_png(tmp_path / "frames", clip)
    assert [p.name for p in paths] == ["frame_00000.png", "frame_00001.png", "frame_00002.png"]
    back = np.stack([np.asarray(image_module.open(p)) for p in paths])
    assert np.array_equal(back, clip.permute(0, 2, 3, 1).numpy())


def test_side_by_side_holds_every_clip_under_its_label():
    a, b = smooth_clip(), smooth_clip(frames=1, width=41)
    joined = report.side_by_side([a, b], ["dense", "a label that is much too long for its clip"], scale=2, gap=6)
    pixels_a, pixels_b = report.upscale(a, 2), report.upscale(b, 2)
    top = joined.shape[2] - 96
    assert joined.dtype == torch.uint8 and joined.shape[3] == 128 + 6 + 82 and top > 12
    assert torch.equal(joined[:, :, top:, :128], pixels_a)
    assert torch.equal(joined[:, :, top:, 134:], pixels_b.expand(6, -1, -1, -1))
    for bar in (joined[0, :, :top, :128], joined[0, :, :top, 134:]):
        assert bar.max() > 200 and bar[:, :, :2].max() < 60 and bar[:, :, -2:].max() < 60  # text, inside its clip
    bare = report.side_by_side([a, a], gap=1)
    assert bare.shape[2:] == (48, 130)  # 129 made even


def test_upscale():
    clip = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    big = report.upscale(clip, 3)
    assert torch.equal(big[:, :, 1::3, 1::3], clip) and big.shape == (2, 3, 15, 21)
    assert report.upscale(smooth_clip(), 2, "bicubic").shape == (6, 3, 96, 128)
    assert torch.equal(report.upscale(clip, 1), clip)


def test_pipeline_frames_become_clips():
    array = np.random.default_rng(0).random((4, 6, 8, 3), dtype=np.float32)
    clip = report.to_clip(array)
    assert clip.shape == (4, 3, 6, 8) and torch.equal(clip[1, 2], torch.from_numpy(array[1, :, :, 2]))
    pictures = [image_module.fromarray((frame * 255).astype(np.uint8)) for frame in array]
    assert report.to_clip(pictures).dtype == torch.uint8
    assert report.to_clip(clip) is clip


def test_bad_input_is_named(tmp_path):
    clip = smooth_clip()
    for call, words in [
        (lambda: report.write_video(tmp_path / "a.gif", clip), "a.gif"),
        (lambda: report.write_video(tmp_path / "a.mp4", clip, fps=0), "fps is 0"),
        (lambda: report.write_video(tmp_path / "a.mp4", clip, lossless=True), "lossless=True"),
        (lambda: report.write_video(tmp_path / "a.mp4", torch.rand(2, 4, 8, 8)), "4 channels"),
        (lambda: report.write_mp4(tmp_path / "a.mkv", clip), "write_mp4"),
        (lambda: report.read_video(tmp_path / "a.mkv", max_frames=0), "max_frames is 0"),
        (lambda: report.side_by_side([]), "clips is empty"),
        (lambda: report.side_by_side([clip], ["a", "b"]), "2 entries for 1"),
        (lambda: report.side_by_side([clip, clip[:3]]), r"clips\[1\] has 3 frames"),
        (lambda: report.side_by_side([clip], gap=-1), "gap is -1"),
        (lambda: report.upscale(clip, 0), "factor is 0"),
        (lambda: report.upscale(clip, 2, "cubic"), "mode is 'cubic'"),
        (lambda: report.to_clip([]), "empty"),
        (lambda: report.to_clip(np.zeros((1, 2, 8, 8, 3))), "select one video"),
        (lambda: report.to_clip([np.zeros((4, 4, 3)), np.zeros((4, 5, 3))]), "differ in shape"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="frames is a dict"):
        report.to_clip({})
    with pytest.raises(FileNotFoundError, match=r"no\.mp4"):
        report.read_video(tmp_path / "no.mp4")
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(ValueError, match="not a video file"):
        report.read_video(tmp_path / "text.mp4")
    assert not list(tmp_path.glob("a.*"))


def test_missing_library_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"vdit-fast\[video\]"):
        report.write_mp4(tmp_path / "a.mp4", smooth_clip())
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r"vdit-fast\[video\]"):
        report.side_by_side([smooth_clip()], ["a"])
