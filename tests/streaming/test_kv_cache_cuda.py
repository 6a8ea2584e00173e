"""The K/V cache on a CUDA device: the same roll-outs, and what only a device can show."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vdit_fast
from vdit_fast import reference
from vdit_fast.ops import qk_norm_rope
from vdit_fast.streaming import CausalVideo, KVCache, choose_parts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; CPU and emulator run the same"),
]

PAGE, HEADS, DIM = 130, 3, 64  # no multiple of a tile


def make(**options) -> KVCache:
    sizes = {"layers": 2, "capacity": 5, "page": PAGE, "batch": 2, "heads": HEADS, "head_dim": DIM, "sinks": 1}
    return KVCache(**sizes | {"device": "cuda"} | options)


def draw(frames: int, heads: int = HEADS) -> Tensor:
    return torch.randn(2, frames * PAGE, heads, DIM, device="cuda").bfloat16()


def test_rolling_roll_out_equals_the_reference_over_its_plan() -> None:
    cache = make()
    for pages in (2, 1, 2, 2, 1, 2):
        cache.reserve(pages)
        k, v, q = draw(pages), draw(pages), draw(pages, 2 * HEADS)
        cache.write(1, k, v)
        keys, values = cache.keys_values(1)
        assert torch.equal(keys[:, cache.rows().long()], k) and torch.equal(values[:, cache.rows().long()], v)
        for options in ({}, {"causal": 1}, {"window": 2}):
            got = cache.attend(1, q, **options)
            plan = cache.plan(q.shape[1], **options)
            exact = reference.attention(q.double(), keys.double(), values.double(), plan)
            plain = reference.attention(q.float(), keys.float(), values.float(), plan).bfloat16()
            error, allowed = (float((x.double() - exact).norm()) for x in (got, plain))
            assert error <= 2.5 * allowed
        assert choose_parts(q, keys) == 1  # the kernel cuts the keys in its own launch


def test_append_and_rotate_are_the_operator_in_place() -> None:
    angles = torch.rand(2 * PAGE, DIM // 2, device="cuda").repeat_interleave(2, -1) * 6
    cos, sin, weight = angles.cos(), angles.sin(), torch.randn(DIM, device="cuda").bfloat16()
    post, k, v, q = make(), draw(2), draw(2), draw(2)
    for _ in range(3):
        post.reserve(2)
    norm = {"norm": "rms", "k_weight": weight}
    want = qk_norm_rope(q, k, v, cos=cos, sin=sin, q_weight=weight, **norm)
    got = post.append(0, k, v, cos, sin, q=q, q_weight=weight, **norm)
    assert got is not None and torch.equal(got, want[0])
    for stored, new in zip(post.keys_values(0), want[1:], strict=True):
        assert torch.equal(stored[:, post.rows().long()], new)
    pre = make(store="pre_rope", positions="relative", capacity=2, sinks=0)
    pre.reserve(2)
    pre.write(0, k, v)
    assert torch.equal(pre.rotated(0, cos, sin, **norm), want[1])


def test_steps_do_not_synchronise_and_memory_stays() -> None:
    """All of a chunk's steps after its first; ten times the capacity."""
    cache = make()
    k, v, q = draw(1), draw(1), draw(1)
    held = None
    for chunk in range(50):
        cache.reserve(1)
        cache.write(0, k, v)
        cache.attend(0, q)  # the chunk's plan goes to the device
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(2):
                cache.write(0, k, v)
                cache.attend(0, q)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if chunk == 9:
            held = torch.cuda.memory_allocated()
    assert held == torch.cuda.memory_allocated()


def test_a_step_can_be_captured() -> None:
    cache = make()
    for _ in range(7):
        cache.reserve(1)
        cache.write(0, draw(1), draw(1))
    k, v, q = draw(1), draw(1), draw(1)
    cache.attend(0, q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache.write(0, k, v)
        out = cache.attend(0, q)
    for x in (k, v, q):
        x.copy_(draw(1))
    graph.replay()
    got = out.clone()
    cache.write(0, k, v)
    assert torch.equal(got, cache.attend(0, q))


def test_one_frame_over_a_long_cache_repeats_exactly() -> None:
    """A frame of Wan 1.3B at 480p over 21: 13 items for each of 12 heads, so that the last round is split."""
    cache = KVCache(layers=1, capacity=21, page=1560, batch=1, heads=12, head_dim=128, device="cuda")
    for _ in range(21):
        cache.reserve(1)
        cache.write(0, *torch.randn(2, 1, 1560, 12, 128, device="cuda").bfloat16().unbind(0))
    q = torch.randn(1, 1560, 12, 128, device="cuda").bfloat16()
    first, second = cache.attend(0, q), cache.attend(0, q)
    assert torch.equal(first, second)
    keys, values = cache.keys_values(0)
    want = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, keys, values)))
    torch.testing.assert_close(first, want.transpose(1, 2), atol=2e-2, rtol=2e-2)


def test_forks_read_segments() -> None:
    cache = make()
    cache.reserve(3)
    cache.write(0, draw(3), draw(3))
    cache.freeze()
    q, k, v = draw(1), draw(1), draw(1)
    keys, values = cache.keys_values(0)
    got = cache.fork().attend(0, q, k, v)
    want = vdit_fast.attention(q, torch.cat((keys, k), 1), torch.cat((values, v), 1))
    torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)


def test_causal_video_equals_its_cpu_roll_out() -> None:
    pytest.importorskip("diffusers")
    from families.latte import latte

    results = []
    for device in ("cpu", "cuda"):
        model, inputs = latte(frames=7, batch=2)
        model, text = model.to(device), inputs["encoder_hidden_states"].to(device)
        with torch.no_grad(), vdit_fast.accelerate(model, "exact") as handle:
            video = CausalVideo(handle, chunk=3)

            def run(x: Tensor, t: int, model=model, text=text) -> Tensor:
                time = torch.full((2,), t, device=x.device)
                return model(x, timestep=time, encoder_hidden_states=text, return_dict=False)[0]

            torch.manual_seed(0)
            noise = torch.randn(2, 4, 12, 8, 8).to(device)
            results.append(
                video.roll_out(lambda x, run=run: x + 0.3 * run(x, 500), lambda x, run=run: run(x, 0), noise).cpu()
            )
    torch.testing.assert_close(*results, atol=2e-3, rtol=2e-3)
