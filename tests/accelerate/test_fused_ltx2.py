"""The fused blocks of LTX-2: both streams, every form of a call, rows of modulation by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from test_fused import calls
from torch import Tensor, nn

from vdit_fast.accelerate import accelerate
from vdit_fast.config import Config
from vdit_fast.models.ltx2_block import _NORMS

KINDS = ("ltx2", "ltx2_3")
ULP = 4 * torch.finfo(torch.float32).eps

Inputs = dict[str, Any]


def isolated(inputs: Inputs) -> Inputs:
    return inputs | {"isolate_modalities": True}


def one_timestep(inputs: Inputs) -> Inputs:
    return inputs | {"timestep": torch.full((2, 1), 500.0)}


def a_timestep_per_token(inputs: Inputs) -> Inputs:
    return inputs | {"timestep": 1000 * torch.rand(inputs["timestep"].shape)}


def audio_timesteps(inputs: Inputs) -> Inputs:
    """As many audio tokens as there are of the video, with timesteps of their own."""
    tokens = inputs["timestep"].shape[1]
    return inputs | {
        "audio_hidden_states": torch.randn(2, tokens, 6),
        "audio_num_frames": tokens,
        "audio_timestep": 1000 * torch.rand(2, tokens),
        "use_cross_timestep": False,
    }


def audio_noise_levels(inputs: Inputs) -> Inputs:
    """The video's rows toward the audio stem from noise levels per audio token, the others from one timestep each."""
    if "sigma" in inputs:
        pytest.skip("the stock model has no noise levels per token where they modulate the text")
    tokens = inputs["timestep"].shape[1]
    return audio_timesteps(inputs) | {
        "use_cross_timestep": True,
        "sigma": torch.tensor([700.0, 300.0]),
        "audio_sigma": 1000 * torch.rand(2, tokens),
        "timestep": torch.tensor([[700.0], [300.0]]).expand(2, tokens),
    }


def masked(inputs: Inputs) -> Inputs:
    tokens = inputs["timestep"].shape[1]
    return inputs | {"video_self_attention_mask": (torch.rand(2, tokens, tokens) > 0.3).float()}


def as_it_is(inputs: Inputs) -> Inputs:
    return inputs


FORMS = (as_it_is, isolated, one_timestep, a_timestep_per_token, audio_timesteps, audio_noise_levels, masked)


def build(kind: str, dtype: torch.dtype = torch.float32, form: Callable[[Inputs], Inputs] = as_it_is) -> Any:
    model, inputs = tiny.build(kind)
    for name, parameter in model.named_parameters():
        if "scale_shift_table" in name:
            parameter.data.normal_()
    return model.to(dtype), tiny.cast(form(inputs), dtype)


def both(model: nn.Module, inputs: Inputs) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        video, audio = model(**inputs)
    return video, audio


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_both_streams(kind: str, dtype: torch.dtype, form: Callable[[Inputs], Inputs]) -> None:
    model, inputs = build(kind, dtype, form)
    handle = accelerate(model, Config(fuse="off"))
    stock = both(model, inputs)
    handle.reconfigure(Config(fuse="eager"))
    flip = 1e-3 if dtype == torch.bfloat16 else 0.0  # the order of a norm's sums rounds one value in 10,000 up
    for got, want in zip(both(model, inputs), stock, strict=True):
        assert tiny.relative(got, want) <= ULP + flip
    assert not handle.stats()["fused"]["unfused"]
    exact = both(tiny.double(model), tiny.cast(inputs, torch.float64))
    handle.reconfigure(Config(fuse="fast"))
    for got, want, truth in zip(both(model, inputs), stock, exact, strict=True):
        tiny.exact_enough(got, want, truth)
    assert not handle.stats()["fused"]["unfused"]


def test_norms_with_weights() -> None:
    """A configuration may give every norm of a block weights; then each is told from the others."""
    model, inputs = build("ltx2_3")
    for name, norm in model.get_submodule("transformer_blocks").named_modules():
        if name.rpartition(".")[2] in _NORMS:
            norm.weight = nn.Parameter(1 + 0.3 * torch.randn(norm.dim), requires_grad=False)
    stock = both(model, inputs)
    handle = accelerate(model, Config(fuse="eager"))
    assert all(tiny.relative(got, want) < 2e-6 for got, want in zip(both(model, inputs), stock, strict=True))
    assert not handle.stats()["fused"]["unfused"]


def block_call(model: nn.Module, inputs: Inputs) -> Inputs:
    """The arguments of the second block."""
    seen: list[Inputs] = []
    block = model.get_submodule("transformer_blocks.1")
    hook = block.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    both(model, inputs)
    hook.remove()
    return seen[0]


