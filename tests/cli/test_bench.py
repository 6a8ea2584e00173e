"""The attention benchmark: what it times, what it counts, its picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vdit_fast.cli.bench import SUITES, Shape, random_block_mask, run_bench


def test_rows_and_their_arithmetic(run_json: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    document = run_json("bench", "--shape", "1x2x300x16", "--block", "16", "--repeats", "2", "--out", tmp_path)
    assert document["kind"] == "vdit_fast.bench" and document["settings"]["dtype"] == "float32"
    (result,) = document["results"]
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows)[:2] == ["torch SDPA", "vdit_fast dense"]
    assert {"vdit_fast 0.5", "vdit_fast 0.25", "vdit_fast 0.1", "torch SDPA, mask 0.25"} < set(rows)
    flop = 4 * 2 * 300 * 300 * 16
    for row in rows.values():
        assert len(row["all"]) == 2 and row["min"] <= row["seconds"] <= row["max"]
        assert row["effective_gflops"] == pytest.approx(flop / row["seconds"] / 1e9)
        share = row["density"] if row["own"] else 1.0
        assert row["executed_gflops"] == pytest.approx(share * row["effective_gflops"])
    assert rows["torch SDPA"]["speedup"] == 1.0
    assert rows["vdit_fast 0.1"]["density"] < rows["vdit_fast 0.25"]["density"] < rows["vdit_fast 0.5"]["density"] < 1
    assert (tmp_path / "bench.json").is_file() and (tmp_path / "speed.png").is_file()
    (tmp_path / "speed.png").unlink()
    again = run_json("plot", tmp_path / "bench.json")
    assert [Path(f).name for f in again["files"]] == ["speed.png"] and (tmp_path / "speed.png").stat().st_size > 5000


def test_the_table_names_the_contenders(run: Callable[..., Any]) -> None:
    result = run(
        "bench", "--shape", "1x1x64x8", "--densities", "1,0.5", "--repeats", "1", "--dtype", "bf16", "--block", "8"
    )
    assert result.exit_code == 0 and "vdit_fast 0.5" in result.stdout and "bfloat16" in result.stdout


def test_block_masks_keep_the_asked_share_and_the_diagonal() -> None:
    mask = random_block_mask(Shape(1, 3, 1000, 64), 0.25, 64, torch.Generator().manual_seed(0))
    assert mask.shape == (3, 16, 16) and mask.diagonal(dim1=1, dim2=2).all()
    assert (mask.sum(-1) == 4).all()


def _answers(shape: Shape, *, block: int, flex: bool) -> dict[str, torch.Tensor]:
    from vdit_fast.cli.bench import _contenders

    calls = _contenders(shape, (1.0, 0.25), torch.float32, torch.device("cpu"), block, 0, flex)
    return {row["name"]: call() for row, call in calls}


@pytest.mark.slow
def test_flex_attention_reads_the_same_blocks() -> None:
    answers = _answers(Shape(1, 2, 640, 64), block=128, flex=True)
    flex = answers["FlexAttention, compiled 0.25"].transpose(1, 2)
    torch.testing.assert_close(answers["vdit_fast 0.25"], flex, rtol=1e-4, atol=1e-5)


def test_contenders_agree() -> None:
    """Dense and SDPA answer the same, so that a speed-up is one for the same work."""
    answers = _answers(Shape(1, 2, 130, 16), block=32, flex=False)
    own = {name: out if name.startswith("vdit") else out.transpose(1, 2) for name, out in answers.items()}
    torch.testing.assert_close(own["vdit_fast dense"], own["torch SDPA"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(own["vdit_fast 0.25"], own["torch SDPA, mask 0.25"], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(own["vdit_fast 0.25"], own["vdit_fast dense"], atol=1e-2)


def test_shapes_are_read_and_named() -> None:
    assert Shape.parse("1x2x4096x64") == Shape(1, 2, 4096, 64)
    assert str(Shape.parse("1,2,3,4")) == "1x2x3x4" and Shape(1, 2, 3, 4).flop == 4 * 2 * 9 * 4
    for bad in ("1x2x3", "1x2x0x4", "1x2x3xd", "-1x2x3x4"):
        with pytest.raises(ValueError, match="BATCHxHEADSxLENGTHxDIM"):
            Shape.parse(bad)
    assert all(SUITES.values())


@pytest.mark.parametrize(
    "options", [{"repeats": 0}, {"block": 0}, {"densities": (0.0,)}, {"densities": (float("nan"),)}]
)
def test_bad_settings(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        run_bench([Shape(1, 1, 8, 8)], **options)
