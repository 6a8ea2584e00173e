"""``vdit-fast profile``: would sparse attention help in this model, at this size, on this machine?"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from vdit_fast.cli.configuration import ConfigOption, SetOption, resolve
from vdit_fast.cli.devices import resolve_device
from vdit_fast.cli.given import refuse
from vdit_fast.cli.output import Advance, DebugFlag, JsonFlag, session

_MODEL = "Local folder of a diffusers pipeline; default: the demo model."
Model = Annotated[Path | None, typer.Option("--model", "-m", help=_MODEL)]
Prompt = Annotated[str | None, typer.Option("--prompt", "-p", help="What to draw; needed with --model.")]
Method = Annotated[
    str | None, typer.Option("--method", help="A planner, e.g. svg1, with its own defaults, instead of --config.")
]
Steps = Annotated[int | None, typer.Option(help="Denoising steps; default: the pipeline's own.", min=1)]
Pixels = Annotated[int | None, typer.Option(help="Pixels; default: the pipeline's own.", min=1)]
Frames = Annotated[int | None, typer.Option(help="Frames of the clip; default: the pipeline's own.", min=1)]
Rows = Annotated[int, typer.Option(help="Queries per head that are looked at.", min=1)]
Block = Annotated[int, typer.Option(help="Side of the square blocks that the best selection is also shown in.", min=1)]
OutDir = Annotated[Path, typer.Option("--out", "-o", help="Folder for profile.json and the pictures.")]
Dtype = Annotated[str, typer.Option(help="Of --model: auto (bf16 on a GPU, fp32 on a CPU), fp32, bf16 or fp16.")]


def command(
    context: typer.Context,
    model: Model = None,
    prompt: Prompt = None,
    config: ConfigOption = "balanced",
    method: Method = None,
    overrides: SetOption = None,
    steps: Steps = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    height: Pixels = None,
    width: Pixels = None,
    frames: Frames = None,
    rows: Rows = 64,
    block: Block = 64,
    out_dir: OutDir = Path("vdit_fast_profile"),
    dtype: Dtype = "auto",
    device: Annotated[str, typer.Option(help="Of --model: cpu, cuda, or auto.")] = "auto",
    weights: Annotated[Path | None, typer.Option(hidden=True)] = None,
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Run a model once, dense, and measure what a sparse method would gain and lose in every layer and head."""
    with session(as_json, debug) as out:
        from vdit_fast import report
        from vdit_fast.cli import profile_report
        from vdit_fast.cli.profiling import profile

        if method is not None:
            refuse(context, "config", why="--method names the planner that is asked about; leave one of them out")
        if model is None:
            refuse(context, "dtype", "device", why="the demo model runs in fp32 on the CPU; they are for --model")
        planner = _planner(config, method, overrides, demo=model is None)
        size = {"steps": steps, "height": height, "width": width, "frames": frames}
        size = {name: value for name, value in size.items() if value is not None}
        with out.progress() as advance:
            if model is None:
                pipe, run = _demo(prompt, seed, weights, size, advance)
            else:
                pipe, run = _pipeline(model, prompt, seed, dtype, resolve_device(device), size, advance)
            document, notes = profile(pipe, run, planner, rows=rows, block=block)
        document["environment"] = report.environment()
        out_dir.mkdir(parents=True, exist_ok=True)
        files = profile_report.draw(document, out_dir) + profile_report.draw_plan(document, notes, out_dir)
        document["files"] = [file.name for file in files] + ["profile.json"]
        report.write_json(out_dir / "profile.json", document)
        out.emit(report.json_safe(document))
        out.show(*_tables(document), f"[dim]{profile_report.LEGEND}[/]\n")
        out.show(f"[bold]{escape(document['verdict'])}[/]")
        out.show(f"written to {escape(str(out_dir))}: {', '.join(document['files'])}")


def _planner(config: str, method: str | None, overrides: list[str] | None, *, demo: bool) -> Any:
    """The planner to ask about: that of the config, or one by name with its defaults."""
    from vdit_fast.cli.matching import METHODS

    if method is not None:
        fitting = dict(METHODS[method].fixed) if demo and method in METHODS else {}
        overrides = [f"attention={json.dumps({'method': method} | fitting)}", *(overrides or ())]
    other = [item for item in overrides or () if item.partition("=")[0].partition(".")[0] != "attention"]
    if other:
        raise ValueError(
            f"set: {other[0]!r} has no effect here: a profile runs the model dense and asks its planner; set "
            "attention or attention.KNOB"
        )
    found = resolve(config, overrides)
    if found.attention is None:
        raise ValueError(f"config: {config!r} is dense; name a sparse method with --method")
    return found.attention


def _demo(
    prompt: str | None, seed: int, weights: Path | None, size: dict[str, Any], advance: Advance
) -> tuple[Any, Callable[[], Any]]:
    """The demo model's pipeline, warmed up, and its run."""
    from vdit_fast.demo.model import load_demo_model
    from vdit_fast.demo.run import PROMPT, STEPS
    from vdit_fast.demo.sampler import DemoPipeline

    transformer: Any = load_demo_model(path=weights)
    pipe = DemoPipeline(transformer)
    options = {"steps": STEPS} | size
    pipe(prompt or PROMPT, **(options | {"steps": 1}))
    return pipe, lambda: pipe(
        prompt or PROMPT, seed=seed, progress=lambda step, of: advance(step, of, "dense run, measured"), **options
    )


def _pipeline(
    model: Path, prompt: str | None, seed: int, dtype: str, device: str, size: dict[str, Any], advance: Advance
) -> tuple[Any, Callable[[], Any]]:
    """A local pipeline, and its run; the result is dropped before it is decoded where the pipeline can do that."""
    from vdit_fast.cli.generation import Request, load_pipeline, watched

    if prompt is None:
        raise ValueError("prompt: --model needs one")
    pipe = load_pipeline(model, dtype, device)
    request = Request(prompt, seed=seed, **size)
    arguments = watched(pipe, request, request.arguments(pipe), advance, "dense run, measured")
    if "output_type" in arguments:
        arguments["output_type"] = "latent"
    return pipe, lambda: pipe(**arguments)


def _tables(document: dict[str, Any]) -> list[Table]:
    from vdit_fast.cli.profile_report import HEADERS, cells, numbers

    name = document["planner"]["method"]
    first = Table(title=f"what {name} would do in this run", title_justify="left", show_header=False)
    for row in numbers(document):
        first.add_row(*map(escape, row))
    second = Table(title="attention mass, means over heads and looked-at steps", title_justify="left")
    for heading in HEADERS:
        second.add_column(heading, justify="left" if heading in HEADERS[:2] else "right")
    for line in cells(document):
        second.add_row(*map(escape, line))
    return [first, second]
