"""The state of a running pipeline on disk, whole or not at all, so that a run can go on with the same bits."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdit_fast.parallel.identity import other_weights
from vdit_fast.parallel.nests import mapped

__all__ = ["Checkpoint"]

VERSION = 2


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
        self.run: dict[str, Any] = {}
        """What it is the checkpoint of, from ``begin`` on."""
        self._id: str | None = None

    @property
    def file(self) -> Path:
        """Of the newest state."""
        return self.folder / "state.pt"

    def due(self, iteration: int) -> bool:
        """Whether the state before an iteration is kept."""
        return iteration > 0 and iteration % self.every == 0

    def begin(self, run: dict[str, Any], resume: bool) -> dict[str, Any] | None:
        """A run begins; ``run`` says which. ``weights`` in it, digests by name, must agree where both have a name.

        Returns:
            the newest state if the run goes on from it, else None.

        Raises:
            ValueError: the folder has a state of another run, the message says what differs, or a file that is none.
        """
        found = self._read()
        if found is None:
            self.run, self._id = run, uuid.uuid4().hex
            return None
        kept = found["run"]
        keys = [key for key in {**kept, **run} if key != "weights"]
        other = [f"{key} {kept.get(key)!r}, not {run.get(key)!r}" for key in keys if not _same(kept, run, key)]
        weights = other_weights(kept["weights"], run["weights"])
        if weights is not None:
            other.append(f"weights differ in {weights}")
        if other:
            raise ValueError(
                f"checkpoint: {self.file} is of another run: {'; '.join(other)}; run with these settings, "
                "or give another folder"
            )
        self.run, self._id = {**run, "weights": {**kept["weights"], **run["weights"]}}, found["id"]
        return found["state"] if resume else None

    def save(self, state: dict[str, Any]) -> None:
        """Replace the state of the run that has begun."""
        self._write(
            self.file, {"version": VERSION, "id": self._id, "run": self.run, "state": mapped(state, Tensor.cpu)}
        )

    def _read(self) -> dict[str, Any] | None:
        if not self.file.is_file():
            return None
        try:
            found: dict[str, Any] = torch.load(self.file, map_location="cpu", weights_only=True)
            version = found["version"]
        except Exception as error:
            raise ValueError(f"checkpoint: {self.file} cannot be read ({error})") from error
        if version != VERSION:
            raise ValueError(f"checkpoint: {self.file} has version {version}, known is {VERSION}")
        return found

    def keep(self, index: int, latents: Tensor) -> None:
        """Keep a finished block."""
        self._write(self._block(index), {"index": index, "id": self._id, "latents": latents.cpu()})

    def block(self, index: int) -> Tensor:
        """A finished block, fp32 [1, C, F, H, W] on the CPU.

        Raises:
            ValueError: the file is of a run before the one that has the state.
        """
        found = torch.load(self._block(index), map_location="cpu", weights_only=True)
        if self._id is None:
            state = self._read()
            self._id = state["id"] if state is not None else None
        if self._id is not None and found["id"] != self._id:
            raise ValueError(f"checkpoint: {self._block(index)} is of an earlier run; this one has not finished it")
        return found["latents"]

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
