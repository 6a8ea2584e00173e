"""Runs a cache policy around one transformer's ``forward``."""

from __future__ import annotations

import copy
import inspect
import types
import weakref
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .base import CachePolicy, Stream

if TYPE_CHECKING:
    from ..context import StepContext
    from ..models.session import Session

Output = Any
Rebuild = Callable[[Tensor], Output]


class OutputCache:
    """The streams of one transformer, and what was computed and forecast so far."""

    def __init__(self) -> None:
        self.full: Counter[str] = Counter()
        self.forecasts: Counter[int] = Counter()
        self._generation: int | None = None
        self._streams: dict[Any, tuple[Any, Stream, Rebuild]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        held = (factor for _, stream, _ in self._streams.values() for factor in stream.factors)
        return sum(factor.numel() * factor.element_size() for factor in held)

    def forget(self) -> None:
        """Release what is held; the counts stay."""
        self._streams.clear()

    def run(
        self, policy: CachePolicy, step: StepContext, stock: Callable[[], Output], arguments: dict[str, Any]
    ) -> Output:
        """The output of ``stock()``, computed or forecast; ``arguments`` are those of the transformer, by name."""
        if step.generation != self._generation:
            self._generation = step.generation
            self._streams.clear()
        key = (step.expert, step.branch, step.frame_block)  # one transformer may carry several models
        call = _signature(arguments)
        known = self._streams.get(key)
        if known is None or known[0] != call:
            known = (call, Stream(), _same)
        _, stream, rebuild = known
        recording = torch.is_grad_enabled()
        reason = "gradients are recorded" if recording else policy.decide(step, stream)
        if reason is None:
            self.forecasts[step.step] += 1
            return rebuild(policy.forecast(stream, step.step))
        self.full[reason] += 1
        output = stock()
        if recording or step.step < 0:
            return output
        found = _as_one_tensor(output)
        if found is None:
            raise RuntimeError(
                f"the cache policy {policy.name!r} needs a transformer that returns tensors of one device, got "
                f"{type(output).__name__}; set cache to null in the configuration"
            )
        tensor, rebuild = found
        if step.step <= stream.step:  # the same step again: an inner loop, which starts its history anew
            stream = Stream()
        policy.update(stream, step.step, tensor.detach())
        if stream.first < 0:
            stream.first = step.step
        self._streams[key] = (call, stream, rebuild)
        return output


def _same(tensor: Tensor) -> Output:
    return tensor


def _signature(arguments: dict[str, Any]) -> Any:
    """What must not change between a computed step and its forecast: the sizes and the form of the answer."""
    shapes = tuple(
        (name, tuple(value.shape), value.dtype, value.device)
        for name, value in arguments.items()
        if isinstance(value, Tensor) and name != "timestep"
    )
    return shapes, arguments.get("return_dict", True)


def _as_one_tensor(output: Output) -> tuple[Tensor, Rebuild] | None:
    """A transformer's output as one tensor (several, as video and audio, are laid out one behind the other), and how to
    put another into the same wrapping. None where it is made of other things than tensors."""
    wrap: Callable[[list[Tensor]], Output]
    if isinstance(output, Tensor):
        parts, wrap = [output], lambda new: new[0]
    elif isinstance(output, tuple):
        parts, wrap = list(output), tuple
    elif isinstance(output, dict):  # diffusers' ModelOutput is one
        kind, names = type(output), list(output)
        parts, wrap = list(output.values()), lambda new: kind(**dict(zip(names, new, strict=True)))
    else:
        return None
    if not parts or not all(isinstance(part, Tensor) and part.device == parts[0].device for part in parts):
        return None
    forms = [(part.shape, part.dtype) for part in parts]

    def rebuild(tensor: Tensor) -> Output:
        pieces = tensor.split([shape.numel() for shape, _ in forms]) if len(forms) > 1 else [tensor]
        return wrap([piece.view(shape).to(dtype) for piece, (shape, dtype) in zip(pieces, forms, strict=True)])

    return parts[0] if len(parts) == 1 else torch.cat([part.flatten() for part in parts]), rebuild


class CachedForward:
    """Stands in for ``forward`` of one transformer, as an attribute of the object, where other wrappers sit too."""

    def __init__(self, module: nn.Module, session: Session) -> None:
        self._module = weakref.ref(module)
        self._session = session
        self._inner = module.__dict__.get("forward")  # another library's wrapper, e.g. one that moves weights
        self.__signature__ = inspect.signature(_own_forward(module))

    @property
    def stock(self) -> Callable[..., Output]:
        """What this object stands in for."""
        module = self._module()
        assert module is not None
        return self._inner if self._inner is not None else _own_forward(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Output:
        session = self._session
        policy, forward = session.config.cache, session.forward
        # A forward that was seen has passed a second wrapper, or there was no pre-hook: `forward` was called directly.
        if not session.active or policy is None or forward is None or forward.cached:
            return self.stock(*args, **kwargs)
        forward.cached = True
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"the cache policy {policy.name!r} cannot run inside a compiled transformer; compile its blocks "
                "(compile_repeated_blocks) instead of the whole, or set cache to null in the configuration"
            )
        arguments = dict(zip(self.__signature__.parameters, args, strict=False)) | kwargs
        return session.cache.run(policy, forward.step, lambda: self.stock(*args, **kwargs), arguments)

    def of(self, session: Session) -> bool:
        """Whether this is the wrapper of that session."""
        return self._session is session

    def attach(self) -> None:
        """Become the module's ``forward``."""
        module = self._module()
        assert module is not None
        object.__setattr__(module, "forward", self)

    def detach(self) -> None:
        """Give the module back what it had; a wrapper that was put around this one later stays and passes through."""
        module = self._module()
        if module is None or module.__dict__.get("forward") is not self:
            return
        if self._inner is None:
            del module.__dict__["forward"]
        else:
            object.__setattr__(module, "forward", self._inner)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        module = self._module()
        copied = memo.get(id(module))
        if copied is None:
            return None
        new = object.__new__(CachedForward)
        memo[id(self)] = new
        new._module = weakref.ref(copied)
        new._session = copy.deepcopy(self._session, memo)
        new._inner = copy.deepcopy(self._inner, memo)
        new.__signature__ = self.__signature__
        return new

    def __reduce__(self) -> Any:
        # A pickled model is the stock one.
        return _own_forward, (self._module(),)


def _own_forward(module: nn.Module) -> Callable[..., Output]:
    return types.MethodType(type(module).forward, module)
