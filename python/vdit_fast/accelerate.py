"""``accelerate``: one call that makes an existing model use this package's attention."""

from __future__ import annotations

import logging
import os
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from vdit_fast.config import Config
from vdit_fast.handle import Handle, Skipped
from vdit_fast.models.base import ModelAdapter, ServedProcessor, parameter_names, set_processor
from vdit_fast.models.kernels import missing_device_kernel
from vdit_fast.models.linear_layers import convert, linear_maps
from vdit_fast.models.registry import adapter_for, adapters
from vdit_fast.models.session import Session
from vdit_fast.models.tracker import StepTracker
from vdit_fast.root import ATTRIBUTE, Root

__all__ = ["NothingServed", "accelerate", "existing_handles"]

logger = logging.getLogger("vdit_fast")


class NothingServed(RuntimeError):
    """No attention module of the target can be served. The target is as it was.

    Attributes:
        components: what was looked into, name -> class name; the name of a lone module is empty.
        skipped: the attention modules that were found, each with its path, processor class and reason.
    """

    def __init__(self, message: str, components: dict[str, str], skipped: tuple[Skipped, ...]) -> None:
        super().__init__(message)
        self.components = components
        self.skipped = skipped

    def __reduce__(self) -> tuple[Any, ...]:  # an exception of several arguments is not pickled by itself
        return type(self), (str(self), self.components, self.skipped)


@dataclass(frozen=True)
class _Found:
    """An attention module that can be served."""

    root: nn.Module
    root_path: str
    hooked: bool
    name: str
    module: nn.Module
    adapter: ModelAdapter


def accelerate(target: Any, config: Config | str | os.PathLike[str] | Mapping[str, Any] = "exact") -> Handle:
    """Make the self/joint attention of a video diffusion transformer run through this package.

    Args:
        target: a diffusers pipeline (all its transformers, e.g. both experts of Wan 2.2), a transformer, any
            ``nn.Module`` that contains one, or an object whose attributes are modules.
        config: a ``Config``, a preset (``"exact"``, ``"balanced"``, ``"fast"``), the path of a YAML/JSON file, or
            a mapping.

    Returns:
        The handle: ``report()``, ``stats()``, ``remove()``. The model keeps it alive. A second call with an equal
        configuration returns the same handle.

    Raises:
        NothingServed: nothing can be served, for example in a model of an unknown class; it lists what was found.
        RuntimeError: the model is already accelerated with another configuration (``handle.reconfigure`` or
            ``remove`` first), or ``on_unsupported="error"`` and a module of a known family cannot be served.
        TypeError, ValueError: a target or configuration of the wrong kind, or feature maps of another model.
    """
    settings = Config.of(config)
    components = _components(target)
    known = _existing(components)
    found, skipped = _search(components, settings)
    if known:
        return _reuse(known, settings, found)
    if not found:
        raise _nothing_served(components, skipped)

    tracker = StepTracker(None if isinstance(target, nn.Module) else target)
    tracker.calls_per_branch = any(item.adapter.calls_per_branch for item in found)
    handle = Handle(settings, tracker)
    handle.skipped = skipped
    roots: dict[int, Root] = {}
    single = len({id(item.root) for item in found}) == 1
    for item in found:
        root = roots.get(id(item.root))
        if root is None:
            expert = "transformer" if single else item.root_path or "transformer"
            root = Root(item.root, Session(settings, tracker, expert, item.adapter.family), item.adapter, handle)
            if item.hooked:
                root.hook()
            roots[id(item.root)] = root
        stock = item.module.processor
        own_linear = item.adapter.processors[type(stock).__name__].linear
        layer = root.session.add_layer(item.name, item.adapter.dense_reason(item.name, item.module), own_linear)
        set_processor(item.module, item.adapter.make_processor(root.session, layer, stock, weakref.ref(item.root)))
    try:
        maps = linear_maps([root.session for root in roots.values()], settings)
        for root, found_maps in zip(roots.values(), maps, strict=True):
            root.check(settings)
            convert(root.session, found_maps)
            root.fuse()
            root.wrap()
    except Exception:
        handle.remove()
        raise
    counts = Counter(item.adapter.family for item in found)
    logger.info(
        "vdit_fast: serving %s; %d attention modules left alone",
        ", ".join(f"{number} {family} layers" for family, number in counts.items()),
        len(skipped),
    )
    return handle


def _components(target: Any) -> dict[str, nn.Module]:
    """The modules to look into, by name; the name of a lone module is empty."""
    if isinstance(target, nn.Module):
        return {"": target}
    parts = getattr(target, "components", None)
    if not isinstance(parts, Mapping):
        parts = getattr(target, "__dict__", {})
    modules = {str(name): part for name, part in parts.items() if isinstance(part, nn.Module)}
    if not modules:
        raise TypeError(
            f"target must be a diffusers pipeline, a transformer or an nn.Module, got {type(target).__name__} "
            "without any module in it"
        )
    return modules


