"""Operators give the same bits for any number of threads; the other tests run with one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import vdit_fast
from vdit_fast import ops

OWN_TESTS = {
    "attention": "test_attention.py",
    "attention_backward": "test_attention.py",
    "block_mass": "test_block_mass.py",
    "combine_rows": "test_combine_rows.py",
    "compile_blocks": "test_compile_blocks.py",
    "factor_update": "test_cache.py",
    "forecast_gate_add": "test_cache.py",
    "gate_residual_norm": "test_adaln.py",
    "kmeans_assign": "test_clusters.py",
    "linear_attention_readout": "test_linear_attention.py",
    "linear_attention_state": "test_linear_attention.py",
    "merge": "test_merge.py",
    "score_lse": "test_block_mass.py",
    "select_top_p": "test_select.py",
}
"""Operators whose own file has such a test."""


def inputs() -> SimpleNamespace:
    """Tensors of a size that several threads share."""
    x, y = torch.randn(2, 2, 3000, 72).bfloat16()
    q, k, v = torch.randn(3, 2, 3000, 3, 32)
    cos, sin = torch.randn(2, 3000, 16)
    order = torch.stack([torch.randperm(3000) for _ in range(6)]).view(2, 3, 3000).int()
    sizes = [700, 1000, 1300]
    return SimpleNamespace(
        x=x, y=y, row=torch.randn(2, 1, 72).bfloat16(), q=q, k=k, v=v, cos=cos, sin=sin, order=order,
        kept=torch.randperm(3000)[None, :1700].int(), lengths=torch.full((1, 1, 60), 50),
        frames=torch.randn(3, 2, 5, 900, 3, 8), sizes=sizes, packed=ops.pack_slices(q, sizes),
    )  # fmt: skip


def scattered(x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
    out = x.clone()
    ops.scatter_rows(out, y, rows, add=True)
    return out


CALLS: dict[str, Callable[[Any], Tensor | tuple[Tensor | None, ...]]] = {
    "adaln_modulate": lambda t: ops.adaln_modulate(t.x, t.row, t.row),
    "block_mean": lambda t: ops.block_mean(t.q, t.lengths, t.order),
    "counting_sort": lambda t: ops.counting_sort(t.order * 7 % 40, 40),
    "gate_residual": lambda t: ops.gate_residual(t.x, t.y, t.row),
    "gather_rows": lambda t: ops.gather_rows(t.x, t.kept),
    "pack_slices": lambda t: ops.pack_slices(t.q, t.sizes, compression="e4m3", block=32),
    "permute_tokens": lambda t: (ops.permute_tokens(t.q, t.order), ops.permute_tokens(t.q, t.order, inverse=True)),
    "qk_norm_rope": lambda t: ops.qk_norm_rope(t.q, t.k, t.v, norm="rms", cos=t.cos, sin=t.sin),
    "scatter_rows": lambda t: scattered(t.x, t.y[:, :1700], t.kept),
    "select_top_k": lambda t: ops.select_top_k(t.q.flatten(1, 2), 9),
    "short_attention": lambda t: ops.short_attention(*t.frames, causal=True),
    "softmax_mass": lambda t: ops.softmax_mass(t.q[:, :700], t.k[:, :900], 64, 64),
    "unpack_slices": lambda t: ops.unpack_slices(t.packed, t.q.shape, t.sizes),
}


@pytest.mark.parametrize("name", CALLS)
def test_any_number_of_threads_gives_the_same_bits(name: str) -> None:
    given, threads, found = inputs(), torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            out = CALLS[name](given)
            found.append([t for t in ((out,) if isinstance(out, Tensor) else out) if t is not None])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_no_operator_is_left_out() -> None:
    on_cpu = {kernel["op"] for kernel in vdit_fast._info.kernel_catalogue() if kernel["device"] == "cpu"}
    assert on_cpu == set(OWN_TESTS) | set(CALLS)
    for file in set(OWN_TESTS.values()):
        assert "set_num_threads" in Path(__file__).with_name(file).read_text(), file
