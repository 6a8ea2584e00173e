"""Guidance parallelism: every rank of a group computes one branch of classifier-free guidance, all ranks get all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vdit_fast.caching.adaptive import AdaptivePolicy
from vdit_fast.caching.checks import number
from vdit_fast.caching.output import output_parts
from vdit_fast.forwards import ForwardStandIn, stock_forward
from vdit_fast.models.callables import check_handle
from vdit_fast.parallel.agreement import Agreement, described
from vdit_fast.parallel.awaited import Awaited, Promise
from vdit_fast.parallel.collectives import all_gather, process_group
from vdit_fast.parallel.members import Members, Shared

if TYPE_CHECKING:
    from vdit_fast.config import Config
    from vdit_fast.handle import Handle
    from vdit_fast.models.session import Session
    from vdit_fast.root import Root

__all__ = ["SPLITS", "GuidanceParallel", "guidance_parallel"]

SPLITS = ("calls", "batch")
"""One forward per branch, or one forward for all whose batch holds them."""

NO_BATCH = ("image_rotary_emb", "rotary_emb")
"""Arguments whose first dimension is one of tokens."""


@dataclass(eq=False)
class _Step:
    """What is known of one step's branches on this rank."""

    place: tuple[int, int, str]
    """Generation, step, transformer."""
    branch: int = -1
    """The last one that was called."""
    mine: list[Tensor] | None = None
    awaited: dict[int, list[Promise]] = field(default_factory=dict)


