"""Files of records: appended to by several processes, half lines, damaged ones, numbers."""

import gzip
import math

import pytest

from rwkvx_jax import records
from rwkvx_jax.config import ConfigError
from rwkvx_jax.records import RecordFile, not_finite


def test_what_one_appends_the_others_read_once(tmp_path):
    first, second = RecordFile(tmp_path / "x.jsonl"), RecordFile(tmp_path / "x.jsonl")
    assert first.new() == []
    first.append([{"a": 1}, [2, "é"]])
    assert first.new() == [] and second.new() == [{"a": 1}, [2, "é"]]
    second.append([3])
    assert (first.new(), second.new()) == ([3], [])
    assert records.read(first.path) == [{"a": 1}, [2, "é"], 3]


def test_half_a_line_is_cut_off_and_kept_aside(tmp_path, caplog):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2')
    assert records.read(path) == [{"a": 1}] and "ends in half a line" in caplog.text
    assert list(tmp_path.iterdir()) == [path]
    file = RecordFile(path)
    assert file.new() == [{"a": 1}]
    file.append([{"a": 3}])
    assert path.read_bytes() == b'{"a": 1}\n{"a": 3}\n'
    assert (tmp_path / "x.jsonl.damaged-1").read_bytes() == b'{"a": 1}\n{"a": 2'
    assert "kept as x.jsonl.damaged-1" in caplog.text


def test_a_file_of_something_else_is_left_alone(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"letter")
    with pytest.raises(ConfigError, match="holds something else"):
        RecordFile(path).new(begins=b'{"format": ')
    path.write_bytes(b'{"for')
    assert RecordFile(path).new(begins=b'{"format": ') == []
    path.write_bytes(b"1\n2\n")
    file = RecordFile(path)
    file.new()
    path.write_bytes(b"1\n")
    with pytest.raises(ConfigError, match="was replaced while it was in use"):
        file.new()


@pytest.mark.parametrize(
    "line, message",
    [
        ("nonsense", "line 2 is not JSON"),
        ('{"a": [1, NaN]}', r"line 2: a\[1\] is not finite"),
        ("1e999", "line 2: the number is not finite"),
        ('{"a": ' * 50_000, "line 2 is not JSON"),
    ],
)
def test_damaged_lines_are_refused(tmp_path, line, message):
    path = tmp_path / "x.jsonl"
    path.write_text(f"1\n{line}\n2\n")
    for reader in (lambda: records.read(path), RecordFile(path).new):
        with pytest.raises(ConfigError, match=message):
            reader()


def test_numbers_that_are_not_finite_are_never_written(tmp_path):
    file = RecordFile(tmp_path / "x.jsonl")
    with pytest.raises(ValueError):
        file.append([{"a": math.inf}])
    assert not file.path.exists()
    assert not_finite({"a": [{"b": math.nan}]}) == "a[0].b" and not not_finite({"a": (1, "x")})


def test_compressed_files_are_read(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b"1\n[2]\n"))
    assert records.read(path) == [1, [2]]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ConfigError, match="x.jsonl.gz is damaged"):
        records.read(path)


def test_one_process_at_a_time(tmp_path):
    path = tmp_path / "below" / "x.jsonl"
    with RecordFile(path).locked():
        with pytest.raises(ConfigError, match="busy"):
            with RecordFile(path).locked(busy="busy"):
                pass
