"""The demo's weight file: written, read, and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vdit_fast.demo import model as demo_model
from vdit_fast.demo.model import demo_metadata, load_demo_model, save_demo_model
from vdit_fast.demo.prompts import embed

safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture
def saved(tiny: torch.nn.Module, tmp_path: Path) -> Path:
    config = {key: value for key, value in tiny.config.items() if not key.startswith("_") and value is not None}
    return save_demo_model(tiny.state_dict(), tmp_path / "w.safetensors", architecture=config, metadata={"steps": "7"})


def test_weights_come_back_rounded_to_bf16(tiny: torch.nn.Module, saved: Path) -> None:
    loaded = load_demo_model(path=saved)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    for name, value in tiny.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.bfloat16().float()), name
    header = demo_metadata(saved)
    assert header["steps"] == "7" and json.loads(header["architecture"])["num_layers"] == 3


def test_bf16_keeps_what_diffusers_keeps_in_fp32(saved: Path) -> None:
    full, half = load_demo_model(path=saved), load_demo_model(torch.bfloat16, path=saved)
    assert half.dtype == torch.bfloat16 and half.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert half.scale_shift_table.dtype == torch.float32
    assert torch.equal(half.rope.freqs_cos, full.rope.freqs_cos)
    x, t, text = torch.randn(1, 3, 2, 8, 8), torch.tensor([500.0]), embed("red circle up")[None]
    exact = full(x, t, text, return_dict=False)[0]
    rounded = half(x.bfloat16(), t, text.bfloat16(), return_dict=False)[0]
    assert (rounded - exact).norm() < 0.05 * exact.norm()


def test_missing_weights_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="save_demo_model"):
        load_demo_model(path=tmp_path / "none.safetensors")
    monkeypatch.setattr(demo_model, "WEIGHTS", tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="install the wheel"):
        load_demo_model()


def test_files_that_are_no_demo_model(tiny: torch.nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    file.write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_demo_model(path=file)
    safetensors.save_file({"a": torch.ones(1)}, str(file))
    with pytest.raises(ValueError, match="not a demo model"):
        load_demo_model(path=file)
    save_demo_model({"a": torch.ones(1)}, file)
    with pytest.raises(ValueError, match="do not fit"):
        load_demo_model(path=file)


def test_only_finite_and_small_weights_are_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not finite"):
        save_demo_model({"a": torch.tensor([1.0, float("inf")])}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="16 MB"):
        save_demo_model({"a": torch.zeros(9 * 2**20)}, tmp_path / "w.safetensors")
    assert list(tmp_path.iterdir()) == []
