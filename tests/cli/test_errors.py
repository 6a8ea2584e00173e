"""What every verb does with bad input: one clear line, exit code 2, JSON when asked."""

from __future__ import annotations

import builtins
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vdit_fast.cli
from vdit_fast.cli.configuration import resolve
from vdit_fast.cli.output import finite, session

VERBS = ("doctor", "demo", "generate", "compare", "bench", "profile", "plot", "tune")


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_json(verb: str, run: Callable[..., Any]) -> None:
    result = run(verb, "--help")
    assert result.exit_code == 0 and "--json" in result.stdout and "--debug" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("demo", "--prompt", "red blob right"), "unknown word 'blob'"),
        (("demo", "--config", "balansed"), "did you mean 'balanced'"),
        (("demo", "--config", "none.yaml"), "config 'none.yaml' does not exist; presets are 'exact'"),
        (("demo", "--set", "sparsity=0.5"), "it is a knob of attention"),
        (("demo", "--set", "attention.sparsity"), "key=value"),
        (("demo", "--set", "attention.sparsety=0.5"), "did you mean 'sparsity'"),
        (("demo", "--weights", "nowhere.safetensors"), "nowhere.safetensors"),
        (("generate", "--model", "nowhere", "--prompt", "x"), "'nowhere' is not a folder"),
        (("generate", "--model", ".", "--prompt", "x", "--out", "a.gif"), "a.gif"),
        (("compare", "a.mp4", "b.mp4"), "a.mp4"),
        (("bench", "--suite", "huge"), "'huge' is unknown"),
        (("bench", "--shape", "1x2x3"), "BATCHxHEADSxLENGTHxDIM"),
        (("bench", "--densities", "1,half"), "'1,half'"),
        (("bench", "--densities", "1.5", "--shape", "1x1x8x8"), "1.5"),
        (("bench", "--dtype", "int4"), "'int4'"),
        (("bench", "--device", "abacus"), "'abacus'"),
        (("bench", "--suite", "demo", "--shape", "1x1x8x8"), "--suite: no effect here"),
        (("bench", "methods", "--quick", "--steps", "12"), "--steps: no effect here"),
        (("bench", "methods", "--quick", "--repeats", "3"), "--repeats: no effect here"),
        (("profile", "--method", "draft", "--config", "balanced"), "--config: no effect here"),
        (("profile", "--device", "cpu", "--dtype", "fp32"), "--dtype, --device: no effect here"),
        (("profile", "--set", "cache=null"), "'cache=null' has no effect here"),
        (("tune", "--device", "cpu"), "--device: no effect here"),
        (("plot", "nothing.json"), "nothing.json"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    arguments: tuple[str, ...], words: str, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert words in result.stderr and result.stderr.startswith("vdit-fast: error: ")
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.output and result.stdout == ""
    told = run(*arguments, "--json")
    assert told.exit_code == 2 and words in json.loads(told.stdout)["error"]
    assert "Traceback" in run(*arguments, "--debug").stderr


def test_a_seed_that_nothing_draws_with(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Pipe:
        def __call__(self, prompt: str) -> None:
            raise RuntimeError("it was run")

    monkeypatch.setattr("vdit_fast.cli.generation.load_pipeline", lambda *args: Pipe())
    arguments = ("generate", "--model", tmp_path, "--prompt", "x", "--out", tmp_path / "x.mkv", "--baseline")
    result = run(*arguments, "--seed", 3)
    assert result.exit_code == 2 and "--seed: no effect here; Pipe takes no generator" in result.stderr
    assert "it was run" in run(*arguments).stderr


def test_options_before_a_command_of_bench_are_not_dropped(run: Callable[..., Any]) -> None:
    result = run("bench", "--dtype", "bf16", "methods", "--quick")
    assert result.exit_code == 2 and "--dtype: no effect here" in result.stderr and "bench methods" in result.stderr
    assert run("bench", "methods", "--help").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("demo", "--steps", "0"), "--steps"),
        (("demo", "--colour", "red"), "--colour"),
        (("generate",), "--model"),
        (("bench", "--repeats", "x"), "--repeats"),
        (("fly",), "fly"),
    ],
)
def test_bad_options_are_code_2(arguments: tuple[str, ...], word: str, run: Callable[..., Any]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert word in result.stderr


def test_other_errors_are_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    import typer

    for error, words in (
        (RuntimeError("the kernel\nbroke"), "RuntimeError: the kernel broke (--debug shows the traceback)"),
        (ImportError("pip install it"), "ImportError: pip install it\n"),
    ):
        with pytest.raises(typer.Exit) as caught, session(False, False):
            raise error
        assert caught.value.exit_code == 1
        assert words in capsys.readouterr().err
    with pytest.raises(typer.Exit) as caught, session(True, False):
        raise KeyboardInterrupt
    assert caught.value.exit_code == 130


def test_prints_of_libraries_stay_out_of_the_json(capsys: pytest.CaptureFixture[str]) -> None:
    with session(True, False) as out:
        print("a library says hello")
        out.show("for people")
        out.emit({"a": float("nan"), "b": [1.5, float("inf")]})
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"a": None, "b": [1.5, None]}
    assert "hello" in captured.err and "for people" not in captured.out + captured.err
    assert finite({1: (2, None, "x")}) == {"1": [2, None, "x"]}


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_a_missing_package_names_the_extra(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def blocked(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == missing:
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, missing, raising=False)
    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(SystemExit) as caught:
        vdit_fast.cli.main()
    assert "pip install 'vdit-fast[cli]'" in str(caught.value) and missing in str(caught.value)


def test_overrides_change_the_config(tmp_path: Path) -> None:
    base = resolve("balanced")
    changed = resolve("balanced", ["attention.sparsity=0.5", "attention.dense_layers=[0,-1]", "on_unsupported=error"])
    assert changed.attention.sparsity == 0.5 and changed.attention.dense_layers == (0, -1)
    assert changed.on_unsupported == "error" and base.attention.sparsity != 0.5
    assert resolve("exact", ["attention.method=draft"]).attention.name == "draft"
    changed.save(tmp_path / "c.json")
    assert resolve(str(tmp_path / "c.json")) == changed
