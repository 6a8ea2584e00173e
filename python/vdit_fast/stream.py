"""``stream``: a video generated chunk by chunk, each handed out as soon as it is ready."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from numbers import Integral
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vdit_fast.accelerate import accelerate, existing_handles
from vdit_fast.config import Config
from vdit_fast.handle import Handle
from vdit_fast.models.base import CROSS_ATTENTION
from vdit_fast.models.extra_keys import ExtraKeys
from vdit_fast.root import NO_STEPS, Root
from vdit_fast.streaming.attach import CachedAttention
from vdit_fast.streaming.families import check_family
from vdit_fast.streaming.forward import ChunkModel, StreamedChunk
from vdit_fast.streaming.self_forcing import SelfForcing

__all__ = ["stream"]

_streams: WeakKeyDictionary[Handle, int] = WeakKeyDictionary()
"""Handles that streams have made -> the streams that use them now; the last one takes the acceleration off."""


def stream(
    target: Any,
    settings: SelfForcing | None = None,
    *,
    prompt_embeds: Tensor,
    latent_size: tuple[int, int],
    negative_prompt_embeds: Tensor | None = None,
    frames: int | None = None,
    initial_latents: Tensor | None = None,
    generator: torch.Generator | None = None,
    decode: Callable[[Tensor], Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Iterator[StreamedChunk]:
    """Generate a video of any length chunk by chunk, each chunk over the keys and values of the frames before it.

    The model must have been trained for it (CausVid, Self Forcing and their like): one that always saw whole clips runs
    too, and draws poor pictures. Served are Wan and SkyReels-V2 transformers.

    Args:
        target: what ``accelerate`` takes, with one transformer in it, or its handle. What is not accelerated is for
            the time of the stream.
        settings: how chunks are made and what is remembered; ``SelfForcing()`` by default.
        prompt_embeds: [B, L, C], the transformer's ``encoder_hidden_states``, on its device.
        latent_size: (height, width) of the latents.
        negative_prompt_embeds: of the other branch, where ``settings.guidance`` is not 1.
        frames: latent frames to generate; None: without end.
        initial_latents: clean latents [B, C, F0, H, W] that the video goes on from; they are not handed out.
        generator: of the noise; one of the CPU draws the same noise for every device.
        decode: called with the latents of every chunk, for instance a VAE's decoder; its result is ``frames``.
        arguments: further arguments of the transformer, such as ``encoder_hidden_states_image``.

    Yields:
        a ``StreamedChunk`` as soon as its last denoise step is done; its keys and values are written when the next
        chunk is asked for. The model can be used for anything else between two chunks. Stop whenever you like; the
        caches are freed with the generator (``close()``).

    Raises:
        TypeError, ValueError: here; a bad argument, or one that does not go with another.
        NotImplementedError: with the first chunk; a model that cannot be streamed, with the reason.
        ValueError: with the first chunk; an argument that does not suit the model, more ``frames`` than
            ``store="post_rope"`` has positions for, or a cache larger than ``max_bytes`` or than the device's memory.
        RuntimeError: with the first chunk, a configuration that excludes streaming; later, a removed acceleration.
        ValueError: with a later chunk of a video without end, ``store="post_rope"`` where the model's table of
            positions ends.
    """
    settings = SelfForcing() if settings is None else settings
    if not isinstance(settings, SelfForcing):
        raise TypeError(f"settings must be a SelfForcing, got {type(settings).__name__}")
    _check_embeds("prompt_embeds", prompt_embeds)
    prompts = [prompt_embeds]
    if settings.guidance != 1:
        if negative_prompt_embeds is None:
            raise ValueError(f"negative_prompt_embeds is None, guidance {settings.guidance}; pass them, or guidance 1")
        _check_embeds("negative_prompt_embeds", negative_prompt_embeds)
        if negative_prompt_embeds.shape[:1] != prompt_embeds.shape[:1]:
            raise ValueError(
                f"negative_prompt_embeds {list(negative_prompt_embeds.shape)} and prompt_embeds "
                f"{list(prompt_embeds.shape)} must have one batch size"
            )
        prompts.append(negative_prompt_embeds)
    if frames is not None and (isinstance(frames, bool) or not isinstance(frames, int) or frames < 1):
        raise ValueError(f"frames must be an integer of at least 1, or None for no end, got {frames!r}")
    sizes = tuple(latent_size) if isinstance(latent_size, tuple | list) else (latent_size,)
    if len(sizes) != 2 or any(isinstance(n, bool) or not isinstance(n, Integral) or n < 1 for n in sizes):
        raise ValueError(f"latent_size must be (height, width), two positive integers, got {latent_size!r}")
    if initial_latents is not None and not isinstance(initial_latents, Tensor):
        raise TypeError(f"initial_latents must be a tensor or None, got {type(initial_latents).__name__}")
    sizes = tuple(int(n) for n in sizes)
    return _stream(target, settings, prompts, sizes, frames, initial_latents, generator, decode, dict(arguments or {}))


def _check_embeds(name: str, value: Any) -> None:
    if not isinstance(value, Tensor) or value.ndim != 3 or 0 in value.shape:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must be [batch, tokens, channels] and not empty, got {got}")


def _stream(
    target: Any,
    settings: SelfForcing,
    prompts: list[Tensor],
    latent_size: tuple[int, ...],
    frames: int | None,
    initial: Tensor | None,
    generator: torch.Generator | None,
    decode: Callable[[Tensor], Any] | None,
    arguments: dict[str, Any],
) -> Iterator[StreamedChunk]:
    handle = _handle_of(target)
    shared = handle in _streams
    if shared:
        _streams[handle] += 1
    try:
        root = _root_of(handle)
        module = root.module()
        assert module is not None
        batch, device = prompts[0].shape[0], prompts[0].device
        _check_width(module, prompts)
        shape, page = _sizes(module, batch, latent_size)
        _check_frames(module, settings, shape, frames, initial)
        attention = CachedAttention(
            root.session,
            module,
            page=page,
            capacity=settings.cache_frames,
            sinks=settings.sinks,
            store=settings.store,
            max_bytes=settings.max_bytes,
            branches=len(prompts),
        )
        branches = [{"encoder_hidden_states": prompt} for prompt in prompts]
        model = ChunkModel(
            root.session,
            module,
            attention,
            branches,
            arguments,
            guidance=settings.guidance,
            prediction=settings.prediction,
        )
        at = 0 if initial is None else initial.shape[2]
        chunks = settings.rollout(model, shape, frames, initial=initial, generator=generator, device=device)
        for index, latents in enumerate(chunks):
            yield StreamedChunk(index, at, latents, None if decode is None else decode(latents))
            at += latents.shape[2]
    finally:
        if shared:
            _streams[handle] -= 1
            if not _streams[handle]:
                handle.remove()


def _handle_of(target: Any) -> Handle:
    """The target's handle, which is one of ``_streams`` where it is made here."""
    if isinstance(target, Handle):
        return target
    known = existing_handles(target)
    if len(known) == 1:
        return known[0]
    handle = accelerate(target, Config(text_kv=True))
    _streams.setdefault(handle, 0)
    return handle


