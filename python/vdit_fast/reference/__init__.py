"""Readable pure-torch twins of the operators: oracle for tests and fallback."""

from .attention import attention
from .merge import merge

__all__ = ["attention", "merge"]
