"""``--config`` with ``--set``: what an overridden method takes over, and how tables call the result."""

from __future__ import annotations

import logging

import pytest

pytest.importorskip("typer")

from vdit_fast.cli.configuration import label, resolve
from vdit_fast.planners import REGISTRY, Radial


def test_every_method_can_replace_the_presets(caplog: pytest.LogCaptureFixture) -> None:
    """Chosen knobs that the new method has stay, the others are named in one warning; no default is taken over."""
    for name, cls in REGISTRY.items():
        if not cls.__module__.startswith("vdit_fast."):
            continue
        caplog.clear()
        with caplog.at_level(logging.WARNING, "vdit_fast"):
            found = resolve("balanced", [f"attention.method={name}"])
        planner = found.attention
        assert planner is not None and planner.name == name and found.cache is not None
        assert (planner.dense_steps, planner.dense_layers, planner.min_tokens) == (0.34, 1, 4096)
        if "sparsity" in cls.__dataclass_fields__:
            assert planner.to_dict()["sparsity"] == 0.75 and not caplog.records, name
        else:
            assert len(caplog.records) == 1 and "has no sparsity=0.75: dropped" in caplog.text, name
    radial = resolve("balanced", ["attention.method=radial"]).attention
    assert radial is not None and radial.sinks == Radial().sinks != 0  # draft's 0 was nobody's choice


def test_what_the_user_sets_is_never_dropped(caplog: pytest.LogCaptureFixture) -> None:
    for order in (1, -1):
        overrides = ["attention.method=xattention", "attention.sparsity=0.5"][::order]
        with pytest.raises(ValueError, match="'xattention' has no knob 'sparsity'"):
            resolve("balanced", overrides)
    same = resolve("balanced", ["attention.method=draft", "attention.pool=[4, 8]"]).attention
    assert same is not None and same.to_dict()["pool"] == [4, 8] and not caplog.records
    kept = resolve({"attention": {"method": "svg1", "rows": 32}}, ["attention.method=svg1"]).attention
    assert kept is not None and kept.to_dict()["rows"] == 32


def test_errors_name_the_method() -> None:
    with pytest.raises(ValueError, match="unknown planner method 'svg3'"):
        resolve("balanced", ["attention.method=svg3"])
    with pytest.raises(ValueError, match="cache"):
        resolve("balanced", ["cache.method=draft"])
    assert resolve("balanced", ["attention=svg2"]).attention == REGISTRY["svg2"]()
    assert resolve("balanced", ["cache=null", "attention.method=svg2"]).cache is None


@pytest.mark.parametrize(
    ("config", "overrides", "want"),
    [
        ("balanced", None, "balanced"),
        ("folder/mine.yaml", [], "mine"),
        ("balanced", ["attention.method=svg2"], "balanced + svg2"),
        ("balanced", ["attention=svg2", "cache=null"], "balanced + svg2, no cache"),
        ("balanced", ['attention={"method": "window"}'], "balanced + window"),
        ("balanced", ["attention=null"], "balanced + dense attention"),
        ("fast", ["attention.sparsity=0.8", "attention.pool=[4,8]"], "fast + sparsity=0.8, pool=[4,8]"),
        ("fast", ["attention.sparsity=0.8", "attention.sparsity=0.7"], "fast + sparsity=0.7"),
        ("exact", ["on_unsupported=error", "cache.method=taylorseer"], "exact + on_unsupported=error, taylorseer"),
    ],
)
def test_the_label_says_what_ran(config: str, overrides: list[str] | None, want: str) -> None:
    assert label(config, overrides) == want
