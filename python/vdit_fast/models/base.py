"""What a model family must tell: which processors it serves, how their attention is called, where the tokens lie."""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from vdit_fast.models.block_modules import BlockModules
from vdit_fast.models.context_parallel import NO_SEQUENCE, follow, unserved
from vdit_fast.models.fusion import BlockForward
from vdit_fast.models.geometry import Volume
from vdit_fast.models.rotary import served_tables
from vdit_fast.models.row_layout import RowLayout
from vdit_fast.models.session import Geometry, Session
from vdit_fast.models.stage_layout import StageLayout

__all__ = [
    "CROSS_ATTENTION",
    "ModelAdapter",
    "ServedProcessor",
    "is_prefix_mask",
    "parameter_names",
    "patch_grid",
    "set_processor",
    "split_added_heads",
    "split_heads",
]

CROSS_ATTENTION = "cross-attention"
"""The reason for leaving a cross-attention module alone."""


def set_processor(module: nn.Module, processor: Any) -> None:
    """Exchange a module's attention processor by its public setter, or by attribute where there is none."""
    setter = getattr(module, "set_processor", None)
    if callable(setter):
        setter(processor)
    else:
        module.processor = processor


Rotated = TypeVar("Rotated", bound=tuple[Tensor, Tensor] | Tensor | None)
"""A model's rotary tables in its own form."""


def _same(stock: Any) -> Any:
    """Unpickles a served processor as the stock one."""
    return stock


