"""Draws the losses of one or more runs over the tokens that they have read.

    python tools/loss_curve.py runs/books --output loss.png

Thin line: the loss of each recorded step; thick line: its running mean; points: the held-out loss;
dashed: borders between stages. Reads `metrics.jsonl` and `config.json` of each work directory, of
unfinished runs too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # told apart by colour-blind readers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdirs", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True, help="the PNG to write")
    parser.add_argument("--window", type=int, default=20, help="steps of the running mean")
    options = parser.parse_args()
    if options.window < 1:
        parser.error(f"--window is {options.window}: it must be at least 1")
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, workdir in enumerate(options.workdirs):
        try:
            config, records = read(workdir)
        except (OSError, json.JSONDecodeError) as error:
            parser.error(f"{workdir} is not the work directory of a run: {error}")
        label = f"{workdir.name}, " if len(options.workdirs) > 1 else ""
        draw(axes, config["stages"], records, options.window, COLORS[index % len(COLORS)], label)
    axes.set(xlabel="training tokens, thousands", ylabel="cross-entropy per token, nats")
    axes.legend()
    figure.savefig(options.output, dpi=150)
    print(options.output)


def read(workdir: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The config and the metrics of a run."""
    config = json.loads((workdir / "config.json").read_text())
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    return config, [json.loads(line) for line in lines if line.endswith("\n")]


def tokens_at(stages: list[dict[str, Any]], step: int) -> float:
    """Thousands of tokens read in the first `step` steps of a run."""
    total = 0
    for stage in stages:
        done = min(step, stage["steps"])
        total, step = total + done * stage["seq_len"] * stage["global_batch"], step - done
    return total / 1000


def draw(axes, stages, records, window: int, color: str, label: str) -> None:
    """One run's lines, points and stage borders."""
    steps = [r for r in records if r.get("loss") is not None]
    at = np.asarray([tokens_at(stages, r["step"]) for r in steps])
    loss = np.asarray([r["loss"] for r in steps])
    axes.plot(at, loss, color=color, alpha=0.3, linewidth=0.7)
    if len(loss) >= window:
        mean = np.convolve(loss, np.full(window, 1 / window), "valid")
        axes.plot(at[window - 1 :], mean, color=color, label=f"{label}mean of {window} steps")
    held = [r for r in records if "held_out_loss" in r]
    x = [tokens_at(stages, r["step"]) for r in held]
    axes.plot(x, [r["held_out_loss"] for r in held], "o", color=color, label=f"{label}held out")
    end = 0
    for stage in stages:
        axes.text(
            tokens_at(stages, end),
            0.99,
            f" {stage['name']}",
            transform=axes.get_xaxis_transform(),
            rotation=90,
            va="top",
            ha="left",
            fontsize="small",
            color="0.4",
        )
        end += stage["steps"]
        axes.axvline(tokens_at(stages, end), color="0.7", linestyle="--", linewidth=0.8)


if __name__ == "__main__":
    main()
