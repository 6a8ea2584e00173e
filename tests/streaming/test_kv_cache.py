"""The paged ring of keys and values: against masks computed at once, and against concatenated keys."""

from __future__ import annotations

import math
import random

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import vdit_fast
from vdit_fast.ops import qk_norm_rope
from vdit_fast.plan import AttentionPlan
from vdit_fast.streaming import KVCache

PAGE = 5


def frames_of(x: Tensor, first: int, count: int, page: int = PAGE) -> Tensor:
    return x[:, first * page : (first + count) * page]


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """In float64: the exact answer."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def roll_out(cache: KVCache, q: Tensor, k: Tensor, v: Tensor, chunk: int, **options) -> Tensor:
    """Chunk by chunk, layer 1; every chunk is written twice, first with what must not survive."""
    parts = []
    for first in range(0, q.shape[1] // PAGE, chunk):
        cache.reserve(chunk)
        one = [frames_of(x, first, chunk) for x in (q, k, v)]
        cache.write(1, torch.randn_like(one[1]), torch.randn_like(one[2]))
        before = cache.frames
        cache.write(1, one[1], one[2])
        assert cache.frames == before  # the second denoise step evicts nothing
        parts.append(cache.attend(1, one[0], **options))
    return torch.cat(parts, 1)


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("q_heads", [2, 6])
def test_roll_out_equals_the_block_causal_mask(cache, draw, chunk, q_heads):  # S1
    q, k, v = draw(6, q_heads), draw(6), draw(6)
    plan = AttentionPlan.block_causal([chunk * PAGE] * (6 // chunk))
    whole = vdit_fast.attention(q, k, v, plan)
    got = roll_out(cache(6), q, k, v, chunk)
    block = torch.arange(6).repeat_interleave(PAGE) // chunk
    want = sdpa(q, k, v, block[None] <= block[:, None])
    close(got, want)
    close(whole, want)


@pytest.mark.parametrize(
    ("chunk", "sinks", "window"),
    [(1, 0, 2), (1, 2, 2), (1, 2, 4), (1, 1, 3), (1, 0, 6), (2, 0, 2), (2, 2, 4), (3, 3, 3)],
)
def test_rolling_with_sinks_equals_the_window_mask(cache, draw, sinks, window, chunk):  # S2
    q, k, v = draw(12), draw(12), draw(12)
    rolled = roll_out(cache(sinks + window, sinks=sinks), q, k, v, chunk)
    masked = roll_out(cache(12, sinks=sinks), q, k, v, chunk, window=window)  # nothing leaves, the plan looks away
    plan = AttentionPlan.block_causal([chunk * PAGE] * (12 // chunk), window=window // chunk, sinks=sinks // chunk)
    want = sdpa(q, k, v, plan.to_mask()[0, 0])
    close(rolled, want)
    close(masked, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_as_near_as_torch(cache, draw, dtype):
    q, k, v = (draw(6, heads).to(dtype) for heads in (4, 2, 2))
    got = roll_out(cache(4, sinks=1, dtype=dtype), q, k, v, 1)
    mask = AttentionPlan.block_causal([PAGE] * 6, window=3, sinks=1).to_mask()[0, 0]
    want = sdpa(q, k, v, mask)
    plain = functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, enable_gqa=True
    ).transpose(1, 2)
    error, allowed = (float((x.double() - want).norm()) for x in (got, plain))
    assert 0 < error <= 2 * allowed


@pytest.mark.parametrize("causal", [1, 2, 3])
@pytest.mark.parametrize("window", [None, 4])
def test_prefill_of_a_chunk_equals_decoding_it(cache, draw, causal, window):
    q, k, v = draw(8), draw(8), draw(8)
    one, many = cache(8, sinks=1), cache(8, sinks=1)
    want = [roll_out(one, *(frames_of(x, 0, 2) for x in (q, k, v)), 2)]
    roll_out(many, *(frames_of(x, 0, 2) for x in (q, k, v)), 2)
    for first in range(2, 8, causal):
        one.reserve(causal)
        one.write(1, frames_of(k, first, causal), frames_of(v, first, causal))
        want.append(one.attend(1, frames_of(q, first, causal), window=window))
    many.reserve(6)
    many.write(1, frames_of(k, 2, 6), frames_of(v, 2, 6))
    got = many.attend(1, frames_of(q, 2, 6), causal=causal, window=window)
    torch.testing.assert_close(got, torch.cat(want[1:], 1), rtol=1e-5, atol=1e-5)


def test_any_chunks_and_sinks_hold_the_right_frames(cache):
    rng = random.Random(0)
    for _ in range(200):
        capacity = rng.randint(1, 9)
        sinks = rng.randint(0, capacity - 1)
        ring, held = cache(capacity, sinks=sinks, layers=1, page=1, batch=1, heads=1, head_dim=1), []
        for _ in range(12):
            pages, kept = rng.randint(1, capacity), sum(f < sinks for f in held)
            if pages > capacity - kept:
                with pytest.raises(ValueError, match=f"reserve at most {capacity - kept}"):
                    ring.reserve(pages)
                continue
            slots = ring.reserve(pages)
            held += range(ring.end - pages, ring.end)
            while len(held) > capacity:
                held.remove(next(f for f in held if f >= sinks))
            assert ring.frames == tuple(held) and ring.chunk == tuple(held[-pages:])
            assert ring.first == next((f for f in held if f >= sinks), ring.end)
            assert sorted(ring._ring.slots) == list(range(len(held)))  # no gap, no slot twice
            assert ring.rows().tolist() == list(slots)
            number = torch.tensor([[[[float(f)]] for f in ring.chunk]]).view(1, -1, 1, 1)
            ring.write(0, number, number)
            keys = ring.keys_values(0)[0].flatten()
            assert [int(keys[s]) for s in ring._ring.slots] == held  # every page still has its own frame
            ring.plan(pages, causal=rng.randint(0, 2), window=rng.choice([None, 1, 3])).validate()


def test_the_plan_of_one_chunk_is_the_rows_that_it_reads(cache):
    ring = cache(4, sinks=1)
    for _ in range(6):
        ring.reserve(1)
    assert ring.frames == (0, 3, 4, 5)
    whole, windowed = ring.plan(3), ring.plan(PAGE, window=2)
    assert whole.runs.tolist() == [[0, 4 * PAGE, -1]]  # one run: rows in any order are the same attention
    rows = [ring._ring.slots[i] for i in (0, 2, 3)]
    assert windowed.to_mask()[0, 0, 0].view(4, PAGE).all(1).nonzero().flatten().tolist() == sorted(rows)
    assert ring.plan(3) is whole  # once per state
    ring.reserve(1)
    assert ring.plan(3) is not whole


def test_memory_is_constant_and_counted(cache, draw):
    ring = cache(4, sinks=1)
    sizes = {"layers": 2, "capacity": 4, "page": PAGE, "batch": 2, "heads": 2, "head_dim": 16}
    need = 2 * 2 * 2 * 4 * PAGE * 2 * 16 * 4
    assert ring.nbytes == KVCache.bytes(**sizes, dtype=torch.float32) == need
    assert KVCache.bytes(**sizes, store="pre_rope", dtype=torch.float32) == need + need // 4
    assert cache(4, store="pre_rope").nbytes == need + need // 4
    # Wan 1.3B at 480p, 21 latent frames: the number of the sheet
    wan = {"layers": 30, "capacity": 21, "page": 1560, "batch": 1, "heads": 12, "head_dim": 128}
    assert round(KVCache.bytes(**wan) / 1e9, 2) == 6.04
    ring.reserve(1)
    places = [t.data_ptr() for layer in range(2) for t in ring.keys_values(layer)]
    for _ in range(39):  # ten times the capacity
        ring.reserve(1)
        for layer in range(2):
            ring.write(layer, draw(1), draw(1))
            ring.attend(layer, draw(1))
        assert [t.data_ptr() for layer in range(2) for t in ring.keys_values(layer)] == places
        assert ring.nbytes == need and len(ring.frames) <= 4 and len(ring._memo) == 1
    assert ring.end == 40 and ring.frames == (0, 37, 38, 39)


def table(positions: Tensor, dim: int = 16) -> tuple[Tensor, Tensor]:
    angles = positions[:, None] * 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    return angles.cos(), angles.sin()


class Seen(TorchDispatchMode):
    """Records the operators that run and the bytes of every new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        if isinstance(out, Tensor) and not func.is_view:
            self.made += out.nbytes
        return out


