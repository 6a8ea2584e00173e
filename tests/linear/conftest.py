"""Tests of linear attention in models: tiny models of the accelerate tests, and files of random feature maps."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "accelerate"))  # for tiny.py and planner_settings.py

pytest.importorskip("diffusers")
pytest.importorskip("safetensors")
warnings.filterwarnings("ignore", category=FutureWarning)
logging.getLogger("diffusers").setLevel(logging.ERROR)


@pytest.fixture
def maps_for(tmp_path: Path) -> Callable[..., Any]:
    """Random maps for layers of a model, in a file: ``maps_for(model, [1, 3])`` -> LinearAttention."""
    from linear_models import save_random_maps

    def make(model: Any, layers: list[int] | None = None, **inputs: Any) -> Any:
        return save_random_maps(tmp_path / "maps.safetensors", model, layers, **inputs)

    return make
