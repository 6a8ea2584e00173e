"""The typer application that collects the verbs."""

from __future__ import annotations

import typer

from vdit_fast.cli.verbs import bench, compare, demo, doctor, generate, plot, profile, tune

app = typer.Typer(
    help="Fast attention for video diffusion transformers: check the machine, see it work, measure it.",
    epilog="Begin with `vdit-fast doctor`, then `vdit-fast demo`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
)
for verb in (doctor, demo, generate, compare, bench, profile, plot, tune):
    name = verb.__name__.rpartition(".")[2]
    if hasattr(verb, "app"):  # a verb with commands of its own
        app.add_typer(verb.app, name=name)
    else:
        app.command(name)(verb.command)