TOLD: dict[str, Inputs] = {
    "audio to video": {"use_v2a_cross_attention": False},
    "video to audio": {"use_a2v_cross_attention": False},
    "neither": {"use_v2a_cross_attention": False, "use_a2v_cross_attention": False},
    "static prompt": {"temb_prompt": None, "temb_prompt_audio": None},
    "cross masks": {
        "a2v_cross_attention_mask": torch.zeros(2, 1, 11).index_fill(2, torch.tensor([2, 5]), -1e4),
        "v2a_cross_attention_mask": torch.zeros(2, 1, 48).index_fill(2, torch.arange(9, 30), -1e4),
    },
    "perturbed": {"perturbation_mask": torch.tensor([0.0, 1.0])[:, None, None], "all_perturbed": False},
    "all perturbed": {"perturbation_mask": torch.zeros(2, 1, 1), "all_perturbed": True},
}


@pytest.mark.parametrize("told", TOLD)
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_block_is_told(kind: str, told: str) -> None:
    model, inputs = build(kind)
    call = block_call(model, inputs)
    block, changed = model.get_submodule("transformer_blocks.1"), call | TOLD[told]
    with torch.no_grad():
        plain, stock = block(**call), block(**changed)
        handle = accelerate(model, Config(fuse="eager"))
        fused = block(**changed)
    ignored = kind == "ltx2" and told in ("static prompt", "perturbed", "all perturbed")
    assert any(tiny.relative(new, old) > 1e-4 for new, old in zip(stock, plain, strict=True)) != ignored
    for got, want in zip(fused, stock, strict=True):
        assert tiny.relative(got, want) < 2e-6
    assert not handle.stats()["fused"]["unfused"]


@pytest.mark.parametrize("kind", KINDS)
def test_passes_over_the_rows(kind: str) -> None:
    """Per stream: the first norm, one residual with a norm each after both attentions and what the other stream gives,
    the same norm for what it is asked, the last residual; and the text, where it is modulated."""
    model, inputs = build(kind)
    accelerate(model)
    ran = calls(model, inputs)
    blocks = len(model.get_submodule("transformer_blocks"))
    text = 2 * blocks if kind == "ltx2_3" else 0
    assert ran["adaln_modulate"] == 4 * blocks + text
    assert ran["gate_residual_norm"] == 6 * blocks and ran["gate_residual"] == 2 * blocks
    assert ran["qk_norm_rope"] == 6 * blocks, "two self-attentions; queries and keys of two between the streams"


@pytest.mark.parametrize("kind", KINDS)
def test_distinct_timesteps_are_found_for_the_video_only(kind: str) -> None:
    model, inputs = build(kind, form=audio_timesteps)
    handle = accelerate(model)
    want = both(model, inputs)
    forward = handle.roots[0].session.forward
    assert len(forward.distinct(*inputs["timestep"].shape)[0]) == 4, "two levels of two batch items"
    forward_distinct = type(forward).distinct
    try:  # rows by token: the same numbers
        type(forward).distinct = lambda self, batch, tokens: None
        got = both(model, inputs)
    finally:
        type(forward).distinct = forward_distinct
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_keys_with_tables_of_their_own_run_the_stock_way() -> None:
    model, _ = build("ltx2")
    attn: Any = model.get_submodule("transformer_blocks.0.attn1")
    x, (cos, sin, other) = torch.randn(2, 5, 32), torch.rand(3, 1, 5, 32)
    with torch.no_grad():
        stock = attn(x, query_rotary_emb=(cos, sin), key_rotary_emb=(other, sin))
        handle = accelerate(model)
        got = attn(x, query_rotary_emb=(cos, sin), key_rotary_emb=(other, sin))
    assert torch.equal(got, stock)
    layer = next(layer for layer in handle.stats()["layers"] if layer["name"] == "transformer_blocks.0.attn1")
    assert layer["fallbacks"] == {"the keys have rotary tables of their own": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_attention_between_the_streams_stays_with_its_processor(kind: str) -> None:
    model, inputs = build(kind)
    attn: Any = model.get_submodule("transformer_blocks.1.audio_to_video_attn")
    own = attn.processor
    handle = accelerate(model, Config(fuse="eager"))
    assert attn.processor.stock is own and not attn.processor.attends
    names = handle.stats()["skipped"]["cross-attention between video and audio"]
    assert len(names) == 4 and "transformer_blocks.1.audio_to_video_attn" in names
    want = both(model, inputs)
    watch = attn.norm_q.register_forward_hook(lambda *_: None)
    assert all(tiny.relative(a, b) <= ULP for a, b in zip(both(model, inputs), want, strict=True))
    assert handle.stats()["fused"]["unfused"] == {"a norm is hooked, or its weights lie elsewhere": 1}
    watch.remove()
    attn.set_processor(own)
    handle.reconfigure(Config(fuse="eager"))
    assert all(tiny.relative(a, b) <= ULP for a, b in zip(both(model, inputs), want, strict=True))
    handle.remove()
    assert attn.processor is own and own is not None
    other: Any = model.get_submodule("transformer_blocks.0.video_to_audio_attn")
    assert type(other.processor) is type(own)
