"""Vivid-VR: Distilling Concepts from Text-to-Video Diffusion Transformer for Photorealistic Video Restoration
(arXiv 2508.14483).

A ControlNet of six blocks makes control states of the degraded video; behind each of the 42 blocks of CogVideoX a
connector takes one up: dense attention of all video rows over all control rows, whose values are the control rows
themselves, and a mapping beside it. Every state serves seven blocks.
"""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from vdit_fast.accelerate import accelerate
from vdit_fast.config import Config
from vdit_fast.hooks import ControlBranch, ControlConnector
from vdit_fast.planners import SVG2

pytest.importorskip("diffusers")

TOKENS = 3 * 4 * 4


def connector(channels: int = 32, heads: int = 2, trained: bool = True, **kw: Any) -> ControlConnector:
    made = ControlConnector(channels, heads, **kw)
    if trained:
        for part in (made.out, made.skip):
            nn.init.normal_(part[2].weight, std=0.1)
    return made.eval().requires_grad_(False)


def reference(part: ControlConnector, h: Tensor, control: Tensor) -> Tensor:
    """The same by torch's attention."""
    control = control.expand(h.shape[0], -1, -1)
    query = part.norm_q(part.to_q(h).unflatten(-1, (part.heads, -1))).transpose(1, 2)
    key = part.norm_k(part.to_k(control).unflatten(-1, (part.heads, -1))).transpose(1, 2)
    value = control.unflatten(-1, (part.heads, -1)).transpose(1, 2)
    out = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    return h + part.out(out) + part.skip(control)


def test_the_connector_at_the_papers_size_is_torchs_attention() -> None:
    """48 heads of 64 columns; batch items that differ."""
    part = connector(3072, 48, width=32)
    h, control = torch.randn(2, 40, 3072), torch.randn(1, 40, 3072)
    got, want = part(h, control), reference(part, h, control)
    truth = reference(part.double(), h.double(), control.double())
    assert tiny.relative(got, truth) <= 2 * tiny.relative(want, truth) + 1e-7
    assert tiny.relative(got, h.double()) > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    part = connector().to(dtype)
    h, control = torch.randn(1, 9, 32, dtype=dtype), torch.randn(1, 9, 32, dtype=dtype)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-12
    assert part(h, control).dtype == dtype and tiny.relative(part(h, control), reference(part, h, control)) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_last_layers_at_zero_change_no_bit(dtype: torch.dtype) -> None:
    model, inputs = tiny.build("cogvideox_5b")
    model, inputs = model.to(dtype), tiny.cast(inputs, dtype)
    handle = accelerate(model)
    plain = tiny.run(model, inputs)
    branch = ControlBranch([connector(trained=False).to(dtype) for _ in range(2)])
    branch.states = [torch.randn(1, TOKENS, 32, dtype=dtype)]
    handle.hook("block_output", branch)
    assert torch.equal(tiny.run(model, inputs), plain)
    assert handle.stats()["hooks"] == {"block_output": 2}


def test_block_i_takes_up_state_i_over_7() -> None:
    model, inputs = tiny.wan(layers=15)
    handle = accelerate(model)
    taken: list[tuple[int, int]] = []

    class Noting(nn.Module):
        def __init__(self, index: int) -> None:
            super().__init__()
            self.index = index

        def forward(self, h: Tensor, control: Tensor) -> Tensor:
            taken.append((self.index, int(control[0, 0, 0])))
            return h

    branch = ControlBranch([Noting(index) for index in range(15)])
    branch.states = [torch.full((1, TOKENS, 32), float(state)) for state in range(3)]
    handle.hook("block_output", branch)
    tiny.run(model, inputs)
    assert taken == [(index, index // 7) for index in range(15)]
    branch.states = branch.states[:2]
    with pytest.raises(ValueError, match="block 14 wants connector 14 and state 2"):
        tiny.run(model, inputs)
    branch.states = []
    taken.clear()
    tiny.run(model, inputs)
    assert not taken


def test_paper_sizes_have_six_states() -> None:
    assert [index // ControlBranch([]).blocks_per_state for index in (0, 6, 7, 41)] == [0, 0, 1, 5]


@pytest.mark.parametrize("planner", [None, SVG2(top_p=1.0, q_clusters=4, k_clusters=4)], ids=["dense", "permuted"])
def test_control_enters_between_blocks_in_the_models_order(planner: Any) -> None:
    """The same as a model of stock blocks with connectors called in between, whatever the planner permutes; text rows
    pass by."""
    model, inputs = tiny.build("cogvideox_5b")
    parts = [connector(), None]
    control = torch.randn(1, TOKENS, 32)

    def between(module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        assert parts[0] is not None
        return reference(parts[0], output[0], control), output[1]

    block = model.get_submodule("transformer_blocks.0")
    stock = block.register_forward_hook(between)
    want = tiny.run(model, inputs)
    stock.remove()
    handle = accelerate(model, Config(attention=planner))
    branch = ControlBranch(parts)
    branch.states = [control]
    assert tiny.relative(tiny.run(model, inputs), want) > 1e-3
    handle.hook("block_output", branch)
    assert tiny.relative(tiny.run(model, inputs), want) < 1e-5


def test_guidance_branches_have_control_of_their_own() -> None:
    model, inputs = tiny.build("cogvideox_5b")
    handle = accelerate(model)
    branch = ControlBranch([connector(), None])
    handle.hook("block_output", branch)
    outputs = []
    for state in (torch.randn(1, TOKENS, 32), torch.randn(1, TOKENS, 32)):
        branch.states = [state]
        outputs.append(tiny.run(model, inputs))
    assert tiny.relative(outputs[0], outputs[1]) > 1e-3


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="heads"):
        ControlConnector(32, 5)
    with pytest.raises(ValueError, match="blocks_per_state"):
        ControlBranch([], 0)
    with pytest.raises(ValueError, match=r"\[1 or 1, 5, 32\] like the video rows, got \[1, 4, 32\]"):
        connector()(torch.randn(1, 5, 32), torch.randn(1, 4, 32))
