"""Feature caching: steps of a denoising run that are forecast from earlier ones instead of computed."""

from .base import REGISTRY, CachePolicy, Stream, from_dict
from .taylorseer import TaylorSeer

__all__ = ["REGISTRY", "CachePolicy", "Stream", "TaylorSeer", "from_dict"]