def existing_handles(target: Any) -> list[Handle]:
    """Handles of the transformers in a target that are accelerated already."""
    return _existing(_components(target))


def _existing(components: Mapping[str, nn.Module]) -> list[Handle]:
    """Handles of transformers that are accelerated already, without repetition."""
    handles: list[Handle] = []
    for component in components.values():
        for module in component.modules():
            root = module.__dict__.get(ATTRIBUTE)
            processor = getattr(module, "processor", None)
            if root is None and isinstance(processor, ServedProcessor) and processor.session.active:
                owner = processor.root()  # only a part of an accelerated transformer is looked at
                root = owner.__dict__.get(ATTRIBUTE) if owner is not None else None
            if root is not None and root.session.active and root.handle not in handles:
                handles.append(root.handle)
    return handles


def _reuse(known: list[Handle], settings: Config, found: list[_Found]) -> Handle:
    if len(known) > 1 or found:
        raise RuntimeError(
            "parts of this target are already accelerated separately; call remove() on their handles first, "
            "then accelerate the whole"
        )
    handle = known[0]
    if handle.config != settings:
        old, new = handle.config.to_dict(), settings.to_dict()
        changes = ", ".join(f"{key} is {old[key]!r}, not {new[key]!r}" for key in old if old[key] != new[key])
        raise RuntimeError(
            f"this model is already accelerated with another configuration ({changes}); "
            "call reconfigure(config) or remove() on its handle (accelerate with the old configuration returns it)"
        )
    return handle


def _attention_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """(path, module, processor) of everything that looks like diffusers attention."""
    for name, child in module.named_modules():
        processor = getattr(child, "processor", None)
        if callable(processor) and (hasattr(child, "set_processor") or hasattr(child, "heads")):
            yield name, child, processor


def _root_of(component: nn.Module, path: str) -> tuple[nn.Module, str, bool]:
    """(transformer, its path, whether it takes a timestep): the outermost module on the path with such a forward."""
    module, walked = component, ""
    for part in ["", *path.split(".")]:
        if part:
            module = getattr(module, part)
            walked = f"{walked}.{part}" if walked else part
        names = parameter_names(type(module).forward)
        if "timestep" in names and ("hidden_states" in names or "sample" in names):
            return module, walked, True
    return component, "", False


def _search(components: Mapping[str, nn.Module], settings: Config) -> tuple[list[_Found], list[Skipped]]:
    found: list[_Found] = []
    skipped: list[Skipped] = []
    for component, whole in components.items():
        for path, module, processor in _attention_modules(whole):
            full = ".".join(part for part in (component, path) if part)
            kind = type(processor).__name__
            if isinstance(processor, ServedProcessor):
                if processor.session.active:
                    continue
                skipped.append(Skipped(full, kind, "the processor of a removed acceleration was set again"))
                continue
            adapter = adapter_for(processor)
            if adapter is None:
                skipped.append(Skipped(full, kind, f"processor {kind} is not of a known family"))
                continue
            root, root_path, hooked = _root_of(whole, path)
            name = path[len(root_path) + 1 :] if root_path else path
            reason = (
                adapter.left_alone.get(kind)
                or adapter.root_reason(root, module, processor)
                or adapter.skip_reason(name, module, processor)
            )
            if reason is None:
                reason = _device_reason(module)
                if reason is not None and settings.on_unsupported == "error":
                    raise RuntimeError(f"{full} cannot be served: {reason}; on_unsupported='dense' leaves it alone")
            if reason is not None:
                skipped.append(Skipped(full, kind, reason))
                continue
            place = ".".join(part for part in (component, root_path) if part)
            found.append(_Found(root, place, hooked, name, module, adapter))
    return found, skipped


def _device_reason(module: nn.Module) -> str | None:
    parameter = next(module.parameters(), None)
    # Offloaded weights lie on "meta" or on the CPU until they are used; the call itself checks again.
    if parameter is None or parameter.device.type == "meta":
        return None
    return missing_device_kernel(parameter.device.type)


def _nothing_served(components: Mapping[str, nn.Module], skipped: list[Skipped]) -> NothingServed:
    kinds = {name: type(module).__name__ for name, module in components.items()}
    looked = ", ".join(f"{name or 'target'} ({kind})" for name, kind in kinds.items())
    reasons = Counter((item.processor, item.reason) for item in skipped)
    listed = "; ".join(f"{number} x {kind}: {reason}" for (kind, reason), number in reasons.most_common())
    known = ", ".join(sorted({adapter.family for adapter in adapters()}))
    return NothingServed(
        f"no attention module can be served in {looked}. Found: {listed or 'no attention modules with a processor'}. "
        f"Known families: {known}. vdit_fast.patch_sdpa(module) serves the scaled_dot_product_attention calls of any "
        "module, densely",
        kinds,
        tuple(skipped),
    )
