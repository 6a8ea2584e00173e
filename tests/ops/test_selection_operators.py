"""What all selection operators share: no gradient, fakes that refuse what the kernels refuse, streams and graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vdit_fast import ops

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
NOT_DIFFERENTIABLE = [
    "block_mass", "block_mean", "compile_blocks", "counting_sort", "kmeans_assign", "score_lse", "select_top_k",
    "select_top_p", "softmax_mass",
]  # fmt: skip
ALL = [*NOT_DIFFERENTIABLE, "permute_tokens"]


def arguments(name: str, seed: int = 0, device: str = "cpu") -> list[Any]:
    """Of ``torch.ops.vdit_fast.<name>``, as both a CPU and a GPU take them."""
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(2, 70, 3, 16, generator=g).bfloat16() for _ in range(2))
    order = torch.rand(2, 3, 70, generator=g).argsort(-1).to(torch.int32)
    found: dict[str, list[Any]] = {
        "block_mass": [x, y, torch.randn(2, 3, 35, generator=g), 8, 9, 0.2, 2, torch.tensor([70, 33 + seed])],
        "block_mean": [x, torch.tensor([[[20 + seed, 0, 50 - seed]]]), order, torch.tensor([70, 44])],
        "compile_blocks": [
            torch.rand(6, 5, 7, generator=g) < 0.5, torch.full((1, 5), 14), torch.full((1, 7), 10 + seed), 70, 8
        ],
        "counting_sort": [torch.randint(0, 9, (2, 3, 70), generator=g, dtype=torch.int32), 9],
        "kmeans_assign": [x, torch.randn(2, 3, 11, 16, generator=g)],
        "permute_tokens": [x, order, True],
        "score_lse": [x, y, 0.2, 2, torch.tensor([70, 33 + seed])],
        "select_top_k": [torch.randn(6, 99, generator=g), torch.randint(1, 99, (6,), generator=g), 1],
        "select_top_p": [torch.rand(6, 99, generator=g), 0.7, 1],
        "softmax_mass": [x, y, 8, 9, 0.2, 2, torch.tensor([60 + seed, 7]), torch.tensor([70, 33 + seed])],
    }  # fmt: skip
    return [a.to(device) if isinstance(a, Tensor) else a for a in found[name]]


def call(name: str, args: list[Any]) -> tuple[Tensor, ...]:
    result = getattr(torch.ops.vdit_fast, name)(*args)
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("name", NOT_DIFFERENTIABLE)
def test_raw_operators_carry_no_gradient(name: str) -> None:
    args = [a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments(name)]
    assert not any(out.requires_grad for out in call(name, args))
    torch.library.opcheck(getattr(torch.ops.vdit_fast, name), tuple(args))


def test_kmeans_from_a_start_that_requires_a_gradient() -> None:
    x, start = torch.randn(1, 9, 1, 4, requires_grad=True), torch.randn(1, 1, 3, 4, requires_grad=True)
    assert not any(t.requires_grad for t in ops.kmeans(x, start, 2))


@pytest.mark.parametrize(
    ("name", "position", "value", "message"),
    [
        ("score_lse", 3, 0, "fold is 0; expected 1 to 1024"),
        ("block_mass", 6, 1025, "fold is 1025"),
        ("block_mass", 3, 0, "q_block is 0; expected at least 1"),
        ("block_mass", 4, -2, "kv_block is -2"),
        ("softmax_mass", 2, 0, "q_block is 0; expected at least 1"),
        ("softmax_mass", 5, 0, "fold is 0; expected 1 to 1024"),
        ("compile_blocks", 4, 0, "q_tile is 0; expected at least 1"),
    ],
)
def test_fakes_refuse_what_the_operators_refuse(name: str, position: int, value: int, message: str) -> None:
    for device in ("cpu", "meta"):
        args = arguments(name, device=device)
        args[position] = value
        with pytest.raises(RuntimeError, match=f"vdit_fast: {name}: {message}"):
            call(name, args)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("name", ALL)
def test_side_streams_and_graphs(name: str) -> None:
    args, other = (arguments(name, seed, "cuda") for seed in (0, 1))
    want, want_other = call(name, args), call(name, other)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        found = call(name, args)
    torch.cuda.current_stream().wait_stream(side)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call(name, args)
    for here, there in zip(args, other, strict=True):
        if isinstance(here, Tensor):
            here.copy_(there)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, want_other, strict=True))


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("name", [n for n in ALL if n not in ("counting_sort", "select_top_p")])
def test_mixed_devices_are_named(name: str) -> None:
    args = arguments(name, device="cuda")
    args[0] = args[0].cpu()
    with pytest.raises(RuntimeError, match=f"vdit_fast: {name}: .* on c.* on c"):
        call(name, args)


@pytest.mark.gpu
@needs_cuda
def test_rows_that_an_inverse_order_does_not_name_are_zero() -> None:
    x, order = torch.randn(2, 500, 3, 8, device="cuda"), torch.zeros(1, 1, 500, dtype=torch.int32, device="cuda")
    torch.full_like(x, torch.nan)  # what the allocator hands out next
    out = ops.permute_tokens(x, order, inverse=True)
    assert out[:, 0].any() and not out[:, 1:].any()
