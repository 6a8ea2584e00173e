"""The state of a running pipeline on disk, whole or not at all, so that a run can go on with the same bits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Checkpoint"]

VERSION = 1


class Checkpoint:
    """A folder with the newest state of a run and the blocks that it has finished. The first rank writes it.

    Between two iterations the other ranks hold nothing that a run needs: the newest block of the next iteration has no
    noisier neighbour, so the neighbours' keys are made anew from there on.

    Args:
        folder: made where it does not exist.
        every: iterations from one state to the next, at least 1.
    """

    def __init__(self, folder: str | Path, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"every: {every}; at least 1 iteration is needed")
        self.folder = Path(folder)
        self.every = every
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def file(self) -> Path:
        """Of the newest state."""
        return self.folder / "state.pt"

    def due(self, iteration: int) -> bool:
        """Whether the state before an iteration is kept."""
        return iteration > 0 and iteration % self.every == 0

    def save(self, state: dict[str, Any], run: dict[str, Any]) -> None:
        """Replace the state. ``run`` says what it is the state of."""
        self._write(self.file, {"version": VERSION, "run": run, "state": state})

    def load(self, run: dict[str, Any]) -> dict[str, Any] | None:
        """The newest state; None where there is none yet.

        Raises:
            ValueError: the file is not a checkpoint, or one of another run; the message says what differs.
        """
        if not self.file.is_file():
            return None
        try:
            found = torch.load(self.file, weights_only=True)
            version, kept = found["version"], found["run"]
        except Exception as error:
            raise ValueError(f"checkpoint: {self.file} cannot be read ({error})") from error
        if version != VERSION:
            raise ValueError(f"checkpoint: {self.file} has version {version}, known is {VERSION}")
        other = [
            f"{key} {kept.get(key)!r}, not {run.get(key)!r}" for key in {**kept, **run} if not _same(kept, run, key)
        ]
        if other:
            raise ValueError(
                f"checkpoint: {self.file} is of another run: {'; '.join(other)}; run with these settings, "
                "or give another folder"
            )
        return found["state"]

    def keep(self, index: int, latents: Tensor) -> None:
        """Keep a finished block."""
        self._write(self._block(index), {"index": index, "latents": latents.cpu()})

    def block(self, index: int) -> Tensor:
        """A finished block, fp32 [1, C, F, H, W] on the CPU."""
        return torch.load(self._block(index), weights_only=True)["latents"]

    def _block(self, index: int) -> Path:
        return self.folder / f"block{index:06d}.pt"

    def _write(self, path: Path, value: dict[str, Any]) -> None:
        part = path.with_suffix(".part")
        with open(part, "wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)  # a state must not be there before the blocks that it counts
        finally:
            os.close(folder)


def _same(a: dict[str, Any], b: dict[str, Any], key: str) -> bool:
    return key in a and key in b and bool(a[key] == b[key])
