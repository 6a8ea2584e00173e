"""DyDiT's layers: attention over the heads that are on, an MLP over the hidden groups that are on, for some tokens.

Dynamic Diffusion Transformer (arXiv 2410.03456) and DyDiT++ (arXiv 2504.06803). The released code multiplies by masks;
here what is off is neither projected nor attended. Parameters have the released names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..ops import adaln_modulate, attention, gate_residual
from .routers import TokenRouter, WidthRouter, width_masks
from .tokens import TokenSubset, subset_linear
from .units import Units, WeightParts, take

__all__ = ["BlockWidth", "DyDiTBlock", "DynamicAttention", "DynamicMlp"]


@dataclass(frozen=True)
class BlockWidth:
    """What one block computes in one call."""

    heads: Units
    groups: Units


class DynamicAttention(nn.Module):
    """Multi-head attention of which some heads may be off: their outputs count as 0, before the output projection.

    With all heads on it is the dense layer, bit for bit. Parameters: ``qkv`` [3 C, C], ``q_norm`` and ``k_norm`` over a
    head's channels with ``qk_norm``, ``proj`` [C, C].
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"DynamicAttention: num_heads {num_heads} does not divide dim {dim}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        norms = (nn.LayerNorm(dim // num_heads, device=device, dtype=dtype) if qk_norm else nn.Identity() for _ in "qk")
        self.q_norm, self.k_norm = norms
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self._parts = WeightParts()

    def forward(self, x: Tensor, heads: Units | None = None) -> Tensor:
        """Attention along N of x ``[B, N, C]``; ``heads``: which are on, None for all."""
        if heads is not None and len(heads.on) != self.num_heads:
            raise ValueError(f"DynamicAttention: {len(heads.on)} heads in the mask, {self.num_heads} in the layer")
        if heads is None or heads.all_on:
            return self.proj(self._attend(self.qkv(x), self.num_heads))
        qkv, bias, proj = self._parts.get(
            heads.on, (self.qkv.weight, self.qkv.bias, self.proj.weight), lambda: self._cut(heads.on)
        )
        assert qkv is not None and proj is not None
        out = self._attend(functional.linear(x, qkv, bias), heads.count)
        return functional.linear(heads.zeroed(out), proj, self.proj.bias)

    def _attend(self, qkv: Tensor, heads: int) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(2)
        out = attention(self.q_norm(q), self.k_norm(k), v)
        assert isinstance(out, Tensor)
        return out.flatten(2)

    def _cut(self, on: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        bias = None if self.qkv.bias is None else take(self.qkv.bias, 0, on, parts=3)
        return take(self.qkv.weight, 0, on, parts=3), bias, take(self.proj.weight, 1, on)


class DynamicMlp(nn.Module):
    """MLP whose hidden channels are ``groups`` equal neighbouring groups, some of which may be off.

    With all groups on it is the dense layer, bit for bit. Parameters: ``fc1`` [hidden, C], ``fc2`` [C, hidden].
    """

    def __init__(
        self, dim: int, hidden: int, groups: int, *, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        if groups < 1 or hidden % groups:
            raise ValueError(f"DynamicMlp: groups {groups} does not divide hidden {hidden}")
        self.groups = groups
        self.fc1 = nn.Linear(dim, hidden, device=device, dtype=dtype)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden, dim, device=device, dtype=dtype)
        self._parts = WeightParts()

    def forward(self, x: Tensor, groups: Units | None = None, tokens: TokenSubset | None = None) -> Tensor:
        """The MLP of x ``[B, N, C]``.

        Args:
            groups: which groups are on, None for all.
            tokens: whose rows x holds, where not all of them count (``TokenSubset.gather``).
        """
        if groups is not None and len(groups.on) != self.groups:
            raise ValueError(f"DynamicMlp: {len(groups.on)} groups in the mask, {self.groups} in the layer")
        w1, b1, w2 = self.fc1.weight, self.fc1.bias, self.fc2.weight
        if groups is None or groups.all_on:
            if tokens is None:
                return self.fc2(self.act(self.fc1(x)))
        else:
            w1, b1, w2 = self._parts.get(groups.on, (w1, b1, w2), lambda: self._cut(groups.on))  # type: ignore[assignment]
        hidden = self.act(subset_linear(x, w1, b1, tokens))
        if groups is not None and groups.items is not None:
            hidden = groups.zeroed(hidden) if tokens is None else tokens.zeroed(hidden, groups)
        return subset_linear(hidden, w2, self.fc2.bias, tokens)

    def _cut(self, on: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        return take(self.fc1.weight, 0, on), take(self.fc1.bias, 0, on), take(self.fc2.weight, 1, on)


class DyDiTBlock(nn.Module):
    """A DiT block with adaLN-Zero and DyDiT's three routers; it loads the state of a released block.

    ``x + gate * attention(heads that are on)``, then ``x + gate * mlp(groups that are on)`` for the tokens that the
    token router selects from the first sum; other tokens stay as they are, bit for bit.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options = {"device": device, "dtype": dtype}
        self.attn = DynamicAttention(dim, num_heads, device=device, dtype=dtype)
        self.mlp = DynamicMlp(dim, int(dim * mlp_ratio), num_heads, device=device, dtype=dtype)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim, **options))
        self.attn_rate = WidthRouter(dim, num_heads, device=device, dtype=dtype)
        self.mlp_rate = WidthRouter(dim, num_heads, device=device, dtype=dtype)
        self.token_selection = TokenRouter(dim, device=device, dtype=dtype)

    def width(self, embedding: Tensor) -> BlockWidth:
        """What the block computes at timestep embeddings ``[B, C]``; one host read. For all blocks at once, or a
        schedule, ``width_masks`` reads once."""
        routers = [(r.router.weight, r.router.bias) for r in (self.attn_rate, self.mlp_rate)]
        heads, groups = zip(*width_masks(routers, embedding), strict=True)
        return BlockWidth(Units.of(heads, embedding.device), Units.of(groups, embedding.device))

    def forward(self, x: Tensor, condition: Tensor, width: BlockWidth | None = None) -> Tensor:
        """The block's output.

        Args:
            x: tokens ``[B, N, C]``.
            condition: ``[B, C]``, of which the modulation is made.
            width: from ``width``; None runs the whole block, all heads, groups and tokens.
        """
        shift, scale, gate, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=1)
        branch = self.attn(adaln_modulate(x, scale, shift), None if width is None else width.heads)
        x = gate_residual(x, branch, gate)
        if width is None:
            return gate_residual(x, self.mlp(adaln_modulate(x, scale2, shift2)), gate2)
        tokens = TokenSubset.of(self.token_selection(x))
        if tokens is None:
            return gate_residual(x, self.mlp(adaln_modulate(x, scale2, shift2), width.groups), gate2)
        rows = tokens.gather(adaln_modulate(x, scale2, shift2))
        return tokens.add(x, self.mlp(rows, width.groups, tokens), gate2)
