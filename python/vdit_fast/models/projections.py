"""Projections that diffusers fused into one, and that no longer say what the separate ones say.

``fuse_qkv_projections`` copies weights. An adapter switched on, folded in or trained afterwards reaches the separate
projections only, and every attention module that reads the copy goes on without it, in the stock model too.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FusedProjections"]

_FUSED = (
    ("to_qkv", ("to_q", "to_k", "to_v")),
    ("to_kv", ("to_k", "to_v")),
    ("to_added_qkv", ("add_q_proj", "add_k_proj", "add_v_proj")),
    ("to_added_kv", ("add_k_proj", "add_v_proj")),
)


class FusedProjections:
    """Looks after the fused projections of one transformer."""

    def __init__(self) -> None:
        self._modules: list[tuple[str, weakref.ref[Any]]] | None = None
        self._known: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    def check(self, root: nn.Module) -> None:
        """Raise RuntimeError where a fused projection is stale.

        Cheap while nothing changes; after a change of weights their values are compared once.
        """
        if self._modules is None:
            found = ((name, module) for name, module in root.named_modules() if hasattr(module, "fuse_projections"))
            self._modules = [(name, weakref.ref(module)) for name, module in found]
        for name, reference in self._modules:
            attn = reference()
            if attn is None or not getattr(attn, "fused_projections", False):
                continue
            for fused, separate in _FUSED:
                parts = [getattr(attn, part, None) for part in separate]
                whole = getattr(attn, fused, None)
                if whole is not None and None not in parts:
                    problem = self._problem(whole, parts)
                    if problem is not None:
                        raise RuntimeError(
                            f"{name}.{fused} was fused from {', '.join(separate)}, {problem}; call "
                            "unfuse_qkv_projections() (and, after folding adapters in by fuse_lora(), "
                            "fuse_qkv_projections() again)"
                        )

    def _problem(self, whole: Any, parts: list[Any]) -> str | None:
        if any(_adapted(part) for part in parts):
            return "which now carry active adapters that it leaves out"
        state = [_state(part) for part in (whole, *parts)]
        if self._known.get(whole) == state:
            return None
        for kind in ("weight", "bias"):
            pieces = [getattr(part, kind, None) for part in parts]
            if not _equal(getattr(whole, kind, None), pieces):
                return f"whose {kind} has changed since"
        self._known[whole] = state
        return None


def _adapted(layer: Any) -> bool:
    """Whether a LoRA layer of peft adds something that lies beside the weights."""
    if not hasattr(layer, "base_layer") or getattr(layer, "disable_adapters", False) or getattr(layer, "merged", False):
        return False
    held, scaling = getattr(layer, "lora_A", {}), getattr(layer, "scaling", {})
    return any(name in held and scaling.get(name, 1.0) != 0 for name in getattr(layer, "active_adapters", ()))


def _state(layer: Any) -> Any:
    """What changes with the weights; peft folds adapters in through ``.data``, which leaves no other trace."""
    tensors = (getattr(layer, "weight", None), getattr(layer, "bias", None))
    return [list(getattr(layer, "merged_adapters", ()))] + [
        None if t is None else (id(t), None if t.is_meta else t.data_ptr(), None if t.is_inference() else t._version)
        for t in tensors
    ]


def _equal(whole: Any, pieces: list[Any]) -> bool:
    """Whether one tensor is the others behind each other; True where that cannot be looked at (offloaded, packed)."""
    tensors = [whole, *pieces]
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        return all(tensor is None for tensor in tensors) or whole is not None
    kinds = {(tensor.dtype, tensor.device, tensor.shape[1:]) for tensor in tensors}
    if len(kinds) > 1 or any(tensor.is_meta for tensor in tensors):
        return True
    sizes = [piece.shape[0] for piece in pieces]
    if sum(sizes) != whole.shape[0]:
        return True
    return all(torch.equal(a, b) for a, b in zip(whole.split(sizes), pieces, strict=True))
