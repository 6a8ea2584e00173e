"""What the simulator says of DualParal on 8 GPUs: Wan 1.3B at 480p and 14B at 720p, 1,025 frames, PCIe and NVLink.

    python benchmarks/pipeline_forecast.py --out benchmarks/results/simulated --picture docs/assets/pipeline/speedup.png

Nothing here was measured on a GPU. Seconds are counted operations (``vdit_fast.parallel.costs``) over an assumed speed,
bytes over assumed links: 25 GB/s for PCIe, 400 GB/s for NVLink, 10 microseconds each. Two speeds are assumed, 80 and
400 TFLOP/s sustained in bf16 and dense attention: of the order of an RTX 4090 and of an H100.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness import parser

from vdit_fast import report
from vdit_fast.parallel.costs import WAN_1_3B, WAN_14B, Clip, Transformer, dual_paral, memory_per_rank, ulysses_seconds
from vdit_fast.parallel.simulator import Link, simulate
from vdit_fast.report.style import LINES, MARKERS, SOFT, colour, render

FRAMES, GPUS, PUBLISHED = 1025, 8, 6.54
MODELS: dict[str, tuple[Transformer, Clip]] = {
    "Wan 1.3B, 480p": (WAN_1_3B, Clip(FRAMES, 1560)),
    "Wan 14B, 720p": (WAN_14B, Clip(FRAMES, 3600)),
}
LINKS = {"PCIe": Link(25e9, 1e-5), "NVLink": Link(400e9, 1e-5)}
SPEEDS = (80e12, 400e12)
CURVE = (1, 2, 4, 6, 8, 10, 12, 16, 20, 24, 30)
E4M3 = 1 + 1 / 128  # bytes per number


def case(name: str, link: str, flops: float, gpus: int = GPUS, width: float = 2) -> dict[str, Any]:
    model, clip = MODELS[name]
    run = simulate(dual_paral(model, clip, gpus, flops, LINKS[link], width))
    alone = simulate(dual_paral(model, clip, 1, flops, LINKS[link]))
    memory = [sum(parts.values()) for parts in memory_per_rank(model, clip, gpus)]
    whole = ulysses_seconds(model, clip, gpus, flops, LINKS[link])
    return {
        "model": name, "link": link, "flops": flops, "gpus": gpus, "bytes_per_number": width,
        "one_gpu": alone.latency, "latency": run.latency, "first_block": run.first_block, "idle": run.bubble,
        "over_one_gpu": alone.latency / run.latency, "ulysses": whole, "over_ulysses": whole / run.latency,
        "sent": run.bytes, "most_memory": max(memory),
        "one_gpu_memory": sum(memory_per_rank(model, clip, 1)[0].values()),
    }  # fmt: skip


def draw(curves: dict[str, Any], path: Path) -> Path:
    def on(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot(CURVE, CURVE, color=SOFT, linewidth=1.4, linestyle=":", label="ideal")
        for index, (name, curve) in enumerate(curves.items()):
            look = {
                "color": colour(index),
                "marker": MARKERS[index % len(MARKERS)],
                "linestyle": LINES[index % len(LINES)],
            }
            axes.plot(curve["gpus"], curve["speedup"], label=name, **look)
        star = {"marker": "*", "markersize": 15, "color": "#000000", "linestyle": "none"}
        axes.plot([GPUS], [PUBLISHED], label=f"published, over other methods: up to {PUBLISHED}x", **star)
        axes.set_xlabel("GPUs")
        axes.set_ylabel("latency of one GPU / latency")
        axes.set_title("DualParal, 1,025 frames: simulated")
        axes.legend(loc="upper left", fontsize=8)

    return render("pipeline_speedup", path, {"curves": curves}, on, (6.8, 4.6), replot=False)


def main() -> None:
    ap = parser(__doc__)
    ap.add_argument("--picture", type=Path, help="default: pipeline_speedup.png in --out")
    args = ap.parse_args()
    cases = [case(name, link, flops) for flops in SPEEDS for name in MODELS for link in LINKS]
    packed = [case(name, "PCIe", SPEEDS[1], width=E4M3) for name in MODELS]
    rows = [
        (
            c["model"], f"{c['flops'] / 1e12:.0f} TFLOP/s",
            c["link"] + ("" if c["bytes_per_number"] == 2 else ", e4m3"),
            report.format_seconds(c["one_gpu"]), report.format_seconds(c["latency"]),
            report.format_seconds(c["first_block"]), f"{c['over_one_gpu']:.2f}x", report.format_percent(c["idle"]),
            f"{c['over_ulysses']:.2f}x", report.format_bytes(c["most_memory"]),
            report.format_bytes(c["one_gpu_memory"]),
        )
        for c in cases + packed
    ]  # fmt: skip
    heads = ("model", "assumed", "link", "one GPU", "8 GPUs", "first block", "over one", "idle", "over Ulysses",
             "memory", "of one")  # fmt: skip
    print(report.table(rows, heads))
    curves = {
        f"{name}, {link}, {SPEEDS[1] / 1e12:.0f} TFLOP/s": {
            "gpus": list(CURVE), "speedup": [case(name, link, SPEEDS[1], n)["over_one_gpu"] for n in CURVE],
        }
        for name in MODELS for link in LINKS
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    picture = draw(curves, args.picture or args.out / "pipeline_speedup.png")
    document = {
        "kind": "vdit_fast.pipeline_forecast",
        "version": 1,
        "assumptions": "operations counted, FLOP/s and links assumed; no GPU was measured",
        "published": {"speedup": PUBLISHED, "of": "8 RTX 4090, 1,025 frames, over other distributed methods"},
        "cases": cases + packed,
        "curves": curves,
        "command": "python benchmarks/pipeline_forecast.py",
    }  # fmt: skip
    print("written:", report.write_json(args.out / "pipeline_forecast.json", document), "and", picture)


if __name__ == "__main__":
    main()
