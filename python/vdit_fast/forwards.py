"""Standing in for ``forward`` of one module object: what caches and whatever stands around blocks have in common."""

from __future__ import annotations

import inspect
import types
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

if TYPE_CHECKING:
    from vdit_fast.models.session import Session

__all__ = ["ForwardStandIn", "stock_forward"]


def stock_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward of the module's class."""
    return types.MethodType(type(module).forward, module)


class ForwardStandIn:
    """Base of what becomes ``forward`` of one module, as an attribute of the object, where other wrappers sit too."""

    what: ClassVar[str] = "a wrapper of its forward"
    """For messages."""

    def __init__(self, module: nn.Module, session: Session) -> None:
        self._module = weakref.ref(module)
        self._session = session
        self._inner = module.__dict__.get("forward")  # another library's wrapper, e.g. one that moves weights
        self.__signature__ = inspect.signature(stock_forward(module))

    @property
    def module(self) -> nn.Module | None:
        """The module that it was made for, None when that is gone."""
        return self._module()

    @property
    def inner(self) -> Callable[..., Any]:
        """What this object stands in for."""
        module = self._module()
        assert module is not None
        return self._inner if self._inner is not None else stock_forward(module)

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

    def __reduce__(self) -> Any:
        return stock_forward, (self._module(),)  # a pickled model is the stock one
