"""What a model family must tell: which processors it serves, how their attention is called, where the tokens lie."""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vdit_fast.models.session import Geometry, Session

__all__ = ["ModelAdapter", "ServedProcessor", "parameter_names", "patch_grid", "project_heads", "rotate_pairs"]


def _same(stock: Any) -> Any:
    """Unpickles a served processor as the stock one."""
    return stock


class ServedProcessor:
    """Base of the processors that replace a stock one. Subclasses name every parameter of the stock ``__call__``:
    diffusers drops keyword arguments that the signature does not name.

    They call the attention module's own sub-modules, so LoRA, offloading, casting and quantised layers stay alive.
    """

    def __init__(self, session: Session, layer: int, stock: Any, root: Any) -> None:
        self.session = session
        self.stock = stock
        self._layer = layer
        self._root = root  # weak reference to the transformer
        self.handle = torch.tensor([session.id, layer], dtype=torch.int64, device="cpu")

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

    def root(self) -> Any:
        """The transformer this processor belongs to, None when it is gone."""
        return self._root()

    def __call__(self, attn: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def stands_aside(self, mask: Tensor | None = None) -> bool:
        """True when the stock processor must run: after remove(), with a mask of a form that is not understood, or
        under context parallelism, where every rank holds only its shard of the sequence.

        Counted in the report, except inside a compiled block (``Handle.report`` also looks at the settings themselves).
        """
        if not self.session.active:
            return True
        if self._parallel_config is not None:
            reason = "context parallelism is enabled"
        elif mask is not None:
            reason = "an attention mask of this form is not understood"
        else:
            return False
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


def project_heads(attn: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, N, H, D] of tokens [B, N, C], with the norms per head that the module has."""
    query, key, value = (
        project(tokens).unflatten(2, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v)
    )
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    return query, key, value


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs the way diffusers' ``apply_rotary_emb`` rounds it: fp32, then x's dtype.

    Args:
        x: [B, N, H, D].
        cos, sin: [N, D], every value repeated for the two channels of its pair.
    """
    cos, sin = cos[None, :, None].to(x.device), sin[None, :, None].to(x.device)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-odd, even), dim=-1).flatten(-2)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


class ModelAdapter:
    """One model family. A subclass fills in the class variables and the methods, and registers one instance.

    Processors are matched by class name: several diffusers modules hold their own copies of the same class.
    """

    family: ClassVar[str]
    processors: ClassVar[dict[str, type[ServedProcessor]]]
    """Stock processor class name -> class that replaces it."""

    def matches(self, processor: Any) -> bool:
        """True when this family knows the stock processor's class name."""
        return type(processor).__name__ in self.processors

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

    def root_reason(self, root: nn.Module, module: nn.Module, processor: Any) -> str | None:
        """Why this model's attention must be left alone although the processor is known, or None.

        For families whose processor class other models use as well. ``root`` is the transformer, or the target
        itself where no forward with a timestep was found.
        """
        return None

    def dense_only(self, name: str, module: nn.Module) -> str:
        """Why no planner may be asked about a served module, '' when one may. Such layers run dense, with that reason;
        those of at most 64 keys through ``short_attention``."""
        return ""

    def geometry(self, module: nn.Module, arguments: dict[str, Any]) -> Geometry | None:
        """Token layout of a forward of the transformer with these arguments by name, None when it cannot be told."""
        raise NotImplementedError

    def make_processor(self, session: Session, layer: int, stock: Any, root: Any) -> ServedProcessor:
        """The replacement of one stock processor; ``root`` is a weak reference to the transformer."""
        return self.processors[type(stock).__name__](session, layer, stock, root)
