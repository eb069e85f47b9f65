"""The progress bar of the data room."""

from rwkvx_jax.data import progress


def test_a_label_is_printed_as_it_is(monkeypatch, capsys):
    """Square brackets are no markup: with it, this label would break the bar or lose a part."""
    monkeypatch.setattr(progress, "_SHOW_AFTER", -1.0)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    with progress.progress("tokenizing x[red]y[/b]", 10) as advance:
        advance(5)
    monkeypatch.setattr(progress, "_SHOW_AFTER", 60.0)
    with progress.progress("short work", 10) as advance:
        advance(10)
    shown = capsys.readouterr().err
    assert "tokenizing x[red]y[/b]" in shown and "short work" not in shown
