"""Tokens beside the video: encoders that make them, and what hands them to an accelerated model."""

from .chunks import Chunks, denoise_chunks, fusion_weights
from .interface_tokens import InterfaceTokens
from .memory_encoder import MemoryEncoder

__all__ = ["Chunks", "InterfaceTokens", "MemoryEncoder", "denoise_chunks", "fusion_weights"]
