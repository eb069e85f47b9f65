"""Figures of every kind: nothing cut off or overlapping, one font size, marks at their places."""

from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rwkvx_jax.config import to_dict
from rwkvx_jax.evals import curves, plots
from rwkvx_jax.evals.plots import HeatMap, name_of, part_of
from rwkvx_jax.evals.short import table as short_table
from rwkvx_jax.evals.tasks import ar_hits, copying, long_loss, long_ppl, selection
from rwkvx_jax.perf import prefill, speed
from tests.evals.eval_models import TINY

LONG_NAME = "a_checkpoint_of_a_rather_long_run_with_many_words_in_its_name_" * 2
CONFIG = to_dict(TINY)


def model(label="m.safetensors", trained=65536, trials=(), summarize=lambda trials: {}, **config):
    """A model of a results file."""
    known = {"label": label, "trained_length": trained, "tokenizer": "byte"}
    known |= {"model": CONFIG | config}
    return known | {"trials": list(trials), "summary": summarize(list(trials))}


def results(models, plan, **settings):
    return SimpleNamespace(document={"models": models, "plan": plan, "settings": settings})


def heat_maps(lengths, depths, trained):
    ones = np.ones((len(lengths), depths), int)
    shares = tuple(np.linspace(0, 1, depths))
    names = ["RWKV-X: m", f"RWKV-7: {LONG_NAME}", "RWKV-X: n", "RWKV-X: o"]
    note = "step 3,012, trained on up to 65,536 tokens, first 7 of 12 trials"
    return [
        HeatMap(name, note, lengths, shares, ones, ones, t)
        for name, t in zip(names, trained, strict=False)
    ]


def draw_heat_maps(path, lengths=(1024, 4096), depths=5, trained=(65536,)):
    labels = {"title": f"t\n{'words ' * 60}", "x_label": "prompt length (byte tokens)"}
    maps = heat_maps(lengths, depths, trained)
    plots.draw(maps, path, y_label="depth of the key (% of the filler)", **labels)


def draw_long_loss(path):
    edges = long_loss.bin_edges(65536)
    trial = {"loss": 2.0, "edges": edges, "losses": [2.0] * (len(edges) - 1)}
    trials = [trial, trial | {"loss": 2.1}]
    models = [model(trials=trials, summarize=long_loss.summarize), model("b" * 90, 4096)]
    models[1] |= {"trials": trials[:1], "summary": long_loss.summarize(trials[:1])}
    long_loss.draw(results(models, {"documents": 2}, length=65536), path)


def draw_ar_hits(path):
    part = {"tokens": 5, "loss": 8.0}
    trial = {"others": part, "distance": [part] * 16, "times": [part]}
    empty = trial | {"distance": [{"tokens": 0, "loss": 0.0}]}  # nothing came twice
    trials = [trial, trial | {"others": {"tokens": 9, "loss": 8.0}}]
    models = [
        model(trials=trials, summarize=ar_hits.summarize),
        model("b" * 90, 4096, trials=trials[:1], summarize=ar_hits.summarize),
        model("c", None, trials=[empty], summarize=ar_hits.summarize),
    ]
    ar_hits.draw(results(models, {"documents": 2}, length=65536, ngram=8), path)


def draw_copy(path):
    losses = {"loss": 1.0, "loss_without": 1.5, "right": 0.5, "right_without": 0.25}
    trials = [losses | {"distance": distance} for distance in (0, 256, 256, 16384)]
    models = [
        model(trials=trials, summarize=copying.summarize),
        model("b" * 90, 4096, trials=trials[:1], summarize=copying.summarize),
    ]
    copying.draw(results(models, {"documents": 4}, length=256), path)


def draw_long_ppl(path):
    sums = {"losses": [4.0, 5.0], "losses_short": [5.0, 4.0]}
    keys = {"key_tokens": 3, "key_loss": 1.0, "key_loss_short": 9.0}
    trials = [{"edges": [2048, 4096, 8192]} | sums | keys] * 2
    models = [
        model(trials=trials, summarize=long_ppl.summarize),
        model("b" * 90, 4096, trials=trials[:1], summarize=long_ppl.summarize),
    ]
    settings = {"length": 8192, "window": 1024, "stride": 512}
    long_ppl.draw(results(models, {"documents": 2}, **settings), path)


def draw_short(path):
    names = [*short_table.NAMES, "mmlu_b", "another_task_of_lm_eval"]
    answers = [(t, i) for t in names for i in range(3)]
    trials = [{"task": t, "document": i, "metrics": {"acc": i / 2}} for t, i in answers]
    models = [model(trials=trials, summarize=short_table.summarize), model(LONG_NAME)]
    models[1] |= {"trials": trials, "summary": models[0]["summary"]}
    short_table.draw(results(models, {"documents": dict.fromkeys(names, 21_848)}), path)


def draw_selection(path):
    found = {m: [[[0.5, 0.4]]] for m in selection.MEASURES} | {"held": [[[0.1] * 11]]}
    names = ("own", "mean", "max", "pooled", "bounds", "recent", "oracle")
    trial = {"queries": [2, 1], "mass": [[[0.1] * 12]], "selectors": dict.fromkeys(names, found)}
    models = [model(trials=[trial], summarize=selection.summarize, chunk_size=32, top_k=4)]
    models += [models[0] | {"label": LONG_NAME}]
    selection.draw(results(models, {"documents": 4}, length=65536), path)


