"""The object ``accelerate`` returns: what is served and why not, what ran, and the way back."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from vdit_fast.config import Config
from vdit_fast.hooks.registration import HookRemover, Layers, add_hook
from vdit_fast.models.callables import check_arguments
from vdit_fast.models.explicit import ExplicitStep
from vdit_fast.models.extra_keys import Captured, FeedMode
from vdit_fast.models.hooks import HookFn
from vdit_fast.models.linear_layers import convert, linear_maps
from vdit_fast.models.memory import MemoryRows
from vdit_fast.models.rotary import PositionFn
from vdit_fast.models.tracker import StepTracker
from vdit_fast.regions.attach import set_regions
from vdit_fast.regions.regions import Regions
from vdit_fast.root import NO_STEPS, Root
from vdit_fast.segments.attaching import capture, set_feed, set_memory, set_references
from vdit_fast.summary import collect_stats, report_text

__all__ = ["Handle", "Skipped"]

NO_TEXT_KV = "text_kv: no cross-attention whose keys are known to depend on the text only"


@dataclass(frozen=True)
class Skipped:
    """An attention module that is left alone."""

    name: str
    processor: str
    reason: str


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
            if elsewhere := getattr(root.session.around.get("stage"), "elsewhere", 0):
                notes["they run on other ranks of a stage pipeline"] += elsewhere
            for processor in processors:
                if processor._parallel_config is not None and "sequence" not in root.session.around_heads:
                    notes["context parallelism is enabled, the stock processor runs"] += 1
                elif processor._attention_backend is not None:
                    notes["an attention backend is set, served layers do not use it"] += 1
            if self._config.cache is not None and not root.hooked:
                notes[f"no cache: {NO_STEPS}"] += len(root.session.layers)
            reason = root.no_subset() if self._config.subset is not None and root.session.active else None
            if reason is not None:
                notes[f"no subset: {reason}"] += len(root.session.layers)
            if self._config.text_kv and root.session.active and root.session.text is None:
                notes[NO_TEXT_KV] += len(root.session.layers)
            replaced = len(root.session.layers) - len(processors)
            if root.session.active and root.module() is not None and replaced:
                notes["the processor was replaced by another one after accelerate()"] += replaced
        return dict(notes)

    def reconfigure(self, config: Any) -> Handle:
        """Use another configuration from the next call on; takes what ``accelerate`` takes. Returns this handle.

        Raises:
            RuntimeError: the handle was removed; ``on_unsupported`` is ``"error"`` and the configuration cannot work.
            TypeError, ValueError: as ``accelerate``.
        """
        settings = Config.of(config)
        if not self.active:
            raise RuntimeError("reconfigure: this handle was removed; call vdit_fast.accelerate on the model again")
        for root in self.roots:
            root.check(settings)
        maps = linear_maps([root.session for root in self.roots], settings)
        self._config = settings
        for root, found in zip(self.roots, maps, strict=True):
            root.session.reconfigure(self._config)
            convert(root.session, found)
            root.wrap()
        return self

    def positions(self, fn: PositionFn | None) -> Handle:
        """Exchange the rotary position tables that the transformers make, from the next forward on.

        Another function begins a new generation, and so does None: what caches and planners remember was computed with
        the old tables. Tables that one function changes from step to step are a condition that goes with the steps, and
        caches forecast over their changes, except where ``fn.phase(step)`` says that a step is of another kind.

        Args:
            fn: ``fn(step, geometry, (cos, sin))``, called once per forward with the ``StepContext``, the ``Geometry``
                and the model's own tables. It returns the (cos, sin) to use, of the same shape up to dimensions of
                size 1, or None for the model's own. It must not read device values on the host. It may have a method
                ``phase(step)``, as ``AnchoredBoxes`` does: features of a step never serve one whose (hashable) phase is
                another one. None switches it off.

        Returns:
            this handle; ``stats()["positions"]`` counts the forwards whose tables were exchanged.

        Raises:
            TypeError: ``fn`` cannot be called, or not with three arguments.
            RuntimeError: no served layer of a transformer takes positions; here, or at a call whose step, grid or
                tables are unknown.
        """
        if fn is not None and not callable(fn):
            raise TypeError(f"positions: pass a function of (step, geometry, tables) or None, got {type(fn).__name__}")
        if fn is not None:
            check_arguments("positions", fn, "step", "geometry", "tables")
        if fn is not None and not self.active:
            raise RuntimeError("positions: this handle was removed; call vdit_fast.accelerate on the model again")
        if any(root.session.regions is not None for root in self.roots):
            raise RuntimeError("positions: regions set them; take those off by handle.regions(None)")
        for root in self.roots if fn is not None else ():
            processors = root.processors().values()
            if root.module() is not None and not any(processor.takes_positions for processor in processors):
                raise RuntimeError(f"positions: no served layer of family {root.adapter.family!r} takes rotary tables")
        if any(root.session.positions is not fn for root in self.roots):
            self.reset()
            for root in self.roots:
                root.session.positions = fn
                root.session.repositioned.clear()
        return self

    def regions(self, regions: Regions | None) -> Handle:
        """Let an object follow a box through the frames, from the next forward on; None ends it.

        Sets positions, too, and begins a new generation: caches forecast nothing over the change, nor over the end of
        the mask or of the two prompts. In steps with a mask of self-attention planners are not asked.
        ``stats()["regions"]`` counts forwards.

        Returns:
            this handle.

        Raises:
            RuntimeError: the handle was removed, positions are set or a subset of the tokens is configured, or the
                family has no rotary tables or no cross-attention of text; at a call, where the step is unknown or other
                rules say already what is read.
        """
        set_regions(self, regions)
        return self

    def memory(self, rows: MemoryRows | None) -> Handle:
        """Give every block memory rows (DiT-Mem): tokens that go through the block's norm, modulation and projections
        of keys and values, have no position and no queries, and are read by every token of the video.

        They are never sparsified, and under sequence parallelism they count once. A new memory begins a new
        generation: what caches and planners remember was computed with the old one.

        Args:
            rows: floating ``[M, C]`` or ``[B, M, C]``, C the width of the blocks, finite, copied here; or
                ``fn(step) -> rows or None``, called once per forward with the ``StepContext`` for rows that go with
                the denoising steps (caches forecast over their changes). Nobody looks whether a function's rows are
                finite, as that would wait for the device in every step. None switches memory off.

        Returns:
            this handle; ``stats()["memory"]`` counts what was computed.

        Raises:
            TypeError, ValueError: ``rows`` are of a wrong kind or shape, or not finite; a wrong width at the next
                forward.
            RuntimeError: the family's recipe is not known, a block would go without memory, or linear layers, which
                read every key once, would not read it; this handle was removed.
        """
        set_memory(self, rows)
        return self

    def references(self, rows: Tensor | None) -> Handle:
        """Put reference rows behind the text of a joint sequence [text, references, video] (GSFixer), for models of the
        CogVideoX class: they enter at the first block, run like text rows, and leave after the last.

        Planners, caches and hooks see them as further text, which is never sparsified. Rows that go through the
        model's own text projection may instead be appended to ``encoder_hidden_states``.

        Args:
            rows: floating ``[R, C]`` or ``[B, R, C]``, C the width of the blocks, finite, copied here; None: no more.

        Raises:
            TypeError, ValueError: ``rows`` are of a wrong kind or shape, or not finite; a wrong width at the next
                forward.
            RuntimeError: the family has no such sequence; this handle was removed.
        """
        set_references(self, rows)
        return self

    def capture(self) -> Captured:
        """Keep the keys and values (after norm and RoPE) that the attention layers make of their video tokens, from the
        next forward on, as another transformer's ``feed``. Every forward replaces those of the one before.

        Returns:
            what holds them: ``stop()`` ends it, ``nbytes`` says how much is held. Nobody looks whether they are finite.

        Raises:
            RuntimeError: the handle has several transformers, or was removed, or a stream or causal order stands around
                its attention; at a forward on some of the tokens.
        """
        return capture(self)

    def feed(self, captured: Captured | None, mode: FeedMode = "concat", gate: float | Tensor = 1.0) -> Handle:
        """Let every query of layer i read the keys and values that another transformer's layer i made last
        (VITON-DiT's garment branch).

        Args:
            captured: what ``capture()`` of the other handle returned; None: no more.
            mode: "concat", one softmax over both; "sum", the attention over the other keys is added to the own one.
            gate: factor of what is added, a number or a tensor ``[]`` or ``[heads]``; 0 leaves every bit as it was.

        Raises:
            TypeError, ValueError: a bad argument, or more layers than the other has; other heads at the next forward.
            RuntimeError: the handle has several transformers, or was removed; nothing was captured at a forward.
        """
        set_feed(self, captured, mode, gate)
        return self

    def hook(self, where: str, fn: HookFn, layers: Layers = None) -> HookRemover:
        """Call a function at attention modules or blocks, from the next call on; it sees rows in the model's own order.

        Args:
            where: "attention_input" (after norm and modulation), "attention_heads" (behind the softmax, before the
                output projection), "attention_output" (after the module) or "block_output".
            fn: ``fn(step, place, rows)``, called with the ``StepContext``, the ``HookPlace`` and the ``HookRows``. It
                returns new video rows, or (video, context) rows, of the same shape and dtype, or None. Hooks of one
                place are called in the order they were made, each with what the one before left.
            layers: which ones: indices (negative ones count from the end), patterns of module paths
                (``"*.attn1"``), or several of either; None: all.

        Returns:
            what takes the hook out again when it is called, or as a context manager.

        Raises:
            TypeError: ``fn`` cannot be called, or ``layers`` is of a wrong kind.
            ValueError: an unknown place, ``layers`` that name nothing, or a ready-made hook that belongs elsewhere.
            RuntimeError: nothing can be hooked there, or this handle was removed.
        """
        return add_hook(self, where, fn, layers)

    def step(
        self,
        step_id: int | None,
        *,
        timestep: float | None = None,
        sigma: float | None = None,
        branch: int | None = None,
        model: str | None = None,
        num_steps: int | None = None,
        frame_block: int | None = None,
    ) -> ExplicitStep:
        """Name the denoising step of the forwards inside a ``with`` block, instead of having it derived.

        For sampling loops that repeat steps, go backwards, take timesteps in any order, or change between models: what
        is remembered between steps is not thrown away by more noise, and nothing is read from a device. A run of named
        steps is one generation until ``reset()``; naming steps after steps that were derived begins another one, and
        the other way round.

        Args:
            step_id: place in the schedule, the same for every evaluation of a step; None: unknown, so that whatever
                depends on the step runs in full.
            timestep: in the model's own units.
            sigma: noise level in [0, 1]; None: ``timestep / 1000`` where that lies there.
            branch: guidance branch; None: the forwards of a transformer inside the block are branches 0, 1, ...
            model: name of the weights that compute this step (strong or weak, an adapter on or off). What one
                remembers never serves another. None: the transformer's name in its pipeline.
            num_steps: length of the schedule; None: unknown, and rules that are fractions of it go by sigma.
            frame_block: which part of a longer video the forwards are about, where it is made of several with schedules
                of their own; what one of them remembers never serves another.

        Raises:
            TypeError, ValueError: a bad argument.
            RuntimeError: at the ``with``, inside another one.
        """
        return ExplicitStep(self._tracker, step_id, timestep, sigma, branch, model, num_steps, frame_block)

    def reset(self) -> None:
        """The next forward begins a new generation, whatever its timestep."""
        self._tracker.reset()
        for root in self.roots:
            root.session.forget()

    def report(self) -> str:
        """Plain text: what is served, what is left alone and why, what ran dense and why, densities and times."""
        return report_text(self)

    def stats(self) -> dict[str, Any]:
        """The same as numbers; JSON-ready.

        Of the run: ``config`` (dict), ``digest``, ``generations``, ``steps`` (most distinct steps in one generation),
        ``forwards``, ``host_reads``. Of what may be in use, None where it is not:

        * ``cache``: the policy's ``granularity``, ``hooked``: what it stands around -> number, ``full``: reason ->
          forwards, ``forecast``: step -> forwards, ``blocks_run`` and ``blocks_left_out`` where it stands around
          blocks, ``nbytes`` held, ``host_reads`` of changes
        * ``subset``: ``partial``: step -> forwards on some tokens, ``whole``: reason -> forwards that computed all, the
          rows ``computed`` and ``left`` out, ``nbytes`` of keys and values held
        * ``fused``: ``blocks``: class -> number with a fused forward, ``left``: reason -> blocks without one,
          ``unfused``: reason -> times it did not run
        * ``text_kv``: calls ``computed``, ``reused`` and ``refused``: reason -> calls, ``nbytes`` held
        * ``positions``: step -> forwards whose rotary tables were exchanged
        * ``regions``: step -> forwards ``masked`` in self-attention and ``prompted`` by two prompts
        * ``streaming``: ``frames`` and ``chunks`` made, forwards that ``denoise`` and that ``write`` keys and values,
          the most ``nbytes`` of those that one stream held
        * ``memory``: rows ``tokens``, layers' keys and values ``computed`` and ``shared`` with another guidance branch,
          ``nbytes`` held
        * ``beside``: ``references``: rows behind the text, ``feed``: None or its mode, ``captured_nbytes`` held for
          another model
        * ``linear``: transformer -> indices of the layers that run linear attention
        * ``parallel``: of "sequence" and "guidance" the ``rank``, ``ranks``, the ``calls`` or ``exchanges`` and the
          ``bytes`` that this rank has sent

        And ``hooks`` (place -> calls), ``skipped`` (reason -> module paths), ``layers``: each served layer is a dict of
        ``expert``, ``layer``, ``name``, ``family``, ``calls``, ``sparse_calls``, ``density`` (mean per step, None where
        the layer did not run; linear layers have none), ``mean_density``, ``head_density`` (per head, one number where
        they never differed), ``plan_seconds``, ``attention_seconds``, ``dense``, ``unasked`` (calls whose
        keys somebody else than the planner had chosen) and ``fallbacks`` (each reason -> calls).
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
