"""DiT-Mem: Learning Plug-and-play Memory for Guiding Video Diffusion Models (arXiv 2511.19229): checks M1a to M1e.

An encoder makes 1000 memory rows of five retrieved videos. Every block of a frozen Wan puts them behind the video,
before norm and modulation, without RoPE, and drops what attention makes of them: keys and values are all that is left.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

import vdit_fast
from vdit_fast.accelerate import accelerate
from vdit_fast.caching import FirstBlock, TaylorSeer, TeaCache
from vdit_fast.config import Config
from vdit_fast.context import HeadShard
from vdit_fast.plan import AttentionPlan
from vdit_fast.planners import SVG2
from vdit_fast.segments import MemoryEncoder
from vdit_fast.segments.memory_encoder import RadialFilter, radial_gain

pytest.importorskip("diffusers")

M = 1000


def heads(tokens: int, batch: int = 2, count: int = 3, dim: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, batch, tokens, count, dim).unbind(0)
    return q, k, v


# ---------------------------------------------------------------------- the authors' form
def authors_forward(block: Any, rows: Tensor) -> Callable[..., Tensor]:
    """A stock Wan block with the rows concatenated, as the authors' code does it; 1 and 0 in the rotary tables turn
    nothing."""

    def forward(hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any) -> Tensor:
        n, m = hidden_states.shape[1], rows.shape[1]
        x = torch.cat([hidden_states, rows.to(hidden_states).expand(hidden_states.shape[0], -1, -1)], dim=1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (block.scale_shift_table + temb.float()).chunk(6, dim=1)
        h = (block.norm1(x.float()) * (1 + scale) + shift).type_as(x)
        cos, sin = rotary_emb
        ones = torch.ones_like(cos[:, :1]).expand(-1, m, -1, -1)
        y = block.attn1(h, None, None, (torch.cat([cos, ones], 1), torch.cat([sin, 0 * ones], 1)))[:, :n]
        x = (hidden_states.float() + y * gate).type_as(hidden_states)
        x = x + block.attn2(block.norm2(x.float()).type_as(x), encoder_hidden_states, None, None)
        h = (block.norm3(x.float()) * (1 + mlp_scale) + mlp_shift).type_as(x)
        return (x.float() + block.ffn(h).float() * mlp_gate).type_as(x)

    return forward


def authors(model: nn.Module, rows: Tensor) -> nn.Module:
    model = copy.deepcopy(model)
    for block in model.blocks:
        block.forward = authors_forward(block, rows)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "clips"), [(1, 1), (2, 1), (2, 2)])
def test_same_as_the_authors_blocks(dtype: torch.dtype, batch: int, clips: int) -> None:
    """Also where batch items have timesteps, and rows, of their own."""
    model, inputs = tiny.wan(batch=batch)
    inputs["timestep"] = torch.tensor([500.0, 300.0])[:batch]
    rows = torch.randn(clips, M, 32)
    truth = tiny.run(authors(tiny.double(model), rows.double()), tiny.cast(inputs, torch.float64))
    model, inputs, rows = model.to(dtype), tiny.cast(inputs, dtype), rows.to(dtype)
    eager = tiny.run(authors(model, rows), inputs)
    stock = tiny.run(model, inputs)
    handle = accelerate(model, Config(fuse="eager"))
    plain = tiny.run(model, inputs)
    assert handle.memory(rows) is handle
    got = tiny.run(model, inputs)
    tiny.exact_enough(got, eager, truth)
    assert tiny.relative(got, plain) > 2e-2
    assert handle.stats()["memory"]["tokens"] == M and "memory: 1,000 rows" in handle.report()
    handle.memory(None)
    assert torch.equal(tiny.run(model, inputs), plain) and handle.stats()["memory"] is None
    handle.memory(rows)
    handle.remove()
    assert torch.equal(tiny.run(model, inputs), stock)


def test_sparse_video_beside_dense_memory() -> None:
    """Whatever the planner leaves out and permutes, every query reads every memory row: with nothing left out the
    answer is the authors'."""
    model, inputs = tiny.wan()
    rows = torch.randn(M, 32)
    want = tiny.run(authors(model, rows[None]), inputs)
    planner = SVG2(top_p=1.0, q_clusters=4, k_clusters=4)
    handle = accelerate(model, Config(attention=planner)).memory(rows)
    assert tiny.relative(tiny.run(model, inputs), want) < 1e-5
    assert handle.stats()["layers"][0]["sparse_calls"] == 1


