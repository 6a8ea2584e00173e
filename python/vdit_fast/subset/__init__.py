"""Subset execution: steps of a denoising run that compute some of the video tokens only."""

from .base import REGISTRY, RowPolicy, from_dict
from .ras import RAS

__all__ = ["RAS", "REGISTRY", "RowPolicy", "from_dict"]
