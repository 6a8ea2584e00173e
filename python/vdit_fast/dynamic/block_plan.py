"""What DyDiT's routers ask of one block of a model: checked against its modules, then put around them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .layout import Layout
from .standins import AttentionStandIn, LinearStandIn, MlpStandIn, NormStandIn, Place, StandIn, Work

__all__ = ["ATTENTION", "MLP", "TOKENS", "BlockPlan"]

ATTENTION, MLP, TOKENS = "attn_rate.router", "mlp_rate.router", "token_selection.mlp_head"
"""Names of the routers in a block, in the released parameters."""

_ZERO_AT_ZERO = ("GELU", "GEGLU", "SwiGLU", "ApproximateGELU", "LinearActivation")
"""Activations of diffusers that make 0 of a group that is off, as the released code has it."""


class BlockPlan:
    """One block's routers, checked against the block; nothing is changed yet."""

    def __init__(self, path: str, block: nn.Module, routers: Mapping[str, Tensor], layout: Layout) -> None:
        self.path, self.block, self.layout = path, block, layout
        self.heads = self._pair(routers, ATTENTION)
        self.groups = self._pair(routers, MLP)
        first, second = self._pair(routers, f"{TOKENS}.0"), self._pair(routers, f"{TOKENS}.2")
        if (first is None) != (second is None):
            raise ValueError(f"routers: {path}.{TOKENS} needs both of its layers, 0 and 2")
        self.tokens = None if first is None or second is None else (first, second)
        self.any = any(router is not None for router in (self.heads, self.groups, self.tokens))
        if self.heads is not None:
            self._check_attention(len(self.heads[0]) + 1)
        if self.groups is not None or self.tokens is not None:
            self._check_mlp(None if self.groups is None else len(self.groups[0]) + 1)

    def _pair(self, routers: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor | None] | None:
        weight, bias = (routers.get(f"{self.path}.{name}.{leaf}") for leaf in ("weight", "bias"))
        if weight is None:
            if bias is not None:
                raise ValueError(f"routers: {self.path}.{name} has a bias and no weight")
            return None
        if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
            raise ValueError(
                f"routers: {self.path}.{name} has weight {list(weight.shape)} and bias "
                f"{None if bias is None else list(bias.shape)}; expected [out, in] and [out]"
            )
        return weight.detach(), None if bias is None else bias.detach()

    def _linears(self, owner: Any, names: tuple[str, ...]) -> list[nn.Linear]:
        found = []
        for name in names:
            module = owner.get_submodule(name)
            if type(module) is not nn.Linear:
                raise ValueError(
                    f"{self.path}: {name} is a {type(module).__name__}; only plain nn.Linear can be cut: fuse or "
                    "unload adapters, and apply DyDiT before quantisation"
                )
            found.append(module)
        return found

    def _check_attention(self, heads: int) -> None:
        self.attention: Any = self.block.get_submodule(self.layout.attention)
        attn = self.attention
        if heads != attn.heads:
            raise ValueError(
                f"routers: {self.path}.{ATTENTION} decides on {heads} heads, the attention has {attn.heads}"
            )
        if getattr(attn, "fused_projections", False):
            raise ValueError(f"{self.path}: the projections are fused; call unfuse_qkv_projections() first")
        self.projections = self._linears(attn, ("to_q", "to_k", "to_v", "to_out.0"))
        widths = {linear.out_features for linear in self.projections[:3]} | {self.projections[3].in_features}
        if len(widths) != 1:
            raise ValueError(
                f"{self.path}: q, k and v have different widths {sorted(widths)}; grouped heads cannot be cut"
            )
        norms = [getattr(attn, name, None) for name in ("norm_q", "norm_k")]
        sizes = [0 if norm is None else _norm_width(norm) for norm in norms]
        self.across = heads > 1 and widths.pop() in sizes
        self.norms = [norm for norm in norms if norm is not None] if self.across else []

    def _check_mlp(self, groups: int | None) -> None:
        mlp: Any = self.block.get_submodule(self.layout.mlp)
        self.mlp = mlp
        if hasattr(mlp, "net"):
            kind = type(mlp.net[0]).__name__
            if kind not in _ZERO_AT_ZERO:
                raise ValueError(
                    f"{self.path}: the MLP's activation is a {kind}; expected one of {', '.join(_ZERO_AT_ZERO)}"
                )
            self.layers = self._linears(mlp, ("net.0.proj", "net.2"))
        else:
            self.layers = self._linears(mlp, ("fc1", "fc2"))
            act = getattr(mlp, "act", None)
            if act is None or bool(act(torch.zeros(1)).any()):
                raise ValueError(f"{self.path}: the MLP's act must make 0 of 0, as GELU and SiLU do; it is {act}")
        hidden = self.layers[1].in_features
        self.halves = self.layers[0].out_features // hidden
        if groups is not None and hidden % groups:
            raise ValueError(
                f"routers: {self.path}.{MLP} decides on {groups} groups, which do not divide {hidden} channels"
            )

    def attach(self, model: nn.Module, work: Work) -> tuple[Place, list[StandIn], Any]:
        """Put the stand-ins in place."""
        place = Place(self.path, work, root=weakref.ref(model))
        new: list[StandIn] = []
        if self.heads is not None:
            cut = self.projections[2:3] if self.across else self.projections[:3]
            new += [LinearStandIn(linear, place, "heads", into=True) for linear in cut]
            new += [LinearStandIn(self.projections[3], place, "heads", into=False)]
            new += [NormStandIn(norm, place) for norm in self.norms]
            new += [AttentionStandIn(self.attention, place, across=self.across)]
        if self.groups is not None or self.tokens is not None:
            new += [LinearStandIn(self.layers[0], place, "groups", into=True, parts=self.halves)]
            new += [LinearStandIn(self.layers[1], place, "groups", into=False)]
            router = 0 if self.tokens is None else sum(weight.numel() for weight, _ in self.tokens)
            new += [MlpStandIn(self.mlp, place, sum(layer.weight.numel() for layer in self.layers), router)]
        hook = None
        if self.tokens is not None:
            place.token_router = _TokenRouter(*self.tokens)
            hook = self.block.get_submodule(self.layout.norm).register_forward_pre_hook(place.select)
        return place, new, hook


def _norm_width(norm: Any) -> int:
    shape = getattr(norm, "normalized_shape", None)
    if shape is None:
        weight = getattr(norm, "weight", None)
        return 0 if weight is None else int(weight.numel())
    return int(shape) if isinstance(shape, int) else int(torch.Size(shape).numel())


class _TokenRouter:
    """The released router of tokens, by its two layers."""

    def __init__(self, first: tuple[Tensor, Tensor | None], second: tuple[Tensor, Tensor | None]) -> None:
        self.layers = [first, second]

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        for i, (weight, bias) in enumerate(self.layers):
            if weight.device != x.device:
                weight, bias = self.layers[i] = (weight.to(x.device), None if bias is None else bias.to(x.device))
            x = functional.linear(x.to(weight.dtype), weight, bias)
            x = x if i else functional.relu(x)
        return x[..., 0].float().sigmoid() > 0.5
