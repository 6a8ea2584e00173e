"""Feature maps of linear attention on disk: safetensors, with the model they belong to in the header."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["FeatureMap", "Header", "load_feature_maps", "read_header", "save_feature_maps"]

KIND, VERSION, HEDGEHOG = "vdit_fast.linear", "1", "hedgehog"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """The Hedgehog map of one layer, φ(x) = softmax(x W) ⊕ softmax(−x W).

    Attributes:
        name: module path of the attention layer inside its transformer.
        q: W of the queries, [H, D, D].
        k: W of the keys, [Hkv, D, D], H a multiple of Hkv.
    """

    name: str
    q: Tensor
    k: Tensor

    def __post_init__(self) -> None:
        for key, w in (("q", self.q), ("k", self.k)):
            if w.ndim != 3 or w.shape[1] != w.shape[2] or 0 in w.shape:
                raise ValueError(f"{self.name}: {key} must be [heads, D, D], got {list(w.shape)}")
            if w.dtype not in _DTYPES:
                raise ValueError(f"{self.name}: {key} is {w.dtype}; use float32, bfloat16 or float16")
            if not bool(w.isfinite().all()):
                raise ValueError(f"{self.name}: {key} has values that are not finite")
        if self.q.shape[1] != self.k.shape[1] or self.q.shape[0] % self.k.shape[0]:
            raise ValueError(
                f"{self.name}: q {list(self.q.shape)} and k {list(self.k.shape)} must agree in D, and the heads of q "
                "be a multiple of those of k"
            )

    def shape(self) -> dict[str, Any]:
        """What the header says of it."""
        heads, head_dim, _ = self.q.shape
        return {"name": self.name, "heads": heads, "kv_heads": self.k.shape[0], "head_dim": head_dim}


@dataclass(frozen=True)
class Header:
    """What a file says about itself.

    Attributes:
        family: model family, as in ``Handle.stats()``.
        num_layers: served attention layers of each transformer, converted or not.
        layers: transformer's name in its pipeline -> layer index -> ``name``, ``heads``, ``kv_heads``, ``head_dim``.
        digest: SHA-256 of the maps.
        record: what the training noted.
    """

    family: str
    num_layers: int
    layers: dict[str, dict[int, dict[str, Any]]]
    digest: str
    record: dict[str, Any] = field(default_factory=dict)


def save_feature_maps(
    path: str | os.PathLike[str],
    maps: Mapping[str, Mapping[int, FeatureMap]],
    *,
    family: str,
    num_layers: int,
    record: Mapping[str, Any] | None = None,
) -> Path:
    """Write the maps of one model.

    Args:
        path: of the file, usually ``.safetensors``.
        maps: transformer's name in its pipeline (``"transformer"`` where there is one) -> layer index -> map.
        family, num_layers: as in ``Header``.
        record: anything in plain JSON types.

    Raises:
        ValueError: no layer, or an index that the model does not have.
        ImportError: safetensors is missing (extra ``diffusers``).
    """
    from_file = _safetensors()
    if not maps or not all(maps.values()):
        raise ValueError("maps: at least one layer of every named transformer is needed")
    for expert, layers in maps.items():
        for index in layers:
            if not 0 <= index < num_layers:
                raise ValueError(f"maps: {expert} has layer {index}, but the model has {num_layers} layers (from 0 on)")
    tensors = {
        f"{expert}.{index}.{side}": getattr(layer, side).detach().cpu().contiguous()
        for expert, layers in maps.items()
        for index, layer in layers.items()
        for side in ("q", "k")
    }
    shapes = {
        expert: {str(index): layers[index].shape() for index in sorted(layers)} for expert, layers in maps.items()
    }
    header = {
        "format": "pt",
        "kind": KIND,
        "version": VERSION,
        "feature_map": HEDGEHOG,
        "family": family,
        "num_layers": str(num_layers),
        "layers": json.dumps(shapes),
        "digest": _digest(tensors),
        "record": json.dumps(dict(record or {}), allow_nan=False),
    }
    from_file.torch.save_file(tensors, os.fspath(path), metadata=header)
    return Path(path)


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read what a file says about itself, without its maps.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a file of feature maps.
        ImportError: safetensors is missing (extra ``diffusers``).
    """
    with _open(path) as file:
        header = file.metadata() or {}
    if header.get("kind") != KIND or header.get("version") != VERSION or header.get("feature_map") != HEDGEHOG:
        found = ", ".join(f"{key} {header.get(key)!r}" for key in ("kind", "version", "feature_map"))
        raise ValueError(f"linear.weights: {path} has {found}; expected a file of save_feature_maps, version {VERSION}")
    try:
        layers = {
            expert: {int(index): shape for index, shape in found.items()}
            for expert, found in json.loads(header["layers"]).items()
        }
        return Header(
            header["family"], int(header["num_layers"]), layers, header["digest"], json.loads(header["record"])
        )
    except (KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"linear.weights: the header of {path} is damaged ({error!r})") from error


def load_feature_maps(
    path: str | os.PathLike[str], expert: str = "transformer", layers: Iterable[int] | None = None
) -> dict[int, FeatureMap]:
    """Read the maps of one transformer, by layer index, on the CPU in fp32.

    Args:
        expert: the transformer's name in its pipeline.
        layers: which to read; None: all of them.

    Raises:
        ValueError: the file does not have them, or its tensors are not those of its header.
    """
    header = read_header(path)
    known = header.layers.get(expert, {})
    wanted = sorted(known if layers is None else layers)
    missing = [index for index in wanted if index not in known]
    if missing or not wanted:
        have = "; ".join(f"{name}: {', '.join(map(str, sorted(found)))}" for name, found in header.layers.items())
        raise ValueError(f"linear.layers: {path} has no map for {expert}, layer {missing or 'any'}; it has {have}")
    found = {}
    with _open(path) as file:
        for index in wanted:
            try:
                q, k = (file.get_tensor(f"{expert}.{index}.{side}").float() for side in ("q", "k"))
            except Exception as error:
                raise ValueError(f"linear.weights: {path} cannot be read: {error}") from error
            found[index] = FeatureMap(known[index]["name"], q, k)
            if found[index].shape() != known[index]:
                raise ValueError(
                    f"linear.weights: layer {index} of {path} is {found[index].shape()}, its header says {known[index]}"
                )
    return found


def _digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        found.update(tensors[name].view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _open(path: str | os.PathLike[str]) -> Any:
    if not Path(path).is_file():
        raise FileNotFoundError(f"linear.weights: {path} does not exist; give a file of save_feature_maps")
    try:
        return _safetensors().safe_open(os.fspath(path), framework="pt")
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(f"linear.weights: {path} is not a readable safetensors file ({error})") from error


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError("feature map files need safetensors: pip install 'vdit-fast[diffusers]'") from error
    return safetensors