# ---------------------------------------------------------------------- the sheet's checks, at the operator
def test_m1a_a_segment_is_a_concatenation_and_merges_by_lse() -> None:
    (q, k, v), (_, mk, mv) = heads(67), heads(M)
    got = vdit_fast.attention(q, k, v, segments=[(mk, mv)])
    torch.testing.assert_close(got, vdit_fast.attention(q, torch.cat([k, mk], 1), torch.cat([v, mv], 1)))
    parts = [vdit_fast.attention(q, *pair, return_lse=True) for pair in ((k, v), (mk, mv))]
    torch.testing.assert_close(got, vdit_fast.merge([p[0] for p in parts], [p[1] for p in parts])[0])
    assert not torch.allclose(got, parts[0][0], atol=1e-2)


def test_m1b_queries_of_memory_change_nothing() -> None:
    (q, k, v), (mq, mk, mv) = heads(67), heads(M)
    joint = (torch.cat(pair, dim=1) for pair in ((q, mq), (k, mk), (v, mv)))
    torch.testing.assert_close(vdit_fast.attention(*joint)[:, :67], vdit_fast.attention(q, k, v, segments=[(mk, mv)]))


def test_m1c_masked_memory_is_plain_attention() -> None:
    (q, k, v), (_, mk, mv) = heads(67), heads(M)
    masked = torch.full((2,), 67, dtype=torch.int32)
    got = vdit_fast.attention(q, torch.cat([k, mk], 1), torch.cat([v, mv], 1), kv_len=masked)
    torch.testing.assert_close(got, vdit_fast.attention(q, k, v))


@pytest.mark.parametrize("band", ["high", "low"])
def test_m1d_gains_have_closed_forms(band: Any) -> None:
    """0.2 and 1.0 for high frequencies, 1.2 and 0.4 for low ones, at f = 0 and 1; slopes and offsets per channel."""
    ends = {"high": (0.2, 1.0), "low": (1.2, 0.4)}[band]
    torch.testing.assert_close(radial_gain(torch.tensor([0.0, 1.0]), band), torch.tensor(ends))
    gain = RadialFilter(7, (6, 15, 26), band).gain
    assert gain.shape == (7, 6, 15, 14, 2) and gain.dtype == torch.float32 and not gain[..., 1].any()
    slope, offset = torch.linspace(0.7, 1.3, 7), torch.linspace(-0.05, 0.05, 7)
    for place, end in (((0, 0, 0), ends[0]), ((-1, -1, -1), ends[1])):
        want = (slope * end + offset).clamp(0.1, 1.2)
        torch.testing.assert_close(gain[(slice(None), *place, 0)], want)
    frame = math.sqrt((1 / 5) ** 2 / 3)  # the second frequency in time, the first in space
    want = slope * float(radial_gain(torch.tensor(frame), band)) + offset
    torch.testing.assert_close(gain[:, 1, 0, 0, 0], want.clamp(0.1, 1.2))


def test_m1e_memory_of_every_rank_would_gain_log_p() -> None:
    """A segment that P ranks append each counts P times, as if its LSE had log P more."""
    (q, k, v), (_, mk, mv) = heads(67), heads(M)
    ranks = 4
    often = vdit_fast.attention(q, k, v, segments=[(mk, mv)] * ranks)
    (out, lse), (more, more_lse) = (vdit_fast.attention(q, *pair, return_lse=True) for pair in ((k, v), (mk, mv)))
    torch.testing.assert_close(often, vdit_fast.merge([out, more], [lse, more_lse + math.log(ranks)])[0])
    assert tiny.relative(often, vdit_fast.attention(q, k, v, segments=[(mk, mv)])) > 1e-2


