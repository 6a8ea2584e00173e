"""Causal generation with a factorised model: temporal attention reads the clean frames before a chunk from a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vdit_fast.caching.checks import count
from vdit_fast.models.kernels import dense_attention, missing_kernel
from vdit_fast.ops.short_attention import MAX_SHORT_KEYS, short_attention
from vdit_fast.streaming.kv_cache import KVCache
from vdit_fast.streaming.pages import Ring, numbered

if TYPE_CHECKING:
    from vdit_fast.handle import Handle
    from vdit_fast.models.heads import HeadsCall

__all__ = ["CausalVideo"]

_MODEL = "LatteTransformer3DModel"


class CausalVideo:
    """ViD-GPT (arXiv 2406.10981) and Ca2-VDM (arXiv 2411.16375) on a factorised transformer of diffusers (Latte).

    A video is made chunk by chunk. The frames before a chunk are clean; every temporal attention has their keys and
    values in a ``KVCache`` whose page is one frame at one place, written once, when the frames became clean, and read
    by all denoise steps of later chunks. A noisy row reads the clean prefix and its whole chunk; a clean row, in the
    pass that writes its keys, reads the prefix and the frames of its chunk up to itself. When ``max_frames`` are held
    the oldest ones leave.

    Frame i has the temporal position ``i mod max_frames``. Latte adds positions to its rows before the first temporal
    block, so keys carry the position they were written with; a frame keeps its number, hence its position, and nothing
    in the cache changes as frames leave. Keys have neither norm nor RoPE in this family.

    Args:
        handle: of ``vdit_fast.accelerate`` on the transformer or its pipeline, without feature cache and subset.
        chunk: most noisy frames at a time, below ``max_frames``.
        max_frames: frames that attention sees, the chunk's included; the model's ``video_length`` by default.
        max_bytes: of one guidance branch's cache, as of ``KVCache``.

    Raises:
        ValueError: a model without temporal attention to cache, or a configuration that would leave parts of it out.
    """

    def __init__(
        self, handle: Handle, *, chunk: int, max_frames: int | None = None, max_bytes: int | str | None = None
    ) -> None:
        roots = [root for root in handle.roots if root.module() is not None and root.session.active]
        if len(roots) != 1 or type(roots[0].module()).__name__ != _MODEL:
            found = ", ".join(type(root.module()).__name__ for root in roots) or "none"
            raise ValueError(f"CausalVideo serves one {_MODEL}, the handle has {found}")
        (root,) = roots
        module: Any = root.module()
        for name in ("cache", "subset", "linear"):
            if getattr(handle.config, name, None) is not None:
                raise ValueError(
                    f"{name} is configured, which leaves temporal attention out of some steps, so that keys of the "
                    f"clean frames would be missing; set {name} to null"
                )
        self.session, self._module, self.max_bytes = root.session, module, max_bytes
        names = [ledger.name for ledger in self.session.layers]
        over = [root.adapter.attends_over(name, module.get_submodule(name)) for name in names]
        self._layers = {layer: at for at, layer in enumerate(i for i, o in enumerate(over) if o == "frames")}
        blocks = module.temporal_transformer_blocks
        if len(self._layers) != len(blocks) or not len(blocks):
            raise ValueError(
                f"{len(self._layers)} of {len(blocks)} temporal attention layers are served; all of them must be, see "
                "report()"
            )
        present = self.session.around_heads.get("streaming")
        if present is not None:
            raise ValueError(f"{type(present).__name__} streams with this model already; close it first")
        table = module.temp_pos_embed.shape[1]
        max_frames = table if max_frames is None else max_frames
        count("max_frames", max_frames, 2)
        count("chunk", chunk, 1)
        if max_frames > table:
            raise ValueError(f"max_frames is {max_frames}, but the model has {table} temporal positions")
        if chunk >= max_frames:
            raise ValueError(f"chunk is {chunk} of max_frames {max_frames}; leave room for at least one clean frame")
        self.chunk, self.max_frames = chunk, max_frames
        self.caches: dict[int, KVCache] = {}
        self._ring = Ring(max_frames, 0)
        self._pages: list[int] = []
        self._seen: set[int] = set()
        self._writing = False
        self._written: set[int] = set()  # guidance branches whose keys are those of the clean chunk
        self._branch = 0
        self._stock: Tensor | None = None  # the model's table while a forward has another one
        self._rows: tuple[Tensor, Tensor] | None = None  # the chunk's, and the table that they are of
        self.session.around_heads["streaming"] = self
        self._hooks = [
            module.register_forward_pre_hook(_Hook(self._before), with_kwargs=True),
            module.register_forward_hook(_Hook(self._after), always_call=True),
            blocks[0].register_forward_pre_hook(_Hook(self._before_block), with_kwargs=True),
        ]

    # ------------------------------------------------------------------ what the caller does
    @property
    def ids(self) -> tuple[int, ...]:
        """Temporal positions of the current chunk's frames."""
        ids = numbered(self._ring.frames, "cyclic", self.max_frames)
        return ids[len(ids) - self._ring.chunk :]

    @property
    def nbytes(self) -> int:
        """Bytes held for keys and values, all guidance branches."""
        return sum(cache.nbytes for cache in self.caches.values())

    def begin(self, frames: int | None = None) -> None:
        """The next forwards are the next ``frames`` frames (``chunk`` by default); old frames leave where they must.

        Raises:
            RuntimeError: the frames before were not written in a clean pass, by every guidance branch.
        """
        frames = self.chunk if frames is None else frames
        count("frames", frames, 1)
        if self._ring.chunk and not self._written:
            raise RuntimeError("begin: the frames before were not written; run the model on them inside clean()")
        left = sorted(self.caches.keys() - self._written)
        if left:
            raise RuntimeError(
                f"begin: guidance branch {', '.join(map(str, left))} did not run on the clean frames and holds keys of "
                "noisy ones; run every branch inside clean()"
            )
        self._ring.advance(frames)
        self._pages.append(frames)
        for cache in self.caches.values():
            cache.reserve(frames)
        self._rows = None
        self._written.clear()
        self.session.tracker.reset()  # guidance branches are counted anew

    @contextmanager
    def clean(self) -> Iterator[None]:
        """Forwards inside write the keys of the current chunk's finished frames, at the timestep of clean frames."""
        self._writing = True
        self.session.tracker.reset()  # a step at the same timestep is no other guidance branch
        try:
            yield
        finally:
            self._writing = False

    def roll_out(
        self,
        sample: Callable[[Tensor], Tensor],
        write: Callable[[Tensor], Any],
        noise: Tensor,
        first: Tensor | None = None,
    ) -> Tensor:
        """Denoise chunk after chunk; may be called again to go on.

        Args:
            sample: noise [B, C, frames, h, w] -> latents, by any number of forwards of the model.
            write: runs the model once (once per guidance branch) on clean latents, at the timestep of clean frames.
            noise: [B, C, frames, h, w]; cut into chunks, the last one may be shorter.
            first: clean frames [B, C, frames, h, w] to begin with.

        Returns:
            the latents of all chunks, without ``first``.
        """
        if first is not None:
            self.begin(first.shape[2])
            with self.clean():
                write(first)
        parts = []
        for part in noise.split(self.chunk, dim=2):
            self.begin(part.shape[2])
            parts.append(sample(part))
            with self.clean():
                write(parts[-1])
        return torch.cat(parts, dim=2)

    def reset(self) -> None:
        """Forget all frames; a new video begins at frame 0."""
        self._ring.reset()
        self._pages.clear()
        self.caches.clear()
        self._written.clear()

    def close(self) -> None:
        """Let the model run whole clips again."""
        for hook in self._hooks:
            hook.remove()
        if self.session.around_heads.get("streaming") is self:
            del self.session.around_heads["streaming"]
        self.caches.clear()

    # ------------------------------------------------------------------ around attention
    def __call__(self, call: HeadsCall, proceed: Callable[[], Tensor]) -> Tensor:
        at = self._layers.get(call.layer)
        if at is None:
            return proceed()
        cache = self._cache(call)
        cache.write(at, call.k, call.v)
        self._seen.add(at)
        if not self._writing:
            call.k, call.v = cache.keys_values(at)
            return proceed()
        keys, values = cache.ordered(at)
        rows, held = call.q.shape[1], keys.shape[1]
        if held <= MAX_SHORT_KEYS and missing_kernel(call.q, short=True) is None:
            return short_attention(call.q, keys, values, causal=True, scale=call.scale)
        reads = torch.ones(rows, held, dtype=torch.bool, device=keys.device).tril(held - rows)
        return dense_attention(call.q, keys, values, None, call.scale, reads[None, None])

    def fresh(self) -> None:
        """A copied model runs whole clips."""

    def _cache(self, call: HeadsCall) -> KVCache:
        forward = call.session.forward
        branch = self._branch = forward.step.branch if forward is not None else 0
        found = self.caches.get(branch)
        if found is None:
            if len(self._pages) > 1:
                raise RuntimeError(
                    f"guidance branch {branch} has no past: it did not run in the clean passes of {self._pages[:-1]} "
                    "frames; run every branch in every clean pass"
                )
            batch, _, heads, dim = call.k.shape
            found = self.caches[branch] = KVCache(
                layers=len(self._layers), capacity=self.max_frames, page=1, batch=batch, heads=heads, head_dim=dim,
                positions="cyclic", table=self.max_frames, max_bytes=self.max_bytes, dtype=call.k.dtype,
                device=call.k.device,
            )  # fmt: skip
            found.reserve(self._pages[0])
        return found

    # ------------------------------------------------------------------ around the forward
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.session.active:
            return
        if torch.compiler.is_compiling():
            raise RuntimeError("CausalVideo: its state is on the host; compile the transformer without fullgraph=True")
        latents = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if self._ring.chunk == 0:
            raise RuntimeError("CausalVideo: no frames are begun; call begin() before the model, or close()")
        if latents.shape[2] != self._ring.chunk:
            raise ValueError(
                f"hidden_states has {latents.shape[2]} frames, but the current chunk has {self._ring.chunk}; begin() "
                "says how many there are"
            )
        self._seen.clear()
        table: Any = module.temp_pos_embed  # read anew: the model may have been moved or cast
        if self._rows is None or self._rows[1] is not table:
            self._rows = table[:, list(self.ids)], table
        if latents.shape[2] > 1:  # the model adds none to a single frame
            self._stock, module.temp_pos_embed = table, self._rows[0]

    def _before_block(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self.session.active or self._ring.chunk != 1 or self._rows is None:
            return None
        return (args[0] + self._rows[0].to(args[0].dtype), *args[1:]), kwargs

    def _after(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if self._stock is not None:
            module.temp_pos_embed, self._stock = self._stock, None
        if not self.session.active or out is None:  # None: an error is on its way
            return
        if len(self._seen) != len(self._layers):
            raise RuntimeError(
                f"{len(self._layers) - len(self._seen)} of {len(self._layers)} temporal layers ran without the cache; "
                "see the fallbacks in report()"
            )
        if self._writing:
            self._written.add(self._branch)
        else:  # a noisy step after the clean pass overwrites its keys
            self._written.discard(self._branch)


class _Hook:
    """A module's hook that stays behind when the module is copied or pickled."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run

    def __call__(self, *args: Any) -> Any:
        return self.run(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _nothing

    def __reduce__(self) -> Any:
        return _idle, ()


def _nothing(*_: Any) -> None:
    return None


def _idle() -> Callable[..., None]:
    return _nothing
