"""Tests of per-frame schedules on the tiny models of the accelerate tests."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "accelerate"))  # for tiny.py and the families' builders

pytest.importorskip("diffusers")
warnings.filterwarnings("ignore", category=FutureWarning)
logging.getLogger("diffusers").setLevel(logging.ERROR)


@pytest.fixture
def build() -> Callable[..., Any]:
    """(transformer, arguments without latents and timestep) of a tiny model that takes a timestep per frame."""
    import tiny
    from families.skyreels_v2 import skyreels

    def make(kind: str, **options: Any) -> Any:
        model, inputs = (tiny.wan if kind == "wan" else skyreels)(**options)
        return model, {"encoder_hidden_states": inputs["encoder_hidden_states"][:, :40]}

    return make
