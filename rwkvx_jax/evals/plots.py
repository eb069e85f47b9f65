"""Figures: one style for all, names, ticks, legends, saving, and heat maps.

A heat map shows accuracy by length and depth: one a model, all in one figure, and below them a line
a model over all depths, with 95 % Wilson intervals: cells hold few trials, so the lines are what
two models should be compared by. The same as a table goes to the terminal.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from matplotlib.ticker import NullFormatter
from rich.box import HORIZONTALS
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rwkvx_jax.config.mixers import MIXER_TITLES
from rwkvx_jax.evals.intervals import wilson
from rwkvx_jax.evals.models import ATTENTION_OFF
from rwkvx_jax.generate.terminal import one_line
from rwkvx_jax.records import Record
from rwkvx_jax.storage import new_file

# Okabe and Ito's colours: vermilion marks the training length, the others are lines, each with a
# marker of its own; yellow is too pale on white.
_MARK = {"color": "#D55E00", "linestyle": (0, (4, 2)), "linewidth": 1.8}
_LINES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
_MARKERS = "osD^vP"
_POINTS = 9  # of every text
_SLANTED_ROOM = 0.26  # inches between labels of an axis that are slanted

_SIZES = ("figure.titlesize", "axes.titlesize", "legend.fontsize", "xtick.labelsize")
_STYLE = dict.fromkeys(("font.size", "axes.labelsize", "ytick.labelsize", *_SIZES), _POINTS)
_STYLE |= {"axes.axisbelow": True, "grid.alpha": 0.4, "lines.markersize": 4.5}

drawn = matplotlib.rc_context(_STYLE)
"""Decorates a function that draws a figure: all have one font and one size."""


def new_figure(width: float, height: float, title: str) -> Figure:
    """An empty figure of so many inches whose parts never overlap; its title is broken to fit."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(broken(title, width - 0.4))
    return figure


def style(number: int) -> dict[str, object]:
    """Colour and marker of line `number`."""
    return {"color": _LINES[number % len(_LINES)], "marker": _MARKERS[number % len(_MARKERS)]}


def plain(text: str) -> str:
    """A name as a figure shows it: `$` starts no formula, control characters are spelled out."""
    return one_line(text).replace("$", r"\$")


def _inches(text: str) -> float:
    """Width of one line of text."""
    font = FontProperties(size=_POINTS)
    return text_to_path.get_text_width_height_descent(text, font, ismath=False)[0] / 72


def broken(text: str, inches: float) -> str:
    """Text whose lines are broken where they would be longer."""

    def fill(line: str) -> str:
        letters = int(0.95 * inches / max(_inches(line), 0.01) * len(line))
        return line if _inches(line) <= inches else textwrap.fill(line, max(4, letters))

    return "\n".join(map(fill, text.split("\n")))


def name_of(model: Record) -> str:
    """What a figure calls a model: what it is, and its file.

    Args:
      model: its description (see `EvalModel.description`).
    """
    config, label = model["model"], model["label"].replace(".safetensors", "")
    mixer = MIXER_TITLES[config.get("mixer", "rwkv7")]
    name = "RWKV-X" if mixer == "RWKV-7" else f"{mixer} with sparse attention"
    if not config["num_blocks"]:
        name = "Transformer"
    usual = "full" if name == "Transformer" else "sparse"
    if config["attention"] != usual:
        name = f"{name.removesuffix(' with sparse attention')} with {config['attention']} attention"
    alone = not config["num_attention_blocks"] and not label.endswith(ATTENTION_OFF)
    return f"{mixer if alone else name}: {label}"


def part_of(done: int, planned: int, what: str) -> str:
    """Such as "first 3 of 10 documents"; nothing where all are done."""
    return f"first {done:,} of {planned:,} {what}" if done < planned else ""


def legend_below(figure: Figure, *axes: Axes) -> None:
    """One legend of some axes below the figure, where it covers nothing."""
    parts = [zip(*own.get_legend_handles_labels(), strict=True) for own in axes]
    handles, labels = zip(*(entry for part in parts for entry in part), strict=True)
    width = figure.get_figwidth() - 0.4
    labels = [broken(label, width - 0.8) for label in labels]
    longest = max(_inches(line) for label in labels for line in label.split("\n"))
    columns = min(len(labels), int(width / (longest + 0.7)))
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, columns))


def log_ticks(axes: Axes, values: Iterable[int], inches: float) -> None:
    """Makes the x axis logarithmic, with ticks at these values, written as in the tables.

    Args:
      axes: inches wide, about.
      values: above 0. Labels that would overlap the one before are left out.
      inches: see there.
    """
    ticks = sorted(set(values))
    texts = [f"{tick:,}" for tick in ticks]
    span = np.log2(ticks[-1] / ticks[0]) or 1.0
    gap = lambda a, b: np.log2(b / a) / span * inches
    wide = max(map(_inches, texts)) + 0.1
    slanted = any(gap(a, b) < wide for a, b in zip(ticks, ticks[1:], strict=False))
    room, labels, last = (_SLANTED_ROOM if slanted else wide), [], None
    for tick, text in zip(ticks, texts, strict=True):
        kept = last is None or gap(last, tick) >= room
        labels.append(text if kept else "")
        last = tick if kept else last
    axes.set_xscale("log", base=2)
    _set_x_ticks(axes, ticks, labels, slanted)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()


