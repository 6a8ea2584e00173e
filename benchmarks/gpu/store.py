"""Results on disk: one JSON file per item, so that a run can stop anywhere and go on later."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vdit_fast import report

KIND, VERSION = "vdit_fast.gpu_item", 1
STATUS = ("ok", "failed", "skipped")
FIELDS: Mapping[str, type | tuple[type, ...]] = {
    "kind": str,
    "version": int,
    "item": str,
    "section": str,
    "status": str,
    "reason": (str, type(None)),
    "identity": dict,
    "spec": dict,
    "result": (dict, type(None)),
    "clocks": dict,
    "seconds": (int, float),
    "finished": str,
}


class Store:
    """The folder of one suite run."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder, self.identity = folder, dict(identity)
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, item: str) -> Path:
        return self.folder / "items" / (re.sub(r"[^A-Za-z0-9_.-]+", "_", item) + ".json")

    def write(
        self,
        item: str,
        section: str,
        status: str,
        *,
        reason: str | None = None,
        spec: Mapping[str, Any] | None = None,
        result: Mapping[str, Any] | None = None,
        clocks: Mapping[str, Any] | None = None,
        seconds: float = 0.0,
    ) -> dict[str, Any]:
        """Store the outcome of an item; a ``reason`` says why it is not ok."""
        document = {
            "kind": KIND,
            "version": VERSION,
            "item": item,
            "section": section,
            "status": status,
            "reason": reason,
            "identity": self.identity,
            "spec": dict(spec or {}),
            "result": None if result is None else dict(result),
            "clocks": dict(clocks or {}),
            "seconds": round(seconds, 3),
            "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }
        document = report.json_safe(document)
        check(document)
        report.write_json(self.path(item), document)
        return document

    def done(self, item: str, spec: Mapping[str, Any] | None = None, *, retry_failed: bool = False) -> bool:
        """Is there a result of this very item, by this code, on this GPU? A skipped item is not done."""
        path = self.path(item)
        if not path.is_file():
            return False
        try:
            document = report.read_json(path)
            check(document)
        except ValueError:
            return False  # cut off while it was written
        wanted = ("ok",) if retry_failed else ("ok", "failed")
        same = document["identity"] == self.identity and document["spec"] == report.json_safe(dict(spec or {}))
        return same and document["status"] in wanted


def check(document: Any) -> None:
    """Raises ValueError naming what is wrong with an item's document."""
    if not isinstance(document, dict) or document.get("kind") != KIND:
        raise ValueError(f"not a {KIND} document")
    for name, types in FIELDS.items():
        if name not in document or not isinstance(document[name], types):
            raise ValueError(f"{document.get('item')}: {name} is {document.get(name)!r}")
    if document["version"] != VERSION:
        raise ValueError(f"{document['item']}: version {document['version']}, this code reads {VERSION}")
    if document["status"] not in STATUS:
        raise ValueError(f"{document['item']}: status {document['status']!r} is none of {', '.join(STATUS)}")
    if document["status"] != "ok" and not document["reason"]:
        raise ValueError(f"{document['item']}: {document['status']} without a reason")
    if document["status"] == "ok" and document["result"] is None:
        raise ValueError(f"{document['item']}: ok without a result")


def load(folder: Path) -> list[dict[str, Any]]:
    """Every item of a folder, in the order they finished."""
    documents = []
    for path in sorted((folder / "items").glob("*.json")):
        document = report.read_json(path)
        check(document)
        documents.append(document)
    return sorted(documents, key=lambda d: d["finished"])
