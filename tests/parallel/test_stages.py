"""A transformer split over ranks, all in one process: equal bits, context, weights, runs, the way back."""

from __future__ import annotations

import copy
import itertools

import dualparal_reference
import pytest
import torch
from local_ring import run_ranks
from long_video import SHAPE, euler, prompt, unipc
from stage_cases import CACHED, PLANNED, SETTINGS, alone, assert_equal, generate, split

import vdit_fast
from vdit_fast.parallel import NoisePool, SchedulerSampler, StagePipeline
from vdit_fast.parallel.packing import Compressed
from vdit_fast.parallel.transport import Alone


@pytest.mark.parametrize("guidance", [3.0, 1.0])
@pytest.mark.parametrize("num_cat", [2, 0, 4])
def test_it_computes_what_the_paper_says(model, num_cat, guidance):
    """Against the same written down plainly for the stock model: prefix, neighbour's keys before RoPE, positions."""
    settings = SETTINGS | {"num_cat": num_cat, "guidance": guidance}
    got = alone(model, guidance=guidance, num_cat=num_cat)
    noise = NoisePool(SHAPE, 4, num_cat, SETTINGS["seed"])
    settings.pop("seed")
    arguments = prompt(1 if guidance == 1 else 2)
    with torch.no_grad():
        want = dualparal_reference.draw(copy.deepcopy(model), lambda: unipc(4), noise.draw, arguments, **settings)
    for index, latents in enumerate(want):
        torch.testing.assert_close(got[index], latents, atol=2e-4, rtol=2e-4)


def test_neighbours_are_seen(model):
    """What the test above would not tell if attention were flat: without the right context the clip is another."""
    got, cut = alone(model), alone(model, blocks=1)
    assert (got[0] - cut[0]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("config", "other"),
    [("exact", {}), ("exact", {"scheduler": euler, "guidance": 1.0}), (PLANNED, {}), (CACHED, {"num_cat": 0})],
    ids=["dense", "unguided", "planned", "cached"],
)
def test_n_stages_are_one_stage(model, config, other):
    one = alone(model, config, steps=5, **other)
    for ranks in (2, 4) if config == "exact" else (3,):
        _check_split(model, ranks, config, one, other)


def _check_split(model, ranks, config, one, other):
    parts = split(model, ranks, config, steps=5, **other)
    assert_equal(parts[0][0], one)
    assert all(not video for video, _ in parts[1:])
    for _, pipeline in parts:
        facts = pipeline.facts()
        assert {way: facts[way] for way in ("sent", "received")} == pipeline.expected()
        missing = (4 - len(pipeline.stage.layers)) * (ranks > 1)
        assert f"note: {missing} layers: they run on other ranks" in pipeline.stage.handle.report()
    if config is PLANNED:
        calls = [layer["sparse_calls"] for _, p in parts for layer in p.stage.handle.stats()["layers"]]
        assert sum(calls) == 4 * 15
    if config is CACHED:
        held = [p.stage.handle.stats()["cache"] for _, p in parts]
        assert all(cache["forecast"] and cache["nbytes"] == 0 for cache in held)  # finished blocks are forgotten


@pytest.mark.parametrize(("compression", "worst"), [("bf16", 0.05), ("e4m3", 0.5)])
def test_messages_can_be_compressed(model, compression, worst):
    """A first rank and a last one that round what they send: a clip near the exact one, in fewer bytes."""
    one = alone(model)
    parts = split(model, 2, options={"packing": Compressed(compression)})
    assert 0 < max(float((parts[0][0][index] - one[index]).abs().max()) for index in one) < worst
    sent = parts[0][1].facts()["sent"]
    assert sent == parts[0][1].expected()["sent"] and sent[1] < 0.6 * 12 * 2 * 6 * 16 * 32 * 4


def test_16_bits(model):
    half, arguments = model.to(torch.bfloat16), {name: x.bfloat16() for name, x in prompt().items()}
    videos = []
    for ranks in (1, 3):
        models = [copy.deepcopy(half) for _ in range(ranks)]

        def work(ring, models=models):
            pipeline = StagePipeline(vdit_fast.accelerate(models[ring.rank], "exact"), transport=ring)
            assert pipeline.stage.dtype == torch.bfloat16
            return dict(pipeline.generate(SchedulerSampler(unipc(3)), SHAPE, arguments, **SETTINGS))

        videos.append(run_ranks(work, ranks)[0] if ranks > 1 else work(Alone()))
    assert_equal(*videos)
    assert all(block.dtype == torch.float32 for block in videos[0].values())


