"""Emulator tests: every test under every schedule policy, helpers of this folder importable."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from emulator import POLICIES, Policy  # the path is set above


@pytest.fixture(params=POLICIES, ids=lambda p: p.name)
def policy(request: pytest.FixtureRequest) -> Policy:
    """One of the schedules that every kernel must survive."""
    return request.param
