"""``vdit-fast tune``: search a Sparse-vDiT table for a model, a size and this machine, and write it as a config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from vdit_fast.cli.configuration import SetOption, resolve
from vdit_fast.cli.devices import resolve_device
from vdit_fast.cli.given import refuse
from vdit_fast.cli.output import DebugFlag, JsonFlag, session

Model = Annotated[
    Path | None, typer.Option("--model", "-m", help="Local folder of a diffusers pipeline; default: the demo model.")
]
Prompts = Annotated[list[str] | None, typer.Option("--prompt", "-p", help="Calibration prompt; may be repeated.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps; default: the pipeline's own.", min=1)]
Pixels = Annotated[int | None, typer.Option(help="Pixels; default: the pipeline's own.", min=1)]
_PRICE = "Relative mean square error that saving all of a head's attention is worth: higher is sparser."
Price = Annotated[float, typer.Option(help=_PRICE)]
MaxLoss = Annotated[
    float, typer.Option(help="A head stays dense where its best mode's error + price x cost is larger.")
]
Cost = Annotated[str, typer.Option(help="time: measured here; pairs: the share of pairs that a mode reads.")]
Modes = Annotated[str, typer.Option(help="Patterns that a head may get besides full attention, comma-separated.")]
Groups = Annotated[int | None, typer.Option(help="Step ranges of the table; default: every step has its own.", min=1)]
OutFile = Annotated[Path, typer.Option("--out", "-o", help="The config to write: .yaml or .json.")]
Dtype = Annotated[str, typer.Option(help="Of --model: auto (bf16 on a GPU, fp32 on a CPU), fp32, bf16 or fp16.")]


def command(
    context: typer.Context,
    model: Model = None,
    prompts: Prompts = None,
    steps: Steps = None,
    seed: Annotated[int, typer.Option(help="Seed of the first prompt's noise; each further one has the next.")] = 0,
    height: Pixels = None,
    width: Pixels = None,
    frames: Annotated[int | None, typer.Option(help="Frames of the clip; default: the pipeline's own.", min=1)] = None,
    guidance: Annotated[float | None, typer.Option(help="Scale of classifier-free guidance; 1: none.")] = None,
    overrides: SetOption = None,
    price: Price = 0.1,
    max_loss: MaxLoss = 0.05,
    cost: Cost = "time",
    modes: Modes = "skip,diagonal,multi_diagonal,vertical",
    groups: Groups = None,
    out_file: OutFile = Path("tuned.yaml"),
    dtype: Dtype = "auto",
    device: Annotated[str, typer.Option(help="Of --model: cpu, cuda, or auto.")] = "auto",
    weights: Annotated[Path | None, typer.Option(hidden=True)] = None,
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Run a model over calibration prompts and choose a sparse pattern for every head, layer and step."""
    with session(as_json, debug) as out:
        from vdit_fast import report
        from vdit_fast.planners import SparseVDiT
        from vdit_fast.tune import tune

        if out_file.suffix.lower() not in (".yaml", ".yml", ".json"):
            raise ValueError(f"out: {out_file.name!r} is no config file; use .yaml or .json")
        if model is None:
            refuse(context, "dtype", "device", why="the demo model runs in fp32 on the CPU; they are for --model")
        found = resolve({"attention": {"method": "sparse_vdit"}}, overrides)
        if not isinstance(found.attention, SparseVDiT):
            raise ValueError("set: attention is what is searched, by the method sparse_vdit; override its knobs only")
        size = {"steps": steps, "height": height, "width": width, "frames": frames, "guidance": guidance}
        size = {name: value for name, value in size.items() if value is not None}
        if model is None:
            pipe, runs = _demo(prompts, seed, weights, size)
        else:
            pipe, runs = _pipeline(model, prompts, seed, dtype, resolve_device(device), size)
        wanted = [word.strip() for word in modes.split(",")]
        with out.progress() as advance:
            tuned = tune(
                pipe,
                runs,
                base=found.attention,
                modes=wanted,
                price=price,
                max_loss=max_loss,
                cost=cost,
                groups=groups,
                progress=advance,
            )
        out_file.parent.mkdir(parents=True, exist_ok=True)
        replace(found, attention=tuned.planner).save(out_file)
        document = {
            "kind": "vdit_fast.tune",
            "file": str(out_file),
            "config": tuned.planner.to_dict(),
            "modes": list(tuned.modes),
            "errors": tuned.errors,
            "costs": tuned.costs,
            "densities": tuned.densities,
            "shares": tuned.shares(),
            "density": tuned.density,
            "cost": tuned.cost,
            "seconds": tuned.seconds,
            "environment": report.environment(),
        }
        out.emit(report.json_safe(document))
        out.show(_modes_table(tuned), _table(tuned))
        density, price_paid = report.format_percent(tuned.density), report.format_percent(tuned.cost)
        took = report.format_seconds(tuned.seconds)
        out.show(f"density {density}, attention cost {price_paid} of dense; searched in {took}")
        out.show(f"written to {escape(str(out_file))}: accelerate(pipe, {escape(repr(str(out_file)))})")


