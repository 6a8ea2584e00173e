"""patch_sdpa on a hand-written transformer: what is served, what passes with which reason, and the way back."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

import vdit_fast
from vdit_fast.models import kernels


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int | None = None) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads or heads
        dim = width // heads
        self.to_q = nn.Linear(width, width)
        self.to_kv = nn.Linear(width, 2 * self.kv_heads * dim)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        q = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.to_kv(x).unflatten(-1, (2 * self.kv_heads, -1)).transpose(1, 2).chunk(2, dim=1)
        if self.kv_heads != self.heads:
            options["enable_gqa"] = True
        y = functional.scaled_dot_product_attention(q, k, v, **options)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int | None = None) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), Attention(width, heads, kv_heads)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        x = x + self.attention(self.norm(x), **options)
        return x + self.mlp(x)


class Transformer(nn.Module):
    """Two blocks, no diffusers."""

    def __init__(self, width: int = 32, heads: int = 4, kv_heads: int | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, kv_heads) for _ in range(2))

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        for block in self.blocks:
            x = block(x, **options)
        return x


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    assert torch._C._len_torch_function_stack() == 0, "a mode was left on the stack"


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("rows", "operator"), [(100, "attention"), (64, "short_attention")])
def test_plain_calls_are_served_inside_the_module_only(rows: int, operator: str) -> None:
    model, x = Transformer(), torch.randn(2, rows, 32)
    want = model(x)
    handle = vdit_fast.patch_sdpa(model)
    close(model(x), want)
    assert handle.stats() == {"served": {operator: 2}, "passed": {}, "compiled": False, "active": True}
    q = torch.randn(1, 2, 5, 8)
    functional.scaled_dot_product_attention(q, q, q)  # outside of the forward
    close(model.blocks[0].attention(x), model.blocks[0].attention(x))  # a part of it, called on its own
    assert sum(handle.stats()["served"].values()) == 2
    assert f"2 x served by {operator}" in handle.report()
    handle.remove()
    handle.remove()
    assert torch.equal(model(x), want) and not handle.active and "removed" in handle.report()
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_two_nested_modules_count_a_call_once() -> None:
    model, x = Transformer(), torch.randn(2, 70, 32)
    want = model(x)
    with vdit_fast.patch_sdpa(model) as outer, vdit_fast.patch_sdpa(model.blocks[1]) as inner:
        close(model(x), want)
        assert (outer.stats()["served"], inner.stats()["served"]) == ({"attention": 1}, {"attention": 1})
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("rows", [90, 20])
@pytest.mark.parametrize("form", ["[B, 1, 1, L]", "[1, 1, 1, L]", "[1, 1, L]", "[1, L]"])
def test_key_padding(form: str, rows: int) -> None:
    model, x = Transformer(), torch.randn(2, rows, 32)
    counts = torch.tensor([rows - 3, 7] if form.startswith("[B") else [7])
    mask = torch.arange(rows) < counts[:, None]
    mask = mask.view(*(1,) * form.count(","), rows) if form[1] == "1" else mask[:, None, None]
    want = model(x, attn_mask=mask)
    with vdit_fast.patch_sdpa(model) as handle:
        close(model(x, attn_mask=mask), want)
        assert sum(handle.stats()["served"].values()) == 2 and not handle.stats()["passed"]
    with vdit_fast.patch_sdpa(model, right_padded=True) as handle:
        close(model(x, attn_mask=mask), want)
        assert sum(handle.stats()["served"].values()) == 2


def holes(rows: int) -> Tensor:
    mask = torch.ones(2, 1, 1, rows, dtype=torch.bool)
    mask[1, ..., 3] = False
    return mask


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"attn_mask": torch.zeros(2, 1, 1, 70)}, "attn_mask is float32, not bool"),
        ({"attn_mask": torch.ones(70, 70, dtype=torch.bool).tril()}, "attn_mask differs between heads or queries"),
        ({"attn_mask": torch.rand(2, 4, 1, 70) < 0.9}, "attn_mask differs between heads or queries"),
        ({"attn_mask": holes(70)}, "attn_mask hides keys before readable ones"),
        ({"is_causal": True}, "is_causal"),
    ],
)
def test_what_passes_is_the_same_and_counted(options: dict[str, Any], reason: str) -> None:
    model, x = Transformer(), torch.randn(2, 70, 32)
    want = model(x, **options)
    with vdit_fast.patch_sdpa(model) as handle:
        assert torch.equal(model(x, **options), want)
        assert handle.stats()["passed"] == {reason: 2} and not handle.stats()["served"]
        assert f"2 x left to torch: {reason}" in handle.report()


def test_dropout_passes(caplog: pytest.LogCaptureFixture) -> None:
    model, x = Transformer(), torch.randn(2, 70, 32)
    with vdit_fast.patch_sdpa(model) as handle, caplog.at_level(logging.WARNING, logger="vdit_fast"):
        torch.manual_seed(1)
        got = model(x, dropout_p=0.5)
        assert handle.stats()["passed"] == {"dropout_p is not 0": 2}
    assert len([r for r in caplog.records if "dropout_p is not 0" in r.message]) == 1
    torch.manual_seed(1)
    assert torch.equal(got, model(x, dropout_p=0.5))


@pytest.mark.parametrize("rows", [70, 20])
def test_grouped_heads_and_scale(rows: int) -> None:
    model, x = Transformer(kv_heads=2), torch.randn(2, rows, 32)
    want = model(x, scale=0.7)
    with vdit_fast.patch_sdpa(model) as handle:
        close(model(x, scale=0.7), want)
        assert handle.stats()["served"] == {"attention": 2}


def test_three_dimensions_and_other_forms() -> None:
    class Bare(nn.Module):
        def forward(self, *args: Any, **kw: Any) -> Tensor:
            return functional.scaled_dot_product_attention(*args, **kw)

    bare, (q, k, v) = Bare(), torch.randn(3, 4, 9, 16)
    with vdit_fast.patch_sdpa(bare) as handle:
        close(bare(q, k[:, :5], v[:, :5]), functional.scaled_dot_product_attention(q, k[:, :5], v[:, :5]))
        long = torch.randn(2, 80, 16)
        close(bare(query=long, key=long, value=long), functional.scaled_dot_product_attention(long, long, long))
        assert handle.stats()["served"] == {"short_attention": 1, "attention": 1}
        wide = torch.randn(1, 2, 9, 300)
        for arguments, reason in (
            ((wide, wide, wide), "head dimension 300 > 256"),
            ((q.double(), k.double(), v.double()), "dtype float64 has no kernel"),
            ((q[None, None], k[None, None], v[None, None]), "the inputs have 5, 5 and 5 dimensions"),
            ((q, k, v[..., :8]), "shapes of q, k and v differ in batch, length or head dimension"),
            ((q, k[:1], v[:1]), "shapes of q, k and v differ in batch, length or head dimension"),
        ):
            assert torch.equal(bare(*arguments), functional.scaled_dot_product_attention(*arguments))
            assert handle.stats()["passed"].pop(reason), reason
            assert handle.passed.pop(reason) == 1
        with pytest.raises(TypeError):
            bare(q, k, v, no_such=1)
        with pytest.raises(RuntimeError):  # torch's own message
            bare(torch.randn(1, 4, 9, 16), torch.randn(1, 3, 9, 16), torch.randn(1, 3, 9, 16))
        assert "4 query heads and 3 key heads without enable_gqa" in handle.stats()["passed"]


def test_devices_without_a_kernel_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Transformer(), torch.randn(2, 70, 32)
    monkeypatch.setattr(kernels, "missing_device_kernel", lambda kind: f"device {kind!r} has no attention kernel")
    with vdit_fast.patch_sdpa(model) as handle:
        assert torch.equal(model(x), (handle.remove(), model(x))[1])
        assert handle.stats()["passed"] == {"device 'cpu' has no attention kernel": 2}


def test_gradients_and_autocast() -> None:
    model, x = Transformer(), torch.randn(2, 70, 32)

    def gradient() -> Tensor:
        model.zero_grad()
        model(x).square().mean().backward()
        return model.blocks[0].attention.to_q.weight.grad.clone()

    want = gradient()
    with vdit_fast.patch_sdpa(model) as handle:
        close(gradient(), want)
        assert handle.stats()["served"] == {"attention": 2}
        with torch.autocast("cpu", torch.bfloat16):
            got = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(got, model(x), rtol=5e-2, atol=5e-2)


def test_compiled_graphs_keep_torch_s_attention() -> None:
    torch._dynamo.reset()
    model, x = Transformer(), torch.randn(2, 70, 32)
    want = model(x)
    with vdit_fast.patch_sdpa(model) as handle:
        model.compile(backend="aot_eager", fullgraph=True)
        for _ in range(2):
            close(model(x), want)
        assert handle.stats() == {"served": {}, "passed": {}, "compiled": True, "active": True}
        assert "compiled graphs hold torch's own attention" in handle.report()
    torch._dynamo.reset()
    model = Transformer()
    want = model(x)
    with vdit_fast.patch_sdpa(model) as handle:
        model.blocks[0].compile(backend="aot_eager")
        close(model(x), want)
        assert sum(handle.stats()["served"].values()) == 1 and handle.stats()["compiled"]
    torch._dynamo.reset()


def test_errors_leave_nothing_behind() -> None:
    class Broken(Transformer):
        def forward(self, x: Tensor, **options: Any) -> Tensor:
            super().forward(x)
            raise ZeroDivisionError

    model, x = Broken(), torch.randn(1, 70, 32)
    handle = vdit_fast.patch_sdpa(model)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            model(x)
        assert torch._C._len_torch_function_stack() == 0
    assert handle.stats()["served"] == {"attention": 4}


def test_removal_inside_the_forward() -> None:
    model, x = Transformer(), torch.randn(1, 70, 32)
    want = model(x)
    handle = vdit_fast.patch_sdpa(model)
    hook = model.blocks[1].register_forward_pre_hook(lambda *call: handle.remove())
    close(model(x), want)
    hook.remove()
    assert handle.stats()["served"] == {"attention": 1} and torch._C._len_torch_function_stack() == 0
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert torch.equal(model(x), want)


def test_threads_do_not_mix() -> None:
    model, x = Transformer(), torch.randn(1, 70, 32)
    want, results = model(x), {}
    other = torch.randn(1, 2, 70, 8)

    def outside() -> None:  # attention in another thread while the model runs
        for _ in range(20):
            functional.scaled_dot_product_attention(other, other, other)

    with vdit_fast.patch_sdpa(model) as handle:
        workers = [threading.Thread(target=lambda i=i: results.update({i: model(x)})) for i in range(3)]
        workers.append(threading.Thread(target=outside))
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert handle.stats()["served"] == {"attention": 6}
    for got in results.values():
        close(got, want)


def test_copies_and_pickles_are_not_patched() -> None:
    model, x = Transformer(), torch.randn(1, 70, 32)
    want = model(x)
    handle = vdit_fast.patch_sdpa(model)
    for twin in (copy.deepcopy(model), copy.deepcopy(model.blocks[0]).train()):
        twin(x)
    torch.testing.assert_close(copy.deepcopy(model)(x), want, rtol=0, atol=0)
    linear = nn.Sequential(nn.Linear(4, 4))
    vdit_fast.patch_sdpa(linear)
    loaded = pickle.loads(pickle.dumps(linear))
    assert torch.equal(loaded(x[..., :4]), linear(x[..., :4]))
    assert handle.stats()["served"] == {}


def test_the_handle_is_one_per_module_and_frees_it() -> None:
    model = Transformer()
    handle = vdit_fast.patch_sdpa(model)
    assert vdit_fast.patch_sdpa(model) is handle
    with pytest.raises(RuntimeError, match=r"right_padded=False.*remove\(\)"):
        vdit_fast.patch_sdpa(model, right_padded=True)
    with pytest.raises(TypeError, match="int"):
        vdit_fast.patch_sdpa(3)  # type: ignore[arg-type]
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    handle.remove()
    assert "no scaled_dot_product_attention call was seen" in handle.report()


def test_accelerate_names_the_remedy() -> None:
    with pytest.raises(RuntimeError, match=r"no attention module can be served.*vdit_fast\.patch_sdpa"):
        vdit_fast.accelerate(Transformer())
