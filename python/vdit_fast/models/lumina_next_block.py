"""What a feature cache must know of the blocks of Lumina-Next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vdit_fast.models.block_modules import BlockModules, Forecast, Outputs

__all__ = ["LUMINA_NEXT_MODULES"]


class _Modules:
    """Attention and feed-forward, whose normed results are kept: tanh gates multiply them."""

    memory = "text is read beside the video under a gate of its own, and nobody says where memory belongs"
    hooked = ("norm2", "ffn_norm2")

    def parts(self, block: Any) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(self.hooked, (0,))

    def features(self, block: Any, outputs: Outputs) -> dict[str, Tensor]:
        return {name: outputs[name][0] for name in self.hooked}

    def modulated(self, block: Any, arguments: Mapping[str, Any]) -> Tensor:
        normed: Tensor = block.norm1(arguments["hidden_states"], arguments["temb"])[0]
        return normed

    def forecast(self, block: Any, arguments: Mapping[str, Any], forecast: Forecast) -> Tensor:
        rows = block.norm1.linear(block.norm1.silu(arguments["temb"]))
        _, gate, _, mlp_gate = (torch.tanh(row) for row in rows.chunk(4, dim=1))
        return forecast.add(arguments["hidden_states"], {"norm2": gate, "ffn_norm2": mlp_gate})


LUMINA_NEXT_MODULES: dict[str, BlockModules] = {"LuminaNextDiTBlock": _Modules()}
