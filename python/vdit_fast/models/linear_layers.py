"""Layers whose attention is linear: which a configuration names, whether the file fits the model, and their calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdit_fast.linear.weights import FeatureMap, Header, load_feature_maps, read_header
from vdit_fast.models.forward import in_backward
from vdit_fast.models.ledger import LayerLedger, stamp
from vdit_fast.ops.linear_attention import linear_attention

if TYPE_CHECKING:
    from vdit_fast.config import Config
    from vdit_fast.context import HeadShard
    from vdit_fast.models.heads import HeadsCall
    from vdit_fast.models.session import Session

__all__ = ["LinearLayer", "StandIn", "convert", "converted", "linear_maps", "own_linear_attention", "stand_in"]

StandIn = Callable[[Callable[[], Tensor], Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""What runs in place of a layer's softmax attention: (that attention, q, k, v, kv_len) -> [B, L, H, D]."""


class LinearLayer:
    """Linear attention of one layer. Its maps follow q's device."""

    def __init__(self, where: str, feature_map: FeatureMap) -> None:
        self.where = where
        self.feature_map = feature_map
        self._placed: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._shares: dict[int, LinearLayer] = {}

    def __call__(self, softmax: Callable[[], Tensor], q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None) -> Tensor:
        maps = self.feature_map
        wanted = (maps.q.shape[0], maps.k.shape[0], maps.q.shape[1])
        if (q.shape[2], k.shape[2], q.shape[3]) != wanted:
            raise ValueError(
                f"linear: {self.where} has {q.shape[2]} heads ({k.shape[2]} of keys) of {q.shape[3]} channels, its "
                f"feature map is for {wanted[0]} ({wanted[1]}) of {wanted[2]}; these are the maps of another model"
            )
        q_weight, k_weight = self._on(q.device)
        return linear_attention(q, k, v, q_weight=q_weight, k_weight=k_weight, kv_len=kv_len)

    def for_heads(self, shard: HeadShard) -> LinearLayer:
        """The layer for a call that has some of the heads."""
        known = self._shares.get(shard.first)
        if known is None:
            maps = self.feature_map
            if (maps.q.shape[0], maps.k.shape[0]) != (shard.total, shard.kv_total):
                return self  # of another model, which the call says
            with torch.inference_mode(False):
                own = maps.q.narrow(0, shard.first, shard.count), shard.own_keys(maps.k, 0)
            known = self._shares[shard.first] = LinearLayer(self.where, FeatureMap(maps.name, *own))
        return known

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._placed:
            with torch.inference_mode(False):
                self._placed[device] = self.feature_map.q.to(device), self.feature_map.k.to(device)
        return self._placed[device]


def stand_in(
    found: StandIn, ledger: LayerLedger, call: HeadsCall, softmax: Callable[[], Tensor], *, again: bool
) -> Tensor:
    """One call of a layer with a stand-in. ``again``: recomputed for gradients, and not counted."""
    q = call.q
    kinds = (call.mask, "a mask over frames"), (call.plan, call.planned), (call.segments or None, "further keys")
    for given, what in kinds:
        if given is not None:
            raise RuntimeError(
                f"{ledger.name} cannot run linear attention: it reads every key once, and this call has {what}; "
                f"take layer {ledger.layer} out of linear.layers"
            )
    if call.heads is not None:
        if not isinstance(found, LinearLayer):
            raise RuntimeError(f"{ledger.name}: what runs in place of its attention knows all heads, ranks have some")
        found = found.for_heads(call.heads)
    begin = stamp(q.device)
    if call.scale is not None:  # the map is one of the q that would have the default scale
        q = q * (call.scale * q.shape[-1] ** 0.5)
    out = found(softmax, q, call.k, call.v, call.kv_len)
    if ledger.converted and not again:
        ledger.calls += 1
        ledger.attention_time.add(begin, stamp(q.device))
    return out


