"""Keys and values of all tokens, kept across steps and refreshed row by row."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vdit_fast.ops.rows import scatter_rows

__all__ = ["KeptKeys", "check_budget", "kept_bytes"]

_GIB = 2**30


def kept_bytes(k: Tensor, v: Tensor, layers: int, branches: int) -> int:
    """Bytes of ``layers`` layers' keys and values, of ``branches`` guidance branches: for k and v [B, L, H, D] of one
    dtype 2·B·L·H·D·size·layers·branches."""
    return (k.numel() * k.element_size() + v.numel() * v.element_size()) * layers * branches


@dataclass
class KeptKeys:
    """Keys (after norm and RoPE: the tokens' positions do not change) and values of one guidance branch, by layer."""

    k: dict[int, Tensor] = field(default_factory=dict)
    """[B, L, H, D] contiguous."""
    v: dict[int, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(t.numel() * t.element_size() for kept in (self.k, self.v) for t in kept.values())

    def keep(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Take all rows of a layer."""
        for kept, new in ((self.k, k), (self.v, v)):
            old = kept.get(layer)
            if old is None or old.shape != new.shape or old.dtype != new.dtype or old.device != new.device:
                with torch.inference_mode(False):  # an inference tensor could not be updated outside of that mode
                    kept[layer] = new.detach().clone(memory_format=torch.contiguous_format)
            else:
                old.copy_(new.detach())

    def refresh(self, layer: int, k: Tensor, v: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Write some rows, k, v [B, K, H, D] and int32 [1, K], into a layer's, and return those of all tokens."""
        scatter_rows((self.k[layer], self.v[layer]), (k.detach(), v.detach()), rows)
        return self.k[layer], self.v[layer]


def check_budget(budget_gib: float | None, k: Tensor, v: Tensor, layers: int, branches: int, what: str) -> None:
    """Refuse keys and values that would take more than the budget.

    Raises:
        RuntimeError: it names what is needed, per layer and token, and the longest sequence that would fit.
    """
    if budget_gib is None:
        return
    needed, budget = kept_bytes(k, v, layers, branches), int(budget_gib * _GIB)
    if needed <= budget:
        return
    per_token = needed // k.shape[1]
    raise RuntimeError(
        f"{what}: keys and values of {k.shape[1]:,} tokens in {layers} layers and {branches} guidance branches take "
        f"{needed:,} bytes ({needed / _GIB:.2f} GiB; {per_token:,} per token), but kv_budget_gib is {budget_gib:g}; "
        f"at most {budget // per_token:,} tokens would fit. Raise kv_budget_gib, draw a smaller clip, or set subset to "
        "null in the configuration"
    )
