"""Tests of layers that compute a part: some use the tiny models of the accelerate tests."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "accelerate"))  # for tiny.py and the families' builders

warnings.filterwarnings("ignore", category=FutureWarning)
logging.getLogger("diffusers").setLevel(logging.ERROR)
