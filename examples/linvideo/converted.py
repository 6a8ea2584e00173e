"""The converted demo model on disk: feature maps, and the weights that were trained with them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from vdit_fast.config import Config
from vdit_fast.demo.model import load_demo_model
from vdit_fast.linear import (
    FeatureMap,
    LinearAttention,
    SelectiveTransfer,
    load_feature_maps,
    read_header,
    save_feature_maps,
)

MAPS, WEIGHTS = "feature_maps.safetensors", "weights.safetensors"
HERE = Path(__file__).parent


def load_converted(folder: str | Path = HERE) -> tuple[Any, Config]:
    """The demo model with the converted layers' weights, and the configuration that makes these layers linear."""
    model = load_demo_model()
    with safe_open(str(Path(folder) / WEIGHTS), framework="pt") as file:
        state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    unknown = model.load_state_dict(state, strict=False).unexpected_keys
    if unknown:
        raise ValueError(f"{folder}: the demo model has no weights {unknown}")
    return model, Config(linear=LinearAttention(str(Path(folder) / MAPS)))


def resume(folder: Path, model: nn.Module, transfer: SelectiveTransfer) -> tuple[int, ...]:
    """Put a folder's maps and weights into a model and its transfer; returns the linear layers."""
    maps = load_feature_maps(folder / MAPS)
    with torch.no_grad():
        for layer, found in maps.items():
            place = transfer.layers.index(layer)
            transfer.q_maps[place].copy_(found.q)
            transfer.k_maps[place].copy_(found.k)
    model.load_state_dict(load_converted(folder)[0].state_dict())
    return transfer.round_(maps)


def spent(folder: Path) -> float:
    """Minutes of training that a folder's files have seen."""
    return float(read_header(folder / MAPS).record["minutes"])


def save_converted(
    folder: Path, maps: dict[int, FeatureMap], model: nn.Module, trained: Iterable[str], record: dict[str, Any]
) -> list[Path]:
    """Write both files: maps and trained weights in fp16 (the demo model's own are bf16)."""
    folder.mkdir(parents=True, exist_ok=True)
    half = {i: FeatureMap(m.name, m.q.half(), m.k.half()) for i, m in maps.items()}
    layers = len(model.blocks)  # type: ignore[arg-type]
    first = save_feature_maps(folder / MAPS, {"transformer": half}, family="wan", num_layers=layers, record=record)
    state = model.state_dict()
    weights = {name: state[name].to("cpu", torch.float16).contiguous() for name in trained}
    save_file(weights, str(folder / WEIGHTS), metadata={"format": "pt", "record": json.dumps(record)})
    return [first, folder / WEIGHTS]
