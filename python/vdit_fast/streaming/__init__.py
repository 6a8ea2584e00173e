"""Streaming generation: keys and values of past frames, rollouts chunk by chunk, and their training masks."""

from vdit_fast.streaming.causal_video import CausalVideo
from vdit_fast.streaming.fork import KVFork
from vdit_fast.streaming.forward import StreamedChunk
from vdit_fast.streaming.kv_cache import KVCache
from vdit_fast.streaming.self_forcing import SelfForcing
from vdit_fast.streaming.split_kv import choose_parts, split_attention, split_plan
from vdit_fast.streaming.teacher_forcing import per_frame, teacher_forcing, teacher_forcing_plan

__all__ = [
    "CausalVideo",
    "KVCache",
    "KVFork",
    "SelfForcing",
    "StreamedChunk",
    "choose_parts",
    "per_frame",
    "split_attention",
    "split_plan",
    "teacher_forcing",
    "teacher_forcing_plan",
]
