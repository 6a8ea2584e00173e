"""Streaming generation: keys and values of past frames, noise schedules per frame, and the rollouts that use them."""

from vdit_fast.streaming.ar_diffusion import ARDiffusion
from vdit_fast.streaming.ar_schedule import ARSchedule, FoPP, Iteration
from vdit_fast.streaming.causal_frames import CausalFrames, causal_frames
from vdit_fast.streaming.causal_video import CausalVideo
from vdit_fast.streaming.fork import KVFork
from vdit_fast.streaming.forward import StreamedChunk
from vdit_fast.streaming.frame_model import FrameModel
from vdit_fast.streaming.frame_sampler import DDIM, FlowEuler
from vdit_fast.streaming.kv_cache import KVCache
from vdit_fast.streaming.self_forcing import SelfForcing
from vdit_fast.streaming.split_kv import choose_parts, split_attention, split_plan
from vdit_fast.streaming.stream_buffer import BufferSchedule, StreamBuffer
from vdit_fast.streaming.teacher_forcing import per_frame, teacher_forcing, teacher_forcing_plan

__all__ = [
    "DDIM",
    "ARDiffusion",
    "ARSchedule",
    "BufferSchedule",
    "CausalFrames",
    "CausalVideo",
    "FlowEuler",
    "FoPP",
    "FrameModel",
    "Iteration",
    "KVCache",
    "KVFork",
    "SelfForcing",
    "StreamBuffer",
    "StreamedChunk",
    "causal_frames",
    "choose_parts",
    "per_frame",
    "split_attention",
    "split_plan",
    "teacher_forcing",
    "teacher_forcing_plan",
]
