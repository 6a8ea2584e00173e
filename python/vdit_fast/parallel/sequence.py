"""Sequence parallelism of an accelerated model: every rank of a group computes a run of the video's rows.

The rows are cut at the first block and joined after the last, by what a family's ``RowLayout`` says; attention, where
rows meet, exchanges them for heads (``Ulysses``). Text rows stay on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdit_fast.caching.checks import number
from vdit_fast.models.base import CROSS_ATTENTION
from vdit_fast.models.blocks import BlockCall, streams, transformer_blocks, with_streams
from vdit_fast.models.callables import check_handle
from vdit_fast.models.forward import in_backward
from vdit_fast.models.fusion import as_rows
from vdit_fast.models.row_layout import RowLayout
from vdit_fast.models.row_shard import RowShard, equal_rows
from vdit_fast.parallel.agreement import Agreement, described
from vdit_fast.parallel.collectives import all_gather, process_group
from vdit_fast.parallel.members import Members, Shared
from vdit_fast.parallel.ulysses import Ulysses

if TYPE_CHECKING:
    from vdit_fast.handle import Handle
    from vdit_fast.models.forward import Forward
    from vdit_fast.models.heads import HeadsCall
    from vdit_fast.models.session import Session
    from vdit_fast.root import Root

__all__ = ["SequenceParallel", "ShardedRows", "sequence_parallel"]

ROW_BY_ROW = frozenset(
    {CROSS_ATTENTION, "attention with image keys and values", "cross-attention to text and image context"}
)
"""Why modules are left alone whose queries do not meet each other."""


class ShardedRows:
    """Stands around the blocks ("sequence") of one transformer: cuts the rows at the first, joins them after the last.

    Args:
        members: the ranks, in the order of their rows.
        layout: what the family has one row per video token of.
    """

    def __init__(self, members: Members, layout: RowLayout) -> None:
        self.members = members
        self.layout = layout
        self.rank, self.ranks = members.rank, members.ranks
        self.agree = Agreement(members.group, "sequence_parallel", members.run)
        self.forwards = 0
        self.bytes_sent = 0
        """To other ranks, by joining the rows."""

    def fresh(self) -> ShardedRows:
        return ShardedRows(self.members, self.layout)

    @torch.compiler.disable(recursive=False)
    def __call__(self, call: BlockCall, proceed: Callable[[], Any]) -> Any:
        session, block = call.session, call.block
        forward = _forward(session, call)
        if forward is None:
            raise RuntimeError(f"{block.name} is called outside a forward of its transformer; end sequence parallelism")
        stream = block.streams[0]
        given = dict(call.arguments)
        if block.index == 0:
            self._check(session, forward, call)
            x = as_rows(given[stream])
            self.members.inside(not torch.is_grad_enabled())  # a forward with gradients has no end that shows here
            if not in_backward():
                self._compare(forward, call)
            if forward.shard is None or forward.shard.total != x.shape[1]:
                forward.shard = self._shard(forward, x.shape[1])
            call.arguments[stream] = forward.shard.own(x).contiguous()
        shard = forward.shard
        if shard is None or call.arguments[stream].shape[1] != shard.rows:
            rows = call.arguments[stream].shape[1]
            raise RuntimeError(
                f"{block.name} gets {rows:,} rows where this rank has {0 if shard is None else shard.rows:,}: "
                "something between the blocks has exchanged them; end the sequence parallelism"
            )
        for names, take in ((self.layout.arguments, shard.take), (self.layout.joint, shard.take_joint)):
            for name, of in names.items():
                if name in given:
                    call.arguments[name] = of(given[name], take)
        for count in self.layout.leading.values():
            if isinstance(given.get(count), int):
                call.arguments[count] = min(max(given[count] - shard.start, 0), shard.rows)
        if torch.is_grad_enabled():
            shard.note(session.anchor, forward)
        try:
            output = proceed()
            if block.index == block.count - 1:
                output = self._joined(output, shard)
        except BaseException as error:
            self.members.failed(error)
            raise
        finally:
            call.arguments.clear()
            call.arguments.update(given)
        if block.index == block.count - 1 and not torch.is_grad_enabled():
            forward.shard = None  # it holds what was cut
        return output

    def _joined(self, output: Any, shard: RowShard) -> Any:
        """The last block's output with the rows of all ranks."""
        first, *others = streams(output)
        whole = all_gather(as_rows(first), shard.sizes, 1, self.members.group, self.members.run)
        self.members.inside(False)
        self.forwards += 1
        self.bytes_sent += (self.ranks - 1) * first.numel() * first.element_size()
        return with_streams(output, (whole, *others))

    def _compare(self, forward: Forward, call: BlockCall) -> None:
        """Raise on all ranks where they were given different sizes, before any rows are exchanged."""
        found = zip(call.block.streams, call.inputs, strict=True)
        parts = [described(name, x) for name, x in found if isinstance(x, Tensor)]
        if forward.geometry is not None:
            parts.insert(0, f"a grid of {forward.geometry.grid} tokens")
        x = call.inputs[0]
        assert x is not None
        try:
            self.agree(", ".join(parts), x.device, forward.step.generation)
        except BaseException:
            self.members.inside(False)
            raise

    def _shard(self, forward: Forward, rows: int) -> RowShard:
        if rows < self.ranks:
            self.members.inside(False)
            raise RuntimeError(
                f"a sequence of {rows} rows cannot be shared by {self.ranks} ranks; take a group of {rows} or fewer"
            )
        geometry = forward.geometry
        return RowShard(equal_rows(rows, self.ranks), self.rank, geometry is not None and geometry.text_first)

    def _check(self, session: Session, forward: Forward, call: BlockCall) -> None:
        """Raise where the whole rows would be missed, before anything was exchanged."""
        reason = unshared(session)
        for name, why in self.layout.refused.items():
            if call.arguments.get(name) is not None and name not in self.layout.leading:
                reason = why
        x = call.inputs[0]
        if x is None or x.ndim != 3:
            reason = "its blocks do not get rows [B, N, C]"
        if reason is not None:
            raise RuntimeError(f"sequence parallelism cannot run this call: {reason}")


