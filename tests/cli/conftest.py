"""Running verbs in this process, and a tiny weight file for the demo."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")
testing = pytest.importorskip("typer.testing")

from vdit_fast.cli.app import app  # noqa: E402  (needs typer)


@pytest.fixture
def run() -> Callable[..., Any]:
    """``run("verb", "--option", ...)`` gives a result with ``exit_code``, ``stdout`` and ``stderr``."""

    def invoke(*arguments: object) -> Any:
        return testing.CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "160"})

    return invoke


@pytest.fixture
def run_json(run: Callable[..., Any]) -> Callable[..., Any]:
    """The same with ``--json``; gives the document, after checking the exit code."""

    def invoke(*arguments: object, code: int = 0) -> Any:
        result = run(*arguments, "--json")
        assert result.exit_code == code, result.output
        return json.loads(result.stdout, parse_constant=lambda token: pytest.fail(f"{token} is not JSON"))

    return invoke


@pytest.fixture
def tiny_weights(tmp_path: Path) -> Path:
    """A random three-layer demo model on disk."""
    diffusers = pytest.importorskip("diffusers")
    from vdit_fast.demo.architecture import TRANSFORMER_CONFIG
    from vdit_fast.demo.model import save_demo_model

    small = {"num_attention_heads": 2, "attention_head_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 3}
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(**(TRANSFORMER_CONFIG | small))
    return save_demo_model(model.state_dict(), tmp_path / "tiny.safetensors", architecture=TRANSFORMER_CONFIG | small)
