"""Runs the suite: environment, ceilings, primitives, tests, sanitizer, timings, report (docs/gpu_suite.md).

    python -m benchmarks.gpu --budget 540 --out outputs/gpu

Results that are in DIR already, from the same code, GPU and torch, are kept. Nothing changes a setting of the GPU.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import checks, fused, machine, methods
from .problems import problems
from .store import Store
from .supervise import Journal, tail, watch
from .timing import FULL, QUICK
from .worker import SECTION as TIMINGS
from .worker import item_name, journal_path, spec_of

SECTIONS = ("environment", "ceilings", "primitives", "tests", "sanitizer", TIMINGS, fused.SECTION, methods.SECTION)
SHARE = {"primitives": 0.2, "tests": 0.3, "sanitizer": 0.3}  # of the budget, at most, so that timings get their part
KEEP_FOR_LAST = 0.75  # the part of what is left that the timings may use when another section follows


class Run:
    """One call of the suite."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device, self.folder = args, args.device, args.out
        self.start, self.wall = time.monotonic(), time.time()
        self.store = Store(args.out, machine.identity(args.device))
        self.failed: list[str] = []

    def left(self) -> float:
        return self.args.budget - (time.monotonic() - self.start)

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.start:4.0f} s] {text}", flush=True)

    def item(
        self,
        section: str,
        item: str,
        work: Callable[[float], checks.Outcome],
        *,
        least: float = 5.0,
        tests: tuple[str, ...] = (),
    ) -> None:
        """Run and store one item unless it is done; ``work`` gets the seconds it may take.

        ``tests``: folders besides the library's that the outcome depends on.
        """
        spec = {"tests": machine.code_hash(tests)} if tests else {}
        if self.store.done(item, spec, retry_failed=self.args.retry_failed):
            self.say(f"{item}: kept")
            return
        allowed = min(self.left(), SHARE.get(section, 1.0) * self.args.budget)
        if self.device == "cpu":
            least = 0.0  # small problems, and the rest does not run
        if allowed <= least:
            why = f"budget: needs at least {least:.0f} s, {max(0, allowed):.0f} s are left"
            self.store.write(item, section, "skipped", reason=why, spec=spec)
            self.say(f"{item}: skipped, {why}")
            return
        before, start = self.clocks(), time.monotonic()
        try:
            status, reason, result = work(allowed)
        except Exception as error:
            status, reason, result = "failed", f"{type(error).__name__}: {error}", None
        clocks, seconds = {"before": before, "after": self.clocks()}, time.monotonic() - start
        self.store.write(item, section, status, reason=reason, spec=spec, result=result, clocks=clocks, seconds=seconds)
        self.say(f"{item}: {status}{', ' + reason if reason else ''}")
        if status == "failed":
            self.failed.append(item)

    def clocks(self) -> dict[str, float] | None:
        return machine.clocks() if self.device == "cuda" else None


def run_environment(run: Run) -> None:
    command = "python -m benchmarks.gpu " + shlex.join(run.args.argv)
    facts = machine.describe(run.device, command)
    clocks = {"before": run.clocks()}
    run.store.write("environment", "environment", "ok", result=facts, clocks=clocks)
    gpu = facts["nvidia_smi"]
    run.say(f"environment: {gpu['name'] if gpu else run.device}, torch {facts['torch']}, code {machine.code_hash()}")


def run_ceilings(run: Run) -> None:
    import torch

    from . import ceilings

    effort = QUICK if run.args.quick else FULL
    run.item("ceilings", "ceilings", lambda _: ("ok", None, ceilings.run(run.device, effort, run.args.quick)))
    if run.device == "cuda":
        torch.cuda.empty_cache()  # the other sections are processes of their own


def run_primitives(run: Run) -> None:
    work = lambda s: checks.run_primitives(run.folder, run.device, s)  # noqa: E731
    run.item("primitives", "primitives", work, least=45, tests=("csrc/emulator/selftest", "tests/emulator"))


def run_tests(run: Run) -> None:
    work = lambda s: checks.run_gpu_tests(run.folder, run.device, s)  # noqa: E731
    run.item("tests", "tests", work, least=45, tests=("tests",))


def run_sanitizer(run: Run) -> None:
    for tool in checks.TOOLS:

        def work(seconds: float, tool: str = tool) -> checks.Outcome:
            return checks.run_sanitizer(run.folder, run.device, seconds / len(checks.TOOLS), tool)

        run.item("sanitizer", f"sanitizer/{tool}", work, least=60, tests=("tests/emulator",))


