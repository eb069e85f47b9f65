"""Results of several runs on one page: self-contained HTML with figures, and Markdown tables.

Files of one task, settings and tokenizer share a table; what differs keeps its own, so that no row
is compared with another that answered other questions.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tyro

from rwkvx_jax.config import ConfigError
from rwkvx_jax.evals import grid
from rwkvx_jax.evals.models import check_output
from rwkvx_jax.evals.results import Summarize, read_contents
from rwkvx_jax.evals.runner import open_console
from rwkvx_jax.evals.short import table as short_table
from rwkvx_jax.evals.tables import Table
from rwkvx_jax.evals.tasks import long_loss, selection
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


class Section(NamedTuple):
    """What the page shows of runs that can be compared.

    notes: facts on the settings. figures: (caption, path of a PNG).
    """

    title: str
    notes: list[str]
    table: Table
    figures: list[tuple[str, Path]]
    commands: list[str]


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
    )


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
    mark = lambda label: f"{label} ({run.path.parent})" if label in others else label
    return [dict(model, label=mark(model["label"])) for model in run.document["models"]]


_PNG = b"\x89PNG\r\n\x1a\n"


class Shown(NamedTuple):
    """How a task is shown: its title, what sums up a model's trials, and its table of models."""

    title: str
    summarize: Summarize
    table: Callable[[list[Record]], Table]


_SHOWN = {
    "short": Shown("Short-context benchmarks", short_table.summarize, short_table.table),
    "long-loss": Shown("Loss by position", long_loss.summarize, long_loss.table),
    "selection": Shown("Selection of chunks", selection.summarize, selection.table),
    "speed": Shown("Decoding speed", speed.summarize, speed.table),
    "prefill": Shown("Reading a prompt", prefill.summarize, prefill.table),
}


def _shown(task: str) -> Shown:
    """All other tasks are grids."""
    title = "Passkey retrieval" if task == "passkey" else TITLES.get(task.removeprefix("niah_"))
    return _SHOWN.get(task) or Shown(title or task, grid.summarize, grid.table)


def as_markdown(title: str, parts: Sequence[Section]) -> str:
    """The tables as GitHub shows them."""
    lines = [f"# {_escape(title)}"]
    for part in parts:
        lines += ["", f"## {_escape(part.title)}", "", _escape("; ".join(part.notes)), ""]
        lines.append("| " + " | ".join(map(_escape, part.table.columns)) + " |")
        lines.append("|---" + "|---:" * (len(part.table.columns) - 1) + "|")
        lines += ["| " + " | ".join(map(_escape, row)) + " |" for row in part.table.rows]
        lines += ["", *[f"    {command}" for command in part.commands]]
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    """Text of which Markdown makes nothing but itself."""
    return _MARKDOWN.sub(r"\\\g<0>", one_line(text))


_MARKDOWN = re.compile(r"[\\`*_\[\]<>#|~$&!]")

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
       max-width: 76rem; margin: 2rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
nav a { margin-right: 1rem; }
.notes { color: #555; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .75rem; border-bottom: 1px solid #ddd; text-align: right;
         white-space: nowrap; }
th { border-bottom: 2px solid #888; vertical-align: bottom; font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1.25rem 0; } img { max-width: 100%; height: auto; }
figcaption, code { font-size: .85rem; color: #555; }
code { display: block; white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def _plain(text: str) -> str:
    """Text of which HTML makes nothing but itself."""
    return html.escape(one_line(text))


def as_html(title: str, parts: Sequence[Section]) -> str:
    """One page that needs no other file: figures are inside it."""
    links = " ".join(f'<a href="#part{i}">{_plain(part.title)}</a>' for i, part in enumerate(parts))
    body = "".join(_html_section(i, part) for i, part in enumerate(parts))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_plain(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{_plain(title)}</h1><nav>{links}</nav>{body}</body></html>\n"
    )


def _html_section(number: int, part: Section) -> str:
    cells = lambda row, tag: "".join(f"<{tag}>{_plain(text)}</{tag}>" for text in row)
    rows = "".join(f"<tr>{cells(row, 'td')}</tr>\n" for row in part.table.rows)
    figures = "".join(
        f'<figure><img alt="{_plain(part.title)}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}">'
        f"<figcaption>{_plain(caption)}</figcaption></figure>"
        for caption, path in part.figures
    )
    commands = "".join(f"<code>{_plain(command)}</code>" for command in part.commands)
    return (
        f'\n<section id="part{number}"><h2>{_plain(part.title)}</h2>'
        f'<p class="notes">{_plain("; ".join(part.notes))}</p>'
        f'<div class="wide"><table><thead><tr>{cells(part.table.columns, "th")}</tr></thead>\n'
        f"<tbody>{rows}</tbody></table></div>{figures}{commands}</section>"
    )


def run(options: ReportOptions) -> None:
    """The command: writes report.html and report.md."""
    console = open_console()
    runs = find_runs(options.inputs)
    for figure in (_figure_of(run.path) for run in runs):
        if (_is_link(figure) or figure.exists()) and not _is_figure(figure):
            console.print(f"{figure} is left out: it is a link, or no PNG", soft_wrap=True)
    parts = sections(runs)
    options.output.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("report.md", as_markdown(options.title, parts)),
        ("report.html", as_html(options.title, parts)),
    ):
        write_whole(options.output / name, text.encode(errors="backslashreplace"))
        console.print(f"wrote {options.output / name}", soft_wrap=True)