def _set_x_ticks(axes: Axes, places: Sequence[float], labels: Sequence[str], slanted: bool) -> None:
    turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
    axes.set_xticks(places, labels, **turned)


def mark_trained(axes: Axes, lengths: Iterable[int | None]) -> None:
    """A dashed line at each of the longest training sequences, on a logarithmic axis of tokens."""
    known = sorted(set(lengths) - {None})
    told = " and ".join(f"{length:,}" for length in known)
    for i, length in enumerate(known):
        label = f"longest training sequence ({told} tokens)" if i == 0 else None
        axes.axvline(length, label=label, zorder=1, **_MARK)  # behind the lines


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


@drawn
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
    map_width, map_height = max(3.6, 0.52 * lengths + 1.0), max(2.6, 0.27 * depths + 1.2)
    rows = -(-len(maps) // max(1, int(13 // map_width)))
    columns = -(-len(maps) // rows)
    width, line_height = max(7.0, columns * map_width + 1.0), 2.6
    height = rows * map_height + line_height + 0.2 * len(maps) + 0.8
    figure = new_figure(width, height, title)
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[*[map_height] * rows, line_height])
    axes = [figure.add_subplot(grid[i // columns, i % columns]) for i in range(len(maps))]
    inches = (width - 0.9) / columns - 0.75  # of a map, less its depths and the bar of colours
    for axis, heat_map in zip(axes, maps, strict=True):
        image = _draw_map(axis, heat_map, inches)
        if not y_label:
            axis.set_yticks([])
        axis.set_xlabel(broken(x_label, inches))
        axis.set_ylabel(y_label.replace(" (", "\n("))
    figure.colorbar(image, ax=axes, label="right answers (%)", aspect=30, pad=0.02)
    lines = figure.add_subplot(grid[rows, :])
    _draw_lines(lines, maps, width - 1.0)
    lines.set_xlabel(x_label)
    legend_below(figure, lines)
    save(figure, path)


def _draw_map(axis: Axes, heat_map: HeatMap, inches: float):
    percent = heat_map.percent.T
    axis.set_facecolor(_EMPTY)
    image = axis.imshow(
        np.ma.masked_invalid(percent), cmap=_COLORS, vmin=0, vmax=100, aspect="auto"
    )
    for (row, column), value in np.ndenumerate(percent):
        text = "–" if np.isnan(value) else f"{value:.0f}"
        color = "black" if np.isnan(value) else _ink(value)
        axis.text(column, row, text, ha="center", va="center", color=color)
    labels = [f"{length:,}" for length in heat_map.lengths]
    slanted = max(map(_inches, labels)) + 0.1 > inches / len(labels)
    _set_x_ticks(axis, range(len(labels)), labels, slanted)
    depths = _percentages(heat_map.depths)
    axis.set_yticks(range(len(depths)), depths)
    title = f"{plain(heat_map.label)}\n{heat_map.note}".rstrip()
    axis.set_title(broken(title, inches))
    columns = heat_map.trained_columns
    if columns is not None and 0 < columns < len(labels):
        # White beneath, so that it shows on every colour of the map.
        axis.axvline(columns - 0.5, color="white", linewidth=3.5)
        axis.axvline(columns - 0.5, **_MARK)
    return image


def _draw_lines(axis: Axes, maps: Sequence[HeatMap], inches: float) -> None:
    """Accuracy over all depths, one line a model, drawn side by side so that bars stay apart."""
    trained = [heat_map.trained_length for heat_map in maps]
    lengths = np.array(maps[0].lengths)
    shown = sorted({*maps[0].lengths, *trained} - {None})
    factor = max(2.0, shown[-1] / shown[0])  # from one end of the axis to the other
    for i, heat_map in enumerate(maps):
        correct, trials = heat_map.correct.sum(1), heat_map.trials.sum(1)
        tried = np.flatnonzero(trials)
        share = correct[tried] / trials[tried]
        ends = np.array([wilson(c, n) for c, n in zip(correct[tried], trials[tried], strict=True)])
        ends = ends.reshape(-1, 2)
        axis.errorbar(
            lengths[tried] * factor ** (0.012 * (i - (len(maps) - 1) / 2)),
            100 * share,
            # Rounding can put an end beyond the share itself by a hair.
            yerr=100 * np.maximum(0, [share - ends[:, 0], ends[:, 1] - share]),
            linewidth=1.2,
            capsize=3,
            label=plain(heat_map.label),
            **style(i),
        )
    log_ticks(axis, maps[0].lengths, inches)
    mark_trained(axis, trained)
    axis.set_xlim(shown[0] / factor**0.06, shown[-1] * factor**0.06)
    axis.set_ylim(-4, 104)
    axis.grid(axis="y")
    axis.set_ylabel("right answers (%)")
    axis.set_title("All depths, with 95 % Wilson intervals")


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
