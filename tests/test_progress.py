"""The progress bar: what it says, where, and how often."""

import io

import pytest
from rich.console import Console

from rwkvx_jax import progress
from rwkvx_jax.progress import Progress


def test_a_label_is_printed_as_it_is(monkeypatch, capsys):
    """Square brackets are no markup: with it, this label would break the bar or lose a part."""
    monkeypatch.setattr(progress, "SHORT_SECONDS", -1.0)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    with progress.of_bytes("tokenizing x[red]y[/b]", 10) as bar:
        bar.advance(5)
    monkeypatch.setattr(progress, "SHORT_SECONDS", 60.0)
    with progress.of_bytes("short work", 10) as bar:
        bar.advance(10)
    shown = capsys.readouterr().err
    assert "tokenizing x[red]y[/b]" in shown and "short work" not in shown


@pytest.mark.parametrize("terminal", [False, True])
def test_it_shows_what_is_done_and_left(monkeypatch, terminal):
    monkeypatch.setattr(progress, "PLAIN_LINE_SECONDS", 0.0)
    clock = iter([0.0, 40.0, 50.0, 80.0])  # 50 seconds with compilation, 30 for the second 1000
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock, 90.0))
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=100)
    with Progress(console, 4000, "tokens") as bar:
        bar.describe("demo, length 128")
        bar.advance(1000)
        bar.start_clock()
        bar.advance(1000, "loss 2.5")
    if terminal:
        assert "demo, length 128" in text.getvalue() and "2,000 of 4,000 tokens" in text.getvalue()
        assert "loss 2.5" in text.getvalue()
    else:
        assert text.getvalue().splitlines() == [
            "demo, length 128: 1,000 of 4,000 tokens",
            "demo, length 128: 2,000 of 4,000 tokens, loss 2.5, about 1 min 0 s left",
        ]


def test_plain_lines_come_every_ten_seconds_and_at_both_ends_where_asked(monkeypatch):
    left = {
        1: "",
        4: ", about 6 s left",
        5: ", about 3 s left",
        6: "",
    }  # by the steps after the first
    for ends, expected in ((False, [4]), (True, [1, 5, 6])):
        times = iter([0.0, 3.0, 6.0, 9.0, 12.0, 13.5, 14.0])
        monkeypatch.setattr(progress.time, "monotonic", lambda times=times: next(times))
        text = io.StringIO()
        with Progress(Console(file=text), 6, "steps", "train", ends=ends) as bar:
            for _ in range(6):
                bar.advance(1)
        lines = text.getvalue().splitlines()
        assert lines == [f"train: {n} of 6 steps{left[n]}" for n in expected]


def test_a_quiet_console_shows_nothing():
    text = io.StringIO()
    with Progress(
        Console(file=text, force_terminal=True, quiet=True), 3, "steps", ends=True
    ) as bar:
        bar.advance(3)
    assert text.getvalue() == ""
