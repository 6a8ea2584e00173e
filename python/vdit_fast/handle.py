"""The object ``accelerate`` returns: what is served and why not, what ran, and the way back."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn

from vdit_fast.caching.engine import CachedForward
from vdit_fast.config import Config
from vdit_fast.models import text_kv
from vdit_fast.models.base import ModelAdapter, ServedProcessor, parameter_names, set_processor
from vdit_fast.models.fusion import attach, detach
from vdit_fast.models.rotary import PositionFn
from vdit_fast.models.served import begin_forward
from vdit_fast.models.session import Session
from vdit_fast.models.tracker import StepTracker
from vdit_fast.summary import collect_stats, report_text

__all__ = ["ATTRIBUTE", "Handle", "Root", "Skipped", "set_processor"]

ATTRIBUTE = "_vdit_fast_root"
"""Name under which a transformer keeps its ``Root``, and by it the handle, alive."""


NO_TEXT_KV = "text_kv: no cross-attention whose keys are known to depend on the text only"
NO_STEPS = "a part without a forward of hidden_states and timestep has no steps"


@dataclass(frozen=True)
class Skipped:
    """An attention module that is left alone."""

    name: str
    processor: str
    reason: str


class _BeforeForward:
    """Forward pre-hook of a transformer: tells the session where the forward is."""

    def __init__(self, session: Session, adapter: ModelAdapter, names: tuple[str, ...]) -> None:
        self.session = session
        self.adapter = adapter
        self.names = names

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self.session.active:
            return None
        previous = self.session.forward
        if self.session.config.cache is not None and previous is not None and not previous.cached:
            # Whoever wrapped `forward` earlier has put its own back (offloading does after every run): wrap again.
            CachedForward(module, self.session).attach()
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        timestep = arguments.get("timestep")
        new = {} if torch.compiler.is_compiling() else self.adapter.simplify(module, arguments)
        noted = begin_forward(self.session, timestep, self.adapter.geometry(module, arguments))
        if self.session.text is not None and not torch.compiler.is_compiling():
            self.session.text.note(self.session.forward, arguments)
        if noted is not timestep:
            new["timestep"] = noted
        if not new:
            return None
        for name, value in new.items():
            if name in kwargs:
                kwargs = kwargs | {name: value}
            else:
                at = self.names.index(name)
                args = (*args[:at], value, *args[at + 1 :])
        return args, kwargs

    def __deepcopy__(self, memo: dict[int, Any]) -> _BeforeForward:
        return _BeforeForward(copy.deepcopy(self.session, memo), self.adapter, self.names)

    def __reduce__(self) -> Any:
        return _idle_hook, ()


def _idle(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    return None


def _idle_hook() -> Any:
    """What a hook is in a pickle: a pickled model is the stock one."""
    return _idle


def _nothing() -> None:
    return None


class Root:
    """One accelerated transformer, or a part of one that has no forward with a timestep above it."""

    def __init__(self, module: nn.Module, session: Session, adapter: ModelAdapter, handle: Handle) -> None:
        self.module = weakref.ref(module)
        self.session = session
        self.adapter = adapter
        self.handle = handle
        self.hooked = False
        object.__setattr__(module, ATTRIBUTE, self)
        handle.roots.append(self)

    def hook(self) -> None:
        """Attach the pre-hook that reads geometry and timestep."""
        module = self.module()
        assert module is not None
        hook = _BeforeForward(self.session, self.adapter, parameter_names(type(module).forward))
        module.register_forward_pre_hook(hook, with_kwargs=True)
        self.hooked = True

    def fuse(self) -> None:
        """Give the blocks that the family knows their fused forwards."""
        module = self.module()
        assert module is not None
        attach(module, self.session, self.adapter.blocks)

    def wrap(self) -> None:
        """Put in place what works around the attention as the configuration says: the cache of the output, the memory
        of the text's keys and values."""
        module = self.module()
        if module is None:
            return
        self.unwrap(module)
        if self.session.config.cache is not None and self.hooked:
            CachedForward(module, self.session).attach()
        text_kv.detach(module, self.session)
        if self.session.config.text_kv and self.hooked:
            text_kv.attach(module, self.session, self.adapter)

    def unwrap(self, module: nn.Module) -> None:
        """Take this session's wrapper off, where it is the outermost one; elsewhere it passes calls through."""
        wrapper = module.__dict__.get("forward")
        if isinstance(wrapper, CachedForward) and wrapper.of(self.session):
            wrapper.detach()

    def check_cache(self, config: Config) -> None:
        """Raise where the configuration wants a cache that cannot work, and wants to know."""
        if config.cache is not None and not self.hooked and config.on_unsupported == "error":
            raise RuntimeError(f"cache: {NO_STEPS}; accelerate the whole transformer, or set cache to null")

    def processors(self) -> dict[str, ServedProcessor]:
        """This session's processors that are in place, by module path."""
        module = self.module()
        found = {}
        for name, child in module.named_modules() if module is not None else ():
            processor = getattr(child, "processor", None)
            if isinstance(processor, ServedProcessor) and processor.session is self.session:
                found[name] = processor
        return found

    def remove(self) -> None:
        """Put the stock processors back and take the hook off."""
        processors = self.processors()
        self.session.active = False
        module = self.module()
        if module is None:
            return
        for name, processor in processors.items():
            set_processor(module.get_submodule(name), processor.stock)
        self.unwrap(module)
        detach(module, self.session)
        self.session.cache.forget()
        text_kv.detach(module, self.session)
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, _BeforeForward) and hook.session is self.session:
                module._forward_pre_hooks.pop(key)
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        if module.__dict__.get(ATTRIBUTE) is self:
            del module.__dict__[ATTRIBUTE]

    def __deepcopy__(self, memo: dict[int, Any]) -> Root | None:
        module = self.module()
        if module is None or id(module) not in memo:
            return None
        handle = copy.deepcopy(self.handle, memo)
        # The root of a copy enters the copied handle by itself: a pipeline's second transformer is copied later.
        new = Root(memo[id(module)], copy.deepcopy(self.session, memo), self.adapter, handle)
        new.hooked = self.hooked
        memo[id(self)] = new
        return new

    def __reduce__(self) -> Any:
        return _nothing, ()