def _demo(
    prompts: list[str] | None, seed: int, weights: Path | None, size: dict[str, Any]
) -> tuple[Any, list[Callable[[], Any]]]:
    """The demo model's pipeline and one run per prompt."""
    from vdit_fast.demo.model import load_demo_model
    from vdit_fast.demo.prompts import parse
    from vdit_fast.demo.run import PROMPT
    from vdit_fast.demo.sampler import DemoPipeline

    texts = prompts or [PROMPT]
    for text in texts:
        parse(text)
    transformer: Any = load_demo_model(path=weights)
    pipe = DemoPipeline(transformer)

    def run(text: str, number: int) -> Callable[[], Any]:
        return lambda: pipe(text, seed=seed + number, **size)

    return pipe, [run(text, i) for i, text in enumerate(texts)]


def _pipeline(
    model: Path, prompts: list[str] | None, seed: int, dtype: str, device: str, size: dict[str, Any]
) -> tuple[Any, list[Callable[[], Any]]]:
    """A local diffusers pipeline and one run per prompt, which ends before the VAE where the pipeline allows it."""
    from vdit_fast.cli.generation import Request, load_pipeline

    if not prompts:
        raise ValueError("prompt: give at least one --prompt to calibrate with")
    pipe = load_pipeline(model, dtype, device)
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)

    def run(text: str, number: int) -> Callable[[], Any]:
        request = Request(text, seed=seed + number, **size)
        request.arguments(pipe)  # an option that the pipeline lacks is an error now

        def draw() -> Any:
            arguments = request.arguments(pipe)
            if "output_type" in arguments:
                arguments["output_type"] = "latent"
            return pipe(**arguments)

        return draw

    return pipe, [run(text, i) for i, text in enumerate(prompts)]


def _modes_table(tuned: Any) -> Table:
    from vdit_fast.report import format_percent

    table = Table(title="modes", title_justify="left")
    for name in ("mode", "density", "cost", "chosen"):
        table.add_column(name, justify="left" if name == "mode" else "right")
    for mode, share in tuned.shares().items():
        density, cost = (values.get(mode, 1.0 if mode == "full" else None) for values in (tuned.densities, tuned.costs))
        if density is not None and cost is not None:
            table.add_row(mode, format_percent(density), format_percent(cost), format_percent(share))
    return table


def _table(tuned: Any) -> Table:
    """One row per layer, one column per step range, one letter per head."""
    made = tuned.planner.made_for
    firsts = [first for first, _ in tuned.planner.modes] + [made.steps]
    table = Table(title="a letter per head: f s d m v", title_justify="left")
    table.add_column("layer", justify="right")
    for first, end in pairwise(firsts):
        table.add_column(f"step {first}" if end == first + 1 else f"steps {first}-{end - 1}")
    for layer in range(made.layers):
        table.add_row(str(layer), *(rows[layer] if len(rows) > 1 else rows[0] for _, rows in tuned.planner.modes))
    return table
