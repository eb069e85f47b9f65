"""The models of configs/twins_4k.py side by side: a table in Markdown and a figure.

    python tools/twins_table.py results/twins --speed results/twins/speed.json --output twins.png

Reads the trials that results/twins.sh wrote, a folder a model (`kda`, `kda-alone`, `kda@1`), and
what `benchmarks/twins.py --output` wrote. Seeds of a model share a row: the share of pairs is that
of all their trials together, a loss the mean over the seeds, with each seed's behind it.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rwkvx_jax.evals.intervals import wilson
from rwkvx_jax.evals.results import Contents, read_contents

NAMES = {
    "rwkv7": "RWKV-7",
    "gated_deltanet": "Gated DeltaNet",
    "mamba2": "Mamba-2",
    "kda": "KDA",
    "rwkv6": "RWKV-6",
    "rwkv5": "RWKV-5",
    "rwkv4": "RWKV-4",
    "deltanet": "DeltaNet",
    "lightning": "Lightning attention",
}
OTHERS = {
    "transformer": "Transformer, full attention",
    "transformer-sparse": "Transformer, sparse attention",
}
LENGTHS = 4096, 16384
HEAD = (
    "| model | seeds | 64 pairs, 4,096 | 64 pairs, 16,384 | loss, 16,384 | all repeated "
    "| all others | tokens/s | decode, ms |"
)
MISSING = "–"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="the folder that holds a folder a model")
    parser.add_argument("--speed", type=Path, help="what benchmarks/twins.py wrote")
    parser.add_argument("--output", type=Path, help="the PNG to write")
    options = parser.parse_args()
    seeds: dict[str, list[Path]] = defaultdict(list)
    for folder in sorted(path for path in options.results.iterdir() if path.is_dir()):
        seeds[folder.name.partition("@")[0]].append(folder)
    if unknown := sorted(set(seeds) - set(titles())):
        parser.error(f"{options.results} holds {unknown}: no models of configs/twins_4k.py")
    speed = {}
    if options.speed:
        rows = json.loads(options.speed.read_text())["rows"]
        speed = {row["variant"]: (row["tokens_per_second"], row["decode_ms"]) for row in rows}
    print(HEAD, "|---" * HEAD.count("| ") + "|", sep="\n")
    for variant in filter(seeds.get, titles()):
        print(row_of(variant, seeds[variant], speed.get(variant)))
    if options.output:
        draw(seeds, options.output)
        print(options.output)


def titles() -> dict[str, str]:
    """What the table calls each variant, in its order."""
    hybrids = {name: f"{title} + sparse attention" for name, title in NAMES.items()}
    alone = {f"{name}-alone": f"{title} alone" for name, title in NAMES.items()}
    return hybrids | alone | OTHERS


def trials_of(folder: Path, kind: str) -> list[dict]:
    """The trials of one model and one task; none where it was not evaluated."""
    trials = []
    for path in sorted((folder / kind).glob("*.jsonl")):
        contents: Contents | None = read_contents(path)
        if contents is None:
            raise SystemExit(f"{path} holds no trials: evaluate again with results/twins.sh")
        for label in contents.models:
            trials += contents.trials(label)
    return trials


def pairs(folders: Iterable[Path], length: int) -> tuple[float, int]:
    """Pairs found by all seeds, and pairs asked for."""
    scores = [
        trial["correct"]
        for folder in folders
        for trial in trials_of(folder, "pairs")
        if trial["length"] == length
    ]
    return sum(scores), len(scores)


def loss(folder: Path) -> float | None:
    """Mean loss over the pieces of the book, nats a byte."""
    trials = trials_of(folder, "loss")
    return float(np.mean([trial["loss"] for trial in trials])) if trials else None


def hits(folder: Path) -> tuple[float | None, float | None]:
    """Loss of the bytes that end a repetition, and of all others, nats a byte."""
    trials = trials_of(folder, "hits")
    if not trials:
        return None, None
    repeated = [octave for trial in trials for octave in trial["distance"]]
    return mean_loss(repeated), mean_loss([trial["others"] for trial in trials])


def mean_loss(sums: list[dict]) -> float:
    """Of sums of losses over numbers of tokens."""
    return sum(each["loss"] for each in sums) / sum(each["tokens"] for each in sums)


def row_of(variant: str, folders: list[Path], speed: tuple[float, float] | None) -> str:
    shares = []
    for length in LENGTHS:
        correct, asked = pairs(folders, length)
        low, high = (round(100 * bound) for bound in wilson(correct, asked))
        shares.append(f"{100 * correct / asked:.0f} ({low}–{high})" if asked else MISSING)
    losses = [several(loss(folder) for folder in folders)]
    losses += [several(values) for values in zip(*map(hits, folders), strict=True)]
    times = (f"{speed[0]:,.0f}", f"{speed[1]:.2f}") if speed else (MISSING, MISSING)
    cells = (titles()[variant], str(len(folders)), *shares, *losses, *times)
    return "| " + " | ".join(cells) + " |"


def several(values: Iterable[float | None]) -> str:
    """The mean, and in brackets the value of each seed that has one, where there are several."""
    known = [value for value in values if value is not None]
    if not known:
        return MISSING
    each = f" ({', '.join(f'{value:.3f}' for value in known)})" if len(known) > 1 else ""
    return f"{np.mean(known):.3f}{each}"


def draw(seeds: dict[str, list[Path]], path: Path) -> None:
    """Pairs found and loss of each hybrid and of its recurrence alone, a mark a seed."""
    known = [name for name in [*NAMES, *OTHERS] if seeds.get(name)]
    figure = Figure(figsize=(7.2, 0.6 + 0.38 * len(known)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    kinds = (("", "o", "#0072B2", "with attention"), ("-alone", "x", "#D55E00", "recurrence alone"))
    for kind, marker, color, label in kinds:
        for place, name in enumerate(known):
            for folder in seeds.get(name + kind, ()):
                style = {"marker": marker, "color": color, "linestyle": "none"}
                style |= {"label": label, "markersize": 5, "alpha": 0.8}
                correct, asked = pairs([folder], LENGTHS[1])
                if asked:
                    left.plot(100 * correct / asked, place, **style)
                if (value := loss(folder)) is not None:
                    right.plot(value, place, **style)
    left.set_yticks(range(len(known)), [NAMES.get(name) or OTHERS[name] for name in known])
    left.invert_yaxis()
    left.set(xlabel="64 pairs found, %", xlim=(-5, 105))
    right.set(xlabel="loss on Dracula, nats a byte")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    handles = dict(zip(*reversed(left.get_legend_handles_labels()), strict=True))
    left.legend(handles.values(), handles.keys(), fontsize=8, loc="lower right")
    figure.suptitle(
        "16,384 bytes, four times the longest trained length; a mark a seed", fontsize=10
    )
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
