"""Steps that compute some of the tokens: every family, equal numbers where they must be, memory, refusals."""

from __future__ import annotations

import copy
import gc
from dataclasses import dataclass

import pytest
import tiny
import torch
from torch import Tensor, nn

from vdit_fast.accelerate import accelerate
from vdit_fast.caching import TaylorSeer
from vdit_fast.config import Config
from vdit_fast.models.row_layout import RowLayout
from vdit_fast.models.row_subset import OutputRows
from vdit_fast.subset import RAS, RowPolicy

REFUSED = {
    "hunyuan_framepack": "tokens of earlier clips lie before the video",
    "hunyuan_token_replace": "the tokens of the first frame have a modulation of their own",
}


@dataclass(frozen=True, kw_only=True)
class Listed(RowPolicy):
    """Computes the tokens it is given, from step 1 on."""

    rows: tuple[int, ...]

    def whole(self, step):
        return None if step.step >= 1 else "the first step"

    def keeps(self, step):
        return True

    def active(self, tokens):
        return len(self.rows)

    def measure(self, output):
        return output.float().mean((0, 2, 3))

    def choose(self, measure, skipped):
        return torch.tensor(self.rows, dtype=torch.int32)


def some(tokens: int) -> tuple[int, ...]:
    """About half of the tokens, without a pattern."""
    torch.manual_seed(tokens)
    return tuple(sorted(torch.randperm(tokens)[: (tokens + 1) // 2].tolist()))


def start(model: nn.Module, policy: RowPolicy, **config) -> tuple:
    handle = accelerate(model, Config(subset=policy, **config))
    return handle, handle.roots[0].session.around.get("subset")


def tokens_of(model: nn.Module, inputs: dict) -> int:
    with accelerate(model) as handle:
        tiny.run(model, inputs)
        return handle.roots[0].session.forward.geometry.n_video


def test_a_second_step_of_the_same_input_gives_the_same_output(family: str) -> None:
    """Keys and values of the tokens left out are then those of the step before: a lost rotation, modulation or text
    row shows at once. A ten-thousandth of a timestep tells the steps apart."""
    model, inputs = tiny.build(family)
    layout = accelerate(model).roots[0].adapter.rows
    accelerate(model).remove()
    if isinstance(layout, str):
        handle, subset = start(model, RAS(start=1))
        assert subset is None and any("no subset" in note for note in handle.setting_notes())
        assert handle.stats()["subset"] is None
        handle.remove()
        with pytest.raises(RuntimeError, match="subset: "):
            accelerate(model, Config(subset=RAS(), on_unsupported="error"))
        return
    inputs["timestep"] = inputs["timestep"].float()
    rows = some(tokens_of(model, inputs))
    handle, subset = start(model, Listed(rows=rows))
    first, second = (tiny.run(model, tiny.at(inputs, value)) for value in (500.0, 499.9999))
    if family in REFUSED:
        assert subset.whole == {REFUSED[family]: 2} and not subset.partial
        return
    assert subset.partial == {1: 1} and subset.rows_left == tokens_of_grid(handle) - len(rows)
    assert 0 < tiny.relative(second, first) < 5e-5
    idle = tiny.relative(tiny.run(model, tiny.at(inputs, 400.0)), first)
    assert idle > 1e-3  # a later step does differ


def tokens_of_grid(handle) -> int:
    return handle.roots[0].session.forward.geometry.n_video


@pytest.mark.parametrize(
    "name", ["cogvideox_5b", "cosmos_2", "ltx_video", "mochi", "skyreels_df", "wan_t2v", "wan_ti2v"]
)
def test_only_the_computed_tokens_changed_in_one_block(name: str) -> None:
    """Then the kept keys of the others are those of the new input too: equal to the dense run, whatever changed."""
    model, inputs = tiny.build(name, layers=1)
    inputs["timestep"] = inputs["timestep"].float()
    rows = some(tokens_of(model, inputs))
    changed = {**inputs, "hidden_states": changed_at(model, inputs, rows)}
    with accelerate(model):
        want = tiny.run(model, tiny.at(changed, 499.9999))
    start(model, Listed(rows=rows))
    before = tiny.run(model, tiny.at(inputs, 500.0))
    got = tiny.run(model, tiny.at(changed, 499.9999))
    assert tiny.relative(want, before) > 0.05
    same = (got == before).flatten()  # the tokens left out; in the dense run their own queries see the change
    assert same.float().mean() > 0.3
    assert tiny.relative(got.flatten()[~same], want.flatten()[~same]) < 5e-5


def changed_at(model: nn.Module, inputs: dict, rows: tuple[int, ...]) -> Tensor:
    """Latents that differ in these tokens only: found by which latents reach the patch embedding's rows."""
    x = inputs["hidden_states"]
    with accelerate(model) as handle:
        tiny.run(model, inputs)
        grid = handle.roots[0].session.forward.geometry.grid
    mask = torch.zeros(grid[0] * grid[1] * grid[2])
    mask[list(rows)] = 1
    if x.ndim == 3:  # LTX: tokens
        return x + mask[:, None] * torch.randn_like(x)
    mask = mask.view(grid)
    if x.shape[2] == inputs["hidden_states"].shape[2] and "image_rotary_emb" in inputs and x.shape[1] == grid[0]:
        mask = mask[:, None]  # CogVideoX: frames before channels
    mask = mask.repeat_interleave(x.shape[-2] // grid[1], -2).repeat_interleave(x.shape[-1] // grid[2], -1)
    return x + mask * torch.randn_like(x)


def test_the_measure_is_that_of_the_latents(family: str) -> None:
    """Deviation over the channels at every place of the model's output, averaged over the places of a token: whatever
    order a family has in the rows before it puts them into place."""
    model, inputs = tiny.build(family)
    handle, subset = start(model, RAS(start=1, sample_ratio=0.75))
    out = tiny.run(model, inputs)
    if subset is None or not subset._choices:
        return
    (choice,) = subset._choices.values()
    (measure,) = choice.measures.values()
    grid = handle.roots[0].session.forward.geometry.grid
    if out.ndim == 3:  # LTX: tokens
        want = out.std(-1, correction=0)
    else:
        frames_first = family.startswith(("cogvideox", "consisid"))
        places = out.std(2 if frames_first else 1, correction=0)
        frames, height, width = (size // tokens for size, tokens in zip(places.shape[1:], grid, strict=True))
        places = places.unflatten(3, (-1, width)).unflatten(2, (-1, height)).unflatten(1, (-1, frames))
        want = places.mean((2, 4, 6)).flatten(1)
    torch.testing.assert_close(measure, want.mean(0), rtol=1e-5, atol=1e-6)


# ---- the same bits


@pytest.mark.parametrize("name", ["wan_t2v", "cogvideox_5b"])
def test_all_tokens_active_is_no_method(name: str) -> None:
    model, inputs = tiny.build(name)
    steps = [tiny.at(inputs, value) for value in (900, 800, 700, 600)]
    with accelerate(model):
        want = [tiny.run(model, step) for step in steps]
    handle, _subset = start(model, RAS(sample_ratio=1, start=1))
    got = [tiny.run(model, step) for step in steps]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert handle.stats()["subset"] == {
        "partial": {}, "whole": {"every token is active": 4}, "computed": 0, "left": 0, "nbytes": 0,
    }  # fmt: skip


def test_steps_before_the_first_subset_and_reset_steps_are_those_without() -> None:
    model, inputs = tiny.wan()
    steps = [tiny.at(inputs, value) for value in (900, 800, 700, 600)]
    with accelerate(model):
        want = [tiny.run(model, step) for step in steps]
    _handle, subset = start(model, RAS(start=2, reset=(3,)))
    got = [tiny.run(model, step) for step in steps]
    assert [torch.equal(a, b) for a, b in zip(got, want, strict=True)] == [True, True, False, True]
    assert subset.whole == {"one of the first 2 steps": 2, "a reset step": 1} and subset.partial == {2: 1}


def test_without_the_policy_after_it_and_after_remove() -> None:
    model, inputs = tiny.wan()
    stock = tiny.run(model, inputs)
    handle, subset = start(model, RAS(start=1))
    for value in (900.0, 800.0):
        tiny.run(model, tiny.at(inputs, value))
    assert subset.nbytes > 0
    handle.reconfigure("exact")
    with accelerate(copy.deepcopy(model)) as other:  # the copy has the configuration of the original
        assert other.config == handle.config
    assert not any(isinstance(hook, OutputRows) for m in model.modules() for hook in m._forward_hooks.values())
    handle.remove()
    assert subset.nbytes == 0 or handle.roots[0].session.around.get("subset") is None
    assert torch.equal(tiny.run(model, inputs), stock)


# ---- what is shared and what is not


def test_branches_share_their_tokens_and_keep_their_own_keys() -> None:
    model, inputs = tiny.wan()
    other = {**inputs, "encoder_hidden_states": torch.randn_like(inputs["encoder_hidden_states"])}
    handle, subset = start(model, RAS(start=1))
    outs: list[list[Tensor]] = [[], []]
    for value in (900.0, 800.0, 700.0):
        for branch, call in enumerate((inputs, other)):
            outs[branch].append(tiny.run(model, tiny.at(call, value)))
    kept = [(branch[2] == branch[1]).flatten(2).all(1) for branch in outs]
    assert torch.equal(kept[0], kept[1]) and 0.3 < kept[0].float().mean() < 0.7
    assert len(subset._branches) == 2 and subset.partial == {1: 2, 2: 2}
    # a branch by itself, with the same tokens, gives the same
    (choice,) = subset._choices.values()
    rows = tuple(choice.rows[0].tolist())
    handle.remove()
    start(model, Listed(rows=rows))
    alone = [tiny.run(model, tiny.at(other, value)) for value in (900.0, 700.0)]
    assert torch.equal(alone[0], outs[1][0])


def test_a_new_generation_forgets() -> None:
    model, inputs = tiny.wan()
    _handle, subset = start(model, RAS(start=1))
    runs = [[tiny.run(model, tiny.at(inputs, value)) for value in (900.0, 800.0, 700.0)] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True)) and subset.partial == {1: 2, 2: 2}


def test_other_sizes_in_mid_run_begin_anew() -> None:
    model, inputs = tiny.wan()
    _handle, subset = start(model, RAS(start=1))
    for value in (900.0, 800.0):
        tiny.run(model, tiny.at(inputs, value))
    larger = tiny.regrid(inputs, (2, 5, 3))
    fresh, _ = tiny.wan()
    with accelerate(fresh):
        want = tiny.run(fresh, tiny.at(larger, 700.0))
    got = tiny.run(model, tiny.at(larger, 700.0))
    tiny.run(model, tiny.at(larger, 600.0))
    assert torch.equal(got, want) and subset.partial == {1: 1, 3: 1}
    assert subset.whole["no keys and values are held yet"] == 1


# ---- memory


@pytest.mark.parametrize("name", ["wan_t2v", "hunyuan_video", "cogvideox_5b"])
def test_bytes_are_those_of_the_formula_and_a_small_budget_is_refused(name: str) -> None:
    model, inputs = tiny.build(name)
    handle, subset = start(model, RAS(start=2))
    for value in (900.0, 800.0):
        for _ in range(2):
            tiny.run(model, tiny.at(inputs, value))
    tokens, text = tokens_of_grid(handle), handle.roots[0].session.forward.geometry.text
    config, batch = model.config, inputs["hidden_states"].shape[0]
    if name == "wan_t2v":
        text = 0
    width = config.num_attention_heads * config.attention_head_dim
    layers = len(handle.roots[0].session.layers)
    formula = 2 * batch * (tokens + text) * width * 4 * layers * 2  # keys and values, fp32, two branches
    assert subset.nbytes == formula == handle.stats()["subset"]["nbytes"]
    handle.remove()
    del handle, subset
    gc.collect()

    per_token = formula // (tokens + text)
    budget = (formula - 1) / 2**30
    handle, subset = start(model, RAS(start=2, kv_budget_gib=budget))
    for _ in range(2):
        tiny.run(model, tiny.at(inputs, 900.0))
    with pytest.raises(RuntimeError, match=f"take {formula:,} bytes.*at most {tokens + text - 1:,} tokens would fit"):
        tiny.run(model, tiny.at(inputs, 800.0))
    assert subset.nbytes == 0 and per_token
    handle.reconfigure(Config(subset=RAS(start=2, kv_budget_gib=formula / 2**30)))
    handle.reset()
    for value in (900.0, 800.0, 700.0):
        for _ in range(2):
            tiny.run(model, tiny.at(inputs, value))
    assert handle.stats()["subset"]["partial"] == {2: 2}


# ---- with the rest of the package


def test_planners_do_not_see_steps_of_some_tokens() -> None:
    model, inputs = tiny.hunyuan()
    handle, subset = start(model, RAS(start=1), attention=tiny.Band())
    for value in (900.0, 800.0, 700.0):
        tiny.run(model, tiny.at(inputs, value))
    seen = handle.roots[0].session.state["seen"]
    assert {step for _, step, _, _ in seen} == {0} and subset.partial == {1: 1, 2: 1}
    layers = handle.stats()["layers"]
    assert all(sum(layer["dense"].values()) == 2 and layer["sparse_calls"] == 1 for layer in layers)
    assert "queries of some tokens only" in handle.report() and "subset ras: 2 of 3 forwards" in handle.report()


def test_a_cache_of_the_output_forecasts_merged_outputs() -> None:
    """Step 2 is forecast with order 0: a copy of step 1, whose tokens left out are those of step 0."""
    model, inputs = tiny.wan()
    _handle, subset = start(model, RAS(start=1), cache=TaylorSeer(first_full=2, interval=2, order=0, last_full=0))
    first, second, third = (tiny.run(model, tiny.at(inputs, value)) for value in (900.0, 800.0, 700.0))
    assert torch.equal(third, second) and subset.partial == {1: 1}
    assert 0.3 < (second == first).float().mean() < 0.7


def test_a_cache_of_blocks_is_refused() -> None:
    model, inputs = tiny.wan()
    stock = tiny.run(model, inputs)
    for granularity in ("span", "block", "module"):
        with pytest.raises(RuntimeError, match=f"by {granularity} exclude each other"):
            accelerate(model, Config(subset=RAS(), cache=TaylorSeer(granularity=granularity)))
    assert torch.equal(tiny.run(model, inputs), stock) and not tiny.served(model)


def test_a_cache_around_the_blocks_keeps_all_tokens() -> None:
    model, inputs = tiny.wan()
    handle, subset = start(model, RAS(start=1))
    handle.roots[0].session.around["cache"] = subset.fresh()  # whoever it is
    for value in (900.0, 800.0):
        tiny.run(model, tiny.at(inputs, value))
    assert not subset.partial and sum(subset.whole.values()) == 2


def test_text_keys_that_are_kept_change_nothing() -> None:
    model, inputs = tiny.wan()
    runs = []
    for text_kv in (False, True):
        handle, subset = start(model, RAS(start=1), text_kv=text_kv)
        runs.append([tiny.run(model, tiny.at(inputs, value)) for value in (900.0, 800.0, 700.0)])
        assert subset.partial == {1: 1, 2: 1}
        assert not text_kv or handle.stats()["text_kv"]["reused"] > 0
        handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_positions_of_all_tokens_keep_all_tokens() -> None:
    model, inputs = tiny.wan()
    handle, subset = start(model, RAS(start=1))
    handle.positions(lambda step, geometry, tables: tables)
    for value in (900.0, 800.0):
        tiny.run(model, tiny.at(inputs, value))
    assert not subset.partial and subset.whole["handle.positions exchanges the rotary tables of all tokens"] == 2


def test_gradients_are_recorded_on_all_tokens() -> None:
    model, inputs = tiny.wan()
    _handle, subset = start(model, RAS(start=1))
    tiny.run(model, tiny.at(inputs, 900.0))
    model(**tiny.at(inputs, 800.0))
    assert subset.whole["gradients are recorded"] == 1


def test_attention_that_is_not_served_keeps_all_tokens() -> None:
    model, inputs = tiny.wan()
    handle, subset = start(model, RAS(start=1))
    handle.roots[0].processors()["blocks.1.attn1"]._parallel_config = object()
    stock = handle.roots[0].processors()["blocks.1.attn1"].stock
    stock._parallel_config = None
    model.get_submodule("blocks.1.attn1").set_processor(stock)
    for value in (900.0, 800.0):
        tiny.run(model, tiny.at(inputs, value))
    assert not subset.partial and subset.whole["the attention of 1 blocks is not served, its keys are not kept"] == 1


def test_a_layer_that_stands_aside_in_a_step_of_some_tokens_is_an_error() -> None:
    model, inputs = tiny.wan()
    start(model, RAS(start=1))
    tiny.run(model, tiny.at(inputs, 900.0))
    module = model.get_submodule("blocks.1.attn1")
    module.set_processor(module.processor.stock)
    with pytest.raises(RuntimeError, match=r"attention of blocks\.1 was not served"):
        tiny.run(model, tiny.at(inputs, 800.0))


def test_a_copy_runs_on_its_own() -> None:
    model, inputs = tiny.wan()
    start(model, RAS(start=1))
    want = [tiny.run(model, tiny.at(inputs, value)) for value in (900.0, 800.0)]
    twin = copy.deepcopy(model)
    assert all(torch.equal(tiny.run(twin, tiny.at(inputs, v)), w) for v, w in zip((900.0, 800.0), want, strict=True))
    mine, theirs = (accelerate(m, Config(subset=RAS(start=1))).stats()["subset"]["partial"] for m in (model, twin))
    assert mine == theirs == {1: 1}


def test_the_output_module_may_be_exchanged() -> None:
    """As LoRA does when it is loaded: what is left out must not get a second time what is added."""
    model, inputs = tiny.wan()
    _handle, _subset = start(model, RAS(start=1))
    first = tiny.run(model, tiny.at(inputs, 900.0))
    inner = model.get_submodule("proj_out")
    model.proj_out = nn.Sequential(inner, nn.Identity())
    second = tiny.run(model, tiny.at(inputs, 800.0))
    assert 0.3 < (second == first).float().mean() < 0.7 and not inner._forward_hooks


@pytest.mark.slow
def test_compiled_blocks() -> None:
    model, inputs = tiny.wan(layers=3)
    _handle, subset = start(model, RAS(start=1))
    steps = [tiny.at(inputs, value) for value in (900.0, 800.0, 700.0)]
    want = [tiny.run(model, step) for step in steps]
    for block in model.get_submodule("blocks").children():
        assert isinstance(block, nn.Module)
        block.compile(backend="aot_eager")
    got = [tiny.run(model, step) for step in steps]
    assert all(tiny.relative(a, b) < 1e-5 for a, b in zip(got, want, strict=True)) and subset.partial == {1: 2, 2: 2}


# ---- configuration


def test_configuration_forms(tmp_path) -> None:
    config = Config(subset=RAS(sample_ratio=0.25, reset=(9, 17), high_ratio=0))
    for name in ("a.yaml", "a.json"):
        config.save(tmp_path / name)
        assert Config.of(tmp_path / name) == config and Config.of(tmp_path / name).digest() == config.digest()
    assert Config.of({"subset": "ras"}) == Config(subset=RAS())
    assert config.digest() != Config().digest()
    for knobs, error, message in (
        ({"sample_ratio": 0}, ValueError, "sample_ratio must be in"),
        ({"sample_ratio": 1.5}, ValueError, "sample_ratio must be in"),
        ({"sample_ratio": "half"}, TypeError, "sample_ratio must be a number"),
        ({"high_ratio": -0.1}, ValueError, "high_ratio must be in"),
        ({"starvation": float("nan")}, ValueError, "subset.starvation is nan"),
        ({"start": 0}, ValueError, "start must be at least 1"),
        ({"reset": 3}, TypeError, "reset must be a list of steps"),
        ({"reset": [2, "x"]}, TypeError, "reset must be a step number"),
        ({"metric": "mean"}, ValueError, "metric must be one of std, l2"),
        ({"kv_budget_gib": 0}, ValueError, "kv_budget_gib must be positive"),
        ({"sampel_ratio": 0.5}, ValueError, "did you mean 'sample_ratio'"),
    ):
        with pytest.raises(error, match=message):
            Config.from_dict({"subset": {"method": "ras", **knobs}})
    with pytest.raises(ValueError, match="unknown row policy method 'rass'"):
        Config.from_dict({"subset": "rass"})
    with pytest.raises(ValueError, match=r"pass \{'subset': 'ras'\}"):
        Config.of("ras")
    with pytest.raises(TypeError, match="subset must be a row policy"):
        Config(subset=TaylorSeer())


def test_layouts_name_arguments_that_blocks_have(family: str) -> None:
    from vdit_fast.models.blocks import transformer_blocks

    model, _ = tiny.build(family)
    adapter = accelerate(model).roots[0].adapter
    if not isinstance(adapter.rows, RowLayout):
        return
    names = {name for _, block in transformer_blocks(model, adapter) for name in block.forward.__code__.co_varnames}
    if not family.startswith("cosmos"):  # its arguments have changed between versions of diffusers
        assert {*adapter.rows.arguments, *adapter.rows.joint} <= names
