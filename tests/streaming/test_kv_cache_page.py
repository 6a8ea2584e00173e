"""The examples of docs/kernels/kv_cache.md, as printed, and the numbers of its table of bytes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from vdit_fast.streaming import KVCache

PAGE = (Path(__file__).parents[2] / "docs" / "kernels" / "kv_cache.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def test_the_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    first, fork = (next(block for block in BLOCKS if word in block) for word in ("KVCache(", "fork ="))
    space: dict[str, Any] = {"torch": torch}
    exec(compile(first, "kv_cache.md", "exec"), space)
    assert capsys.readouterr().out == "(0, 35, 36, 37, 38, 39) 35 40 196,608 bytes\n"
    exec(compile(fork, "kv_cache.md", "exec"), space)
    assert space["out"].shape == (1, 16, 4, 32)


def test_the_picture_of_the_ring() -> None:
    cache = KVCache(layers=1, capacity=6, page=1, batch=1, heads=1, head_dim=1, sinks=1)
    pictures = re.findall(r"leave +((?:\d+ +){6}) +attention order ([\d ]+)", PAGE)
    assert len(pictures) == 2
    for _ in range(3):
        cache.reserve(2)
    for slots, order in pictures:
        cache.reserve(2)
        held = dict(zip(cache._ring.slots, cache.frames, strict=True))
        assert [held[slot] for slot in range(6)] == list(map(int, slots.split()))
        assert list(cache.frames) == list(map(int, order.split()))


def test_the_table_of_bytes() -> None:
    sizes = {"1.3B, 480p": (30, 1560, 12), "14B, 480p": (40, 1560, 40), "14B, 720p": (40, 3600, 40)}
    for name, (layers, page, heads) in sizes.items():
        found = KVCache.bytes(layers=layers, capacity=21, page=page, batch=1, heads=heads, head_dim=128)
        (printed,) = re.findall(rf"Wan {name}.*\| {page} \| ([\d.]+) GB", PAGE)
        assert f"{found / 1e9:.3g}" == f"{float(printed):.3g}", name
