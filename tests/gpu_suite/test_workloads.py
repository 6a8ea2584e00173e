"""Inputs, expected answers and peers of the timings, against the library's reference and against themselves."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmarks.gpu import peers, primitives, timing
from benchmarks.gpu.problems import Problem, problems
from benchmarks.gpu.pytest_runs import run_tests
from benchmarks.gpu.workloads import (
    Workload,
    allowed,
    build,
    expected,
    expected_gradients,
    gradient_error,
    relative_error,
)
from torch import Tensor

from vdit_fast import reference

SMALL = {p.name: p for p in problems(True)}


def workload(name: str) -> Workload:
    return build(SMALL[name], torch.float32, "cpu")


@pytest.mark.parametrize("name", [n for n, p in SMALL.items() if not p.backward])
def test_expected_rows_are_those_of_the_reference(name: str) -> None:
    w = workload(name)
    out = reference.attention(w.q.double(), w.k.double(), w.v.double(), w.plan)
    rows = torch.arange(w.problem.length)
    for head in range(w.problem.heads):
        torch.testing.assert_close(expected(w, head, rows), out[0, :, head], rtol=0, atol=1e-9)
    assert relative_error(w, out) < 1e-9
    if w.plan is not None and w.problem.kind != "stand-ins":
        mask = w.plan.to_mask().expand(1, w.problem.heads, -1, -1)[0]
        assert all(torch.equal(allowed(w, h, rows), mask[h]) for h in range(w.problem.heads))
        assert w.density == pytest.approx(float(w.plan.density), rel=1e-5)


def test_errors_are_seen() -> None:
    w = workload("clusters/small")
    out = reference.attention(w.q, w.k, w.v, w.plan)
    assert relative_error(w, out) < 1e-5
    assert relative_error(w, out.flip(2)) > 0.5  # heads exchanged
    assert relative_error(w, reference.attention(w.q, w.k, w.v)) > 0.1  # the plan ignored
    broken = out.clone()
    broken[0, 0, 0, 0] = torch.nan
    assert relative_error(w, broken) == float("inf")
    assert relative_error(w, out * 1.01) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("name", [n for n, p in SMALL.items() if p.backward])
def test_expected_gradients_are_those_of_autograd(name: str) -> None:
    w = workload(name)
    inputs = peers.leaves(w)
    grad = torch.randn(w.q.shape)
    out = reference.attention(*inputs, w.plan)
    found = torch.autograd.grad(out, inputs, grad)
    for got, want in zip(found, expected_gradients(w, 0, grad, chunk=70), strict=True):
        torch.testing.assert_close(got[0, :, 0], want, rtol=1e-4, atol=1e-5)
    assert gradient_error(w, grad, found) < 1e-5
    for i in range(3):
        wrong = [g * (1.02 if i == j else 1) for j, g in enumerate(found)]
        assert gradient_error(w, grad, tuple(wrong)) == pytest.approx(0.02, rel=1e-2)


def test_clusters_are_uneven_and_fill_the_length() -> None:
    w = build(Problem("c", "clusters", 2, 3000, 16, density=0.3, clusters=(30, 100)), torch.float32, "cpu")
    for sizes in w.sizes:
        assert (sizes.sum(1) == 3000).all() and (sizes >= 0).all()
        assert float(sizes.double().std() / sizes.double().mean()) > 0.6  # 1 for an exponential distribution
    assert 0.2 < w.density < 0.4
    assert not torch.equal(w.orders[0][0], w.orders[0][1])


# ---- peers, with the parts that need a GPU replaced


@pytest.fixture
def no_cuda_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_need_cuda", lambda device: None)


def test_flex_blocks_are_the_kept_blocks() -> None:
    w = workload("blocks/small-32-0.5")
    mask = peers.flex_blocks(w)
    assert torch.equal(mask.to_dense()[0].bool(), w.keep)
    assert mask.seq_lengths == (250, 250) and not mask.kv_num_blocks.any()


@pytest.mark.usefixtures("no_cuda_needed")
@pytest.mark.parametrize("name", ["dense/small", "backward/dense"])
def test_torch_backends_by_name(name: str) -> None:
    w = workload(name)
    peer = peers._sdpa(w, "cpu", "FLASH_ATTENTION")
    assert peer.same and peer.share == 1.0
    assert relative_error(w, peer.answer(peer.call()).detach()) < 1e-5


class FakeWrapper:
    """FlashInfer's variable blocks as its documentation has them: heads first, clusters side by side."""

    def __init__(self, workspace: Tensor, backend: str) -> None:
        assert workspace.dtype == torch.uint8 and backend == "auto"

    def plan(self, *, block_mask_map, block_row_sz, block_col_sz, num_qo_heads, num_kv_heads, head_dim, q_data_type):
        assert block_mask_map.shape == (num_kv_heads, block_row_sz.shape[1], block_col_sz.shape[1])
        self.mask = torch.stack(
            [
                m.repeat_interleave(r, 0).repeat_interleave(c, 1)
                for m, r, c in zip(block_mask_map, block_row_sz, block_col_sz, strict=True)
            ]
        )

    def run(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        score = (q @ k.transpose(1, 2) * q.shape[2] ** -0.5).masked_fill(~self.mask, -torch.inf)
        return torch.nan_to_num(score.softmax(-1)) @ v


FAKE = SimpleNamespace(
    sparse=SimpleNamespace(VariableBlockSparseAttentionWrapper=FakeWrapper),
    single_prefill_with_kv_cache=lambda q, k, v, causal: reference.attention(q[None], k[None], v[None])[0],
)


@pytest.mark.usefixtures("no_cuda_needed")
@pytest.mark.parametrize("name", ["dense/small", "blocks/small-32-0.25", "clusters/small"])
def test_flashinfer_gets_the_same_problem(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w = workload(name)
    monkeypatch.setitem(__import__("sys").modules, "flashinfer", FAKE)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: object())
    peer = peers._flashinfer(w, "cpu")
    assert peer.same and peer.share == w.density
    assert relative_error(w, peer.answer(peer.call())) < 1e-5


@pytest.mark.usefixtures("no_cuda_needed")
def test_reasons_of_missing_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_sdpa", lambda w, d, b: 1 / 0)
    found, skips = peers.available(workload("clusters/small"), "cpu")
    assert set(found) == {"SDPA"}
    assert skips["SDPA cuDNN"] == "ZeroDivisionError: division by zero"
    assert skips["FlexAttention"] == "takes equal blocks only"
    assert skips["FlashInfer"] == "flashinfer is not installed"


# ---- timing


def test_samples_are_interleaved_and_long_enough() -> None:
    order: list[str] = []
    effort = timing.Effort(warmups=3, launches=10, samples=5, sample_ms=0.0)
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = timing.interleaved(calls, effort, "cpu")
    assert {name: len(t) for name, t in times.items()} == dict.fromkeys("abc", 5)
    assert order[:12] == ["a"] * 4 + ["b"] * 4 + ["c"] * 4
    first = [order[12 + 30 * r] for r in range(5)]
    assert first == list("abcab") and len(order) == 12 + 150
    assert timing.Effort().calls(0.5) == 40 and timing.Effort().calls(300.0) == 10
    assert timing.ratio([2.0, 4.0, 9.0], [1.0, 1.0, 3.0]) == {"median": 3.0, "min": 2.0, "max": 4.0}


# ---- the primitives' seam

STUB = """
#include <stdio.h>
int vdit_gpu_case(const char* name, const void* const* in, const unsigned long* in_bytes, void* const* out,
                  const unsigned long* out_bytes, const long* numbers, char* error, unsigned long error_bytes) {
  snprintf(error, error_bytes, "stub was asked for %s", name);
  return 1;
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_primitive_tests_go_to_the_device_library(tmp_path: Path) -> None:
    (tmp_path / "stub.c").write_text(STUB)
    library = tmp_path / "stub.so"
    subprocess.run(["cc", "-shared", "-fPIC", str(tmp_path / "stub.c"), "-o", str(library)], check=True)
    result = run_tests(
        [primitives.TESTS, "-k", f"(barriers or warp_matrix) and not ({primitives.HOST_ONLY})"],
        tmp_path,
        "seam",
        seconds=120,
        test_limit=60,
        env={"VDIT_PRIMITIVES": str(library)},
    )
    assert result["ended"] == "finished" and result["counts"] == {"failed": 3}, result
    text = "\n".join(t["text"] for t in result["not_passed"].values())
    assert all(f"stub was asked for {name}" in text for name in ("named_barriers", "mma_bf16", "mma_f16"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_device_library_compiles(tmp_path: Path) -> None:
    library, printed = primitives.build(tmp_path, 300)
    assert library is not None, printed
    assert "C75" not in printed
    function = ctypes.CDLL(str(library)).vdit_gpu_case
    error = ctypes.create_string_buffer(100)
    nothing = (ctypes.c_void_p * 4)()
    sizes, numbers = (ctypes.c_size_t * 4)(), (ctypes.c_int64 * 16)()
    assert function(b"nothing", nothing, sizes, nothing, sizes, numbers, error, ctypes.c_size_t(100)) == 1
    assert error.value == b"there is no case nothing"
