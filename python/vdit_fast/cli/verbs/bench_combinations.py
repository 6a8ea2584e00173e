"""``vdit-fast bench combinations``: whole configurations on the demo model, alone and together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from vdit_fast.cli.output import DebugFlag, JsonFlag, session

_PROMPT = "One or two objects, each 'colour shape direction'; may be repeated, quality is then the mean."
Prompts = Annotated[list[str] | None, typer.Option("--prompt", "-p", help=_PROMPT)]
Only = Annotated[list[str] | None, typer.Option("--only", help="Only this built-in combination; may be repeated.")]
Given = Annotated[
    list[str] | None, typer.Option("--config", help="NAME=FILE: one more configuration; may be repeated.")
]
Steps = Annotated[int, typer.Option(help="Denoising steps.", min=1)]
Repeats = Annotated[int, typer.Option(help="Timed rounds; each runs everything once, in turns.", min=1)]
Minutes = Annotated[float, typer.Option(help="Begin no further round that would end later.", min=0)]
Goal = Annotated[float, typer.Option(help="Speed-up over stock that the verdict looks for.", min=0)]
Floor = Annotated[float, typer.Option(help="PSNR in dB that a configuration must keep.", min=0)]
Compiled = Annotated[bool, typer.Option("--compiled/--no-compiled", help="Also stock diffusers with compiled blocks.")]
OutDir = Annotated[Path, typer.Option("--out", "-o", help="Folder for combinations.json, .md and .png.")]
Size = Annotated[int | None, typer.Option(hidden=True, min=1)]


def command(
    prompt: Prompts = None,
    only: Only = None,
    config: Given = None,
    steps: Steps = 12,
    repeats: Repeats = 3,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    minutes: Minutes = 60,
    goal: Goal = 4.0,
    floor: Floor = 25.0,
    compiled: Compiled = True,
    out_dir: OutDir = Path("vdit_fast_combinations"),
    frames: Size = None,
    size: Size = None,
    weights: Annotated[Path | None, typer.Option(hidden=True)] = None,
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Compare whole configurations: sparse, cached, fused, alone and together; table, JSON and picture."""
    with session(as_json, debug) as out:
        from vdit_fast import report
        from vdit_fast.cli import combinations_report
        from vdit_fast.cli.combinations_bench import PROMPTS, Settings, run_combinations

        options: dict[str, Any] = {"frames": frames, "height": size, "width": size}
        settings = Settings(
            prompts=tuple(prompt or PROMPTS),
            steps=steps,
            repeats=repeats,
            seed=seed,
            minutes=minutes,
            compiled=compiled,
            goal=goal,
            floor=floor,
            **{name: value for name, value in options.items() if value is not None},
        )
        given = dict(_given(text) for text in config or ())
        names = only if only or not given else []
        with out.progress() as advance:
            document = run_combinations(settings, names=names, more=given, weights=weights, progress=advance)
        document["verdict"] = combinations_report.verdict(document)
        out_dir.mkdir(parents=True, exist_ok=True)
        files = combinations_report.draw(document, out_dir)
        rows = combinations_report.cells(document)
        text = report.table(rows, combinations_report.HEADERS, style="markdown")
        (out_dir / "combinations.md").write_text(
            f"{text}\n\n{combinations_report.LEGEND}.\n\n{document['verdict']}\n", encoding="utf-8"
        )
        document["files"] = [file.name for file in files] + ["combinations.md", "combinations.json"]
        report.write_json(out_dir / "combinations.json", document)
        out.emit(report.json_safe(document))
        out.show(*_tables(rows, document), f"[dim]{combinations_report.LEGEND}[/]\n")
        out.show(f"[bold]{escape(document['verdict'])}[/]")
        out.show(f"written to {escape(str(out_dir))}: {', '.join(document['files'])}")


def _given(text: str) -> tuple[str, Any]:
    from vdit_fast.config import Config

    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise ValueError(f"config: {text!r}; pass NAME=FILE, e.g. mine=mine.yaml")
    return name, Config.of(path)


def _tables(rows: list[list[str]], document: dict[str, Any]) -> list[Table]:
    """Quality and speed, each narrow enough for a terminal."""
    from vdit_fast.cli.combinations_report import HEADERS, SPEED

    s = document["settings"]
    work = f"{s['tokens']:,} tokens, {s['steps']} steps, {document['rounds']} rounds"
    tables = []
    for what, columns in (("quality", range(SPEED)), ("speed", (0, *range(SPEED, len(HEADERS))))):
        table = Table(title=f"combinations, {what}: {work}", title_justify="left")
        for column in columns:
            words = HEADERS[column] == "configuration"
            table.add_column(HEADERS[column], justify="left" if words else "right", no_wrap=words)
        for row in rows:
            table.add_row(*(escape(row[column]) for column in columns))
        tables.append(table)
    return tables
