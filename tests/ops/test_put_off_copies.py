"""Copies that torch puts off until somebody writes: what an operator only reads stays shared, what it writes is made
its own first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import adaln_cases
import cache_cases
import combine_cases
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import vdit_fast
from vdit_fast import AttentionPlan, ops


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def each(function: Callable[[Tensor], Tensor], values: Any) -> Any:
    """Of every tensor in values; one that is there twice stays one."""
    made: dict[int, Tensor] = {}

    def once(t: Tensor) -> Tensor:
        if id(t) not in made:
            made[id(t)] = function(t)
        return made[id(t)]

    return tree_map_only(Tensor, once, values)


def tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


class PutOff(TorchDispatchMode):
    """Calls this library's operators with copies that are put off, and looks at what has become of them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "vdit_fast":
            return func(*args, **(kwargs or {}))
        name, schema = func._schema.name.split("::")[1], func._schema.arguments
        self.seen.add(name)
        given = {a.name: value for a, value in zip(schema, args, strict=False)} | (kwargs or {})
        before = each(lambda t: bits(t.clone()), given)
        own, copies = each(torch.clone, given), each(torch._lazy_clone, given)
        want, got = func(**own), func(**copies)
        out = [a.name for a in schema if a.alias_info is not None and a.alias_info.is_write]
        written = {id(t) for t in tensors([copies.get(argument) for argument in out])}
        for argument, value in copies.items():
            for t in tensors(value):
                shared = torch._C._is_cow_tensor(t)
                assert t.numel() == 0 or shared == (id(t) not in written), f"{name}: {argument} is shared: {shared}"
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(tensors(got), tensors(want), strict=True)), name
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(tensors(copies), tensors(own), strict=True)), name
        assert all(torch.equal(bits(a), b) for a, b in zip(tensors(given), tensors(before), strict=True)), name
        return got


def attention() -> Any:
    plan = AttentionPlan.from_block_mask(torch.rand(2, 3, 3) < 0.6, 32, 32, lq=70, lk=70)
    q, k, v = torch.randn(3, 1, 70, 2, 16).unbind(0)
    segment = torch.randn(2, 1, 3, 2, 16).unbind(0)
    kv_len, scale = torch.tensor([60]), torch.rand(1, 2, 70)
    args = (q, k, v, *plan.op_args(), 1, 2, 0.25, scale, kv_len, [segment[0]], [segment[1]])
    out, lse = torch.ops.vdit_fast.attention(*args)
    return torch.ops.vdit_fast.attention_backward(out * 0.5, lse * 0.1, out, lse, *args)


def adaln(name: str) -> Any:
    kwargs = adaln_cases.arguments(40, torch.bfloat16, torch.bfloat16, "fast", 5)
    return getattr(ops, name)(**adaln_cases.part(kwargs, name))


def search() -> Any:
    q, k = torch.randn(2, 1, 70, 2, 16).unbind(0)
    kv_len = torch.tensor([60])
    ops.softmax_mass(q, k, 32, 32, q_len=kv_len, kv_len=kv_len)
    return ops.block_mass(q, k, ops.score_lse(q, k, kv_len=kv_len), 32, 32, kv_len=kv_len)


def clusters() -> Any:
    x = torch.randn(2, 50, 3, 16)
    labels = ops.kmeans_assign(x, torch.randn(2, 3, 5, 16))
    order, counts = ops.counting_sort(labels, 5)
    ops.permute_tokens(x, order)
    return ops.block_mean(x, counts, order, kv_len=torch.tensor([50, 31]))


def linear_attention() -> Any:
    q, k, v = torch.randn(3, 2, 50, 2, 16).unbind(0)
    weight, kv_len = torch.randn(2, 16, 16), torch.tensor([50, 31])
    state = ops.linear_attention_state(k, v, weight=weight, kv_len=kv_len)
    return ops.linear_attention_readout(q, state, weight=weight)


def linear_attention_denominators() -> Any:
    q, k, v, q_den, k_den = torch.randn(5, 2, 50, 2, 16).abs().unbind(0)
    state = ops.linear_attention_state(k, v, feature_map="relu", k_den=k_den)
    return ops.linear_attention_readout(q, state, feature_map="relu", q_den=q_den)


