"""A transformer split over ranks, all in one process: equal bits, context, weights, what is refused, the way back."""

from __future__ import annotations

import copy
import itertools
from collections import deque
from types import SimpleNamespace

import dualparal_reference
import pytest
import torch
from local_ring import run_ranks
from long_video import SHAPE, euler, prompt, tiny_wan, unipc

import vdit_fast
from vdit_fast.caching import TaylorSeer, TeaCache
from vdit_fast.parallel import NoisePool, SchedulerSampler, StagePipeline
from vdit_fast.parallel.checkpoint import Checkpoint
from vdit_fast.parallel.packing import Compressed
from vdit_fast.parallel.transport import Alone
from vdit_fast.subset import RAS

SETTINGS = {"blocks": 3, "num_per_block": 4, "num_cat": 2, "guidance": 3.0, "seed": 5}
PLANNED = vdit_fast.Config(attention=vdit_fast.Window(tile=(2, 2, 2), min_tokens=0, dense_steps=0))
CACHED = vdit_fast.Config(cache=TaylorSeer(granularity="block", interval=2))


@pytest.fixture(scope="module")
def stock():
    torch.set_num_threads(1)
    return tiny_wan()


@pytest.fixture
def model(stock):
    return copy.deepcopy(stock)


def generate(pipeline, steps=4, scheduler=unipc, **other):
    settings = SETTINGS | other
    arguments = prompt(1 if settings["guidance"] == 1 else 2)
    return pipeline.generate(SchedulerSampler(scheduler(steps)), SHAPE, arguments, **settings)


def alone(model, config="exact", **other):
    with vdit_fast.accelerate(model, config) as handle:
        pipeline = StagePipeline(handle)
        video = dict(generate(pipeline, **other))
        pipeline.close()
    return video


def split(model, ranks, config="exact", options=None, **other):
    """Every rank's (video, pipeline)."""
    models = [copy.deepcopy(model) for _ in range(ranks)]

    def work(ring):
        handle = vdit_fast.accelerate(models[ring.rank], config)
        pipeline = StagePipeline(handle, transport=ring, release=True, **(options or {}))
        return dict(generate(pipeline, **other)), pipeline

    return run_ranks(work, ranks) if ranks > 1 else [work(Alone())]


def assert_equal(got, want):
    assert list(got) == list(want)
    for index in want:
        assert torch.equal(got[index], want[index]), index


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


@pytest.mark.parametrize(
    ("what", "first", "other"),
    [
        ("layers_per_stage", {"layers_per_stage": (3, 1)}, {}),
        ("packing", {}, {"packing": Compressed("bf16")}),
        ("packing", {"packing": Compressed("e4m3", 32)}, {"packing": Compressed("e4m3", 64)}),
    ],
)
def test_ranks_of_different_settings_end(model, what, first, other):
    error = _error_of_rank_1([model, copy.deepcopy(model)], ["exact"] * 2, [first, other])
    assert str(error).startswith(f"{what}: ") and "on rank 1" in str(error)


@pytest.mark.parametrize("release", [False, True])
def test_ranks_of_different_models_end(model, release):
    """Weights where both ranks have them; with release=True no rank has the other's."""
    changed, longer, options = copy.deepcopy(model), tiny_wan(layers=5), [{"release": release}] * 2
    changed.blocks[3].ffn.net[2].bias += 1
    error = _error_of_rank_1([model, changed], ["exact"] * 2, options)
    assert error is None if release else "1 parameters, the first is blocks.3.ffn.net.2.bias" in str(error)
    error = _error_of_rank_1([model, longer], ["exact"] * 2, [{"layers_per_stage": n} for n in ((2, 2), (2, 3))])
    assert "layers_per_stage: [2, 3] on rank 1" in str(error)
    wide = copy.deepcopy(model)
    wide.register_to_config(rope_max_seq_len=32)
    assert str(_error_of_rank_1([model, wide], ["exact"] * 2, options)).startswith("model: WanTransformer3DModel ")
    assert str(_error_of_rank_1([model, copy.deepcopy(model)], ["exact", PLANNED], options)).startswith("config: ")


def _error_of_rank_1(models, configs, options):
    errors = {}

    def work(ring):
        handle = vdit_fast.accelerate(models[ring.rank], configs[ring.rank])
        try:
            with handle:
                dict(generate(StagePipeline(handle, transport=ring, **options[ring.rank]), blocks=1))
        except (ValueError, RuntimeError) as error:
            errors[ring.rank] = error

    run_ranks(work, 2)
    assert set(errors) in (set(), {0, 1})  # both end, or none
    return errors.get(1)


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


