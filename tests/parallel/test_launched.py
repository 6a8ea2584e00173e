"""What a reader starts with ``python -m torch.distributed.run``: the scripts of the docs as printed, and the demo.

Interpreters that import everything cost more than what they compute: what a launcher is not needed for runs here.
"""

from __future__ import annotations

import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ("--steps", "2", "--blocks", "2", "--num-per-block", "3", "--num-cat", "1", "--height", "16", "--width", "16")


def run(folder: Path, *command: str, seconds: float = 100) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of two ranks under torch's launcher, which has a port of its own."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    process = subprocess.Popen(
        [sys.executable, *launcher, *command], cwd=folder, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"{command} did not end within {seconds:g} s\n{out}\n{err}") from None
    return process.returncode, out, err


PIPELINE = ("parallel.md", "long_clip.py")
SEQUENCE = ("sequence_parallel.md", "two_ranks.py")

ONE_BEHIND_THE_OTHER = """
import os, runpy, sys

first, second, port = sys.argv[1:]
for name in first, second:
    if os.environ["RANK"] == "0":
        print("---", name, flush=True)
    runpy.run_path(name, run_name="__main__")
    # The launcher's store has the first one's keys.
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": port}
"""


def script(page: str, name: str, folder: Path) -> Path:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    (code,) = [code for code in found if "load_demo_model" in code]
    assert f"save this as `{name}`" in text and f"torch.distributed.run --nproc-per-node 2 {name}" in text
    (folder / name).write_text(code, encoding="utf-8")
    return folder / name


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the first of two ranks prints, by script. Both scripts in one start of the launcher."""
    folder = tmp_path_factory.mktemp("launched")
    names = [script(*place, folder).name for place in (PIPELINE, SEQUENCE)]
    (folder / "all.py").write_text(ONE_BEHIND_THE_OTHER)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    code, out, err = run(folder, "all.py", *names, port)
    assert code == 0 and "Traceback" not in err, err
    parts = re.split(r"^--- (.*)$", out, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def blocks_of(out: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith("block ")]


def test_the_script_of_the_pipeline(
    printed: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runpy.run_path(str(script(*PIPELINE, tmp_path)), run_name="__main__")
    lines = blocks_of(capsys.readouterr().out)
    assert lines == blocks_of(printed["long_clip.py"]) and len(lines) == 5
    assert lines[0].startswith("block 0: (1, 3, 6, 32, 32)") and lines[4].startswith("block 4: (1, 3, 4, 32, 32)")


def test_the_script_of_the_sequence(printed: dict[str, str]) -> None:
    out = printed["two_ranks.py"]
    assert "sequence parallelism: rank 0 of 2" in out and float(out.split()[-1]) < 1e-4
    sparse = re.search(r"transformer \(wan\) +\d+ +[\d,]+ +(\d+)", out)
    assert sparse is not None and int(sparse[1]) > 0


@pytest.fixture
def demo(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The demo in this process: (exit code, standard output)."""
    from vdit_fast.parallel import demo

    monkeypatch.setattr(demo.signal, "signal", lambda *args: None)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: (demo.main([*SMALL, *arguments]), capsys.readouterr().out)


@pytest.mark.slow
def test_the_demo(tmp_path: Path, demo: Any) -> None:
    code, out, err = run(tmp_path, "-m", "vdit_fast.parallel.demo", *SMALL, "--check")
    assert code == 0, err
    assert "frame blocks drawn 2 of 2" in out and out.splitlines()[-1].endswith("equal within rounding")
    keep = ("--checkpoint", "kept", "--resume")
    code, out = demo(*keep)
    assert code == 0 and "nothing to resume: kept has no state" in out
    code, out = demo(*keep)
    assert code == 0 and "nothing to resume" not in out and "after a restart at iteration" in out


ORPHAN = """
import os, sys, time
import torch.distributed as dist
from vdit_fast.parallel import RankFailed
from vdit_fast.parallel.members import keeper, kept_by_agent
from vdit_fast.parallel.transport import Ring

own = sys.argv[1:]
if own:
    store = dist.FileStore(own[0], 2)
    dist.init_process_group("gloo", store=store, rank=int(os.environ["RANK"]), world_size=2)
else:
    dist.init_process_group("gloo")
ring = Ring(patience=3.0)
ring.begin()
with open(f"kept{ring.rank}", "w") as file:
    file.write(f"{kept_by_agent()} {keeper([0, 1])}")
open(f"ready{ring.rank}", "w").close()
until, found = time.monotonic() + (2 if own else 30), "nothing"
while time.monotonic() < until and found == "nothing":
    try:
        ring.check()
    except RankFailed as error:
        found = f"{error.rank} {error}"
    time.sleep(0.05)
with open(f"part{ring.rank}", "w") as file:
    file.write(found)
os.replace(f"part{ring.rank}", f"error{ring.rank}")
os._exit(0)
"""


