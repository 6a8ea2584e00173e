"""One accelerated transformer: the hook before its forwards, what is put around its attention, and the way back."""

from __future__ import annotations

import copy
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vdit_fast.caching.output import CachedForward
from vdit_fast.config import Config
from vdit_fast.forwards import ForwardStandIn
from vdit_fast.models import block_cache, blocks, hooks, text_kv
from vdit_fast.models.base import ModelAdapter, ServedProcessor, parameter_names, set_processor
from vdit_fast.models.fusion import attach, detach, reclaim
from vdit_fast.models.memory import Memory
from vdit_fast.models.projections import FusedProjections
from vdit_fast.models.replicas import is_replica, settle
from vdit_fast.models.row_layout import RowLayout
from vdit_fast.models.row_subset import OutputRows, RowSubset
from vdit_fast.models.served import begin_forward
from vdit_fast.models.session import Session
from vdit_fast.regions import attach as regions

if TYPE_CHECKING:
    from vdit_fast.handle import Handle
    from vdit_fast.parallel.guidance import GuidanceParallel
    from vdit_fast.parallel.sequence import SequenceParallel

__all__ = ["ATTRIBUTE", "NO_STEPS", "Root"]

ATTRIBUTE = "_vdit_fast_root"
"""Name under which a transformer keeps its ``Root``, and by it the handle, alive."""

NO_STEPS = "a part without a forward of hidden_states and timestep has no steps"


class _BeforeForward:
    """Forward pre-hook of a transformer: tells the session where the forward is."""

    def __init__(self, session: Session, adapter: ModelAdapter, names: tuple[str, ...]) -> None:
        self.session = session
        self.adapter = adapter
        self.names = names
        self.projections = FusedProjections()

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self.session.active:
            return None
        if not torch.compiler.is_compiling():
            self.projections.check(module)
            reclaim(module, self.session)
        previous = self.session.forward
        if is_replica(module):
            settle(module, self.session)
        elif self.session.config.cache is not None and previous is not None and not previous.cached:
            # Whoever wrapped `forward` earlier has put its own back (offloading does after every run): wrap again.
            wrap_cache(module, self.session, self.adapter)
        if "subset" in self.session.around and isinstance(self.adapter.rows, RowLayout):
            OutputRows.place(module, self.session, self.adapter.rows)
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        timestep = arguments.get("timestep")
        new = {} if torch.compiler.is_compiling() else self.adapter.simplify(module, arguments)
        noted = begin_forward(self.session, timestep, self.adapter.geometry(module, arguments))
        if self.session.forward is not None and not torch.compiler.is_compiling():
            self.session.forward.modulated_by_timestep = self.adapter.modulated_by_timestep(arguments)
            latents = arguments.get("hidden_states")
            if isinstance(latents, torch.Tensor) and latents.ndim > 3:
                self.session.forward.latent_row = latents.shape[-1]
        if self.session.regions is not None:
            new |= _prompts(self.session, arguments)
        if self.session.hooks.sites and self.session.forward is not None and not torch.compiler.is_compiling():
            self.session.forward.volume = self.adapter.volume(module, arguments)
        if self.session.text is not None and not torch.compiler.is_compiling():
            self.session.text.note(self.session.forward, arguments | new)
        memory = self.session.around.get("memory")
        if isinstance(memory, Memory) and self.session.forward is not None and not torch.compiler.is_compiling():
            memory.note(self.session.forward, module, self.adapter.block_lists, arguments | new)
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


def _prompts(session: Session, arguments: dict[str, Any]) -> dict[str, Any]:
    """The text of a forward that begins, where regions exchange it."""
    assert session.regions is not None
    if not torch.compiler.is_compiling():
        return session.regions.exchange(session.forward, arguments)
    if session.regions.regions.foreground is not None:
        raise RuntimeError("regions: two prompts cannot be read in a transformer that is compiled as a whole")
    return {}


