"""VITON-DiT: Learning In-the-Wild Video Try-On from Human Dance Videos via Diffusion Transformers (arXiv 2405.18326).

A garment branch's features are fused with the self-attention of the denoising DiT and of an identity ControlNet. How is
not published; both readings are served and tested, because they differ: one softmax over both branches' keys, and two
attentions of which one is added under a gate.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

import vdit_fast
from vdit_fast.accelerate import accelerate
from vdit_fast.caching import TaylorSeer
from vdit_fast.config import Config
from vdit_fast.context import HeadShard
from vdit_fast.models.base import set_processor
from vdit_fast.planners import SVG2

pytest.importorskip("diffusers")

Pair = tuple[Tensor, Tensor]


class Stock:
    """Wan's self-attention by torch, which notes its keys and reads those of a garment."""

    def __init__(self, notes: list[Pair], garment: Pair | None = None, mode: str = "concat", gate: Any = 1.0) -> None:
        self.notes, self.garment, self.mode, self.gate = notes, garment, mode, gate

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None,
                 rotary_emb: Any = None) -> Tensor:  # fmt: skip
        q, k = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, attn.to_v(hidden_states)))
        cos, sin = rotary_emb[0][..., 0::2], rotary_emb[1][..., 1::2]

        def turn(x: Tensor) -> Tensor:
            even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
            return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).type_as(x)

        def attend(k: Tensor, v: Tensor) -> Tensor:
            return functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

        q, k = turn(q), turn(k)
        self.notes.append((k, v))
        if self.garment is None:
            out = attend(k, v)
        else:
            gk, gv = (x.expand(q.shape[0], -1, -1, -1) for x in self.garment)
            if self.mode == "concat":
                out = attend(torch.cat([k, gk], 1), torch.cat([v, gv], 1))
            else:
                gate = self.gate.view(-1, 1) if isinstance(self.gate, Tensor) else self.gate
                out = attend(k, v) + gate * attend(gk, gv)
        return attn.to_out[1](attn.to_out[0](out.flatten(2).type_as(q)))


def stock_run(model: nn.Module, inputs: dict[str, Any], make: Callable[[int], Stock]) -> Tensor:
    model = copy.deepcopy(model)
    for layer, block in enumerate(model.blocks):
        set_processor(block.attn1, make(layer))
    return tiny.run(model, inputs)


def models() -> tuple[nn.Module, dict[str, Any], nn.Module, dict[str, Any]]:
    """A denoiser over three frames of two clips, and a garment branch with weights of its own over one picture."""
    model, inputs = tiny.wan(batch=2)
    garment, picture = tiny.wan(frames=1)
    with torch.no_grad():
        for parameter in garment.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model, inputs, garment, {**picture, "hidden_states": torch.randn(1, 4, 1, 8, 8)}


