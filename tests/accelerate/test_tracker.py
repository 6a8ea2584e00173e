"""StepTracker: the step comes from the timestep, not from counting calls."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vdit_fast.context import LayerContext, StepContext
from vdit_fast.models.tracker import StepTracker


def pipe_with(timesteps: Any, **scheduler: Any) -> SimpleNamespace:
    return SimpleNamespace(scheduler=SimpleNamespace(timesteps=timesteps, **scheduler), current_timestep=None)


def see(tracker: StepTracker, *values: Any) -> list[tuple[int, int, int]]:
    seen = [tracker.observe(value) for value in values]
    return [(context.generation, context.step, context.branch) for context in seen]


def test_alone_lower_is_next_same_is_branch_higher_is_new() -> None:
    tracker = StepTracker()
    calls = [900.0, 900.0, 500, 500, torch.tensor([100]), torch.tensor(100.0), 900, 100]
    assert see(tracker, *calls) == [
        (0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (0, 2, 0), (0, 2, 1), (1, 0, 0), (1, 1, 0)
    ]  # fmt: skip
    assert tracker.context.sigma == pytest.approx(0.1) and tracker.context.num_steps is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 6)])
def test_any_shape_and_dtype(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tracker = StepTracker()
    assert see(tracker, *(torch.full(shape, t, dtype=dtype) for t in (992, 992, 512))) == [
        (0, 0, 0), (0, 0, 1), (0, 1, 0)
    ]  # fmt: skip


def test_per_token_timesteps_count_by_their_largest() -> None:
    tracker = StepTracker()
    first = torch.full((2, 8), 900.0)
    first[:, :4] = 0
    second = torch.where(first == 0, 0.0, 400.0)
    assert see(tracker, first, first, second) == [(0, 0, 0), (0, 0, 1), (0, 1, 0)]
    assert tracker.context.timestep == 400.0


@pytest.mark.parametrize("value", [None, torch.empty(0), float("nan"), torch.tensor([float("nan")])])
def test_an_unreadable_timestep_is_an_unknown_step(value: Any) -> None:
    tracker = StepTracker()
    see(tracker, 900.0)
    context = tracker.observe(value)
    assert (context.step, context.timestep, context.sigma, context.generation) == (-1, None, None, 0)
    assert see(tracker, 500.0) == [(0, 1, 0)]


def test_schedule_gives_position_length_and_sigma() -> None:
    timesteps = torch.linspace(1000, 20, 50)
    pipe = pipe_with(timesteps, sigmas=torch.cat((timesteps / 1000 * 0.9, torch.zeros(1))))
    tracker = StepTracker(pipe)
    # A partial range: video-to-video starts in the middle.
    assert see(tracker, *(timesteps[20:][i].expand(2) for i in (0, 0, 1))) == [(0, 20, 0), (0, 20, 1), (0, 21, 0)]
    assert tracker.context.num_steps == 50 and tracker.context.sigma == pytest.approx(float(timesteps[21]) * 0.9e-3)
    assert tracker.context.fraction == 21 / 50
    # The same by value.
    assert see(tracker, float(timesteps[22]), timesteps[23].clone()) == [(0, 22, 0), (0, 23, 0)]
    # A value that is not in the schedule still has an order.
    assert tracker.observe(float(timesteps[23]) - 1).branch == 0


def test_going_back_or_a_new_schedule_is_a_new_generation() -> None:
    pipe = pipe_with(torch.linspace(1000, 20, 5))
    tracker = StepTracker(pipe)
    assert see(tracker, *pipe.scheduler.timesteps) == [(0, i, 0) for i in range(5)]
    assert see(tracker, pipe.scheduler.timesteps[0]) == [(1, 0, 0)]
    pipe.scheduler.timesteps = torch.linspace(1000, 20, 5)  # set_timesteps of the next call; one-step models need it
    assert see(tracker, pipe.scheduler.timesteps[0]) == [(2, 0, 0)]
    pipe.scheduler = SimpleNamespace(timesteps=torch.tensor([500, 100]))
    assert see(tracker, pipe.scheduler.timesteps[1]) == [(3, 1, 0)] and tracker.context.num_steps == 2


def test_experts_share_the_run() -> None:
    tracker = StepTracker()
    calls = [(900, "transformer"), (900, "transformer"), (400, "transformer_2"), (100, "transformer_2")]
    seen = [tracker.observe(value, expert) for value, expert in calls]
    assert [(c.step, c.branch, c.expert, c.generation) for c in seen] == [
        (0, 0, "transformer", 0), (0, 1, "transformer", 0), (1, 0, "transformer_2", 0), (2, 0, "transformer_2", 0)
    ]  # fmt: skip


def test_bfloat16_rounding_merges_timesteps_but_not_steps() -> None:
    timesteps = torch.tensor([1000.0, 999.0, 998.0, 500.0])
    assert len(timesteps.to(torch.bfloat16).unique()) < 4
    pipe = pipe_with(timesteps, step_index=None)
    tracker = StepTracker(pipe)
    seen = []
    for index, t in enumerate(timesteps):  # like HunyuanVideoPipeline, which casts the timestep to the latents' dtype
        pipe.current_timestep = t
        pipe.scheduler.step_index = index
        seen += see(tracker, t.expand(1).to(torch.bfloat16), t.expand(1).to(torch.bfloat16))
    assert seen == [(0, index, branch) for index in range(4) for branch in range(2)]
    pipe.current_timestep = None  # pipelines without it: the scheduler's own index decides
    seen = []
    for index, t in enumerate(timesteps):
        pipe.scheduler.step_index = index or None
        seen += see(tracker, t.expand(1).to(torch.bfloat16), t.expand(1).to(torch.bfloat16))
    assert seen == [(1, index, branch) for index in range(4) for branch in range(2)]


def test_a_stale_hint_is_not_believed() -> None:
    timesteps = torch.tensor([900.0, 500.0, 100.0])
    pipe = pipe_with(timesteps)
    pipe.current_timestep = timesteps[2]
    tracker = StepTracker(pipe)
    assert see(tracker, torch.tensor([500.0])) == [(0, 1, 0)]


def test_repeated_timesteps_of_second_order_schedulers() -> None:
    timesteps = torch.tensor([900.0, 500.0, 500.0, 100.0])
    tracker = StepTracker(pipe_with(timesteps))
    assert see(tracker, *timesteps) == [(0, i, 0) for i in range(4)]


def test_reset_begins_a_generation() -> None:
    tracker = StepTracker()
    see(tracker, 900)
    tracker.reset()
    tracker.reset()
    assert see(tracker, 500) == [(1, 0, 0)]


class _OnDevice(torch.Tensor):
    """A CPU tensor that says it is on a GPU, to count reads."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda")


def test_reads_of_device_memory_are_counted_and_bounded() -> None:
    tracker = StepTracker()
    for value in (900.0, 900.0, 500.0):
        tracker.observe(torch.tensor([value]).as_subclass(_OnDevice))
    assert tracker.host_reads == 3
    timesteps = torch.tensor([900.0, 500.0])
    tracker = StepTracker(pipe_with(timesteps))
    see(tracker, timesteps[0].expand(2), timesteps[1].expand(2))
    assert tracker.host_reads == 0


def test_layer_context_slices() -> None:
    last = LayerContext(layer=0, num_layers=1, name="x", grid=(2, 2, 3), n_video=12, text=4)
    assert (last.video_slice, last.text_slice, last.num_tokens) == (slice(0, 12), slice(12, 16), 16)
    first = LayerContext(layer=0, num_layers=1, name="x", grid=(2, 2, 3), n_video=12, text=4, text_first=True)
    assert (first.video_slice, first.text_slice) == (slice(4, 16), slice(0, 4))
    assert first.step == StepContext() and StepContext().fraction is None
