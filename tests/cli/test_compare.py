"""``vdit-fast compare`` on lossless files, against the metrics computed directly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vdit_fast import report

pytest.importorskip("av")


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 256, (4, 3, 16, 16), generator=generator, dtype=torch.uint8)
    near = (truth.int() + torch.randint(-3, 4, truth.shape, generator=generator)).clamp(0, 255).to(torch.uint8)
    a = report.write_video(tmp_path / "near.mkv", near)
    b = report.write_video(tmp_path / "truth.mkv", truth)
    return a, b, near, truth


def test_numbers_are_those_of_the_metrics(
    files: tuple[Path, Path, torch.Tensor, torch.Tensor], run_json: Callable[..., Any], run: Callable[..., Any]
) -> None:
    a, b, near, truth = files
    document = run_json("compare", a, b)
    assert document["psnr"] == pytest.approx(report.compare_clips(near, truth).psnr)
    assert document["clip"] == "near.mkv" and len(document["psnr_per_frame"]) == 4
    shown = run("compare", a, b)
    assert shown.exit_code == 0 and f"{document['psnr']:.4g}" in shown.stdout and "SSIM" in shown.stdout


def test_a_file_equals_itself(files: tuple[Path, ...], run_json: Callable[..., Any], run: Callable[..., Any]) -> None:
    document = run_json("compare", files[0], files[0])
    assert document["identical"] is True and document["psnr"] == "inf" and document["relative_l2"] == 0
    assert "inf" in run("compare", files[0], files[0]).stdout


def test_the_plot_and_fewer_frames(files: tuple[Path, ...], run_json: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    document = run_json("compare", files[0], files[1], "--max-frames", 2, "--plot", tmp_path / "p.png")
    assert document["frames"] == 2 and (tmp_path / "p.png").stat().st_size > 5000


def test_sizes_that_differ_and_files_that_are_no_video(
    files: tuple[Path, ...], run: Callable[..., Any], tmp_path: Path
) -> None:
    other = report.write_video(tmp_path / "other.mkv", torch.zeros(4, 3, 8, 8))
    text = tmp_path / "text.mp4"
    text.write_text("hello")
    for file, words in ((other, "shape"), (text, "text.mp4")):
        result = run("compare", file, files[1])
        assert result.exit_code == 2 and words in result.stderr, result.output
