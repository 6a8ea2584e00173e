"""The suite end to end: what it stores, what it keeps, what it skips and why."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from benchmarks.gpu import __main__ as suite
from benchmarks.gpu import fused, machine, methods, store, worker
from benchmarks.gpu.items import guarded
from benchmarks.gpu.problems import full, problems
from benchmarks.gpu.supervise import Ended, Journal

Run = Callable[..., int]


def by_item(folder: Path) -> dict[str, dict]:
    return {d["item"]: d for d in store.load(folder)}


def test_every_item_is_stored_with_its_facts(finished: Path) -> None:
    found = by_item(finished)
    timed = {f"timings/{p.name}" for p in problems(True)}
    blocks = {f"methods/{c.name}" for c in methods.cases(True)}
    others = {"environment", "ceilings", "primitives", "tests", *(f"sanitizer/{t}" for t in suite.checks.TOOLS)}
    operators = {f"fused/{c.name}": fused.limit(c) for c in fused.cases(True)}
    assert set(found) == timed | others | blocks | set(operators)
    for item, limit in operators.items():
        result = found[item]["result"]
        assert found[item]["status"] == "ok" and result["difference"] < limit and result["bytes"] > 0
        assert {"vdit_fast", "torch"} <= set(result["contenders"]) and result["contenders"]["torch"]["ratio"][
            "median"
        ] > 0
    for item in blocks:
        result = found[item]["result"]
        assert found[item]["status"] == "ok" and result["dense_error"] < 1e-5
        assert 0 < result["density"] < 0.9 and result["sparse_calls"] >= 3 and result["planning_ms_per_layer"] > 0
        assert {"stock", "dense", found[item]["spec"]["method"]} == set(result["contenders"])
    for item in timed:
        document = found[item]
        assert document["status"] == "ok" and document["seconds"] > 0
        result = document["result"]
        own = result["contenders"]["vdit_fast"]
        assert own["ms_min"] <= own["ms"] <= own["ms_max"] and len(own["samples"]) >= 3
        assert own["error"] < 1e-5 and result["wrong"] == []
        assert own["executed_tflops"] == pytest.approx(result["density"] * own["dense_tflops"])
        assert own["dense_tflops"] == pytest.approx(result["dense_flop"] / own["ms"] / 1e9)
        assert {"SDPA cuDNN", "SDPA flash", "FlexAttention", "FlashInfer"} == set(result["skipped_peers"])
        assert set(result["skipped_peers"].values()) == {"needs a CUDA device"}
        assert "ratio" in result["contenders"]["SDPA"] and "ratio" not in own
    for item in others - {"environment", "ceilings"}:
        assert found[item]["status"] == "skipped" and found[item]["reason"] == "needs a CUDA device"
    facts = found["environment"]["result"]
    assert facts["torch"] == torch.__version__ and "--quick" in facts["command"]
    assert found["ceilings"]["result"]["matmul"]["tflops"] > 0


def test_a_second_run_keeps_what_is_there(finished: Path, run_suite: Run, tmp_path: Path, capsys) -> None:
    out = tmp_path / "gpu"
    shutil.copytree(finished, out)
    before = {p.name: p.read_bytes() for p in (out / "items").iterdir()}
    lost = out / "items" / "timings_dense_small.json"
    lost.write_text(lost.read_text()[:200])  # as an interrupted run leaves it
    assert run_suite(out) == 0
    printed = capsys.readouterr().out
    assert "timings/dense/narrow: kept" in printed and "timings/dense/small: ok" in printed
    for path in (out / "items").iterdir():
        if path.name.startswith("timings") and path != lost:
            assert path.read_bytes() == before[path.name]
    assert json.loads(lost.read_text())["status"] == "ok"


def test_other_code_does_not_count(finished: Path) -> None:
    name, spec = "timings/dense/small", worker.spec_of(problems(True)[0], "cpu")
    same = store.Store(finished, machine.identity("cpu"))
    assert same.done(name, spec)
    assert not same.done(name, {**spec, "length": 201})
    for key in ("code", "device", "torch"):
        assert not store.Store(finished, {**machine.identity("cpu"), key: "other"}).done(name, spec)


def test_code_hash_sees_a_kernel(tmp_path: Path) -> None:
    kernel = tmp_path / "csrc" / "kernels" / "k.cu"
    kernel.parent.mkdir(parents=True)
    kernel.write_text("1")
    first = machine.code_hash(root=tmp_path)
    kernel.write_text("2")
    machine.code_hash.cache_clear()
    assert machine.code_hash(root=tmp_path) != first
    assert machine.code_hash() == machine.code_hash(machine.LIBRARY, machine.ROOT)
    assert all((machine.ROOT / folder).is_dir() for folder in machine.LIBRARY)


def test_without_time_everything_is_skipped_with_the_reason(run_suite: Run, tmp_path: Path) -> None:
    assert run_suite(tmp_path, budget=1e-3) == 0
    found = by_item(tmp_path)
    assert found.pop("environment")["status"] == "ok"
    assert {d["status"] for d in found.values()} == {"skipped"}
    assert all(d["reason"].startswith("budget: needs") for d in found.values())


def test_without_time_a_child_begins_nothing(tmp_path: Path) -> None:
    items, journal = store.Store(tmp_path, machine.identity("cpu")), Journal(tmp_path / "j")
    worker.one(problems(True)[0], items, journal, "cpu", True, time.time())
    late = Namespace(until=time.time(), quick=False, device="cpu")
    guarded("fused/late", {}, items, journal, late, 45, lambda: pytest.fail("it has begun"))
    found = by_item(tmp_path)
    assert set(found) == {f"timings/{problems(True)[0].name}", "fused/late"}
    assert {d["status"] for d in found.values()} == {"skipped"}
    assert all(d["reason"].startswith("budget: needs about") for d in found.values())


def test_failures_stay_until_asked_for(tmp_path: Path) -> None:
    items = store.Store(tmp_path, {"code": "x"})
    items.write("a", "s", "failed", reason="broke")
    assert items.done("a") and not items.done("a", retry_failed=True)
    items.write("a", "s", "skipped", reason="no time")
    assert not items.done("a")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "other"}, "not a vdit_fast.gpu_item"),
        ({"version": 2}, "version 2"),
        ({"status": "fine"}, "status 'fine'"),
        ({"status": "failed"}, "failed without a reason"),
        ({"result": None}, "ok without a result"),
        ({"seconds": "3"}, "seconds is '3'"),
    ],
)
def test_documents_are_checked(tmp_path: Path, change: dict, message: str) -> None:
    document = store.Store(tmp_path, {}).write("a", "s", "ok", result={})
    store.check(document)
    with pytest.raises(ValueError, match=message):
        store.check({**document, **change})


def test_a_hang_costs_one_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def watch(command, journal, **_):  # the first child hangs in its second problem, the second child breaks the GPU
        names = command[command.index("--quick") + 1 :]
        calls.append(names)
        for i, name in enumerate(names):
            journal.begin(f"timings/{name}", 10)
            if (len(calls), i) == (1, 1):
                return Ended("hung", f"timings/{name}", -9, 10.0)
            journal.end(f"timings/{name}", status="failed" if len(calls) == 2 else "ok")
            if len(calls) == 2:
                return Ended("died", None, 77, 1.0)
        return Ended("finished", None, 0, 1.0)

    monkeypatch.setattr(suite, "watch", watch)
    args = ["--device", "cpu", "--quick", "--out", str(tmp_path), "--sections", "environment,timings"]
    assert suite.main(args) == 1
    names = [p.name for p in problems(True)]
    assert calls == [names, names[2:], names[3:]]
    document = by_item(tmp_path)[f"timings/{names[1]}"]
    assert document["status"] == "failed" and document["reason"].startswith("hung")


def test_wrong_and_unserved_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu import report

    import vdit_fast

    real, problem = vdit_fast.attention, problems(True)[2]
    items = store.Store(tmp_path, machine.identity("cpu"))

    def run() -> dict:
        worker.one(problem, items, Journal(tmp_path / "j"), "cpu", True, float("inf"))
        return by_item(tmp_path)[f"timings/{problem.name}"]

    monkeypatch.setattr(vdit_fast, "attention", lambda *a, **k: real(*a, **k) * 1.001)
    document = run()
    assert document["status"] == "failed" and "wrong result: relative error 0.001" in document["reason"]
    assert "WRONG" in report.markdown([document])

    def missing(*_: object, **__: object) -> None:
        raise NotImplementedError("Could not run 'vdit_fast::attention_backward' with the 'CUDA' backend")

    monkeypatch.setattr(vdit_fast, "attention", missing)
    document = run()
    assert document["status"] == "skipped" and "Could not run" in document["reason"]


def test_the_report_of_a_gpu_run(finished: Path, tmp_path: Path) -> None:
    from benchmarks.gpu import report

    documents = store.load(finished)
    chosen = next(d for d in documents if d["item"] == "timings/dense/small")
    result = chosen["result"]
    result["peak_bytes"], result["clocks_under_load"] = 3 * 2**20, {"sm_mhz": 1755.0}
    ratio = {"median": 1.25, "min": 1.2, "max": 1.3}
    result["contenders"]["SDPA cuDNN"] = {**result["contenders"]["SDPA"], "ratio": ratio}
    result["contenders"]["FlashInfer"] = {**result["contenders"]["SDPA"], "ratio": ratio}
    result["wrong"] = ["FlashInfer"]
    documents.append({**chosen, "item": "timings/x", "identity": {**chosen["identity"], "code": "other"}})
    text = report.markdown(documents)
    assert "over SDPA cuDNN" in text and "1.25x (1.20-1.30)" in text and "1755" in text and "3.00 MiB" in text
    assert "1.25x (1.20-1.30) (its result is wrong)" in text
    assert "Results of 2 different builds" in text
    report.main([str(finished)])
    assert {"report.md", "results.json", "speed.png", "rate.png"} <= {p.name for p in finished.iterdir()}
    with pytest.raises(ValueError, match="holds no results"):
        report.write(tmp_path)


STUB_PYTHON = """#!/bin/sh
echo "$@" >>"$0.calls"
case $2 in *get_device_capability*) echo 90;; esac
case $2 in benchmarks.gpu) mkdir -p "$6/items"; echo x >"$6/items/a.json"; exit 1;; esac
"""


def test_the_offline_script_builds_runs_and_packs(tmp_path: Path) -> None:
    python, out = tmp_path / "python", tmp_path / "gpu"
    python.write_text(STUB_PYTHON)
    python.chmod(0o755)
    script = machine.ROOT / "benchmarks" / "gpu" / "run_offline.sh"
    command = ["sh", str(script), "600", str(out), "--sections", "tests"]
    for _ in range(2):  # the second time on a fresh machine that was given the archive
        done = subprocess.run(command, env={**os.environ, "PYTHON": str(python)}, capture_output=True, text=True)
        assert done.returncode == 1, done.stderr  # the suite's own
        shutil.rmtree(out)
    names = subprocess.run(["tar", "-tzf", f"{out}.tar.gz"], capture_output=True, text=True, check=True).stdout
    assert "gpu/items/a.json" in names
    calls = (tmp_path / "python.calls").read_text().splitlines()
    assert len(calls) == 6 and "--no-index --no-build-isolation --no-deps" in calls[1]
    assert re.fullmatch(rf"-m benchmarks.gpu --budget 5[78]\d --out {re.escape(str(out))} --sections tests", calls[2])


def test_arguments(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for options, message in (
        (["--sections", "timing"], "'timing' is none of environment"),
        (["--budget", "0"], "must be positive"),
        (["--device", "cpu"], "needs --quick"),
    ):
        with pytest.raises(SystemExit):
            suite.main([*options, "--out", str(tmp_path)])
        assert message in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert suite.main(["--out", str(tmp_path)]) == 2
        assert "no CUDA device" in capsys.readouterr().err


def test_the_full_table_has_the_published_shapes() -> None:
    table = {p.name: p for p in full()}
    assert len(table) == len(list(full()))
    wanted = {(40, 7_800), (40, 17_160), (40, 32_760), (40, 75_600), (12, 32_760), (24, 118_800)}
    wanted |= {(32, 6_144), (32, 30_240), (48, 17_776)}
    assert wanted == {(p.heads, p.length) for p in table.values() if p.kind == "dense" and not p.backward}
    exact = table["blocks/published-7x109632"]
    assert round(exact.density * 1713) == 64 and exact.block == 64
    assert sum(p.name.startswith("blocks/wan") for p in table.values()) == 14
