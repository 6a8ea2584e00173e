"""Runs a row policy around the blocks of one transformer.

In a step that computes some tokens, every block gets their rows only: the video stream, the rotary tables and the
modulation per token are gathered, text rows all stay. Self-attention has their queries and the keys and values of all
tokens, kept since the last step that computed everything and refreshed at the computed rows. Between blocks the stream
has all its rows, so that whatever stands there sees what it knows; rows that were left out pass a block unchanged. In
the model's output they are those of the step that computed them last.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vdit_fast.models.blocks import BlockCall, streams, with_streams
from vdit_fast.models.fusion import as_rows
from vdit_fast.models.row_keys import KeptKeys, check_budget
from vdit_fast.models.row_layout import RowLayout
from vdit_fast.ops.rows import gather_rows, scatter_rows
from vdit_fast.subset.base import RowPolicy

if TYPE_CHECKING:
    from vdit_fast.models.forward import Forward
    from vdit_fast.models.session import Session

__all__ = ["OutputRows", "RowRun", "RowSubset"]

Branch = tuple[str, int, int | None]
"""Guidance branch and frame block."""


@dataclass
class _Branch:
    """What is remembered of one guidance branch."""

    call: Any
    """Sizes and dtypes of its blocks' arguments."""
    keys: KeptKeys = field(default_factory=KeptKeys)
    attended: dict[int, list[int]] = field(default_factory=dict)
    """Block -> layers whose keys were kept in it."""
    output: Tensor | None = None
    """Last output per token [B, N, patch · channels]: of this step, or of the last one that computed the token."""


@dataclass
class _Choice:
    """What the branches of one frame block share: guidance mixes them, so the same tokens must be fresh in all."""

    tokens: int
    step: int = -1
    rows: Tensor | None = None
    """Of the running step, int32 [1, K]; None: all."""
    measures: dict[int, Tensor] = field(default_factory=dict)
    """Branch -> measure of its last output."""
    skipped: Tensor | None = None


