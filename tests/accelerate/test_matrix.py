"""What users combine with an accelerated model, for every family, as docs/compatibility.md tells it.

Where the stock model itself refuses, the accelerated one must refuse with the same error, and the table must say so.
"""

from __future__ import annotations

import copy
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import torch
from torch import Tensor, nn

from vdit_fast.accelerate import accelerate

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
OLDEST = diffusers.__version__.startswith("0.35.")


def table() -> dict[str, dict[str, str]]:
    """The page's table of families: family, then feature, then what is said."""
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in PAGE.read_text().splitlines() if line[:1] == "|"]
    start = next(number for number, row in enumerate(rows) if row[0] == "family")
    features, body = rows[start][1:], rows[start + 2 :]
    return {row[0].strip("`"): dict(zip(features, row[1:], strict=True)) for row in body}


def promised(family: str, feature: str) -> bool:
    """Whether the table says that a feature works with this version: ``yes``, ``newest`` (not with 0.35), or ``–``."""
    told = table()[family][feature]
    assert told in ("yes", "newest", "–"), told
    return told == "yes" or (told == "newest" and not OLDEST)


def agree(got: Tensor, want: Tensor) -> None:
    assert tiny.relative(got, want) < 5e-6, tiny.relative(got, want)


def refusal(call: Any) -> str | None:
    """Type and message of the error, None where there is none."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def test_the_table_names_the_families_with_builders() -> None:
    assert set(table()) == set(tiny.BUILDERS)
    oldest = re.search(r"OLDEST_DIFFUSERS=([\d.]+)", (PAGE.parents[1] / "run").read_text())
    assert oldest and f"diffusers {oldest[1]}" in PAGE.read_text()


def test_the_table_knows_the_oldest_version(family: str) -> None:
    told = table()[family]["0.35.2"]
    assert told in ("yes", "–")
    if OLDEST and told == "–":
        with pytest.raises(pytest.skip.Exception):
            tiny.build(family)
    else:
        tiny.build(family)


def test_twice_is_once(family: str) -> None:
    model, inputs = tiny.build(family)
    handle = accelerate(model)
    once, mine = tiny.run(model, inputs), tiny.served(model)
    assert accelerate(model) is handle
    assert tiny.served(model) == mine and torch.equal(tiny.run(model, inputs), once)
    handle.remove()
    again = accelerate(model)
    assert again is not handle and torch.equal(tiny.run(model, inputs), once)
    again.remove()
    assert not tiny.served(model)


def test_saved_and_loaded(family: str, tmp_path: Path) -> None:
    model, inputs = tiny.build(family)
    stock = tiny.run(model, inputs)
    accelerate(model)
    fast = tiny.run(model, inputs)
    model.save_pretrained(tmp_path)
    assert "vdit" not in (tmp_path / "config.json").read_text()
    loaded = type(model).from_pretrained(tmp_path)
    weights = model.state_dict()
    assert list(loaded.state_dict()) == list(weights)
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())
    assert not tiny.served(loaded) and not any("forward" in module.__dict__ for module in loaded.modules())
    agree(tiny.run(loaded, inputs), stock)  # weights lie at other addresses: torch's sums may have another order
    accelerate(loaded)
    agree(tiny.run(loaded, inputs), fast)


@pytest.mark.parametrize("when", [pytest.param("before", marks=pytest.mark.slow), "after"])
def test_fuse_qkv_projections(family: str, when: str) -> None:
    model, inputs = tiny.build(family)
    if not hasattr(model, "fuse_qkv_projections"):
        assert not promised(family, "fuse_qkv")
        pytest.skip(f"{type(model).__name__} has no fuse_qkv_projections()")
    plain, stock = tiny.run(model, inputs), copy.deepcopy(model)
    wrong = refusal(stock.fuse_qkv_projections) or refusal(lambda: tiny.run(stock, inputs))
    assert (wrong is None) == promised(family, "fuse_qkv"), wrong
    if wrong is not None:
        accelerate(model)
        assert refusal(lambda: (model.fuse_qkv_projections(), tiny.run(model, inputs))) == wrong
        return
    if when == "before":
        model.fuse_qkv_projections()
    try:
        handle = accelerate(model)
    except RuntimeError as error:  # all processors were exchanged for ones of diffusers' own
        assert when == "before" and "Fused" in str(error)
        return
    if when == "after":
        model.fuse_qkv_projections()
    agree(tiny.run(model, inputs), tiny.run(stock, inputs))
    exchanged = any(type(processor).__name__.startswith("Fused") for processor in tiny.processors(model).values())
    assert exchanged == ("replaced by another one" in handle.report())
    model.unfuse_qkv_projections()
    agree(tiny.run(model, inputs), plain)
    handle.remove()
    assert torch.equal(tiny.run(model, inputs), plain)


# ------------------------------------------------------------------------------------------- diffusers' own caches
STEPS = (790.0, 780.0, 770.0)
now = {"t": 0.0}


def cache_config(name: str) -> Any:
    if name == "FirstBlockCache":
        return diffusers.FirstBlockCacheConfig(threshold=1e3)  # whatever comes: skip after the first step
    if name == "PyramidAttentionBroadcast":
        return diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, temporal_attention_block_skip_range=2,
            cross_attention_block_skip_range=2, current_timestep_callback=lambda: now["t"],
        )  # fmt: skip
    if not hasattr(diffusers, "TaylorSeerCacheConfig"):
        pytest.skip(f"diffusers {diffusers.__version__} has no TaylorSeerCacheConfig")
    return diffusers.TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=2, taylor_factors_dtype=torch.float32,
        cache_identifiers=[r".*attn1?"],  # of itself it finds attention in HunyuanVideo's blocks only
    )  # fmt: skip


def generate(model: Any, inputs: dict[str, Any]) -> list[Tensor]:
    out = []
    for now["t"] in STEPS:
        with model.cache_context("cond"):
            out.append(tiny.run(model, tiny.at(inputs, now["t"])))
    return out


@pytest.mark.parametrize("cache", ["FirstBlockCache", "TaylorSeer", "PyramidAttentionBroadcast"])
def test_diffusers_caches_on_top(family: str, cache: str) -> None:
    model, inputs = tiny.build(family)
    config = cache_config(cache)
    if not hasattr(model, "enable_cache"):
        assert not promised(family, cache)
        pytest.skip(f"{type(model).__name__} is no CacheMixin")

    def cached(model: Any) -> list[Tensor]:
        model.enable_cache(config)
        return generate(model, inputs)

    stock, expected = copy.deepcopy(model), []
    wrong = refusal(lambda: expected.extend(cached(stock)))
    assert (wrong is None) == promised(family, cache), wrong
    handle = accelerate(model)
    if wrong is not None:
        assert refusal(lambda: cached(model)) == wrong
        return
    plain = [tiny.run(model, tiny.at(inputs, t)) for t in STEPS]
    handle.reset()
    for got, want in zip(cached(model), expected, strict=True):
        agree(got, want)
    assert any(tiny.relative(want, without) > 1e-6 for want, without in zip(expected, plain, strict=True))
    model.disable_cache()
    agree(tiny.run(model, tiny.at(inputs, STEPS[-1])), plain[-1])
    handle.remove()
    assert not tiny.served(model)


# ----------------------------------------------------------------------------------------------------- compilation
@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


LAYERS = {"hunyuan_video": {"layers": 1, "single": 9}, "hunyuan_token_replace": {"layers": 1, "single": 9}}


@pytest.mark.slow
def test_compile_repeated_blocks(family: str, fresh_compiler: None) -> None:
    if not promised(family, "compile_repeated_blocks"):
        model, _ = tiny.build(family)
        assert "_repeated_blocks" in str(refusal(model.compile_repeated_blocks))
        pytest.skip(f"{type(model).__name__} names no repeated blocks: compile them one by one")
    model, inputs = tiny.build(family, **LAYERS.get(family, {"layers": 10}))
    want = tiny.run(model, inputs)
    handle = accelerate(model)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    agree(tiny.run(model, inputs), want)
    assert all(layer["calls"] == 1 and not layer["fallbacks"] for layer in handle.stats()["layers"])


# ------------------------------------------------------------------------------------------- prompts of two lengths
def two_prompts(inputs: dict[str, Any]) -> dict[str, Any]:
    """A batch of two whose first prompt is short: masked where the model takes a mask, else padded with zeros."""
    batch = inputs["hidden_states"].shape[0]
    out = dict(inputs)
    for name, value in inputs.items():
        if batch == 1 and isinstance(value, Tensor) and value.ndim and value.shape[0] == 1 and "scale" not in name:
            out[name] = torch.cat([value, value if "timestep" in name else value.flip(-1)])
    masks = [name for name in out if "encoder" in name and "mask" in name and out[name] is not None]
    for name in masks:
        out[name] = out[name].clone()
        out[name][0, out[name].shape[1] // 2 :] = 0
    if not masks:
        text = out["encoder_hidden_states"].clone()
        text[0, text.shape[1] // 2 :] = 0
        out["encoder_hidden_states"] = text
    return out


def test_two_prompts_of_different_lengths(family: str) -> None:
    model, inputs = tiny.build(family)
    if "hidden_states" not in inputs:
        pytest.skip("prompts of video UNets have one length")
    inputs = two_prompts(inputs)
    want = tiny.run(model, inputs)
    handle = accelerate(model)
    got = tiny.run(model, inputs)
    assert got.shape[0] == 2 and tiny.relative(got[0], got[1]) > 1e-3
    for item in range(2):
        agree(got[item], want[item])
    assert not any(layer["fallbacks"] for layer in handle.stats()["layers"])


# ---------------------------------------------------------------------------------------------- context parallelism
ULYSSES = """
import os, sys
sys.path.insert(0, os.environ["VDIT_TESTS"])
import tiny, torch
from diffusers import ContextParallelConfig
from vdit_fast.accelerate import accelerate

