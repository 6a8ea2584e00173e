"""Streaming generation: keys and values of past frames, per-frame noise schedules and what runs models by them."""

from vdit_fast.streaming.ar_diffusion import ARDiffusion
from vdit_fast.streaming.ar_schedule import ARSchedule, FoPP, Iteration
from vdit_fast.streaming.causal_frames import CausalFrames, causal_frames
from vdit_fast.streaming.frame_model import FrameModel
from vdit_fast.streaming.frame_sampler import DDIM, FlowEuler
from vdit_fast.streaming.kv_cache import KVCache
from vdit_fast.streaming.stream_buffer import BufferSchedule, StreamBuffer

__all__ = [
    "DDIM",
    "ARDiffusion",
    "ARSchedule",
    "BufferSchedule",
    "CausalFrames",
    "FlowEuler",
    "FoPP",
    "FrameModel",
    "Iteration",
    "KVCache",
    "StreamBuffer",
    "causal_frames",
]