class Ranks:
    """Stands where sequence parallelism does. "queries": every rank has some of the queries and all keys; "heads": some
    of the heads and the whole sequence, as after the exchange of Ulysses."""

    def __init__(self, cut: str) -> None:
        self.cut = cut

    def __call__(self, call: Any, proceed: Callable[[], Tensor]) -> Tensor:
        q, k, v = call.q, call.k, call.v
        outs = []
        for rank in range(2):
            if self.cut == "queries":
                call.q = q.chunk(2, dim=1)[rank]
            else:
                call.q, call.k, call.v = (x[:, :, rank : rank + 1] for x in (q, k, v))
                call.heads = HeadShard(rank, 1, 2, (rank,), 2, lambda x: x)
            outs.append(proceed())
        return torch.cat(outs, dim=1 if self.cut == "queries" else 2)

    def fresh(self) -> Ranks:
        return self


@pytest.mark.parametrize("cut", ["queries", "heads"])
def test_m1e_once_per_global_sequence(cut: str) -> None:
    """However the sequence is cut: keys are made of the rows, not of a rank's tokens, and join innermost."""
    model, inputs = tiny.wan()
    handle = accelerate(model).memory(torch.randn(M, 32))
    want = tiny.run(model, inputs)
    handle.roots[0].session.around_heads["sequence"] = Ranks(cut)
    assert tiny.relative(tiny.run(model, inputs), want) < 1e-6


@pytest.mark.parametrize("memory", [1000, 64, 1, 127])
def test_tails_beside_a_sparse_plan_are_the_explicit_mask(memory: int) -> None:
    """1000 mod 64 is 40."""
    q, k, v = heads(201)
    mk, mv = (torch.randn(1, memory, 3, 16) for _ in range(2))
    keep = torch.rand(2, 3, 13, 13) < 0.4
    plan = AttentionPlan.from_block_mask(keep, 16, 16, lq=201, lk=201)
    got = vdit_fast.attention(q, k, v, plan, segments=[(mk, mv)])
    mask = torch.nn.functional.pad(plan.to_mask(), (0, memory), value=True)
    joint_k, joint_v = (torch.cat([x, y.expand(2, -1, -1, -1)], 1).double() for x, y in ((k, mk), (v, mv)))
    want = torch.nn.functional.scaled_dot_product_attention(
        *(x.double().transpose(1, 2) for x in (q, joint_k, joint_v)), attn_mask=mask
    ).transpose(1, 2)
    torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=1e-5)
    part, lse = vdit_fast.attention(q, k, v, plan, return_lse=True)
    dense, dense_lse = vdit_fast.attention(q, mk.expand(2, -1, -1, -1), mv.expand(2, -1, -1, -1), return_lse=True)
    torch.testing.assert_close(got, vdit_fast.merge([part, dense], [lse, dense_lse])[0])


# ---------------------------------------------------------------------- what is shared, and what a change undoes
def test_guidance_branches_share_what_a_step_computes() -> None:
    model, inputs = tiny.wan()
    other = {**inputs, "encoder_hidden_states": 0.5 * inputs["encoder_hidden_states"]}
    rows = torch.randn(M, 32)
    handle = accelerate(model).memory(rows)
    got = [tiny.run(model, tiny.at(x, t)) for t in (900.0, 500.0) for x in (inputs, other)]
    assert {key: handle.stats()["memory"][key] for key in ("computed", "shared")} == {"computed": 4, "shared": 4}
    for (t, x), out in zip(itertools.product((900.0, 500.0), (inputs, other)), got, strict=True):
        handle.reset()  # nothing is shared then
        assert torch.equal(tiny.run(model, tiny.at(x, t)), out)
    assert handle.stats()["memory"]["shared"] == 4
    both = tiny.run(model, {key: torch.cat([inputs[key], other[key]]) if isinstance(value, Tensor) else value
                            for key, value in tiny.at(inputs, 500.0).items()})  # fmt: skip
    assert tiny.relative(both, torch.cat(got[2:])) < 1e-5


