"""Figures: colours that any kind of colour vision tells apart, saving, and heat maps.

A heat map shows accuracy by length and depth: one a model, all in one figure, and below them a line
a model over all depths, with 95 % Wilson intervals: cells hold few trials, so the lines are what
two models should be compared by. The same as a table goes to the terminal.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import HORIZONTALS
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rwkvx_jax.evals.intervals import wilson
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


_COLORS = matplotlib.colormaps["cividis"]  # reads the same with any kind of colour vision
_EMPTY = "0.92"


class HeatMap(NamedTuple):
    """Counts of one model."""

    label: str
    note: str  # what the title adds, such as the checkpoint's step
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    correct: np.ndarray  # [lengths, depths], sums of scores from 0 to 1
    trials: np.ndarray  # int [lengths, depths]
    trained_length: int | None

    @property
    def percent(self) -> np.ndarray:
        """[lengths, depths], NaN where nothing was tried."""
        tried = np.where(self.trials > 0, self.trials, np.nan)
        return 100 * self.correct / tried

    @property
    def trained_columns(self) -> int | None:
        """How many of the lengths do not exceed the longest training sequence."""
        if self.trained_length is None:
            return None
        return sum(length <= self.trained_length for length in self.lengths)


def draw(maps: Sequence[HeatMap], path: Path, *, title: str, x_label: str, y_label: str) -> None:
    """Writes the figure.

    Args:
      maps: of the same lengths and depths.
      path: of the PNG.
      title: of the whole figure; may have several lines.
      x_label: what a length is.
      y_label: what a depth is; "" where the only one means nothing.
    """
    lengths, depths = len(maps[0].lengths), len(maps[0].depths)
    columns = 2 if len(maps) > 1 and lengths <= 14 else 1
    rows = -(-len(maps) // columns)
    map_width, map_height = max(4.6, 0.52 * lengths + 1.2), max(2.0, 0.3 * depths + 1.2)
    line_height = 2.4
    legend_height = 0.25 * (len(maps) // 2 + 1)
    figure = new_figure(
        columns * map_width + 1.2, rows * map_height + line_height + legend_height + 0.8
    )
    figure.suptitle(title, fontsize=11)
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[*[map_height] * rows, line_height])
    axes = [figure.add_subplot(grid[i // columns, i % columns]) for i in range(len(maps))]
    for axis, heat_map in zip(axes, maps, strict=True):
        image = _draw_map(axis, heat_map)
        if not y_label:
            axis.set_yticks([])
        axis.set_xlabel(x_label, fontsize=9)
        axis.set_ylabel(y_label, fontsize=9)
    figure.colorbar(image, ax=axes, label="right answers (%)", aspect=30, pad=0.02)
    lines = figure.add_subplot(grid[rows, :])
    _draw_lines(lines, maps)
    lines.set_xlabel(x_label, fontsize=9)
    figure.legend(
        *lines.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8
    )
    save(figure, path)


def _draw_map(axis: Axes, heat_map: HeatMap):
    percent = heat_map.percent.T
    axis.set_facecolor(_EMPTY)
    image = axis.imshow(
        np.ma.masked_invalid(percent), cmap=_COLORS, vmin=0, vmax=100, aspect="auto"
    )
    for (row, column), value in np.ndenumerate(percent):
        text = "–" if np.isnan(value) else f"{value:.0f}"
        color = "black" if np.isnan(value) else _ink(value)
        axis.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
    _length_ticks(axis, heat_map.lengths)
    depths = _percentages(heat_map.depths)
    axis.set_yticks(range(len(depths)), depths, fontsize=8)
    axis.set_title(f"{plain(heat_map.label)}\n{heat_map.note}".rstrip(), fontsize=9)
    columns = heat_map.trained_columns
    if columns is not None:
        # White beneath, so that it shows on every colour of the map.
        axis.axvline(columns - 0.5, color="white", linewidth=3.5, clip_on=False)
        axis.axvline(columns - 0.5, linewidth=2, clip_on=False, **MARK)
    return image


def _draw_lines(axis: Axes, maps: Sequence[HeatMap]) -> None:
    """Accuracy over all depths, one line a model, drawn side by side so that bars stay apart."""
    for i, heat_map in enumerate(maps):
        correct, trials = heat_map.correct.sum(1), heat_map.trials.sum(1)
        tried = np.flatnonzero(trials)
        share = correct[tried] / trials[tried]
        ends = np.array([wilson(c, n) for c, n in zip(correct[tried], trials[tried], strict=True)])
        ends = ends.reshape(-1, 2)
        shift = (i - (len(maps) - 1) / 2) * min(0.12, 0.6 / len(maps))
        axis.errorbar(
            tried + shift,
            100 * share,
            # Rounding can put an end beyond the share itself by a hair.
            yerr=100 * np.maximum(0, [share - ends[:, 0], ends[:, 1] - share]),
            color=LINES[i % len(LINES)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=5,
            linewidth=1.2,
            capsize=3,
            label=plain(heat_map.label),
        )
    marks = {(m.trained_columns, m.trained_length) for m in maps if m.trained_length is not None}
    for i, (columns, _) in enumerate(sorted(marks)):
        lengths = " / ".join(f"{length:,}" for _, length in sorted(marks))
        label = f"longest training sequence ({lengths} tokens)" if i == 0 else None
        axis.axvline(columns - 0.5, linewidth=1.5, label=label, **MARK)
    axis.set_xlim(-0.6, len(maps[0].lengths) - 0.4)
    axis.set_ylim(-4, 104)
    axis.grid(axis="y", alpha=0.4)
    axis.tick_params(axis="y", labelsize=8)
    _length_ticks(axis, maps[0].lengths)
    axis.set_ylabel("right answers (%)", fontsize=9)
    axis.set_title("All depths, with 95 % Wilson intervals", fontsize=9)


def _length_ticks(axis: Axes, lengths: Sequence[int]) -> None:
    labels = [f"{length:,}" for length in lengths]
    slanted = max(map(len, labels)) > 6
    axis.set_xticks(
        range(len(lengths)),
        labels,
        fontsize=8,
        rotation=45 if slanted else 0,
        ha="right" if slanted else "center",
        rotation_mode="anchor",
    )


def _percentages(shares: Sequence[float]) -> list[str]:
    """Shares as whole percentages, with decimals only where these would coincide."""
    whole = [f"{100 * share:.0f}" for share in shares]
    return whole if len(set(whole)) == len(whole) else [f"{100 * share:.4g}" for share in shares]


def _ink(percent: float) -> str:
    """Black or white, whichever has more contrast to the colour of a percentage."""
    red, green, blue = (channel**2.2 for channel in _COLORS(percent / 100)[:3])
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 else "white"


def print_table(console: Console, heat_map: HeatMap, *, length_header: str) -> None:
    """Prints a heat map: a row a length, a column a depth, totals with intervals at the end."""
    console.print(f"{heat_map.label}: right answers (%) by length and depth (%)", soft_wrap=True)
    table = Table(box=HORIZONTALS, padding=0)
    for header in (length_header, *_percentages(heat_map.depths), "all", " 95 % interval"):
        table.add_column(header, justify="right", no_wrap=True)
    for i, length in enumerate(heat_map.lengths):
        correct, trials = float(heat_map.correct[i].sum()), int(heat_map.trials[i].sum())
        low, high = wilson(correct, trials)
        table.add_row(
            f"{length:,}",
            *[_cell(value) for value in heat_map.percent[i]],
            _cell(100 * correct / trials if trials else np.nan),
            f"{100 * low:.0f} to {100 * high:.0f}" if trials else "–",
            end_section=heat_map.trained_columns == i + 1,
        )
    console.print(table)
    console.print(_total(heat_map), soft_wrap=True)
    console.print()


def _cell(percent: float) -> Text:
    if np.isnan(percent):
        return Text("–", style="dim")
    red, green, blue, _ = _COLORS(percent / 100, bytes=True)
    return Text(f"{percent:.0f}".rjust(3), style=f"{_ink(percent)} on rgb({red},{green},{blue})")


def _total(heat_map: HeatMap) -> str:
    correct, trials = float(heat_map.correct.sum()), int(heat_map.trials.sum())
    if not trials:
        return "no trial finished"
    low, high = wilson(correct, trials)
    text = (
        f"{correct:.6g} of {trials} right: {100 * correct / trials:.1f} % "
        f"(95 % interval {100 * low:.1f} to {100 * high:.1f})"
    )
    if heat_map.trained_length is None:
        return text
    return f"{text}; longest training sequence: {heat_map.trained_length:,} tokens"
