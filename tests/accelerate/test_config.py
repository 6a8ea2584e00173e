"""Config: files, presets, digests, and errors that say what to do."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from tiny import Band

from vdit_fast.config import Config
from vdit_fast.presets import PRESETS


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml"])
def test_presets_survive_a_file(name: str, suffix: str, tmp_path: Path) -> None:
    config = Config.preset(name)
    config.save(tmp_path / f"c{suffix}")
    again = Config.from_file(tmp_path / f"c{suffix}")
    assert again == config and again.digest() == config.digest() and hash(again) == hash(config)
    assert Config.of(tmp_path / f"c{suffix}") == Config.of(str(tmp_path / f"c{suffix}")) == Config.of(name) == config


def test_presets_differ_and_exact_is_dense() -> None:
    assert len({Config.preset(name).digest() for name in PRESETS}) == len(PRESETS)
    assert Config.preset("exact") == Config() == Config.of(None) and Config().attention is None


def test_dict_form_round_trips_with_tuples() -> None:
    config = Config(attention=Band(width=3, dense_layers=(0, -1), dense_steps=0.25), verbose=True)
    again = Config.from_dict(config.to_dict())
    assert again == config and isinstance(again.attention, Band) and again.attention.dense_layers == (0, -1)
    assert Config.of({"attention": "test_band"}).attention == Band()


def test_digest_depends_on_what_runs_only() -> None:
    base = Config(attention=Band(width=3))
    assert base.digest() == Config(attention=Band(width=3), verbose=True).digest()
    assert base.digest() != Config(attention=Band(width=4)).digest() != Config().digest()
    assert len(base.digest()) == 10 and int(base.digest(), 16) >= 0


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().verbose = True  # type: ignore[misc]


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        ({"atention": None}, ValueError, "'atention'.*'attention'"),
        ({"attention": {"method": "test_bend"}}, ValueError, "'test_bend'.*'test_band'"),
        ({"attention": {"method": "test_band", "widht": 3}}, ValueError, "'widht'.*'width'"),
        ({"attention": {"width": 3}}, ValueError, "method"),
        ({"attention": {"method": "test_band", "dense_steps": math.nan}}, ValueError, "dense_steps.*nan"),
        ({"attention": {"method": "test_band", "dense_steps": math.inf}}, ValueError, "dense_steps.*inf"),
        ({"attention": {"method": "test_band", "dense_steps": 1.5}}, ValueError, "dense_steps"),
        ({"attention": {"method": "test_band", "dense_layers": [0, math.inf]}}, ValueError, "dense_layers"),
        ({"attention": 3}, TypeError, "attention must be the name of a method, a mapping .* got 3"),
        ({"cache": True}, TypeError, "cache must be the name of a method, a mapping .* got True"),
        ({"on_unsupported": "eror"}, ValueError, "'eror'.*'error'"),
        ({"verbose": 1}, TypeError, "verbose"),
        ([1], TypeError, "mapping"),
    ],
)
def test_bad_input_is_named(data: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"(?s){text}"):
        Config.from_dict(data)  # type: ignore[arg-type]


def test_bad_files_and_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'balancd'.*'balanced'"):
        Config.of("balancd")
    with pytest.raises(ValueError, match=r"'fest'.*'fast'"):
        Config.preset("fest")
    with pytest.raises(TypeError, match="int"):
        Config.of(3)  # type: ignore[arg-type]
    for method, key in (("svg2", "attention"), ("taylorseer", "cache")):
        with pytest.raises(ValueError, match=f"name of a method.*{{'{key}': '{method}'}}"):
            Config.of(method)
        with pytest.raises(ValueError, match=f"pass {{'{key}': {{'method': '{method}', 'x': 1}}}}"):
            Config.of({"method": method, "x": 1})
    with pytest.raises(ValueError, match="key 'method' is unknown"):
        Config.of({"method": "svg3"})
    with pytest.raises(ValueError, match="is a folder; give a preset"):
        Config.of(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json is not valid JSON"):
        Config.from_file(tmp_path / "broken.json")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"broken\.yaml is not valid YAML"):
        Config.from_file(tmp_path / "broken.yaml")
    (tmp_path / "c.toml").write_text("")
    with pytest.raises(ValueError, match=r"\.toml.*\.yaml"):
        Config.from_file(tmp_path / "c.toml")
    with pytest.raises(ValueError, match=r"\.toml.*\.yaml"):
        Config().save(tmp_path / "d.toml")
    (tmp_path / "empty.yaml").write_text("")
    assert Config.from_file(tmp_path / "empty.yaml") == Config()
    with pytest.raises(FileNotFoundError):
        Config.from_file(tmp_path / "absent.yaml")
