"""Runs work in child processes that may crash or hang: a kernel that never ends costs one item, not the run.

The child notes in a journal what it begins (and for how long at most) and what came of it. The parent reads along, ends
a child that is overdue, and knows what it was doing.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .machine import ROOT

POLL = 0.2
BROKEN_DEVICE = 77  # exit code of a child that cannot use the GPU any more


class Journal:
    """Lines of JSON, appended by the child, read by the parent."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def clear(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("")

    def _append(self, **event: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(event) + "\n")

    def begin(self, item: str, limit: float) -> None:
        self._append(begin=item, limit=limit, at=time.time())

    def end(self, item: str, **outcome: Any) -> None:
        self._append(end=item, outcome=outcome)

    def events(self) -> list[dict[str, Any]]:
        try:
            lines = self.path.read_text().splitlines()
        except FileNotFoundError:
            return []
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except ValueError:
                break  # being written
        return found

    def running(self) -> dict[str, Any] | None:
        """The last event, if it is a beginning."""
        events = self.events()
        return events[-1] if events and "begin" in events[-1] else None

    def outcomes(self) -> dict[str, dict[str, Any]]:
        return {e["end"]: e["outcome"] for e in self.events() if "end" in e}


@dataclass(frozen=True)
class Ended:
    """``how``: finished, died, hung (the item was overdue) or budget (all the time was used)."""

    how: str
    item: str | None  # what was running
    code: int | None
    seconds: float


def watch(
    command: Sequence[str], journal: Journal, *, seconds: float, log: Path, env: Mapping[str, str] | None = None
) -> Ended:
    """Run a command until it ends, its current item is overdue, or ``seconds`` have passed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    start, how = time.monotonic(), ""
    with log.open("ab") as out:
        child = subprocess.Popen(
            list(command),
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while child.poll() is None and not how:
                running = journal.running()
                if running is not None and time.time() > running["at"] + running["limit"]:
                    how = "hung"
                elif time.monotonic() - start > seconds:
                    how = "budget"
                else:
                    time.sleep(POLL)
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)  # the session started above
            child.wait()
    running = journal.running()
    item = running["begin"] if running else None
    if not how:
        how = "finished" if child.returncode == 0 else "died"
    return Ended(how, item, child.returncode, time.monotonic() - start)


def tail(log: Path, lines: int = 12) -> str:
    """The end of a log."""
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return ""
