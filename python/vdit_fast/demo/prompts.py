"""The demo model's prompt language: one or two objects, each ``colour shape direction``.

A prompt such as ``"red circle right, blue square up"`` is embedded without a text encoder: every word becomes one
text token, the one-hot of the word beside the one-hot of its slot (cross-attention has no word order of its own).
"""

from __future__ import annotations

import difflib
import re

import torch

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.9, -0.6, -0.6),
    "green": (-0.6, 0.7, -0.5),
    "blue": (-0.6, -0.3, 0.95),
    "yellow": (0.9, 0.8, -0.6),
    "white": (0.95, 0.95, 0.95),
    "purple": (0.5, -0.6, 0.8),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "ring")
DIRECTIONS: dict[str, tuple[int, int]] = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
WORDS: tuple[str, ...] = (*COLOURS, *SHAPES, *DIRECTIONS)
FILLERS = frozenset({"a", "an", "the", "and", "moving", "moves", "goes", "going", "in", "front", "of", "behind", "to"})

MAX_OBJECTS = 2
TEXT_TOKENS = 3 * MAX_OBJECTS
_WORD_DIM = 24  # room for ten more words without changing the shape of the model
TEXT_DIM = _WORD_DIM + 8


def parse(prompt: str) -> list[tuple[str, str, str]]:
    """Split a prompt into ``(colour, shape, direction)`` triples, nearest object first.

    Raises:
        ValueError: a word outside the vocabulary (the message names the nearest known one), or objects that are
            not ``colour shape direction``.
    """
    words = [w for w in re.split(r"[\s,.;]+", prompt.lower()) if w and w not in FILLERS]
    for word in words:
        if word not in WORDS:
            near = difflib.get_close_matches(word, WORDS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"prompt: unknown word {word!r}; {hint}the demo model knows {', '.join(WORDS)}")
    objects = [tuple(words[i : i + 3]) for i in range(0, len(words), 3)]
    for obj in objects:
        if len(obj) != 3 or obj[0] not in COLOURS or obj[1] not in SHAPES or obj[2] not in DIRECTIONS:
            raise ValueError(
                f"prompt: {' '.join(obj)!r} is not 'colour shape direction'; write for example "
                "'red circle right, blue square up'"
            )
    if not 1 <= len(objects) <= MAX_OBJECTS:
        raise ValueError(f"prompt: {len(objects)} objects; the demo model knows 1 to {MAX_OBJECTS}")
    return objects  # type: ignore[return-value]


def embed(prompt: str) -> torch.Tensor:
    """Embed a prompt as ``[TEXT_TOKENS, TEXT_DIM]`` fp32; the empty prompt (all zeros) is the unconditional one."""
    out = torch.zeros(TEXT_TOKENS, TEXT_DIM)
    if not prompt.strip():
        return out
    for slot, word in enumerate(w for obj in parse(prompt) for w in obj):
        out[slot, WORDS.index(word)] = 4.0
        out[slot, _WORD_DIM + slot] = 4.0
    return out
