"""Numbers and plain text about what an accelerated model did."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from vdit_fast.models.extra_keys import ExtraKeys
from vdit_fast.models.memory import Memory
from vdit_fast.models.references import References
from vdit_fast.models.row_subset import RowSubset
from vdit_fast.parallel.ulysses import Ulysses

if TYPE_CHECKING:
    from vdit_fast.handle import Handle

__all__ = ["collect_stats", "report_text"]


def collect_stats(handle: Handle) -> dict[str, Any]:
    """See ``Handle.stats``."""
    layers = []
    steps_per_generation: Counter[int] = Counter()
    seen: set[tuple[int, int]] = set()
    for root in handle.roots:
        seen |= root.session.steps
        for ledger in root.session.layers:
            by_step = ledger.density()
            last = max((step for step in by_step if step >= 0), default=-1)
            layers.append(
                {
                    "expert": root.session.expert,
                    "layer": ledger.layer,
                    "name": ledger.name,
                    "family": root.adapter.family,
                    "calls": ledger.calls,
                    "sparse_calls": ledger.sparse_calls,
                    "density": [by_step.get(step) for step in range(last + 1)],
                    "mean_density": ledger.mean_density(),
                    "head_density": ledger.head_density(),
                    "plan_seconds": ledger.plan_time.seconds,
                    "attention_seconds": ledger.attention_time.seconds,
                    "dense": dict(ledger.dense),
                    "unasked": dict(ledger.unasked),
                    "fallbacks": dict(ledger.fallbacks),
                }
            )
    for generation, _ in seen:
        steps_per_generation[generation] += 1
    skipped: dict[str, list[str]] = {}
    for item in handle.skipped:
        skipped.setdefault(item.reason, []).append(item.name)
    return {
        "config": handle.config.to_dict(),
        "digest": handle.config.digest(),
        "generations": len(steps_per_generation),
        "steps": max(steps_per_generation.values(), default=0),
        "forwards": sum(root.session.forwards for root in handle.roots),
        "host_reads": handle.host_reads,
        "cache": _cache(handle),
        "subset": _subset(handle),
        "fused": _fused(handle),
        "text_kv": _text_kv(handle),
        "positions": _positions(handle),
        "regions": _regions(handle),
        "streaming": _streaming(handle),
        "memory": _memory(handle),
        "beside": _beside(handle),
        "hooks": _hooks(handle),
        "linear": _linear(handle),
        "parallel": _parallel(handle),
        "layers": layers,
        "skipped": skipped,
    }


def _cache(handle: Handle) -> dict[str, Any] | None:
    if handle.config.cache is None:
        return None
    full: Counter[str] = Counter()
    forecast: Counter[int] = Counter()
    hooked: Counter[str] = Counter()
    caches = [root.session.cache for root in handle.roots]
    for cache in caches:
        full.update(cache.full)
        forecast.update(cache.forecasts)
        hooked.update(cache.hooked)
    return {
        "granularity": handle.config.cache.granularity,
        "hooked": dict(hooked),
        "full": dict(full),
        "forecast": dict(sorted(forecast.items())),
        "blocks_run": sum(cache.blocks_run for cache in caches),
        "blocks_left_out": sum(cache.blocks_left_out for cache in caches),
        "nbytes": sum(cache.nbytes for cache in caches),
        "host_reads": sum(cache.host_reads for cache in caches),
    }


def _subset(handle: Handle) -> dict[str, Any] | None:
    running = [item for root in handle.roots if isinstance(item := root.session.around.get("subset"), RowSubset)]
    if not running:
        return None
    whole: Counter[str] = Counter()
    partial: Counter[int] = Counter()
    for item in running:
        whole.update(item.whole)
        partial.update(item.partial)
    return {
        "partial": dict(sorted(partial.items())),
        "whole": dict(whole),
        "computed": sum(item.rows_computed for item in running),
        "left": sum(item.rows_left for item in running),
        "nbytes": sum(item.nbytes for item in running),
    }


def _fused(handle: Handle) -> dict[str, dict[str, int]]:
    blocks: Counter[str] = Counter()
    left: Counter[str] = Counter()
    unfused: Counter[str] = Counter()
    for root in handle.roots:
        blocks.update(root.session.fused.values())
        left.update(root.session.left)
        unfused.update(root.session.unfused)
    return {"blocks": dict(blocks), "left": dict(left), "unfused": dict(unfused)}


def _text_kv(handle: Handle) -> dict[str, Any] | None:
    memories = [root.session.text for root in handle.roots if root.session.text is not None]
    if not memories:
        return None
    refused: Counter[str] = Counter()
    for memory in memories:
        refused.update(memory.refused)
    numbers = {name: sum(getattr(memory, name) for memory in memories) for name in ("computed", "reused", "nbytes")}
    return numbers | {"refused": dict(refused)}


def _positions(handle: Handle) -> dict[int, int] | None:
    if all(root.session.positions is None for root in handle.roots):
        return None
    forwards: Counter[int] = Counter()
    for root in handle.roots:
        forwards.update(root.session.repositioned)
    return dict(sorted(forwards.items()))


def _regions(handle: Handle) -> dict[str, dict[int, int]] | None:
    runs = [root.session.regions for root in handle.roots if root.session.regions is not None]
    if not runs:
        return None
    masked: Counter[int] = Counter()
    prompted: Counter[int] = Counter()
    for run in runs:
        masked.update(run.masked)
        prompted.update(run.prompted)
    return {"masked": dict(sorted(masked.items())), "prompted": dict(sorted(prompted.items()))}


def _streaming(handle: Handle) -> dict[str, int] | None:
    streamed: Counter[str] = Counter()
    for root in handle.roots:
        streamed.update(root.session.streamed)
    return {name: streamed[name] for name in ("frames", "chunks", "denoise", "write", "nbytes")} if streamed else None


def _memory(handle: Handle) -> dict[str, Any] | None:
    found = [item for root in handle.roots if isinstance(item := root.session.around.get("memory"), Memory)]
    if not found:
        return None
    tokens = found[0].tokens
    return {"tokens": tokens} | {
        name: sum(getattr(memory, name) for memory in found) for name in ("computed", "shared", "nbytes")
    }


def _beside(handle: Handle) -> dict[str, Any]:
    references, feed, captured = 0, None, 0
    for root in handle.roots:
        found = root.session.around.get("references")
        references = found.rows.shape[1] if isinstance(found, References) else references
        keys = root.session.around_heads.get("segments")
        if isinstance(keys, ExtraKeys):
            feed = keys.feed.mode if keys.feed is not None else feed
            captured += keys.captured.nbytes if keys.captured is not None else 0
    return {"references": references, "feed": feed, "captured_nbytes": captured}


def _hooks(handle: Handle) -> dict[str, int]:
    calls: Counter[str] = Counter()
    for root in handle.roots:
        calls.update(root.session.hooks.calls)
    return dict(calls)


def _linear(handle: Handle) -> dict[str, list[int]] | None:
    sessions = [root.session for root in handle.roots]
    found = {session.expert: [ledger.layer for ledger in session.layers if ledger.linear] for session in sessions}
    return found if handle.config.linear is not None or any(found.values()) else None


def _parallel(handle: Handle) -> dict[str, Any] | None:
    found: dict[str, Any] = {}
    for root in handle.roots:
        ulysses, rows = root.session.around_heads.get("sequence"), root.session.around.get("sequence")
        if isinstance(ulysses, Ulysses):
            part = found.setdefault("sequence", {"rank": ulysses.rank, "ranks": ulysses.ranks, "calls": 0, "bytes": 0})
            part["calls"] += ulysses.calls
            part["bytes"] += ulysses.bytes_sent + getattr(rows, "bytes_sent", 0)
        if root.guidance is not None:
            guided = root.guidance
            sent = {"exchanges": guided.exchanges, "bytes": guided.bytes_sent}
            found["guidance"] = {"rank": guided.rank, "ranks": guided.ranks, "split": guided.split, **sent}
    return found or None


def _rows(table: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = []
    for row in table:
        numbers = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  " + "  ".join([row[0].ljust(widths[0]), *numbers]))
    return lines


def _reasons(title: str, reasons: Counter[str]) -> list[str]:
    if not reasons:
        return []
    return [title] + [f"  {count:>8,} x {reason}" for reason, count in reasons.most_common()]


def report_text(handle: Handle) -> str:
    """See ``Handle.report``."""
    stats = collect_stats(handle)
    method = handle.config.attention.name if handle.config.attention is not None else "dense"
    state = "active" if handle.active else "removed"
    lines = [
        f"vdit_fast: attention {method}, config {stats['digest']}, {state}",
        f"{stats['generations']} generations, up to {stats['steps']} steps, {stats['forwards']:,} forwards, "
        f"{stats['host_reads']} host reads of the timestep",
        "",
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for layer in stats["layers"]:
        groups.setdefault((layer["expert"], layer["family"]), []).append(layer)
    header = ("transformer (family)", "layers", "calls", "sparse", "density", "plan", "attention")
    table: list[tuple[str, ...]] = [header]
    for (expert, family), layers in groups.items():
        calls = sum(layer["calls"] for layer in layers)
        measured = [layer for layer in layers if layer["mean_density"] is not None]
        total = sum(layer["mean_density"] * layer["calls"] for layer in measured)
        softmax_calls = sum(layer["calls"] for layer in measured)
        table.append(
            (
                f"{expert} ({family})",
                f"{len(layers):,}",
                f"{calls:,}",
                f"{sum(layer['sparse_calls'] for layer in layers):,}",
                f"{total / softmax_calls:.1%}" if softmax_calls else "-",
                f"{sum(layer['plan_seconds'] for layer in layers):.3f} s",
                f"{sum(layer['attention_seconds'] for layer in layers):.3f} s",
            )
        )
    lines += _rows(table)
    for expert, linear in (stats["linear"] or {}).items():
        served = sum(layer["expert"] == expert for layer in stats["layers"])
        where = f": {', '.join(map(str, linear))}" if linear else ""
        lines.append(f"linear attention: {len(linear):,} of {served:,} layers of {expert}{where}")
    dense: Counter[str] = Counter()
    unasked: Counter[str] = Counter()
    fallbacks: Counter[str] = Counter()
    for layer in stats["layers"]:
        dense.update(layer["dense"])
        unasked.update(layer["unasked"])
        fallbacks.update(layer["fallbacks"])
    if stats["cache"] is not None and handle.config.cache is not None:
        cache = stats["cache"]
        computed, forecast = sum(cache["full"].values()), sum(cache["forecast"].values())
        around = " and ".join(f"{count:,} {what}" for what, count in cache["hooked"].items()) or "nothing"
        lines.append(
            f"cache {handle.config.cache.name} by {cache['granularity']} around {around}: {forecast:,} of "
            f"{computed + forecast:,} forwards forecast, {cache['nbytes'] / 2**20:,.1f} MiB held"
        )
        if cache["granularity"] != "model":
            blocks = cache["blocks_run"] + cache["blocks_left_out"]
            lines.append(f"blocks left out: {cache['blocks_left_out']:,} of {blocks:,} calls")
        if cache["host_reads"]:
            lines.append(f"changes read on the host: {cache['host_reads']:,}")
        lines += _reasons("forwards computed:", Counter(cache["full"]))
    if stats["subset"] is not None and handle.config.subset is not None:
        rows = stats["subset"]
        some, every = sum(rows["partial"].values()), sum(rows["whole"].values())
        lines.append(
            f"subset {handle.config.subset.name}: {some:,} of {some + every:,} forwards on some tokens, "
            f"{rows['left']:,} of {rows['left'] + rows['computed']:,} rows left out, "
            f"{rows['nbytes'] / 2**20:,.1f} MiB of keys and values held"
        )
        lines += _reasons("forwards on all tokens:", Counter(rows["whole"]))
    if handle.config.fuse != "off" and stats["fused"]["blocks"]:
        blocks = ", ".join(f"{count:,} {kind}" for kind, count in stats["fused"]["blocks"].items())
        lines.append(f"blocks with a fused forward ({handle.config.fuse} rounding): {blocks}")
    if handle.config.fuse != "off":
        lines += _reasons("blocks left with their own forward:", Counter(stats["fused"]["left"]))
    lines += _reasons("blocks run unfused (times):", Counter(stats["fused"]["unfused"]))
    if stats["text_kv"] is not None:
        text = stats["text_kv"]
        lines.append(
            f"text keys and values: {text['reused']:,} of {text['reused'] + text['computed']:,} calls reused, "
            f"{text['nbytes'] / 2**20:,.1f} MiB held"
        )
        lines += _reasons("text keys and values computed and not kept:", Counter(text["refused"]))
    if stats["positions"] is not None:
        lines.append(f"positions: rotary tables exchanged in {sum(stats['positions'].values()):,} forwards")
    if stats["regions"] is not None:
        masked, prompted = (sum(stats["regions"][what].values()) for what in ("masked", "prompted"))
        lines.append(f"regions: self-attention masked in {masked:,} forwards, two prompts in {prompted:,}")
    if stats["streaming"] is not None:
        made = stats["streaming"]
        lines.append(
            f"streaming: {made['frames']:,} frames in {made['chunks']:,} chunks, {made['denoise']:,} forwards that "
            f"denoised and {made['write']:,} that wrote keys and values, {made['nbytes'] / 2**20:,.1f} MiB of them"
        )
    if stats["memory"] is not None:
        memory = stats["memory"]
        rows = "rows" if memory["tokens"] is None else f"{memory['tokens']:,} rows"
        lines.append(
            f"memory: {rows} in every block, {memory['shared']:,} of {memory['shared'] + memory['computed']:,} layers' "
            f"keys shared with another guidance branch, {memory['nbytes'] / 2**20:,.1f} MiB held"
        )
    beside = stats["beside"]
    if beside["references"]:
        lines.append(f"references: {beside['references']:,} rows behind the text")
    if beside["feed"]:
        lines.append(f"feed: keys and values of another transformer, mode {beside['feed']}")
    if beside["captured_nbytes"]:
        lines.append(f"capture: {beside['captured_nbytes'] / 2**20:,.1f} MiB of keys and values held for another model")
    if stats["hooks"]:
        calls = ", ".join(f"{count:,} at {where}" for where, count in stats["hooks"].items())
        lines.append(f"hooks: called {calls}")
    for what, part in (stats["parallel"] or {}).items():
        times = f"{part['calls']:,} attention calls" if what == "sequence" else f"{part['exchanges']:,} exchanges"
        lines.append(
            f"{what} parallelism: rank {part['rank']} of {part['ranks']}, {times}, "
            f"{part['bytes'] / 2**20:,.1f} MiB sent"
        )
    lines += _reasons("kept dense by the planner (calls):", dense)
    lines += _reasons(f"without asking {method}, which keys are read is given (calls):", unasked)
    lines += _reasons("fallbacks (calls that could not be served as configured):", fallbacks)
    for text, count in handle.setting_notes().items():
        lines.append(f"note: {count} layers: {text}")
    if stats["skipped"]:
        lines.append("left alone (modules):")
        for reason, names in sorted(stats["skipped"].items(), key=lambda item: -len(item[1])):
            lines.append(f"  {len(names):>8,} x {reason}  e.g. {names[0]}")
    return "\n".join(lines)
