"""Tiny random diffusers transformers with inputs, and a simple planner, for the accelerate tests."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from families import BUILDERS
from families.allegro import rope as allegro_rope
from families.base import Built
from families.cogvideox import cogvideox as cogvideox
from families.hunyuan_video import hunyuan as hunyuan
from families.wan import wan as wan
from torch import Tensor, nn

from vdit_fast.context import LayerContext
from vdit_fast.plan import AttentionPlan
from vdit_fast.planners.base import Planner


def build(family: str, **kw: Any) -> Built:
    return BUILDERS[family](**kw)


WITHOUT_GRID = frozenset({"animatediff", "latte", "svd"})
"""Families whose attention runs over frames or places only: no planner is ever asked about them."""
LINEAR = frozenset({"sana", "sana_video"})
"""Families whose attention is linear by itself: no planner is asked about them either."""


def regrid(inputs: dict[str, Any], grid: tuple[int, int, int]) -> dict[str, Any]:
    """The same kind of inputs for another grid of tokens (frames, height, width)."""
    frames, height, width = grid
    latents, timestep = inputs["hidden_states"], inputs["timestep"]
    batch, size = latents.shape[0], (2 * height, 2 * width)
    new, rope = dict(inputs), inputs.get("image_rotary_emb")
    if "num_frames" in inputs:  # LTX: tokens, and their grid in words
        new["hidden_states"] = torch.randn(batch, frames * height * width, latents.shape[2])
        new |= {"num_frames": frames, "height": height, "width": width}
    elif rope is not None and isinstance(rope[0], tuple):  # Allegro: tables per axis
        new["hidden_states"] = torch.randn(batch, latents.shape[1], frames, *size)
        new["image_rotary_emb"] = allegro_rope(grid, 24)
        if inputs.get("attention_mask") is not None:
            new["attention_mask"] = torch.ones(batch, frames, *size)
    elif "image_rotary_emb" in inputs:  # CogVideoX: frames before channels
        from diffusers.models.embeddings import get_3d_rotary_pos_embed

        new["hidden_states"] = torch.randn(batch, frames, latents.shape[2], *size)
        if rope is not None:
            new["image_rotary_emb"] = get_3d_rotary_pos_embed(16, ((0, 0), (height, width)), (height, width), frames)
    else:
        new["hidden_states"] = torch.randn(batch, latents.shape[1], frames, *size)
    if timestep.ndim == 2:
        new["timestep"] = torch.full((batch, frames * height * width), 500.0)
        new["timestep"][:, : height * width] = 0
    return new


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Floating inputs in ``dtype``; timesteps and RoPE tables stay as they are, like in the pipelines."""
    keep = {"timestep", "image_rotary_emb"}
    if "encoder_attention_mask_2" in inputs:  # HunyuanVideo-1.5 takes the timestep in the model's dtype
        keep.remove("timestep")
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


def double(model: nn.Module) -> nn.Module:
    """A copy in double precision."""
    new = copy.deepcopy(model).double()
    if hasattr(new, "learnable_pos_embed") and new.learnable_pos_embed is not None:
        new.learnable_pos_embed.float()  # Cosmos norms it in single precision and refuses more
    return new


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
