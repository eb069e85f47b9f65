"""Lookup evaluation: right and wrong readers, settings that must not mix, the command."""

from pathlib import Path

import pytest

from rwkvx_jax.config import ConfigError
from rwkvx_jax.evals.grid import Trial
from rwkvx_jax.evals.report import read_results
from rwkvx_jax.evals.tasks.lookup import LookupOptions, evaluate, lookup_grid
from rwkvx_jax.tasks.lookup import lookup_prompt
from rwkvx_jax.tokenizer import load_tokenizer
from tests.evals.eval_models import (
    QUIET,
    FakeReader,
    make_model,
    run_command,
    write_checkpoint,
)

BYTE = load_tokenizer("byte")


def make_options(output, **flags):
    flags = {"lengths": (900, 1200), "depths": 3, "trials": 2, "batch": 2, "facts": 3} | flags
    return LookupOptions(checkpoint=(Path("model"),), output=output, **flags)


def answers(monkeypatch):
    """The answers of all prompts that are made."""
    known = {}

    def kept(tokenizer, *args, **flags):
        question = lookup_prompt(tokenizer, *args, **flags)
        known[tokenizer.decode(question.prompt)] = question.answer
        return question

    monkeypatch.setattr("rwkvx_jax.evals.tasks.lookup.lookup_prompt", kept)
    return known


@pytest.mark.parametrize(
    "said, share",
    [(" {}.", 1.0), (" {}\nmore", 1.0), (" {}9", 0.0), (" the {}", 0.0), (".", 0.0)],
)
def test_an_answer_is_right_if_it_is_the_value(tmp_path, monkeypatch, said, share):
    known = answers(monkeypatch)
    reader = FakeReader(lambda prompt: said.format(known[prompt]))
    results = evaluate(make_options(tmp_path), [make_model()], QUIET, reader)
    assert results.summary("model")["all"]["accuracy"] == share
    assert results.summary("model")["all"]["trials"] == 12


def test_prompts_depend_on_seed_and_trial_alone(tmp_path):
    trial = Trial(900, 0.5, 1)
    prompt = lambda **flags: lookup_grid(make_options(tmp_path, **flags)).prompt(BYTE, trial)
    assert prompt().tolist() == prompt(trials=7, lengths=(900,)).tolist()
    assert prompt().tolist() != prompt(seed=1).tolist()
    assert prompt().tolist() != prompt(part="training").tolist()


def test_in_running_text(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text(" ".join(f"Line {i} of the book, no more." for i in range(900)))
    grid = lookup_grid(make_options(tmp_path, haystack=book))
    text = BYTE.decode(grid.prompt(BYTE, Trial(1200, 0.5, 0)))
    assert "of the book" in text and "The grass" not in text
    assert "haystack" in grid.settings


def test_settings_do_not_mix(tmp_path):
    reader = FakeReader(lambda prompt: " no.")
    evaluate(make_options(tmp_path), [make_model()], QUIET, reader)
    for flags in ({"facts": 4}, {"part": "training"}, {"seed": 1}):
        with pytest.raises(ConfigError, match=f"{next(iter(flags))}: "):
            evaluate(make_options(tmp_path, **flags), [make_model()], QUIET, reader)
    with pytest.raises(ConfigError, match="too short"):
        evaluate(make_options(tmp_path / "x", lengths=(99,)), [make_model()], QUIET, reader)
    with pytest.raises(ConfigError, match="--facts is 0"):
        make_options(tmp_path, facts=0)


@pytest.mark.thorough
def test_command(tmp_path, monkeypatch, capsys):
    checkpoint = write_checkpoint(tmp_path / "tiny.safetensors")
    flags = ["--checkpoint", checkpoint, "--output", tmp_path, "--lengths", "600", "--facts", 2]
    run_command(monkeypatch, "lookup", *flags, "--depths", 2, "--trials", 1, "--answer-tokens", 4)
    assert "right answers" in capsys.readouterr().out
    assert len(read_results(tmp_path / "lookup.jsonl")["models"][0]["trials"]) == 2
    assert (tmp_path / "lookup.png").stat().st_size > 10_000
