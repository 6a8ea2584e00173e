"""Memory that stays mapped, so that a benchmark of a memory-bound operator does not time the kernel's page faults.

glibc gives every allocation beyond 32 MiB back to the system; the next one of that size faults page by page, which
costs several times what the operator does, whoever computes it. A program that keeps its pages (jemalloc, tcmalloc, or
these settings) pays once.
"""

from __future__ import annotations

import os
import sys

SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32 - 1),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**30),
}


def keep_pages() -> None:
    """Start the script again under these settings, unless it runs under some already."""
    if not SETTINGS.keys() & os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | SETTINGS)
