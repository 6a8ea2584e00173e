"""What SparseVDiT's settings are made of: a mode per step range, layer and head; stripes; where the table belongs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from . import _checks

if TYPE_CHECKING:
    from ..context import LayerContext

LETTER = {"full": "f", "skip": "s", "diagonal": "d", "multi_diagonal": "m", "vertical": "v"}
WORD = {letter: word for word, letter in LETTER.items()}

Rows = tuple[str, ...]
"""One row for all layers or one per layer; a row is one letter for all heads or one per head."""
Table = tuple[tuple[int, Rows], ...]
"""(first step, rows) of every step range, in order."""
Stripes = tuple[tuple[int, int, str], ...]
"""(layer, head, key blocks like "0-3,7"), in order."""

_FORMS = (
    "a mode's name, a row of letters (one per head), a list of rows (one per layer), or a list of "
    '{"step": first step, "layers": any of these}'
)


def parse_table(value: Any) -> Table:
    """Any form of the knob ``modes`` in normal form; the normal form itself is one of them.

    Raises:
        TypeError, ValueError: the message names the entry and what would be right.
    """
    if isinstance(value, Mapping) or (isinstance(value, Sequence) and value and _is_range(value[0])):
        entries = [value] if isinstance(value, Mapping) else value
        table = tuple(_range(entry, f"modes[{i}]") for i, entry in enumerate(entries))
    else:
        table = ((0, _rows(value, "modes")),)
    steps = [first for first, _ in table]
    if steps[0] != 0 or any(b <= a for a, b in pairwise(steps)):
        raise ValueError(f"modes must have step ranges that begin at step 0 and ascend, got first steps {steps}")
    for name, sizes in (
        ("layers", {len(rows) for _, rows in table if len(rows) > 1}),
        ("heads", {len(row) for _, rows in table for row in rows if len(row) > 1}),
    ):
        if len(sizes) > 1:
            raise ValueError(f"modes must have equally many {name} everywhere, got {sorted(sizes)}; give one or all")
    return table


def table_form(table: Table) -> Any:
    """The shortest form in plain JSON/YAML types; ``parse_table`` reads it back."""
    if len(table) > 1:
        return [{"step": first, "layers": _rows_form(rows)} for first, rows in table]
    return _rows_form(table[0][1])


def _rows_form(rows: Rows) -> str | list[str]:
    if len(rows) > 1:
        return list(rows)
    return WORD[rows[0]] if len(rows[0]) == 1 else rows[0]


def _is_range(entry: Any) -> bool:
    return isinstance(entry, Mapping) or (isinstance(entry, Sequence) and not isinstance(entry, str))


def _range(entry: Any, name: str) -> tuple[int, Rows]:
    if isinstance(entry, Mapping):
        if set(entry) != {"step", "layers"}:
            raise ValueError(f'{name} must have the keys "step" and "layers", got {sorted(map(str, entry))}')
        first, rows = entry["step"], entry["layers"]
    elif _is_range(entry) and len(entry) == 2:
        first, rows = entry
    else:
        raise TypeError(f"{name} must be a step range, got {entry!r}; modes is {_FORMS}")
    return _checks.count(f"{name}.step", first), _rows(rows, f"{name}.layers")


def _rows(value: Any, name: str) -> Rows:
    if isinstance(value, str):
        return (_row(value, name),)
    if isinstance(value, Sequence) and value and all(isinstance(row, str) for row in value):
        return tuple(_row(row, f"{name}[{i}]") for i, row in enumerate(value))
    raise TypeError(f"{name} must be {_FORMS}; got {value!r}")


def _row(text: str, name: str) -> str:
    if text in LETTER:
        return LETTER[text]
    if not text or set(text) - set(WORD):
        known = ", ".join(f"{word} ({letter})" for word, letter in LETTER.items())
        raise ValueError(f"{name} must be a mode's name or one letter per head, got {text!r}; modes: {known}")
    return text


# ---------------------------------------------------------------------- stripes
def parse_stripes(value: Any) -> Stripes:
    """``{"layer.head": "0-3,7"}`` or the normal form, in normal form."""
    found: dict[tuple[int, int], str] = {}
    if isinstance(value, Mapping):
        entries = [(*str(key).partition(".")[::2], blocks) for key, blocks in value.items()]
    elif isinstance(value, Iterable) and not isinstance(value, str):
        entries = [tuple(entry) for entry in value]
    else:
        raise TypeError(f'stripes must be a mapping like {{"3.1": "0-3,7"}} (layer.head: key blocks), got {value!r}')
    for entry in entries:
        try:
            layer, head, blocks = entry
            place = _checks.count("layer", int(layer)), _checks.count("head", int(head))
            found[place] = _ranges(sorted(set(numbers(blocks))))
        except (TypeError, ValueError):
            raise ValueError(
                f'stripes must be like {{"3.1": "0-3,7"}} (layer.head: key blocks), got {entry!r}'
            ) from None
    return tuple((layer, head, blocks) for (layer, head), blocks in sorted(found.items()))


def stripes_form(stripes: Stripes) -> dict[str, str]:
    """``{"layer.head": "0-3,7"}``; ``parse_stripes`` reads it back."""
    return {f"{layer}.{head}": blocks for layer, head, blocks in stripes}


def numbers(blocks: Any) -> list[int]:
    """Integers ≥ 0 of "0-3,7", or of a list of them."""
    if not isinstance(blocks, str):
        return [_checks.count("block", block) for block in blocks]
    found: list[int] = []
    for part in filter(None, blocks.split(",")):
        first, _, last = part.partition("-")
        begin = _checks.count("block", int(first))
        found += range(begin, _checks.count("block", int(last or first), least=begin) + 1)
    return found


def _ranges(blocks: Sequence[int]) -> str:
    parts: list[list[int]] = []
    for block in blocks:
        if parts and block == parts[-1][1] + 1:
            parts[-1][1] = block
        else:
            parts.append([block, block])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def parse_record(value: Any) -> str:
    """The knob ``record``, a mapping or its JSON text, as JSON text with sorted keys."""
    try:
        record = json.loads(value) if isinstance(value, str) else value
        if isinstance(record, Mapping):
            return json.dumps(record, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError):
        raise ValueError(f"record must be a mapping of plain JSON values, or its JSON text, got {value!r}") from None
    raise TypeError(f"record must be a mapping, got {value!r}")


# ---------------------------------------------------------------------- where the table belongs
@dataclass(frozen=True)
class MadeFor:
    """The setting of a searched table.

    Attributes:
        family: model family, as in ``handle.stats()``.
        layers, heads: of the transformer.
        grid: video tokens (frames, height, width).
        text: text tokens in the joint sequence.
        steps: denoising steps.
    """

    family: str
    layers: int
    heads: int
    grid: tuple[int, int, int]
    text: int
    steps: int

    @classmethod
    def parse(cls, value: Any) -> MadeFor | None:
        """From the mapping form; None and a MadeFor stay what they are."""
        if value is None or isinstance(value, cls):
            return value
        names = [f.name for f in fields(cls)]
        if not isinstance(value, Mapping) or set(value) != set(names):
            raise ValueError(f"made_for must be a mapping with exactly the keys {', '.join(names)}, got {value!r}")
        if not isinstance(value["family"], str):
            raise TypeError(f"made_for.family must be a string, got {value['family']!r}")
        frames, height, width = _checks.counts("made_for.grid", value["grid"], 3)
        least = {"layers": 1, "heads": 1, "text": 0, "steps": 1}
        numbers = {name: _checks.count(f"made_for.{name}", value[name], least=n) for name, n in least.items()}
        return cls(family=value["family"], grid=(frames, height, width), **numbers)

    def to_dict(self) -> dict[str, Any]:
        """The mapping form in plain JSON/YAML types."""
        return {**asdict(self), "grid": list(self.grid)}

    def differences(self, ctx: LayerContext) -> list[str]:
        """What of a call differs and could be mapped; a family that the context does not tell is not compared."""
        pairs = [
            ("family", self.family, ctx.family or self.family),
            ("token grid", self.grid, tuple(ctx.grid)),
            ("text tokens", self.text, ctx.text),
            ("steps", self.steps, "an unknown number" if ctx.step.num_steps is None else ctx.step.num_steps),
        ]
        return [f"{name} {wanted} (here {got})" for name, wanted, got in pairs if wanted != got]

    def step(self, ctx: LayerContext) -> int:
        """The step of the table that lies at the same relative time as the call's."""
        total = ctx.step.num_steps or self.steps
        return min(int((ctx.step.step + 0.5) * self.steps / total), self.steps - 1)