class GuidedForward(ForwardStandIn):
    """Stands in for ``forward`` of one transformer, outermost."""

    what = "guidance parallelism"

    def __init__(self, module: nn.Module, session: Session, guidance: GuidanceParallel) -> None:
        super().__init__(module, session)
        self._guidance = guidance
        self._forms: dict[Any, tuple[Callable[[list[Tensor]], Any], list[Tensor]]] = {}
        self._step: _Step | None = None
        self._agree = Agreement(guidance.group, "guidance_parallel", guidance.members.run)

    @torch.compiler.disable(recursive=False, reason="ranks run different branches of guidance; compile the blocks")
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        session, guidance = self._session, self._guidance
        if not session.active or session.forward is None or session.guided:
            return self.inner(*args, **kwargs)
        if torch.is_grad_enabled():
            raise RuntimeError("guidance_parallel is for sampling: call the pipeline under torch.no_grad()")
        reason = unguided(session.config)
        if reason is not None:
            raise RuntimeError(f"guidance_parallel cannot run this call: {reason}")
        arguments = dict(zip(self.__signature__.parameters, args, strict=False)) | kwargs
        session.guided = True
        try:
            return self._batch(arguments) if guidance.split == "batch" else self._call(session, arguments)
        finally:
            session.guided = False

    # ------------------------------------------------------------------ one forward for all branches
    def _batch(self, arguments: dict[str, Any]) -> Any:
        guidance, session = self._guidance, self._session
        latents = arguments.get("hidden_states")
        batch = latents.shape[0] if isinstance(latents, Tensor) else 0
        self._compare(session, arguments)
        if batch < guidance.ranks:
            raise RuntimeError(
                f"guidance_parallel: a batch of {batch} cannot be split over {guidance.ranks} ranks; split='calls' is "
                "for pipelines that call the transformer once per branch"
            )
        sizes = [batch // guidance.ranks + (rank < batch % guidance.ranks) for rank in range(guidance.ranks)]
        start, size = sum(sizes[: guidance.rank]), sizes[guidance.rank]
        own = {
            name: value.narrow(0, start, size)
            if isinstance(value, Tensor) and value.ndim and value.shape[0] == batch and name not in NO_BATCH
            else value
            for name, value in arguments.items()
        }
        if session.forward is not None:
            session.forward.timestep = own.get("timestep")
        parts, wrap = self._computed(own)
        return wrap([self._gather(part, sizes) for part in parts])

    # ------------------------------------------------------------------ one forward per branch
    def _call(self, session: Session, arguments: dict[str, Any]) -> Any:
        guidance, forward = self._guidance, session.forward
        assert forward is not None
        at = forward.step
        if at.step < 0:
            raise RuntimeError(
                "guidance_parallel: the denoising step is unknown, so nobody knows which branch this call is; "
                "accelerate the pipeline, or name the step by handle.step(...)"
            )
        step = self._follow((at.generation, at.step, at.expert), at.branch)
        if at.branch == 0:
            self._compare(session, arguments)
        form = self._forms.get(_signature(arguments))
        own = at.branch == guidance.rank
        if own or form is None:
            parts, wrap = self._computed(arguments)
            self._forms[_signature(arguments)] = wrap, [_form(part) for part in parts]
            if own:
                step.mine = parts
            else:  # only to learn the form of the answer: nothing of it may stay
                session.state.clear()
                session.cache.forget()
        else:
            forward.cached = True  # no cache is to look for it
            wrap, forms = form
            missing = (
                f"guidance_parallel: the result of guidance branch {at.branch} is used before branch "
                f"{guidance.ranks - 1} was called; where the pipeline does not guide, end guidance parallelism, and "
                "where it has all branches in one batch, take split='batch'"
            )
            promises = step.awaited[at.branch] = [Promise(missing) for _ in forms]
            device = _device(arguments)
            parts = [Awaited.of(promise, shape, device) for promise, shape in zip(promises, forms, strict=True)]
        if at.branch < guidance.ranks - 1:
            return wrap(parts)
        return wrap(self._exchange(step))

    def _follow(self, place: tuple[int, int, str], branch: int) -> _Step:
        """The step that a call belongs to; raises where branches are missing or too many."""
        ranks, step = self._guidance.ranks, self._step
        if step is not None and step.place != place:
            if step.branch < ranks - 1:
                called, self._step = step.branch + 1, None
                raise RuntimeError(
                    f"guidance_parallel: step {step.place[1]} ended after {called} of {ranks} branches; where the "
                    "pipeline does not guide in every step, end guidance parallelism"
                )
            step = None
        if step is None:
            step = self._step = _Step(place)
        if branch != step.branch + 1 or branch >= ranks:
            raise RuntimeError(
                f"guidance_parallel: branch {branch} of step {place[1]} follows branch {step.branch}, with {ranks} "
                "ranks; the group must have as many ranks as the pipeline has branches"
            )
        step.branch = branch
        return step

    def _compare(self, session: Session, arguments: dict[str, Any]) -> None:
        """Raise on all ranks where they were given different latents, before anything is computed."""
        latents = arguments.get("hidden_states")
        if not isinstance(latents, Tensor) or session.forward is None:
            return
        try:
            self._agree(described("hidden_states", latents), latents.device, session.forward.step.generation)
        except BaseException:
            self._step = None
            raise

    def _exchange(self, step: _Step) -> list[Tensor]:
        """The last branch's parts; those of earlier ones are filled in."""
        guidance = self._guidance
        assert step.mine is not None
        last = []
        for index, part in enumerate(step.mine):
            found = self._gather(part[None], [1] * guidance.ranks).unbind(0)
            for branch, promises in step.awaited.items():
                promises[index].keep(found[branch])
            last.append(part if guidance.rank == guidance.ranks - 1 else found[-1])
        return last

    def _computed(self, arguments: dict[str, Any]) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]]:
        """The parts of what this rank computes, and how they are put together."""
        try:
            return self._parts(self.inner(**arguments))
        except BaseException as error:
            self._guidance.members.failed(error)
            raise

    def _gather(self, part: Tensor, sizes: list[int]) -> Tensor:
        guidance = self._guidance
        guidance.exchanges += 1
        guidance.bytes_sent += (guidance.ranks - 1) * part.numel() * part.element_size()
        try:
            return all_gather(part, sizes, 0, guidance.group, guidance.members.run)
        except BaseException as error:
            guidance.members.failed(error)
            raise

    def _parts(self, output: Any) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]]:
        found = output_parts(output)
        if found is None:
            raise RuntimeError(
                f"guidance_parallel needs a transformer that returns tensors of one device, got {type(output).__name__}"
            )
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # a copied model computes all branches
        if self._inner is not None:
            return copy.deepcopy(self._inner, memo)
        module = self._module()
        return stock_forward(memo[id(module)]) if id(module) in memo else None