def _root_of(handle: Handle) -> Root:
    """The one transformer to stream with. Raises where there is none, or where its configuration excludes it."""
    if not handle.active:
        raise RuntimeError("stream: this handle was removed; call vdit_fast.accelerate on the model again")
    if len(handle.roots) != 1:
        names = ", ".join(root.session.expert for root in handle.roots)
        raise NotImplementedError(f"stream: one transformer makes a video chunk by chunk, here are {names}; pass one")
    (root,), config = handle.roots, handle.config
    module = root.module()
    if module is None or not root.hooked:
        raise NotImplementedError(f"stream: {NO_STEPS}; accelerate the whole transformer")
    check_family(module, root.adapter.family)
    left = [item for item in handle.skipped if item.reason != CROSS_ATTENTION]
    if left:
        raise NotImplementedError(
            f"stream: {left[0].name} is left alone ({left[0].reason}), and would not see the frames before its chunk"
        )
    for name, value, why in (
        ("cache", config.cache, "what a step remembers belongs to its chunk"),
        ("subset", config.subset, "every token of a chunk must leave its keys"),
        ("linear", config.linear, "linear layers read no kept keys"),
    ):
        if value is not None:
            raise RuntimeError(f"stream: {name} is set in the configuration: {why}; reconfigure with {name} null")
    extra = root.session.around_heads.get("segments")
    if isinstance(extra, ExtraKeys) and extra.captured is not None:
        raise RuntimeError("stream: keys of whole clips are captured for another model; stop() that first")
    return root


