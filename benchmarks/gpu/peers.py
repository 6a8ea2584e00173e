"""What the library is timed against. A peer that cannot run here is a reason, not an error."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from .problems import Problem
from .workloads import Workload


@dataclass(frozen=True)
class Peer:
    """A forward call and what it computes."""

    call: Callable[[], Any]  # no arguments: tensors are bound
    same: bool  # computes what the problem asks for
    share: float  # of the dense problem's FLOP that it executes
    answer: Callable[[Any], Tensor]  # its result as [1, L, H, D], in the original order
    leaves: tuple[Tensor, ...]  # what gradients are taken of


class Unavailable(Exception):
    """Why a peer is left out."""


def available(w: Workload, device: str) -> tuple[dict[str, Peer], dict[str, str]]:
    """Peers for a workload, and the reasons of those that are left out."""
    builders: dict[str, Callable[[Workload, str], Peer]] = {
        "SDPA cuDNN": lambda w, d: _sdpa(w, d, "CUDNN_ATTENTION"),
        "SDPA flash": lambda w, d: _sdpa(w, d, "FLASH_ATTENTION"),
        "SDPA": _plain,
        "FlexAttention": _flex,
        "FlashInfer": _flashinfer,
    }
    peers, skips = {}, {}
    for name, build in builders.items():
        try:
            peers[name] = build(w, device)
        except Unavailable as error:
            skips[name] = str(error)
        except Exception as error:  # another library's: the others still stand
            skips[name] = f"{type(error).__name__}: {_first_line(error)}"
    return peers, skips


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


def leaves(w: Workload) -> tuple[Tensor, ...]:
    """The inputs, with gradients where the problem wants them."""
    if not w.problem.backward:
        return w.q, w.k, w.v
    return tuple(t.detach().clone().requires_grad_() for t in (w.q, w.k, w.v))


def _heads_first(t: Tensor) -> Tensor:
    return t.transpose(1, 2)


def dense(w: Workload, call: Callable[[], Any], answer: Callable[[Any], Tensor], inputs: tuple[Tensor, ...]) -> Peer:
    """A contender that reads everything."""
    return Peer(call, w.plan is None, 1.0, answer, inputs)


def sparse(w: Workload, call: Callable[[], Any], answer: Callable[[Any], Tensor], inputs: tuple[Tensor, ...]) -> Peer:
    """A contender that reads what the plan reads."""
    return Peer(call, True, w.density, answer, inputs)


def _need_cuda(device: str) -> None:
    if device != "cuda":
        raise Unavailable("needs a CUDA device")


def _plain(w: Workload, device: str) -> Peer:
    if device == "cuda":
        raise Unavailable("on a GPU its backends are timed by name")
    q, k, v = inputs = leaves(w)
    return dense(w, lambda: sdpa(_heads_first(q), _heads_first(k), _heads_first(v)), _heads_first, inputs)


def _sdpa(w: Workload, device: str, backend: str) -> Peer:
    _need_cuda(device)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = inputs = leaves(w)
    chosen = getattr(SDPBackend, backend)

    def call() -> Tensor:
        with sdpa_kernel(chosen):
            return sdpa(_heads_first(q), _heads_first(k), _heads_first(v))

    return dense(w, call, _heads_first, inputs)


def flex_blocks(w: Workload) -> Any:
    """The plan as a BlockMask whose kept blocks are all full, so that no mask function runs."""
    from torch.nn.attention.flex_attention import BlockMask

    assert w.keep is not None
    keep, p = w.keep[None], w.problem
    count = keep.sum(-1, dtype=torch.int32)
    order = keep.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    lengths = (p.length, p.length)
    none = torch.zeros_like(count)
    return BlockMask.from_kv_blocks(none, order, count, order, BLOCK_SIZE=p.block, seq_lengths=lengths)


def _flex(w: Workload, device: str) -> Peer:
    _need_cuda(device)
    p = w.problem
    if p.kind != "blocks":
        raise Unavailable("takes equal blocks only")
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = inputs = leaves(w)
    mask = flex_blocks(w)
    options: Any = {"BLOCK_M": 64, "BLOCK_N": 64} if p.block < 128 else None
    if p.backward:
        from torch._functorch import config

        config.donated_buffer = False  # the backward pass is timed many times after one forward pass
    compiled = torch.compile(flex_attention, dynamic=False)

    def call() -> Any:
        return compiled(_heads_first(q), _heads_first(k), _heads_first(v), block_mask=mask, kernel_options=options)

    return sparse(w, call, _heads_first, inputs)


def _flashinfer(w: Workload, device: str) -> Peer:
    _need_cuda(device)
    if importlib.util.find_spec("flashinfer") is None:
        raise Unavailable("flashinfer is not installed")
    import flashinfer

    p = w.problem
    if p.backward or p.kind == "stand-ins":
        raise Unavailable("has no " + ("backward" if p.backward else "stand-ins"))
    if p.kind == "dense":
        q, k, v = (t[0] for t in (w.q, w.k, w.v))
        call = lambda: flashinfer.single_prefill_with_kv_cache(q, k, v, causal=False)  # noqa: E731
        return dense(w, call, lambda out: out[None], (w.q, w.k, w.v))
    return _flashinfer_blocks(flashinfer, w, p)


def _flashinfer_blocks(flashinfer: Any, w: Workload, p: Problem) -> Peer:
    """Variable blocks. It takes clusters side by side: the permutations are made before, outside the timing."""
    assert w.keep is not None and w.sizes is not None
    wrapper = flashinfer.sparse.VariableBlockSparseAttentionWrapper(
        torch.empty(256 * 2**20, dtype=torch.uint8, device=w.q.device), backend="auto"
    )
    wrapper.plan(
        block_mask_map=w.keep,
        block_row_sz=w.sizes[0].int(),
        block_col_sz=w.sizes[1].int(),
        num_qo_heads=p.heads,
        num_kv_heads=p.heads,
        head_dim=p.dim,
        q_data_type=w.q.dtype,
    )

    def sorted_heads(t: Tensor, order: Tensor | None) -> Tensor:
        t = _heads_first(t)[0]
        return t.contiguous() if order is None else t.gather(1, order[..., None].expand_as(t)).contiguous()

    q_order, kv_order = w.orders or (None, None)
    q, k, v = sorted_heads(w.q, q_order), sorted_heads(w.k, kv_order), sorted_heads(w.v, kv_order)

    def answer(out: Tensor) -> Tensor:
        if q_order is not None:
            out = torch.zeros_like(out).scatter_(1, q_order[..., None].expand_as(out), out)
        return _heads_first(out[None])

    return sparse(w, lambda: wrapper.run(q, k, v), answer, (w.q, w.k, w.v))
