"""Replicas that ``nn.DataParallel`` makes of an accelerated transformer: shallow copies in threads of one session.

They have taken over its stand-ins for ``forward``, which compute with the original's weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from vdit_fast.forwards import ForwardStandIn

if TYPE_CHECKING:
    from vdit_fast.models.session import Session

__all__ = ["is_replica", "settle"]

UNCACHED = "a replica of DataParallel runs: its threads would share one cache"


def is_replica(module: nn.Module) -> bool:
    """Whether ``torch.nn.parallel.replicate`` made it."""
    return bool(getattr(module, "_is_replica", False))


def settle(replica: nn.Module, session: Session) -> None:
    """Before a replica's forward: its modules get their stock forward, and a cache around them is counted as left out.

    Raises:
        RuntimeError: something stands around its whole forward, or changes what its blocks compute.
    """
    names = sorted((session.around.keys() | session.around_attention.keys()) - {"cache"})
    whole = replica.__dict__.get("forward")
    if isinstance(whole, ForwardStandIn) and whole.of(session):
        names.insert(0, whole.what)
    if names:
        raise RuntimeError(
            f"DataParallel: a replica cannot run with {' and '.join(names)}, whose state and weights are the "
            "original's; end what stands there (a cache: set it to null, or to granularity 'span', which replicas "
            "leave out; the rest: what the call that made it returned, or None passed to it), or take a process per "
            "GPU: torchrun with vdit_fast.parallel or DistributedDataParallel"
        )
    for child in replica.modules():
        wrapper = child.__dict__.get("forward")
        if isinstance(wrapper, ForwardStandIn) and wrapper.of(session) and wrapper.module is not child:
            del child.__dict__["forward"]
    if session.config.cache is not None:
        session.cache.full[UNCACHED] += 1
        session.tell(f"the cache {session.config.cache.name!r} is left out: {UNCACHED}")