def test_a_checkpoint_gives_the_same_video(model, tmp_path):
    """Stopped at any iteration and taken up by another process with another number of ranks."""
    one = alone(model, blocks=4)
    checkpoint = Checkpoint(tmp_path, every=2)
    with vdit_fast.accelerate(model, "exact") as handle:
        pipeline = StagePipeline(handle)
        stream = generate(pipeline, blocks=4, checkpoint=checkpoint)
        first = dict(itertools.islice(stream, 2))
        stream.close()
        pipeline.close()
    assert_equal(first, {index: one[index] for index in first})
    parts = split(model, 3, blocks=4, checkpoint=Checkpoint(tmp_path, every=2), resume=True)
    rest, pipeline = parts[0]
    assert pipeline.facts()["schedule"]["first"] == 4 and sorted(rest) == [1, 2, 3]
    assert_equal(rest, {index: one[index] for index in rest})
    assert torch.equal(checkpoint.block(0), one[0])
    with pytest.raises(ValueError, match=r"another run.*seed 5, not 6"):
        alone(model, blocks=4, seed=6, checkpoint=checkpoint, resume=True)
    checkpoint.file.write_bytes(b"no state")
    with pytest.raises(ValueError, match="cannot be read"):
        alone(model, blocks=4, checkpoint=checkpoint, resume=True)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_crash_loses_no_finished_block(model, tmp_path, ranks):
    """The state that counts a block as finished is not there before the block is."""

    class Crashing(Checkpoint):
        def keep(self, index, latents):
            if index == 2:
                raise OSError("no space left")
            super().keep(index, latents)

    one = alone(model, blocks=5)
    with pytest.raises((OSError, RuntimeError)):
        split(model, ranks, blocks=5, checkpoint=Crashing(tmp_path))
    checkpoint = Checkpoint(tmp_path)
    rest = alone(model, blocks=5, checkpoint=checkpoint, resume=True)
    assert list(rest) == [2, 3, 4]
    assert_equal({index: checkpoint.block(index) for index in range(5)}, one)


@pytest.mark.parametrize("what", ["argument", "weights", "config", "sampler", "packing", "model"])
def test_a_checkpoint_is_of_one_run(model, tmp_path, what):
    """With and without resume; the message names what differs."""
    run = {"arguments": prompt(2), "sampler": SchedulerSampler(unipc(4)), "config": "exact", "packing": None}

    def draw(model, arguments, sampler, config, packing, count=None, **options):
        with vdit_fast.accelerate(model, config) as handle:
            pipeline = StagePipeline(handle, packing=packing)
            stream = pipeline.generate(sampler, SHAPE, arguments, **SETTINGS, **options)
            video = dict(itertools.islice(stream, count))
            stream.close()
            pipeline.close()
        return video

    draw(model, **run, count=1, checkpoint=Checkpoint(tmp_path))
    if what == "argument":
        run["arguments"] = {"encoder_hidden_states": run["arguments"]["encoder_hidden_states"].clone()}
        run["arguments"]["encoder_hidden_states"][1, 6, 15] += 1e-6
    elif what == "weights":
        model = copy.deepcopy(model)
        model.blocks[1].attn1.to_q.weight.mul_(1.001)
    elif what == "config":
        run["config"] = vdit_fast.Config(fuse="off")
    elif what == "sampler":
        run["sampler"] = SchedulerSampler(unipc(4), convert=lambda prediction, latents, step: prediction)
    elif what == "packing":
        run["packing"] = Compressed("bf16")
    else:
        model = copy.deepcopy(model)
        model.register_to_config(eps=1e-3)
    for resume in (True, False):
        with pytest.raises(ValueError, match=rf"another run: {what}[^;]*; run with"):
            draw(model, **run, checkpoint=Checkpoint(tmp_path), resume=resume)


def test_weights_of_other_ranks_are_those_of_the_checkpoint(model, tmp_path):
    """A run on one rank goes on on two, of which the second has other weights."""
    with vdit_fast.accelerate(model, "exact") as handle:
        pipeline = StagePipeline(handle)
        stream = generate(pipeline, checkpoint=Checkpoint(tmp_path))
        next(stream)
        stream.close()
        pipeline.close()
    changed = copy.deepcopy(model)
    changed.blocks[3].attn1.to_q.weight.mul_(1.001)
    models, errors = [changed, copy.deepcopy(changed)], []

    def work(ring):
        handle = vdit_fast.accelerate(models[ring.rank], "exact")
        try:
            checkpoint = Checkpoint(tmp_path)
            dict(generate(StagePipeline(handle, transport=ring, release=True), checkpoint=checkpoint, resume=True))
        except ValueError as error:
            errors.append(str(error))
        except RuntimeError:
            assert ring.rank == 0

    run_ranks(work, 2)
    assert len(errors) == 1 and errors[0].startswith("weights: those of rank 1 and of the first one")
    with vdit_fast.accelerate(model, "exact") as handle:
        assert list(dict(generate(StagePipeline(handle), checkpoint=Checkpoint(tmp_path), resume=True))) == [0, 1, 2]


