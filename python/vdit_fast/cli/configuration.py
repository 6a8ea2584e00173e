"""``--config`` and ``--set``: a preset's name or a file, then dotted overrides."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from vdit_fast.config import Config

ConfigOption = Annotated[
    str, typer.Option("--config", "-c", help="Preset exact, balanced or fast, or a YAML/JSON file.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override one value, e.g. --set attention.sparsity=0.8; may be repeated."),
]


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
    return Config.from_dict(tree)


def label(config: str) -> str:
    """How tables name the config: the preset, or the file without folder and suffix."""
    return Path(config).stem


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
