"""Which accelerated transformers can be split over ranks, and why others cannot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vdit_fast.caching.adaptive import AdaptivePolicy
from vdit_fast.models.blocks import transformer_blocks
from vdit_fast.models.callables import check_handle
from vdit_fast.models.stage_layout import StageLayout

if TYPE_CHECKING:
    from vdit_fast.config import Config
    from vdit_fast.handle import Handle
    from vdit_fast.parallel.schedule import Schedule
    from vdit_fast.root import Root

__all__ = ["check_call", "check_frames", "check_settings", "remembers", "staged_root"]


def staged_root(handle: Handle) -> tuple[Root, StageLayout]:
    """The transformer of a handle and what lies around its blocks.

    Raises:
        RuntimeError: it cannot be split as it is; the message says why and what would help.
    """
    check_handle("StagePipeline", handle)
    if not handle.active:
        raise RuntimeError("stages: this handle was removed; call vdit_fast.accelerate on the model again")
    if len(handle.roots) != 1:
        raise RuntimeError(
            f"stages: {len(handle.roots)} transformers are accelerated together; accelerate the one to be split"
        )
    root = handle.roots[0]
    reason = _model_reason(root) or _settings_reason(root)
    if reason is not None:
        raise RuntimeError(f"stages: {root.adapter.family}: {reason}")
    assert isinstance(root.adapter.stages, StageLayout)
    return root, root.adapter.stages


def check_call(sampler: Any, shape: Any, arguments: Any, branches: int) -> None:
    """Raise where ``StagePipeline.generate`` cannot begin with these."""
    missing = [name for name in ("timesteps", "fresh") if not hasattr(sampler, name)]
    if missing:
        raise TypeError(
            f"sampler: a {type(sampler).__name__} has no {missing[0]!r}; wrap a diffusers scheduler in SchedulerSampler"
        )
    sizes = tuple(shape) if isinstance(shape, tuple | list) else (shape,)
    if len(sizes) != 3 or any(isinstance(n, bool) or not isinstance(n, Integral) or n < 1 for n in sizes):
        raise ValueError(f"shape: {shape!r}; expected (channels, height, width) of one latent frame, positive integers")
    if not isinstance(arguments, Mapping):
        raise TypeError(
            f"arguments: a {type(arguments).__name__}; expected the transformer's further arguments by name, such as "
            '{"encoder_hidden_states": text}'
        )
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.ndim and value.shape[0] != branches:
            which = "the conditional one, then the unconditional one" if branches == 2 else "guidance is 1"
            raise ValueError(f"arguments: {name!r} has {value.shape[0]} rows; expected {branches} ({which})")


def check_frames(module: Any, shape: Sequence[int], schedule: Schedule) -> None:
    """Raise ValueError where a transformer does not take the frames of a schedule.

    Args:
        module: with the ``config`` of a Wan or SkyReels-V2 transformer.
        shape: (channels, height, width) of a latent frame.
    """
    config = module.config
    takes, gives = config.in_channels, config.out_channels or config.in_channels
    if takes != gives:
        raise ValueError(
            f"shape: {type(module).__name__} takes {takes} channels and returns {gives}: the others are conditions of "
            "whole clips; take a text-to-video model"
        )
    if shape[0] != takes:
        raise ValueError(
            f"shape: {tuple(shape)} has {shape[0]} channels, {type(module).__name__} takes {takes}; pass (channels, "
            "height, width) of a latent frame"
        )
    time, *patch = config.patch_size
    for name, size, p in zip(("height", "width"), shape[1:], patch, strict=True):
        if size % p:
            below = size // p * p
            raise ValueError(
                f"shape: {tuple(shape)} has a {name} of {size}, which is no multiple of the patch, {p}; take "
                f"{f'{below} or ' if below else ''}{below + p}"
            )
    for name, frames in (("num_per_block", schedule.num_per_block), ("num_cat", schedule.num_cat)):
        if frames % time:
            raise ValueError(f"{name}: {frames}; a multiple of the patch, {time} frames, is needed")
    limit, whole = config.rope_max_seq_len, (schedule.frames + schedule.num_cat, *shape[1:])
    names = ("num_per_block + 2 · num_cat", "height", "width")
    for name, size, p in zip(names, whole, (time, *patch), strict=True):
        if size > limit * p:
            raise ValueError(
                f"{name}: {size}; the model's table of positions ends at {limit * p} (rope_max_seq_len); take less"
            )


def check_settings(config: Config, num_cat: int, checkpoint: bool, resume: bool) -> None:
    """Raise ValueError where a run's settings do not go together. ``checkpoint``: whether there is one."""
    cache, planner = config.cache, config.attention
    if resume and not checkpoint:
        raise ValueError("resume: True, but there is no checkpoint to go on from; pass checkpoint=Checkpoint(folder)")
    if cache is not None and num_cat:
        raise ValueError(
            f"num_cat: {num_cat}; with cache {cache.name!r} the attention that a neighbour would read is not "
            "computed in every step; set num_cat to 0, or cache to null in the configuration"
        )
    if cache is not None and checkpoint:
        raise ValueError(
            f"checkpoint: cache {cache.name!r} remembers earlier steps, which a checkpoint has not; run without "
            "checkpoints, or set cache to null in the configuration"
        )
    if planner is not None and planner.remembers and checkpoint:
        raise remembers(config)


def remembers(config: Config) -> ValueError:
    """Of a planner whose memory of earlier steps is in no checkpoint."""
    planner = config.attention
    return ValueError(
        f"checkpoint: planner {planner.name if planner else '?'!r} remembers earlier steps, which a checkpoint "
        "has not; take a planner that does not, or run without checkpoints"
    )


def _model_reason(root: Root) -> str | None:
    module, layout = root.module(), root.adapter.stages
    if module is None:
        return "the transformer is gone; keep a reference to it, the handle does not"
    if not root.hooked:
        return "a part of a transformer was accelerated; accelerate the whole"
    if isinstance(layout, str):
        return layout
    names = {kind.__name__ for kind in type(module).__mro__}
    if not names & set(layout.models):
        return f"{type(module).__name__} runs more than its main blocks; known are {', '.join(layout.models)}"
    if not transformer_blocks(module, root.adapter):
        return "it has no list of blocks"
    frames = getattr(getattr(module, "config", None), "num_frame_per_block", None) or 1
    if frames > 1:
        return f"num_frame_per_block is {frames}: its causal mask knows no frames of neighbours"
    return None


def _settings_reason(root: Root) -> str | None:
    session = root.session
    cache, config = session.config.cache, session.config
    if "stage" in session.around:
        return "it is a stage of another pipeline; close that first"
    if config.subset is not None:
        return f"subset {config.subset.name!r} chooses tokens by the output, which one rank has; set subset to null"
    if cache is not None and isinstance(cache, AdaptivePolicy):
        return f"cache {cache.name!r} decides by features that one rank has; take a policy that goes by the step"
    if cache is not None and cache.granularity not in ("block", "module"):
        return (
            f"cache {cache.name!r} keeps what a {cache.granularity} computes, which several ranks do; set its "
            "granularity to 'block' or 'module'"
        )
    if session.positions is not None:
        return "handle.positions exchanges the rotary tables; switch them off by handle.positions(None)"
    if session.before_rotation is not None or "streaming" in session.around_heads:
        return "a K/V cache stands around its attention; take it off first"
    if "sequence" in session.around_heads:
        return "its sequence is split over ranks already; end that first: call what sequence_parallel returned for it"
    return None
