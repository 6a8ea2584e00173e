"""Plants every bug of mutants.py in a copy of csrc and expects its tests to fail; prints a table.

python tests/emulator/run_mutants.py [part of a name ...] [--keep FOLDER] [--limit SECONDS] [--list]

The exit code is 1 if a mutant survived, does not apply or does not compile, or if tests fail without any.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch  # noqa: F401  imported once for all the forks
from mutants import CSRC, FOLDER, Mutant, all_mutants


class Workshop:
    """A copy of csrc with its own build folder."""

    def __init__(self, folder: Path, limit: float) -> None:
        self.folder, self.limit = folder, limit
        self.csrc, self.build_folder = folder / "csrc", folder / "build"
        # New times, so that nothing built from a mutant of an interrupted run is taken for up to date.
        shutil.copytree(CSRC, self.csrc, dirs_exist_ok=True, copy_function=shutil.copy)
        self.environment = {
            **os.environ,
            "VDIT_EMULATOR_SOURCE": str(self.csrc / "emulator"),
            "VDIT_EMULATOR_BUILD": str(self.build_folder),
            "OMP_NUM_THREADS": "1",
            "CCACHE_BASEDIR": str(self.csrc),  # as emulator.build does
            "CCACHE_NOHASHDIR": "1",
        }

    def build(self, group: str) -> str:
        """'' or the last lines of the failure."""
        if not (self.build_folder / "build.ninja").exists():
            command = [sys.executable, "-c", f"import emulator; emulator.build({group!r})"]
        else:
            command = ["cmake", "--build", str(self.build_folder), "--target", f"vdit_emulator_{group}"]
        done = subprocess.run(command, cwd=FOLDER, env=self.environment, capture_output=True, text=True)
        return "" if done.returncode == 0 else (done.stdout + done.stderr)[-1500:]

    def test(self, tests: str, select: str) -> str:
        """'' if the tests pass, else what failed first. Runs in a fork, which has torch imported already."""
        log = self.folder / "pytest.log"
        child = os.fork()
        if child == 0:
            with open(log, "w") as stream:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
            os.environ.update(self.environment)
            arguments = ["-x", "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider"]
            arguments += ["-o", "addopts=--import-mode=importlib", str(FOLDER / tests)]
            code = int(pytest.main([*arguments, *(["-k", select] if select else [])]))
            sys.stdout.flush()
            os._exit(code)
        end = time.monotonic() + self.limit
        while (waited := os.waitpid(child, os.WNOHANG))[0] == 0:
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return f"no end after {self.limit:.0f} s"
            time.sleep(0.02)
        code = os.waitstatus_to_exitcode(waited[1])
        if code == 0:
            return ""
        if code == 5:
            raise SystemExit(f"{tests} -k {select!r} selects no test")
        text = log.read_text()
        first = next((line for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))), "")
        return first.split("::")[-1] or f"exit code {code} {text[-200:]!r}"


def attempt(workshop: Workshop, mutant: Mutant) -> tuple[str, str]:
    """(verdict, detail)."""
    try:
        original = mutant.apply(workshop.csrc)
    except ValueError as error:
        return "DOES NOT APPLY", str(error)
    try:
        if broken := workshop.build(mutant.group):
            return "DOES NOT COMPILE", broken
        failed = workshop.test(mutant.tests, mutant.select)
        return ("caught", failed) if failed else ("SURVIVED", f"{mutant.tests} -k {mutant.select!r} passed")
    finally:
        (workshop.csrc / mutant.file).write_text(original)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="only mutants with one of these in group, name or file")
    parser.add_argument("--keep", type=Path, help="folder for the copy and the build, kept for the next time")
    parser.add_argument("--limit", type=float, default=300, help="seconds for the tests of one mutant")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    arguments = parser.parse_args()
    chosen = [
        m
        for m in all_mutants()
        if not arguments.names or any(n in f"{m.group} {m.name} {m.file}" for n in arguments.names)
    ]
    if arguments.list:
        print("\n".join(f"{m.name}  ({m.file}; {m.tests} -k {m.select!r})" for m in chosen))
        return 0
    if not chosen:
        print("no mutant has such a name")
        return 1
    with tempfile.TemporaryDirectory(prefix="vdit-mutants-") as temporary:
        workshop = Workshop(arguments.keep or Path(temporary), arguments.limit)
        for group in sorted({m.group for m in chosen}):
            if broken := workshop.build(group):
                print(f"{group} does not compile without any mutant:\n{broken}")
                return 1
        for tests in sorted({m.tests for m in chosen}):
            selects = {m.select for m in chosen if m.tests == tests}
            if failed := workshop.test(tests, "" if "" in selects else " or ".join(sorted(selects))):
                print(f"{tests} fails without any mutant: {failed}")
                return 1
        bad = 0
        width = max(len(m.name) for m in chosen)
        for mutant in chosen:
            start = time.time()
            verdict, detail = attempt(workshop, mutant)
            bad += verdict != "caught"
            print(f"{mutant.name:{width}}  {verdict:8}  {time.time() - start:4.0f} s  {detail}", flush=True)
        print(f"{len(chosen)} mutants, {len(chosen) - bad} caught")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
