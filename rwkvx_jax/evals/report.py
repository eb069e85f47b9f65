"""Results of several runs on one page: self-contained HTML, and Markdown with figures beside it.

Files of one task, settings and tokenizer share a table; what differs keeps its own, so that no row
is compared with another that answered other questions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from rwkvx_jax.config import ConfigError
from rwkvx_jax.evals import grid
from rwkvx_jax.evals.intervals import Estimate
from rwkvx_jax.evals.models import IDENTITY_FIELDS, check_output
from rwkvx_jax.evals.pages import Compared, Section, as_html, as_markdown, figure_name
from rwkvx_jax.evals.plots import name_of
from rwkvx_jax.evals.results import Summarize, read_contents
from rwkvx_jax.evals.runner import open_console
from rwkvx_jax.evals.short import table as short_table
from rwkvx_jax.evals.tables import Table
from rwkvx_jax.evals.tasks import ar_hits, copying, long_loss, long_ppl, selection
from rwkvx_jax.evals.tasks.niah import TITLES
from rwkvx_jax.generate.terminal import one_line
from rwkvx_jax.perf import prefill, speed
from rwkvx_jax.records import PACKED_SUFFIX, SUFFIX, Record
from rwkvx_jax.storage import WorkPath, files_below, in_bucket, write_whole


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Collects results of several runs into report.html and report.md."""

    inputs: tyro.conf.Positional[tuple[WorkPath, ...]]
    """Results files (.jsonl, .jsonl.gz), or folders that hold some at any depth."""
    output: WorkPath
    """Folder of the report."""
    title: str = "Evaluation report"

    def __post_init__(self):
        if not self.inputs:
            raise ConfigError("name at least one results file or a folder of them")
        check_output(self.output)


class Run(NamedTuple):
    """A results file."""

    path: Path
    document: Record


def find_runs(inputs: Sequence[Path]) -> list[Run]:
    """The results files at these paths; those named directly must be some, others are passed over.

    Raises:
      ConfigError: a path that does not exist, a named file that is none, nothing found, or a
        results file that is damaged: of another shape, or with numbers that are not finite.
    """
    runs: list[Run] = []
    for path in inputs:
        if not path.exists():
            raise ConfigError(f"{path} does not exist")
        files = [path] if path.is_file() else _record_files(path)
        for file in files:
            document = read_results(file)
            if document is not None:
                runs.append(Run(file, document))
            elif file == path:
                raise ConfigError(f"{path} is no results file of eval.py")
    if not runs:
        raise ConfigError(f"no results file of eval.py in {', '.join(map(str, inputs))}")
    return runs


def _record_files(folder: Path) -> list[Path]:
    plain = set(files_below(folder, SUFFIX))
    packed = files_below(folder, PACKED_SUFFIX)
    return sorted(plain | {file for file in packed if file.with_suffix("") not in plain})


def read_results(file: Path) -> Record | None:
    """The document of a results file (see `results.Contents`), None for any other file.

    Raises:
      ConfigError: a damaged one.
    """
    if not file.name.endswith((SUFFIX, PACKED_SUFFIX)) or (contents := read_contents(file)) is None:
        return None
    task = contents.headers[0]["task"]
    try:
        document = contents.document(_shown(task).summarize)
        _section([Run(file, document)])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ConfigError(
            f"{file} names the task {task!r}, but has another shape than its results ({error!r}): "
            "remove it, or name the other files one by one"
        ) from error
    return document


def _figure_of(results: Path) -> Path:
    """Where the figure of a results file is."""
    return results.with_name(results.name.split(SUFFIX)[0] + ".png")


