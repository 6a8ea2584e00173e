"""``--config`` and ``--set``: a preset's name or a file, then dotted overrides.

An override of a method replaces it. The new one takes over what the preset or file chose (`dense_steps`, `min_tokens`,
...), not the old one's defaults; chosen knobs that it does not have are dropped, which is logged. An overridden knob
that it does not have is an error.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from vdit_fast.config import Config

logger = logging.getLogger("vdit_fast")

_CONFIG = "exact (dense, fused blocks), balanced, fast (sparser, fewer steps computed), or a YAML/JSON file."
ConfigOption = Annotated[str, typer.Option("--config", "-c", help=_CONFIG)]
_SET = "Override one value of the config, e.g. --set attention.sparsity=0.8 or --set cache=null; may be repeated."
SetOption = Annotated[list[str] | None, typer.Option("--set", help=_SET)]


def resolve(config: str | Mapping[str, Any], overrides: list[str] | None = None) -> Config:
    """Turn the options into a Config.

    Raises:
        ValueError: an unknown preset, a file that is not a config, or an override that is not ``key=value``.
        FileNotFoundError: the config file does not exist.
    """
    from vdit_fast.config import Config

    found = Config.of(config)
    if not overrides:
        return found
    tree = found.to_dict()
    before = {section: dict(tree[section] or {}) for section in ("attention", "cache", "subset")}
    named = _named(config)
    given: set[str] = set()
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise ValueError(f"set: {item!r} is not key=value; write for example attention.sparsity=0.8")
        node: dict[str, Any] = tree
        *parents, last = key.split(".")
        for parent in parents:
            if not isinstance(node.get(parent), dict):
                node[parent] = {}
            node = node[parent]
        node[last] = _value(text)
        given.add(key)
    for section, old in before.items():
        _forget(section, tree.get(section), old, given, named)
    return Config.from_dict(tree)


def _named(config: str | Mapping[str, Any]) -> set[str]:
    """Dotted keys that a preset or mapping spells out; a file may have been saved with all defaults in it."""
    from vdit_fast.presets import PRESETS

    data: Any = PRESETS.get(config, {}) if isinstance(config, str) else config
    sections = {key: value for key, value in data.items() if isinstance(value, Mapping)}
    return {f"{section}.{knob}" for section, knobs in sections.items() for knob in knobs}


def _forget(section: str, node: Any, old: dict[str, Any], given: set[str], named: set[str]) -> None:
    """Remove what an overridden method does not take over: its predecessor's defaults, and knobs that it lacks."""
    if not isinstance(node, dict) or f"{section}.method" not in given or node.get("method") == old.get("method"):
        return
    known, defaults = _knobs(section, node.get("method")), _knobs(section, old.get("method"))
    if known is None or defaults is None:
        return
    lost = []
    for key in [key for key in node if key in old and key != "method" and f"{section}.{key}" not in given]:
        chosen = f"{section}.{key}" in named or node[key] != defaults.get(key, _REQUIRED)
        if chosen and key in known:
            continue
        if chosen:
            lost.append(f"{key}={json.dumps(node[key])}")
        del node[key]
    if lost:
        logger.warning(
            "vdit_fast: %s.method=%s has no %s: dropped from the configuration",
            section,
            node["method"],
            ", ".join(lost),
        )


_REQUIRED = object()


def _knobs(section: str, method: Any) -> dict[str, Any] | None:
    """The knobs of a method and their defaults in the mapping form; None if there is no such method."""
    from vdit_fast import caching, planners, subset

    registries: dict[str, Mapping[str, Any]] = {
        "attention": planners.REGISTRY,
        "cache": caching.REGISTRY,
        "subset": subset.REGISTRY,
    }
    registry = registries.get(section, {})
    cls = registry.get(method) if isinstance(method, str) else None
    if cls is None:
        return None
    defaults = {item.name: _REQUIRED if item.default is MISSING else item.default for item in fields(cls)}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in defaults.items()}


def label(config: str, overrides: list[str] | None = None) -> str:
    """How tables name what runs: the preset, or the file without folder and suffix, then what was overridden.

    ``balanced``; ``balanced + svg2`` (another method); ``balanced + svg2, no cache``; ``balanced + sparsity=0.9``.
    """
    name, changes = Path(config).stem, {}
    for item in overrides or ():
        key, _, text = item.partition("=")
        value = _value(text)
        section, _, knob = key.partition(".")
        if section == "cache" and not knob and value is None:
            changes[key] = "no cache"
        elif section == "subset" and not knob and value is None:
            changes[key] = "all tokens"
        elif section == "attention" and not knob and value is None:
            changes[key] = "dense attention"
        elif section in ("attention", "cache", "subset") and knob in ("", "method"):
            changes[key] = str(value.get("method", text)) if isinstance(value, dict) else str(value)
        else:
            changes[key] = f"{knob or key}={text}"
    return f"{name} + {', '.join(changes.values())}" if changes else name


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
