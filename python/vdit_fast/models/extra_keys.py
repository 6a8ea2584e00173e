"""Further keys and values that the attention of a transformer reads beside its own sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from vdit_fast.models.forward import in_backward
from vdit_fast.models.kernels import over_plan

if TYPE_CHECKING:
    from vdit_fast.models.heads import HeadsCall
    from vdit_fast.models.session import Session

__all__ = ["Captured", "ExtraKeys", "Feed", "FeedMode", "extra_keys", "refuse_capture"]

FeedMode = Literal["concat", "sum"]
Pair = tuple[Tensor, Tensor]


@dataclass(eq=False)
class Captured:
    """Keys and values of the video tokens in the layers of one transformer, as of the last time each of them ran."""

    layers: int
    """Number of served layers."""
    keys: dict[int, Pair] = field(default_factory=dict)
    """Layer -> k and v [B, N, Hkv, D] after norm and RoPE."""
    session: Session | None = None
    """Where they are taken from; None after ``stop``."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(x.nbytes for pair in self.keys.values() for x in pair)

    def stop(self) -> None:
        """Take no more; what is held stays."""
        if self.session is not None:
            found = self.session.around_heads.get("segments")
            if isinstance(found, ExtraKeys) and found.captured is self:
                found.captured = None
            self.session = None

    def take(self, call: HeadsCall) -> None:
        """What a call reads of its own video."""
        forward = call.forward
        if forward is not None and forward.subset is not None and forward.subset.partial:
            raise RuntimeError("capture: a step computes some of the tokens only; set subset to null")
        geometry = forward.geometry if forward is not None else None
        k, v = call.k, call.v
        refuse_capture(call.session)
        if geometry is not None:
            text = k.shape[1] - geometry.n_video - geometry.history
            first = text if geometry.text_first else geometry.history
            k, v = (x[:, first : first + geometry.n_video] for x in (k, v))
        elif call.kv_len is not None:
            raise RuntimeError(
                "capture: some keys are padding, and without a known token grid nobody can tell the video's; run the "
                "whole transformer"
            )
        # a copy: a compiled graph uses its buffers again
        self.keys[call.layer] = k.clone(), v.clone()


def refuse_capture(session: Session) -> None:
    """Raise while somebody streams: the keys of a call are then rows of a cache, or follow an order of their own."""
    found = session.around_heads.get("streaming")
    if found is not None:
        raise RuntimeError(
            f"capture: {type(found).__name__} stands around attention, whose keys are not those of one whole clip; end "
            "the stream first"
        )


@dataclass(frozen=True, eq=False)
class Feed:
    """What the layers of a transformer read of another's."""

    captured: Captured
    mode: FeedMode
    gate: float | Tensor

    def __call__(self, call: HeadsCall, proceed: Callable[[], Tensor]) -> Tensor:
        if isinstance(self.gate, float) and self.gate == 0:
            return proceed()
        k, v = self._keys(call)
        if self.mode == "concat":
            return beside(call, k, v, proceed)
        q, scale = call.q, call.scale  # whoever is further in may exchange them
        out = proceed()
        k, v = (x.expand(q.shape[0], -1, -1, -1) for x in (k, v))
        other = over_plan(q, k, v, None, scale, None)
        return out + self._factor(call, out) * other

    def _factor(self, call: HeadsCall, out: Tensor) -> float | Tensor:
        """The gate as it multiplies [B, N, H, D] of the call's heads."""
        if not isinstance(self.gate, Tensor):
            return self.gate
        gate, heads = self.gate.to(out), out.shape[2]
        if gate.ndim == 0:
            return gate
        if call.heads is not None and gate.shape[0] == call.heads.total:
            gate = gate.narrow(0, call.heads.first, call.heads.count)
        if gate.shape[0] != heads:
            raise ValueError(f"feed: gate has {gate.shape[0]} entries, the layer has {heads} heads")
        return gate.view(-1, 1)

    def _keys(self, call: HeadsCall) -> Pair:
        """Of the same layer in the other transformer; a forward that is run again for gradients gets the same ones."""
        forward = call.forward
        again = forward.fed.get(call.layer) if forward is not None and in_backward() else None
        pair = again or self.captured.keys.get(call.layer)
        name = call.session.layers[call.layer].name
        if pair is None:
            raise RuntimeError(
                f"feed: nothing was captured yet for {name}; run the other transformer first, or feed(None)"
            )
        (k, v), here, shard = pair, call.k, call.heads
        if shard is not None and k.shape[2] == shard.kv_total:
            k, v = shard.own_keys(k), shard.own_keys(v)
        if k.shape[0] not in (1, here.shape[0]) or k.shape[2:] != here.shape[2:] or k.device != here.device:
            raise ValueError(
                f"feed: the other transformer's keys are {list(k.shape)} on {k.device}, those of {name} "
                f"{list(here.shape)} on {here.device}; batch (or 1), heads, head dimension and device must agree"
            )
        if call.recorded and forward is not None and not in_backward():
            forward.fed[call.layer] = pair
        return k.to(here.dtype), v.to(here.dtype)


class ExtraKeys:
    """Innermost around attention: whatever exchanges the sequence further out, every query reads these keys once."""

    def __init__(self) -> None:
        self.memory: dict[int, Pair] = {}
        """Of the block that is running, by layer."""
        self.read: set[int] = set()
        """Layers whose attention has read them."""
        self.captured: Captured | None = None
        self.feed: Feed | None = None

    def fresh(self) -> ExtraKeys:
        new = ExtraKeys()
        new.feed = self.feed
        return new

    def __call__(self, call: HeadsCall, proceed: Callable[[], Tensor]) -> Tensor:
        if self.captured is not None and not in_backward():
            self.captured.take(call)
        feed, pair = self.feed, self.memory.get(call.layer)

        def fed() -> Tensor:
            return proceed() if feed is None else feed(call, proceed)

        if pair is None:
            return fed()
        self.read.add(call.layer)
        return beside(call, *pair, fed)


def beside(call: HeadsCall, k: Tensor, v: Tensor, proceed: Callable[[], Tensor]) -> Tensor:
    """The call with one segment more. Whoever stands further out may go on more than once, so it leaves again."""
    given = call.segments
    dtype = call.k.dtype  # under autocast another one than the projections' may be
    call.segments = [*given, (k.to(dtype), v.to(dtype))]
    try:
        return proceed()
    finally:
        call.segments = given


def extra_keys(session: Session) -> ExtraKeys:
    """The session's, made where there is none."""
    found = session.around_heads.setdefault("segments", ExtraKeys())
    assert isinstance(found, ExtraKeys)
    return found