@pytest.mark.parametrize("own", [False, True])
def test_a_dead_launcher_is_no_dead_rank(tmp_path: Path, own: bool) -> None:
    """Its agent keeps the store of ``init_process_group``; a store of the ranks' own goes on without it."""
    (tmp_path / "orphan.py").write_text(ORPHAN, encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "orphan.py"]
    command += ["store"] if own else []
    with open(tmp_path / "log", "wb") as log:
        agent = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
    until = time.monotonic() + 60
    for name in ("ready", "error"):
        while not all((tmp_path / f"{name}{rank}").exists() for rank in range(2)):
            assert time.monotonic() < until, (name, (tmp_path / "log").read_text())
            time.sleep(0.05)
        if name == "ready":
            agent.kill()
            agent.wait()
    for rank in range(2):
        found = (tmp_path / f"error{rank}").read_text()
        words = "-1 the launcher's agent, whose process keeps the store and is no rank's, failed: the store that"
        assert found == "nothing" if own else found.startswith(words), found
        assert (tmp_path / f"kept{rank}").read_text() == ("False 0" if own else "True None")


WRONG = [
    (("--resume",), "--resume has no effect without --checkpoint"),
    (("--every", "2"), "--every has no effect without --checkpoint"),
    (("--tolerance", "0.1"), "--tolerance has no effect without --check"),
    (("--threads", "0"), "argument --threads: '0' is not an integer of at least 1"),
    (("--prompt", "red blob right"), "unknown word 'blob'"),
    (("--config", "balansed"), "did you mean 'balanced'"),
    (("--config", "balanced"), "set its granularity to 'block' or 'module'"),
    (("--height", "30"), "height: 30; a positive multiple of the patch, 4"),
    (("--num-cat", "9"), "num_cat: 9"),
    (("--blocks", "0"), "blocks: 0"),
    (("--colour", "red"), "unrecognized arguments: --colour red"),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG])
def test_a_wrong_argument(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vdit_fast.parallel import arguments as ranks
    from vdit_fast.parallel.demo import main

    monkeypatch.setattr(ranks.signal, "signal", lambda *args: None)
    waited: list[float] = []
    monkeypatch.setattr(ranks.time, "sleep", waited.append)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        assert ended.value.code == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("python -m vdit_fast.parallel.demo: error: ") and words in captured.err
        assert captured.err.count("\n") == 1 and captured.out == ""
    assert waited == [ranks.LEAD]  # the other rank spoke as nobody had ended it


def test_more_ranks_than_blocks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from vdit_fast.parallel.demo import main

    monkeypatch.setenv("WORLD_SIZE", "7")
    with pytest.raises(SystemExit):
        main([])
    assert "ranks: 7; 6 layers can be split over 1 to 6 ranks" in capsys.readouterr().err


@pytest.mark.parametrize("when", ["before", pytest.param("after the ranks have met", marks=pytest.mark.slow)])
def test_a_wrong_argument_is_said_once(tmp_path: Path, demo: Any, when: str) -> None:
    """By the first rank, also where the other one would be ready sooner; no rank ends with 0."""
    wrong = ("--resume",)
    if when != "before":
        assert demo("--checkpoint", "kept")[0] == 0
        wrong = ("--checkpoint", "kept", "--seed", "8")
    began = time.monotonic()
    code, _, err = run(tmp_path, "-m", "vdit_fast.parallel.demo", *SMALL, *wrong)
    assert code != 0 and time.monotonic() - began < 60
    said = err.partition("torch.distributed.elastic")[0]  # what follows is the launcher's
    words = "--resume has no effect" if when == "before" else "is of another run: seed"
    assert err.count("parallel.demo: error: ") == 1 and words in said
    assert words in err.partition("Root Cause")[2]
    assert err.count("Traceback (most recent call last)") <= 1  # the launcher's own, of itself
    assert "RankFailed" not in err and "of the pipeline failed" not in err
