"""What a reader starts with ``python -m torch.distributed.run``: the scripts of the docs as printed, and the demo."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ("--steps", "2", "--blocks", "2", "--num-per-block", "3", "--num-cat", "1", "--height", "16", "--width", "16")


def run(folder: Path, *command: str, ranks: int = 0, seconds: float = 100) -> tuple[int, str, str]:
    """(exit code, standard output, standard error); with ranks under torch's launcher, which has a port of its own."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)) if ranks else ()
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


def script(page: str, word: str, folder: Path, name: str) -> str:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    (code,) = [code for code in re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE) if word in code]
    assert f"save this as `{name}`" in text and f"torch.distributed.run --nproc-per-node 2 {name}" in text
    (folder / name).write_text(code, encoding="utf-8")
    return name


def test_the_script_of_the_pipeline(tmp_path: Path) -> None:
    name = script("parallel.md", "load_demo_model", tmp_path, "long_clip.py")
    found = [run(tmp_path, name, ranks=ranks) for ranks in (0, 2)]
    assert [code for code, _, _ in found] == [0, 0], found
    lines = [[line for line in out.splitlines() if line.startswith("block ")] for _, out, _ in found]
    assert lines[0] == lines[1] and len(lines[0]) == 5
    assert lines[0][0].startswith("block 0: (1, 3, 6, 32, 32)") and lines[0][4].startswith("block 4: (1, 3, 4, 32, 32)")
    assert "Traceback" not in found[0][2] + found[1][2]


def test_the_script_of_the_sequence(tmp_path: Path) -> None:
    name = script("sequence_parallel.md", "load_demo_model", tmp_path, "two_ranks.py")
    code, out, err = run(tmp_path, name, ranks=2)
    assert code == 0, err
    assert "sequence parallelism: rank 0 of 2" in out and float(out.split()[-1]) < 1e-4
    sparse = re.search(r"transformer \(wan\) +\d+ +[\d,]+ +(\d+)", out)
    assert sparse is not None and int(sparse[1]) > 0


@pytest.mark.slow
def test_the_demo(tmp_path: Path) -> None:
    code, out, err = run(tmp_path, "-m", "vdit_fast.parallel.demo", *SMALL, "--check", ranks=2)
    assert code == 0, err
    assert "frame blocks drawn 2 of 2" in out and out.splitlines()[-1].endswith("equal within rounding")
    keep = ("--checkpoint", "kept")
    code, out, err = run(tmp_path, "-m", "vdit_fast.parallel.demo", *SMALL, *keep, "--resume")
    assert code == 0 and "nothing to resume: kept has no state" in out, err
    code, out, err = run(tmp_path, "-m", "vdit_fast.parallel.demo", *SMALL, *keep, "--resume")
    assert code == 0 and "nothing to resume" not in out and "after a restart at iteration" in out, err


ORPHAN = """
import os, sys, time
import torch.distributed as dist
from vdit_fast.parallel import RankFailed
from vdit_fast.parallel.transport import Ring

own = sys.argv[1:]
if own:
    store = dist.FileStore(own[0], 2)
    dist.init_process_group("gloo", store=store, rank=int(os.environ["RANK"]), world_size=2)
else:
    dist.init_process_group("gloo")
ring = Ring(patience=3.0)
ring.begin()
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
def test_a_wrong_argument_is_said_once(tmp_path: Path, when: str) -> None:
    """By the first rank, also where the other one would be ready sooner; no rank ends with 0."""
    wrong = ("--resume",)
    if when != "before":
        assert run(tmp_path, "-m", "vdit_fast.parallel.demo", *SMALL, "--checkpoint", "kept")[0] == 0
        wrong = ("--checkpoint", "kept", "--seed", "8")
    began = time.monotonic()
    code, _, err = run(tmp_path, "-m", "vdit_fast.parallel.demo", *SMALL, *wrong, ranks=2)
    assert code != 0 and time.monotonic() - began < 60
    said = err.partition("torch.distributed.elastic")[0]  # what follows is the launcher's
    words = "--resume has no effect" if when == "before" else "is of another run: seed"
    assert err.count("parallel.demo: error: ") == 1 and words in said
    assert words in err.partition("Root Cause")[2]
    assert err.count("Traceback (most recent call last)") <= 1  # the launcher's own, of itself
    assert "RankFailed" not in err and "of the pipeline failed" not in err
