"""``vdit-fast plot``: make the pictures of a JSON file again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from vdit_fast.cli.output import DebugFlag, JsonFlag, session

_FILE = "results.json of demo, bench.json, methods.json, combinations.json or profile.json, or a picture's JSON."
File = Annotated[Path, typer.Argument(help=_FILE)]
OutDir = Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the pictures; default: beside the file.")]


def command(file: File, out_dir: OutDir = None, as_json: JsonFlag = False, debug: DebugFlag = False) -> None:
    """Draw the pictures of a results file again, without computing anything."""
    with session(as_json, debug) as out:
        pictures = redraw(file, out_dir)
        out.emit({"kind": "vdit_fast.plot", "files": [str(p) for p in pictures]})
        out.show(*(escape(str(p)) + "\n" for p in pictures))


def redraw(file: Path, out_dir: Path | None = None) -> list[Path]:
    """Draw what ``file`` describes and return the pictures.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a results file.
    """
    from vdit_fast import report
    from vdit_fast.cli import (
        bench,
        combinations_bench,
        combinations_report,
        methods_bench,
        methods_report,
        profile_report,
        profiling,
    )
    from vdit_fast.demo import pictures
    from vdit_fast.demo.run import KIND

    document = report.read_json(file)
    folder = file.parent if out_dir is None else out_dir
    folder.mkdir(parents=True, exist_ok=True)
    kind = document.get("kind") if isinstance(document, dict) else None
    if kind == KIND:
        return pictures.redraw(document, file.parent, folder)
    if kind == bench.KIND:
        return bench.draw(document, folder)
    if kind == methods_bench.KIND:
        return methods_report.draw(document, folder)
    if kind == combinations_bench.KIND:
        return combinations_report.draw(document, folder)
    if kind == profiling.KIND:
        return profile_report.draw(document, folder)
    return [report.replot(file, None if out_dir is None else folder / file.with_suffix(".png").name)]
