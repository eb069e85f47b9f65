"""The report: one table for what can be compared, nothing lost, nothing from outside the page."""

import gzip
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rwkvx_jax.config import ConfigError, to_dict
from rwkvx_jax.evals.pages import as_html, as_markdown, summary_of
from rwkvx_jax.evals.report import ReportOptions, find_runs, sections
from rwkvx_jax.evals.tasks import passkey
from rwkvx_jax.evals.tasks.passkey import PasskeyOptions
from tests.evals.eval_models import QUIET, TINY, FakeReader, make_model, run_command

PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c6360f8cf500f00038201807f6b0a3d0000000049454e44ae426082"
)


def passkey_run(folder, *models, **flags):
    """A real results file, with a figure beside it."""
    flags = {"lengths": (300,), "depths": 2, "trials": 2} | flags
    options = PasskeyOptions(checkpoint=(Path("m"),), output=folder, **flags)
    solve = lambda text: " " + re.search(r"The pass key is (\d+)\.", text)[1]
    passkey.evaluate(options, models, QUIET, FakeReader(solve))
    (folder / "passkey.png").write_bytes(PIXEL)
    return folder


def write(folder, task, key, trials, label="model", **settings):
    """A results file of one model."""
    folder.mkdir(exist_ok=True)
    model = {"label": label, "model": to_dict(TINY)}
    model |= {} if task == "speed" else {"tokenizer": "byte"}
    header = {"format": 2, "task": task, "command": f"eval.py {task}", "device": "cpu"}
    header |= {"settings": settings, "plan": {}, "key": key, "identity": [], "models": [model]}
    lines = [header, *({"model": label} | trial for trial in trials)]
    (folder / f"{task}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def others(tmp_path):
    """Results of the other tasks."""
    answered = [("lambada_openai", i, float(i < 47)) for i in range(100)]
    answered += [("piqa", i, float(i < 679)) for i in range(1000)]
    trials = [{"task": t, "document": i, "metrics": {"acc": acc}} for t, i, acc in answered]
    write(tmp_path / "s", "short", ["task", "document"], trials, "m <1>", seed=0)
    trial = {"file": "a", "start": 0, "loss": 2.25, "edges": [0, 64, 96, 128]}
    trial["losses"] = [2.5, 2.0, 1.0]
    write(tmp_path / "l", "long-loss", ["file", "start"], [trial], "m <1>")
    rows = [{"kind": "sparse", "context": c, "milliseconds": c / 100} for c in (1024, 8192)]
    write(tmp_path / "v", "speed", ["kind", "context"], rows)
    return tmp_path


def test_comparable_runs_share_a_table(tmp_path):
    passkey_run(tmp_path / "a", make_model("one"))
    passkey_run(tmp_path / "b", make_model("two"), make_model("one", scale=2.0))
    passkey_run(tmp_path / "c", make_model("one"), seed=1)
    passkey_run(tmp_path / "d", make_model("one"), lengths=(300, 400))
    first, second = sections(find_runs([tmp_path]))
    assert first.table.columns[1:] == ["300", "400", "all"]
    labels = [row[0] for row in first.table.rows]
    assert labels == [
        f"RWKV-X: one ({tmp_path / 'a'})",
        "RWKV-X: two",
        f"RWKV-X: one ({tmp_path / 'b'})",
        f"RWKV-X: one ({tmp_path / 'd'})",
    ]
    assert first.table.rows[0][1:] == ["100.0 (51 to 100)", "–", "100.0 (51 to 100)"]
    assert len(second.table.rows) == 1 and "seed: 1" in second.notes
    assert first.title == "Passkey retrieval (seed: 0)"
    assert second.title == "Passkey retrieval (seed: 1)"
    assert [len(part.figures) for part in (first, second)] == [3, 1]


def test_the_summary_compares_what_all_have_answered(tmp_path):
    """The second model has fewer questions: the others' further ones do not count."""
    rights = {"one": (1, 1, 0, 0), "two": (1, 0), "three": (1, 1, 1)}
    for label, own in rights.items():
        trials = [{"length": 8, "depth": 0.0, "trial": i, "correct": c} for i, c in enumerate(own)]
        write(tmp_path / label, "passkey", ["length", "depth", "trial"], trials, label, seed=0)
    summary = summary_of(sections(find_runs([tmp_path / label for label in rights])))
    assert summary.columns == ["RWKV-X: one", "RWKV-X: two", "RWKV-X: three"]
    ((_, measure, cells),) = summary.rows
    assert measure == "right answers (%); questions: 2"
    both, half = "100.0 (34.2 to 100.0)", "50.0 (9.5 to 90.5)"
    assert cells == [(both, True), (half, False), (both, True)]


def test_the_summary_of_every_task(others):
    summary = summary_of(sections(find_runs([others])))
    cells = {measure: cell for _, measure, (cell,) in summary.rows}
    assert cells == {
        "nats per token, less is better; documents: 1": ("2.250", False),
        "average score (%); questions: 1,100": ("57.5 (52.3 to 62.6)", False),
    }
    text = as_markdown("t", sections(find_runs([others])))
    assert "| Loss by position: nats per token, less is better; documents: 1 | 2.250 |" in text


def test_less_loss_is_better(tmp_path):
    for label, loss in (("one", 2.5), ("two", 2.0)):
        trial = {"file": "a", "start": 0, "loss": loss, "edges": [0, 64], "losses": [loss]}
        write(tmp_path / label, "long-loss", ["file", "start"], [trial], label)
    parts = sections(find_runs([tmp_path]))
    ((_, _, cells),) = summary_of(parts).rows
    assert cells == [("2.500", False), ("2.000", True)]
    assert "| 2.500 | **2.000** |" in as_markdown("t", parts)
    assert "<td>2.500</td><td><b>2.000</b></td>" in as_html("t", parts)


def test_models_that_share_a_name_tell_more(tmp_path):
    passkey_run(tmp_path / "a", make_model("one"))
    passkey_run(tmp_path / "b", make_model("one", scale=2.0))
    passkey_run(tmp_path / "c", make_model("one"), seed=1)
    first, second = summary_of(sections(find_runs([tmp_path]))).columns
    assert first != second and first.startswith("RWKV-X: one (runs/model) (")


def test_markdown_keeps_its_figures_beside_itself(tmp_path, monkeypatch):
    passkey_run(tmp_path / "a", make_model("one"))
    run_command(monkeypatch, "report", tmp_path / "a", "--output", tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    (place,) = re.findall(r"^!\[.*\]\((.*)\)$", text, re.MULTILINE)
    assert (tmp_path / "out" / place).read_bytes() == PIXEL


def test_different_tokenizers_never_share_a_table(tmp_path):
    pytest.importorskip("pyrwkv_tokenizer")
    passkey_run(tmp_path / "a", make_model("one"))
    passkey_run(tmp_path / "b", make_model("two", tokenizer="world"))
    assert len(sections(find_runs([tmp_path]))) == 2


def test_markdown_of_every_task(others):
    text = as_markdown("All of it", sections(find_runs([others])))
    assert text.startswith("# All of it\n")
    for line in (
        r"| RWKV-X: m \<1\> | 47.0 ± 5.0 | 67.9 ± 1.5 | 57.5 |",
        "| model (nats per token at positions) | 0–64 | 64–128 | all |",
        r"| RWKV-X: m \<1\> | 2.500 | 1.500 | 2.2500 |",
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
    passkey_run(others / "p", make_model("one"))
    page = as_html("A & B", sections(find_runs([others])))
    checker = Checker()
    checker.feed(page)
    assert checker.open == [] and checker.tags.count("section") == 4
    assert checker.tags.count("table") == 5, "the summary has one too"
    assert "A & B" in checker.words and "RWKV-X: m <1>" in checker.words
    assert all(s.startswith(("#part", "data:image/png;base64,")) for s in checker.sources)
    assert sum(s.startswith("data:") for s in checker.sources) == 1


def test_command(others, monkeypatch, capsys):
    run_command(monkeypatch, "report", others / "s", others / "v", "--output", others / "out")
    assert (others / "out" / "report.md").read_text().count("\n## ") == 3
    assert (others / "out" / "report.html").read_text().startswith("<!doctype html>")
    for arguments, message in (
        ([others / "absent"], "absent does not exist"),
        ([others / "out"], "no results file of eval.py in"),
    ):
        with pytest.raises(SystemExit):
            run_command(monkeypatch, "report", *arguments, "--output", others / "out")
        assert message in capsys.readouterr().err


def test_files_that_are_none(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"task": "other"}\n')
    (tmp_path / "y.json").write_text("nonsense")
    with pytest.raises(ConfigError, match="x.jsonl is no results file"):
        find_runs([tmp_path / "x.jsonl"])
    with pytest.raises(ConfigError, match="no results file of eval.py in"):
        find_runs([tmp_path])
    with pytest.raises(ConfigError, match="name at least one"):
        ReportOptions(inputs=(), output=tmp_path)


def test_only_figures_that_lie_there_are_shown(tmp_path, monkeypatch, capsys):
    for name in "abc":
        passkey_run(tmp_path / name, make_model(name))
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
    found = {m: [[[1.0]]] for m in ("share", "past", "recall")} | {"held": [[[0.1]]]}
    trial = {"file": "a", "start": 0, "queries": [2], "mass": [[[0.1, 0.9]]]}
    trials = [trial | {"selectors": {"own": found}}]
    write(tmp_path / "[red]s", "selection", ["file", "start"], trials, label)
    parts = sections(find_runs([tmp_path]))
    (line,) = [x for x in as_markdown("t", parts).splitlines() if x.startswith("| RWKV-X: a")]
    assert line == (
        r"| RWKV-X: a\[b\](http://x) \`c\` \_d\_ \[/red\] \$e\$ \<script\>\\x1b\[31m\\n"
        r"\| f: the model's own "
        "| 50.0 | 50.0 | 50.0 |"
    )
    page = as_html("t", parts)
    assert "<script>" not in page and "\x1b" not in page
    run_command(monkeypatch, "report", tmp_path, "--output", tmp_path / "[/b]out")
    assert f"wrote {tmp_path / '[/b]out' / 'report.md'}" in capsys.readouterr().out


HEADER = {"format": 2, "task": "passkey", "command": "", "device": "", "settings": {}, "key": []}
HEADER |= {"identity": [], "models": [{"label": "m"}]}


@pytest.mark.parametrize(
    "header, line, message",
    [
        ({"models": None}, "", "another shape than a results file"),
        ({"settings": "x"}, "", "another shape than a results file"),
        ({"format": 1}, "", "has format 1, and this version reads 2"),
        ({}, '{"model": "m"}\n', "names the task 'passkey', but has another shape"),
        ({}, '{"model": "other"}\n', "another shape than a results file"),
        ({}, '{"model": "m", "x": [1, NaN]}\n', r"line 2: x\[1\] is not finite"),
        ({}, '{"model": "m", "x": 1e999}\n', "line 2: x is not finite"),
        ({}, '{"model": "m", ' + '"a": [' * 50_000 + "\n", "line 2 is not JSON"),
        ({}, '{"model": "m", "x\n', "line 2 is not JSON"),
    ],
)
def test_damaged_results_are_refused(tmp_path, header, line, message):
    (tmp_path / "x.jsonl").write_text(json.dumps(HEADER | header) + "\n" + line)
    with pytest.raises(ConfigError, match=message):
        find_runs([tmp_path])


def test_a_damaged_beginning_is_no_other_kind_of_file(tmp_path):
    text = json.dumps(HEADER)
    (tmp_path / "x.jsonl").write_text(text.replace('{"format"', '{"fosmat"') + "\n")
    with pytest.raises(ConfigError, match="another shape than a results file"):
        find_runs([tmp_path])


def test_compressed_results_and_half_a_line(tmp_path, caplog):
    passkey_run(tmp_path / "a", make_model("one"))
    path = tmp_path / "a" / "passkey.jsonl"
    (whole,) = find_runs([path])
    packed = path.with_name("passkey.jsonl.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    (unpacked,) = find_runs([packed])
    assert unpacked.document == whole.document
    assert len(sections([unpacked])[0].figures) == 1
    assert len(find_runs([tmp_path])) == 1, "one run, in two forms"
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(ConfigError, match="passkey.jsonl.gz is damaged"):
        find_runs([packed])
    path.write_bytes(path.read_bytes()[:-3])
    (shorter,) = find_runs([path])
    assert len(shorter.document["models"][0]["trials"]) == 3
    assert "passkey.jsonl ends in half a line" in caplog.text
