"""Streaming generation: keys and values of past frames."""

from vdit_fast.streaming.causal_video import CausalVideo
from vdit_fast.streaming.kv_cache import KVCache

__all__ = ["CausalVideo", "KVCache"]