def wrap_cache(module: nn.Module, session: Session, adapter: ModelAdapter) -> None:
    """Let the cache that the configuration asks for stand around the transformer or around its blocks."""
    present = module.__dict__.get("forward")
    if session.cache.features is None:
        if not (isinstance(present, CachedForward) and present.of(session)):  # it may have stopped before the cache
            CachedForward(module, session).attach()
    else:
        blocks.attach(module, session, adapter)


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
        self.guidance: GuidanceParallel | None = None
        self.sequence: SequenceParallel | None = None
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
        for name, child in module.named_modules():
            stock = getattr(child, "processor", None)
            kind = None if stock is None else self.adapter.processor_beside(name, child, stock)
            if kind is not None:
                set_processor(child, kind(self.session, -1, stock, weakref.ref(module)))

    def wrap(self) -> None:
        """Put in place what works around the attention as the configuration says: the cache of the output, what stands
        around blocks, the memory of the text's keys and values."""
        module = self.module()
        if module is None:
            return
        self.unwrap(module)
        if self.session.config.cache is not None and self.hooked:
            block_cache.setup(module, self.session, self.adapter)
        if self.session.cache.policy is not None and self.hooked and self.session.cache.features is None:
            CachedForward(module, self.session).attach()
        self._subset(module)
        self._wrap_parts(module)
        regions.detach(module, self.session)  # they stand around the memory
        text_kv.detach(module, self.session)
        if self.session.config.text_kv and self.hooked:
            text_kv.attach(module, self.session, self.adapter)
        regions.attach(module, self.session, self.adapter)
        if self.guidance is not None:
            self.guidance.wrap(module, self.session).attach()

    def unwrap(self, module: nn.Module) -> None:
        """Take this session's wrappers off, where they are the outermost; elsewhere they pass calls through."""
        OutputRows.remove(module, self.session)
        wrapper = module.__dict__.get("forward")
        if isinstance(wrapper, ForwardStandIn) and wrapper.of(self.session) and not isinstance(wrapper, CachedForward):
            wrapper.detach()  # of guidance parallelism
            wrapper = module.__dict__.get("forward")
        if isinstance(wrapper, CachedForward) and wrapper.of(self.session):
            wrapper.detach()
        self._unwrap_parts(module)
        block_cache.teardown(module, self.session, self.adapter)

    def _wrap_parts(self, module: nn.Module) -> None:
        if self.session.around:
            blocks.attach(module, self.session, self.adapter)
        if self.session.around_attention:
            hooks.attach(module, self.session)

    def _unwrap_parts(self, module: nn.Module) -> None:
        blocks.detach(module, self.session, self.adapter)
        hooks.detach(module, self.session)

    def candidates(self, where: str) -> list[tuple[int, str]]:
        """(index, module path) of everything that may be hooked at a place of this kind."""
        module = self.module()
        return [] if module is None else hooks.candidates(module, self.session, self.adapter, where)

    def rehook(self) -> None:
        """Put the hooks' wrappers in place, after the hooks have changed."""
        session = self.session
        kinds = {entry.where for entry in session.hooks.entries}
        pairs: tuple[tuple[dict[str, blocks.Around], bool, blocks.Around], ...] = (
            (session.around, "block_output" in kinds, hooks.BlockHooks()),
            (session.around_attention, bool(kinds & {"attention_input", "attention_output"}), hooks.AttentionHooks()),
        )
        for around, wanted, stands in pairs:
            around.pop("hooks", None)
            if wanted:
                around["hooks"] = stands
        self.rewrap()

    def rewrap(self) -> None:
        """Put the wrappers of blocks and attention modules in place, after those who stand there have changed."""
        module = self.module()
        if module is not None and self.session.active:
            self._unwrap_parts(module)
            self._wrap_parts(module)

    def _subset(self, module: nn.Module) -> None:
        """What runs blocks on some tokens, where the configuration and the family have it."""
        if isinstance(self.session.around.get("subset"), RowSubset):
            del self.session.around["subset"]
        policy, layout = self.session.config.subset, self.adapter.rows
        if policy is None or not isinstance(layout, RowLayout) or self.no_subset() is not None:
            return
        inside = tuple(f"{name}." for name, _ in blocks.transformer_blocks(module, self.adapter))
        layers = sum(layer.name.startswith(inside) for layer in self.session.layers)
        self.session.around["subset"] = RowSubset(policy, layout, layers)

    def no_subset(self) -> str | None:
        """Why no subset of the tokens can run by itself in this transformer, or None."""
        module = self.module()
        if not self.hooked:
            return NO_STEPS
        if isinstance(self.adapter.rows, str):
            return self.adapter.rows
        if module is not None and not blocks.transformer_blocks(module, self.adapter):
            return "it has no list of blocks"
        return None

    def check(self, config: Config) -> None:
        """Raise where the configuration wants a cache around blocks that nobody knows, a subset beside such a cache,
        and, where it wants to know, a cache or a subset that cannot work."""
        module, strict = self.module(), config.on_unsupported == "error"
        if config.cache is not None and not self.hooked and strict:
            raise RuntimeError(f"cache: {NO_STEPS}; accelerate the whole transformer, or set cache to null")
        if config.cache is not None and self.hooked and module is not None:
            block_cache.check(module, self.adapter, config.cache)
        if config.subset is None:
            return
        granularity = getattr(config.cache, "granularity", "model")
        if config.cache is not None and granularity != "model":
            raise RuntimeError(
                f"subset {config.subset.name!r} and cache {config.cache.name!r} by {granularity} exclude each other: a "
                "cache that leaves blocks out leaves the subset's keys and values old; set one of them to null, or "
                "cache the output of the whole model"
            )
        reason = self.no_subset()
        if reason is not None and strict:
            raise RuntimeError(f"subset: {self.adapter.family}: {reason}; set subset to null in the configuration")

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
        module = self.module()
        if module is not None:
            regions.detach(module, self.session)
        processors = self.processors()
        self.session.active = False
        for parallel in (self.sequence, self.guidance):
            if parallel is not None:
                parallel.members.close()  # the other ranks are to hear of it
        self.sequence = self.guidance = None
        if module is None:
            return
        for name, processor in processors.items():
            set_processor(module.get_submodule(name), processor.stock)
        self.unwrap(module)
        self.session.hooks.entries.clear()
        for child in module.modules():  # what stands before the blocks of a pipeline stage
            wrapper = child.__dict__.get("forward")
            if isinstance(wrapper, ForwardStandIn) and wrapper.of(self.session):
                wrapper.detach()
        for name in ("memory", "references", "stage"):
            self.session.around.pop(name, None)
        for around in list(self.session.around_heads.values()):
            close = getattr(around, "close", None)  # of those that also stand elsewhere
            if close is not None:
                close()
        self.session.around_heads.clear()
        self.session.before_rotation = None
        self.session.regions = None
        detach(module, self.session)
        self.session.cache.forget()
        self.session.forward = self.session.cache.forward = None  # the last forward holds its stream
        self.session.stand_ins.clear()
        self.session.around.pop("sequence", None)
        self.session.state.clear()
        self.session.static.clear()
        if isinstance(subset := self.session.around.get("subset"), RowSubset):
            subset.forget()
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
