"""What every verb shares: ``--json``, ``--debug``, one-line errors with an exit code, and progress bars."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

JsonFlag = Annotated[bool, typer.Option("--json", help="Print only JSON on standard output.")]
DebugFlag = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Advance = Callable[[int, int, str], None]

QUIET_SECONDS = 20.0
FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
_BAD_INPUT_ERRORS = (ValueError, TypeError, FileNotFoundError, IsADirectoryError, NotADirectoryError)


class Output:
    """Where a verb writes: a rich console for people, or one JSON document."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.stdout: TextIO = sys.stdout
        self.console = Console(stderr=as_json, highlight=False)

    def emit(self, document: dict[str, Any]) -> None:
        """Print the JSON document if that is what was asked for."""
        if self.as_json:
            print(json.dumps(finite(document), indent=2, default=str), file=self.stdout, flush=True)

    def show(self, *renderables: Any) -> None:
        """Print for people; nothing under ``--json``."""
        if not self.as_json:
            self.console.print(*renderables)

    @contextlib.contextmanager
    def progress(self) -> Iterator[Advance]:
        """Yield ``advance(done, total, what)``: a bar on standard error, or a line now and then in a file."""
        console = Console(stderr=True)
        if not console.is_terminal:
            yield _lines()
            return
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=None)

            def advance(done: int, total: int, what: str = "") -> None:
                bar.update(task, completed=done, total=total, description=escape(what))

            yield advance


def _lines() -> Advance:
    """Progress for a log file: at most one line in ``QUIET_SECONDS``."""
    told = started = time.monotonic()

    def advance(done: int, total: int, what: str = "") -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= QUIET_SECONDS:
            told = now
            print(f"[{now - started:4.0f} s] {what}: {done} of {total}", file=sys.stderr, flush=True)

    return advance


@contextlib.contextmanager
def session(as_json: bool, debug: bool) -> Iterator[Output]:
    """Run a verb: libraries that print go to standard error under ``--json``, an error becomes one line and a code."""
    out = Output(as_json)
    redirect = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    try:
        with redirect:
            yield out
    except KeyboardInterrupt:
        _fail(out, "interrupted", INTERRUPTED)
    except typer.Exit:
        raise
    except Exception as error:
        if debug:
            traceback.print_exc()
        message = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, _BAD_INPUT_ERRORS):
            _fail(out, message, BAD_INPUT)
        hint = "" if isinstance(error, ImportError) or debug else " (--debug shows the traceback)"
        _fail(out, f"{type(error).__name__}: {message}{hint}", FAILED)


def finite(value: Any) -> Any:
    """Copy a document with NaN and infinities, which JSON does not know, turned into null."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _fail(out: Output, message: str, code: int) -> None:
    print(f"vdit-fast: error: {message}", file=sys.stderr, flush=True)
    out.emit({"error": message, "exit_code": code})
    raise typer.Exit(code)
