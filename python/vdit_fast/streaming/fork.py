"""Denoise steps beside a frozen prefix: a chunk whose keys and values never enter the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from vdit_fast.ops.attention import attention

if TYPE_CHECKING:
    from vdit_fast.streaming.kv_cache import KVCache

__all__ = ["KVFork"]


class KVFork:
    """Reads a frozen ``KVCache`` and holds nothing itself, so any number of candidates of a chunk, and all their steps,
    share one prefix.

    Made by ``KVCache.fork``. The chunk's own keys and values come with every call and are read as a segment beside the
    pages: in place, whole, by every query.
    """

    def __init__(self, cache: KVCache) -> None:
        self._cache, self._frames, self._thaws = cache, cache.frames, cache.thaws

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        keys: Tensor | None = None,
        scale: float | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention over the prefix and the chunk.

        Args:
            q, k, v: [batch, tokens, heads, head_dim] of the chunk after norm and RoPE.
            keys: the prefix as ``rotated`` returned it, for ``"pre_rope"``.
            scale, return_lse: of ``vdit_fast.attention``.

        Raises:
            RuntimeError: the cache was thawed since.
        """
        cache = self._cache
        if not cache.frozen or cache.thaws != self._thaws:
            raise RuntimeError("fork: the cache was thawed; freeze it and fork it again")
        stored, values = cache.keys_values(layer)
        cache.check_keys("attend", keys)
        if not self._frames:
            return attention(q, k, v, scale=scale, return_lse=return_lse)
        prefix = stored if keys is None else keys
        return attention(q, prefix, values, scale=scale, segments=[(k, v)], return_lse=return_lse)
