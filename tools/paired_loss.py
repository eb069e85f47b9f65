"""Two models of a results file of `eval.py long-loss`, piece by piece: a table in Markdown.

    python tools/paired_loss.py results/documents/0/long_loss.jsonl

Differences are the second model minus the first, means over the pieces that both have read, with
1.96 standard errors.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from rwkvx_jax.evals.results import read_contents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="long_loss.jsonl with two models")
    path = parser.parse_args().results
    contents = read_contents(path)
    labels = [] if contents is None else list(contents.models)
    if contents is None or len(labels) != 2:
        raise SystemExit(f"{path} has {len(labels)} models: give results of two")
    first, second = (
        {(trial["file"], trial["start"]): trial for trial in contents.trials(label)}
        for label in labels
    )
    pieces = sorted(first.keys() & second.keys())
    if len(pieces) < 2 or "losses" not in first[pieces[0]]:
        raise SystemExit(f"{path} has {len(pieces)} pieces of long-loss that both models have read")
    print(f"| bytes of {len(pieces)} pieces | {labels[0]} | {labels[1]} | difference |")
    print("|---|---|---|---|")
    edges = first[pieces[0]]["edges"]
    spans = ["all", *(f"{a:,} to {b:,}" for a, b in zip(edges, edges[1:], strict=False))]
    table = lambda model: np.asarray([[model[p]["loss"], *model[p]["losses"]] for p in pieces])
    for span, ours, theirs in zip(spans, table(first).T, table(second).T, strict=True):
        print(f"| {span} | {ours.mean():.4f} | {theirs.mean():.4f} | {difference(ours, theirs)} |")


def difference(first: np.ndarray, second: np.ndarray) -> str:
    """The mean of second - first, and 1.96 standard errors of it."""
    apart = second - first
    return f"{apart.mean():.4f} ± {1.96 * apart.std(ddof=1) / len(apart) ** 0.5:.4f}"


if __name__ == "__main__":
    main()
