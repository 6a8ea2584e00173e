"""Which options were written on the command line: one that would do nothing there is an error, not a surprise."""

from __future__ import annotations

import typer

__all__ = ["given", "refuse"]


def given(context: typer.Context, *names: str) -> list[str]:
    """The flags of these parameters (of all where none is named) that were written on the command line."""
    wanted = [param for param in context.command.params if not names or param.name in names]
    return [
        max(param.opts, key=len)
        for param in wanted
        if getattr(context.get_parameter_source(param.name or ""), "name", "") == "COMMANDLINE"
    ]


def refuse(context: typer.Context, *names: str, why: str) -> None:
    """Raise ValueError where one of these parameters was written on the command line."""
    found = given(context, *names)
    if found:
        raise ValueError(f"{', '.join(found)}: no effect here; {why}")
