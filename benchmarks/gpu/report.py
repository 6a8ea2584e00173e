"""Tables and plots of a suite run, from its JSON alone.

python -m benchmarks.gpu.report DIR
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vdit_fast import report as common
from vdit_fast.report import format_bytes, format_percent, format_ratio, table

from .store import load

OWN, OWN_DENSE = "vdit_fast", "vdit_fast dense"
GROUPS = (
    ("Dense forward", lambda s: s["kind"] == "dense" and not s["backward"]),
    ("Block-sparse forward", lambda s: s["kind"] == "blocks" and not s["backward"]),
    ("Clusters of uneven sizes", lambda s: s["kind"] == "clusters"),
    ("Stand-ins for skipped blocks", lambda s: s["kind"] == "stand-ins"),
    ("Backward", lambda s: s["backward"]),
)
Document = Mapping[str, Any]


def timings(documents: Iterable[Document]) -> list[Document]:
    """Timed problems with numbers in the order of the suite."""
    from .problems import problems

    place = {p.name: i for small in (False, True) for i, p in enumerate(problems(small))}
    found = [d for d in documents if d["section"] == "timings" and d["result"] is not None]
    return sorted(found, key=lambda d: place.get(d["spec"]["name"], len(place)))


def row(document: Document, peers: Sequence[str]) -> list[Any]:
    """One line of a table of timings. A wrong result has no speed."""
    spec, result = document["spec"], document["result"]
    own = result["contenders"][OWN]
    label = f"{spec['heads']} x {spec['length']:,} x {spec['dim']}"
    if spec["block"]:
        label += f", blocks of {spec['block']}"
    if OWN in result["wrong"]:
        error = own["error"]
        return [label, format_percent(result["density"]), "WRONG", *[None] * (4 + len(peers)), _error(error), None]
    dense = result["contenders"].get(OWN_DENSE)
    of_dense = own["executed_tflops"] / dense["executed_tflops"] if dense else None
    goal = result["goal_tflops"]
    return [
        label,
        format_percent(result["density"]),
        f"{own['ms']:.3f} ({own['ms_min']:.3f}-{own['ms_max']:.3f})",
        _rate(own["executed_tflops"]),
        _rate(own["dense_tflops"]),
        f"{goal:g}" if goal else None,
        format_percent(of_dense, 0),
        *(_versus(result, name) for name in peers),
        _error(own["error"]),
        _mhz(result["clocks_under_load"]),
    ]


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.3g}"


def _error(value: Any) -> str | None:
    return None if value is None else f"{float(value):.1e}"


def _mhz(clocks: Mapping[str, float] | None) -> str | None:
    return f"{clocks['sm_mhz']:.0f}" if clocks and "sm_mhz" in clocks else None


def _versus(result: Document, name: str) -> str | None:
    if name in result["contenders"]:
        r = result["contenders"][name]["ratio"]
        text = format_ratio(r["median"], r["min"], r["max"])
        return f"{text} (its result is wrong)" if name in result["wrong"] else text
    return None


def group_table(documents: Sequence[Document]) -> str:
    """Timings of one kind, with a column for every peer that ran on any of them."""
    peers = list(dict.fromkeys(n for d in documents for n in d["result"]["contenders"] if n != OWN))
    headings = ["heads x tokens x dim", "density", "ms (min-max)", "executed TFLOP/s", "dense-equivalent", "goal"]
    headings += ["of own dense", *(f"over {n}" for n in peers), "error", "SM MHz"]
    return table([row(d, peers) for d in documents], headings, style="markdown")


def methods_table(documents: Sequence[Document]) -> str:
    """One transformer block with random weights, stock and with each sparse method."""
    headings = ["model", "method", "density", "stock ms", "compiled ms", "own dense ms", "sparse ms (min-max)"]
    headings += ["sparse step over stock", "planning ms per layer", "attention ms per layer"]
    headings += ["clip, with dense steps", "published"]
    rows = []
    for d in documents:
        spec, r = d["spec"], d["result"]
        times = r["contenders"]
        before = (times[name]["ms"] if name in times else None for name in ("stock", "stock, compiled", "dense"))
        own, step = times[spec["method"]], r["sparse_step_speedup"]
        rows.append(
            [
                f"{spec['model']['name']}, {r['tokens']:,} tokens, {r['layers']} layers",
                spec["method"],
                format_percent(r["density"]),
                *(None if ms is None else f"{ms:.1f}" for ms in before),
                f"{own['ms']:.1f} ({own['ms_min']:.1f}-{own['ms_max']:.1f})",
                format_ratio(step["median"], step["min"], step["max"]),
                f"{r['planning_ms_per_layer']:.2f}",
                f"{r['attention_ms_per_layer']:.2f}",
                f"{r['clip_speedup']:.2f}x at {format_percent(spec['dense_share'], 0)} dense steps",
                f"{r['published_speedup']:g}x" if r["published_speedup"] else None,
            ]
        )
    return table(rows, headings, style="markdown")


def fused_table(documents: Sequence[Document]) -> str:
    """The memory-bound operators beside the models' own chains."""
    peers = ("vdit_fast, eager rounding", "torch", "torch.compile")
    headings = ["operator", "model", "shape", "MB", "ms (min-max)", "TB/s", *(f"{name}: ms, ratio" for name in peers)]
    rows = []
    for d in documents:
        spec, r = d["spec"], d["result"]
        own = r["contenders"]["vdit_fast"]
        cells = []
        for name in peers:
            other = r["contenders"].get(name)
            ratio = other["ratio"] if other else None
            cells.append(
                f"{other['ms']:.3f}, {format_ratio(ratio['median'], ratio['min'], ratio['max'])}" if ratio else None
            )
        rows.append(
            [
                spec["operator"],
                spec["model"],
                " x ".join(f"{size:,}" for size in spec["shape"]),
                f"{r['bytes'] / 1e6:,.0f}",
                f"{own['ms']:.3f} ({own['ms_min']:.3f}-{own['ms_max']:.3f})",
                f"{own['tb_per_s']:.2f}",
                *cells,
            ]
        )
    return table(rows, headings, style="markdown")


