"""Which files a path means: names with glob characters, links, hidden files, suffixes."""

import os

import pytest

from rwkvx_jax.config import ConfigError
from rwkvx_jax.textfiles import find_files, read_text


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Writes files of given names; -> names found for a path."""
    monkeypatch.chdir(tmp_path)

    def make(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(name)
        return lambda path: [os.path.relpath(file, tmp_path) for file in find_files(path, ".txt")]

    return make


@pytest.mark.parametrize("absolute", [False, True])
def test_a_path_that_exists_is_taken_as_it_is(absolute, tree, tmp_path):
    names = ("br/data[1].txt", "br/data1.txt", "[set] a/x.txt", "novel [en].txt", "a*?.txt")
    found = tree(*names)
    path = lambda name: str(tmp_path / name) if absolute else name
    for name in names:
        assert found(path(name)) == [name]
    assert found(path("[set] a")) == ["[set] a/x.txt"]
    assert found(path("[set] a/*.txt")) == ["[set] a/x.txt"]
    assert found(path("br/data[1]*.txt")) == ["br/data1.txt"]
    assert found(path("**/data*")) == ["br/data1.txt", "br/data[1].txt"]


def test_each_file_counts_once_and_loops_end(tree, tmp_path, caplog):
    found = tree("loop/a.txt", "z/b.txt")
    for name, target in [("self", "."), ("up", ".."), ("again.txt", "a.txt"), ("far", "../z")]:
        (tmp_path / "loop" / name).symlink_to(target)
    assert found("loop") == ["loop/a.txt", "loop/far/b.txt"]
    assert found(".") == ["loop/a.txt", "z/b.txt"]
    assert "2 files; left out: 1 linked again (as loop/again.txt)" in caplog.messages[0]
    assert found("**/*.txt") == ["loop/a.txt", "z/b.txt"]
    assert found("*/*/*.txt") == ["loop/far/b.txt", "loop/self/a.txt"]


def test_hidden_files_and_pipes_are_left_out_and_said(tree, tmp_path, caplog):
    found = tree("._a.txt", "a.TXT", ".ipynb_checkpoints/a.txt", "b.md", "c.txt/d.txt", "e/._f.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    assert found(".") == ["a.TXT", "c.txt/d.txt"]
    (message,) = caplog.messages
    for part in ("3 hidden (as .", "1 not .txt (as b.md)", "2 no file (as gone.txt)"):
        assert part in message
    assert found("*/*") == ["c.txt/d.txt"]
    assert found("._a.txt") == ["._a.txt"]  # named by itself


def test_paths_that_mean_no_file(tree):
    found = tree(".hidden.txt", "b.md")
    for path, message in [
        ("no.txt", "data file no.txt does not exist: name a file, a folder or a pattern"),
        ("*.txt", r"no data file matches \*.txt; left out: 1 hidden \(as .hidden.txt\)"),
        (".", r"no data file matches \*.txt below .; left out: 1 hidden .*, 1 not .txt \(as b.md"),
        ("***", "is no pattern of files: Invalid pattern"),
    ]:
        with pytest.raises(ConfigError, match=message):
            found(path)


def test_text_has_no_byte_order_mark_and_is_utf8(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\xef\xbb\xbf")
    assert read_text(path) == "one\N{ZERO WIDTH NO-BREAK SPACE}"
    path.write_bytes(b"one\xff")
    with pytest.raises(ConfigError, match="a.txt is not valid UTF-8: invalid start byte at byte 3"):
        read_text(path)