@pytest.mark.parametrize("with_queries", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_append_norms_and_rotates_straight_into_the_pages(cache, draw, dtype, with_queries):
    """One operator runs, its destination is the page itself, and no tensor is made but q's."""
    q, k, v = draw(2, 8).to(dtype).split((4, 2, 2), 2)  # as a joint projection gives them: strided
    weight = torch.randn(16).to(dtype)
    cos, sin = table(torch.arange(2 * PAGE) + 3.0)
    options = {"norm": "rms", "k_weight": weight}
    want = qk_norm_rope(q, k, v, cos=cos, sin=sin, q_weight=weight, **options)
    ring = cache(3, dtype=dtype)
    for _ in range(2):
        ring.reserve(2)  # the second wraps around
    rows = ring.rows()
    if with_queries:
        options |= {"q": q, "q_weight": weight}
    with Seen() as seen:
        got = ring.append(1, k, v, cos, sin, **options)
    assert [name for name in seen.names if name.startswith("vdit_fast")] == ["vdit_fast.qk_norm_rope.default"]
    assert seen.made == (q.nbytes if with_queries else 0)  # k and v are read once and written once
    assert (got is None) if not with_queries else torch.equal(got, want[0])
    for stored, new in zip(ring.keys_values(1), want[1:], strict=True):
        assert torch.equal(stored[:, rows.long()], new)
    assert ring.keys_values(0)[0].abs().sum() == 0


def test_pre_rope_at_new_ids_equals_post_rope_turned_back(cache, draw):  # E1b
    """Frames that left: a relative position is the absolute one minus how many did."""
    pre = cache(3, store="pre_rope", positions="relative", table=3)
    post = cache(3, store="post_rope", table=100)
    cos, sin = table(torch.arange(20 * PAGE).float())
    weight = torch.randn(16)
    for step in range(7):
        k, v = draw(1), draw(1)
        pre.reserve(1), post.reserve(1)
        pre.write(0, k, v)
        at = slice(step * PAGE, (step + 1) * PAGE)
        post.append(0, k, v, cos[at], sin[at], norm="rms", k_weight=weight)
        assert pre.ids() == tuple(range(min(step + 1, 3))) and post.ids() == post.frames
        turned = pre.rotated(0, cos[: 3 * PAGE], sin[: 3 * PAGE], norm="rms", k_weight=weight)
        back = post.frames[0] * PAGE
        rows = post.keys_values(0)[0].shape[1]
        minus = {"cos": cos[back].repeat(rows, 1), "sin": -sin[back].repeat(rows, 1)}
        shifted = qk_norm_rope(post.keys_values(0)[0], **minus)[0]
        torch.testing.assert_close(turned, shifted, rtol=1e-4, atol=1e-5)
        q = draw(1)
        places = pre.table_rows(chunk=True)
        near = qk_norm_rope(q, cos=cos, sin=sin, positions=places)[0]
        far = qk_norm_rope(q, cos=cos[at], sin=sin[at])[0]
        out = pre.attend(0, near, keys=turned)
        torch.testing.assert_close(out, post.attend(0, far), rtol=1e-4, atol=1e-5)


def test_one_pass_turns_all_keys_into_one_workspace(cache, draw):
    ring = cache(3, store="pre_rope")
    ring.reserve(3)
    cos, sin = table(torch.arange(3 * PAGE).float())
    ring.write(0, draw(3), draw(3))
    ring.write(1, draw(3), draw(3))
    kept = [ring.keys_values(layer)[0].clone() for layer in range(2)]
    first, second = (ring.rotated(layer, cos, sin) for layer in range(2))
    assert first.data_ptr() == second.data_ptr()
    for layer in range(2):
        assert torch.equal(ring.keys_values(layer)[0], kept[layer])  # what is stored is not turned
        want = qk_norm_rope(kept[layer], cos=cos, sin=sin)[0]
        assert torch.equal(ring.rotated(layer, cos, sin), want)


@pytest.mark.parametrize("positions", ["absolute", "cyclic"])
def test_positions_follow_the_frames_through_the_ring(cache, draw, positions):
    """``table_rows`` names the position of the frame that lies in a row, wherever the ring put it."""
    ring = cache(4, store="pre_rope", positions=positions, table=5 if positions == "cyclic" else 30, sinks=1)
    for pages in (2, 2, 1, 2, 3):
        ring.reserve(pages)
        number = torch.tensor([float(f) for f in ring.chunk]).repeat_interleave(PAGE)[None, :, None, None]
        place = torch.arange(PAGE).repeat(pages)[None, :, None, None]
        ring.write(0, number.expand(2, -1, 2, 16).clone(), place.float().expand(2, -1, 2, 16).clone())
        frame, inside = (x[0, :, 0, 0] for x in ring.keys_values(0))
        number = frame % 5 if positions == "cyclic" else frame
        assert torch.equal(ring.table_rows(), (number * PAGE + inside).int())
        chunk = ring.table_rows(chunk=True).view(pages, PAGE)[:, 0] // PAGE
        assert chunk.tolist() == list(ring.ids()[-pages:])
    assert positions == "absolute" or max(ring.ids()) < 5


@pytest.mark.parametrize("store", ["post_rope", "pre_rope"])
def test_inference_mode_may_begin_and_end_at_any_time(cache, draw, store):
    cos, sin = table(torch.arange(3 * PAGE).float())
    with torch.inference_mode():
        ring = cache(3, store=store)
    for inside in (False, True, False):
        with torch.inference_mode(inside):
            ring.reserve(1)
            ring.write(0, draw(1), draw(1))
            if store == "post_rope":
                ring.append(0, draw(1), draw(1), cos[:PAGE], sin[:PAGE])
            ring.scatter(0, draw(1), draw(1), ring.rows())
            keys = ring.rotated(0, cos, sin) if store == "pre_rope" else None
            ring.attend(0, draw(1), keys=keys)
        ring.attend(0, draw(1), keys=keys)


def test_scatter_changes_the_named_tokens_only(cache, draw):  # B1a
    ring = cache(4)
    for _ in range(2):
        ring.reserve(3)
    k, v = draw(3), draw(3)
    ring.write(0, k, v)
    tokens = torch.randperm(3 * PAGE)[:4]
    new_k, new_v = torch.randn(2, 4, 2, 16), torch.randn(2, 4, 2, 16)
    ring.scatter(0, new_k, new_v, ring.rows()[tokens])
    k[:, tokens], v[:, tokens] = new_k, new_v
    old = ring._ring.slots[0] * PAGE
    for stored, want in zip(ring.keys_values(0), (k, v), strict=True):
        assert torch.equal(stored[:, ring.rows().long()], want)
        assert stored[:, old : old + PAGE].abs().sum() == 0
    assert ring.keys_values(1)[0].abs().sum() == 0


def test_frozen_caches_are_read_only(cache, draw):
    ring = cache(3)
    ring.reserve(1)
    ring.write(0, draw(1), draw(1))
    ring.freeze()
    for call in (
        lambda: ring.write(0, draw(1), draw(1)),
        lambda: ring.append(0, draw(1), draw(1)),
        lambda: ring.scatter(0, draw(1), draw(1), ring.rows()),
        lambda: ring.reserve(1),
        ring.reset,
    ):
        with pytest.raises(RuntimeError, match="frozen"):
            call()
    ring.attend(0, draw(1))
    ring.thaw()
    ring.reset()
    assert ring.frames == () and ring.end == 0
    ring.reserve(1)
    assert ring.frames == (0,)


@pytest.mark.parametrize("store", ["post_rope", "pre_rope"])
def test_forks_share_the_frozen_prefix(cache, draw, store):
    """Every candidate and step reads the same pages, and changes none of them."""
    ring = cache(4, store=store)
    cos, sin = table(torch.arange(4 * PAGE).float())
    for pages in (2, 1):
        ring.reserve(pages)
        ring.write(0, draw(pages), draw(pages))
    with pytest.raises(RuntimeError, match="freeze"):
        ring.fork()
    ring.freeze()
    before = [t.clone() for t in ring.keys_values(0)]
    forks = [ring.fork() for _ in range(2)]
    keys = ring.rotated(0, cos, sin) if store == "pre_rope" else None
    for fork in forks:
        for _ in range(3):
            q, k, v = draw(1, 4), draw(1), draw(1)
            got = fork.attend(0, q, k, v, keys=keys)
            prefix, values = (before[0] if keys is None else keys), before[1]
            close(got, sdpa(q, torch.cat((prefix, k), 1), torch.cat((values, v), 1)))
    assert all(torch.equal(a, b) for a, b in zip(ring.keys_values(0), before, strict=True))
    with pytest.raises(ValueError, match="pass"):
        forks[0].attend(0, q, k, v, keys=draw(3) if keys is None else None)
    ring.thaw()
    with pytest.raises(RuntimeError, match="thawed"):
        forks[0].attend(0, q, k, v, keys=keys)
    ring.write(0, draw(1), draw(1))
    ring.freeze()
    with pytest.raises(RuntimeError, match="thawed"):  # the same frames with other keys
        forks[0].attend(0, q, k, v, keys=keys)
    ring.fork().attend(0, q, k, v, keys=keys)
    empty = cache(2, store=store)
    empty.freeze()
    if store == "post_rope":
        close(empty.fork().attend(0, q, k, v), sdpa(q, k, v))


def test_positions_beyond_the_table(cache):
    post = cache(2, table=5)
    for _ in range(5):
        post.reserve(1)
    before = post.frames
    with pytest.raises(ValueError, match=r"position 5.*5 entries.*pre_rope"):
        post.reserve(1)
    assert post.frames == before  # refused before anything changed
    for positions in ("relative", "cyclic"):
        free = cache(2, table=5, store="pre_rope", positions=positions)
        for _ in range(50):
            free.reserve(1)
            assert max(free.ids()) < 5


def test_budget(cache):
    need = cache(4).nbytes
    assert cache(4, max_bytes=need).nbytes == need
    with pytest.raises(
        ValueError, match=rf"max_bytes is {need - 1:,}, .* 4 frames take {need:,} bytes.*; capacity=3 fits"
    ):
        cache(4, max_bytes=need - 1)
    with pytest.raises(ValueError, match="not even one frame fits"):
        cache(4, max_bytes="1 KB")
    assert math.isclose(need / 4, cache(1).nbytes)


def test_bad_input(cache, draw):
    for options, message in (
        ({"capacity": 0}, "capacity must be at least 1"),
        ({"capacity": 2.5}, "capacity must be an integer"),
        ({"capacity": 2, "sinks": 2}, "sinks is 2 of a capacity of 2"),
        ({"capacity": 2, "store": "rope"}, "store is 'rope'"),
        ({"capacity": 2, "positions": "relative"}, "pre_rope"),
        ({"capacity": 2, "positions": "cyclic"}, "table is None"),
        ({"capacity": 9, "positions": "cyclic", "table": 8}, "at most 8"),
        ({"capacity": 2, "dtype": torch.float64}, "float64"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            cache(**options)
    ring = cache(3)
    with pytest.raises(RuntimeError, match="no chunk is reserved"):
        ring.write(0, draw(1), draw(1))
    ring.reserve(2)
    for call, error, message in (
        (lambda: ring.write(2, draw(2), draw(2)), IndexError, "layers 0 to 1"),
        (lambda: ring.write(0, draw(1), draw(2)), ValueError, "2 frames of 5 tokens"),
        (lambda: ring.write(0, draw(2).half(), draw(2)), ValueError, "float16"),
        (lambda: ring.write(0, draw(2).requires_grad_(), draw(2)), RuntimeError, "no_grad"),
        (lambda: ring.append(0, draw(2), draw(2), q_weight=torch.ones(16)), ValueError, "q_weight"),
        (lambda: ring.plan(7, causal=1), ValueError, "lq is 7"),
        (lambda: ring.plan(0), ValueError, "lq"),
        (lambda: ring.rotated(0, *table(torch.arange(10.0))), ValueError, "rotated already"),
        (lambda: ring.attend(0, draw(2), keys=draw(2)), ValueError, "no keys"),
        (lambda: ring.reserve(4), ValueError, "reserve at most 3"),
    ):
        with pytest.raises(error, match=message):
            call()
