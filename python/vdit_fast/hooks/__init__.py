"""Ready-made hooks for ``Handle.hook``: what published methods add beside attention and behind blocks."""

from __future__ import annotations

from vdit_fast.models.hooks import HookPlace, HookRows

from .control import ControlBranch, ControlConnector
from .residual import ResidualFeatures
from .spectral_blend import SpectralBlend
from .temporal_adapter import TemporalAdapter

__all__ = [
    "ControlBranch",
    "ControlConnector",
    "HookPlace",
    "HookRows",
    "ResidualFeatures",
    "SpectralBlend",
    "TemporalAdapter",
]