def _check_width(module: nn.Module, prompts: list[Tensor]) -> None:
    config: Any = module.config
    wanted = config.text_dim
    for name, value in zip(("prompt_embeds", "negative_prompt_embeds"), prompts, strict=False):
        if value.shape[2] != wanted:
            raise ValueError(
                f"{name} is {list(value.shape)}, but {type(module).__name__} takes text of {wanted} channels "
                "(text_dim); encode the prompt with the text encoder that the model was trained with"
            )


def _sizes(module: nn.Module, batch: int, latent_size: tuple[int, ...]) -> tuple[tuple[int, int, int, int], int]:
    """((B, C, H, W) of the latents, tokens of a frame)."""
    config: Any = module.config
    time, *patch = config.patch_size
    channels = config.out_channels or config.in_channels
    if config.in_channels != channels:
        raise NotImplementedError(
            f"stream: the model takes {config.in_channels} channels and returns {channels}: the others are conditions "
            "of whole clips; stream a text-to-video model, from initial_latents where it shall begin with an image"
        )
    if time != 1:
        raise NotImplementedError(f"stream: a patch of the model has {time} frames; served are models with 1")
    limit = config.rope_max_seq_len
    if any(n < p or n % p or n // p > limit for n, p in zip(latent_size, patch, strict=True)):
        raise ValueError(
            f"latent_size must be (height, width), multiples of the patch {tuple(patch)} and at most {limit} of them, "
            f"got {latent_size}"
        )
    height, width = latent_size
    return (batch, channels, height, width), (height // patch[0]) * (width // patch[1])


def _check_frames(
    module: nn.Module,
    settings: SelfForcing,
    shape: tuple[int, int, int, int],
    frames: int | None,
    initial: Tensor | None,
) -> None:
    batch, channels, height, width = shape
    if initial is not None and (
        initial.ndim != 5 or initial.shape[2] < 1 or initial.shape[:2] != shape[:2] or initial.shape[3:] != shape[2:]
    ):
        raise ValueError(
            f"initial_latents must be [{batch}, {channels}, frames, {height}, {width}], got {list(initial.shape)}"
        )
    block = getattr(module.config, "num_frame_per_block", None) or 1
    given = None if initial is None else initial.shape[2]
    asked = {"chunk_frames": settings.chunk_frames, "frames": frames, "the number of initial_latents": given}
    for name, value in asked.items():
        if value is not None and value % block:
            raise ValueError(
                f"{name} is {value}, but the model is causal by {block} frames (num_frame_per_block); use a multiple"
            )
    config: Any = module.config
    limit, before = config.rope_max_seq_len, given or 0
    if frames is not None and settings.store == "post_rope" and before + frames > limit:
        behind = f" behind {before} initial_latents" if before else ""
        raise ValueError(
            f"frames is {frames}{behind}, but the model's table has {limit} positions (rope_max_seq_len), and "
            f'store="post_rope" numbers frames absolutely; use at most {max(limit - before, 0)}, or '
            'SelfForcing(store="pre_rope"), which goes on without end'
        )
