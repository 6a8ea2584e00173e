"""Regions of the picture: which tokens read which tokens and which text, for an object that follows a path."""

from .labels import CLASSES, region_labels, region_plan
from .regions import Regions

__all__ = ["CLASSES", "Regions", "region_labels", "region_plan"]