def _form(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _device(arguments: dict[str, Any]) -> torch.device:
    latents = arguments.get("hidden_states")
    assert isinstance(latents, Tensor)
    return latents.device


def _signature(arguments: dict[str, Any]) -> Any:
    """What the form of the answer hangs on."""
    latents = arguments.get("hidden_states")
    found = (tuple(latents.shape), latents.dtype, latents.device) if isinstance(latents, Tensor) else None
    return found, arguments.get("return_dict", True)


def unguided(config: Config) -> str | None:
    """What of a configuration mixes branches, or None."""
    if config.subset is not None:
        return "subset chooses its tokens by all branches; set subset to null"
    if isinstance(config.cache, AdaptivePolicy):
        return f"the cache policy {config.cache.name!r} decides for all branches by what it sees of the first"
    return None


class GuidanceParallel(Shared):
    """What ``guidance_parallel`` put in place; ends it when it is called, or as a context manager."""

    def __init__(self, roots: list[Root], members: Members, split: str) -> None:
        super().__init__(members)
        self._roots = roots
        self.split = split
        self.exchanges = 0
        self.bytes_sent = 0
        """To other ranks."""

    def wrap(self, module: nn.Module, session: Session) -> ForwardStandIn:
        """What stands around a transformer's forward."""
        return GuidedForward(module, session, self)

    def __call__(self) -> None:
        """Every rank computes all branches again. Safe to call again."""
        for root in self._roots:
            if root.guidance is self:
                root.guidance = None
                root.wrap()
        self._roots = []
        super().__call__()


def guidance_parallel(
    handle: Handle, group: Any = None, *, split: str = "calls", patience: float = 10.0
) -> GuidanceParallel:
    """Let every rank of a group compute one branch of classifier-free guidance, from the next forward on.

    All ranks run the same pipeline. A transformer's call of another rank's branch returns at once; its values come when
    the last branch has been computed everywhere, and until then whatever the pipeline does with them is noted. In the
    first step of a new size every rank computes the first branch, to learn the form of the answer.

    Args:
        handle: of ``vdit_fast.accelerate``.
        group: a ``ProcessGroup``, a ``DeviceMesh`` of one dimension, or None for all ranks; as many ranks as branches.
        split: "calls": the pipeline calls the transformer once per branch, rank r computes the r-th call of a step.
            "batch": it calls it once with the branches in one batch, which the ranks share in equal parts.
        patience: seconds without a sign of life after which a rank counts as dead, and the others raise.

    Returns:
        what ends it when it is called, or as a context manager; so does ``handle.remove()``.

    Raises:
        RuntimeError: torch.distributed is not initialised; something of the configuration mixes branches; here, or at a
            call, also where a step has fewer or more branches than the group has ranks.
        RankFailed: at a call; another rank has failed, or has ended its part.
        TypeError, ValueError: a bad group or patience, or an unknown split; at a call, on all ranks, latents of
            different sizes (compared in every step; in a group of NCCL alone in the first one of a generation).
    """
    if split not in SPLITS:
        raise ValueError(f"guidance_parallel: split must be one of {', '.join(map(repr, SPLITS))}, got {split!r}")
    number("patience", patience, 1, 1e6)
    ranks = process_group(group, "guidance_parallel: group")
    check_handle("guidance_parallel", handle)
    if not handle.active:
        raise RuntimeError("guidance_parallel: this handle was removed; call vdit_fast.accelerate on the model again")
    reason = unguided(handle.config)
    roots = [root for root in handle.roots if root.module() is not None]
    for root in roots:
        if root.guidance is not None:
            reason = "its branches are shared already; end that first: call what guidance_parallel returned for it"
        elif not root.hooked:
            reason = root.no_subset()
    if reason is not None:
        raise RuntimeError(f"guidance_parallel: {reason}")
    new = GuidanceParallel(roots, Members(ranks, "the guidance group", patience), split)
    for root in roots:
        root.guidance = new
        root.wrap()
    return new
