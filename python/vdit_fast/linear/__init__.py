"""Linear attention in chosen layers of a model: which layers, their feature maps on disk, and the transfer to it."""

from .settings import LinearAttention
from .transfer import SelectiveTransfer
from .weights import FeatureMap, Header, load_feature_maps, read_header, save_feature_maps

__all__ = [
    "FeatureMap",
    "Header",
    "LinearAttention",
    "SelectiveTransfer",
    "load_feature_maps",
    "read_header",
    "save_feature_maps",
]
