"""A tensor that another rank is computing: what is done with it is noted, and done when its values have arrived."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

__all__ = ["Awaited", "Promise"]


class Promise:
    """Values that arrive later, or follow from others that do.

    Args:
        missing: what is wrong where somebody needs them before they have arrived.
        needs, compute: what they follow from, and how.
    """

    def __init__(
        self, missing: str, needs: Sequence[Promise] = (), compute: Callable[[], Tensor] | None = None
    ) -> None:
        self.missing = missing
        self._needs = needs
        self._compute = compute
        self._value: Tensor | None = None

    def keep(self, value: Tensor) -> None:
        """They have arrived."""
        self._value = value

    @property
    def ready(self) -> bool:
        if self._value is not None:
            return True
        return self._compute is not None and all(promise.ready for promise in self._needs)

    def value(self) -> Tensor:
        if self._value is None:
            if self._compute is None or not self.ready:
                raise RuntimeError(self.missing)
            self._value, self._compute, self._needs = self._compute(), None, ()
        return self._value


class Awaited(Tensor):
    """Has the form of a tensor. Operators on it give another such one until its values are there, and plain tensors
    from then on; what needs the values earlier, or writes to it, raises RuntimeError."""

    promise: Promise

    @staticmethod
    def of(promise: Promise, form: Tensor, device: torch.device) -> Awaited:
        """An awaited tensor of this shape, strides and dtype."""
        new: Awaited = Tensor._make_wrapper_subclass(
            Awaited, form.shape, strides=form.stride(), dtype=form.dtype, device=device
        )
        new.promise = promise
        return new

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Awaited({list(self.shape)}, {self.dtype}, ready={self.promise.ready})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        call = _Call(func, args, kwargs or {})
        return call.noted() if any(not promise.ready for promise in call.promises) else call.now()


def _meta(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


class _Call:
    """One operator with awaited operands."""

    def __init__(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.func, self.operands = func, (args, kwargs)
        self.promises: list[Promise] = []
        tree_map_only(Awaited, lambda x: self.promises.append(x.promise), self.operands)
        self._results: list[Any] | None = None
        self._held: list[tuple[Tensor, int]] = []

    def now(self) -> Any:
        """The result, all values being there."""
        args, kwargs = tree_map_only(Awaited, lambda x: x.promise.value(), self.operands)
        return self.func(*args, **kwargs)

    def noted(self) -> Any:
        """The result's form; its values come by ``now``."""
        form = self._form()
        self.operands = tree_map_only(Tensor, self._hold, self.operands)
        parts = [form] if isinstance(form, Tensor) else list(form)
        promises = [Promise(self._missing, self.promises, lambda i=i: self._part(i)) for i in range(len(parts))]  # type: ignore[misc]
        new = [Awaited.of(promise, part, self._device) for promise, part in zip(promises, parts, strict=True)]
        return new[0] if isinstance(form, Tensor) else type(form)(new)

    @property
    def _missing(self) -> str:
        return next(promise.missing for promise in self.promises if not promise.ready)

    @property
    def _device(self) -> torch.device:
        found: list[torch.device] = []
        tree_map_only(Tensor, lambda x: found.append(x.device), self.operands)
        given = self.operands[1].get("device")
        return found[0] if given is None else torch.device(given)

    def _form(self) -> Any:
        """What the operator gives on the meta device."""
        if any(item.alias_info is not None and item.alias_info.is_write for item in self.func._schema.arguments):
            raise RuntimeError(f"{self._missing} ({self.func} writes to a tensor)")
        args, kwargs = tree_map_only(Tensor, _meta, self.operands)
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": torch.device("meta")}
        try:
            form = self.func(*args, **kwargs)
        except (NotImplementedError, RuntimeError) as error:
            raise RuntimeError(f"{self._missing} ({self.func} needs the values: {error})") from None
        if not isinstance(form, (Tensor, tuple, list)):
            raise RuntimeError(f"{self._missing} ({self.func} needs the values)")
        return form

    def _hold(self, x: Tensor) -> Tensor:
        """An operand as it is now. Inference tensors do not tell whether they were written to, so they are copied."""
        if isinstance(x, Awaited):
            return x
        if x.is_inference():
            return x.clone()
        self._held.append((x, x._version))
        return x

    def _part(self, index: int) -> Tensor:
        if self._results is None:
            if any(x._version != version for x, version in self._held):
                raise RuntimeError(
                    f"a tensor that {self.func} was given beside an awaited guidance branch was written to before the "
                    "branch arrived; end guidance parallelism for this pipeline"
                )
            found = self.now()
            self._results = [found] if isinstance(found, Tensor) else list(found)
        part: Tensor = self._results[index]
        return part
