"""Tokens beside the video: encoders that make them, and what hands them to an accelerated model."""

from .memory_encoder import MemoryEncoder

__all__ = ["MemoryEncoder"]