def test_blocks_of_an_earlier_run_are_not_this_ones(model, tmp_path):
    """A folder whose run kept no state: its blocks are replaced, and not given out before that."""
    alone(model, seed=1, checkpoint=Checkpoint(tmp_path, every=99))
    checkpoint = Checkpoint(tmp_path, every=4)
    with vdit_fast.accelerate(model, "exact") as handle:
        pipeline = StagePipeline(handle)
        stream = generate(pipeline, checkpoint=checkpoint)
        first = next(stream)[1]
        next(stream)
        stream.close()
        pipeline.close()
    for reader in (checkpoint, Checkpoint(tmp_path)):
        assert torch.equal(reader.block(0), first)
        with pytest.raises(ValueError, match=r"block000002\.pt is of an earlier run"):
            reader.block(2)


def test_a_checkpoint_is_read_on_the_cpu(tmp_path, monkeypatch):
    """Files of a run on a GPU, on a machine that may have none."""
    if torch.cuda.is_available():
        pytest.skip("needs a machine where CUDA tensors cannot be loaded")
    checkpoint, run = Checkpoint(tmp_path), {"weights": {}}
    checkpoint.begin(run, False)
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        checkpoint.save({"latents": torch.arange(3.0)})
        checkpoint.keep(0, torch.arange(2.0))
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(checkpoint.file, weights_only=True)
    state = Checkpoint(tmp_path).begin(run, True)
    assert torch.equal(state["latents"], torch.arange(3.0)) and torch.equal(checkpoint.block(0), torch.arange(2.0))


def test_a_scheduler_that_cannot_be_kept_has_no_checkpoint(model, tmp_path):
    """One with an object that changes in its steps; one that stays as it is may be there."""

    def scheduler(changes):
        made = unipc(4)
        made.constant, made.history = SimpleNamespace(a=[1.0, torch.ones(2)]), deque([0.0])
        step = type(made).step

        class Own(type(made)):
            def step(self, model_output, *args, **kwargs):
                if changes:
                    self.history.append(1.0)
                return step(self, model_output, *args, **kwargs)

        made.__class__ = Own
        return made

    checkpoint = Checkpoint(tmp_path)
    alone(model, scheduler=lambda steps: scheduler(False), checkpoint=checkpoint)
    assert_equal(
        alone(model, scheduler=lambda steps: scheduler(False), checkpoint=checkpoint, resume=True),
        {2: alone(model)[2]},
    )
    with pytest.raises(ValueError, match=r"scheduler: Own\.history changes in its steps and is a deque"):
        alone(model, scheduler=lambda steps: scheduler(True), checkpoint=Checkpoint(tmp_path / "other"))


def test_what_is_remembered_elsewhere_is_no_checkpoint(model, tmp_path):
    with pytest.raises(ValueError, match="taylorseer"):
        alone(model, CACHED, num_cat=0, checkpoint=Checkpoint(tmp_path))
    with pytest.raises(ValueError, match="num_cat"):
        alone(model, CACHED)


@pytest.mark.parametrize(
    ("planner", "steps"),
    [
        (vdit_fast.Window(tile=(2, 2, 2), min_tokens=0, dense_steps=0, heads="auto"), {}),
        (vdit_fast.planners.AdaSpa(block=8, sparsity=0.5, search=(2,), dense_steps=1, dense_layers=2), {"steps": 6}),
    ],
    ids=["window", "adaspa"],
)
def test_planners_that_remember_have_no_checkpoint(model, tmp_path, planner, steps):
    """Refused before anything is drawn, also where the first rank's layers are dense."""
    drawn = []

    def work(ring):
        pipeline = StagePipeline(vdit_fast.accelerate(models[ring.rank], config), transport=ring)
        pipeline.stage.run = lambda *_: drawn.append(ring.rank)
        return dict(generate(pipeline, checkpoint=Checkpoint(tmp_path), **steps)) if ring.rank == 0 else None

    models, config = [copy.deepcopy(model) for _ in range(2)], vdit_fast.Config(attention=planner)
    with pytest.raises(ValueError, match=rf"checkpoint: planner '{planner.name}' remembers"):
        run_ranks(work, 2)
    assert not drawn and not list(tmp_path.iterdir())


