"""Tables, numbers for people, JSON and the environment."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vdit_fast import report


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (8.12e-7, "812 ns"),
        (4.213e-3, "4.21 ms"),
        (0.09996, "100 ms"),
        (0.99999, "1.00 s"),
        (12.34, "12.3 s"),
        (99.6, "1 min 40 s"),
        (185, "3 min 05 s"),
        (3599.7, "1 h 00 min"),
        (7440, "2 h 04 min"),
        (-0.5, "-500 ms"),
        (None, "-"),
        (math.inf, "inf"),
    ],
)
def test_seconds(seconds, text):
    assert report.format_seconds(seconds) == text


def test_other_numbers():
    assert report.format_ratio(1.8234, 1.75, 1.9) == "1.82x (1.75-1.90)"
    assert report.format_ratio(12.34) == "12.3x" and report.format_ratio(None) == "-"
    with pytest.raises(ValueError, match="low"):
        report.format_ratio(1.0, 2.0, 1.0)
    assert report.format_count(75600) == "75,600"
    assert report.format_percent(0.2534) == "25.3%" and report.format_percent(None) == "-"
    assert report.format_bytes(1536 * 2**20) == "1.50 GiB" and report.format_bytes(12) == "12 B"


def test_plain_table_lines_up():
    rows = [["dense", 1.0, None], ["草稿", 12.5, 3]]
    lines = report.table(rows, ["name", "speed", "n"]).splitlines()
    assert lines == ["name   speed  n", "-----  -----  -", "dense      1  -", "草稿    12.5  3"]


def test_markdown_table():
    lines = report.table([["a|b", 1], ["c\nd", 22]], ["name", "n"], style="markdown").splitlines()
    assert lines == ["| name |   n |", "| ---- | --: |", "| a\\|b |   1 |", "| c d  |  22 |"]
    assert report.table([], ["x"], style="markdown").splitlines() == ["| x   |", "| --- |"]


def test_bad_tables_are_named():
    with pytest.raises(ValueError, match=r"rows\[0\] has 1 cells for 2"):
        report.table([[1]], ["a", "b"])
    with pytest.raises(ValueError, match="style is 'html'"):
        report.table([], ["a"], style="html")
    with pytest.raises(ValueError, match="align is 'c'"):
        report.table([], ["a"], align="c")


def test_json_is_strict_and_takes_tensors(tmp_path):
    value = {
        "t": torch.tensor([1.0, math.inf]),
        "n": np.float32(0.5),
        "a": np.arange(2),
        "nan": math.nan,
        "path": Path("/some/where/file.txt"),
        "deep": [{"x": (1, 2)}, []],
        3: True,
    }
    path = report.write_json(tmp_path / "new" / "v.json", value)
    expected = {"t": [1.0, "inf"], "n": 0.5, "a": [0, 1], "nan": None, "path": "file.txt", "deep": [{"x": [1, 2]}, []]}
    assert report.read_json(path) == {**expected, "3": True}
    assert report.json_safe(1.23456, digits=2) == 1.23
    with pytest.raises(TypeError, match="object"):
        report.json_safe(object())


def test_environment_is_plain_and_holds_no_path():
    found = report.environment()
    text = json.dumps(found, allow_nan=False)
    assert found["torch"] == torch.__version__ and found["cpu"]["cores"] >= 1
    assert found["python"].startswith(f"{sys.version_info.major}.")
    for secret in (str(Path.home()), str(Path.cwd())):
        assert len(secret) < 2 or secret not in text
    if found["git"] is not None:
        assert len(found["git"]["commit"]) == 40


def test_import_needs_no_extra():
    code = "import sys; import vdit_fast.report; print([m for m in ('matplotlib', 'av', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
