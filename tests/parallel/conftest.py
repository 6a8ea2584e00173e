"""Tests of several processes for one clip, on models of the accelerate tests."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "parallel"), str(TESTS / "accelerate"), str(TESTS / "support")]

pytest.importorskip("diffusers")
warnings.filterwarnings("ignore", category=FutureWarning)
logging.getLogger("diffusers").setLevel(logging.ERROR)


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """As the ranks have: what is computed alone is compared with theirs bit for bit."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model() -> Any:
    """A tiny Wan transformer of four blocks."""
    from long_video import tiny_wan

    return tiny_wan()
