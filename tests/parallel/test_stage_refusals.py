"""What a transformer split over ranks refuses: ranks that differ, configurations, models, arguments."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from local_ring import run_ranks
from long_video import SHAPE, tiny_wan, unipc
from stage_cases import PLANNED, alone, generate

import vdit_fast
from vdit_fast.caching import TaylorSeer, TeaCache
from vdit_fast.parallel import SchedulerSampler, StagePipeline
from vdit_fast.parallel.packing import Compressed
from vdit_fast.parallel.refusals import check_frames
from vdit_fast.parallel.schedule import Schedule
from vdit_fast.parallel.transport import Alone
from vdit_fast.subset import RAS


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


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"sampler": SimpleNamespace(timesteps=[1.0])}, TypeError, "has no 'fresh'; wrap a diffusers scheduler"),
        ({"shape": (3, 8, 16, 16)}, ValueError, r"expected \(channels, height, width\)"),
        ({"shape": 8}, ValueError, r"shape: 8; expected \(channels, height, width\)"),
        ({"shape": (4, 8, 8.0)}, ValueError, "positive integers"),
        ({"shape": (3, 8, 8)}, ValueError, r"\(3, 8, 8\) has 3 channels, WanTransformer3DModel takes 4"),
        ({"shape": (4, 7, 8)}, ValueError, "a height of 7, which is no multiple of the patch, 2; take 6 or 8"),
        ({"shape": (4, 8, 1)}, ValueError, "a width of 1, which is no multiple of the patch, 2; take 2$"),
        ({"shape": (4, 8, 130)}, ValueError, "width: 130; the model's table of positions ends at 128"),
        ({"num_per_block": 4}, ValueError, r"num_cat: 8; at most num_per_block = 4.*; pass num_cat=4 or less \(0: "),
        ({"num_per_block": 49}, ValueError, r"num_per_block \+ 2 · num_cat: 65; .* ends at 64 \(rope_max_seq_len\)"),
        ({"arguments": torch.zeros(1)}, TypeError, "a Tensor; expected the transformer's further arguments by name"),
        ({"guidance": 3.0}, ValueError, r"'encoder_hidden_states' has 1 rows; expected 2 \(the conditional one"),
        ({"arguments": {"encoder_hidden_states": torch.zeros(2, 4, 8)}}, ValueError, "has 2 rows; expected 1"),
    ],
)
def test_what_cannot_begin(model, change, error, match):
    good = {"sampler": SchedulerSampler(unipc(2)), "shape": SHAPE, "guidance": 1.0}
    good["arguments"] = {"encoder_hidden_states": torch.zeros(1, 4, 8)}
    given = good | change
    runs = []
    model.patch_embedding.register_forward_pre_hook(lambda *args: runs.append(1))
    pipeline = StagePipeline(vdit_fast.accelerate(model, "exact"), transport=Alone())
    with pytest.raises(error, match=match):
        next(pipeline.generate(given.pop("sampler"), given.pop("shape"), given.pop("arguments"), blocks=2, **given))
    assert not runs and not pipeline.begun


def test_models_whose_frames_are_not_their_latents():
    """A patch of several frames, and channels that are conditions."""
    schedule, config = Schedule(2, 2, 4, 2), tiny_wan().config
    for change, frames, match in (
        ({"patch_size": (4, 2, 2)}, schedule, "num_cat: 2; a multiple of the patch, 4 frames"),
        ({"patch_size": (3, 2, 2)}, schedule, "num_per_block: 4; a multiple of the patch, 3 frames"),
        ({"in_channels": 9}, schedule, "takes 9 channels and returns 4: the others are conditions"),
    ):
        with pytest.raises(ValueError, match=match):
            check_frames(SimpleNamespace(config=SimpleNamespace(**{**config, **change})), SHAPE, frames)
    check_frames(SimpleNamespace(config=SimpleNamespace(**{**config, "patch_size": (2, 2, 2)})), SHAPE, schedule)


def test_the_model_is_not_its_handle():
    with pytest.raises(TypeError, match=r"StagePipeline: handle is a WanTransformer3DModel; pass the handle"):
        StagePipeline(tiny_wan())


def test_nothing_to_resume_from(model):
    with pytest.raises(ValueError, match="resume: True, but there is no checkpoint to go on from"):
        alone(model, resume=True)
