"""Feature map files: what is written is read, and what does not belong here is named."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from linear_models import save_random_maps
from safetensors import safe_open
from safetensors.torch import save_file

from vdit_fast import accelerate
from vdit_fast.config import Config
from vdit_fast.linear import FeatureMap, LinearAttention, load_feature_maps, read_header, save_feature_maps


def random_map(name: str, heads: int = 4, groups: int = 2, dim: int = 8, dtype: Any = torch.float32) -> FeatureMap:
    return FeatureMap(name, torch.randn(heads, dim, dim).to(dtype), torch.randn(groups, dim, dim).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    maps = {e: {i: random_map(f"b.{i}.{e}", dtype=dtype) for i in (3, 0)} for e in ("transformer", "transformer_2")}
    path = save_feature_maps(tmp_path / "m.safetensors", maps, family="wan", num_layers=4, record={"steps": 7})
    header = read_header(path)
    assert (header.family, header.num_layers, header.record) == ("wan", 4, {"steps": 7})
    assert header.layers["transformer_2"][3] == {"name": "b.3.transformer_2", "heads": 4, "kv_heads": 2, "head_dim": 8}
    for expert, layers in maps.items():
        found = load_feature_maps(path, expert)
        assert list(found) == [0, 3]
        for index, want in layers.items():
            assert found[index].name == want.name and found[index].q.dtype == torch.float32
            assert torch.equal(found[index].q, want.q.float()) and torch.equal(found[index].k, want.k.float())
    assert list(load_feature_maps(path, "transformer", [3])) == [3]
    with pytest.raises(ValueError, match=r"no map for transformer, layer \[2\].*0, 3"):
        load_feature_maps(path, "transformer", [2, 3])
    with pytest.raises(ValueError, match=r"no map for vae"):
        load_feature_maps(path, "vae")


@pytest.mark.parametrize(
    ("q", "k", "text"),
    [
        (torch.randn(2, 8), torch.randn(2, 8, 8), r"q must be \[heads, D, D\]"),
        (torch.randn(2, 8, 4), torch.randn(2, 8, 8), r"q must be \[heads, D, D\]"),
        (torch.randn(2, 8, 8), torch.randn(2, 4, 4), "agree in D"),
        (torch.randn(3, 8, 8), torch.randn(2, 8, 8), "multiple"),
        (torch.randn(2, 8, 8).double(), torch.randn(2, 8, 8), "float64"),
        (torch.full((2, 8, 8), float("nan")), torch.randn(2, 8, 8), "not finite"),
        (torch.randn(0, 8, 8), torch.randn(2, 8, 8), "q must be"),
    ],
)
def test_maps_that_are_none(q: torch.Tensor, k: torch.Tensor, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        FeatureMap("blocks.0", q, k)


def test_layers_that_the_model_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"layer 4.*4 layers"):
        save_feature_maps(tmp_path / "m", {"transformer": {4: random_map("x")}}, family="wan", num_layers=4)
    with pytest.raises(ValueError, match="at least one layer"):
        save_feature_maps(tmp_path / "m", {"transformer": {}}, family="wan", num_layers=4)


def rewritten(path: Path, **changes: str | None) -> Path:
    """The file with other entries in its header; None takes one out."""
    with safe_open(str(path), framework="pt") as file:
        header = {**file.metadata(), **changes}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    save_file(tensors, str(path), metadata={key: value for key, value in header.items() if value is not None})
    return path


def test_files_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent.*does not exist"):
        read_header(tmp_path / "absent")
    (tmp_path / "text").write_text("weights")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        read_header(tmp_path / "text")
    save_file({"x": torch.randn(3)}, str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"kind None.*save_feature_maps"):
        read_header(tmp_path / "other")

    def fresh() -> Path:
        return save_feature_maps(tmp_path / "m", {"transformer": {0: random_map("x")}}, family="wan", num_layers=1)

    for changes in ({"version": "2"}, {"feature_map": "relu"}):
        with pytest.raises(ValueError, match=next(iter(changes.values()))):
            read_header(rewritten(fresh(), **changes))
    for changes in ({"layers": "["}, {"family": None}, {"num_layers": "many"}, {"layers": "[1]"}):
        with pytest.raises(ValueError, match=r"header of .* is damaged"):
            read_header(rewritten(fresh(), **changes))
    layers = json.dumps({"transformer": {"0": random_map("x", heads=6).shape()}})
    with pytest.raises(ValueError, match="its header says"):
        load_feature_maps(rewritten(fresh(), layers=layers))
    layers = json.dumps({"transformer": {"1": random_map("x").shape()}})
    with pytest.raises(ValueError, match="cannot be read"):
        load_feature_maps(rewritten(fresh(), layers=layers))


# ------------------------------------------------------------------------------------------- files of another model
def test_maps_of_another_model(tmp_path: Path) -> None:
    model, inputs = tiny.wan(layers=3)
    linear = save_random_maps(tmp_path / "m", model, inputs=inputs)
    deeper, _ = tiny.wan(layers=4)
    with pytest.raises(ValueError, match="3 attention layers of family 'wan', transformer has 4"):
        accelerate(deeper, Config(linear=linear))
    assert not tiny.served(deeper)  # nothing is left half done
    other, _ = tiny.cogvideox(layers=3)
    with pytest.raises(ValueError, match=r"family 'wan'.*'cogvideox'"):
        accelerate(other, Config(linear=linear))
    with pytest.raises(ValueError, match=r"layer 0 of .* is blocks.0.attn1, here it is 0.attn1"):
        accelerate(model.blocks, Config(linear=linear))
    with pytest.raises(ValueError, match=r"no map for \[7\].*\[0, 1, 2\]"):
        accelerate(model, Config(linear=LinearAttention(linear.weights, (1, 7))))
    pair = SimpleNamespace(transformer=model, transformer_2=tiny.wan(layers=3)[0])
    handle = accelerate(pair, Config(linear=linear))  # maps of one expert: the other stays softmax
    assert handle.stats()["linear"] == {"transformer": [0, 1, 2], "transformer_2": []}
    handle.remove()
    with pytest.raises(FileNotFoundError, match="absent"):
        accelerate(model, Config(linear=LinearAttention(str(tmp_path / "absent"))))


def test_maps_of_two_transformers_want_both(tmp_path: Path) -> None:
    model, _ = tiny.wan(layers=2)
    maps = {e: {1: random_map("blocks.1.attn1", 2, 2, 16)} for e in ("transformer", "transformer_2")}
    path = save_feature_maps(tmp_path / "m", maps, family="wan", num_layers=2)
    with pytest.raises(ValueError, match=r"maps for transformer, transformer_2, but here are transformer;"):
        accelerate(model, Config(linear=LinearAttention(str(path))))
    pair = SimpleNamespace(transformer=model, transformer_2=tiny.wan(layers=2)[0])
    with accelerate(pair, Config(linear=LinearAttention(str(path)))) as handle:
        assert handle.stats()["linear"] == {"transformer": [1], "transformer_2": [1]}


def test_heads_of_another_size(tmp_path: Path) -> None:
    model, inputs = tiny.wan(layers=2)
    for heads, dim in ((2, 8), (4, 16)):
        maps = {"transformer": {1: random_map("blocks.1.attn1", heads, heads, dim)}}
        path = save_feature_maps(tmp_path / "m", maps, family="wan", num_layers=2)
        text = rf"blocks.1.attn1 has 2 heads .* of 16 .* for {heads} .* of {dim}"
        with accelerate(model, Config(linear=LinearAttention(str(path)))), pytest.raises(ValueError, match=text):
            tiny.run(model, inputs)


def test_a_file_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    model, inputs = tiny.wan(layers=2)
    linear = save_random_maps(tmp_path / "m", model, inputs=inputs)
    handle = accelerate(model, Config(linear=linear))
    before = tiny.run(model, inputs)
    with pytest.raises(ValueError, match="no map"):
        handle.reconfigure(Config(linear=LinearAttention(linear.weights, (9,))))
    assert handle.config.linear == linear and torch.equal(tiny.run(model, inputs), before)
