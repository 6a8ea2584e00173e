"""Sana-Video, and Sana for images: nothing here is softmax attention over video tokens, so nothing is served."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from vdit_fast.models.base import ModelAdapter, ServedProcessor
from vdit_fast.models.registry import register
from vdit_fast.models.session import Geometry

__all__ = ["SanaVideoAdapter"]


class SanaVideoAdapter(ModelAdapter):
    family = "sana_video"
    processors: ClassVar[dict[str, type[ServedProcessor]]] = {}
    left_alone: ClassVar[dict[str, str]] = {
        "SanaAttnProcessor2_0": "cross-attention",
        "SanaLinearAttnProcessor2_0": "linear attention: not softmax",
        "SanaLinearAttnProcessor3_0": "linear attention: not softmax",
    }

    def geometry(self, module: nn.Module, arguments: dict[str, Any]) -> Geometry | None:
        return None


register(SanaVideoAdapter())