class Handle:
    """What ``accelerate`` did to a model. The model keeps it alive; it refers to the model weakly.

    Usable as a context manager that removes itself. A deep copy of an accelerated model has its own handle
    (``accelerate`` on the copy with the same configuration returns it).
    """

    def __init__(self, config: Config, tracker: StepTracker) -> None:
        self._config = config
        self._tracker = tracker
        self.roots: list[Root] = []
        self.skipped: list[Skipped] = []

    @property
    def config(self) -> Config:
        """The configuration in use."""
        return self._config

    @property
    def active(self) -> bool:
        """False after ``remove``."""
        return any(root.session.active for root in self.roots)

    @property
    def modules(self) -> list[nn.Module]:
        """The accelerated transformers that still exist."""
        return [module for module in (root.module() for root in self.roots) if module is not None]

    @property
    def host_reads(self) -> int:
        """How often the timestep or its schedule was read from device memory."""
        return self._tracker.host_reads

    def setting_notes(self) -> dict[str, int]:
        """Settings made on the model that change what runs, with the number of layers they concern."""
        notes: Counter[str] = Counter()
        for root in self.roots:
            processors = [processor for processor in root.processors().values() if processor.attends]
            for processor in processors:
                if processor._parallel_config is not None:
                    notes["context parallelism is enabled, the stock processor runs"] += 1
                elif processor._attention_backend is not None:
                    notes["an attention backend is set, served layers do not use it"] += 1
            if self._config.cache is not None and not root.hooked:
                notes[f"no cache: {NO_STEPS}"] += len(root.session.layers)
            if self._config.text_kv and root.session.active and root.session.text is None:
                notes[NO_TEXT_KV] += len(root.session.layers)
            replaced = len(root.session.layers) - len(processors)
            if root.session.active and root.module() is not None and replaced:
                notes["the processor was replaced by another one after accelerate()"] += replaced
        return dict(notes)

    def reconfigure(self, config: Any) -> Handle:
        """Use another configuration from the next call on; takes what ``accelerate`` takes. Returns this handle."""
        settings = Config.of(config)
        for root in self.roots:
            root.check_cache(settings)
        self._config = settings
        for root in self.roots:
            root.session.reconfigure(self._config)
            root.wrap()
        return self

    def positions(self, fn: PositionFn | None) -> Handle:
        """Exchange the rotary position tables that the transformers make, from the next forward on.

        Args:
            fn: ``fn(step, geometry, (cos, sin))``, called once per forward with the ``StepContext``, the ``Geometry``
                and the model's own tables. It returns the (cos, sin) to use, of the same shape up to dimensions of
                size 1, or None for the model's own. It must not read device values on the host. None switches it off.

        Returns:
            this handle; ``stats()["positions"]`` counts the forwards whose tables were exchanged.

        Raises:
            TypeError: ``fn`` cannot be called.
            RuntimeError: no served layer of a transformer takes positions; here, or at a call whose step, grid or
                tables are unknown.
        """
        if fn is not None and not callable(fn):
            raise TypeError(f"positions: pass a function of (step, geometry, tables) or None, got {type(fn).__name__}")
        for root in self.roots if fn is not None else ():
            processors = root.processors().values()
            if root.module() is not None and not any(processor.takes_positions for processor in processors):
                raise RuntimeError(f"positions: no served layer of family {root.adapter.family!r} takes rotary tables")
        for root in self.roots:
            root.session.positions = fn
            root.session.repositioned.clear()
        return self

    def reset(self) -> None:
        """The next forward begins a new generation, whatever its timestep."""
        self._tracker.reset()

    def report(self) -> str:
        """Plain text: what is served, what is left alone and why, what ran dense and why, densities and times."""
        return report_text(self)

    def stats(self) -> dict[str, Any]:
        """The same as numbers; JSON-ready.

        Keys: ``config`` (dict), ``digest``, ``generations``, ``steps`` (most distinct steps in one generation),
        ``forwards``, ``host_reads``, ``cache`` (None, or the policy's ``full``: reason -> forwards, ``forecast``:
        step -> forwards, ``nbytes`` held), ``fused`` (``blocks``: class -> number with a fused forward, ``left``:
        reason -> blocks without one, ``unfused``: reason -> times it did not run), ``text_kv`` (None, or calls
        ``computed``, ``reused`` and ``refused``: reason -> calls, ``nbytes`` held), ``positions`` (None, or step ->
        forwards whose rotary tables were exchanged), ``layers`` and ``skipped`` (reason -> module paths). Each served
        layer is a dict of ``expert``, ``layer``, ``name``, ``family``, ``calls``, ``sparse_calls``, ``density`` (mean
        per step, None where the layer did not run), ``mean_density``, ``head_density`` (per head, one number where they
        never differed), ``plan_seconds``, ``attention_seconds``, ``dense`` and ``fallbacks`` (both reason -> calls).
        """
        return collect_stats(self)

    def remove(self) -> None:
        """The original model back: the same processor objects, no hooks. Safe to call again."""
        for root in self.roots:
            root.remove()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        new = Handle(self._config, copy.deepcopy(self._tracker, memo))
        new.skipped = list(self.skipped)
        memo[id(self)] = new
        return new
