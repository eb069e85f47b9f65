"""Needle evaluation: scores of known readers, files, resumption, flags, the command."""

import re
from pathlib import Path

import numpy as np
import pytest

from rwkvx_jax.config import ConfigError
from rwkvx_jax.evals.grid import Trial, heat_maps
from rwkvx_jax.evals.report import read_results
from rwkvx_jax.evals.tasks.niah import NiahOptions, evaluate, judge, niah_grid, question_of
from rwkvx_jax.tokenizer import load_tokenizer
from tests.evals.eval_models import (
    QUIET,
    FakeReader,
    make_model,
    run_command,
    write_checkpoint,
)

ALL = (
    "single_1",
    "single_2",
    "single_3",
    "multikey_1",
    "multikey_2",
    "multikey_3",
    "tracking",
    "recall_16",
)


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(" ".join(f"Line {i} of the book, no more." for i in range(900)))
    return path


def make_options(output, book=None, **flags):
    flags = {"lengths": (1800, 2000), "depths": 3, "trials": 2, "batch": 2} | flags
    return NiahOptions(checkpoint=(Path("model"),), output=output, haystack=book, **flags)


def copy(text):
    """The oracle: looks up what the question names."""
    if found := re.search(r"What is the special magic \w+ for (\S+) mentioned", text):
        return " " + re.search(rf"for {re.escape(found[1])} is: (\S+)\.", text)[1] + ".\nmore"
    if found := re.search(r"Which number has (\w+)\?", text):
        return " " + re.search(rf"^{found[1]}: (\d+)$", text, re.M)[1] + "\n"
    value = re.findall(r"are assigned the value (\d+)", text)[-1]
    chain = [re.search(rf"VAR (\w+) = {value}", text)[1]]
    while found := re.search(rf"VAR (\w+) = VAR {chain[-1]}\b", text):
        chain.append(found[1])
    return " " + ", ".join(chain).lower()


def guess(text):
    return f" {np.random.default_rng(len(text)).integers(10**6, 10**7)}\n"


def test_oracle_scores_everything_and_a_guess_nothing(tmp_path, book):
    for solve, expected in ((copy, 1.0), (guess, 0.0)):
        options = make_options(tmp_path / solve.__name__, book, tasks=ALL)
        results = evaluate(options, [make_model()], QUIET, FakeReader(solve))
        shares = {name: r.summary("model")["all"]["accuracy"] for name, r in results.items()}
        assert shares == dict.fromkeys(ALL, expected)
        assert {r.summary("model")["all"]["trials"] for r in results.values()} == {12}


def test_tracking_scores_in_part(tmp_path):
    first = lambda text: ",".join(copy(text).split(",")[:2])  # two of the five variables
    options = make_options(tmp_path, tasks=("tracking",), lengths=(1800,))
    results = evaluate(options, [make_model()], QUIET, FakeReader(first))["tracking"]
    share = results.summary("model")["all"]
    assert share["accuracy"] == pytest.approx(0.4) and share["trials"] == 6
    assert share["low"] < 0.4 < share["high"]
    (heat_map,) = heat_maps(niah_grid(options, "tracking", None), results)
    assert heat_map.percent.tolist() == [[pytest.approx(40)]]


def test_what_stands_behind_a_line_break_does_not_count():
    byte = load_tokenizer("byte")
    for text, correct in ((" 1234567\n99", 1), ("\n\n1234567", 1), (" 77\n1234567", 0)):
        assert judge(byte, ("1234567",), byte.encode(text))["correct"] == correct


def test_an_answer_ends_at_its_line_break(tmp_path):
    byte = load_tokenizer("byte")
    ended = niah_grid(make_options(tmp_path, tasks=("single_1",)), "single_1", None).ended
    for text, expected in (("\n 12", False), ("12\n", True), ("\n12\nx", True), ("", False)):
        assert ended(byte, byte.encode(text)) == expected