def sections(runs: Sequence[Run]) -> list[Section]:
    """The page's sections, in the order in which their tasks first occur."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        document = run.document
        tokenizers = sorted({model.get("tokenizer", "") for model in document["models"]})
        same = [document["task"], document["settings"], tokenizers]
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(run)
    return _told_apart([_section(own) for own in groups.values()])


def _told_apart(parts: list[Section]) -> list[Section]:
    """Sections of one title get what distinguishes their settings into it."""
    result = []
    for part in parts:
        others = [p for p in parts if p.title == part.title and p is not part]
        own = [note for note in part.notes if any(note not in p.notes for p in others)]
        title = f"{part.title} ({', '.join(own) or 'other settings'})" if others else part.title
        result.append(part._replace(title=title))
    return result


def _section(runs: list[Run]) -> Section:
    document = runs[0].document
    task = document["task"]
    models = [model for run in runs for model in _labelled(run, runs)]
    settings = document["settings"].items()
    notes = [f"{name}: {value}" for name, value in settings if not isinstance(value, dict)]
    tokenizers = sorted({model["tokenizer"] for model in models if "tokenizer" in model})
    notes += [f"tokenizer: {', '.join(tokenizers)}"] if tokenizers else []
    notes += [f"device: {', '.join(sorted({run.document['device'] for run in runs}))}"]
    return Section(
        title=_shown(task).title,
        notes=notes,
        table=_shown(task).table(models),
        figures=[
            (str(run.path.parent), _figure_of(run.path))
            for run in runs
            if _is_figure(_figure_of(run.path))
        ],
        commands=[one_line(run.document["command"]) for run in runs],
        compared=_compared(runs, _shown(task).measure),
    )


def _compared(runs: list[Run], measure: Measure | None) -> Compared | None:
    if measure is None:
        return None
    models: dict[str, Record] = {}
    found: dict[str, dict[tuple, Record]] = {}
    for document in (run.document for run in runs):
        for model in (model for model in document["models"] if model["trials"]):
            identity = json.dumps([model["label"], *(model.get(f) for f in IDENTITY_FIELDS)])
            models.setdefault(identity, model)
            own = found.setdefault(identity, {})
            own |= {tuple(t[f] for f in document["key"]): t for t in model["trials"]}
    common = sorted(set.intersection(*map(set, found.values()))) if found else []
    summarize = _shown(runs[0].document["task"]).summarize
    measured = {
        identity: measure.score(summarize([own[key] for key in common]))
        for identity, own in (found if common else {}).items()
    }
    scores = {identity: score for identity, score in measured.items() if score is not None}
    leader = measure.best((score.value for score in scores.values()), default=None)
    return Compared(
        f"{measure.name}; {measure.trials}: {len(common):,}",
        models,
        {identity: _interval(score, measure.digits) for identity, score in scores.items()},
        {i for i, score in scores.items() if score.value == leader and len(scores) > 1},
    )


def _interval(score: Estimate, digits: int) -> str:
    value, *ends = (None if x is None else f"{x:.{digits}f}" for x in score)
    return f"{value} ({ends[0]} to {ends[1]})" if ends[0] is not None else value


def _is_link(path: Path) -> bool:
    return not in_bucket(path) and path.is_symlink()


def _is_figure(path: Path) -> bool:
    """Whether a page may show a file: a PNG that lies there itself. A link could show any file of
    this machine to whoever reads the page."""
    if _is_link(path) or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_PNG)) == _PNG


def _labelled(run: Run, runs: list[Run]) -> list[Record]:
    """The models of a run; labels that occur in several runs tell their folder too."""
    if run.document["task"] in ("speed", "prefill"):  # rows of one model in several kinds
        return [dict(model, label=str(run.path.parent)) for model in run.document["models"]]
    others = {
        model["label"] for other in runs if other is not run for model in other.document["models"]
    }
    mark = lambda label: f" ({run.path.parent})" if label in others else ""
    return [dict(m, label=name_of(m) + mark(m["label"])) for m in run.document["models"]]


_PNG = b"\x89PNG\r\n\x1a\n"


class Measure(NamedTuple):
    """One number for a model: what sums up its summary, its name, and what it is a score of."""

    score: Callable[[Record], Estimate | None]
    name: str
    trials: str
    digits: int = 1
    best: Callable[..., Any] = max


class Shown(NamedTuple):
    """How a task is shown: its title, what sums up a model's trials, its table of models, and its
    measure in the summary."""

    title: str
    summarize: Summarize
    table: Callable[[list[Record]], Table]
    measure: Measure | None = None


_SHOWN = {
    "short": Shown(
        "Short-context benchmarks",
        short_table.summarize,
        short_table.table,
        Measure(short_table.score, "average score (%)", "questions"),
    ),
    "long-loss": Shown(
        "Loss by position",
        long_loss.summarize,
        long_loss.table,
        Measure(long_loss.score, "nats per token, less is better", "documents", 3, min),
    ),
    "ar-hits": Shown(
        "Recall in plain text",
        ar_hits.summarize,
        ar_hits.table,
        Measure(ar_hits.score, "nats per repeated token, less is better", "documents", 3, min),
    ),
    "copy": Shown(
        "What is left of a passage",
        copying.summarize,
        copying.table,
        Measure(copying.score, "gain at the longest distance, nats per token", "passages", 3),
    ),
    "longppl": Shown(
        "Use of long context",
        long_ppl.summarize,
        long_ppl.table,
        Measure(long_ppl.score, "gain over a window, nats per token", "documents", 3),
    ),
    "selection": Shown(
        "Selection of chunks",
        selection.summarize,
        selection.table,
        Measure(selection.score, "past mass held by the model's own selector (%)", "documents"),
    ),
    "speed": Shown("Decoding speed", speed.summarize, speed.table),
    "prefill": Shown("Reading a prompt", prefill.summarize, prefill.table),
}
_GRIDS = {"passkey": "Passkey retrieval", "lookup": "Facts in other wordings"}
_RIGHT = Measure(grid.score, "right answers (%)", "questions")


def measure_of(task: str) -> Measure | None:
    """What sums up a task's results, if one number does."""
    return _shown(task).measure


def _shown(task: str) -> Shown:
    """All other tasks are grids."""
    title = _GRIDS.get(task) or TITLES.get(task.removeprefix("niah_"))
    return _SHOWN.get(task) or Shown(title or task, grid.summarize, grid.table, _RIGHT)


def run(options: ReportOptions) -> None:
    """The command: writes report.html, report.md and the figures of the latter."""
    console = open_console()
    runs = find_runs(options.inputs)
    for figure in (_figure_of(run.path) for run in runs):
        if (_is_link(figure) or figure.exists()) and not _is_figure(figure):
            console.print(f"{figure} is left out: it is a link, or no PNG", soft_wrap=True)
    parts = sections(runs)
    options.output.mkdir(parents=True, exist_ok=True)
    for i, part in enumerate(parts):
        for j, (_, figure) in enumerate(part.figures):
            place = options.output / figure_name(i, j)
            place.parent.mkdir(exist_ok=True)
            write_whole(place, figure.read_bytes())
    for name, text in (
        ("report.md", as_markdown(options.title, parts)),
        ("report.html", as_html(options.title, parts)),
    ):
        write_whole(options.output / name, text.encode(errors="backslashreplace"))
        console.print(f"wrote {options.output / name}", soft_wrap=True)
