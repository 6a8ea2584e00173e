"""The one configuration object of ``vdit_fast.accelerate``."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vdit_fast.presets import PRESETS

if TYPE_CHECKING:
    from vdit_fast.caching import CachePolicy
    from vdit_fast.linear import LinearAttention
    from vdit_fast.planners import Planner
    from vdit_fast.subset import RowPolicy

__all__ = ["Config"]

_ON_UNSUPPORTED = ("dense", "error")
_FUSE = ("fast", "eager", "off")


def _nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error message: the nearest known word and the list of all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(names)}"


def _check_numbers(value: Any, path: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{path} is {value}; give a finite number")
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_numbers(item, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check_numbers(item, f"{path}[{index}]")


def _planner(value: Mapping[str, Any] | str) -> Planner:
    from vdit_fast.planners.base import from_dict

    data: Mapping[str, Any] = {"method": value} if isinstance(value, str) else value
    _check_numbers(data, "attention")
    return from_dict(data)


def _policy(value: Mapping[str, Any] | str) -> CachePolicy:
    from vdit_fast.caching import from_dict

    data: Mapping[str, Any] = {"method": value} if isinstance(value, str) else value
    _check_numbers(data, "cache")
    return from_dict(data)


def _rows(value: Mapping[str, Any] | str) -> RowPolicy:
    from vdit_fast.subset import from_dict

    data: Mapping[str, Any] = {"method": value} if isinstance(value, str) else value
    _check_numbers(data, "subset")
    return from_dict(data)


def _linear(value: Mapping[str, Any] | str | os.PathLike[str]) -> LinearAttention:
    from vdit_fast.linear import LinearAttention

    return LinearAttention.from_dict(value)


def _sections() -> dict[str, Mapping[str, Any]]:
    """Keys of a configuration that take a method -> the methods."""
    from vdit_fast import caching, planners, subset

    return {"attention": planners.REGISTRY, "cache": caching.REGISTRY, "subset": subset.REGISTRY}


def _section_of(method: Any) -> str | None:
    """The key of a configuration that takes this method: "attention", "cache", "subset" or, for no method, None."""
    return next((key for key, known in _sections().items() if isinstance(method, str) and method in known), None)


def _unknown_key(key: str, known: Iterable[str]) -> str:
    """The end of the message about a key that is none, perhaps a knob that was written one level too high."""
    for section, methods in _sections().items():
        if any(key == item.name for method in methods.values() for item in dataclasses.fields(method)):
            return f"it is a knob of {section}: write {{{section!r}: {{{key!r}: ...}}}}, with --set {section}.{key}=..."
    return _nearest(key, known)


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError(
            "reading or writing YAML needs PyYAML: pip install 'vdit-fast[cli]', or use a .json file"
        ) from error
    return yaml


@dataclass(frozen=True)
class Config:
    """What ``accelerate`` does to a model.

    Args:
        attention: the planner that sparsifies self/joint attention, None for dense attention through this
            package's kernel.
        cache: the policy that forecasts features of the transformer at some steps instead of computing them, None
            to compute every step.
        subset: the policy that computes only some of the video tokens at some steps, None to compute all of them.
        fuse: how norms, RoPE, modulation and residuals of known blocks run: ``"fast"`` through fused operators that
            keep fp32 until the result is written, ``"eager"`` through the same operators with the stock model's
            rounding points, ``"off"`` as in the stock model.
        text_kv: compute keys and values of the text in cross-attention once per prompt instead of in every step
            (inference of the Wan and SkyReels families); costs their memory, same bits.
        linear: the layers that run linear attention in place of softmax attention, with their trained feature maps;
            the planner gets the others.
        on_unsupported: what to do with a call that cannot be served (device without a kernel, unknown mask,
            context parallelism, ...): ``"dense"`` runs it densely the stock way and counts it in the report,
            ``"error"`` raises.
        verbose: log every kind of dense call once, also those the planner chose.

    Raises:
        TypeError, ValueError: a field of the wrong type or value, named with its remedy.
    """

    attention: Planner | None = None
    cache: CachePolicy | None = None
    subset: RowPolicy | None = None
    fuse: Literal["fast", "eager", "off"] = "fast"
    text_kv: bool = False
    linear: LinearAttention | None = None
    on_unsupported: Literal["dense", "error"] = "dense"
    verbose: bool = False

    def __post_init__(self) -> None:
        for name in ("attention", "cache", "subset", "linear"):
            if isinstance(kind := getattr(self, name), type):
                raise TypeError(f"{name} is the class {kind.__name__}; pass an object of it, {kind.__name__}(...)")
        planner = self.attention
        if planner is not None and not (callable(getattr(planner, "plan", None)) and hasattr(planner, "decision")):
            raise TypeError(
                f"attention must be a planner with plan() and decision(), or None, got {type(planner).__name__}: "
                f"{planner!r}; use Config.from_dict for the mapping form"
            )
        if planner is not None and dataclasses.is_dataclass(planner):
            for item in dataclasses.fields(planner):
                _check_numbers(getattr(planner, item.name), f"attention.{item.name}")
        policy = self.cache
        if policy is not None and not (callable(getattr(policy, "weights", None)) and hasattr(policy, "decide")):
            raise TypeError(
                f"cache must be a cache policy with decide() and weights(), or None, got {type(policy).__name__}: "
                f"{policy!r}; use Config.from_dict for the mapping form"
            )
        rows = self.subset
        if rows is not None and not (callable(getattr(rows, "choose", None)) and hasattr(rows, "whole")):
            raise TypeError(
                f"subset must be a row policy with whole() and choose(), or None, got {type(rows).__name__}: {rows!r}; "
                "use Config.from_dict for the mapping form"
            )
        if self.linear is not None and not hasattr(self.linear, "identity"):
            raise TypeError(
                f"linear must be a LinearAttention, or None, got {type(self.linear).__name__}: {self.linear!r}; use "
                "Config.from_dict for the path of a file and the mapping form"
            )
        if self.fuse is False:  # what YAML makes of an unquoted off
            object.__setattr__(self, "fuse", "off")
        if self.fuse not in _FUSE:
            raise ValueError(f"fuse is {self.fuse!r}; {_nearest(str(self.fuse), _FUSE)}")
        if self.on_unsupported not in _ON_UNSUPPORTED:
            hint = _nearest(str(self.on_unsupported), _ON_UNSUPPORTED)
            raise ValueError(f"on_unsupported is {self.on_unsupported!r}; {hint}")
        for name in ("text_kv", "verbose"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be true or false, got {type(value).__name__}: {value!r}")

    @classmethod
    def preset(cls, name: str) -> Config:
        """The preset ``"exact"``, ``"balanced"`` or ``"fast"``."""
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is unknown; {_nearest(str(name), PRESETS)}")
        return cls.from_dict(PRESETS[name])

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Config:
        """Build from the mapping form, e.g. ``{"attention": {"method": "draft", "sparsity": 0.75}}``."""
        if not isinstance(data, Mapping):
            raise TypeError(f"a configuration must be a mapping, got {type(data).__name__}: {data!r}")
        known = {f.name for f in dataclasses.fields(cls)}
        if section := _section_of(data.get("method")):
            raise ValueError(
                f"this describes the method {data['method']!r}, not a configuration; "
                f"pass {{{section!r}: {dict(data)!r}}}"
            )
        for key in data:
            if key not in known:
                raise ValueError(f"configuration key {key!r} is unknown; {_unknown_key(str(key), known)}")
        values = dict(data)
        for key, make in (("attention", _planner), ("cache", _policy), ("subset", _rows)):
            value = values.get(key)
            if isinstance(value, (Mapping, str)):
                values[key] = make(value)
            elif isinstance(value, (bool, int, float, list, tuple)):
                form = "the name of a method, a mapping {'method': name, knob: value} or null"
                raise TypeError(f"{key} must be {form}, got {value!r}")
        linear = values.get("linear")
        if isinstance(linear, (Mapping, str, os.PathLike)):
            values["linear"] = _linear(linear)
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Config:
        """Read a ``.json``, ``.yaml`` or ``.yml`` file."""
        file = Path(path)
        if file.is_dir():
            raise ValueError(f"config {str(path)!r} is a folder; give a preset, or a .json, .yaml or .yml file")
        if not file.exists():
            raise FileNotFoundError(f"config {str(path)!r} does not exist; presets are {', '.join(map(repr, PRESETS))}")
        text = file.read_text(encoding="utf-8")
        suffix = file.suffix.lower()
        if suffix == ".json":
            try:
                data = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file} is not valid JSON: {error}") from error
        elif suffix in (".yaml", ".yml"):
            yaml = _yaml()
            try:
                data = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ValueError(f"{file} is not valid YAML: {error}") from error
        else:
            raise ValueError(f"{file}: the suffix {suffix!r} is unknown; use .json, .yaml or .yml")
        return cls.from_dict({} if data is None else data)

    @classmethod
    def of(cls, value: Config | str | os.PathLike[str] | Mapping[str, Any] | None) -> Config:
        """A Config from whatever ``accelerate`` accepts: Config, preset name, file path, mapping or None."""
        if value is None:
            return cls()
        if isinstance(value, Config):
            return value
        if isinstance(value, Mapping):
            return cls.from_dict(value)
        if isinstance(value, str) and value in PRESETS:
            return cls.preset(value)
        if isinstance(value, (str, os.PathLike)):
            file = Path(value)
            if file.suffix.lower() in (".json", ".yaml", ".yml") or file.exists():
                return cls.from_file(file)
            if section := _section_of(value):
                raise ValueError(
                    f"config {str(value)!r} is the name of a method, not of a preset; "
                    f"pass {{{section!r}: {str(value)!r}}}"
                )
            raise ValueError(
                f"config {str(value)!r} is neither a preset nor a .json/.yaml file; {_nearest(str(value), PRESETS)}"
            )
        raise TypeError(
            f"config must be a Config, a preset name, a file path or a mapping, got {type(value).__name__}: {value!r}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The mapping form; ``Config.from_dict`` of it is equal to this object."""
        attention = self.attention.to_dict() if self.attention is not None else None
        cache = self.cache.to_dict() if self.cache is not None else None
        linear = self.linear.to_dict() if self.linear is not None else None
        rest = {name: getattr(self, name) for name in ("fuse", "text_kv", "on_unsupported", "verbose")}
        subset = self.subset.to_dict() if self.subset is not None else None
        return {"attention": attention, "cache": cache, "subset": subset, "linear": linear} | rest

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a ``.json``, ``.yaml`` or ``.yml`` file that ``from_file`` reads back."""
        file = Path(path)
        suffix = file.suffix.lower()
        if suffix == ".json":
            text = json.dumps(self.to_dict(), indent=2) + "\n"
        elif suffix in (".yaml", ".yml"):
            text = _yaml().safe_dump(self.to_dict(), sort_keys=False)
        else:
            raise ValueError(f"{file}: the suffix {suffix!r} is unknown; use .json, .yaml or .yml")
        file.write_text(text, encoding="utf-8")

    def digest(self) -> str:
        """Ten hexadecimal digits, the same for equal configurations on every machine; ``verbose`` does not count, and
        of a file of feature maps its content does."""
        content = {key: item for key, item in self.to_dict().items() if key != "verbose"}
        if self.linear is not None:
            content["linear"] = self.linear.identity()
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:10]
