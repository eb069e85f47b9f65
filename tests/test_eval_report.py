"""The report: one table for what can be compared, nothing lost, nothing from outside the page."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rwkvx_jax.config import ConfigError
from rwkvx_jax.evals import passkey
from rwkvx_jax.evals.passkey import PasskeyOptions
from rwkvx_jax.evals.report import ReportOptions, as_html, as_markdown, find_runs, sections
from tests.eval_models import QUIET, FakeReader, make_subject, run_command

PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c6360f8cf500f00038201807f6b0a3d0000000049454e44ae426082"
)


def passkey_run(folder, *subjects, **flags):
    """A real results file, with a figure beside it."""
    flags = {"lengths": (300,), "depths": 2, "trials": 2} | flags
    options = PasskeyOptions(checkpoint=(Path("m"),), output=folder, **flags)
    solve = lambda text: " " + re.search(r"The pass key is (\d+)\.", text)[1]
    passkey.evaluate(options, subjects, QUIET, FakeReader(solve))
    (folder / "passkey.png").write_bytes(PIXEL)
    return folder


def write(folder, task, **fields):
    folder.mkdir(exist_ok=True)
    document = {"task": task, "command": f"eval.py {task}", "device": "cpu"} | fields
    (folder / f"{task}.json").write_text(json.dumps(document))
    return folder


@pytest.fixture
def others(tmp_path):
    """Results of the other tasks."""
    acc = lambda value: {"acc": {"value": value, "error": 0.01, "documents": 9}}
    columns = {"lambada_openai": acc(0.47), "piqa": acc(0.679)}
    summary = {"columns": columns, "average": 57.45, "averaged": 2}
    panel = {"label": "m <1>", "tokenizer": "byte"}
    write(tmp_path / "s", "short", settings={"seed": 0}, panels=[panel | {"summary": summary}])
    edges = [(0, 64, 2.5), (64, 96, 2.0), (96, 128, 1.0)]
    bins = [{"begin": a, "end": b, "loss": loss, "error": 0.1} for a, b, loss in edges]
    summary = {"all": {"loss": 2.25}, "by_position": bins}
    write(tmp_path / "l", "long-loss", settings={}, panels=[panel | {"summary": summary}])
    rows = [{"kind": "sparse", "context": c, "milliseconds": c / 100} for c in (1024, 8192)]
    write(tmp_path / "v", "speed", rows=rows)
    return tmp_path


def test_comparable_runs_share_a_table(tmp_path):
    passkey_run(tmp_path / "a", make_subject("one"))
    passkey_run(tmp_path / "b", make_subject("two"), make_subject("one", scale=2.0))
    passkey_run(tmp_path / "c", make_subject("one"), seed=1)
    passkey_run(tmp_path / "d", make_subject("one"), lengths=(300, 400))
    first, second = sections(find_runs([tmp_path]))
    assert first.table.columns[1:] == ["300", "400", "all"]
    labels = [row[0] for row in first.table.rows]
    assert labels == [
        f"one ({tmp_path / 'a'})",
        "two",
        f"one ({tmp_path / 'b'})",
        f"one ({tmp_path / 'd'})",
    ]
    assert first.table.rows[0][1:] == ["100.0 (51 to 100)", "–", "100.0 (51 to 100)"]
    assert len(second.table.rows) == 1 and "seed: 1" in second.notes
    assert first.title == "Passkey retrieval (seed: 0)"
    assert second.title == "Passkey retrieval (seed: 1)"
    assert [len(part.figures) for part in (first, second)] == [3, 1]


def test_different_tokenizers_never_share_a_table(tmp_path):
    pytest.importorskip("pyrwkv_tokenizer")
    passkey_run(tmp_path / "a", make_subject("one"))
    passkey_run(tmp_path / "b", make_subject("two", tokenizer="world"))
    assert len(sections(find_runs([tmp_path]))) == 2


def test_markdown_of_every_task(others):
    text = as_markdown("All of it", sections(find_runs([others])))
    assert text.startswith("# All of it\n")
    for line in (
        r"| m \<1\> | 47.0 ± 1.0 | 67.9 ± 1.0 | 57.5 |",
        "| model (nats per token at positions) | 0–64 | 64–128 | all |",
        r"| m \<1\> | 2.500 | 1.500 | 2.2500 |",
        f"| {str(others / 'v').replace('_', chr(92) + '_')}: sparse | 10.24 | 81.92 |",
        "    eval.py long-loss",
    ):
        assert line in text.splitlines(), line


class Checker(HTMLParser):
    """Counts tags and collects what a page would fetch."""

    def __init__(self):
        super().__init__()
        self.tags, self.open, self.sources, self.words = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_html_is_whole_and_self_contained(others):
    passkey_run(others / "p", make_subject("one"))
    page = as_html("A & B", sections(find_runs([others])))
    checker = Checker()
    checker.feed(page)
    assert checker.open == [] and checker.tags.count("table") == checker.tags.count("section") == 4
    assert "A & B" in checker.words and "m <1>" in checker.words
    assert all(s.startswith(("#part", "data:image/png;base64,")) for s in checker.sources)
    assert sum(s.startswith("data:") for s in checker.sources) == 1


def test_command(others, monkeypatch, capsys):
    run_command(monkeypatch, "report", others / "s", others / "v", "--output", others / "out")
    assert (others / "out" / "report.md").read_text().count("\n## ") == 2
    assert (others / "out" / "report.html").read_text().startswith("<!doctype html>")
    for arguments, message in (
        ([others / "absent"], "absent does not exist"),
        ([others / "out"], "no results file of eval.py in"),
    ):
        with pytest.raises(SystemExit):
            run_command(monkeypatch, "report", *arguments, "--output", others / "out")
        assert message in capsys.readouterr().err


def test_files_that_are_none(tmp_path):
    (tmp_path / "x.json").write_text('{"task": "other"}')
    (tmp_path / "y.json").write_text("nonsense")
    with pytest.raises(ConfigError, match="x.json is no results file"):
        find_runs([tmp_path / "x.json"])
    with pytest.raises(ConfigError, match="no results file of eval.py in"):
        find_runs([tmp_path])
    with pytest.raises(ConfigError, match="name at least one"):
        ReportOptions(inputs=(), output=tmp_path)


def test_only_figures_that_lie_there_are_shown(tmp_path, monkeypatch, capsys):
    for name in "abc":
        passkey_run(tmp_path / name, make_subject(name))
    secret = tmp_path / "secret"
    secret.write_bytes(PIXEL + b"TOKEN")
    (tmp_path / "a" / "passkey.png").unlink()
    (tmp_path / "a" / "passkey.png").symlink_to(secret)
    (tmp_path / "b" / "passkey.png").write_bytes(b"TOKEN")
    (part,) = sections(find_runs([tmp_path]))
    assert [figure for _, figure in part.figures] == [tmp_path / "c" / "passkey.png"]
    run_command(monkeypatch, "report", tmp_path, "--output", tmp_path / "out")
    assert capsys.readouterr().out.count("passkey.png is left out") == 2


def test_names_are_shown_as_they_are(tmp_path, monkeypatch, capsys):
    """They mean nothing to Markdown, HTML or the terminal."""
    label = "a[b](http://x) `c` _d_ [/red] $e$ <script>\x1b[31m\n| f"
    panel = {"label": label, "tokenizer": "byte", "summary": {"selectors": {}}}
    found = {m: {"mean": 0.5} for m in ("share", "past", "recall")}
    panel["summary"]["selectors"]["own"] = found
    write(tmp_path / "[red]s", "selection", settings={}, panels=[panel])
    parts = sections(find_runs([tmp_path]))
    (line,) = [x for x in as_markdown("t", parts).splitlines() if x.startswith("| a")]
    assert line == (
        r"| a\[b\](http://x) \`c\` \_d\_ \[/red\] \$e\$ \<script\>\\x1b\[31m\\n\| f: own "
        "| 50.0 | 50.0 | 50.0 |"
    )
    page = as_html("t", parts)
    assert "<script>" not in page and "\x1b" not in page
    run_command(monkeypatch, "report", tmp_path, "--output", tmp_path / "[/b]out")
    assert f"wrote {tmp_path / '[/b]out' / 'report.md'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"task": "passkey"}', "names the task 'passkey', but has another shape"),
        (
            '{"task": "passkey", "panels": [{"label": "m", "x": NaN}]}',
            r"panels\[0\].x is not finite",
        ),
        ('{"task": "speed", "rows": [1, 1e999]}', r"rows\[1\] is not finite"),
        ('{"task": "passkey", ' + '"a": [' * 50_000, "is not JSON"),
        ('{"task": "passkey", "pan', "is not JSON"),
    ],
)
def test_damaged_results_are_refused(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        find_runs([tmp_path])
