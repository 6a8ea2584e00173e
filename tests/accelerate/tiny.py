"""Tiny random diffusers transformers with inputs, and a simple planner, for the accelerate tests."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vdit_fast.context import LayerContext
from vdit_fast.plan import AttentionPlan
from vdit_fast.planners.base import Planner

Built = tuple[nn.Module, dict[str, Any]]


def _sharpen(model: nn.Module) -> nn.Module:
    """Random weights give near-uniform attention, in which a lost RoPE or mask would hardly show."""
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0].endswith(("norm_q", "norm_k", "norm_added_q", "norm_added_k")) and "weight" in name:
            parameter.data.mul_(1.7).add_(0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def wan(
    *, layers: int = 2, image: bool = False, per_token: bool = False, batch: int = 1, frames: int = 3, size: int = 8
) -> Built:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(1)
    extra: dict[str, Any] = {"image_dim": 16, "added_kv_proj_dim": 32} if image else {}
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=48, num_layers=layers, rope_max_seq_len=64, **extra,
    )  # fmt: skip
    tokens = frames * (size // 2) ** 2
    timestep = torch.full((batch,), 500.0)
    if per_token:  # the first frame is a condition and has no noise
        timestep = torch.full((batch, tokens), 500.0)
        timestep[:, : tokens // frames] = 0
    inputs = {
        "hidden_states": torch.randn(batch, 4, frames, size, size),
        "timestep": timestep,
        "encoder_hidden_states": torch.randn(batch, 512, 16),
        "return_dict": False,
    }
    if image:
        inputs["encoder_hidden_states_image"] = torch.randn(batch, 257, 16)
    return _sharpen(model), inputs


def hunyuan(*, layers: int = 1, single: int = 1, lengths: tuple[int, ...] = (5, 9)) -> Built:
    from diffusers import HunyuanVideoTransformer3DModel

    torch.manual_seed(1)
    model = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=layers,
        num_single_layers=single, num_refiner_layers=1, patch_size=2, patch_size_t=1, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    batch, text = len(lengths), 9
    mask = (torch.arange(text) < torch.tensor(lengths)[:, None]).long()
    return _sharpen(model), {
        "hidden_states": torch.randn(batch, 4, 3, 8, 8),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn(batch, text, 16) * 3,
        "pooled_projections": torch.randn(batch, 8),
        "encoder_attention_mask": mask,
        "guidance": torch.full((batch,), 6000.0),
        "return_dict": False,
    }


def cogvideox(*, layers: int = 2, rope: bool = True, batch: int = 2) -> Built:
    from diffusers import CogVideoXTransformer3DModel
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    torch.manual_seed(1)
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=16, num_layers=layers, sample_width=8, sample_height=8, sample_frames=9, patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=7, use_rotary_positional_embeddings=rope,
    )  # fmt: skip
    table = get_3d_rotary_pos_embed(16, ((0, 0), (4, 4)), (4, 4), 3) if rope else None
    return _sharpen(model), {
        "hidden_states": torch.randn(batch, 3, 4, 8, 8),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, 7, 16),
        "image_rotary_emb": table,
        "return_dict": False,
    }


BUILDERS: dict[str, Callable[..., Built]] = {
    "wan_t2v": wan,
    "wan_i2v": lambda **kw: wan(image=True, **kw),
    "wan_ti2v": lambda **kw: wan(per_token=True, **kw),
    "hunyuan_video": hunyuan,
    "cogvideox_5b": cogvideox,
    "cogvideox_2b": lambda **kw: cogvideox(rope=False, **kw),
}


def build(family: str, **kw: Any) -> Built:
    return BUILDERS[family](**kw)


def regrid(inputs: dict[str, Any], grid: tuple[int, int, int]) -> dict[str, Any]:
    """The same kind of inputs for another grid of tokens (frames, height, width)."""
    frames, height, width = grid
    latents, timestep = inputs["hidden_states"], inputs["timestep"]
    batch, size = latents.shape[0], (2 * height, 2 * width)
    new = dict(inputs)
    if "image_rotary_emb" in inputs:  # CogVideoX: frames before channels
        from diffusers.models.embeddings import get_3d_rotary_pos_embed

        new["hidden_states"] = torch.randn(batch, frames, latents.shape[2], *size)
        if inputs["image_rotary_emb"] is not None:
            new["image_rotary_emb"] = get_3d_rotary_pos_embed(16, ((0, 0), (height, width)), (height, width), frames)
    else:
        new["hidden_states"] = torch.randn(batch, latents.shape[1], frames, *size)
    if timestep.ndim == 2:
        new["timestep"] = torch.full((batch, frames * height * width), 500.0)
        new["timestep"][:, : height * width] = 0
    return new


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Floating inputs in ``dtype``; timesteps and RoPE tables stay as they are, like in the pipelines."""
    keep = ("timestep", "image_rotary_emb")
    return {
        key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() and key not in keep else value
        for key, value in inputs.items()
    }


def at(inputs: dict[str, Any], value: float) -> dict[str, Any]:
    """The same inputs at another timestep."""
    timestep = inputs["timestep"]
    return {**inputs, "timestep": torch.where(timestep == 0, timestep, torch.full_like(timestep, value))}


def run(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**copy.copy(inputs))[0]


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def exact_enough(got: Tensor, eager: Tensor, truth: Tensor) -> None:
    """The served model may be at most twice as far from the fp64 run as the eager one, plus one rounding."""
    eps = torch.finfo(eager.dtype).eps
    error, allowed = relative(got, truth), 2 * relative(eager, truth) + eps
    assert error <= allowed, (
        f"error {error:.3g} against fp64, eager has {relative(eager, truth):.3g}, allowed {allowed:.3g}"
    )


def gradients(model: nn.Module, runs: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Of the sum of the runs' losses, all forwards before the one backward."""
    model.zero_grad()
    loss = torch.zeros(())
    for weight, inputs in enumerate(runs, 1):
        loss = loss + weight * model(**inputs)[0].square().mean()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same_gradients(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    assert set(got) == set(want) and got
    for name in want:
        scale = float(want[name].norm()) + 1e-6
        assert float((got[name] - want[name]).norm()) <= tolerance * scale + 1e-8, name


def served(model: nn.Module) -> dict[str, Any]:
    """The processors that accelerate() put in place, by module path."""
    from vdit_fast.models.base import ServedProcessor

    found = {name: getattr(module, "processor", None) for name, module in model.named_modules()}
    return {name: processor for name, processor in found.items() if isinstance(processor, ServedProcessor)}


def processors(model: nn.Module) -> dict[str, Any]:
    return {name: module.processor for name, module in model.named_modules() if hasattr(module, "processor")}


@dataclass(frozen=True, kw_only=True)
class Band(Planner):
    """Video tokens read the keys whose index differs by at most ``width`` + step; text rows and columns are dense."""

    name: ClassVar[str] = "test_band"
    width: int = 6

    def plan(self, q: Tensor, k: Tensor, ctx: LayerContext) -> AttentionPlan:
        self.check_inputs(q, k, ctx)
        assert not q.requires_grad
        seen = ctx.state.setdefault("seen", [])
        seen.append((ctx.layer, ctx.step.step, ctx.step.branch, ctx.step.expert))
        index = torch.arange(ctx.num_tokens)
        mask = (index[:, None] - index).abs() <= self.width + max(ctx.step.step, 0)
        mask[ctx.text_slice] = True
        mask[:, ctx.text_slice] = True
        return AttentionPlan.from_mask(mask, block=(8, 8))
