"""Selective transfer: while it trains, a model finds out which of its layers can do with linear attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vdit_fast.ops.linear_attention import linear_attention

from .weights import FeatureMap

if TYPE_CHECKING:
    from vdit_fast.handle import Handle

__all__ = ["SelectiveTransfer"]


class SelectiveTransfer(nn.Module):
    """A mixture of softmax and linear attention in every candidate layer, ``o = r o_softmax + (1 - r) o_linear``, with
    one trained r in [0, 1] per layer that ends as 0 or 1 (LinVideo, arXiv 2510.08318).

    ``attach`` puts it into an accelerated transformer of any family; ``penalty`` and ``count_penalty`` join the loss,
    ``clamp_`` follows every optimiser step, and ``round_`` ends the search.

    Args:
        layers: candidates, by their index in ``Handle.stats()["layers"]``; the others stay softmax.
        heads, head_dim: of the attention.
        target: how many of the candidates shall become linear.
        kv_heads: heads of keys and values where they are fewer.
        ratio: r at the start.

    Attributes:
        ratio: fp32 [candidates], the r of every candidate in the order of ``layers``.
        q_maps, k_maps: W of queries [H, D, D] and keys [Hkv, D, D]; they start as the identity.

    Raises:
        ValueError: a candidate twice, a target beyond the candidates, or a ratio outside [0, 1].
    """

    def __init__(
        self,
        layers: Iterable[int],
        *,
        heads: int,
        head_dim: int,
        target: int,
        kv_heads: int | None = None,
        ratio: float = 0.5,
    ) -> None:
        super().__init__()
        self.layers = tuple(layers)
        if not self.layers or len(set(self.layers)) != len(self.layers) or min(self.layers) < 0:
            raise ValueError(f"layers must name candidates from 0 on, none twice, got {list(self.layers)}")
        if not 0 <= target <= len(self.layers):
            raise ValueError(f"target is {target}; 0 to {len(self.layers)} candidates can become linear")
        if not 0 <= ratio <= 1:
            raise ValueError(f"ratio is {ratio}; a number from 0 (linear) to 1 (softmax) is needed")
        self.target = target
        self.ratio = nn.Parameter(torch.full((len(self.layers),), float(ratio)))
        one = torch.eye(head_dim)
        self.q_maps = nn.ParameterList(one.repeat(heads, 1, 1) for _ in self.layers)
        self.k_maps = nn.ParameterList(one.repeat(kv_heads or heads, 1, 1) for _ in self.layers)
        self._linear: frozenset[int] | None = None
        self._session: Any = None

    # ------------------------------------------------------------------ in a model
    def attach(self, handle: Handle) -> None:
        """Let the candidates of an accelerated transformer run the mixture, forwards and backwards.

        Raises:
            ValueError: the handle has several transformers, lacks a candidate, or runs one of them linear already.
        """
        if len(handle.roots) != 1:
            raise ValueError(f"handle has {len(handle.roots)} transformers; accelerate and convert them one by one")
        session = handle.roots[0].session
        beyond = [layer for layer in self.layers if layer >= len(session.layers)]
        if beyond:
            raise ValueError(f"layers: {beyond} do not exist, the transformer has {len(session.layers)} served layers")
        own = [layer for layer in self.layers if session.layers[layer].own_linear]
        if own:
            raise ValueError(f"layers: {own} of family {session.family!r} are linear by themselves; nothing to convert")
        taken = [layer for layer in self.layers if layer in session.stand_ins]
        if taken:
            raise ValueError(f"layers: {taken} have another stand-in for their attention already")
        self._session = session
        for place, layer in enumerate(self.layers):
            session.stand_ins[layer] = _Mixture(self, place)

    def detach(self) -> None:
        """Give the layers their softmax attention back."""
        for layer in self.layers if self._session is not None else ():
            found = self._session.stand_ins.get(layer)
            if isinstance(found, _Mixture) and found.transfer is self:
                del self._session.stand_ins[layer]
        self._session = None

    def attend(
        self,
        place: int,
        softmax: Callable[[], Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_len: Tensor | None = None,
    ) -> Tensor:
        """Attention [B, L, H, D] of the candidate at ``place``; ``softmax`` computes its softmax attention."""
        kind = self._linear
        if kind is not None and self.layers[place] not in kind:
            return softmax()
        maps = {"q_weight": self.q_maps[place], "k_weight": self.k_maps[place]}
        linear = linear_attention(q, k, v, **maps, kv_len=kv_len)
        if kind is not None:
            return linear
        r = self.ratio[place].to(q.dtype)
        return r * softmax() + (1 - r) * linear

    # ------------------------------------------------------------------ the loss
    def penalty(self, alpha: float) -> Tensor:
        """``sum(1 - |2 r - 1| ** alpha)``, 0 where every r is 0 or 1; alpha falls from 20 to 2 in the paper."""
        return (1 - (2 * self.ratio - 1).abs() ** alpha).sum()

    def count_penalty(self) -> Tensor:
        """``(linear layers after rounding - target) ** 2``; the gradient passes the rounding unchanged."""
        rounded = self.ratio + (self.ratio.round() - self.ratio).detach()
        return ((1 - rounded).sum() - self.target) ** 2

    @torch.no_grad()
    def clamp_(self) -> None:
        """Bring every r back to [0, 1]."""
        self.ratio.clamp_(0, 1)

    # ------------------------------------------------------------------ the result
    def chosen(self) -> tuple[int, ...]:
        """The ``target`` candidates with the smallest r: those that round to 0, where as many do."""
        order = torch.sort(self.ratio.detach(), stable=True).indices.tolist()
        return tuple(sorted(self.layers[place] for place in order[: self.target]))

    @torch.no_grad()
    def round_(self, linear: Iterable[int] | None = None) -> tuple[int, ...]:
        """Make every candidate one kind, from now on at its cost alone: ``linear`` ones, or the ``chosen``."""
        kind = tuple(sorted(self.chosen() if linear is None else linear))
        strange = [layer for layer in kind if layer not in self.layers]
        if strange:
            raise ValueError(f"linear: {strange} are no candidates; those are {list(self.layers)}")
        self._linear = frozenset(kind)
        for place, layer in enumerate(self.layers):
            self.ratio[place] = float(layer not in self._linear)
        return kind

    def blend_(self, ratio: float) -> None:
        """Mix in every candidate again, beginning with this r."""
        self._linear = None
        with torch.no_grad():
            self.ratio.fill_(ratio)

    def feature_maps(self, names: Mapping[int, str]) -> dict[int, FeatureMap]:
        """The maps of the layers that became linear, for ``save_feature_maps``; ``names`` are module paths by layer."""
        linear = self._linear if self._linear is not None else frozenset(self.chosen())
        return {
            layer: FeatureMap(names[layer], self.q_maps[place].detach().clone(), self.k_maps[place].detach().clone())
            for place, layer in enumerate(self.layers)
            if layer in linear
        }


class _Mixture:
    """What stands in for the attention of one candidate."""

    def __init__(self, transfer: SelectiveTransfer, place: int) -> None:
        self.transfer = transfer
        self.place = place

    def __call__(self, softmax: Callable[[], Tensor], q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None) -> Tensor:
        return self.transfer.attend(self.place, softmax, q, k, v, kv_len)
