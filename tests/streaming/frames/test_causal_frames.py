"""Causal order over frames with context rows, in models that have no such mask."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch
from tiny import Band

from vdit_fast.accelerate import accelerate
from vdit_fast.config import Config
from vdit_fast.streaming import CausalFrames, causal_frames
from vdit_fast.subset import RAS


def mask(grid, block, context, first, reads):
    """bool [N, N] by the definition."""
    frames, height, width = grid
    frame = [i for i in range(frames) for _ in range(height * width)]
    kinds = [-1] * context + frame if first else frame + [-1] * context
    return torch.tensor(
        [[b < 0 or (a < 0 and reads == "all") or (a >= 0 and b // block <= a // block) for b in kinds] for a in kinds]
    )


@pytest.mark.parametrize("reads", ["all", "context"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("grid", "block", "context"), [((4, 2, 3), 1, 5), ((5, 1, 3), 2, 7), ((3, 3, 1), 9, 0)])
def test_the_plan_is_the_mask(grid, block, context, first, reads):
    layout = CausalFrames(block, reads)
    plan = layout.plan(grid, context, context_first=first).validate()
    assert torch.equal(plan.to_mask()[0, 0], mask(grid, block, context, first, reads))
    assert layout.context_cacheable == (reads == "context")


def stock_with_mask(model, inputs, bias):
    """The stock model with an additive mask in every self-attention call of the video's length."""
    real = torch.nn.functional.scaled_dot_product_attention

    def masked(query, key, value, attn_mask=None, **options):
        if query.shape[2] == key.shape[2] == bias.shape[0]:
            attn_mask = bias
        return real(query, key, value, attn_mask=attn_mask, **options)

    torch.nn.functional.scaled_dot_product_attention = masked
    try:
        return tiny.run(model, inputs)
    finally:
        torch.nn.functional.scaled_dot_product_attention = real


@pytest.mark.parametrize("reads", ["all", "context"])
@pytest.mark.parametrize("kind", ["wan_t2v", "cogvideox_5b"])
def test_models_attend_in_that_order(kind, reads):
    """Wan has no context in its sequence, CogVideoX 6 text rows before the video."""
    model, inputs = tiny.build(kind)
    text = inputs["encoder_hidden_states"].shape[1] if kind.startswith("cog") else 0
    frames = inputs["hidden_states"].shape[1 if text else 2]
    allowed = mask((frames, 4, 4), 1, text, True, reads)
    want = stock_with_mask(model, inputs, torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf))
    stock = tiny.run(model, inputs)
    handle = accelerate(model)
    remove = causal_frames(handle, CausalFrames(context_reads=reads))
    got = tiny.run(model, inputs)
    assert tiny.relative(got, want) < 3e-6 < 1e-3 < tiny.relative(got, stock)
    remove()
    remove()
    assert tiny.relative(tiny.run(model, inputs), stock) < 3e-6
    handle.remove()
    assert torch.equal(tiny.run(model, inputs), stock)


def test_padded_text_behind_the_video():
    model, inputs = tiny.hunyuan(lengths=(5, 9))
    handle = accelerate(model)
    causal_frames(handle)
    got = tiny.run(model, inputs)
    padding = inputs["encoder_attention_mask"] == 0
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].masked_fill(padding[..., None], 50.0)
    assert tiny.relative(tiny.run(model, inputs), got) < 1e-5
    assert handle.stats()["layers"][0]["sparse_calls"] == 2


def test_planners_are_not_asked():
    model, inputs = tiny.wan()
    handle = accelerate(model, Config(attention=Band(width=2)))
    causal_frames(handle)
    tiny.run(model, inputs)
    (reason,) = handle.stats()["layers"][0]["unasked"]
    assert reason == "causal frames: planners know full attention only"
    assert "seen" not in handle.roots[0].session.state


