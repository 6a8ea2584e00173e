"""What a rank of a pipeline did and when, as a file: the measured side of the pipeline simulator.

One JSON document per rank:

``format``, ``version``
    "vdit_fast.parallel.trace", 1.
``rank``, ``ranks``, ``layers``
    this rank, their number, and how many blocks of the transformer it has.
``schedule``
    ``steps``, ``blocks`` (null: without end), ``num_per_block``, ``num_cat``, ``branches`` and the iteration ``first``
    that the run began with (0, or where a checkpoint was).
``hop_bytes``, ``result_bytes``
    bytes of a message to the next stage; of the first and of any other block's result.
``sent``, ``received``
    [messages, bytes] of this rank, setup not included.
``began``, ``ended``
    of the whole run, seconds of ``time.monotonic``, which processes of one Linux machine share.
``events``
    [kind, iteration, block, begin, end] in order, seconds after ``began``; of a video without end the last 10,000.
    Kinds: ``receive`` (waits for the input of a
    stage), ``unpack``, ``compute`` (the rank's blocks, and the head on the last one), ``pack``, ``send`` (waits until
    the message may be handed over: at most two are under way), ``result`` (rank 0 waits for what the last rank made),
    ``step`` (scheduler), ``save`` (a checkpoint).
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vdit_fast.parallel.schedule import Item

__all__ = ["KINDS", "Trace", "read_traces"]

KINDS = ("receive", "unpack", "compute", "pack", "send", "result", "step", "save")
ENDLESS = 10_000
"""Events that are kept of a video without end."""

FORMAT, VERSION = "vdit_fast.parallel.trace", 1


class Trace:
    """Events of one rank's run."""

    def __init__(self) -> None:
        self.began = self.ended = time.monotonic()
        self.events: deque[tuple[str, int, int, float, float]] = deque()
        self._seconds = dict.fromkeys(KINDS, 0.0)

    @contextmanager
    def during(self, kind: str, item: Item) -> Iterator[None]:
        begin = time.monotonic()
        try:
            yield
        finally:
            end = time.monotonic()
            self.events.append((kind, item.iteration, item.block, begin - self.began, end - self.began))
            self._seconds[kind] += end - begin

    def bound(self, events: int = ENDLESS) -> None:
        """Keep the last events only, as they come without end."""
        self.events = deque(self.events, events)

    def seconds(self, kind: str) -> float:
        """Of all events of a kind, also those that were not kept."""
        return self._seconds[kind]

    def finish(self) -> None:
        self.ended = time.monotonic()

    def write(self, folder: str | Path, facts: dict[str, Any]) -> Path:
        """Write ``trace.rank<R>.json``; ``facts`` are the keys that are not about time."""
        document = {"format": FORMAT, "version": VERSION, **facts, "began": self.began, "ended": self.ended}
        document["events"] = [[*event[:3], round(event[3], 7), round(event[4], 7)] for event in self.events]
        path = Path(folder) / f"trace.rank{facts['rank']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(document))
        os.replace(part, path)
        return path


def read_traces(folder: str | Path) -> list[dict[str, Any]]:
    """The documents of all ranks of a run, by rank.

    Raises:
        FileNotFoundError: there is none, or one of a rank is missing.
        ValueError: a file is no trace of this version.
    """
    documents = []
    for path in Path(folder).glob("trace.rank*.json"):
        document = json.loads(path.read_text())
        if document.get("format") != FORMAT or document.get("version") != VERSION:
            raise ValueError(f"{path}: not a pipeline trace of version {VERSION}")
        documents.append(document)
    documents.sort(key=lambda document: document["rank"])
    ranks = documents[0]["ranks"] if documents else 1
    missing = set(range(ranks)) - {document["rank"] for document in documents}
    if missing:
        raise FileNotFoundError(f"{folder}: no trace of rank {min(missing)} of {ranks}")
    return documents
