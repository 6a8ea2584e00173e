"""Arguments of a command that every rank is started with: what is wrong with them is said once, by the first rank."""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["BAD", "RankParser", "after_the_first", "global_rank"]

BAD = 2
"""Exit code of every rank where the arguments are wrong."""
LEAD = 20.0
"""Seconds within which the first rank has said what is wrong."""


def global_rank() -> int:
    """Of this process among all that a launcher such as torchrun has started; 0 without one."""
    return int(os.environ.get("RANK", "0"))


def after_the_first() -> None:
    """On other ranks: wait for the first one, which says what is wrong with all of them, and ends.

    A launcher ends all ranks as soon as one of them has ended, so that this does not return where there is one; and
    whoever ended before the first rank would have kept it from saying anything.
    """
    if global_rank():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(LEAD)


class RankParser(argparse.ArgumentParser):
    """Speaks on the first rank. The others do so only where that one has not ended them meanwhile: then the fault is
    their own."""

    _late = False

    def _print_message(self, message: str, file: Any = None) -> None:
        if global_rank() == 0 or self._late:
            super()._print_message(message, file)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        if status:
            after_the_first()
            self._late = True
        super().exit(status, message)

    def error(self, message: str) -> NoReturn:
        told = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if told and global_rank() == 0:  # torch's launcher ends with a report, which names this then
            about = {"timestamp": str(int(time.time())), "py_callstack": message}
            with suppress(OSError):
                Path(told).write_text(json.dumps({"message": {"message": message, "extraInfo": about}}))
        self.exit(BAD, f"{self.prog}: error: {message} (--help lists the options)\n")

    def wrong(self, error: Exception) -> NoReturn:
        """End with an exception's message, as with an argument that cannot be read."""
        self.error(" ".join(str(error).split()) or type(error).__name__)

    def given(self, options: argparse.Namespace, name: str) -> bool:
        """Whether an option differs from its default."""
        return bool(getattr(options, name) != self.get_default(name))

    def needs(self, options: argparse.Namespace, name: str, other: str, why: str) -> None:
        """End where an option is given that does nothing without another one."""
        if self.given(options, name) and not getattr(options, other):
            flags = [f"--{item.replace('_', '-')}" for item in (name, other)]
            self.error(f"{flags[0]} has no effect without {flags[1]}: {why}")
