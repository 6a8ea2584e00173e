"""Typed Python faces of the compiled operators, with their fake and autograd registrations."""

from .attention import attention
from .merge import merge

__all__ = ["attention", "merge"]
