"""The report's pages: sections of tables and figures, and their summary, as HTML and Markdown."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rwkvx_jax.evals.plots import name_of
from rwkvx_jax.evals.tables import Table
from rwkvx_jax.generate.terminal import one_line
from rwkvx_jax.records import Record


class Compared(NamedTuple):
    """Scores of models over the trials that all of them have finished.

    measure: what the score is, and of how many trials. models: descriptions. scores: texts with
    intervals, none where there is no such trial. best: whose scores are the best. All by identity.
    """

    measure: str
    models: dict[str, Record]
    scores: dict[str, str]
    best: set[str]


class Section(NamedTuple):
    """What the page shows of runs that can be compared.

    notes: facts on the settings. figures: (caption, path of a PNG). compared: the section's row of
    the summary, None where it has none.
    """

    title: str
    notes: list[str]
    table: Table
    figures: list[tuple[str, Path]]
    commands: list[str]
    compared: Compared | None


class Summary(NamedTuple):
    """Models by tasks.

    columns: names of the models. rows: the number of a section, what it measures, and a text for
    each model with whether it is the best.
    """

    columns: list[str]
    rows: list[tuple[int, str, list[tuple[str, bool]]]]


def summary_of(parts: Sequence[Section]) -> Summary:
    """The page's first table. A row compares only trials that all its models have finished."""
    compared = [(i, part.compared) for i, part in enumerate(parts) if part.compared is not None]
    models = {k: model for _, row in compared for k, model in row.models.items()}
    rows = [
        (i, row.measure, [(row.scores.get(k, "–"), k in row.best) for k in models])
        for i, row in compared
    ]
    return Summary(_names(list(models.values())), rows)


def _names(models: Sequence[Record]) -> list[str]:
    """Names of models; those that several have tell their checkpoint, or their parameters, too."""
    names = [name_of(model) for model in models]
    for field in ("checkpoint", "parameters"):
        names = [
            f"{name} ({model[field]})" if names.count(name) > 1 else name
            for name, model in zip(names, models, strict=True)
        ]
    return names


_TOLD = (
    "Scores with 95 % intervals. Each row compares the trials that all its models have finished. "
    "The best score of a row is bold. A model whose interval contains it may be as good."
)


def figure_name(section: int, number: int) -> str:
    """Where the report keeps a figure, beside itself."""
    return f"figures/{section + 1}_{number + 1}.png"


def as_markdown(title: str, parts: Sequence[Section]) -> str:
    """The tables as GitHub shows them; figures are files (see `figure_name`)."""
    lines, summary = [f"# {_escape(title)}"], summary_of(parts)
    if summary.rows:
        bold = lambda text, best: f"**{_escape(text)}**" if best else _escape(text)
        lines += ["", "## Summary", "", _escape(_TOLD), ""]
        lines += _markdown_head(["", *summary.columns])
        for i, measure, cells in summary.rows:
            first = _escape(f"{parts[i].title}: {measure}")
            lines.append("| " + " | ".join([first, *(bold(*cell) for cell in cells)]) + " |")
    for i, part in enumerate(parts):
        lines += ["", f"## {_escape(part.title)}", "", _escape("; ".join(part.notes)), ""]
        lines += _markdown_head(part.table.columns)
        lines += ["| " + " | ".join(map(_escape, row)) + " |" for row in part.table.rows]
        for j, (caption, _) in enumerate(part.figures):
            lines += ["", f"![{_escape(caption)}]({figure_name(i, j)})"]
        lines += ["", *[f"    {command}" for command in part.commands]]
    return "\n".join(lines) + "\n"


def _markdown_head(columns: list[str]) -> list[str]:
    return [
        "| " + " | ".join(map(_escape, columns)) + " |",
        "|---" + "|---:" * (len(columns) - 1) + "|",
    ]


def _escape(text: str) -> str:
    """Text of which Markdown makes nothing but itself."""
    return _MARKDOWN.sub(r"\\\g<0>", one_line(text))


_MARKDOWN = re.compile(r"[\\`*_\[\]<>#|~$&!]")

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
       max-width: 76rem; margin: 2rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
h1, h2, p, nav, figcaption, code { overflow-wrap: anywhere; }
nav { margin-top: 1.5rem; } nav a { display: block; }
.notes, figcaption, code { color: #555; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .75rem; border-bottom: 1px solid #ddd; text-align: right;
         white-space: nowrap; }
th { border-bottom: 2px solid #888; vertical-align: bottom; font-weight: 600; }
th, td:first-child { white-space: normal; min-width: 7em; }
th:first-child, td:first-child { text-align: left; min-width: 18em; }
figure { margin: 1.25rem 0; } img { max-width: 100%; height: auto; }
figcaption, code { font-size: .85rem; }
code { display: block; white-space: pre-wrap; }
@media (max-width: 640px) {
  body { margin: 1rem auto; padding: 0 .75rem; }
  th, td { padding: .3rem .4rem; white-space: normal; min-width: 5.5em; }
  th:first-child, td:first-child { min-width: 9em; }
  img { max-width: none; width: 44rem; }
}
"""


def _plain(text: str) -> str:
    """Text of which HTML makes nothing but itself."""
    return html.escape(one_line(text))


def as_html(title: str, parts: Sequence[Section]) -> str:
    """One page that needs no other file: figures are inside it."""
    links = " ".join(f'<a href="#part{i}">{_plain(part.title)}</a>' for i, part in enumerate(parts))
    body = _html_summary(parts) + f"<nav>{links}</nav>"
    body += "".join(_html_section(i, part) for i, part in enumerate(parts))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_plain(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{_plain(title)}</h1>{body}</body></html>\n"
    )


def _html_summary(parts: Sequence[Section]) -> str:
    summary = summary_of(parts)
    if not summary.rows:
        return ""
    bold = lambda text, best: f"<b>{_plain(text)}</b>" if best else _plain(text)
    rows = [
        [
            f'<a href="#part{i}">{_plain(parts[i].title)}</a>: {_plain(measure)}',
            *(bold(*cell) for cell in cells),
        ]
        for i, measure, cells in summary.rows
    ]
    columns = ["", *map(_plain, summary.columns)]
    return f'<h2>Summary</h2><p class="notes">{_plain(_TOLD)}</p>{_html_table(columns, rows)}'


def _html_table(columns: list[str], rows: list[list[str]]) -> str:
    """A table of cells that are HTML already."""
    cells = lambda row, tag: "".join(f"<{tag}>{text}</{tag}>" for text in row)
    body = "".join(f"<tr>{cells(row, 'td')}</tr>\n" for row in rows)
    return (
        f'<div class="wide"><table><thead><tr>{cells(columns, "th")}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def _html_section(number: int, part: Section) -> str:
    figures = "".join(
        f'<figure><div class="wide"><img alt="{_plain(part.title)}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}"></div>'
        f"<figcaption>{_plain(caption)}</figcaption></figure>"
        for caption, path in part.figures
    )
    commands = "".join(f"<code>{_plain(command)}</code>" for command in part.commands)
    columns = list(map(_plain, part.table.columns))
    rows = [list(map(_plain, row)) for row in part.table.rows]
    return (
        f'\n<section id="part{number}"><h2>{_plain(part.title)}</h2>'
        f'<p class="notes">{_plain("; ".join(part.notes))}</p>'
        f"{_html_table(columns, rows)}{figures}{commands}</section>"
    )
