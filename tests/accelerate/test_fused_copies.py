"""Shallow copies of fused blocks: they take over every attribute, and must still compute with their own weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from test_fused import Calls, calls
from torch import nn

from vdit_fast.accelerate import accelerate
from vdit_fast.config import Config
from vdit_fast.models.cogvideox import CogVideoXAdapter

NOISE = 0.05


def perturbed(model: nn.Module) -> nn.Module:
    """A stock copy with other weights."""
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    for parameter in twin.parameters():
        parameter.data += NOISE * torch.randn(parameter.shape, generator=generator)
    return twin


def replica_of(model: nn.Module, weights: nn.Module) -> nn.Module:
    """What ``torch.nn.parallel.replicate`` makes for another device, here with other weights on the same one. It has no
    parameters, only attributes; Wan asks for parameters and cannot be replicated."""
    replicas: dict[nn.Module, Any] = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for (module, replica), other in zip(replicas.items(), weights.modules(), strict=True):
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else replicas[child]
        for kind in ("_parameters", "_buffers"):
            for name, value in getattr(module, kind).items():
                new = None if value is None else getattr(other, kind)[name].data
                getattr(replica, kind).pop(name, None)
                setattr(replica, name, new)
    return replicas[model]


@pytest.mark.parametrize("kind", ["cogvideox_5b", "hunyuan_video", "ltx2", "latte"])
def test_replicas_compute_with_their_own_weights(kind: str) -> None:
    model, inputs = tiny.build(kind)
    other = perturbed(model)
    stock, want = tiny.run(model, inputs), tiny.run(other, inputs)
    handle = accelerate(model)
    replica = replica_of(model, other)
    assert tiny.relative(want, stock) > 1e-2
    for _ in range(2):
        assert tiny.relative(tiny.run(replica, inputs), want) < 1e-5
        assert tiny.relative(tiny.run(model, inputs), stock) < 1e-5, "the original is as it was"
    assert not handle.stats()["fused"]["unfused"] and calls(model, inputs)["adaln_modulate"]
    assert not calls(replica, inputs)["adaln_modulate"], "replicas run in threads: the stock forward"


def test_a_shallow_copy_in_the_transformer_is_fused_on_its_own() -> None:
    model, inputs = tiny.wan()
    model.blocks[1] = copy.deepcopy(model.blocks[0])
    other = perturbed(model)
    want = tiny.run(other, inputs)
    donor = copy.deepcopy(other.blocks[1])
    handle = accelerate(other)
    second = other.blocks[1] = copy.copy(other.blocks[0])
    second._modules = dict(donor._modules)
    second._parameters = dict(donor._parameters)
    assert second.forward.__self__ is other.blocks[0]
    with Calls() as seen:
        assert tiny.relative(tiny.run(other, inputs), want) < 1e-5
    assert seen.names["adaln_modulate"] == 2 and second.forward.__self__ is second
    handle.remove()
    assert "forward" not in second.__dict__ and torch.equal(tiny.run(other, inputs), want)


@pytest.mark.parametrize("ran", [True, False])
def test_remove_frees_shallow_copies_too(ran: bool) -> None:
    model, inputs = tiny.wan()
    handle = accelerate(model, Config())
    model.blocks[1] = copy.copy(model.blocks[0])
    if ran:
        tiny.run(model, inputs)
    handle.remove()
    assert all("forward" not in block.__dict__ for block in model.blocks)


def test_a_replica_of_a_block_under_a_cache_leaves_it() -> None:
    """What stands around the original's block stands around no replica's: its state is the original's."""
    from test_cache_blocks import policy

    model, inputs = tiny.cogvideox(layers=3)
    other = perturbed(model)
    want = tiny.run(other, inputs)
    accelerate(model, Config(cache=policy("module")))
    assert tiny.relative(tiny.run(replica_of(model, other), inputs), want) < 1e-5


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("granularity", ["span", "module"])
def test_a_replica_counts_the_cache_that_it_leaves_out(
    granularity: str, fused: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nobody knows a fused forward of the blocks; and in every forward of a replica."""
    from test_cache_blocks import policy

    model, inputs = tiny.cogvideox(layers=3)
    other = perturbed(model)
    stock, want = tiny.run(model, inputs), tiny.run(other, inputs)
    if not fused:
        monkeypatch.setattr(CogVideoXAdapter, "blocks", {})
    handle = accelerate(model, Config(cache=policy(granularity)))
    assert bool(handle.stats()["fused"]["blocks"]) == fused
    replica = replica_of(model, other)
    for _ in range(3):
        assert tiny.relative(tiny.run(replica, inputs), want) < 1e-5
    found = handle.stats()["cache"]
    assert sum(n for reason, n in found["full"].items() if "DataParallel" in reason) == 3 and not found["nbytes"]
    assert [record for record in caplog.records if "is left out: a replica of DataParallel" in record.message]
    assert tiny.relative(tiny.run(model, inputs), stock) < 1e-5 and handle.stats()["cache"]["nbytes"], "the original"


def test_what_no_replica_can_have_is_refused() -> None:
    """The state of what stands around the whole is the original's, and so are its weights."""
    from test_cache_blocks import policy

    model, inputs = tiny.cogvideox(layers=2)
    other = perturbed(model)
    with accelerate(model, Config(cache=policy("model"))):
        replica = replica_of(model, other)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"cannot run with a cache at granularity 'model'.*process per GPU"):
                tiny.run(replica, inputs)
        tiny.run(model, inputs)
    with accelerate(model) as handle:
        handle.memory(torch.randn(5, model.config.num_attention_heads * model.config.attention_head_dim))
        remove = handle.hook("attention_output", lambda *_: None)
        with pytest.raises(RuntimeError, match="cannot run with hooks and memory, whose state"):
            tiny.run(replica_of(model, other), inputs)
        remove()
        handle.memory(None)
        assert tiny.relative(tiny.run(replica_of(model, other), inputs), tiny.run(other, inputs)) < 1e-5