def qk_norm_rope(in_place: bool) -> Any:
    q, k, v = torch.randn(3, 2, 50, 2, 16).bfloat16().unbind(0)
    cos, sin = torch.randn(2, 50, 8)
    places = torch.arange(50, dtype=torch.int32).view(1, 1, 50)
    if in_place:
        return ops.qk_norm_rope(q, k, norm="rms", cos=cos, sin=sin, q_out=q, k_out=k)
    weights = {"q_weight": torch.randn(16), "k_weight": torch.randn(16)}
    return ops.qk_norm_rope(q, k, v, norm="rms", cos=cos, sin=sin, q_rows=places, kv_rows=places, **weights)


def rows() -> Any:
    x, gate = torch.randn(2, 50, 16), torch.randn(2, 1, 16)
    kept = torch.stack([torch.randperm(50)[:20] for _ in range(2)]).int()
    count = torch.tensor([20, 7], dtype=torch.int32)
    part = ops.gather_rows(x, kept, count)
    ops.scatter_rows(x, part, kept, count)
    ops.scatter_rows(x, part, kept, count, gate=gate, add=True)


def packed(compression: str | None) -> Any:
    x = torch.randn(2, 50, 3, 64)
    buffer = ops.pack_slices(x, [1, 2], 2, compression=compression)
    return ops.unpack_slices(buffer, x.shape, [1, 2], 2, compression=compression, dtype=x.dtype)


def selection() -> Any:
    scores = torch.randn(2, 3, 50)
    ops.select_top_k(scores, torch.full((2, 3), 7))
    return ops.select_top_p(scores.softmax(-1), 0.5)


def short_attention() -> Any:
    q, k, v = torch.randn(3, 2, 5, 9, 3, 16).unbind(0)
    return ops.short_attention(q, k, v, kv_len=torch.tensor([5, 2]))


SHAPE = (2, 5, 40)
CALLS: dict[str, Callable[[], Any]] = {
    "attention": attention,
    "adaln_modulate": lambda: adaln("adaln_modulate"),
    "gate_residual": lambda: adaln("gate_residual"),
    "gate_residual_norm": lambda: adaln("gate_residual_norm"),
    "block_mass": search,
    "clusters": clusters,
    "combine_rows": lambda: ops.combine_rows(**combine_cases.draw(24, torch.float16, 2, 15)),
    "compile_blocks": lambda: ops.compile_blocks(
        torch.rand(3, 5, 7) < 0.5, torch.full((1, 5), 9), torch.full((3, 7), 8), 45
    ),
    "factor_update": lambda: ops.factor_update(**cache_cases.update_arguments(4, SHAPE)),
    "factor_update, minus": lambda: ops.factor_update(**cache_cases.update_arguments(13, SHAPE)),
    "factor_update, e4m3": lambda: ops.factor_update(**cache_cases.coded_update(13, SHAPE)),
    "forecast_gate_add": lambda: ops.forecast_gate_add(**cache_cases.forecast_arguments(5, SHAPE)),
    "forecast_gate_add, e4m3": lambda: ops.forecast_gate_add(**cache_cases.coded_forecast(5, SHAPE)[0]),
    "linear_attention": linear_attention,
    "linear_attention, denominators": linear_attention_denominators,
    "merge": lambda: ops.merge(list(torch.randn(3, 2, 5, 2, 16)), list(torch.randn(3, 2, 2, 5))),
    "pack": lambda: packed(None),
    "pack, e4m3": lambda: packed("e4m3"),
    "qk_norm_rope": lambda: qk_norm_rope(False),
    "qk_norm_rope, in place": lambda: qk_norm_rope(True),
    "rows": rows,
    "selection": selection,
    "short_attention": short_attention,
}


@pytest.mark.parametrize("name", CALLS)
def test_what_is_read_stays_shared(name: str) -> None:
    with torch.no_grad(), PutOff():
        CALLS[name]()


def test_no_operator_is_left_out() -> None:
    with torch.no_grad(), PutOff() as mode:
        for call in CALLS.values():
            call()
    assert mode.seen == {kernel["op"] for kernel in vdit_fast._info.kernel_catalogue() if kernel["device"] == "cpu"}
