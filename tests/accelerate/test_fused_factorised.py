"""The fused blocks of Stable Video Diffusion, AnimateDiff and Latte, block by block beside the stock ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from test_fused import Calls
from torch import Tensor, nn

from vdit_fast.accelerate import accelerate
from vdit_fast.config import Config
from vdit_fast.handle import Handle
from vdit_fast.models.factorised_block import FACTORISED_BLOCKS

Call = tuple[tuple[Any, ...], dict[str, Any]]


def recorded(kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Call]]:
    """A tiny model, and what its blocks are called with, by path."""
    model, inputs = tiny.build(kind)
    model, inputs = model.to(dtype), tiny.cast(inputs, dtype)
    found: dict[str, Call] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: found.__setitem__(name, (args, kwargs)), with_kwargs=True
        )
        for name, module in model.named_modules()
        if type(module).__name__ in FACTORISED_BLOCKS
    ]
    tiny.run(model, inputs)
    for hook in hooks:
        hook.remove()
    return model, found


def run(block: nn.Module, call: Call) -> Tensor:
    with torch.no_grad():
        out: Tensor = block(*call[0], **call[1])
    return out


def unfused(handle: Handle) -> set[str]:
    found = set(handle.stats()["fused"]["unfused"])
    handle.reconfigure(handle.config)
    return found


@pytest.mark.parametrize("kind", sorted(tiny.WITHOUT_GRID))
def test_blocks_in_bf16(kind: str) -> None:
    """``eager``: the stock bits, but for a norm that rounds the other way now and then. ``fast``: within the error that
    the stock block has."""
    model, called = recorded(kind, torch.bfloat16)
    handle = accelerate(model, Config(fuse="off"))
    stock = {name: run(model.get_submodule(name), call) for name, call in called.items()}
    for name, call in called.items():
        block = model.get_submodule(name)
        handle.reconfigure(Config(fuse="eager"))
        assert (run(block, call) == stock[name]).double().mean() > 0.99, name
        handle.reconfigure(Config(fuse="fast"))
        wide = tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in call[0])
        named = {k: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in call[1].items()}
        exact = run(copy.deepcopy(block).double(), (wide, named))
        tiny.exact_enough(run(block, call), stock[name], exact)
    assert len(called) >= 4 and not handle.stats()["fused"]["unfused"]


def test_a_narrow_time_block_has_no_residual_around_its_feed_forward() -> None:
    from diffusers.models.attention import TemporalBasicTransformerBlock

    torch.manual_seed(0)
    stock = TemporalBasicTransformerBlock(16, 16, 2, 8, cross_attention_dim=12).eval()
    stock.is_res = False  # as with another inner width, which then must be the outer one again
    root = nn.Module()
    root.block = stock
    x, text = torch.randn(6, 5, 16), torch.randn(10, 1, 12)
    want = run(stock, ((x,), {"num_frames": 3, "encoder_hidden_states": text}))
    session = attached(root)
    with Calls() as seen:
        got = run(stock, ((x,), {"num_frames": 3, "encoder_hidden_states": text}))
    assert tiny.relative(got, want) < 2e-6 and not session.unfused
    assert seen.names["gate_residual_norm"] == 2 and not seen.names["gate_residual"]


def attached(root: nn.Module) -> Any:
    from vdit_fast.models import fusion
    from vdit_fast.models.session import Session
    from vdit_fast.models.tracker import StepTracker

    session = Session(Config(), StepTracker(None), "transformer")
    fusion.attach(root, session, FACTORISED_BLOCKS)
    return session


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, None),
        ({"norm_elementwise_affine": False}, None),
        ({"positional_embeddings": "sinusoidal", "num_positional_embeddings": 9}, None),
        ({"double_self_attention": True}, None),
        ({"only_cross_attention": True, "cross_attention_dim": 12}, None),
        ({"norm_type": "ada_norm_single", "cross_attention_dim": 12}, None),
        ({"norm_type": "ada_norm_single", "positional_embeddings": "sinusoidal", "num_positional_embeddings": 9}, None),
        ({"norm_type": "ada_norm", "num_embeds_ada_norm": 10}, "norms of the type 'ada_norm' are not fused"),
        ({"norm_type": "ada_norm_zero", "num_embeds_ada_norm": 10}, "norms of the type 'ada_norm_zero' are not fused"),
    ],
    ids=str,
)
def test_forms_of_the_block(settings: dict[str, Any], reason: str | None) -> None:
    from diffusers.models.attention import BasicTransformerBlock

    torch.manual_seed(0)
    kind = settings.get("norm_type", "layer_norm")
    root = nn.Module()
    root.block = BasicTransformerBlock(16, 2, 8, **settings).eval()
    timestep: dict[str, Tensor | None] = {
        "ada_norm_single": torch.randn(3, 96), "ada_norm": torch.tensor(4), "ada_norm_zero": torch.tensor([4, 5, 6]),
    }  # fmt: skip
    text = torch.randn(3, 4, 12) if "cross_attention_dim" in settings else None
    call: Call = ((torch.randn(3, 7, 16),), {"encoder_hidden_states": text, "timestep": timestep.get(kind)})
    if kind == "ada_norm_zero":
        call[1]["class_labels"] = torch.tensor([1, 0, 2])
    want = run(root.block, call)
    session = attached(root)
    assert tiny.relative(run(root.block, call), want) < 2e-6
    assert session.unfused == ({} if reason is None else {reason: 1})


def test_calls_that_run_the_stock_way() -> None:
    model, called = recorded("animatediff")
    handle = accelerate(model)
    name = next(name for name in called if "motion" not in name)
    block: Any = model.get_submodule(name)
    args, kwargs = called[name]
    plain = run(block, (args, kwargs))
    assert not unfused(handle)
    block.set_chunk_feed_forward(2, 1)
    assert tiny.relative(run(block, (args, kwargs)), plain) < 2e-6
    assert unfused(handle) == {"its feed-forward runs in chunks"}
    block.set_chunk_feed_forward(None)
    told = kwargs | {"cross_attention_kwargs": {"scale": 0.5}}
    assert tiny.relative(run(block, (args, told)), plain) < 2e-6
    assert unfused(handle) == {"its attention is told a scale or GLIGEN's objects"}
    assert tiny.relative(run(block, (args, kwargs | {"cross_attention_kwargs": {"scale": None}})), plain) < 2e-6
    assert not unfused(handle)


def test_time_blocks_in_chunks_run_the_stock_way() -> None:
    model, called = recorded("svd")
    handle = accelerate(model)
    name = next(name for name in called if "temporal" in name)
    block: Any = model.get_submodule(name)
    plain = run(block, called[name])
    block.set_chunk_feed_forward(1)
    assert tiny.relative(run(block, called[name]), plain) < 2e-6
    assert unfused(handle) == {"its feed-forward runs in chunks"}
