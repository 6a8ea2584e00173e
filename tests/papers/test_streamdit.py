"""StreamDiT: Real-Time Streaming Text-to-Video Generation (arXiv 2507.03745): row 8, checks W1a and W1b.

A moving buffer of frames whose timesteps rise along it, and window attention that every other layer shifts by half a
window. (How windows are cut at the border is not in the paper; here they do not wrap around.)
"""

from __future__ import annotations

import itertools

import pytest
import tiny
import torch
from torch import Tensor

import vdit_fast
from vdit_fast.accelerate import accelerate
from vdit_fast.config import Config
from vdit_fast.context import LayerContext
from vdit_fast.planners import ShiftedWindow
from vdit_fast.streaming import BufferSchedule, FlowEuler, FrameModel, StreamBuffer


def heads(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 2, tokens, 3, 16).unbind()
    return q, k, v


def windows(grid: tuple[int, int, int], window: tuple[int, int, int], shift: int) -> Tensor:
    """Window number of every token; borders lie at shift + k * window."""
    places = torch.cartesian_prod(*map(torch.arange, grid)) - shift
    cells = torch.div(places, torch.tensor(window), rounding_mode="floor") + 1
    return (cells[:, 0] * 100 + cells[:, 1]) * 100 + cells[:, 2]


def plan(grid: tuple[int, int, int], window: tuple[int, int, int], layer: int):
    tokens = grid[0] * grid[1] * grid[2]
    place = LayerContext(layer=layer, num_layers=4, name="attn", grid=grid, n_video=tokens)
    return ShiftedWindow(window=window).plan(torch.empty(1, tokens, 1, 16), torch.empty(1, tokens, 1, 16), place)


def test_w1a_windows_are_a_permutation_and_a_batch_and_a_mask() -> None:
    """Windows of 2 x 2 x 2 in 4 x 4 x 4 tokens: 8 of 64 keys per query."""
    q, k, v = heads(64)
    number = windows((4, 4, 4), (2, 2, 2), 0)
    order = number.argsort(stable=True)
    batched = [x[:, order].unflatten(1, (8, 8)).flatten(0, 1) for x in (q, k, v)]
    want = torch.empty_like(q)
    want[:, order] = vdit_fast.attention(*batched).unflatten(0, (2, 8)).flatten(1, 2)
    even = plan((4, 4, 4), (2, 2, 2), 0)
    torch.testing.assert_close(vdit_fast.attention(q, k, v, even), want, atol=2e-6, rtol=1e-5)
    mask = number[:, None] == number
    assert torch.equal(even.to_mask()[0, 0], mask)
    assert even.density == pytest.approx(float(mask.float().mean())) == pytest.approx(8 / 64)


def test_w1b_shifted_windows_are_partial_at_the_border() -> None:
    """8 corners of one token, 12 edges of 2, 6 faces of 4 and the middle of 8, of unequal lengths in one launch."""
    odd = plan((4, 4, 4), (2, 2, 2), 1)
    assert sorted(odd.tiles[:, 2].tolist()) == [1] * 8 + [2] * 12 + [4] * 6 + [8]
    number = windows((4, 4, 4), (2, 2, 2), 1)
    mask = number[:, None] == number
    assert torch.equal(odd.to_mask()[0, 0], mask)
    q, k, v = heads(64)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 4
    want = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)
    torch.testing.assert_close(vdit_fast.attention(q, k, v, odd), want, atol=2e-6, rtol=1e-5)


def test_layers_of_a_model_alternate() -> None:
    model, inputs = tiny.wan(layers=3)
    inputs = tiny.regrid(inputs, (4, 4, 4))
    handle = accelerate(model, Config(attention=ShiftedWindow(window=(2, 2, 2))))
    tiny.run(model, inputs)
    shifted = plan((4, 4, 4), (2, 2, 2), 1).density
    assert [layer["mean_density"] for layer in handle.stats()["layers"]] == pytest.approx([0.125, shifted, 0.125])


def test_one_window_is_dense_attention_bit_for_bit() -> None:
    model, inputs = tiny.wan(layers=2)
    inputs = tiny.regrid(inputs, (3, 5, 4))
    handle = accelerate(model, Config(attention=ShiftedWindow(window=(3, 5, 0))))
    whole = tiny.run(model, inputs)
    assert handle.stats()["layers"][1]["dense"] == {"one window holds the whole grid": 1}
    handle.reconfigure("exact")
    assert torch.equal(tiny.run(model, inputs), whole)


def stream(schedule: BufferSchedule) -> tuple[StreamBuffer, FlowEuler]:
    model, inputs = tiny.wan()
    sampler = FlowEuler(torch.linspace(1, 0, schedule.steps + 1).tolist())
    frame_model = FrameModel(accelerate(model), {"encoder_hidden_states": inputs["encoder_hidden_states"]})
    return StreamBuffer(frame_model, schedule, sampler, (1, 4, 8, 8)), sampler


def test_a_chunk_leaves_every_s_steps_and_the_others_move_up() -> None:
    """c = 1, s = 2, N = 3: T = 6."""
    buffer, sampler = stream(BufferSchedule(chunks=3, chunk=1, micro_steps=2))
    left = []
    for number in range(12):
        before, done, times = buffer.latents.clone(), buffer.done, buffer.timesteps
        assert all(a <= b for a, b in itertools.pairwise(times))
        predicted = buffer.model(before, times, step=number % 2, num_steps=2, window=buffer.schedule.left(number))
        begun = sum(2 * chunk <= number for chunk in range(3))
        after = before.clone()
        after[:, :, :begun] = sampler.move(before[:, :, :begun], predicted[:, :, :begun], done[:begun])
        chunk = buffer.advance()
        if chunk is None:
            assert torch.equal(buffer.latents, after)
            continue
        left.append(number)
        assert torch.equal(chunk, after[:, :, :1]) and torch.equal(buffer.latents[:, :, :2], after[:, :, 1:])
    assert left == [5, 7, 9, 11]


@pytest.mark.parametrize("micro_steps", [1, 5])
def test_one_chunk_is_plain_sampling(micro_steps: int) -> None:
    """c = B: with s = 1 one evaluation, with s = 5 five, all frames at the same step."""
    buffer, sampler = stream(BufferSchedule(chunks=1, chunk=3, micro_steps=micro_steps))
    x = buffer.latents.clone()
    for n, t in enumerate(sampler.timesteps):
        x = sampler.move(x, buffer.model(x, [t] * 3, step=n, num_steps=micro_steps, window=0), [n] * 3)
    assert torch.equal(next(buffer.stream()), x)


def test_one_frame_per_chunk_and_one_step_is_the_diagonal() -> None:
    buffer, _ = stream(BufferSchedule(chunks=4))
    for _ in range(4):
        buffer.advance()
    assert buffer.done == (3, 2, 1, 0)
    assert buffer.timesteps == pytest.approx((250.0, 500.0, 750.0, 1000.0))
