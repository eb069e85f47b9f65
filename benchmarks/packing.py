"""What packing documents into windows costs, how much padding it leaves, and a picture of it.

    python benchmarks/packing.py
    python benchmarks/packing.py --figure docs/figures/packing.png

The first form makes documents of random lengths (log-normal), packs them, stores the packing,
opens it again and reads windows. It compares the padding with that of samples="document". The
second form draws random windows of the embedded corpus, one byte a token.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from rwkvx_jax.data.binidx import Binidx, write_index
from rwkvx_jax.data.packing import Cache, open_packing
from rwkvx_jax.data.samples import Documents, OneSegment, Packed
from rwkvx_jax.data.sources import open_corpus
from rwkvx_jax.data.token_cache import cached
from rwkvx_jax.tokenizer import load_tokenizer

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
LENGTH, ALIGN, ROWS = 16384, 1024, 6  # of the figure's windows, and how many of them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--median", type=int, default=600, help="tokens of half of the documents")
    parser.add_argument("--length", type=int, default=4096, help="positions of a window")
    parser.add_argument("--align", type=int, default=1, help="starts of documents: multiples of it")
    parser.add_argument("--figure", type=Path, help="the PNG to write instead")
    options = parser.parse_args()
    for name in ("documents", "median", "length", "align"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}: it must be at least 1")
    if options.length % options.align:
        parser.error(f"--align {options.align} does not divide --length {options.length}")
    if options.figure is None:
        measure(options.documents, options.median, options.length, options.align)
    else:
        draw(options.figure)


def measure(documents: int, median: int, length: int, align: int) -> None:
    rng = np.random.default_rng(0)
    sizes = np.maximum(1, rng.lognormal(np.log(median), 1.0, documents).astype(np.int64))
    print(f"{documents:,} documents, {sizes.sum():,} tokens; windows of {length:,} tokens")
    with tempfile.TemporaryDirectory() as folder:
        stream = write_tokens(Path(folder) / "tokens", sizes)
        cache = Cache(Path(folder), writer=True)
        pack = lambda: open_packing(stream, 0, len(stream), length, align, 0, cache)
        with timed("packed and stored"):
            windows = pack()
        open_packing.cache_clear()
        with timed("opened again, compared with its hashes"):
            windows = pack()
        samples = Packed(stream, windows, 0, len(stream), length, align)
        places = rng.integers(0, len(samples), 1000)
        with timed("1000 windows read, in random order"):
            for place in places:
                samples[place]
        print(samples)
    whole = np.minimum(sizes, length)
    print(
        f'samples="document": {documents:,} windows, {100 * (1 - whole.mean() / length):.2f} % '
        f"padding, {100 * (1 - whole.sum() / sizes.sum()):.2f} % of the tokens cut off"
    )


def write_tokens(prefix: Path, sizes: np.ndarray) -> Binidx:
    """A stream of zeros; the file has no contents on the disk."""
    with prefix.with_suffix(".bin").open("wb") as file:
        file.truncate(int(sizes.sum()) * 2)
    with prefix.with_suffix(".idx").open("wb") as file:
        write_index(file, sizes, np.dtype(np.uint16))
    return Binidx(prefix)


class timed:
    """Prints how long a block took."""

    def __init__(self, what: str):
        self._what = what

    def __enter__(self):
        self._begin = time.perf_counter()

    def __exit__(self, *_):
        print(f"{time.perf_counter() - self._begin:8.3f} s  {self._what}")


def draw(path: Path) -> None:
    """Windows as rows: a bar for each document, grey where there is padding."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    with tempfile.TemporaryDirectory() as folder:
        stream, _ = cached(open_corpus("text", ""), load_tokenizer("byte"), Path(folder))
        cache = Cache(Path(folder), writer=True)
        open_packed = lambda align: Packed(
            stream,
            open_packing(stream, 0, len(stream), LENGTH, align, 0, cache),
            *(0, len(stream), LENGTH, align),
        )
        ways = {
            'samples="packed"': open_packed(1),
            f'samples="packed", align_documents={ALIGN}': open_packed(ALIGN),
            'samples="document"': OneSegment(Documents(stream, 0, len(stream), LENGTH)),
        }
        panels = zip(figure.subplots(len(ways), sharex=True), ways.items(), strict=True)
        for axes, (title, samples) in panels:
            rows = [samples[i]["segment_ids"] for i in range(len(samples))]
            chosen = np.random.default_rng(1).permutation(len(rows))[:ROWS]
            draw_rows(axes, [rows[i] for i in chosen])
            padding = 100 * np.mean([row == 0 for row in rows])
            title = f"{title}: {len(rows)} windows, {padding:.1f} % padding"
            axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel("position in the window, tokens", fontsize=9)
    figure.supylabel(f"{ROWS} of the windows", fontsize=9)
    figure.savefig(path, dpi=150)
    print(path)


def draw_rows(axes, rows: list[np.ndarray]) -> None:
    for place, ids in enumerate(rows):
        axes.barh(place, LENGTH, color="#EEEEEE", height=0.8)
        for number in range(1, ids.max() + 1):
            (here,) = np.nonzero(ids == number)
            color = COLORS[(number - 1) % len(COLORS)]
            style = {"color": color, "edgecolor": "white", "linewidth": 0.4, "height": 0.8}
            axes.barh(place, len(here), left=here[0], **style)
    axes.set(xlim=(0, LENGTH), yticks=[])
    axes.tick_params(labelsize=9)
    axes.invert_yaxis()


if __name__ == "__main__":
    main()
