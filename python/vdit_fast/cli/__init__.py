"""The ``vdit-fast`` command: one module per verb in :mod:`vdit_fast.cli.verbs`."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the ``vdit-fast`` console script."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        sys.exit(f"vdit-fast: the command line needs typer and rich ({error}): pip install 'vdit-fast[cli]'")
    from vdit_fast.cli.app import app

    app(prog_name="vdit-fast")
