"""``vdit-fast doctor``: is this installation healthy, and what will run on this machine?"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from vdit_fast.cli import checks
from vdit_fast.cli.output import DebugFlag, JsonFlag, session

_COLOURS = {checks.OK: "green", checks.INFO: "cyan", checks.WARN: "yellow", checks.FAIL: "bold red"}
QuickFlag = Annotated[bool, typer.Option("--quick", help="Skip the speed test.")]


def command(quick: QuickFlag = False, as_json: JsonFlag = False, debug: DebugFlag = False) -> None:
    """Check versions, kernels, numerics, speed, packages. Exit code 0 healthy, 1 degraded, 2 broken."""
    parts = [checks.versions, checks.hardware, checks.kernels, checks.numerics, checks.speed, checks.packages]
    parts.append(checks.hazards)
    with session(as_json, debug) as out:
        found: list[checks.Check] = []
        with out.progress() as advance:
            for index, part in enumerate(parts):
                advance(index, len(parts), part.__name__)
                if not (quick and part is checks.speed):
                    found += part()
        code, line = checks.verdict(found)
        out.emit({"verdict": line, "exit_code": code, "checks": [asdict(c) for c in found]})
        out.show(_table(found), f"[{('green', 'yellow', 'bold red')[code]}]{escape(line)}[/]")
        raise typer.Exit(code)


def _table(found: list[checks.Check]) -> Table:
    table = Table("", "", "", "", box=None, show_header=False, padding=(0, 2, 0, 0))
    group = ""
    for check in found:
        detail = escape(check.detail) + (f"\n[dim]→ {escape(check.remedy)}[/]" if check.remedy else "")
        heading = f"[bold]{check.group}[/]" if check.group != group else ""
        table.add_row(heading, escape(check.name), f"[{_COLOURS[check.status]}]{check.status}[/]", detail)
        group = check.group
    return table
