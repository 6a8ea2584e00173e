"""Offline searches: run a model over calibration prompts and write the settings that suit it and this machine."""

from .run import Tuned, tune

__all__ = ["Tuned", "tune"]