def own_linear_attention(
    session: Session, layer: int, q: Tensor, k: Tensor, v: Tensor, anchor: Tensor | None, **inputs: Any
) -> Tensor:
    """One call of a layer that is linear by the model's own design; ``inputs`` are those of ``linear_attention``."""
    ledger = session.layers[layer]
    if session.around_heads:
        who = ", ".join(session.around_heads)
        raise RuntimeError(
            f"{ledger.name} is linear attention, which reads every key of its sequence once; {who} cannot work with it"
        )
    again, forward = in_backward(), session.forward
    if anchor is not None and torch.is_grad_enabled() and q.requires_grad:
        if forward is not None and not again:
            session.anchor(anchor, forward)
        forward = session.forward_of(anchor)
    begin = stamp(q.device)
    out = linear_attention(q, k, v, **inputs)
    if not again:
        ledger.calls += 1
        ledger.attention_time.add(begin, stamp(q.device))
        if session.config.attention is not None:
            ledger.count(ledger.dense, ledger.always_dense or "")
    if not session.hooks.at_heads(layer):
        return out
    return session.hooks.heads(session, forward, layer, out, lambda plan: session.no_plan(layer))


def convert(session: Session, maps: Mapping[int, FeatureMap]) -> None:
    """Let these layers run linear attention, and all others softmax attention."""
    session.stand_ins = {layer: LinearLayer(session.layers[layer].name, found) for layer, found in maps.items()}
    place = 0
    for ledger in session.layers:
        ledger.converted = ledger.layer in maps
        ledger.place = place
        place += ledger.planned


def converted(session: Session) -> dict[int, FeatureMap]:
    """The maps of the layers that ``convert`` made linear."""
    layers = {layer: found for layer, found in session.stand_ins.items() if isinstance(found, LinearLayer)}
    return {layer: found.feature_map for layer, found in layers.items()}


def linear_maps(sessions: Sequence[Session], config: Config) -> list[dict[int, FeatureMap]]:
    """The feature maps that a configuration means for each transformer, by layer.

    Raises:
        FileNotFoundError, ValueError: no such file, not one of feature maps, or one of another model.
    """
    settings = config.linear
    if settings is None:
        return [{} for _ in sessions]
    path, header = settings.weights, read_header(settings.weights)
    experts = [session.expert for session in sessions]
    beyond = sorted(set(header.layers) - set(experts))
    if beyond:
        raise ValueError(
            f"linear.weights: {path} has maps for {', '.join(header.layers)}, but here are {', '.join(experts)}; "
            "accelerate the pipeline they were trained for"
        )
    wanted = settings.layers
    known = {index for layers in header.layers.values() for index in layers}
    if wanted is not None and set(wanted) - known:
        raise ValueError(f"linear.layers: {path} has no map for {sorted(set(wanted) - known)}; it has {sorted(known)}")
    found = []
    for session in sessions:
        own = header.layers.get(session.expert, {})
        layers = [index for index in sorted(own) if wanted is None or index in wanted]
        if layers:
            _check(session, header, path, layers)
        found.append(load_feature_maps(path, session.expert, layers) if layers else {})
    return found


def _check(session: Session, header: Header, path: str, layers: list[int]) -> None:
    """Raise where the maps are not those of the session's transformer."""
    here = (session.family, len(session.layers))
    if here != (header.family, header.num_layers):
        raise ValueError(
            f"linear.weights: {path} is for {header.num_layers} attention layers of family {header.family!r}, "
            f"{session.expert} has {here[1]} of {here[0]!r}; take the file that was trained for this model"
        )
    for index in layers:
        name = header.layers[session.expert][index]["name"]
        if session.layers[index].name != name:
            raise ValueError(
                f"linear.weights: layer {index} of {path} is {name}, here it is {session.layers[index].name}; "
                "take the file that was trained for this model, and accelerate the whole transformer"
            )
        if session.layers[index].own_linear:
            raise ValueError(f"linear.layers: {name} of {here[0]!r} is linear attention already; set linear to null")
