"""Puts a feature cache around the blocks of a transformer, once it is known that there are any."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from vdit_fast.caching.adaptive import AdaptivePolicy
from vdit_fast.caching.base import CachePolicy
from vdit_fast.caching.engine import FeatureCache
from vdit_fast.caching.features import BlockFeatures, Features
from vdit_fast.caching.span import SpanFeatures
from vdit_fast.context import StepContext
from vdit_fast.models import module_cache
from vdit_fast.models.blocks import transformer_blocks
from vdit_fast.models.row_layout import RowLayout
from vdit_fast.reference.adaln import Rounding

if TYPE_CHECKING:
    from vdit_fast.models.base import ModelAdapter
    from vdit_fast.models.block_modules import BlockModules
    from vdit_fast.models.blocks import BlockCall
    from vdit_fast.models.session import Session

__all__ = ["check", "granularities", "setup", "teardown"]


def granularities(root: nn.Module, adapter: ModelAdapter) -> tuple[str, ...]:
    """What a cache may keep of this transformer."""
    blocks = _blocks(root, adapter)
    if not blocks:
        return ("model",)
    described = module_cache.unknown_block(blocks, adapter.block_modules) is None
    return ("model", "span", "block", "module") if described else ("model", "span", "block")


def _blocks(root: nn.Module, adapter: ModelAdapter) -> list[nn.Module]:
    return [block for _, block in transformer_blocks(root, adapter)]


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
    if isinstance(policy, AdaptivePolicy) and policy.looks_at == "input" and "module" not in known:
        raise RuntimeError(
            f"the cache policy {policy.name!r} looks at the modulated input of the first block, which is not known of "
            f"{type(root).__name__} (family {adapter.family!r}); use 'first_block' or 'taylorseer'"
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
    blocks, known = _blocks(root, adapter), adapter.block_modules
    cache.hooked = {"blocks": len(blocks)}
    if policy.granularity == "module":
        cache.hooked["modules"] = module_cache.attach(root, blocks, known, session)
    if isinstance(policy, AdaptivePolicy) and policy.looks_at == "input":
        cache.modulated = _Modulated(known)
    if isinstance(adapter.rows, RowLayout):
        cache.per_token = int(getattr(root.get_submodule(adapter.rows.output), "out_features", 0))
    if cache.features is None:
        cache.features = _features(blocks, adapter, session)
    session.around["cache"] = cache


class _Modulated:
    """The timestep-modulated input of a block's attention."""

    def __init__(self, known: Mapping[str, BlockModules]) -> None:
        self._known = known

    def __call__(self, call: BlockCall) -> Tensor:
        return self._known[type(call.module).__name__].modulated(call.module, call.arguments)


def _features(blocks: list[nn.Module], adapter: ModelAdapter, session: Session) -> Features:
    cache, policy = session.cache, session.cache.policy
    if policy is not None and policy.granularity == "module":
        known = adapter.block_modules
        parts = [known[type(block).__name__].parts(block) for block in blocks]
        rounding: Rounding = "fast" if session.config.fuse == "fast" else "eager"
        return module_cache.ModuleFeatures(cache, known, parts, rounding)
    return BlockFeatures(cache) if policy is not None and policy.granularity == "block" else SpanFeatures(cache)


def teardown(root: nn.Module, session: Session, adapter: ModelAdapter) -> None:
    """Take away what ``setup`` put up."""
    module_cache.detach(_blocks(root, adapter), adapter.block_modules, session)
    if isinstance(session.around.get("cache"), FeatureCache):
        del session.around["cache"]