def test_a_shared_timestep_makes_keys_once_for_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """``t.expand(B)`` says on the host that all items have one timestep: the segment is [1, M, H, D], read by all."""
    model, inputs = tiny.wan(batch=2)
    seen: list[int] = []

    def noted(*args: Any, segments: Any, **kw: Any) -> Any:
        seen.append(segments[0][0].shape[0])
        return vdit_fast.attention(*args, segments=segments, **kw)

    monkeypatch.setattr("vdit_fast.models.heads.attention", noted)
    accelerate(model).memory(torch.randn(M, 32))
    want = tiny.run(model, inputs)
    got = tiny.run(model, {**inputs, "timestep": torch.tensor([500.0]).expand(2)})
    assert seen == [2, 2, 1, 1] and tiny.relative(got, want) < 1e-6


STEADY: dict[str, Any] = {"first_full": 1, "last_full": 0, "interval": 9, "min_steps": 1}
CACHES = {
    "output": TaylorSeer(**STEADY),
    "span": TaylorSeer(granularity="span", **STEADY),
    "block": TaylorSeer(granularity="block", **STEADY),
    "module": TaylorSeer(granularity="module", **STEADY),
    "teacache": TeaCache(threshold=1e9, **STEADY),
    "first_block": FirstBlock(threshold=1e9, **STEADY),
}


@pytest.mark.parametrize("policy", CACHES.values(), ids=CACHES)
def test_a_change_of_memory_undoes_what_caches_hold(policy: Any) -> None:
    """Blocks that a cache leaves out have not seen the new rows: the step after a change is computed."""
    model, inputs = tiny.wan(layers=3)
    handle = accelerate(model, Config(cache=policy, on_unsupported="error"))
    first, second = torch.randn(2, M, 32).unbind(0)
    handle.memory(first)
    for t in (900.0, 880.0, 860.0):
        tiny.run(model, tiny.at(inputs, t))
    computed = handle.stats()["memory"]["computed"]
    assert sum(handle.stats()["cache"]["forecast"].values()) == 2 and computed < 9
    handle.memory(second)
    got = tiny.run(model, tiny.at(inputs, 840.0))
    assert sum(handle.stats()["cache"]["forecast"].values()) == 2
    exact, _ = tiny.wan(layers=3)
    accelerate(exact).memory(second)
    assert tiny.relative(got, tiny.run(exact, tiny.at(inputs, 840.0))) < 1e-6
    handle.memory(None)
    tiny.run(model, tiny.at(inputs, 820.0))
    assert sum(handle.stats()["cache"]["forecast"].values()) == 2


# ---------------------------------------------------------------------- modulation per token (Wan 2.2 TI2V)
def test_memory_gets_the_modulation_of_the_noisiest_token() -> None:
    """The clean tokens of a given first frame have timestep 0; the step's own is that of the others."""
    model, inputs = tiny.wan(per_token=True, batch=2)
    rows = torch.randn(M, 32)
    handle = accelerate(model).memory(rows)
    got = tiny.run(model, inputs)
    session = handle.roots[0].session
    handle.memory(None)
    keys = {}

    class Put(Ranks):
        def __call__(self, call: Any, proceed: Callable[[], Tensor]) -> Tensor:
            call.segments.append(keys[call.layer])
            return proceed()

    with torch.no_grad():
        _, temb, *_ = model.condition_embedder(torch.tensor([500.0, 500.0]), inputs["encoder_hidden_states"], None)
        temb = temb.unflatten(1, (6, -1))
        for layer, block in enumerate(model.blocks):
            shift, scale = (block.scale_shift_table + temb).chunk(6, dim=1)[:2]
            h = block.norm1(rows[None]) * (1 + scale) + shift
            k, v = block.attn1.norm_k(block.attn1.to_k(h)), block.attn1.to_v(h)
            keys[layer] = k.unflatten(2, (2, -1)), v.unflatten(2, (2, -1))
    session.around_heads["regions"] = Put("")
    assert tiny.relative(got, tiny.run(model, inputs)) < 1e-5


