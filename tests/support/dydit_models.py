"""Tiny models of diffusers with DyDiT's routers, and the same models with masks instead of skipping."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, relu

EMBEDDERS = {
    "wan": "condition_embedder.time_embedder",
    "allegro": "adaln_single.emb.timestep_embedder",
    "latte": "adaln_single.emb.timestep_embedder",
}
FAMILIES = list(EMBEDDERS)
GROUPS = 4
KINDS = ("attn_rate", "mlp_rate", "token_selection")
Routers = dict[str, Tensor]


def blocks(model: nn.Module, family: str) -> dict[str, tuple[Any, Any, Any]]:
    """(attention, MLP, norm before the MLP) by block path."""
    names = {"wan": ["blocks"], "allegro": ["transformer_blocks"]}
    names["latte"] = ["transformer_blocks", "temporal_transformer_blocks"]
    found = {}
    for name in names[family]:
        for i, block in enumerate(getattr(model, name)):
            parts = (block.ffn, block.norm3) if family == "wan" else (block.ff, block.norm2)
            found[f"{name}.{i}"] = (block.attn1, *parts)
    return found


def draw(model: nn.Module, family: str, *kinds: str, seed: int = 5) -> Routers:
    """Random routers of these kinds (all by default) for every block: about half of the units and tokens are on."""
    random, found = torch.Generator().manual_seed(seed), {}
    for path, (attn, mlp, _) in blocks(model, family).items():
        dim = mlp.net[2].out_features
        small = max(1, dim // 16)
        shapes = {"attn_rate.router": (attn.heads - 1, dim), "mlp_rate.router": (GROUPS - 1, dim)}
        shapes |= {"token_selection.mlp_head.0": (2 * small, dim), "token_selection.mlp_head.2": (1, 2 * small)}
        for part, shape in shapes.items():
            if kinds and part.split(".")[0] not in kinds:
                continue
            weight = 3 * torch.randn(shape, generator=random)
            if part.endswith("head.2"):  # the hidden values are not negative: as many for as against
                weight = weight.abs() * (1 - 2 * (torch.arange(shape[1]) % 2))
            found[f"{path}.{part}.weight"] = weight
            found[f"{path}.{part}.bias"] = 0.3 * torch.randn(shape[0], generator=random)
    return found


def always(routers: Routers, on: float = 9.0) -> Routers:
    """Routers that turn everything on, or all but the first unit off."""
    return {name: torch.full_like(x, on if name.endswith("bias") else 0.0) for name, x in routers.items()}


@contextmanager
def masked(model: nn.Module, family: str, routers: Routers) -> Iterator[dict[str, Any]]:
    """The model computes everything and multiplies by the masks. Yields what the last forward decided."""
    decided: dict[str, Any] = {}
    hooks = []

    def width(path: str, kind: str) -> Tensor | None:
        weight = routers.get(f"{path}.{kind}.router.weight")
        if weight is None:
            return None
        logits = linear(decided["embedding"].float(), weight, routers[f"{path}.{kind}.router.bias"])
        return torch.cat([torch.ones(len(logits), 1), (logits.sigmoid() > 0.5).float()], 1)

    def mask_input(path: str, kind: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Tensor]) -> Any:
            mask = width(path, kind)
            if mask is None:
                return None
            decided[f"{path}.{kind}"] = mask
            mask = mask.repeat_interleave(args[0].shape[0] // len(mask), 0)[:, None, :, None]
            return ((args[0].unflatten(-1, (mask.shape[2], -1)) * mask).flatten(-2),)

        return hook

    def select(path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Tensor]) -> None:
            name = f"{path}.token_selection.mlp_head"
            hidden = relu(linear(args[0], routers[f"{name}.0.weight"], routers[f"{name}.0.bias"]))
            logits = linear(hidden, routers[f"{name}.2.weight"], routers[f"{name}.2.bias"])
            decided[f"{path}.token_selection"] = logits.sigmoid() > 0.5

        return hook

    def mask_output(path: str) -> Callable[..., Any]:
        return lambda module, args, out: out * decided[f"{path}.token_selection"]

    def embedded(module: nn.Module, args: Any, out: Tensor) -> None:
        decided["embedding"] = out

    hooks.append(model.get_submodule(EMBEDDERS[family]).register_forward_hook(embedded))
    for path, (attn, mlp, norm) in blocks(model, family).items():
        hooks.append(attn.to_out[0].register_forward_pre_hook(mask_input(path, "attn_rate")))
        hooks.append(mlp.net[2].register_forward_pre_hook(mask_input(path, "mlp_rate")))
        if f"{path}.token_selection.mlp_head.0.weight" in routers:
            hooks.append(norm.register_forward_pre_hook(select(path)))
            hooks.append(mlp.register_forward_hook(mask_output(path)))
    try:
        yield decided
    finally:
        for hook in hooks:
            hook.remove()


def flop(model: nn.Module, family: str, decided: dict[str, Any], shapes: dict[str, torch.Size]) -> tuple[float, float]:
    """(dense, executed) of attention, MLP and token routers, from what was decided and the inputs of the MLPs."""
    dense = done = 0.0
    for path, (attn, mlp, _) in blocks(model, family).items():
        batch, n, dim = shapes[path]
        inner, hidden = attn.to_v.weight.shape[0], mlp.net[2].in_features
        heads, groups = (_share(decided.get(f"{path}.{kind}")) for kind in ("attn_rate", "mlp_rate"))
        if f"{path}.attn_rate" in decided:
            one, scores = 2 * batch * n * dim * inner, 4 * batch * n * n * inner
            dense += 4 * one + scores
            done += (2 + 2 * heads if family == "wan" else 4 * heads) * one + heads * scores
        selected = decided.get(f"{path}.token_selection")
        if f"{path}.mlp_rate" in decided or selected is not None:
            rows = batch * n if selected is None else int(selected.sum())
            dense += 4 * batch * n * dim * hidden
            done += 4 * rows * dim * hidden * groups
        if selected is not None:
            done += 2 * batch * n * (dim + 1) * 2 * max(1, dim // 16)
    return dense, done


def _share(mask: Tensor | None) -> float:
    return 1.0 if mask is None else float((mask.amax(0)).mean())