def peer_notes(documents: Sequence[Document]) -> list[str]:
    """Why peers are missing, once per reason."""
    reasons: Counter[tuple[str, str]] = Counter()
    for d in documents:
        reasons.update(d["result"]["skipped_peers"].items())
    return [f"* {name}: {reason} ({count} of {len(documents)})" for (name, reason), count in sorted(reasons.items())]


def facts(documents: Sequence[Document]) -> str:
    """Where and when."""
    found = next((d["result"] for d in documents if d["section"] == "environment"), None)
    if found is None:
        return "The environment was not recorded."
    smi, git, build = found["nvidia_smi"] or {}, found["git"] or {}, found["build"] or {}
    rows = [
        ("date", found["date"]),
        ("command", found["command"]),
        ("GPU", smi.get("name", "none")),
        ("driver, power limit, highest SM clock", ", ".join(map(str, list(smi.values())[1:])) or None),
        ("torch, CUDA of torch", f"{found['torch']}, {(found['gpu'] or {}).get('cuda')}"),
        ("nvcc, code built for", f"{build.get('cuda')}, {' '.join(build.get('cuda_targets') or [])}"),
        ("cuDNN, Triton, FlashInfer", f"{found['cudnn']}, {found['triton']}, {found['flashinfer']}"),
        ("code", f"{documents[0]['identity']['code']}, commit {git.get('commit')}"),
    ]
    return table(rows, ("", ""), style="markdown")


def summary(documents: Sequence[Document]) -> str:
    """One line per item, with the reason of those that are not ok."""
    rows = []
    for d in documents:
        text = " ".join((d["reason"] or "").split())[:300]
        if d["section"] in ("primitives", "tests") and d["result"]:
            counts = ", ".join(f"{n} {name}" for name, n in sorted(d["result"]["counts"].items()))
            text = f"{counts}{'; ' if text else ''}{text}"
        rows.append((d["item"], d["status"], text, f"{d['seconds']:.0f} s"))
    return table(rows, ("item", "status", "", "took"), style="markdown")


def curves(documents: Sequence[Document]) -> dict[str, dict[str, list[float]]]:
    """Rates and speed-ups over density, a curve per block size of the shapes with at least two densities."""
    found: dict[str, dict[str, list[float]]] = {}
    for d in timings(documents):
        spec, result = d["spec"], d["result"]
        if spec["kind"] != "blocks" or spec["backward"] or OWN in result["wrong"]:
            continue
        name = f"{spec['heads']} x {spec['length']:,}, blocks of {spec['block']}"
        curve = found.setdefault(name, {key: [] for key in ("density", "speedup", "low", "high", "tflops", "dense")})
        own, dense = result["contenders"][OWN], result["contenders"][OWN_DENSE]
        ratios = (dense["ratio"]["median"], dense["ratio"]["min"], dense["ratio"]["max"])
        values = (result["density"], *ratios, own["executed_tflops"], dense["executed_tflops"])
        for key, value in zip(curve, values, strict=True):
            curve[key].append(value)
    return {name: curve for name, curve in found.items() if len(curve["density"]) > 1}


