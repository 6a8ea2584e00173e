"""Random feature maps for tiny models, and linear attention in them by another way: the explicit matrix, in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdit_fast import accelerate, reference
from vdit_fast.linear import FeatureMap, LinearAttention, save_feature_maps
from vdit_fast.models.session import Session


@contextmanager
def watched(kind: Any = None) -> Iterator[dict[int, tuple[int, int, int]]]:
    """(heads, heads of keys, head dim) of every served layer that runs meanwhile.

    ``kind(session, layer, q, k, v, kv_len, scale)`` computes a layer's attention, or returns None to leave it alone.
    """
    shapes: dict[int, tuple[int, int, int]] = {}
    attend = Session.attend

    def noted(
        self: Session, layer: int, q: Tensor, k: Tensor, v: Tensor, kv_len: Any, anchor: Any,
        scale: float | None = None, mask: Any = None,
    ) -> Tensor:  # fmt: skip
        shapes[layer] = q.shape[2], k.shape[2], q.shape[3]
        found = None if kind is None else kind(self, layer, q, k, v, kv_len, scale)
        return attend(self, layer, q, k, v, kv_len, anchor, scale, mask) if found is None else found

    Session.attend = noted  # type: ignore[method-assign]
    try:
        yield shapes
    finally:
        Session.attend = attend  # type: ignore[method-assign]


def save_random_maps(
    path: Path, model: Any, layers: list[int] | None = None, *, inputs: dict[str, Any], spread: float = 1.0
) -> LinearAttention:
    """Maps of every layer of a model (its shapes are found by running it), of which ``layers`` are used."""
    with accelerate(model) as handle, watched() as shapes, torch.no_grad():
        model(**inputs)
        rows = handle.stats()["layers"]
    maps = {
        row["layer"]: FeatureMap(row["name"], *(spread * torch.randn(n, dim, dim) / dim**0.5 for n in (heads, groups)))
        for row in rows
        if row["layer"] in shapes
        for heads, groups, dim in [shapes[row["layer"]]]
    }
    save_feature_maps(path, {"transformer": maps}, family=rows[0]["family"], num_layers=len(rows))
    return LinearAttention(str(path), None if layers is None else tuple(layers))


def by_matrix(maps: dict[int, FeatureMap]) -> Any:
    """The attention of the given layers by the explicit N x N matrix, in fp64; for ``watched``."""

    def attention(
        session: Session, layer: int, q: Tensor, k: Tensor, v: Tensor, kv_len: Any, scale: float | None
    ) -> Tensor | None:
        if layer not in maps:
            return None
        factor = 1.0 if scale is None else scale * q.shape[-1] ** 0.5
        found = maps[layer]
        out = reference.linear_attention(
            q.double() * factor, k.double(), v.double(), q_weight=found.q.double(), k_weight=found.k.double(),
            kv_len=kv_len,
        )  # fmt: skip
        return out.to(q.dtype)

    return attention