@dataclass(eq=False)
class RowRun:
    """How one forward runs."""

    branch: _Branch
    tokens: int
    """Video tokens of the whole grid."""
    text_first: bool
    rows: Tensor | None = None
    """int32 [1, K], the tokens that are computed; None: all, and their keys are kept."""
    block: int | None = None
    """The block that is running."""
    check: Callable[[Tensor, Tensor], None] | None = None
    """Refuses keys and values that are too large; called before the first are kept."""
    _index: dict[int, Tensor] = field(default_factory=dict)
    _taken: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def partial(self) -> bool:
        """Whether a block is running on some of the tokens."""
        return self.rows is not None and self.block is not None

    @property
    def active(self) -> int:
        return self.tokens if self.rows is None else self.rows.shape[1]

    def joint_rows(self, rest: int) -> Tensor:
        """int32 [1, K + rest]: where the rows of a joint sequence with ``rest`` text tokens lie in the whole one."""
        assert self.rows is not None
        found = self._index.get(rest)
        if found is None:
            text = torch.arange(rest, dtype=torch.int32, device=self.rows.device)[None]
            parts = (text, self.rows + rest) if self.text_first else (self.rows, text + self.tokens)
            found = self._index[rest] = torch.cat(parts, dim=1) if rest else self.rows
        return found

    def take(self, tensor: Tensor, dim: int, rows: Tensor) -> Tensor:
        """The chosen entries of a dimension; computed once per forward, as all blocks get the same tensor."""
        known = self._taken.get(id(tensor))
        if known is None:
            known = self._taken[id(tensor)] = tensor, tensor.index_select(dim, rows[0].long())
        return known[1]

    def attend(self, layer: int, k: Tensor, v: Tensor, kv_len: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and number of valid keys for a layer's queries; its own are kept or refreshed."""
        if self.block is None:  # attention that lies outside of the blocks
            return k, v, kv_len
        keys = self.branch.keys
        if self.rows is None:
            if self.check is not None:
                self.check(k, v)
                self.check = None
            keys.keep(layer, k, v)
            self.branch.attended.setdefault(self.block, []).append(layer)
            return k, v, kv_len
        rest = k.shape[1] - self.active
        k, v = keys.refresh(layer, k, v, self.joint_rows(rest))
        self.branch.attended.setdefault(self.block, []).append(layer)
        return k, v, None if kv_len is None else kv_len + (self.tokens - self.active)


class RowSubset:
    """Stands around the blocks of one transformer and decides, at the first one, how a forward runs.

    Args:
        policy: what to compute.
        layout: what the family has one row per video token of.
        layers: attention layers inside the blocks.
    """

    def __init__(self, policy: RowPolicy, layout: RowLayout, layers: int) -> None:
        self.policy = policy
        self.layout = layout
        self.layers = layers
        self.whole: Counter[str] = Counter()
        self.partial: Counter[int] = Counter()
        self.rows_computed = 0
        self.rows_left = 0
        self._generation: int | None = None
        self._branches: dict[Branch, _Branch] = {}
        self._choices: dict[tuple[str, int | None], _Choice] = {}
        self._most_branches = 1

    def fresh(self) -> RowSubset:
        return RowSubset(self.policy, self.layout, self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held now."""
        return sum(branch.keys.nbytes for branch in self._branches.values())

    def forget(self) -> None:
        """Release what is held; the counts stay."""
        self._branches.clear()
        self._choices.clear()

    # ------------------------------------------------------------------ around a block
    def __call__(self, call: BlockCall, proceed: Callable[[], Any]) -> Any:
        session, forward = call.session, call.session.forward
        if forward is None:
            return proceed()
        if call.block.index == 0:
            forward.subset = self._begin(session, forward, call)
        run = forward.subset
        if run is None:
            return proceed()
        run.block = call.block.index
        before = run.branch.attended.pop(call.block.index, [])
        try:
            if run.rows is None:
                return proceed()
            return self._some_rows(run, call, proceed, before)
        finally:
            run.block = None

    def _some_rows(self, run: RowRun, call: BlockCall, proceed: Callable[[], Any], before: list[int]) -> Any:
        rows, stream = run.rows, call.block.streams[0]
        assert rows is not None
        given, full = dict(call.arguments), as_rows(call.arguments[stream])
        call.arguments[stream] = gather_rows(full, rows)
        for name, of in self.layout.arguments.items():
            if name in given:
                call.arguments[name] = of(given[name], lambda x, dim: run.take(x, dim, rows))
        for name, of in self.layout.joint.items():
            if name in given:
                call.arguments[name] = of(
                    given[name], lambda x, dim: run.take(x, dim, run.joint_rows(x.shape[dim] - run.tokens))
                )
        try:
            output = proceed()
        finally:
            call.arguments.clear()
            call.arguments.update(given)
        if run.branch.attended.get(call.block.index, []) != before:
            raise RuntimeError(
                f"{self.policy.name}: attention of {call.block.name} was not served in a step that computes some "
                "tokens, although it was in one that computes all; set subset to null in the configuration"
            )
        first, *others = streams(output)
        new = full.clone()
        scatter_rows(new, as_rows(first), rows)
        return with_streams(output, (new, *others))

    # ------------------------------------------------------------------ how a forward runs
    def _begin(self, session: Session, forward: Forward, call: BlockCall) -> RowRun | None:
        step = forward.step
        if step.generation != self._generation:
            self._generation = step.generation
            self.forget()
            self._most_branches = 1
        self._most_branches = max(self._most_branches, step.branches)
        reason = self._obstacle(session, forward, call)
        if reason is not None:
            self._branches.pop((step.expert, step.branch, step.frame_block), None)
            self._whole(session, reason, unsupported=True)
            return None
        geometry = forward.geometry
        assert geometry is not None
        tokens = geometry.n_video
        if torch.is_grad_enabled():
            self._whole(session, "gradients are recorded")
            return None
        active = self.policy.active(tokens)
        if active >= tokens:
            self._whole(session, "every token is active")
            return None
        key, signature = (step.expert, step.branch, step.frame_block), _signature(call)
        branch = self._branches.get(key)
        if branch is None or branch.call != signature:
            branch = self._branches[key] = _Branch(signature)
        run = RowRun(branch, tokens, geometry.text_first)
        choice = self._choices.get((step.expert, step.frame_block))
        if choice is None or choice.tokens != tokens:
            choice = self._choices[step.expert, step.frame_block] = _Choice(tokens)
        reason = self.policy.whole(step) or self._missing(branch, call.block.count)
        if choice.step != step.step:
            choice.step, choice.rows = step.step, None
            if reason is None:
                choice.rows = self._choose(choice)
        elif choice.rows is None:
            reason = reason or "another guidance branch computes every token"
        if reason is None:
            run.rows = choice.rows
            self.partial[step.step] += 1
            self.rows_computed += active
            self.rows_left += tokens - active
            return run
        self._whole(session, reason)
        self.rows_computed += tokens
        if not self.policy.keeps(step):
            self._branches.pop(key, None)
            return None
        branch.attended.clear()
        run.check = lambda k, v: check_budget(
            self.policy.kv_budget_gib, k, v, self.layers, self._most_branches, self.policy.name
        )
        return run

    def _obstacle(self, session: Session, forward: Forward, call: BlockCall) -> str | None:
        """Why this forward cannot run on some of its tokens, whatever the policy says."""
        geometry, x = forward.geometry, call.inputs[0]
        if geometry is None:
            return "the transformer's input has no known video grid"
        if geometry.frame_block:
            return "block-causal frames: a mask says which keys a token reads"
        if geometry.history:
            return "tokens of earlier clips lie before the video"
        if x is None or x.ndim != 3 or x.shape[1] != geometry.n_video:
            size = "no" if x is None else f"{x.shape[1]:,}" if x.ndim == 3 else f"{x.ndim}-dimensional"
            return f"{size} tokens in the first block, {geometry.n_video:,} in the grid {geometry.grid}"
        if session.positions is not None:
            return "handle.positions exchanges the rotary tables of all tokens"
        if session.around_attention or any(entry.where == "attention_heads" for entry in session.hooks.entries):
            return "functions are hooked at its attention, which see all tokens"
        if "cache" in session.around:
            return "a cache policy leaves blocks out, whose keys would not be refreshed"
        for name, reason in self.layout.refused.items():
            if call.arguments.get(name) is not None:
                return reason
        return None

    def _missing(self, branch: _Branch, blocks: int) -> str | None:
        """Why a branch has nothing yet that tokens could be left out of."""
        if not branch.attended:
            return "no keys and values are held yet"
        if len(branch.attended) < blocks:
            return f"the attention of {blocks - len(branch.attended)} blocks is not served, its keys are not kept"
        return "the model's output has not one row per video token" if branch.output is None else None

    def _whole(self, session: Session, reason: str, unsupported: bool = False) -> None:
        if unsupported and session.config.on_unsupported == "error":
            raise RuntimeError(f"subset {self.policy.name}: {reason}; set on_unsupported='dense' to compute all tokens")
        self.whole[reason] += 1

    def _choose(self, choice: _Choice) -> Tensor:
        measure = torch.stack(list(choice.measures.values())).mean(0)
        if choice.skipped is None:
            with torch.inference_mode(False):
                choice.skipped = torch.zeros_like(measure)
        rows = self.policy.choose(measure, choice.skipped)
        choice.skipped += 1
        choice.skipped.index_add_(0, rows.long(), choice.skipped.new_full((1,), -1.0).expand(rows.shape[0]))
        return rows[None]

    # ------------------------------------------------------------------ the model's output
    def output(self, session: Session, rows: Tensor, channels: int) -> Tensor:
        """The output per token, where those that were left out keep their last one."""
        forward = session.forward
        run = forward.subset if forward is not None else None
        if forward is None or run is None:
            return rows
        forward.subset = None
        branch, step = run.branch, forward.step
        if rows.ndim != 3 or rows.shape[1] != run.tokens:
            return rows
        if run.rows is None:
            with torch.inference_mode(False):
                branch.output = rows.detach().clone()
        else:
            assert branch.output is not None
            scatter_rows(branch.output, gather_rows(rows, run.rows), run.rows)
            rows = branch.output.clone()
        if step.num_steps is not None and step.step >= step.num_steps - 1:
            self._branches.pop((step.expert, step.branch, step.frame_block), None)
            return rows
        width = rows.shape[2]
        channels = channels if channels and width % channels == 0 else width
        if self.layout.channels == "last":
            patches = rows.unflatten(2, (-1, channels))
        else:
            patches = rows.unflatten(2, (channels, -1)).transpose(2, 3)
        self._choices[step.expert, step.frame_block].measures[step.branch] = self.policy.measure(patches.detach())
        return rows


def _signature(call: BlockCall) -> Any:
    return tuple((x.shape, x.dtype, x.device) if x is not None else None for x in call.inputs)


def _idle(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    return None


def _idle_hook() -> Any:
    """What a hook is in a pickle: a pickled model is the stock one."""
    return _idle


class OutputRows:
    """Forward hook of the module that makes the output per token. Placed anew where the module was exchanged."""

    def __init__(self, session: Session, channels: int) -> None:
        self.session = session
        self.channels = channels

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        subset = self.session.around.get("subset") if self.session.active else None
        if not isinstance(subset, RowSubset) or not isinstance(output, Tensor):
            return None
        return subset.output(self.session, output, self.channels)

    @classmethod
    def place(cls, root: nn.Module, session: Session, layout: RowLayout) -> None:
        """Put the hook on the module that makes the output now."""
        module = root.get_submodule(layout.output)
        if not any(isinstance(hook, cls) and hook.session is session for hook in module._forward_hooks.values()):
            cls.remove(root, session)
            config = getattr(root, "config", None)
            channels = getattr(config, "out_channels", None) or getattr(config, "in_channels", None) or 0
            module.register_forward_hook(cls(session, channels))

    @classmethod
    def remove(cls, root: nn.Module, session: Session) -> None:
        """Take the session's hook off, wherever its module is now."""
        for module in root.modules():
            for key, hook in list(module._forward_hooks.items()):
                if isinstance(hook, cls) and hook.session is session:
                    module._forward_hooks.pop(key)

    def __deepcopy__(self, memo: dict[int, Any]) -> OutputRows:
        return OutputRows(copy.deepcopy(self.session, memo), self.channels)

    def __reduce__(self) -> Any:
        return _idle_hook, ()
