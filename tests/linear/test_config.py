"""The ``linear`` key of a configuration: forms, files, digests, errors."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from vdit_fast.config import Config
from vdit_fast.linear import FeatureMap, LinearAttention, save_feature_maps


@pytest.fixture
def file(tmp_path: Path) -> Path:
    maps = {1: FeatureMap("blocks.1.attn1", *torch.randn(2, 2, 8, 8))}
    return save_feature_maps(tmp_path / "maps.safetensors", {"transformer": maps}, family="wan", num_layers=3)


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
@pytest.mark.parametrize("layers", [None, (0, 2)])
def test_survives_a_file(tmp_path: Path, suffix: str, layers: tuple[int, ...] | None, file: Path) -> None:
    config = Config(linear=LinearAttention(str(file), layers))
    config.save(tmp_path / f"c{suffix}")
    again = Config.from_file(tmp_path / f"c{suffix}")
    assert again == config and hash(again) == hash(config) and again.digest() == config.digest()
    assert again.linear == LinearAttention(str(file), layers) != LinearAttention(str(file), (1,))


def test_forms_of_one_setting(file: Path) -> None:
    want = Config(linear=LinearAttention(str(file)))
    for form in (str(file), file, {"weights": str(file)}, {"weights": file, "layers": None}, want.linear):
        assert Config.from_dict({"linear": form}) == want
    assert LinearAttention(str(file), [3, 1]) == LinearAttention(str(file), (1, 3))  # type: ignore[arg-type]
    assert Config().linear is None and Config().to_dict()["linear"] is None


def test_the_digest_knows_the_content_and_not_the_path(tmp_path: Path, file: Path) -> None:
    copy = tmp_path / "elsewhere.safetensors"
    shutil.copy(file, copy)
    digest = Config(linear=LinearAttention(str(file))).digest()
    assert Config(linear=LinearAttention(str(copy))).digest() == digest
    assert Config(linear=LinearAttention(str(file), (1,))).digest() != digest != Config().digest()
    other = {1: FeatureMap("blocks.1.attn1", *torch.randn(2, 2, 8, 8))}
    save_feature_maps(copy, {"transformer": other}, family="wan", num_layers=3)
    assert Config(linear=LinearAttention(str(copy))).digest() != digest


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        ({"weights": "x", "layer": [1]}, ValueError, "'layer'.*weights.*layers"),
        ({"layers": [1]}, ValueError, "no key 'weights'"),
        ({"weights": ""}, TypeError, "weights"),
        ({"weights": 3}, TypeError, "weights.*3"),
        ({"weights": "x", "layers": 1}, TypeError, "layers.*list"),
        ({"weights": "x", "layers": [1.0]}, TypeError, "layers"),
        ({"weights": "x", "layers": [True]}, TypeError, "layers"),
        ({"weights": "x", "layers": []}, ValueError, "layers.*null"),
        ({"weights": "x", "layers": [-1]}, ValueError, "layers.*-1"),
        ({"weights": "x", "layers": [1, 1]}, ValueError, "none twice"),
        (7, TypeError, "linear.*int"),
    ],
)
def test_bad_values_are_named(value: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Config.from_dict({"linear": value})
