"""Which models generate chunk by chunk over a K/V cache, why others do not, and their rotary tables for any frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vdit_fast.models.qk import Rotary
from vdit_fast.models.skyreels_v2 import skyreels_rotary
from vdit_fast.models.wan import wan_rotary

__all__ = ["FrameTables", "check_family", "rotary_of"]

Tables = tuple[Tensor, Tensor]

CLASSES = ("WanTransformer3DModel", "SkyReelsV2Transformer3DModel")

_ROTARY: dict[str, Callable[[Tables], Rotary]] = {
    "wan": lambda tables: wan_rotary(*tables),
    "skyreels_v2": skyreels_rotary,
}

_JOINT = "text and video attend to each other, so the text's keys change with every chunk and cannot be kept"
_FACTORISED = "its layers see frames or places one at a time; keep keys of earlier frames in its temporal layers"
_REASONS = {
    "cogvideox": _JOINT,
    "easyanimate": _JOINT,
    "factorised": _FACTORISED,
    "hunyuan_video": _JOINT,
    "hunyuan_video15": _JOINT,
    "mochi": _JOINT,
    "wan": "its control, pose or reference frames must be cut into chunks too, which is not known here",
}
"""Family -> why its models, or those of another class than ``CLASSES``, are refused."""
_UNPLACED = "its tables of positions are made of the clip's size or given by the pipeline, not read at frame numbers"


def check_family(module: nn.Module, family: str) -> None:
    """Raise NotImplementedError where a transformer cannot generate chunk by chunk, with the reason."""
    kind = type(module).__name__
    if kind not in CLASSES:
        reason = _REASONS.get(family, _UNPLACED)
        raise NotImplementedError(f"stream: {kind} ({family}): {reason}; served are {' and '.join(CLASSES)}")


def rotary_of(family: str, tables: Tables) -> Rotary:
    """The family's rotation by (cos, sin) in the form of its model's own tables."""
    if family == "skyreels_v2" and tables[0].shape[1] == 1 and tables[0].shape[2] > 1:
        return skyreels_rotary(torch.complex(*tables))  # diffusers 0.35 has one complex table
    return _ROTARY[family](tables)


class FrameTables:
    """Rotary tables of one transformer for any frame numbers.

    The model makes tables for frames 0, 1, ... of its input's shape. Every channel turns along one axis only, so those
    that change from frame to frame take another frame's value, bit for bit what a longer input's table has there.

    Args:
        module: a transformer with a ``rope`` that makes (cos, sin), or one complex table, of a latent volume.

    Attributes:
        limit: frame numbers end below it.
    """

    def __init__(self, module: nn.Module) -> None:
        model: Any = module
        self._rope = model.rope
        self._patch = tuple(model.config.patch_size)
        self.limit: int = model.rope.max_seq_len
        self._frames: dict[torch.device, tuple[int, Tables, Tables]] = {}

    def of(self, frames: Sequence[int], tokens: int, stock: Tables) -> Tables:
        """Tables of frames that the model's own are not made for.

        Args:
            frames: numbers in [0, ``limit``).
            tokens: of one frame.
            stock: the model's own tables of any number of frames of this size.

        Returns:
            (cos, sin) of ``len(frames) * tokens`` tokens, in the model's form.

        Raises:
            ValueError: a number is beyond the model's table.
        """
        if max(frames) >= self.limit or min(frames) < 0:
            raise ValueError(
                f"frame {max(frames)} is beyond the model's table of {self.limit} frames (rope_max_seq_len); use "
                'store="pre_rope", whose positions are relative to the frames held, or fewer frames'
            )
        dim, tables, moves = self._of_frames(stock[0].device)
        numbers = torch.tensor(frames, device=stock[0].device)
        new = []
        for table, moving, own in zip(tables, moves, stock, strict=True):
            place = own.narrow(dim, 0, tokens).unsqueeze(dim)
            rows = table.index_select(dim, numbers).unsqueeze(dim + 1)
            new.append(torch.where(moving.unsqueeze(dim), rows, place).flatten(dim, dim + 1))
        return new[0], new[1]

    def _of_frames(self, device: torch.device) -> tuple[int, Tables, Tables]:
        """(dimension of the tokens, tables of one token per frame, which channels change along the frames)."""
        if device not in self._frames:
            time, height, width = self._patch
            found = self._rope(torch.empty(1, 1, self.limit * time, height, width, device=device))
            tables = (found.real, found.imag) if isinstance(found, Tensor) else found
            dim = next(dim for dim, size in enumerate(tables[0].shape) if size == self.limit)
            moves = [(table != table.narrow(dim, 0, 1)).any(dim, keepdim=True) for table in tables]
            self._frames[device] = dim, tables, (moves[0], moves[1])
        return self._frames[device]