torch.set_num_threads(1)
torch.accelerator.device_count = lambda: 2  # diffusers divides by it, and there is none here
torch.distributed.init_process_group("gloo")
for family in sys.argv[1:]:
    model, inputs = tiny.build(family)
    if family == "ltx_video":  # no mask: the stock one has all heads, a rank half of them; 6 tokens for two ranks
        inputs |= {"encoder_attention_mask": None, "encoder_hidden_states": inputs["encoder_hidden_states"][:, :6]}
    whole = tiny.run(model, inputs)
    handle = accelerate(model)
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    for attempt in ("accelerated first", "parallel first"):
        got = tiny.run(model, inputs)
        assert tiny.relative(got, whole) < 5e-6, (family, attempt, tiny.relative(got, whole))
        layers = handle.stats()["layers"]
        assert layers and not any(l["fallbacks"] for l in layers), (family, layers)
        ulysses = handle.roots[0].session.around_heads["sequence"]
        assert ulysses.calls == sum(l["calls"] for l in layers) > 0 and ulysses.bytes_sent > 0
        handle.remove()
        assert tiny.relative(tiny.run(model, inputs), whole) < 5e-6, family
        handle = accelerate(model)
    print("done", family)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.skipif(OLDEST, reason="diffusers 0.35 has no context parallelism")
def test_ulysses_on_two_ranks() -> None:
    families = [family for family, row in table().items() if row["Ulysses"] == "newest"]
    for family in set(tiny.BUILDERS) - set(families) - {"ltx2", "ltx2_3"}:  # whose stock models fail on it
        assert getattr(tiny.build(family)[0], "_cp_plan", None) is None, family
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port.getsockname()[1]), "WORLD_SIZE": "2"}
    env = {**os.environ, **address, "VDIT_TESTS": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ULYSSES, *families]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = [subprocess.Popen(command, env={**env, "RANK": str(rank)}, **pipes) for rank in range(2)]
    try:
        for rank in ranks:
            said = rank.communicate(timeout=300)[0]
            assert rank.returncode == 0 and said.count("done") == len(families), said
    finally:
        for rank in ranks:
            rank.kill()


def test_the_classes_of_nn_modules_stay(family: str) -> None:
    """What matches modules by class (caches, offloading, regional compilation) finds them as before."""
    model, _ = tiny.build(family)
    before: list[type[nn.Module]] = [type(module) for module in model.modules()]
    accelerate(model)
    assert [type(module) for module in model.modules()] == before