def test_gradients_are_those_of_the_mask():
    """Training, also with checkpointing and a forward of another length before the backward."""
    model, inputs = tiny.wan()
    model.requires_grad_(True)
    other = tiny.regrid(inputs, (4, 4, 4))
    allowed = mask((3, 4, 4), 1, 0, True, "all")
    bias = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)
    real, run = torch.nn.functional.scaled_dot_product_attention, tiny.gradients

    def masked(query, key, value, attn_mask=None, **options):
        own = bias if query.shape[2] == key.shape[2] == len(bias) else attn_mask
        return real(query, key, value, attn_mask=own, **options)

    torch.nn.functional.scaled_dot_product_attention = masked
    try:
        want = run(model, [inputs])
    finally:
        torch.nn.functional.scaled_dot_product_attention = real
    handle = accelerate(model)
    remove = causal_frames(handle)
    tiny.same_gradients(run(model, [inputs]), want)
    both = run(model, [inputs, other])
    model.train().enable_gradient_checkpointing()
    tiny.same_gradients(run(model, [inputs, other]), both)
    remove()


@pytest.mark.parametrize("kind", ["wan, causal frames", "skyreels by its configuration"])
def test_training_after_a_forward_in_inference_mode(kind):
    """The plan is made once: autograd must be able to save it whoever came first."""
    from families.skyreels_v2 import skyreels

    model, inputs = tiny.wan() if kind.startswith("wan") else skyreels(frame_block=2)
    handle = accelerate(model)
    if kind.startswith("wan"):
        causal_frames(handle)
    with torch.inference_mode():
        tiny.run(model, inputs)
    model.requires_grad_(True)
    model(**inputs)[0].square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.blocks[0].attn1.parameters())


def test_a_copy_stands_alone():
    import copy

    model, inputs = tiny.wan()
    handle = accelerate(model)
    remove = causal_frames(handle)
    want, twin = tiny.run(model, inputs), copy.deepcopy(model)
    free = tiny.run(twin, inputs)
    off = causal_frames(accelerate(twin))
    assert torch.equal(tiny.run(twin, inputs), want)
    remove()
    assert torch.equal(tiny.run(twin, inputs), want) and torch.equal(tiny.run(model, inputs), free)
    off()
    assert torch.equal(tiny.run(twin, inputs), free) and not torch.equal(free, want)


def test_caches_forget_when_the_order_comes_and_goes():
    """In the middle of named steps, which no timestep divides into generations."""
    model, inputs = tiny.wan()
    stock = tiny.run(model, tiny.at(inputs, 500.0))
    cache = {"method": "taylorseer", "granularity": "model", "first_full": 1, "interval": 99}
    handle = accelerate(model, Config.from_dict({"cache": cache}))

    def step(number, timestep):
        with handle.step(number):
            return tiny.run(model, tiny.at(inputs, timestep))

    step(0, 900.0), step(1, 800.0)
    remove = causal_frames(handle)
    causal = step(2, 500.0)
    remove()
    assert tiny.relative(step(3, 500.0), stock) < 3e-6 < 1e-3 < tiny.relative(causal, stock)
    assert handle.stats()["cache"]["forecast"] == {1: 1}
    generations = handle.stats()["generations"]
    remove()
    step(4, 400.0)
    assert handle.stats()["generations"] == generations


def test_what_is_refused():
    from families.skyreels_v2 import skyreels

    model, inputs = skyreels(frame_block=2)
    causal_frames(accelerate(model))
    with pytest.raises(RuntimeError, match="a mask of the model already"):
        tiny.run(model, inputs)
    model, inputs = tiny.wan()
    handle = accelerate(SimpleNamespace(transformer=model), Config(subset=RAS(start=1, sample_ratio=0.5)))
    causal_frames(handle)
    tiny.run(model, tiny.at(inputs, 900.0))
    with pytest.raises(RuntimeError, match="without a subset"):
        tiny.run(model, tiny.at(inputs, 800.0))
    with pytest.raises(RuntimeError, match="remove it first"):
        causal_frames(handle)
    handle.remove()
    with pytest.raises(RuntimeError, match="was removed"):
        causal_frames(handle)
    with pytest.raises(ValueError, match="context_reads"):
        CausalFrames(context_reads="video")
