"""Scripts find what lies beside them also as ``python -m benchmarks.NAME`` and from the GPU suite."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
