"""The pipeline simulator: closed forms, a model without any cleverness, conservation, monotony, size."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import replace

import numpy as np
import pytest

from vdit_fast.parallel.costs import WAN_1_3B, WAN_14B, Clip, dual_paral, memory_per_rank, ulysses_seconds
from vdit_fast.parallel.simulator import Link, Pipeline, forwards, main, simulate


def unit_stages(ranks: int, steps: int, blocks: int) -> float:
    """When the last of unit stages ends, the sheet's minimal model: a forward waits for the last results of its own
    block and of the cleaner one."""
    result: dict[tuple[int, int], float] = {}
    free = [0.0] * ranks
    made = dict.fromkeys(range(blocks), 0)
    queue: list[int] = []
    entered = 0
    while entered < blocks or queue:
        if entered < blocks:
            queue.append(entered)
            entered += 1
        for block in reversed(queue):
            now = max(result.get((b, made.get(b, 0) - 1), 0.0) for b in (block, block - 1))
            for rank in range(ranks):
                now = free[rank] = max(now, free[rank]) + 1
            result[block, made[block]] = now
        for block in queue:
            made[block] += 1
        queue = [b for b in queue if made[b] < steps]
    return max(result.values())


def some_pipeline(seed: int, ranks: int, **changes: object) -> Pipeline:
    rng = np.random.default_rng(seed)
    steps, blocks = int(rng.integers(1, 7)), int(rng.integers(1, 8))
    made = Pipeline(
        steps, blocks, rng.uniform(0.1, 1, ranks).tolist(), *rng.uniform(0, 0.3, 6).tolist(),
        link=Link(float(rng.choice([0.5, 3, math.inf])), rng.uniform(0, 0.3), bool(rng.integers(2))),
        newest=rng.uniform(0.5, 1),
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("ranks", "steps", "blocks"), [(1, 3, 2), (2, 5, 9), (4, 50, 32), (8, 50, 32), (8, 9, 40)])
def test_closed_forms_of_unit_stages(ranks: int, steps: int, blocks: int) -> None:
    """A queue that grows beyond the ranks: N² - 1 idle slots with the final drain, N² - N without."""
    run = simulate(Pipeline(steps, blocks, [1.0] * ranks))
    assert run.iterations == steps + blocks - 1
    assert (run.idle == ranks * ranks - 1).all()
    assert run.last_work[0] - run.busy[0] == ranks * ranks - ranks
    assert run.latency == unit_stages(ranks, steps, blocks)


@pytest.mark.parametrize("cores", [None, 2.5])
def test_any_queue_is_that_of_the_minimal_model(cores: float | None) -> None:
    for ranks, steps, blocks in itertools.product((1, 2, 3, 5), (1, 2, 4, 7), (1, 2, 3, 8)):
        run = simulate(Pipeline(steps, blocks, [1.0] * ranks, cores=cores))
        want = unit_stages(ranks, steps, blocks)
        assert run.latency == want if cores is None or cores >= ranks else run.latency >= want


def test_order_and_needs() -> None:
    order = list(forwards(3, 3))
    assert [(f.block, f.step) for f in order] == [
        (0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2), (2, 1), (1, 2), (2, 2)
    ]  # fmt: skip
    number = {(f.block, f.step): i for i, f in enumerate(order)}
    for i, f in enumerate(order):
        own, left = number.get((f.block, f.step - 1), -1), number.get((f.block - 1, min(f.step, 2)), -1)
        assert f.needs == max(own, left) + 1 <= i
    assert sum(f.updates for f in order) == len(order) - 1  # the last one is nobody's input


def test_one_rank_is_the_sum_of_the_work() -> None:
    p = Pipeline(5, 4, [0.7], embed=0.1, head=0.2, update=0.05, hop_bytes=1e9, return_bytes=1e9, link=Link(1.0, 3.0))
    for cores in (None, 1, 0.5):
        run = simulate(replace(p, cores=cores))
        assert run.latency == pytest.approx(20 * 1.05 / (cores or 1), rel=1e-9)
        assert run.messages == 0 and run.bytes == 0


def test_both_engines_agree_while_there_are_processors() -> None:
    """One goes over all ranks at once, the other event by event."""
    for seed in range(60):
        p = some_pipeline(seed, 1 + seed % 5)
        fast, events = simulate(p), simulate(replace(p, cores=p.ranks - 1e-9))
        for name in ("latency", "block_done", "busy", "last_work"):
            np.testing.assert_allclose(getattr(events, name), getattr(fast, name), rtol=1e-6, err_msg=f"{seed} {name}")


@pytest.mark.parametrize("share", [None, 0.6])
def test_conservation(share: float | None) -> None:
    for seed in range(40):
        ranks = 1 + seed % 6
        p = some_pipeline(seed, ranks, cores=share and share * ranks)
        run = simulate(p)
        total, iterations = p.steps * p.blocks, p.steps + p.blocks - 1
        assert run.iterations == iterations
        work = np.asarray(p.stage) * (total - iterations + iterations * p.newest)  # one newest block per iteration
        work[0] += total * (p.embed + p.update)
        work[-1] += total * p.head
        np.testing.assert_allclose(run.busy, work)
        assert (run.idle >= -1e-9).all() and 0 <= run.bubble < 1
        assert run.latency >= (1 - 1e-9) * max(work.max(), work.sum() / min(ranks, p.cores or ranks))
        assert run.messages == (total * ranks if ranks > 1 else 0)
        returned = p.steps * (p.first_return_bytes + (p.blocks - 1) * p.return_bytes)
        assert run.bytes == pytest.approx(total * (ranks - 1) * p.hop_bytes + returned if ranks > 1 else 0)
        assert (np.diff(run.block_done) > 0).all() and run.block_done[-1] == run.latency


@pytest.mark.parametrize("share", [None, 0.6])
def test_worse_parts_never_make_it_faster(share: float | None) -> None:
    for seed in range(40):
        ranks = 2 + seed % 4
        p = some_pipeline(seed, ranks, cores=share and share * ranks)
        base = simulate(p).latency * (1 - 1e-12)
        slow = replace(p.link, bytes_per_second=p.link.bytes_per_second / 3)
        assert simulate(replace(p, link=slow)).latency >= base
        assert simulate(replace(p, link=replace(p.link, latency=p.link.latency + 0.2))).latency >= base
        assert simulate(replace(p, hop_bytes=p.hop_bytes * 2 + 1)).latency >= base
        if share is None:
            assert simulate(replace(p, cores=0.8 * ranks)).latency >= base
            assert simulate(replace(p, link=replace(p.link, overlap=False))).latency >= base
            assert simulate(replace(p, stage=[s * 1.3 for s in p.stage])).latency >= base


def test_shared_cores_by_hand() -> None:
    """Two ranks of equal work on one core, where both always have work, take twice as long as on two."""
    p = Pipeline(40, 30, [1.0, 1.0])
    run = simulate(replace(p, cores=1))
    assert run.latency == pytest.approx(2 * 1200, rel=1e-3)
    four = simulate(Pipeline(40, 30, [1.0] * 4, cores=2)).latency
    assert 2400 <= four <= 2400 * 1.02


def test_a_thousand_ranks() -> None:
    start = time.monotonic()
    run = simulate(Pipeline(50, 128, [1.0] * 1024, hop_bytes=1e6, link=Link(1e9, 1e-5)))
    assert time.monotonic() - start < 20
    assert run.messages == 50 * 128 * 1024 and run.bubble > 0.9


def test_wan_sizes() -> None:
    """Against published parameter counts, and the message sizes of the sheet."""
    for model, tokens, billions, hop in ((WAN_1_3B, 1560, 1.42, 153e6), (WAN_14B, 3600, 14.3, 1.18e9)):
        clip = Clip(1025, tokens)
        assert (clip.latents, clip.blocks) == (257, 32)
        weights = model.layers * model.layer_weights() + model.embedding_weights() + model.head_weights()
        assert weights / 1e9 == pytest.approx(billions, rel=0.005)
        p = dual_paral(model, clip, 8, 1e14, Link(25e9))
        assert p.hop_bytes == pytest.approx(hop, rel=0.005)
        for ranks in (1, 3, 8):
            parts = memory_per_rank(model, clip, ranks)
            assert sum(m["weights"] for m in parts) == 2 * weights
            assert sum(m["neighbour"] for m in parts) == 2 * 2 * model.layers * 2 * 8 * tokens * model.width
    alone = ulysses_seconds(WAN_1_3B, Clip(1025, 1560), 1, 1e14, Link(1.0, 9.0))
    eight = ulysses_seconds(WAN_1_3B, Clip(1025, 1560), 8, 1e14, Link())
    assert alone == pytest.approx(8 * eight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"stage": []}, "stage is empty"),
        ({"newest": -0.5}, "at least 0"),
        ({"embed": -1.0}, "at least 0"),
        ({"hop_bytes": math.nan}, "at least 0"),
        ({"link": Link(0.0)}, "bytes_per_second is 0"),
        ({"cores": 0}, "cores is 0"),
    ],
)
def test_bad_input(changes: dict[str, object], message: str) -> None:
    good = Pipeline(2, 3, [1.0])
    with pytest.raises(ValueError, match=message):
        replace(good, **changes)  # type: ignore[arg-type]


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--ranks", "1", "8"])
    out = capsys.readouterr().out
    assert "32 blocks, 50 steps" in out and "7.2" in out


@pytest.mark.parametrize("arguments", [("--ranks", "0"), ("--ranks", "31"), ("--flops", "0"), ("--latency", "-1")])
def test_numbers_that_cannot_be(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 2 and arguments[0] in capsys.readouterr().err
