"""What sparse attention can gain in a model: one dense run, measured; the core of ``vdit-fast profile``."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from vdit_fast.accelerate import accelerate
from vdit_fast.cli.mass import DENSITIES, label
from vdit_fast.cli.probing import Look, Notes, Probe
from vdit_fast.config import Config
from vdit_fast.models.ledger import Span, stamp
from vdit_fast.planners import Planner

KIND = "vdit_fast.profile"
WORTH = 1.05
"""An expected speed-up below this is none."""
ENOUGH = 0.9
"""Share of the attention mass below which a clip usually changes visibly."""


class _Forwards:
    """Seconds and number of a transformer's forwards."""

    def __init__(self) -> None:
        self.span = Span()
        self.count = 0
        self.device = torch.device("cpu")
        self._begin: Any = None

    def before(self, module: torch.nn.Module, args: Any) -> None:
        parameter = next(module.parameters(), None)
        self.device = parameter.device if parameter is not None else self.device
        self._begin = stamp(self.device)

    def after(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        self.span.add(self._begin, stamp(self.device))
        self.count += 1


def profile(
    pipe: Any, run: Callable[[], Any], planner: Planner, *, rows: int, block: int
) -> tuple[dict[str, Any], Notes]:
    """Run a pipeline once, dense, and ask the planner about every attention call.

    Args:
        pipe: what ``accelerate`` takes; ``run`` draws one clip with it.
        rows, block: see ``Probe``.

    Returns:
        the JSON-ready document, and the notes with the plans to draw.

    Raises:
        RuntimeError: no attention call was served.
    """
    probe = Probe(inner=planner, rows=rows, block=block)
    notes, forwards = probe.notes, _Forwards()
    handle = accelerate(pipe, Config(attention=probe))
    hooks = []
    try:
        for module in handle.modules:
            hooks.append(module.register_forward_pre_hook(forwards.before, prepend=True))
            hooks.append(module.register_forward_hook(forwards.after))
        run()
        stats = handle.stats()
        tokens = _tokens(handle)
    finally:
        for hook in hooks:
            hook.remove()
        handle.remove()
    if not notes.calls:
        raise RuntimeError("no attention call was served: nothing can be said about this run")
    observing = notes.observing.seconds
    asked = sum(layer["plan_seconds"] for layer in stats["layers"]) + observing
    dense = sum(layer["attention_seconds"] for layer in stats["layers"]) - observing
    forward = forwards.span.seconds - asked
    cost = _cost(notes, dense / notes.calls, dense / forward)
    heads = _heads(notes.looks)
    document = {
        "kind": KIND,
        "version": 1,
        "planner": planner.to_dict(),
        "tokens": tokens,
        "steps": stats["steps"],
        "forwards": forwards.count,
        "calls": notes.calls,
        "sparse_calls": notes.sparse,
        "dense_reasons": notes.reasons,
        "corrected": notes.corrected,
        "forward_seconds": forward,
        "attention_seconds": dense,
        "cost": cost,
        "densities": list(DENSITIES),
        "block": block,
        "rows": rows,
        "heads": heads,
        "curves": _curves(notes.looks, block, planner.name),
        "looks": [asdict(look) for look in notes.looks],
    }
    document["verdict"], document["reasons"] = verdict(document)
    return document, notes


def _tokens(handle: Any) -> dict[str, Any]:
    """Grid and text of the last forward."""
    forward = handle.roots[0].session.forward
    geometry = forward.geometry if forward is not None else None
    if geometry is None:
        return {"grid": None, "text": 0, "text_first": False, "video": 0}
    return {
        "grid": list(geometry.grid),
        "text": (geometry.text or 0) + geometry.history,
        "text_first": geometry.text_first,
        "video": geometry.n_video,
    }


def _cost(notes: Notes, dense_call: float, share: float) -> dict[str, Any]:
    """The measured numbers of the model 1 / (1 - a + a (1 - s + s (d / e + p))), and what it expects."""
    found: dict[str, Any] = {
        "attention_share": share,
        "limit": 1 / (1 - share),
        "sparse_share": notes.sparse / notes.calls,
        "density": None,
        "efficiency": None,
        "overhead": None,
        "sparse_call_speedup": None,
        "sparse_step_speedup": None,
        "speedup": 1.0,
    }
    if not notes.timings:
        return found
    density = statistics.fmean(t.density for t in notes.timings)
    efficiency = statistics.median(t.dense * t.density / t.sparse for t in notes.timings)
    overhead = (notes.planning.seconds + notes.observing.seconds) / (notes.planned * dense_call)
    call = density / efficiency + overhead
    part = found["sparse_share"]
    return found | {
        "density": density,
        "efficiency": efficiency,
        "overhead": overhead,
        "sparse_call_speedup": 1 / call,
        "sparse_step_speedup": 1 / (1 - share + share * call),
        "speedup": 1 / (1 - share + share * (1 - part + part * call)),
    }


def _heads(looks: Sequence[Look]) -> list[dict[str, Any]]:
    """One row per layer and head, means over the steps."""
    groups: dict[tuple[int, int], list[Look]] = {}
    for look in looks:
        groups.setdefault((look.layer, look.head), []).append(look)
    rows = []
    for (layer, head), mine in sorted(groups.items()):
        frames = statistics.fmean(look.near_frames for look in mine)
        places = statistics.fmean(look.near_places for look in mine)
        rows.append(
            {
                "layer": layer,
                "head": head,
                "character": label(frames, places),
                "near_frames": frames,
                "near_places": places,
                "text": statistics.fmean(look.text for look in mine),
                "best": _columns([look.best for look in mine]),
                "blocks": _columns([look.blocks for look in mine]),
                "density": _mean([look.density for look in mine]),
                "recall": _mean([look.recall for look in mine]),
                "reachable": _mean([look.reachable for look in mine]),
            }
        )
    return rows


def _curves(looks: Sequence[Look], block: int, name: str) -> dict[str, Any]:
    """Recall over density: the best selection (mean, and the hardest head's), the best blocks, and the planner."""
    if not looks:
        return {}
    hardest = min((row for row in _heads(looks)), key=lambda row: row["best"][DENSITIES.index(0.25)])
    at = list(DENSITIES)
    found: dict[str, Any] = {
        "oracle": {"density": at, "recall": _columns([look.best for look in looks])},
        f"oracle, hardest head ({hardest['layer']}.{hardest['head']})": {"density": at, "recall": hardest["best"]},
        f"best blocks of {block} × {block}": {"density": at, "recall": _columns([look.blocks for look in looks])},
    }
    density, recall = _mean([look.density for look in looks]), _mean([look.recall for look in looks])
    if density is not None and recall is not None:
        found[name] = {"density": [density], "recall": [recall]}
    return found


def verdict(document: dict[str, Any]) -> tuple[str, list[str]]:
    """One line, and the reasons behind it: whether sparse attention will help in this run."""
    cost, name = document["cost"], document["planner"]["method"]
    against, warnings = [], []
    share, limit = cost["attention_share"], cost["limit"]
    if not document["sparse_calls"]:
        reasons = sorted(document["dense_reasons"].items(), key=lambda item: -item[1])[:2]
        against.append(f"{name} keeps every call dense: " + "; ".join(reason for reason, _ in reasons))
    elif cost["speedup"] < WORTH:
        if cost["overhead"] + cost["density"] / cost["efficiency"] >= 1:
            against.append(
                f"a sparse call is slower than a dense one: planning costs {cost['overhead']:.0%} of dense attention, "
                f"reading {cost['density']:.0%} of the pairs costs {cost['density'] / cost['efficiency']:.0%}"
            )
        elif cost["sparse_step_speedup"] >= WORTH:
            against.append(f"only {cost['sparse_share']:.0%} of the calls are sparse, in {document['steps']} steps")
    if limit < 1.15:  # after the reasons that do not hang on the clock
        against.append(f"attention is {share:.0%} of a forward: no method can give more than {limit:.2f}x")
    if against or cost["speedup"] < WORTH:
        extra = against or [f"{document['tokens']['video']:,} tokens leave too little to gain"]
        return f"this will not help here: {'; '.join(extra)}", extra
    recall, reachable = (_mean([row[key] for row in document["heads"]]) for key in ("recall", "reachable"))
    if recall is not None and reachable is not None and recall < ENOUGH:
        if document["corrected"]:
            warnings.append(
                f"{name} reads {recall:.0%} of the attention mass and makes up for the rest: judge it by its clips"
            )
        elif reachable < ENOUGH:
            warnings.append(
                f"attention is spread out: the best selection of as many pairs keeps {reachable:.0%} of its mass "
                f"({name}: {recall:.0%}); expect visible changes, or raise the density"
            )
        else:
            warnings.append(
                f"{name} keeps {recall:.0%} of the attention mass where {reachable:.0%} are possible: "
                "another method or finer blocks may be better"
            )
    step = cost["sparse_step_speedup"]
    line = f"expect {cost['speedup']:.2f}x with {name} (sparse steps {step:.2f}x, limit {limit:.2f}x)"
    return line + (f"; but {warnings[0]}" if warnings else ""), warnings


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known else None


def _columns(rows: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(column) for column in zip(*rows, strict=True)]
