"""Loads the compiled part: checks torch, finds the operator library next to `_info`, loads it exactly once."""

from __future__ import annotations

import importlib
import os
import re
import warnings
from pathlib import Path
from types import ModuleType

OLDEST_TORCH = (2, 10)
ISAS = ("generic", "avx2", "avx512")
LIBRARY_NAME = "libvdit_ops.so"
_REINSTALL = "reinstall it: pip install --force-reinstall --no-deps vdit-fast (in a checkout: pip install -e .)"


def load() -> ModuleType:
    """Load the operators into `torch.ops.vdit_fast` and return the compiled module `_info`.

    Safe to call again: a library that is already loaded is left alone.

    Raises:
        ImportError: torch is missing or too old, a compiled file is missing or does not load, or another copy of the
            library is loaded in this process. The message says what to do.
    """
    _check_torch()
    info = _import_info()
    _check_isa()
    # The compiled files lie together also in an editable install, where the Python files are elsewhere. Not __file__:
    # pybind11 returns the first copy of a module when a second copy is imported, and only the spec tells them apart.
    # Resolved, so that a path through a link is recognised as the library that is loaded already.
    origin = str(info.__spec__.origin if info.__spec__ else info.__file__)
    _load_library(Path(origin).resolve().with_name(LIBRARY_NAME))
    return info


def _check_torch() -> None:
    need = ".".join(map(str, OLDEST_TORCH))
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"vdit_fast needs torch >= {need}, and importing torch failed ({error}): pip install torch"
        ) from error
    match = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if match is None or (int(match[1]), int(match[2])) < OLDEST_TORCH:
        raise ImportError(f"vdit_fast needs torch >= {need}, found {torch.__version__}: pip install 'torch>={need}'")


def _check_isa() -> None:
    wish = os.environ.get("VDIT_CPU_ISA")
    if wish is not None and wish not in ISAS:
        warnings.warn(f"VDIT_CPU_ISA={wish!r} is ignored; it may be {', '.join(ISAS)}", stacklevel=4)


def _import_info() -> ModuleType:
    try:
        return importlib.import_module("vdit_fast._info")
    except ImportError as error:
        raise ImportError(
            f"vdit_fast's compiled module _info is missing or was built for another Python ({error}); {_REINSTALL}"
        ) from error


def _load_library(path: Path) -> None:
    import torch

    if str(path) in torch.ops.loaded_libraries:
        return
    if not path.is_file():
        raise ImportError(f"vdit_fast's operator library is missing: {path}; {_REINSTALL}")
    # Registering the same operators twice ends the process, so a second copy must never reach the loader.
    if hasattr(torch.ops.vdit_fast, "merge"):
        others = [p for p in torch.ops.loaded_libraries if Path(p).name == LIBRARY_NAME]
        raise ImportError(
            f"another copy of vdit_fast's operators is loaded in this process ({', '.join(others) or 'path unknown'}), "
            f"so {path} cannot be; keep only one installation on sys.path and start Python again"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"vdit_fast's operator library {path} does not load with torch {torch.__version__} ({error}); {_REINSTALL}"
        ) from error
