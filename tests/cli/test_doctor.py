"""The examination and its verdict."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vdit_fast.cli import checks
from vdit_fast.cli.checks import FAIL, INFO, OK, WARN, Check

GROUPS = {"versions", "hardware", "kernels", "numerics", "speed", "packages", "hazards"}


def test_doctor_examines_this_machine(run_json: Callable[..., Any], run: Callable[..., Any]) -> None:
    result = run("doctor", "--json")
    document = run_json("doctor", code=result.exit_code)
    assert document["exit_code"] == result.exit_code < 2, document["verdict"]
    assert {c["group"] for c in document["checks"]} == GROUPS
    numerics = [c for c in document["checks"] if c["group"] == "numerics"]
    assert {c["name"] for c in numerics} >= {"cpu float32", "cpu bfloat16"}
    assert all(c["status"] == OK and 0 < c["value"] <= 2 for c in numerics), numerics
    for check in document["checks"]:
        assert check["remedy"] or check["status"] in (OK, INFO), check
    words = run("doctor", "--quick")
    assert words.exit_code == result.exit_code
    assert "torch" in words.stdout and "TFLOP/s" not in words.stdout
    assert document["verdict"].split(":")[0] in words.stdout


def test_a_wrong_kernel_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    import vdit_fast

    right = vdit_fast.attention
    monkeypatch.setattr(vdit_fast, "attention", lambda q, k, v, plan=None: right(q, k, v, plan) + 1e-4)
    found = {c.name: c.status for c in checks.numerics()}
    assert found["cpu float32"] == FAIL and found["cpu bfloat16"] == OK

    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("no kernel\nimage")

    monkeypatch.setattr(vdit_fast, "attention", broken)
    assert all(c.status == FAIL and "no kernel image" in c.detail for c in checks.numerics())


def test_ignoring_the_plan_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    import vdit_fast

    right = vdit_fast.attention
    monkeypatch.setattr(vdit_fast, "attention", lambda q, k, v, plan=None: right(q, k, v))
    assert all(c.status == FAIL for c in checks.numerics())


@pytest.mark.parametrize(
    ("status", "code", "word"), [(OK, 0, "healthy"), (INFO, 0, "healthy"), (WARN, 1, "degraded"), (FAIL, 2, "broken")]
)
def test_the_worst_check_decides(status: str, code: int, word: str) -> None:
    found = [
        Check("g", "a", OK, "fine"),
        Check("g", "b", WARN if status == FAIL else OK, "x"),
        Check("g", "c", status, "y"),
    ]
    exit_code, line = checks.verdict(found)
    assert exit_code == code and line.startswith(word)
    assert "c: y" in line or code == 0
    assert checks.verdict([])[0] == 0
    assert "and 1 more" in checks.verdict([dataclasses.replace(found[2], status=FAIL)] * 2)[1]


@pytest.mark.parametrize(
    ("capability", "targets", "status", "word"),
    [
        ((9, 0), ["80-real", "90-real", "90-virtual"], OK, "90-real"),
        ((9, 0), ["80-real", "90a-real"], OK, "90a-real"),
        ((8, 6), ["80-real", "90-real"], OK, "80-real"),  # a minor version runs code of a lower one
        ((8, 0), ["86-real", "90-virtual"], FAIL, "sm_80"),
        ((10, 0), ["90a-real", "90-virtual"], WARN, "90-virtual"),
        ((12, 0), ["80-real", "90a-real"], FAIL, "sm_120"),
        ((9, 0), ["80-virtual"], WARN, "80-virtual"),
        ((7, 5), ["80-real", "80-virtual"], FAIL, "sm_75"),
        ((9, 0), ["90"], OK, "90"),
        ((9, 0), [], FAIL, "(none)"),
    ],
)
def test_gpu_targets(capability: tuple[int, int], targets: list[str], status: str, word: str) -> None:
    found, words = checks.gpu_target(capability, targets)
    assert found == status and word in words


def test_hazards_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSERS_ATTN_BACKEND", "sage")
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *a: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 9999)
    warned = {c.name for c in checks.hazards() if c.status == WARN}
    assert warned == {"SDPA", "diffusers backend", "threads"}


def test_a_package_that_does_not_import_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(checks.importlib, "import_module", fails)
    monkeypatch.setattr(checks.importlib.metadata, "version", lambda name: "0.1.0")
    broken = {c.name: c for c in checks.packages()}
    assert broken["torchvision"].status == WARN and "nms" in broken["torchvision"].detail
    monkeypatch.setattr(checks.importlib, "import_module", lambda name: None)
    found = {c.name: c for c in checks.packages()}
    assert found["diffusers"].status == WARN and "older" in found["diffusers"].detail and found["peft"].status == OK