# ---------------------------------------------------------------------- the encoder
def encoder(**kw: Any) -> MemoryEncoder:
    sizes = {"channels": 4, "latent": (21, 26, 34), "tokens": 5, "width": 32, "hidden": (6, 8), "heads": 4}
    return MemoryEncoder(**(sizes | kw))


def test_encoder_makes_the_rows_of_all_videos_and_bands() -> None:
    made = encoder().eval()
    videos = torch.randn(1, 3, 4, 21, 26, 34)
    with torch.no_grad():
        rows = made(videos)
        assert rows.shape == (1, 3 * 2 * 5, 32)
        swapped = made(videos[:, [1, 0, 2]])
    order = [5, 6, 7, 8, 9, 0, 1, 2, 3, 4, *range(10, 15)]
    torch.testing.assert_close(swapped, rows[:, order + [15 + i for i in order]], atol=1e-5, rtol=1e-5)
    model, inputs = tiny.wan()
    handle = accelerate(model).memory(rows)
    assert handle.stats()["memory"]["tokens"] == 30 and tiny.run(model, inputs).isfinite().all()


def test_the_published_encoder_makes_1000_rows_of_five_videos() -> None:
    with torch.device("meta"):
        made = MemoryEncoder()
        assert made(torch.empty(1, 5, 16, 21, 60, 104)).shape == (1, M, 1536)
    assert (
        sum(p.numel() for p in made.parameters()) == 78_777_856
    )  # as the authors' code builds it; the paper says 150 M


def test_a_filter_is_a_gain_per_frequency() -> None:
    """A constant clip has frequency 0 only, which a channel's own gain multiplies; the gain stays fp32 in bf16."""
    for band, end in (("high", 0.2), ("low", 1.2)):
        made = RadialFilter(3, (4, 5, 6), band).eval()
        x = torch.randn(3).view(1, 3, 1, 1, 1).expand(1, 3, 4, 5, 6)
        want = (torch.linspace(0.7, 1.3, 3) * end + torch.linspace(-0.05, 0.05, 3)).clamp(0.1, 1.2)
        torch.testing.assert_close(made.filtered(x), x * want.view(1, 3, 1, 1, 1))
        gain = made.gain.clone()
        assert made.to(torch.bfloat16).gain.dtype == torch.float32 and torch.equal(made.gain, gain)
        assert made(x.to(torch.bfloat16)).dtype == torch.bfloat16


def test_the_encoder_can_be_trained_through_a_frozen_model() -> None:
    model, inputs = tiny.wan()
    made = encoder(dropout=0.0)
    handle = accelerate(model)
    handle.memory(made(torch.randn(1, 2, 4, 21, 26, 34)))
    model(**inputs)[0].square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())
    assert max(float(p.grad.abs().max()) for p in made.high.parameters() if p.grad is not None) > 0


@pytest.mark.parametrize(("settings", "match"), [
    ({"latent": (8, 26, 34)}, "at least"), ({"heads": 5}, "multiple of heads"), ({"tokens": 0}, "tokens"),
])  # fmt: skip
def test_bad_encoders(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        encoder(**settings)
    with pytest.raises(ValueError, match="make the encoder for this size"):
        encoder()(torch.randn(1, 2, 4, 20, 26, 34))