def pending(run: Run, specs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Items (with their specs) that are wanted and not stored yet."""
    found = []
    for item, spec in specs.items():
        if run.args.only and not any(text in item for text in run.args.only):
            continue
        if run.store.done(item, spec, retry_failed=run.args.retry_failed):
            run.say(f"{item}: kept")
        else:
            found.append(item)
    return found


def supervise(run: Run, section: str, module: str, path: Path, specs: Mapping[str, Mapping[str, Any]]) -> None:
    """Child processes run the items; one that hangs or dies is replaced, and its item has failed."""
    todo = pending(run, specs)
    journal, log = Journal(path), run.folder / "logs" / f"{section}.log"
    more = section != SECTIONS[-1] and SECTIONS[-1] in run.args.sections
    until = time.time() + (KEEP_FOR_LAST if more else 1.0) * run.left()
    log.unlink(missing_ok=True)
    if until <= time.time():  # a child would say no more, after seconds of imports
        why = "budget: needs a process of its own, no time is left"
        for item in todo:
            run.store.write(item, section, "skipped", reason=why, spec=specs[item])
            run.say(f"{item}: skipped, {why}")
        return
    while todo:
        journal.clear()
        command = [sys.executable, "-m", f"benchmarks.gpu.{module}", "--out", str(run.folder.resolve())]
        command += ["--device", run.device, "--until", f"{until:.3f}", *(["--quick"] if run.args.quick else [])]
        command += [item.removeprefix(section + "/") for item in todo]
        ended = watch(command, journal, seconds=max(5.0, until - time.time() + 60), log=log)
        outcomes = journal.outcomes()
        for item, outcome in outcomes.items():
            todo.remove(item)
            if outcome["status"] == "failed":
                run.failed.append(item)
        if ended.how == "finished":
            break
        if ended.item in todo:
            todo.remove(ended.item)
            reason = f"{ended.how} (exit code {ended.code}): {tail(log)}"
            status = "skipped" if ended.how == "budget" else "failed"
            run.store.write(ended.item, section, status, reason=reason, spec=specs[ended.item], seconds=ended.seconds)
            run.say(f"{ended.item}: {status}, {ended.how}")
            if ended.how == "budget":
                break
            run.failed.append(ended.item)
        elif not outcomes:
            raise SystemExit(f"the child process of {section} ended with exit code {ended.code}:\n{tail(log, 30)}")
    for line in log.read_text(errors="replace").splitlines() if log.is_file() else ():
        if line.startswith(section + "/"):
            run.say(line)


def run_timings(run: Run) -> None:
    specs = {item_name(p): spec_of(p, run.device) for p in problems(run.args.quick)}
    supervise(run, TIMINGS, "worker", journal_path(run.folder), specs)


def run_fused(run: Run) -> None:
    specs = {fused.item_name(c): asdict(c) | {"shape": list(c.shape)} for c in fused.cases(run.args.quick)}
    supervise(run, fused.SECTION, "fused", fused.journal_path(run.folder), specs)


def run_methods(run: Run) -> None:
    specs = {methods.item_name(c): c.spec() for c in methods.cases(run.args.quick)}
    supervise(run, methods.SECTION, "methods", methods.journal_path(run.folder), specs)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    ap = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    ap.add_argument("--budget", type=float, default=540, help="seconds for everything (540)")
    ap.add_argument("--out", type=Path, default=Path("outputs/gpu"), help="folder of the results (outputs/gpu)")
    ap.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    ap.add_argument("--quick", action="store_true", help="small problems: does the suite itself work?")
    ap.add_argument("--sections", default=",".join(SECTIONS), help="some of " + ", ".join(SECTIONS))
    ap.add_argument("--only", action="append", default=[], help="timings whose name contains this (repeatable)")
    ap.add_argument("--retry-failed", action="store_true", help="run what failed with this code again")
    args = ap.parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    args.sections = args.sections.split(",")
    if unknown := set(args.sections) - set(SECTIONS):
        ap.error(f"--sections: {sorted(unknown)[0]!r} is none of {', '.join(SECTIONS)}")
    if args.budget <= 0:
        ap.error(f"--budget: {args.budget}; must be positive")
    if args.device == "cpu" and not args.quick:
        ap.error("--device cpu needs --quick: the problems of the full suite are made for a GPU")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("no CUDA device; --device cpu --quick tries the suite out without one", file=sys.stderr)
            return 2
    run = Run(args)
    steps: dict[str, Callable[[Run], Any]] = {
        "environment": run_environment,
        "ceilings": run_ceilings,
        "primitives": run_primitives,
        "tests": run_tests,
        "sanitizer": run_sanitizer,
        TIMINGS: run_timings,
        fused.SECTION: run_fused,
        methods.SECTION: run_methods,
    }
    for name, step in steps.items():
        if name in args.sections:
            step(run)
    from .report import write

    run.say("written: " + ", ".join(str(path) for path in write(run.folder)))
    if run.failed:
        run.say("failed: " + ", ".join(run.failed))
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
