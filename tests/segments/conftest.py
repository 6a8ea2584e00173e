"""Tests of tokens beside the video, on the tiny models of the accelerate tests."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "accelerate"))  # for tiny.py and planner_settings.py

pytest.importorskip("diffusers")
warnings.filterwarnings("ignore", category=FutureWarning)
logging.getLogger("diffusers").setLevel(logging.ERROR)
