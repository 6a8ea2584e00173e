"""DyDiT on a model of diffusers: put around the attention and the MLP of its blocks, and taken off again.

Dynamic Diffusion Transformer (arXiv 2410.03456) and DyDiT++ (arXiv 2504.06803).
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vdit_fast.models.base import parameter_names
from vdit_fast.models.tracker import StepTracker

from .block_plan import ATTENTION, MLP, TOKENS, BlockPlan
from .layout import LAYOUTS, Layout
from .routers import Masks, width_masks
from .standins import Work
from .units import Units

__all__ = ["DyDiTHandle", "apply_dydit"]


_LAYERS = (ATTENTION, MLP, f"{TOKENS}.0", f"{TOKENS}.2")
_PARTS = [f"{layer}.{leaf}" for layer in _LAYERS for leaf in ("weight", "bias")]
_ATTRIBUTE = "_vdit_fast_dydit"


def apply_dydit(
    model: nn.Module, routers: Mapping[str, Tensor], *, pipe: Any = None, layout: Layout | None = None
) -> DyDiTHandle:
    """Let a model's blocks compute only the heads, hidden groups and tokens that DyDiT's routers choose.

    Heads and hidden groups follow from the timestep embedding: they are decided once per forward for all blocks, with
    one host read, or with none for timesteps seen before or given to ``DyDiTHandle.precompute``. Weights are cut to
    what is on. Tokens are decided per block, on the device. What is off counts as 0, as in the released code: an
    attention head's output, a hidden group, the MLP of a token. Where everything is on, the model's own modules run
    and the result is the same bit for bit.

    Modules are called, hooks and classes stay. Projections must be plain ``nn.Linear``. No gradient reaches the
    routers; it does reach the model.

    Args:
        model: a transformer of diffusers (Wan, Allegro, Latte), or any with a ``layout``: attention with ``to_q``,
            ``to_k``, ``to_v``, ``to_out`` and ``heads``, an MLP with ``net`` (diffusers) or ``fc1``, ``fc2``.
        routers: released parameters by name, ``<block path>.`` and one of ``attn_rate.router.weight`` [H - 1, C],
            ``mlp_rate.router.weight`` [groups - 1, C], ``token_selection.mlp_head.{0,2}.weight``, or ``.bias`` of
            these. A block without one of the three routers is dense in that respect.
        pipe: the model's pipeline, by whose scheduler timesteps on a GPU are told apart without a host read.
        layout: for models that this package does not know.

    Raises:
        ValueError: an unknown model or name, shapes that do not fit, a module that cannot be cut; nothing is changed.
    """
    if _ATTRIBUTE in model.__dict__:
        raise ValueError(f"DyDiT is applied to this {type(model).__name__} already; call remove() on its handle first")
    layout = layout or LAYOUTS.get(type(model).__name__)
    if layout is None:
        raise ValueError(
            f"apply_dydit does not know {type(model).__name__} (it knows {', '.join(LAYOUTS)}); pass layout"
        )
    paths: dict[str, nn.Module] = {}
    for name in layout.blocks:
        for i, block in model.get_submodule(name).named_children():
            paths[f"{name}.{i}"] = block
    known = {f"{path}.{part}": path for path in paths for part in _PARTS}
    for name in routers:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise ValueError(
                f"routers: {name!r} is no router's parameter" + (f"; did you mean {near[0]!r}?" if near else "")
            )
    if not routers:
        raise ValueError(f"routers is empty; expected names such as {next(iter(known))!r}")
    plans = [BlockPlan(path, block, routers, layout) for path, block in paths.items()]
    return DyDiTHandle(model, layout, [plan for plan in plans if plan.any], pipe)


def _state(module: nn.Module) -> list[Any]:
    """What changes with a module's weights."""
    return [(p.dtype, p.device.type, None if p.is_inference() else p._version) for p in module.parameters()]


class _Removed:
    """What a handle is in a pickle, where the model is the stock one."""

    def remove(self) -> None:
        return None

    def _begin(self, *_: Any) -> None:
        return None

    _embedded = _begin


