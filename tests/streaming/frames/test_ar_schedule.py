"""The AD scheduler as data, and timestep vectors counted and drawn exactly."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vdit_fast.streaming import ARSchedule, FoPP

FAST = settings(max_examples=60, deadline=None)


def by_the_rule(frames: int, steps: int, ar_step: int) -> list[tuple[int, ...]]:
    """The rule as the paper's sampler states it: the first frame, or one whose predecessor is finished, goes on by one
    step; any other is ``ar_step`` behind its predecessor."""
    rows, before = [], [0] * frames
    while before != [steps] * frames:
        row: list[int] = []
        for i in range(frames):
            free = i == 0 or before[i - 1] == steps
            row.append(before[i] + 1 if free else row[i - 1] - ar_step)
        before = [min(max(n, 0), steps) for n in row]
        rows.append(tuple(before))
    return rows


@FAST
@given(st.integers(1, 9), st.integers(1, 12), st.data())
def test_it_is_the_rule(frames, steps, data):
    ar_step = data.draw(st.integers(0, steps))
    schedule = ARSchedule(frames, steps, ar_step)
    assert [iteration.after for iteration in schedule] == by_the_rule(frames, steps, ar_step)
    assert len(schedule) == steps + ar_step * (frames - 1) == len(list(schedule))


@FAST
@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 4), st.data())
def test_iterations_follow_on_each_other(frames, steps, block, data):
    schedule = ARSchedule(frames, steps, data.draw(st.integers(0, steps)), block)
    done = (0,) * frames
    for number, iteration in enumerate(schedule):
        assert iteration == schedule[number] == schedule[number - len(schedule)]
        assert iteration.done == done and iteration.active and iteration.window == range(frames)
        assert all(a >= b for a, b in itertools.pairwise(done)), "a later frame is never cleaner"
        moved = [frame for frame in range(frames) if iteration.after[frame] != done[frame]]
        assert moved == list(iteration.active)
        assert all(done[frame] == done[frame - frame % block] for frame in range(frames))
        done = iteration.after
    assert done == (steps,) * frames
    with pytest.raises(IndexError):
        schedule[len(schedule)]


@pytest.mark.parametrize("ar_step", [0, 1, 5, 10, 49, 50])
def test_number_of_iterations(ar_step):
    """50 + 15 a for 16 frames."""
    assert len(ARSchedule(16, 50, ar_step)) == 50 + 15 * ar_step


def test_the_ends():
    together = ARSchedule(5, 7, 0)
    assert all(iteration.active == range(5) and len(set(iteration.done)) == 1 for iteration in together)
    one_by_one = ARSchedule(5, 7, 7)
    assert all(len(iteration.active) == 1 for iteration in one_by_one) and len(one_by_one) == 35


@FAST
@given(st.integers(1, 12), st.integers(1, 10), st.integers(1, 3), st.integers(1, 12), st.data())
def test_windows(frames, steps, block, window, data):
    ar_step = data.draw(st.integers(0, steps))
    most = max(len(iteration.active) for iteration in ARSchedule(frames, steps, ar_step, block))
    if most > window:
        with pytest.raises(ValueError, match="at a time; give an ar_step of at least") as caught:
            ARSchedule(frames, steps, ar_step, block, window)
        least = int(str(caught.value).split("at least ")[1].split()[0])
        if window >= block and least <= steps:
            ARSchedule(frames, steps, least, block, window)  # the remedy is one
        return
    for iteration in ARSchedule(frames, steps, ar_step, block, window):
        assert iteration.window.stop == iteration.active.stop and len(iteration.window) <= window
        assert iteration.window.start <= iteration.active.start
        beyond = iteration.done[iteration.window.stop :]
        assert not any(beyond), "frames that are left out at the end have not begun"
        assert all(n == steps for n in iteration.done[: iteration.window.start]), "those at the front are finished"


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"frames": 0}, ValueError, "frames"),
        ({"steps": 2.0}, TypeError, "steps"),
        ({"ar_step": 11}, ValueError, "ar_step is 11"),
        ({"ar_step": -1}, ValueError, "ar_step"),
        ({"block": 0}, ValueError, "block"),
        ({"window": 0}, ValueError, "window"),
        ({"window": 3}, ValueError, "up to 4 move"),
        ({"window": 3, "ar_step": 1}, ValueError, "ar_step of at least 4"),
    ],
)
def test_bad_numbers(options, error, words):
    with pytest.raises(error, match=words):
        ARSchedule(**{"frames": 4, "steps": 10} | options)


@pytest.mark.parametrize(("timesteps", "frames"), [(6, 4), (1, 5), (5, 1), (3, 7)])
def test_counts(timesteps, frames):
    """A1: the recurrence, the closed form and counting by hand agree."""
    fopp = FoPP(timesteps, frames)
    vectors = [
        v for v in itertools.product(range(timesteps), repeat=frames) if all(a <= b for a, b in itertools.pairwise(v))
    ]
    assert fopp.total == len(vectors) == math.comb(timesteps + frames - 1, frames)
    for t, f in itertools.product(range(timesteps - 1), range(frames - 1)):
        assert fopp.behind[t][f] == fopp.behind[t + 1][f] + fopp.behind[t][f + 1]
    for t, f in itertools.product(range(timesteps), range(frames)):
        assert fopp.behind[t][f] * fopp.ahead[t][f] == sum(v[f] == t for v in vectors)
    assert sum(row[0] for row in fopp.behind) == fopp.total


def test_counts_are_exact_where_floats_are_not():
    fopp = FoPP(1000, 16)
    assert fopp.total == math.comb(1015, 16) > 2**53
    assert sum(row[0] for row in fopp.behind) == fopp.total
    assert float(fopp.total) != fopp.total


def test_draws():
    fopp = FoPP(4, 3)
    generator = torch.Generator().manual_seed(0)
    drawn = fopp.sample(4000, uniform=True, generator=generator)
    assert drawn.dtype == torch.int64 and drawn.shape == (4000, 3) and bool((drawn.diff(dim=1) >= 0).all())
    seen = Counter(map(tuple, drawn.tolist()))
    assert len(seen) == fopp.total == 20
    assert all(abs(n - 200) < 5 * 200**0.5 for n in seen.values()), seen
    drawn = fopp.sample(6000, generator=generator)
    assert bool((drawn.diff(dim=1) >= 0).all())
    # by the definition: one frame's timestep is uniform, the rest uniform given it
    share = Counter()
    vectors = [v for v in itertools.product(range(4), repeat=3) if v[0] <= v[1] <= v[2]]
    for frame, t in itertools.product(range(3), range(4)):
        fitting = [v for v in vectors if v[frame] == t]
        for v in fitting:
            share[v] += 1 / 12 / len(fitting)
    seen = Counter(map(tuple, drawn.tolist()))
    for v in vectors:
        assert abs(seen[v] - 6000 * share[v]) < 5 * (6000 * share[v]) ** 0.5, v
    again = FoPP(1000, 16).sample(2, generator=torch.Generator().manual_seed(5))
    assert torch.equal(again, FoPP(1000, 16).sample(2, generator=torch.Generator().manual_seed(5)))
    assert int(again.max()) < 1000 and int(again.min()) >= 0
