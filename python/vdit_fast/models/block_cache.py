"""Puts a feature cache around the blocks of a transformer, once it is known that there are any."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from vdit_fast.caching.base import CachePolicy
from vdit_fast.caching.engine import FeatureCache
from vdit_fast.caching.features import BlockFeatures
from vdit_fast.caching.span import SpanFeatures
from vdit_fast.context import StepContext
from vdit_fast.models.blocks import transformer_blocks

if TYPE_CHECKING:
    from vdit_fast.models.base import ModelAdapter
    from vdit_fast.models.session import Session

__all__ = ["check", "granularities", "setup", "teardown"]


def granularities(root: nn.Module, adapter: ModelAdapter) -> tuple[str, ...]:
    """What a cache may keep of this transformer."""
    return ("model", "span", "block") if transformer_blocks(root, adapter) else ("model",)


def check(root: nn.Module, adapter: ModelAdapter, policy: CachePolicy) -> None:
    """Raise where the policy has nothing to stand around in this transformer.

    Raises:
        RuntimeError: the granularity does not work there; the message names those that do.
        ValueError: a range of blocks beyond the transformer's.
    """
    known = granularities(root, adapter)
    if policy.granularity not in known:
        raise RuntimeError(
            f"the cache policy {policy.name!r} works at granularity {policy.granularity!r}, which "
            f"{type(root).__name__} (family {adapter.family!r}) does not have: there it is "
            f"{' or '.join(map(repr, known))}"
        )
    if policy.granularity != "model":
        policy.span(StepContext(), len(transformer_blocks(root, adapter)))


def setup(root: nn.Module, session: Session, adapter: ModelAdapter) -> None:
    """Make the session's cache stand around blocks where its granularity asks for it."""
    cache, policy = session.cache, session.cache.policy
    assert policy is not None
    if policy.granularity == "model":
        cache.hooked = {"transformers": 1}
        return
    if cache.features is None:
        cache.features = BlockFeatures(cache) if policy.granularity == "block" else SpanFeatures(cache)
    cache.hooked = {"blocks": len(transformer_blocks(root, adapter))}
    session.around["cache"] = cache


def teardown(session: Session) -> None:
    """Take away what ``setup`` put up."""
    if isinstance(session.around.get("cache"), FeatureCache):
        del session.around["cache"]