def draw(data: Mapping[str, Mapping[str, list[float]]], folder: Path) -> list[Path]:
    """Speed-up over own dense, and executed TFLOP/s, both over density."""
    from vdit_fast.report.style import MARKERS, SOFT, colour, render

    speed = {name: {key: c[key] for key in ("density", "speedup", "low", "high")} for name, c in data.items()}
    files = [common.speed_curve(speed, folder / "speed.png", title="Speed-up over own dense attention")]

    def picture(figure: Any) -> None:
        axes = figure.subplots()
        for i, (name, c) in enumerate(data.items()):
            points = sorted(zip(c["density"], c["tflops"], c["dense"], strict=True))
            x, y, dense = zip(*points, strict=True)
            axes.plot([100 * v for v in x], y, color=colour(i), marker=MARKERS[i % len(MARKERS)], label=name)
            level = sorted(dense)[len(dense) // 2]
            axes.axhline(level, color=SOFT, linestyle=":", label="dense, same library" if i == 0 else None)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("density, % of the query-key pairs")
        axes.set_ylabel("executed TFLOP/s")
        axes.set_title("Rate of block-sparse attention over density")
        axes.legend()

    return [*files, render("gpu_rate_curve", folder / "rate.png", {"curves": data}, picture, (7, 4.5), replot=False)]


def markdown(documents: Sequence[Document], pictures: Sequence[Path] = ()) -> str:
    """The whole report."""
    parts = ["# GPU suite", facts(documents)]
    codes = {tuple(sorted((k, str(v)) for k, v in d["identity"].items())) for d in documents}
    if len(codes) > 1:
        parts.append(f"**Results of {len(codes)} different builds, GPUs or torch versions are mixed here.**")
    for d in documents:
        if d["section"] == "ceilings" and d["result"]:
            r = d["result"]
            text = f"matrix product {_rate(r['matmul']['tflops'])} TFLOP/s ({r['dtype']}, {r['matmul_size']} squared)"
            parts.append(f"Ceilings measured here: {text}, copy {r['copy']['tb_per_s']:.3g} TB/s.")
    parts.append("`over X` is how many times faster this library is than X: median (least-most) of the rounds' ratios.")
    timed = timings(documents)
    for title, belongs in GROUPS:
        group = [d for d in timed if belongs(d["spec"])]
        if group:
            parts += [f"## {title}", group_table(group), "\n".join(peer_notes(group))]
            memory = [
                f"{d['spec']['name']}: {format_bytes(d['result']['peak_bytes'])}"
                for d in group
                if d["result"]["peak_bytes"] is not None
            ]
            parts += [f"Memory of a call: {', '.join(memory)}."] if memory else []
    operators = [d for d in documents if d["section"] == "fused" and d["result"] is not None]
    if operators:
        parts += ["## Fused operators", "bf16; TB/s of the bytes that must be moved once.", fused_table(operators)]
    blocks = [d for d in documents if d["section"] == "methods" and d["result"] is not None]
    if blocks:
        parts += ["## Transformer blocks", "Random weights of the true shapes: times only, nothing about quality."]
        parts.append(methods_table(blocks))
    parts += [f"![{path.stem}]({path.name})" for path in pictures]
    parts += ["## Every item", summary(documents)]
    return "\n\n".join(part for part in parts if part) + "\n"


def write(folder: Path) -> list[Path]:
    """Write report.md, the pictures and all results in one file; returns their paths."""
    documents = load(folder)
    if not documents:
        raise ValueError(f"{folder.name} holds no results; run python -m benchmarks.gpu --out {folder.name}")
    pictures: list[Path] = []
    if data := curves(documents):
        try:
            pictures = draw(data, folder)
        except ImportError as error:
            print(f"no plots: {error}")
    text = folder / "report.md"
    text.write_text(markdown(documents, pictures), encoding="utf-8")
    everything = common.write_json(folder / "results.json", {"kind": "vdit_fast.gpu_suite", "items": documents})
    return [text, everything, *pictures]


def main(argv: Sequence[str] | None = None) -> None:
    ap = argparse.ArgumentParser(prog="python -m benchmarks.gpu.report", description=(__doc__ or "").split("\n")[0])
    ap.add_argument("folder", type=Path, help="what --out was")
    args = ap.parse_args(argv)
    print(*write(args.folder), sep="\n")


if __name__ == "__main__":
    main()