def timed():
    return SimpleNamespace(config=TINY, description={"device": "TPU v5 lite", "cores": 224})


def draw_prefill(path):
    lengths = [1024 * 2**i for i in range(11)]
    seconds = {"sparse": 1.0, "rwkv": 0.5, "full": 2.0}
    rows = [{"kind": k, "length": n, "seconds": s} for k, s in seconds.items() for n in lengths]
    prefill.draw(rows, timed(), path)


def draw_speed(path):
    row = {"milliseconds": 2.0, "bytes": 1e6, "bandwidth": 1e9}
    contexts = (1024, 8192, 65536, 1048576)
    rows = [row | {"kind": k, "context": c} for k in ("sparse", "rwkv") for c in contexts]
    speed._draw(rows, timed(), path)


def draw_many_lengths(path):
    draw_heat_maps(path, tuple(range(2000, 32001, 2000)), 2, (4096, 1048576))


def draw_one_length(path):
    draw_heat_maps(path, (1048576,), 5, (65536, 16384, None))


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws, and returns the figure instead of writing it."""
    figures = []
    for module in (plots, curves, short_table, selection, prefill, speed):
        monkeypatch.setattr(module, "save", lambda figure, path: figures.append(figure))

    def draw(function, **flags) -> Figure:
        function(tmp_path / "x.png", **flags)
        FigureCanvasAgg(figures[-1]).draw()
        return figures[-1]

    return draw


def tick_labels(axis, low, high):
    places = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
    return [label for place, label in places if low <= place <= high]


def texts_of(figure):
    """Texts that are shown: titles, labels, ticks in view, and legends; not those in heat maps."""
    found = [figure._suptitle, *(t for own in figure.legends for t in own.get_texts())]
    for axes in figure.axes:
        found += [axes.title, axes.xaxis.label, axes.yaxis.label]
        found += tick_labels(axes.xaxis, *sorted(axes.get_xlim()))
        found += tick_labels(axes.yaxis, *sorted(axes.get_ylim()))
    return [text for text in found if text.get_text()]


KINDS = [
    draw_heat_maps,
    draw_many_lengths,
    draw_one_length,
    draw_long_loss,
    draw_ar_hits,
    draw_copy,
    draw_long_ppl,
    draw_short,
    draw_selection,
    draw_prefill,
    draw_speed,
]


@pytest.mark.thorough
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_nothing_is_cut_off_or_overlaps(drawn, kind):
    figure = drawn(kind)
    texts = texts_of(figure)
    assert {text.get_fontsize() for text in texts} == {9}
    boxes = [(text, text.get_window_extent()) for text in texts]
    for text, box in boxes:
        x, y = box.intervalx, box.intervaly
        assert min(*x, *y) >= -1 and x.max() <= figure.bbox.width + 1, text
        assert y.max() <= figure.bbox.height + 1, text
    level = [(t, b.padded(-1)) for t, b in boxes if t.get_rotation() in (0, 90)]
    for i, (text, box) in enumerate(level):
        for other, its_box in level[i + 1 :]:
            assert not box.overlaps(its_box), (text, other)
    (legend,) = figure.legends
    for axes in figure.axes:
        assert not legend.get_window_extent().overlaps(axes.get_window_extent())
        for label in (axes.xaxis.label, axes.yaxis.label):
            across = "width" if label is axes.xaxis.label else "height"
            size, room = label.get_window_extent(), axes.get_window_extent()
            assert not label.get_text() or getattr(size, across) <= getattr(room, across), label


def test_the_trained_length_is_marked_where_it_is(drawn):
    figure = drawn(draw_heat_maps, lengths=(1024, 4096), trained=(65536, 2048))
    first, second, _, lines = sorted(figure.axes, key=lambda axes: axes.get_title() == "")[:4]
    marks = lambda axes: [x[0] for line in axes.lines if len(x := line.get_xdata()) == 2]
    (lines,) = [axes for axes in figure.axes if axes.get_title().startswith("All depths")]
    dashed = [line.get_xdata()[0] for line in lines.lines if line.get_linestyle() == "--"]
    assert dashed == [2048, 65536] and lines.get_xlim()[1] > 65536
    assert marks(first) == [] and set(marks(second)) == {0.5}, "between the columns"


def test_logarithmic_ticks_are_those_of_the_tables(drawn):
    figure = drawn(draw_speed)
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels == ["1,024", "8,192", "65,536", "1,048,576"]


def test_models_are_called_what_they_are():
    assert name_of(model()) == "RWKV-X: m"
    assert name_of(model(attention="full")) == "RWKV-X with full attention: m"
    assert name_of(model(num_attention_blocks=0)) == "RWKV-7: m"
    assert name_of(model(mixer="kda")) == "KDA with sparse attention: m"
    assert name_of(model(mixer="kda", attention="full")) == "KDA with full attention: m"
    assert name_of(model(mixer="mamba2", num_attention_blocks=0)) == "Mamba-2: m"
    off = model("m.safetensors, attention blocks off", num_attention_blocks=0)
    assert name_of(off) == "RWKV-X: m, attention blocks off"


def test_a_part_is_called_one():
    assert part_of(3, 1000, "documents") == "first 3 of 1,000 documents"
    assert part_of(3, 3, "documents") == ""
