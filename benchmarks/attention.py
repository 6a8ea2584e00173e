"""The attention benchmark on a CPU: torch SDPA, masked SDPA, compiled FlexAttention and this package's kernel.

    python benchmarks/attention.py --out benchmarks/results/cpu     (make bench: --out outputs/bench)

All contenders run in turn in one process, so that a slow spell of the machine hits all alike; ratios are medians of the
rounds' own ratios, with their minimum and maximum. For other shapes, dtypes and devices: ``vdit-fast bench --help``.
"""

from __future__ import annotations

from harness import parser

from vdit_fast import report
from vdit_fast.cli.bench import SUITES, draw, run_bench

BLOCK = 128  # FlexAttention's smallest on a CPU, and the tile of most published sparse methods
HEADINGS = ("", "density", "median", "eff. GFLOP/s", "executed", "over torch SDPA", "over own dense")


def main() -> None:
    ap = parser(__doc__, rounds=9)
    ap.add_argument("--suite", choices=sorted(SUITES), default="cpu")
    ap.add_argument("--no-flex", action="store_true", help="leave out FlexAttention, which compiles for a minute")
    args = ap.parse_args()

    def progress(done: int, total: int, what: str) -> None:
        print(f"\rround {done} of {total}: {what}", end="" if done < total else "\n", flush=True)

    document = run_bench(SUITES[args.suite], block=BLOCK, repeats=args.rounds, flex=not args.no_flex, progress=progress)
    for result in document["results"]:
        rows = [
            (
                row["name"],
                report.format_percent(row["density"]),
                report.format_seconds(row["seconds"]),
                f"{row['effective_gflops']:.0f}",
                f"{row['executed_gflops']:.0f}",
                *(report.format_ratio(row[k], row[f"{k}_min"], row[f"{k}_max"]) for k in ("speedup", "over_own_dense")),
            )
            for row in result["rows"]
        ]
        print(f"\nbatch x heads x tokens x dim = {result['shape']['label']}, {document['settings']}")
        print(report.table(rows, HEADINGS))
    document["command"] = f"python benchmarks/attention.py --suite {args.suite} --rounds {args.rounds}"
    document["environment"] = report.environment()
    args.out.mkdir(parents=True, exist_ok=True)
    print("\nwritten:", report.write_json(args.out / "attention.json", document), *draw(document, args.out))


if __name__ == "__main__":
    main()
