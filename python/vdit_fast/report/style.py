"""One look for every picture: Agg canvas, colour-blind-safe colours, legible on light and dark pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .environment import environment
from .jsonio import write_json

# Okabe & Ito 2008: distinct under the common colour-vision deficiencies and in grey
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A7A7A", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":")
INK, SOFT, PAPER = "#1f2328", "#6e7781", "#ffffff"
SUFFIXES = (".png", ".svg", ".pdf")

# the background is opaque on purpose: dark ink on a transparent picture vanishes on a dark page
SETTINGS: Mapping[str, Any] = {
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#d8dee4",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "lines.linewidth": 2.0,
    "lines.markersize": 6,
    "svg.hashsalt": "vdit_fast",
}
# both perceptually even and safe for colour-vision deficiencies; cividis keeps white grid lines visible over "read"
HEAT, PLAN_HEAT = "viridis", "cividis"


def need_matplotlib() -> Any:
    """The matplotlib package. Raises ImportError naming the extra."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'vdit-fast[plots]'") from error
    return matplotlib


@contextmanager
def _styled() -> Any:
    with need_matplotlib().rc_context(dict(SETTINGS)):
        yield


def render(
    kind: str,
    path: str | Path,
    data: Mapping[str, Any],
    draw: Callable[[Any], None],
    size: tuple[float, float],
    *,
    dpi: int = 150,
    replot: bool = True,
) -> Path:
    """Runs ``draw(figure)`` on a fresh figure of ``size`` inches; saves the picture and, next to it, its JSON.

    The JSON holds the plot's kind, its data (the arguments that draw it again when ``replot``) and the environment.
    No global matplotlib state is touched (no pyplot). Returns the picture's path.
    """
    path = Path(path)
    if path.suffix == "":
        path = path.with_name(path.name + ".png")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"path is {path.name!r}; use one of {', '.join(SUFFIXES)}")
    need_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with _styled():
        figure = Figure(figsize=size, dpi=dpi, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    write_json(
        path.with_suffix(".json"),
        {"plot": kind, "replot": replot, "data": data, "environment": environment()},
    )
    return path


def colour(index: int) -> str:
    """The palette's colour for series ``index``; grey and black come last."""
    return PALETTE[index % len(PALETTE)]
