"""Streaming generation: keys and values of past frames, rollouts chunk by chunk, and their training masks."""

from vdit_fast.streaming.forward import StreamedChunk
from vdit_fast.streaming.kv_cache import KVCache
from vdit_fast.streaming.self_forcing import SelfForcing
from vdit_fast.streaming.teacher_forcing import per_frame, teacher_forcing, teacher_forcing_plan

__all__ = ["KVCache", "SelfForcing", "StreamedChunk", "per_frame", "teacher_forcing", "teacher_forcing_plan"]