def test_a_planner_that_does_not_remember_has_a_checkpoint(model, tmp_path):
    fixed = vdit_fast.Window(tile=(2, 2, 2), min_tokens=0, dense_steps=0, heads="spatial")
    config, checkpoint = vdit_fast.Config(attention=fixed), Checkpoint(tmp_path, every=5)
    one = alone(model, config, checkpoint=checkpoint)
    assert_equal(alone(model, config, checkpoint=checkpoint, resume=True), {2: one[2]})


def test_what_a_planner_remembers_unsaid_is_seen(model, tmp_path):
    class Hidden(vdit_fast.Window):
        remembers = False

    hidden = vdit_fast.Config(attention=Hidden(tile=(2, 2, 2), min_tokens=0, dense_steps=0, heads="auto"))
    with pytest.raises(ValueError, match="remembers earlier steps"):
        alone(model, hidden, checkpoint=Checkpoint(tmp_path))


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (vdit_fast.Config(cache=TaylorSeer()), "granularity"),
        (vdit_fast.Config(cache=TeaCache(granularity="span")), "decides by features"),
        (vdit_fast.Config(subset=RAS()), "subset"),
    ],
)
def test_configurations_that_one_rank_cannot_have(model, config, match):
    with vdit_fast.accelerate(model, config) as handle, pytest.raises(RuntimeError, match=match):
        StagePipeline(handle)


def test_transformers_that_cannot_be_split(model):
    from tiny import build

    for family in ("ltx_video", "wan_vace"):
        other, _ = build(family)
        with vdit_fast.accelerate(other, "exact") as handle, pytest.raises(RuntimeError, match="stages: "):
            StagePipeline(handle)
    with vdit_fast.accelerate(model, "exact") as handle:
        pipeline = StagePipeline(handle)
        with pytest.raises(RuntimeError, match="another pipeline"):
            StagePipeline(handle)
        pipeline.close()
    with pytest.raises(RuntimeError, match="removed"):
        StagePipeline(handle)
    with vdit_fast.accelerate(model, "exact") as handle:
        handle.positions(lambda step, geometry, tables: None)
        with pytest.raises(RuntimeError, match="positions"):
            StagePipeline(handle)


def test_a_failing_rank_ends_the_others(model):
    models = [copy.deepcopy(model) for _ in range(3)]

    def work(ring):
        pipeline = StagePipeline(vdit_fast.accelerate(models[ring.rank], "exact"), transport=ring)
        if ring.rank == 1:
            pipeline.stage.run = lambda *_: 1 / 0
        return dict(generate(pipeline))

    with pytest.raises((ZeroDivisionError, RuntimeError)):
        run_ranks(work, 3)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"sampler": SimpleNamespace(timesteps=[1.0])}, TypeError, "has no 'fresh'; wrap a diffusers scheduler"),
        ({"shape": (3, 8, 16, 16)}, ValueError, r"expected \(channels, height, width\)"),
        ({"arguments": torch.zeros(1)}, TypeError, "a Tensor; expected the transformer's further arguments by name"),
        ({"guidance": 3.0}, ValueError, r"'encoder_hidden_states' has 1 rows; expected 2 \(the conditional one"),
        ({"arguments": {"encoder_hidden_states": torch.zeros(2, 4, 8)}}, ValueError, "has 2 rows; expected 1"),
    ],
)
def test_what_cannot_begin(model, change, error, match):
    good = {"sampler": SchedulerSampler(unipc(2)), "shape": SHAPE, "guidance": 1.0}
    good["arguments"] = {"encoder_hidden_states": torch.zeros(1, 4, 8)}
    given = good | change
    pipeline = StagePipeline(vdit_fast.accelerate(model, "exact"), transport=Alone())
    with pytest.raises(error, match=match):
        next(
            pipeline.generate(
                given["sampler"], given["shape"], given["arguments"], blocks=2, guidance=given["guidance"]
            )
        )


def test_the_model_is_not_its_handle():
    with pytest.raises(TypeError, match=r"StagePipeline: handle is a WanTransformer3DModel; pass the handle"):
        StagePipeline(tiny_wan())


def test_nothing_to_resume_from(model):
    with pytest.raises(ValueError, match="resume: True, but there is no checkpoint to go on from"):
        alone(model, resume=True)
