"""Child processes that end, die, hang and run out of time; test runs that go on after them."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
from benchmarks.gpu import checks, machine
from benchmarks.gpu.pytest_runs import run_tests, verdict
from benchmarks.gpu.supervise import Journal, tail, watch

CHILD = """
import sys, time
from pathlib import Path
from benchmarks.gpu.supervise import Journal
journal = Journal(Path(sys.argv[1]))
journal.begin("one", 60)
journal.end("one", status="ok")
print("printed")
"""


def child(tmp_path: Path, code: str, seconds: float = 60.0):
    journal, log = Journal(tmp_path / "journal"), tmp_path / "log"
    journal.clear()
    ended = watch([sys.executable, "-c", CHILD + code, str(journal.path)], journal, seconds=seconds, log=log)
    return ended, journal, log


def test_a_child_that_ends(tmp_path: Path) -> None:
    ended, journal, log = child(tmp_path, "")
    assert (ended.how, ended.item, ended.code) == ("finished", None, 0)
    assert journal.outcomes() == {"one": {"status": "ok"}} and tail(log) == "printed"


def test_a_child_that_dies(tmp_path: Path) -> None:
    ended, _, _ = child(tmp_path, "journal.begin('two', 60); import os; os._exit(3)")
    assert (ended.how, ended.item, ended.code) == ("died", "two", 3)


def test_a_child_that_hangs_is_ended(tmp_path: Path) -> None:
    start = time.monotonic()
    ended, _, _ = child(tmp_path, "journal.begin('two', 0.5); time.sleep(100)")
    assert (ended.how, ended.item) == ("hung", "two") and time.monotonic() - start < 50


def test_a_child_that_uses_the_budget_up(tmp_path: Path) -> None:
    ended, _, _ = child(tmp_path, "journal.begin('two', 60); time.sleep(100)", seconds=3)
    assert (ended.how, ended.item) == ("budget", "two")


TESTS = """
import os, time
import pytest

def test_passes(): pass
def test_fails(): assert 1 == 2
def test_hangs(): time.sleep(100)
@pytest.mark.parametrize("x", [1, 2])
def test_after_the_hang(x): pass
def test_takes_the_process(): os._exit(5 if "never" in os.environ else 139)
@pytest.mark.skip(reason="no such thing")
def test_skipped(): pass
def test_last(): pass
"""


def test_a_test_run_survives_hangs_and_crashes(tmp_path: Path) -> None:
    file = tmp_path / "test_some.py"
    file.write_text(TESTS)
    result = run_tests([str(file)], tmp_path / "logs", "some", seconds=120, test_limit=3)
    assert result["ended"] == "finished" and result["tests"] == 8, result
    assert result["counts"] == {"passed": 4, "failed": 1, "hung": 1, "died": 1, "skipped": 1}
    outcomes = {name.split("::")[1]: t["outcome"] for name, t in result["not_passed"].items()}
    assert outcomes == {"test_fails": "failed", "test_hangs": "hung", "test_takes_the_process": "died"}
    assert verdict(result) == ("failed", "1 died, 1 failed, 1 hung")


def test_a_test_run_that_cannot_start(tmp_path: Path) -> None:
    file = tmp_path / "test_broken.py"
    file.write_text("import nothing_of_this_name")
    result = run_tests([str(file)], tmp_path / "logs", "broken", seconds=60, test_limit=3)
    assert result["ended"] == "pytest ended with exit code 2" and "nothing_of_this_name" in result["log"]
    assert verdict(result)[0] == "failed"


def test_verdicts() -> None:
    assert verdict({"counts": {"passed": 3, "skipped": 1}, "ended": "finished", "tests": 4}) == ("ok", None)
    assert verdict({"counts": {"skipped": 1}, "ended": "finished", "tests": 1}) == ("failed", "no test passed")
    assert verdict({"counts": {"passed": 1}, "ended": "budget", "tests": 1})[0] == "skipped"


CLEAN = '========= COMPUTE-SANITIZER\n{"cases": 3, "of": 9, "names": []}\n========= ERROR SUMMARY: 0 errors\n'
BAD = CLEAN.replace("0 errors", "2 errors") + "========= Invalid __global__ write of size 16 bytes\n"
CASES = (
    (CLEAN, "finished", 0, "ok", ""),
    (BAD, "died", 9, "failed", "2 errors"),
    (CLEAN[:30], "budget", -9, "skipped", "did not end in time"),
    ("========= Device not supported. Please refer\n", "died", 1, "skipped", "does not support"),
    ("Traceback\n", "died", 1, "failed", "exit code 1"),
)


@pytest.mark.parametrize("text, how, code, status, reason", CASES)
def test_what_the_sanitizer_says(tmp_path: Path, text: str, how: str, code: int, status: str, reason: str) -> None:
    log = tmp_path / "log"
    log.write_text(text)
    found, why, result = checks.read_sanitizer(log, how, code)
    assert found == status and reason in (why or "")
    if text == CLEAN:
        assert result["cases"]["cases"] == 3


FAKE_SANITIZER = """#!/bin/sh
case $1 in --help) echo " --kernel-name {kns=...}  --kernel-name-exclude"; exit;; esac
echo "$@"
echo '{"cases": 1, "of": 2, "names": []}'
"""
FAKE_SMI = """#!/bin/sh
echo "$@" >>"$0.calls"
case $1 in
  *clocks.sm*) echo "1980, 3201, [N/A], 61, 100" ;;
  *) echo "Some GPU, 580.1, 143771 MiB, 1980, 3201, 700" ;;
esac
"""


def program(folder: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script on PATH."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return path


def test_the_sanitizer_is_limited_to_our_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "bin", "compute-sanitizer", FAKE_SANITIZER, monkeypatch)
    status, reason, result = checks.run_sanitizer(tmp_path, "cuda", 30.0, "racecheck")
    assert (status, reason) == ("ok", None)
    assert "--tool racecheck --error-exitcode 9 --print-limit 20 --kernel-name kns=vdit" in result["log"]
    assert "-m benchmarks.gpu.sanitize --seconds 15" in result["log"]


def test_clocks_are_read_and_nothing_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = program(tmp_path / "bin", "nvidia-smi", FAKE_SMI, monkeypatch)
    wanted = {"sm_mhz": 1980.0, "memory_mhz": 3201.0, "temperature_c": 61.0, "utilisation_percent": 100.0}
    assert machine.clocks() == wanted
    assert machine.identity("cuda")["device"] == "Some GPU"
    for call in smi.with_name("nvidia-smi.calls").read_text().splitlines():
        assert call.startswith("--query-gpu=") and call.endswith("--format=csv,noheader,nounits --id=0")
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert machine.clocks() is None and machine.gpu() is None


def test_gpu_tests_are_found() -> None:
    assert Path("tests/ops/test_attention_cuda.py") in checks.gpu_test_files()


def test_the_sanitizer_runs_kernel_cases(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    from benchmarks.gpu import sanitize

    monkeypatch.setattr(sys, "argv", ["sanitize", "--device", "cpu", "--seconds", "0"])
    sanitize.main()
    assert '{"cases": 1, "of": ' in capsys.readouterr().out