HEADS = torch.tensor([0.7, -0.4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("mode", "gate"), [("concat", 1.0), ("sum", 1.0), ("sum", 0.3), ("sum", HEADS)])
def test_both_ways_of_fusing_are_torchs(mode: Any, gate: Any, dtype: torch.dtype) -> None:
    model, inputs, garment, picture = models()

    def reference(dtype: torch.dtype) -> Tensor:
        one, other = (
            tiny.double(m) if dtype == torch.float64 else copy.deepcopy(m).to(dtype) for m in (garment, model)
        )
        notes: list[Pair] = []
        stock_run(one, tiny.cast(picture, dtype), lambda layer: Stock(notes))
        factor = gate.to(dtype) if isinstance(gate, Tensor) else gate
        return stock_run(other, tiny.cast(inputs, dtype), lambda layer: Stock([], notes[layer], mode, factor))

    truth, eager = reference(torch.float64), reference(dtype)
    model, garment, inputs, picture = (
        model.to(dtype),
        garment.to(dtype),
        tiny.cast(inputs, dtype),
        tiny.cast(picture, dtype),
    )
    stock = tiny.run(model, inputs)
    handle, other = accelerate(model, Config(fuse="eager")), accelerate(garment, Config(fuse="eager"))
    base = tiny.run(model, inputs)
    captured = other.capture()
    tiny.run(garment, picture)
    assert captured.nbytes == 2 * 2 * 16 * 32 * dtype.itemsize and len(captured.keys) == 2
    assert handle.feed(captured, mode, gate) is handle
    tiny.exact_enough(tiny.run(model, inputs), eager, truth)
    assert f"mode {mode}" in handle.report() and "captur" in other.report()
    assert tiny.relative(eager, base) > 1e-2
    handle.feed(None)
    assert torch.equal(tiny.run(model, inputs), base)
    handle.feed(captured, mode, gate)
    handle.remove()
    assert torch.equal(tiny.run(model, inputs), stock)


@pytest.mark.parametrize("mode", ["concat", "sum"])
@pytest.mark.parametrize("gate", [0.0, torch.zeros(2)])
def test_a_gate_of_zero_is_the_base(mode: Any, gate: Any) -> None:
    model, inputs, garment, picture = models()
    handle, captured = accelerate(model), accelerate(garment).capture()
    tiny.run(garment, picture)
    base = tiny.run(model, inputs)
    if mode == "concat" and isinstance(gate, Tensor):
        with pytest.raises(ValueError, match="one softmax over both has no gate"):
            handle.feed(captured, mode, gate)
        return
    handle.feed(captured, mode, gate)
    assert torch.equal(tiny.run(model, inputs), base)


def test_one_softmax_is_a_merge_by_lse_and_not_a_sum() -> None:
    q, k, v = torch.randn(3, 2, 48, 2, 16).unbind(0)
    gk, gv = torch.randn(2, 1, 16, 2, 16).unbind(0)
    wide_k, wide_v = (x.expand(2, -1, -1, -1) for x in (gk, gv))
    parts = [vdit_fast.attention(q, *pair, return_lse=True) for pair in ((k, v), (wide_k, wide_v))]
    joined = vdit_fast.attention(q, torch.cat([k, wide_k], 1), torch.cat([v, wide_v], 1))
    torch.testing.assert_close(vdit_fast.merge([p[0] for p in parts], [p[1] for p in parts])[0], joined)
    torch.testing.assert_close(vdit_fast.attention(q, k, v, segments=[(gk, gv)]), joined)
    assert tiny.relative(parts[0][0] + parts[1][0], joined) > 0.1


@pytest.mark.parametrize("mode", ["concat", "sum"])
def test_the_garment_is_dense_beside_a_sparse_video(mode: Any) -> None:
    model, inputs, garment, picture = models()
    captured = accelerate(garment).capture()
    tiny.run(garment, picture)
    handle = accelerate(model).feed(captured, mode, 0.5 if mode == "sum" else 1.0)
    want = tiny.run(model, inputs)
    handle.reconfigure(Config(attention=SVG2(top_p=1.0, q_clusters=4, k_clusters=4)))
    assert tiny.relative(tiny.run(model, inputs), want) < 1e-5
    assert handle.stats()["layers"][0]["sparse_calls"] == 1


def test_an_identity_control_net_of_fewer_layers_takes_the_first_ones() -> None:
    """The denoiser and the ControlNet read the same garment; the next picture replaces the one before."""
    model, inputs, garment, picture = models()
    control, _ = tiny.wan(layers=1, batch=2)
    captured = accelerate(garment).capture()
    tiny.run(garment, picture)
    handles = [accelerate(m).feed(captured) for m in (model, control)]
    first = [tiny.run(m, inputs) for m in (model, control)]
    handles[1].remove()
    want = stock_run(control, inputs, lambda layer: Stock([], captured.keys[layer]))
    assert tiny.relative(first[1], want) < 1e-5
    tiny.run(garment, {**picture, "hidden_states": torch.randn(1, 4, 1, 8, 8)})
    assert tiny.relative(tiny.run(model, inputs), first[0]) > 1e-3
    held = {layer: pair[0].clone() for layer, pair in captured.keys.items()}
    captured.stop()
    tiny.run(garment, picture)
    assert all(torch.equal(captured.keys[layer][0], k) for layer, k in held.items())
    deeper, _ = tiny.wan(layers=3)
    with pytest.raises(ValueError, match="at most as many layers"):
        accelerate(deeper).feed(captured)


class Heads:
    """Stands where sequence parallelism does: two ranks with a head each and the whole sequence."""

    def __call__(self, call: Any, proceed: Callable[[], Tensor]) -> Tensor:
        q, k, v = call.q, call.k, call.v
        outs = []
        for rank in range(2):
            call.q, call.k, call.v = (x[:, :, rank : rank + 1] for x in (q, k, v))
            call.heads = HeadShard(rank, 1, 2, (rank,), 2, lambda x: x)
            outs.append(proceed())
        return torch.cat(outs, dim=2)

    def fresh(self) -> Heads:
        return self


@pytest.mark.parametrize(("mode", "gate"), [("concat", 1.0), ("sum", HEADS)])
def test_ranks_of_some_heads_read_those_of_the_garment(mode: Any, gate: Any) -> None:
    model, inputs, garment, picture = models()
    captured = accelerate(garment).capture()
    tiny.run(garment, picture)
    handle = accelerate(model).feed(captured, mode, gate)
    want = tiny.run(model, inputs)
    handle.roots[0].session.around_heads["sequence"] = Heads()
    assert tiny.relative(tiny.run(model, inputs), want) < 1e-6
    if mode == "sum":
        handle.feed(captured, mode, torch.ones(3))
        with pytest.raises(ValueError, match="gate has 3 entries"):
            tiny.run(model, inputs)


@pytest.mark.parametrize(("mode", "gate"), [("concat", 1.0), ("sum", 0.5), ("sum", HEADS)])
def test_a_garment_branch_in_bf16_beside_a_denoiser_in_fp32(mode: Any, gate: Any) -> None:
    model, inputs, garment, picture = models()
    garment = garment.to(torch.bfloat16)
    captured = accelerate(garment).capture()
    tiny.run(garment, tiny.cast(picture, torch.bfloat16))
    assert {x.dtype for pair in captured.keys.values() for x in pair} == {torch.bfloat16}
    wide = {layer: (k.float(), v.float()) for layer, (k, v) in captured.keys.items()}
    want = stock_run(model, inputs, lambda layer: Stock([], wide[layer], mode, gate))
    accelerate(model).feed(captured, mode, gate)
    assert tiny.relative(tiny.run(model, inputs), want) < 1e-5


@pytest.mark.parametrize("mode", ["concat", "sum"])
def test_another_garment_undoes_what_caches_hold(mode: Any) -> None:
    """Blocks that a cache leaves out have not read the new keys; named steps are one generation until a reset."""
    model, inputs, garment, picture = models()
    other = copy.deepcopy(model)
    exact = accelerate(other)
    captured = accelerate(garment).capture()
    tiny.run(garment, picture)
    handle = accelerate(model, Config(cache=TaylorSeer(first_full=1, last_full=0, interval=9, min_steps=1)))

    def at(handle: Any, step: int) -> Tensor:
        with handle.step(step, timestep=900.0 - 20 * step, num_steps=9):
            return tiny.run(handle.modules[0], tiny.at(inputs, 900.0 - 20 * step))

    def forecast() -> int:
        return sum(handle.stats()["cache"]["forecast"].values())

    at(handle, 0)
    at(handle, 1)
    assert forecast() == 1
    for step, feed in ((2, captured), (4, None)):
        for one in (handle, exact):
            one.feed(feed, mode)
        assert tiny.relative(at(handle, step), at(exact, step)) < 1e-6
        at(handle, step + 1)
        assert forecast() == 1 + step // 2


def test_what_is_captured_is_a_copy() -> None:
    """A compiled graph uses its buffers again once attention has read them, and a view holds all of a joint one."""
    _, _, garment, picture = models()
    for block in garment.blocks:
        block.attn1.fuse_projections()
    handle = accelerate(garment)
    captured, want = handle.capture(), {}

    class Again(Heads):
        def __call__(self, call: Any, proceed: Callable[[], Tensor]) -> Tensor:
            out, want[call.layer] = proceed(), (call.k.clone(), call.v.clone())
            for x in (call.k, call.v):
                x.fill_(7.0)
            return out

    handle.roots[0].session.around_heads["sequence"] = Again()
    tiny.run(garment, picture)
    for layer, pair in captured.keys.items():
        for x, y in zip(pair, want[layer], strict=True):
            assert torch.equal(x, y) and x.untyped_storage().nbytes() == x.nbytes


def test_text_rows_of_a_joint_garment_branch_stay_out() -> None:
    """Of a joint sequence the video's keys are captured, padded text or not."""
    for build in (lambda: tiny.hunyuan(lengths=(5, 9)), tiny.cogvideox):
        garment, picture = build()
        handle = accelerate(garment)
        seen: list[Tensor] = []

        def note(step: Any, place: Any, rows: Any, seen: list[Tensor] = seen) -> None:
            seen.append(rows.video)

        handle.hook("attention_heads", note)
        captured = handle.capture()
        tiny.run(garment, picture)
        assert len(seen) == len(captured.keys)
        assert {k.shape for k, _ in captured.keys.values()} == {rows.shape for rows in seen}


def test_keys_of_a_cache_are_not_captured() -> None:
    _, _, garment, picture = models()
    handle = accelerate(garment)
    handle.capture()

    class Longer(Heads):
        def __call__(self, call: Any, proceed: Callable[[], Tensor]) -> Tensor:
            call.k, call.v = (torch.cat([x, x], dim=1) for x in (call.k, call.v))
            return proceed()

    handle.roots[0].session.around_heads["streaming"] = Longer()
    with pytest.raises(RuntimeError, match="end the stream first"):
        tiny.run(garment, picture)


def test_a_trained_garment_branch_gets_gradients() -> None:
    model, inputs, garment, picture = models()
    garment.requires_grad_(True)
    captured = accelerate(garment).capture()
    handle = accelerate(model)

    def loss() -> Tensor:
        garment(**picture)
        return model(**inputs)[0].square().mean()

    for mode in ("concat", "sum"):
        handle.feed(captured, mode)
        garment.zero_grad()
        loss().backward()
        got = {name: p.grad.clone() for name, p in garment.named_parameters() if p.grad is not None}
        assert "blocks.0.attn1.to_k.weight" in got
        name, step = "blocks.1.attn1.to_v.weight", 1e-2
        weight = garment.get_parameter(name)
        direction = torch.randn_like(weight)
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                weight.add_(sign * step * direction)
                values.append(float(loss()))
                weight.sub_(sign * step * direction)
        slope = (values[0] - values[1]) / (2 * step)
        assert slope == pytest.approx(float((got[name] * direction).sum()), rel=2e-2)


def test_checkpointing_reads_what_the_first_run_read() -> None:
    model, inputs, garment, picture = models()
    model.requires_grad_(True)
    captured = accelerate(garment).capture()
    accelerate(model).feed(captured)
    tiny.run(garment, picture)
    want = tiny.gradients(model, [inputs])
    model.enable_gradient_checkpointing()
    model.train()
    model.zero_grad()
    out = model(**inputs)[0].square().mean()
    tiny.run(garment, {**picture, "hidden_states": torch.randn(1, 4, 1, 8, 8)})  # the next step's, before backward
    out.backward()
    tiny.same_gradients({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, want)


def test_interpolated_frames_are_clips_with_both_ends_given() -> None:
    """Interpolated auto-regressive generation: key frames first, then the frames between two of them, whose latents the
    caller puts back after every step. Nothing here may carry over from one clip to the next: every clip of the chain is
    what it would be by itself."""
    model, inputs, garment, picture = models()
    captured = accelerate(garment).capture()
    tiny.run(garment, picture)
    handle = accelerate(model, Config(attention=SVG2(top_p=0.9, q_clusters=4, k_clusters=4))).feed(captured)
    keys = torch.randn(2, 4, 3, 8, 8)

    def between(first: Tensor, last: Tensor) -> Tensor:
        torch.manual_seed(5)
        x = torch.randn(2, 4, 3, 8, 8)
        for t in (900.0, 600.0, 300.0):
            x[:, :, 0], x[:, :, 2] = first, last
            x = x - 0.3 * tiny.run(model, tiny.at({**inputs, "hidden_states": x}, t))
        return x

    chain = [between(keys[:, :, i], keys[:, :, i + 1]) for i in range(2)]
    for i, clip in enumerate(chain):
        handle.reset()
        assert torch.equal(between(keys[:, :, i], keys[:, :, i + 1]), clip)


def test_refusals() -> None:
    model, inputs, garment, _ = models()
    handle, other = accelerate(model), accelerate(garment)
    captured = other.capture()
    for bad, error, match in (
        ((captured, "mean"), ValueError, "unknown mode 'mean'"),
        ((captured, "concat", 0.5), ValueError, "has no gate"),
        ((captured, "sum", float("nan")), ValueError, "finite"),
        ((captured, "sum", torch.ones(2, 2)), ValueError, "heads"),
        (("keys",), TypeError, "capture"),
    ):
        with pytest.raises(error, match=match):
            handle.feed(*bad)
    with pytest.raises(ValueError, match="the transformer's own"):
        other.feed(captured)
    handle.feed(captured)
    with pytest.raises(RuntimeError, match="nothing was captured yet for blocks"):
        tiny.run(model, inputs)
    captured.keys = {layer: (torch.randn(1, 5, 3, 16),) * 2 for layer in range(2)}
    with pytest.raises(ValueError, match="heads, head dimension and device must agree"):
        tiny.run(model, inputs)
    handle.remove()
    with pytest.raises(RuntimeError, match="was removed"):
        handle.feed(captured)
