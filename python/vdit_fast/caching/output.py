"""Granularity "model": the output of a whole transformer, computed or forecast."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..forwards import ForwardStandIn
from . import budget
from .engine import FeatureCache, Run

if TYPE_CHECKING:
    from ..context import StepContext

Output = Any


def run_cached(
    cache: FeatureCache, step: StepContext, stock: Callable[[], Output], arguments: dict[str, Any]
) -> Output:
    """The output of ``stock()``, computed or forecast; ``arguments`` are those of the transformer, by name.

    Raises:
        RuntimeError: it is made of other things than tensors of one device.
        ValueError: its factors exceed the budget.
    """
    if cache.refused(step):
        return stock()
    stream = cache.stream(step, _signature(arguments))
    run = Run(step.step, stream)
    run.reason = cache.reason(step, stream) or (None if stream.form is not None else "nothing to forecast from yet")
    cache.settle(run)
    if run.reason is None:
        wrap, dtypes = stream.form
        factors = [stream.factors[part] for part in range(len(dtypes))]
        weights = cache.weights(run, factors[0])
        return wrap([part.forecast(weights, dtype) for part, dtype in zip(factors, dtypes, strict=True)])
    output = stock()
    found = output_parts(output)
    if found is None:
        assert cache.policy is not None
        raise RuntimeError(
            f"the cache policy {cache.policy.name!r} needs a transformer that returns tensors of one device, got "
            f"{type(output).__name__}; set cache to null in the configuration"
        )
    parts, wrap = found
    cache.afford(run, {"model": budget.size_of(parts)}, parts[0].dtype, len(parts[0]))
    for index, part in enumerate(parts):
        cache.factors(run, index, part).update(run.step, part.detach())
    stream.form = wrap, [part.dtype for part in parts]
    return output


def _signature(arguments: dict[str, Any]) -> Any:
    """What must not change between a computed step and its forecast: the sizes and the form of the answer."""
    shapes = tuple(
        (name, tuple(value.shape), value.dtype, value.device)
        for name, value in arguments.items()
        if isinstance(value, Tensor) and name != "timestep"
    )
    return shapes, arguments.get("return_dict", True)


def output_parts(output: Output) -> tuple[list[Tensor], Callable[[list[Tensor]], Output]] | None:
    """The tensors of a transformer's output, and how to put others into the same wrapping. None where it is made of
    other things than tensors."""
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
    return parts, wrap


class CachedForward(ForwardStandIn):
    """Stands in for ``forward`` of one transformer."""

    what = "a cache at granularity 'model'"

    def __call__(self, *args: Any, **kwargs: Any) -> Output:
        session = self._session
        policy, forward = session.config.cache, session.forward
        # A forward that was seen has passed a second wrapper, or there was no pre-hook: `forward` was called directly.
        if not session.active or policy is None or forward is None or forward.cached:
            return self.inner(*args, **kwargs)
        forward.cached = True
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"the cache policy {policy.name!r} cannot run inside a compiled transformer; compile its blocks "
                "(compile_repeated_blocks) instead of the whole, or set cache to null in the configuration"
            )
        arguments = dict(zip(self.__signature__.parameters, args, strict=False)) | kwargs
        return run_cached(session.cache, forward.step, lambda: self.inner(*args, **kwargs), arguments)

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
