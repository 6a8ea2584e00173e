"""Feature caching: steps of a denoising run that are forecast from earlier ones instead of computed."""

from .base import GRANULARITIES, REGISTRY, CachePolicy, from_dict
from .delta_dit import DeltaDiT
from .first_block import FirstBlock
from .stream import Stream
from .taylorseer import TaylorSeer
from .teacache import TeaCache

__all__ = [
    "GRANULARITIES",
    "REGISTRY",
    "CachePolicy",
    "DeltaDiT",
    "FirstBlock",
    "Stream",
    "TaylorSeer",
    "TeaCache",
    "from_dict",
]