class ServedProcessor:
    """Base of the processors that replace a stock one. Subclasses name every parameter of the stock ``__call__``:
    diffusers drops keyword arguments that the signature does not name.

    They call the attention module's own sub-modules, so LoRA, offloading, casting and quantised layers stay alive.
    """

    attends: ClassVar[bool] = True
    """False where something around the attention is served and not the attention."""
    linear: ClassVar[bool] = False
    """Whether the attention is linear by the model's own design."""
    takes_positions: ClassVar[bool] = False
    """Whether it gets its rotary tables through ``tables``."""

    def __init__(self, session: Session, layer: int, stock: Any, root: Any) -> None:
        self.session = session
        self.stock = stock
        self._layer = layer
        self._root = root  # weak reference to the transformer
        self.handle = torch.tensor([session.id, layer], dtype=torch.int64, device="cpu")
        if self._parallel_config is not None:
            self._parallel_config = self._parallel_config

    # diffusers' set_attention_backend() and enable_parallelism() skip processors without these two attributes. The
    # stock processor keeps the values, so nothing is lost by remove().
    @property
    def _attention_backend(self) -> Any:
        return getattr(self.stock, "_attention_backend", None)

    @_attention_backend.setter
    def _attention_backend(self, value: Any) -> None:
        self.stock._attention_backend = value

    @property
    def _parallel_config(self) -> Any:
        return getattr(self.stock, "_parallel_config", None)

    @_parallel_config.setter
    def _parallel_config(self, value: Any) -> None:
        self.stock._parallel_config = value
        if self.session.active:
            follow(self.session, value)

    @property
    def layer(self) -> int:
        """Number of this module among the served layers."""
        return self._layer

    def root(self) -> Any:
        """The transformer this processor belongs to, None when it is gone."""
        return self._root()

    def __call__(self, attn: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def tables(self, stock: Rotated, tokens: Tensor) -> Rotated:
        """The rotary tables to use: the model's, unless ``Handle.positions`` exchanges them.

        Called before ``stands_aside``, so that the stock processor gets them too. Raises RuntimeError where the user's
        positions cannot be had: without them the answer would be another one.

        Args:
            stock: (cos, sin), or one complex tensor cos + i sin, as the transformer hands it to every layer.
            tokens: the layer's input.
        """
        if self.session.positions is None or not self.session.active:
            return stock
        if stock is None:
            raise RuntimeError("positions: this model has no rotary tables; switch them off by handle.positions(None)")
        if self._parallel_config is not None:
            raise RuntimeError(
                "positions: context parallelism is enabled, every rank has the tables of its shard only; disable it, "
                "or switch positions off by handle.positions(None)"
            )
        if isinstance(stock, Tensor):
            cos, sin = served_tables((stock.real, stock.imag), tokens, self.handle, stock)
            return cast(Rotated, torch.complex(cos, sin))
        return cast(Rotated, served_tables(stock, tokens, self.handle, stock[0]))

    def stands_aside(
        self,
        mask: Tensor | None = None,
        reason: str | None = None,
        why: str = "an attention mask of this form is not understood",
    ) -> bool:
        """True when the stock processor must run: after remove(), with a mask (``why`` says what is wrong with it), for
        a ``reason`` of the family's own, or under context parallelism, where every rank holds only its shard of the
        sequence.

        Counted in the report, except inside a compiled block (``Handle.report`` also looks at the settings themselves).
        """
        if not self.session.active:
            return True
        stands = self._stands_aside(mask, reason, why)
        if stands and self.session.hooks.at_heads(self._layer):
            raise RuntimeError(
                f"hook at 'attention_heads': the stock processor of {self.session.layers[self._layer].name} must run "
                "here, which shows nothing behind its softmax; see the fallbacks in report(), or hook another place"
            )
        return stands

    def _stands_aside(self, mask: Tensor | None, reason: str | None, why: str) -> bool:
        parallel, shared = self._parallel_config, "sequence" in self.session.around_heads
        if parallel is not None and not shared:
            reason = unserved(self.session, parallel) or NO_SEQUENCE
        elif reason is None and mask is not None:
            reason = why
        if reason is None:
            return False
        if shared and parallel is None:
            raise RuntimeError(
                f"{self.session.layers[self._layer].name}: the stock processor must run here ({reason}), which knows "
                "nothing of the other ranks' rows; end the sequence parallelism"
            )
        if not torch.compiler.is_compiling():
            self.session.fall_back(self._layer, reason)
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A copy of the whole transformer works on its own; a copy of a part of it gets the stock processor back.
        root = self._root()
        new: Any
        if root is None or id(root) not in memo or not self.session.active:
            new = copy.deepcopy(self.stock, memo)
        else:
            session, stock = copy.deepcopy(self.session, memo), copy.deepcopy(self.stock, memo)
            new = type(self)(session, self._layer, stock, weakref.ref(memo[id(root)]))
        memo[id(self)] = new
        return new

    def __reduce__(self) -> Any:
        return _same, (self.stock,)


@functools.cache
def _parameters(forward: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)


def parameter_names(forward: Any) -> tuple[str, ...]:
    """Names of a method's parameters without ``self``."""
    return _parameters(forward)[1:]


def patch_grid(shape: tuple[int, int, int], patch: tuple[int, int, int]) -> tuple[int, int, int]:
    """Token grid of a latent volume (frames, height, width) cut into patches; a partial patch in time counts."""
    return -(-shape[0] // patch[0]), shape[1] // patch[1], shape[2] // patch[2]


def split_heads(attn: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, N, H, D] of tokens [B, N, C], before any norm."""
    return _split((attn.to_q, attn.to_k, attn.to_v), attn.heads, tokens)


def split_added_heads(attn: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Like ``split_heads``, by the module's projections of the second stream."""
    return _split((attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), attn.heads, tokens)


def _split(projections: tuple[Any, Any, Any], heads: int, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (project(tokens).unflatten(2, (heads, -1)) for project in projections)
    return query, key, value


def is_prefix_mask(mask: Tensor) -> bool:
    """Whether the true entries come first along the last dimension, so that their number says all.

    Looked at on a CPU only: elsewhere it would wait for the device in every layer.
    """
    if mask.device.type != "cpu" or torch.compiler.is_compiling():
        return True
    valid = mask.bool()
    return not bool((valid[..., 1:] & ~valid[..., :-1]).any())


class ModelAdapter:
    """One model family. A subclass fills in the class variables and the methods, and registers one instance.

    Processors are matched by class name: several diffusers modules hold their own copies of the same class.
    """

    family: ClassVar[str]
    processors: ClassVar[dict[str, type[ServedProcessor]]]
    """Stock processor class name -> class that replaces it."""
    blocks: ClassVar[Mapping[str, BlockForward]] = {}
    """Block class name -> the forward that computes the same through fused operators."""

    block_lists: ClassVar[tuple[str, ...]] = ()
    """Attributes of the transformer that hold its blocks, in the order in which they run; empty where something else
    than the next block follows a block."""
    block_streams: ClassVar[tuple[str, ...]] = ("hidden_states", "encoder_hidden_states")
    """The arguments that blocks change, in the order of what they return."""

    rows: ClassVar[RowLayout | str] = "its blocks are not known to work token by token"
    """Where the family has one row per video token, or why no subset of them can run by itself."""
    references: ClassVar[str | None] = "reference rows stand behind the text of a sequence [text, video] without a mask"
    """Why no rows can be put behind the text of the blocks; None where they can."""
    stages: ClassVar[StageLayout | str] = "its blocks are not known to run on several ranks"
    """What lies around the blocks, or why they cannot be split over ranks."""
    block_modules: ClassVar[Mapping[str, BlockModules]] = {}
    """Block class name -> which of its sub-modules a cache keeps, and how their outputs enter the residual streams."""

    left_alone: ClassVar[dict[str, str]] = {}
    """Class name of a stock processor that must stay -> why, for the report."""

    calls_per_branch: ClassVar[bool] = False
    """Whether the family's pipelines call the transformer once for every branch of classifier-free guidance, and say by
    ``do_classifier_free_guidance`` whether they guide."""

    text_inputs: ClassVar[tuple[str, ...]] = ()
    """Arguments of the transformer that, with weights, make the keys and values of its cross-attention; empty where
    something else does too. Such modules are the ones left alone as ``CROSS_ATTENTION``."""
    text_embedders: ClassVar[tuple[str, ...]] = ()
    """Paths of the modules between these arguments and what blocks get."""

    def known(self) -> set[str]:
        """Class names of the stock processors that this family knows."""
        return {*self.processors, *self.left_alone}

    def matches(self, processor: Any) -> bool:
        """True when this family knows the stock processor's class name."""
        return type(processor).__name__ in self.known()

    def skip_reason(self, name: str, module: nn.Module, processor: Any) -> str | None:
        """Why a module whose processor matches must be left alone, or None.

        Args:
            name: the module's path in the transformer.
        """
        if isinstance(processor, nn.Module):
            return "the processor holds trained weights of its own"
        stock = _parameters(type(processor).__call__)
        served = _parameters(self.processors[type(processor).__name__].__call__)
        if stock != served:
            return f"{type(processor).__name__} takes ({', '.join(stock[1:])}), expected ({', '.join(served[1:])})"
        return None

    def reads_text(self, name: str, module: nn.Module, processor: Any) -> bool:
        """Whether a stock processor does cross-attention, and so is left alone."""
        kind = type(processor).__name__
        if kind not in self.processors:
            return self.left_alone.get(kind) == CROSS_ATTENTION
        return self.skip_reason(name, module, processor) == CROSS_ATTENTION

    def processor_beside(self, name: str, module: nn.Module, processor: Any) -> type[ServedProcessor] | None:
        """What takes the place of the processor of a module that is left alone, to fuse its norms and RoPE and leave
        its attention to that processor; its ``attends`` is False."""
        return None

    def dense_reason(self, name: str, module: nn.Module) -> str | None:
        """Why a served module runs dense under every planner, or None: its tokens are not those of the video grid.

        Planners neither see nor count such a layer. One of at most 64 keys runs through ``short_attention``.
        """
        return None

    def attends_over(self, name: str, module: nn.Module) -> str | None:
        """What one sequence of a served module holds, for hooks: "video", "frames" of one place, the tokens of one
        "frame"; None: nothing may be hooked to it."""
        return "video" if self.dense_reason(name, module) is None else None

    def volume(self, module: nn.Module, arguments: dict[str, Any]) -> Volume | None:
        """Batch and token grid of the finest level, for families whose layers see frames or places one at a time."""
        return None

    def modulated_by_timestep(self, arguments: dict[str, Any]) -> bool:
        """Whether tokens of equal ``timestep`` have equal rows in all tables of modulation."""
        return True

    def simplify(self, module: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a forward of the transformer, by name, to be exchanged for simpler ones of the same meaning.

        Called before every forward that is not compiled as a whole. No device value may be read.
        """
        return {}

    def root_reason(self, root: nn.Module, module: nn.Module, processor: Any) -> str | None:
        """Why this model's attention must be left alone although the processor is known, or None.

        For families whose processor class other models use as well. ``root`` is the transformer, or the target
        itself where no forward with a timestep was found.
        """
        return None

    def frame_timesteps(self, module: nn.Module, timesteps: Tensor, latents: Tensor) -> dict[str, Any]:
        """Arguments of a forward that gives every frame its own timestep.

        Args:
            timesteps: [B, F], in the model's units.
            latents: [B, C, F, h, w].

        Raises:
            RuntimeError: the model takes one timestep for all frames.
        """
        raise RuntimeError(
            f"{type(module).__name__} ({self.family}) takes one timestep for all frames; per-frame schedules run "
            "WanTransformer3DModel and SkyReelsV2Transformer3DModel"
        )

    def geometry(self, module: nn.Module, arguments: dict[str, Any]) -> Geometry | None:
        """Token layout of a forward of the transformer with these arguments by name, None when it cannot be told."""
        raise NotImplementedError

    def make_processor(self, session: Session, layer: int, stock: Any, root: Any) -> ServedProcessor:
        """The replacement of one stock processor; ``root`` is a weak reference to the transformer."""
        return self.processors[type(stock).__name__](session, layer, stock, root)
