"""What all figures share: colours that any kind of colour vision tells apart, and saving."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from rwkvx_jax.generate.terminal import one_line
from rwkvx_jax.storage import new_file

# Okabe and Ito's colours: vermilion marks the training length, the others are lines, each with a
# marker of its own; yellow is too pale on white.
MARK = {"color": "#D55E00", "linestyle": (0, (4, 2))}
LINES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
MARKERS = "osD^vP"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches whose parts never overlap."""
    return Figure(figsize=(width, height), layout="constrained")


def style(number: int) -> dict[str, object]:
    """Colour and marker of line `number`."""
    return {"color": LINES[number % len(LINES)], "marker": MARKERS[number % len(MARKERS)]}


def plain(text: str) -> str:
    """A name as a figure shows it: `$` starts no formula, control characters are spelled out."""
    return one_line(text).replace("$", r"\$")


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG in one step; makes its directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as file:
        figure.savefig(file, dpi=150, format="png")