def _forward(session: Session, call: BlockCall) -> Forward | None:
    """The forward that a call belongs to, also where gradient checkpointing runs it again."""
    tensors = (item for value in call.arguments.values() for item in (value if isinstance(value, tuple) else (value,)))
    return session.forward_among(item for item in tensors if isinstance(item, Tensor))


def unshared(session: Session) -> str | None:
    """What is set on a transformer that must see all rows of a block, or None."""
    if session.config.subset is not None:
        return "subset computes some tokens of the whole grid; set subset to null"
    if session.before_rotation is not None:
        return "keys are kept before RoPE, of which this rank has some rows only"
    places = {entry.where for entry in session.hooks.entries} - {"attention_heads"}
    if places:
        return f"hooks at {', '.join(sorted(places))} see all rows; hook 'attention_heads', or end them"
    return None


def _rows_of(call: HeadsCall) -> RowShard | None:
    return call.forward.shard if call.forward is not None else None


class SequenceParallel(Shared):
    """What ``sequence_parallel`` put in place; ends it when it is called, or as a context manager."""

    def __init__(self, roots: list[Root], members: Members) -> None:
        super().__init__(members)
        self._roots = roots

    def __call__(self) -> None:
        """Every rank computes all rows again. Safe to call again."""
        for root in self._roots:
            if root.sequence is self:
                root.sequence = None
            rows = root.session.around.get("sequence")
            if isinstance(rows, ShardedRows) and rows.members is self.members:
                del root.session.around["sequence"]
                root.session.around_heads.pop("sequence", None)
                root.session.begin_records()
                root.rewrap()
        self._roots = []
        super().__call__()


def sequence_parallel(handle: Handle, group: Any = None, *, patience: float = 10.0) -> SequenceParallel:
    """Let the ranks of a group share every clip's rows, from the next forward on (Ulysses, arXiv 2309.14509).

    Every rank has the whole model and calls it with the same arguments, as in one process; every rank gets the whole
    result. Planners, caches of keys, further keys and hooks at "attention_heads" see whole sequences and some of the
    heads, so that sparse plans are those of one process. Any number of rows and heads; no fewer rows than ranks.

    With recorded gradients, every rank goes on to the same loss, and the gradient of a parameter is the mean over the
    group of what its ranks get, as DistributedDataParallel takes it.

    Args:
        handle: of ``vdit_fast.accelerate``.
        group: a ``ProcessGroup``, a ``DeviceMesh`` of one dimension, or None for all ranks.
        patience: seconds without a sign of life after which a rank counts as dead, and the others raise.

    Records and what planners and caches remember begin anew, here and at the end.

    Returns:
        what ends it when it is called, or as a context manager; so does ``handle.remove()``.

    Raises:
        RuntimeError: torch.distributed is not initialised; the model cannot be shared, for a reason that the message
            gives; here, or at a call.
        RankFailed: at a call; another rank has failed, or has ended its part.
        TypeError, ValueError: a bad group or patience; at a call, on all ranks, inputs of different sizes (compared in
            every forward; in a group of NCCL alone in the first one of a generation).
    """
    ranks = process_group(group, "sequence_parallel: group")
    check_handle("sequence_parallel", handle)
    if not handle.active:
        raise RuntimeError("sequence_parallel: this handle was removed; call vdit_fast.accelerate on the model again")
    number("patience", patience, 1, 1e6)
    roots = [root for root in handle.roots if root.module() is not None]
    for root in roots:
        reason = _obstacle(handle, root)
        if reason is not None:
            raise RuntimeError(f"sequence_parallel: {root.session.expert} ({root.adapter.family}): {reason}")
    members = Members(ranks, "the sequence group", patience)
    new = SequenceParallel(roots, members)
    for root in roots:
        assert isinstance(root.adapter.rows, RowLayout)
        root.sequence = new
        root.session.around["sequence"] = ShardedRows(members, root.adapter.rows)
        root.session.around_heads["sequence"] = Ulysses(ranks, _rows_of, members.run)
        root.session.begin_records()
        root.rewrap()
    return new


def _obstacle(handle: Handle, root: Root) -> str | None:
    """Why a transformer's rows cannot be shared, or None."""
    session, module = root.session, root.module()
    assert module is not None
    if "sequence" in session.around_heads:
        if "sequence" in session.around:
            return "its sequence is shared already; end that first: call what sequence_parallel returned for it"
        return "its sequence is shared already, by diffusers' enable_parallelism; use one of the two"
    if not root.hooked or isinstance(root.adapter.rows, str):
        return root.no_subset()
    found = transformer_blocks(module, root.adapter)
    if not found:
        return "it has no list of blocks"
    inside = tuple(f"{name}." for name, _ in found)
    outside = [layer.name for layer in session.layers if not layer.name.startswith(inside)]
    if outside:
        return f"{outside[0]} attends to all rows beside the blocks that follow one another"
    for layer in session.layers:
        if layer.always_dense is not None:
            return f"{layer.name}: {layer.always_dense}"
    for child, why in root.adapter.rows.between.items():
        if getattr(module, child, None) is not None:
            return why
    prefix = "" if session.expert == "transformer" else f"{session.expert}."
    for item in handle.skipped:
        name = item.name.removeprefix(prefix)
        if name.startswith(inside) and item.reason not in ROW_BY_ROW:
            return f"{item.name} is not served ({item.reason})"
    return unshared(session)
