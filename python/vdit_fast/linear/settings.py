"""The ``linear`` key of a configuration: a file of feature maps, and which of its layers to use."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .weights import read_header

__all__ = ["LinearAttention"]


@dataclass(frozen=True)
class LinearAttention:
    """Layers that run linear attention in place of softmax attention (LinVideo, arXiv 2510.08318).

    Args:
        weights: path of a file that ``save_feature_maps`` wrote; it is read by ``accelerate``.
        layers: which of the file's layers to use, by their index in ``Handle.stats()["layers"]``; None: all of them.

    Raises:
        TypeError, ValueError: a field of the wrong type or value.
    """

    weights: str
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.weights, (str, os.PathLike)) or not str(self.weights):
            raise TypeError(f"linear.weights must be the path of a feature map file, got {self.weights!r}")
        object.__setattr__(self, "weights", str(self.weights))
        if self.layers is None:
            return
        layers = self.layers
        if not isinstance(layers, (list, tuple)) or not all(type(i) is int for i in layers):
            raise TypeError(f"linear.layers must be a list of layer indices, or null for all, got {layers!r}")
        if not layers or min(layers) < 0 or len(set(layers)) != len(layers):
            raise ValueError(
                f"linear.layers must name at least one layer, from 0 on, none twice, got {list(layers)}; "
                "for no layer set linear to null"
            )
        object.__setattr__(self, "layers", tuple(sorted(layers)))

    @classmethod
    def from_dict(cls, value: Mapping[str, Any] | str | os.PathLike[str]) -> LinearAttention:
        """From the mapping form, or from a path alone."""
        if not isinstance(value, Mapping):
            return cls(str(value))
        unknown = [str(key) for key in value if key not in ("weights", "layers")]
        if unknown or "weights" not in value:
            what = f"the unknown key {unknown[0]!r}" if unknown else "no key 'weights'"
            raise ValueError(f"linear has {what}; its keys are weights (a path) and layers (a list or null)")
        return cls(value["weights"], value.get("layers"))

    def to_dict(self) -> dict[str, Any]:
        """The mapping form in plain JSON/YAML types."""
        return {"weights": self.weights, "layers": None if self.layers is None else list(self.layers)}

    def identity(self) -> dict[str, Any]:
        """The mapping form with the file's content in place of its path; reads the file's header."""
        return self.to_dict() | {"weights": read_header(self.weights).digest}
