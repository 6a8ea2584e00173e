"""Streaming generation: keys and values of past frames, and roll-outs that read them."""

from vdit_fast.streaming.causal_video import CausalVideo
from vdit_fast.streaming.fork import KVFork
from vdit_fast.streaming.kv_cache import KVCache
from vdit_fast.streaming.split_kv import choose_parts, split_attention, split_plan

__all__ = ["CausalVideo", "KVCache", "KVFork", "choose_parts", "split_attention", "split_plan"]