def test_skyreels(model):
    """Another family by the same mechanism; timesteps of a whole pass."""
    from tiny import build

    base, _ = build("skyreels_df", layers=3)
    arguments = {"encoder_hidden_states": torch.randn(2, 512, 16)}
    models = [base, *(copy.deepcopy(base) for _ in range(2))]

    def work(ring):
        pipeline = StagePipeline(vdit_fast.accelerate(own := models.pop(), "exact"), transport=ring)
        assert own is pipeline.stage.module
        return dict(pipeline.generate(SchedulerSampler(unipc(3)), SHAPE, arguments, **SETTINGS))

    parts = run_ranks(work, 2)
    assert_equal(parts[0], work(Alone()))


def test_layers_can_be_given(model):
    one = alone(model)
    assert_equal(split(model, 2, options={"layers_per_stage": (3, 1)})[0][0], one)


def test_without_context_a_block_is_a_short_clip_of_its_own(model):
    """num_cat = 0: independent clips, each the same as a video of one block from the same noise."""
    video, noise = alone(model, num_cat=0), NoisePool(SHAPE, 4, 0, SETTINGS["seed"])
    for index in range(3):
        x, scheduler = noise.draw()[None], unipc(4)
        with vdit_fast.accelerate(model, "exact"), torch.no_grad():
            for t in scheduler.timesteps:
                out = model(x.repeat(2, 1, 1, 1, 1), t.float().repeat(2), return_dict=False, **prompt())[0]
                x = scheduler.step(out[1:] + 3.0 * (out[:1] - out[1:]), t, x, return_dict=False)[0]
        torch.testing.assert_close(video[index], x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_each_rank_has_its_own_weights_only(model, ranks):
    parts = split(model, ranks) if ranks > 1 else None
    sizes = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
    block = sum(size for name, size in sizes.items() if name.startswith("blocks.0."))
    embeddings = sum(s for n, s in sizes.items() if n.startswith(("patch_embedding.", "condition_embedder.")))
    head = sum(sizes.values()) - 4 * block - embeddings
    if parts is None:
        with vdit_fast.accelerate(model, "exact") as handle:
            pipeline = StagePipeline(handle)
            assert pipeline.stage.weight_bytes == 4 * block + embeddings + head
            pipeline.close()
        return
    for rank, (_, pipeline) in enumerate(parts):
        own = len(pipeline.layers[rank]) * block + (rank == 0) * embeddings + (rank == ranks - 1) * head
        assert pipeline.stage.weight_bytes == own
    held = [p.stage.neighbours.nbytes for _, p in parts]
    assert sum(held) == 4 * 2 * 2 * (2 * 16) * 32 * 4  # layers, k and v, branches, rows, channels, bytes


def test_a_video_without_end_at_constant_memory(model):
    with vdit_fast.accelerate(model, PLANNED) as handle:
        pipeline = StagePipeline(handle)
        sizes = []
        stream = generate(pipeline, blocks=None)
        for _ in itertools.islice(stream, 8):
            session = pipeline.stage.session
            sizes.append((pipeline.queue.nbytes, len(session.state), pipeline.stage.neighbours.nbytes))
        stream.close()
        assert len(sizes) == 8 and len(set(sizes)) == 1, sizes
        pipeline.close()


def test_the_trace_of_a_video_without_end_is_bounded(model, monkeypatch):
    """At the same number of events, with the seconds of all."""
    monkeypatch.setattr(vdit_fast.parallel.trace.Trace.bound, "__defaults__", (20,))
    with vdit_fast.accelerate(model, "exact") as handle:
        pipeline = StagePipeline(handle)
        stream = generate(pipeline, blocks=None)
        lengths, seconds = [], []
        for _ in itertools.islice(stream, 8):
            lengths.append(len(pipeline.trace.events))
            seconds.append(pipeline.trace.seconds("compute"))
        stream.close()
        assert set(lengths[3:]) == {20} and seconds == sorted(set(seconds))
        kept = sum(end - begin for kind, *_, begin, end in pipeline.trace.events if kind == "compute")
        assert kept < pipeline.trace.seconds("compute")
        dict(generate(pipeline, blocks=8))  # one with an end keeps all
        assert len(pipeline.trace.events) == 2 * 8 * 4
        pipeline.close()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", ["planner", "cache"])
def test_nothing_is_remembered_of_blocks_left_under_way(model, kind, fails):
    """Where a run is dropped, or ends by an error, on all ranks."""
    auto = vdit_fast.Config(attention=vdit_fast.Window(tile=(2, 2, 2), min_tokens=0, dense_steps=0))
    models, held = [copy.deepcopy(model) for _ in range(2)], {}

    def work(ring):
        pipeline = StagePipeline(
            vdit_fast.accelerate(models[ring.rank], auto if kind == "planner" else CACHED), transport=ring
        )
        session = pipeline.stage.session
        if ring.rank == 0:
            stream = generate(pipeline, blocks=None, num_cat=0)
            next(stream)
            assert session.state if kind == "planner" else session.cache.nbytes
            if fails:
                pipeline.stage.run = lambda *_: 1 / 0
                with pytest.raises(ZeroDivisionError):
                    next(stream)
            stream.close()
        else:
            try:
                list(generate(pipeline, blocks=None))
            except RuntimeError:
                assert fails
        held[ring.rank] = len(session.state) + session.cache.nbytes

    run_ranks(work, 2)
    assert held == {0: 0, 1: 0}


def test_it_stops_early_on_all_ranks(model):
    one = dict(itertools.islice(_stream(model), 2))
    models = [copy.deepcopy(model) for _ in range(3)]

    def work(ring):
        pipeline = StagePipeline(vdit_fast.accelerate(models[ring.rank], "exact"), transport=ring)
        return dict(itertools.islice(generate(pipeline, blocks=None), 2))

    assert_equal(run_ranks(work, 3)[0], one)


def _stream(model):
    with vdit_fast.accelerate(model, "exact") as handle:
        pipeline = StagePipeline(handle)
        yield from generate(pipeline, blocks=None)
        pipeline.close()


def test_runs_do_not_know_of_each_other(model):
    """One after another on one pipeline, the first left early; a planner and a queue that remember."""
    config = vdit_fast.Config(attention=vdit_fast.Window(tile=(2, 2, 2), min_tokens=0, dense_steps=0, refresh=3))
    want = alone(model, config), alone(model, config, num_cat=0, guidance=1.0)
    with vdit_fast.accelerate(model, config) as handle:
        pipeline = StagePipeline(handle)
        stream = generate(pipeline, blocks=None, seed=9)
        next(stream)
        with pytest.raises(RuntimeError, match="is drawing a video"):
            next(generate(pipeline))
        stream.close()
        assert_equal(dict(generate(pipeline)), want[0])
        assert_equal(dict(generate(pipeline, num_cat=0, guidance=1.0)), want[1])
        pipeline.close()


def test_the_model_is_what_it_was(model):
    """Between runs, and after close() and remove(), the transformer gives its own bits."""
    own = copy.deepcopy(model)
    x, t = torch.randn(1, 4, 6, 8, 8), torch.tensor([400.0])
    with torch.no_grad():
        want = own(x, t, prompt(1)["encoder_hidden_states"], return_dict=False)[0]
        handle = vdit_fast.accelerate(own, "exact")
        served = own(x, t, prompt(1)["encoder_hidden_states"], return_dict=False)[0]
        pipeline = StagePipeline(handle)
        dict(generate(pipeline))
        assert torch.equal(own(x, t, prompt(1)["encoder_hidden_states"], return_dict=False)[0], served)
        pipeline.close()
        assert torch.equal(own(x, t, prompt(1)["encoder_hidden_states"], return_dict=False)[0], served)
        assert "stage" not in pipeline.stage.session.around and handle.stats()["layers"]
        handle.remove()
        assert torch.equal(own(x, t, prompt(1)["encoder_hidden_states"], return_dict=False)[0], want)
    assert all("forward" not in module.__dict__ for module in own.modules())
    handle = vdit_fast.accelerate(own, "exact")
    StagePipeline(handle)  # removed before it is closed
    handle.remove()
    assert all("forward" not in module.__dict__ for module in own.modules())


def test_a_failing_rank_ends_the_others(model):
    models = [copy.deepcopy(model) for _ in range(3)]

    def work(ring):
        pipeline = StagePipeline(vdit_fast.accelerate(models[ring.rank], "exact"), transport=ring)
        if ring.rank == 1:
            pipeline.stage.run = lambda *_: 1 / 0
        return dict(generate(pipeline))

    with pytest.raises((ZeroDivisionError, RuntimeError)):
        run_ranks(work, 3)