class DyDiTHandle:
    """DyDiT applied to one model; ``remove()`` gives the stock model back. A context manager removes it at the end."""

    def __init__(self, model: nn.Module, layout: Layout, plans: list[BlockPlan], pipe: Any) -> None:
        self.work = Work()
        self.host_reads = 0
        self.forwards = 0
        self._model, self._layout = model, layout
        self._tracker = StepTracker(pipe)
        self._names = parameter_names(type(model).forward)
        self._known: dict[float, list[Masks]] = {}
        self._embedder_state = _state(model.get_submodule(layout.embedder))
        self._key: float | None = None
        self._decided = False
        self._routers = [r for plan in plans for r in (plan.heads, plan.groups) if r is not None]
        self._places, self._stand_ins, self._hooks = [], [], []
        for plan in plans:
            place, stand_ins, hook = plan.attach(model, self.work)
            self._places.append((place, plan.heads is not None, plan.groups is not None))
            self._stand_ins += stand_ins
            self._hooks += [hook] if hook is not None else []
        self._hooks.append(model.register_forward_pre_hook(self._begin, with_kwargs=True))
        self._hooks.append(model.get_submodule(layout.embedder).register_forward_hook(self._embedded))
        object.__setattr__(model, _ATTRIBUTE, self)

    def __deepcopy__(self, memo: dict[int, Any]) -> DyDiTHandle:
        # Of a copied model: the same routers, its own records.
        new = object.__new__(DyDiTHandle)
        memo[id(self)] = new
        new.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        for place, _, _ in new._places:
            place.work = new.work
        return new

    def __reduce__(self) -> Any:
        return _Removed, ()

    def __enter__(self) -> DyDiTHandle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def remove(self) -> None:
        """The stock model again."""
        for place, _, _ in self._places:
            place.active = False
        for hook in self._hooks:
            hook.remove()
        for stand_in in reversed(self._stand_ins):
            stand_in.detach()
        self._model.__dict__.pop(_ATTRIBUTE, None)

    @torch.no_grad()
    def precompute(self, timesteps: Tensor) -> None:
        """Decide the width at every timestep of a schedule ``[S]`` beforehand, with one host read.

        The masks are those that the forwards would decide on. Call it again after the timestep embedder has changed;
        what was known is forgotten.

        Args:
            timesteps: as the model gets them: with their dtype, on its device.
        """
        if timesteps.dim() != 1:
            raise ValueError(f"precompute: timesteps has shape {list(timesteps.shape)}; expected [S]")
        embedder = self._model.get_submodule(self._layout.embedder)
        projection = self._model.get_submodule(self._layout.projection)
        self._embedder_state = _state(embedder)
        dtype = next(embedder.parameters()).dtype
        self._decided = True  # not a forward of the model: the embedder's hook has nothing to do
        # one by one, as a forward embeds its timestep: a product's bits may depend on the batch
        rows = [embedder(projection(timestep[None]).to(dtype))[0] for timestep in timesteps]
        self.host_reads += 2 * int(timesteps.device.type != "cpu")
        found = width_masks(self._on(rows[0].device), torch.stack(rows)) if rows else []
        self._known = {float(t): [masks] for t, masks in zip(timesteps.tolist(), found, strict=True)}

    def report(self) -> dict[str, Any]:
        """What was done: ``forwards``, ``host_reads``, ``blocks`` served, ``flop`` executed and ``dense_flop`` of the
        routed layers (attention with its projections, MLP, token routers), and ``weight_bytes`` of cut weights."""
        return {
            "blocks": len(self._places),
            "forwards": self.forwards,
            "host_reads": self.host_reads,
            "flop": self.work.done,
            "dense_flop": self.work.dense,
            "weight_bytes": sum(parts.bytes for place, _, _ in self._places for parts in place.parts),
        }

    # ------------------------------------------------------------------ one forward
    @torch.compiler.disable
    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.forwards += 1
        if torch.is_grad_enabled():
            self.work.recorded = 1 if self.work.replayed else self.work.recorded + 1
            self.work.replayed = False
        state = _state(model.get_submodule(self._layout.embedder))
        if state != self._embedder_state:  # other embeddings, other widths
            self._known.clear()
            self._embedder_state = state
        timestep = (dict(zip(self._names, args, strict=False)) | kwargs).get("timestep")
        self._key = self._key_of(timestep) if self._routers else None
        found = self._known.get(self._key) if self._key is not None else None
        self._decided = found is not None or not self._routers
        if found is not None:
            self._set(found, torch.device("cpu"))

    @torch.compiler.disable
    def _embedded(self, embedder: nn.Module, args: tuple[Any, ...], embedding: Tensor) -> None:
        if self._decided:
            return
        found = width_masks(self._on(embedding.device), embedding)
        self.host_reads += int(embedding.device.type != "cpu")
        if self._key is not None:
            found = found[:1]
            self._known[self._key] = found
        self._set(found, embedding.device)
        self._decided = True

    def _on(self, device: torch.device) -> list[tuple[Tensor, Tensor | None]]:
        if any(weight.device != device for weight, _ in self._routers):
            self._routers = [(w.to(device), None if b is None else b.to(device)) for w, b in self._routers]
        return self._routers

    def _key_of(self, timestep: Any) -> float | None:
        """The one timestep of a forward where the host knows it, None where items differ or only the device knows."""
        if not isinstance(timestep, Tensor):
            return None if timestep is None else float(timestep)
        if timestep.device.type == "cpu":
            values = timestep.reshape(-1)
            return float(values[0]) if len(values) and bool((values == values[0]).all()) else None
        if self._tracker.pipe is None:
            return None
        before = self._tracker.host_reads
        value = self._tracker.observe(timestep).timestep
        self.host_reads += self._tracker.host_reads - before
        return value if self._tracker.host_reads == before else None

    def _set(self, items: list[Masks], device: torch.device) -> None:
        """``items``: for every batch item the masks of all routers, one for all of them."""
        columns = iter(zip(*items, strict=True))
        for place, heads, groups in self._places:
            place.heads = Units.of(next(columns), device) if heads else None
            place.groups = Units.of(next(columns), device) if groups else None