def test_results_files(tmp_path, book):
    options = make_options(tmp_path, book, tasks=("single_2", "recall_16"), limit=5)
    evaluate(options, [make_model()], QUIET, FakeReader(copy))
    document = read_results(tmp_path / "niah_single_2.jsonl")
    assert document["task"] == "niah_single_2" and len(document["settings"]["haystack"]) == 16
    assert document["settings"]["answer_tokens"] == 64
    (shown,) = document["models"]
    assert len(shown["trials"]) == 5
    trial = shown["trials"][0]
    assert (trial["length"], trial["depth"], trial["trial"]) == (1800, 0.0, 0)
    assert trial["answer"] == trial["expected"][0] + "." and trial["correct"] == 1.0
    assert 1600 < trial["prompt_tokens"] <= 1800 - 128
    recall = read_results(tmp_path / "niah_recall_16.jsonl")
    assert recall["models"][0]["trials"][0]["prompt_tokens"] == 1800


def test_an_interrupted_run_goes_on(tmp_path):
    options = make_options(tmp_path, tasks=("single_1", "multikey_2"))
    with pytest.raises(KeyboardInterrupt):
        evaluate(options, [make_model()], QUIET, FakeReader(copy, stop_after=16))
    second = FakeReader(copy)
    results = evaluate(options, [make_model()], QUIET, second)
    assert len(second.read) == 8
    assert [len(r.trials("model")) for r in results.values()] == [12, 12]


def test_questions_depend_on_seed_task_and_trial_alone(tmp_path):
    byte = load_tokenizer("byte")
    trial = Trial(1000, 0.5, 1)
    ask = lambda task, trial=trial, **flags: (
        question_of(
            make_options(tmp_path, tasks=("single_1",), **flags), task, None, byte, trial
        ).answers
    )
    assert ask("single_1") == ask("single_1", lengths=(500, 1000), trials=9)
    assert ask("single_1") != ask("single_1", seed=1)
    assert ask("single_1") != ask("multikey_2")
    assert ask("single_1") != ask("single_1", trial._replace(trial=0))
    assert ask("single_1") != ask("single_1", trial._replace(length=999))


def test_a_kept_reader_serves_all_tasks(tmp_path):
    made = []

    def make(tested, **sizes):
        made.append(tested.label)
        return FakeReader(copy)(tested, **sizes)

    options = make_options(tmp_path, tasks=("single_1", "multikey_2"))
    evaluate(options, [make_model()], QUIET, make)
    assert made == ["model"]


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"tasks": ()}, "--tasks is empty"),
        ({"tasks": ("single_1", "single_1")}, "names a task twice"),
        ({"tasks": ("single_1", "single_2")}, "single_2 hide needles in running text"),
        ({"lengths": ()}, r"--lengths is \(\): give numbers"),
        ({"trials": 999_999_999}, "lower --depths or --trials"),
        ({"answer_tokens": 0}, "--answer-tokens is 0"),
    ],
)
def test_bad_flags(tmp_path, flags, message):
    with pytest.raises(ConfigError, match=message):
        make_options(tmp_path, **({"tasks": ("single_1",)} | flags))


def test_short_lengths_fail_before_anything_is_read(tmp_path):
    reader = FakeReader(copy)
    options = make_options(tmp_path, tasks=("single_1", "recall_256"))
    with pytest.raises(ConfigError, match="too short for 256 pairs"):
        evaluate(options, [make_model()], QUIET, reader)
    assert reader.read == [] and not list(tmp_path.iterdir())


@pytest.mark.thorough
def test_command(tmp_path, monkeypatch, capsys):
    checkpoint = write_checkpoint(tmp_path / "tiny.safetensors")
    flags = ["--checkpoint", checkpoint, "--output", tmp_path, "--lengths", "600,1000"]
    flags += ["--depths", 2, "--trials", 1, "--answer-tokens", 8, "--piece", 256]
    run_command(monkeypatch, "niah", *flags, "--tasks", "single_1", "recall_16")
    printed = capsys.readouterr().out
    assert "score (%) by length" in printed and "0.0/0.0" in printed
    for name in ("single_1", "recall_16"):
        assert (tmp_path / f"niah_{name}.png").stat().st_size > 10_000
    with pytest.raises(SystemExit):
        run_command(monkeypatch, "niah", *flags, "--tasks", "single_2")
    assert "single_2 hide needles in running text" in capsys.readouterr().err
