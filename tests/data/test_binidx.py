"""The binidx format: exact bytes, damaged and mutated files, files that change while in use."""

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvx_jax.config import ConfigError, DataConfig, SourceConfig, Stage
from rwkvx_jax.data import binidx
from rwkvx_jax.data.binidx import Binidx
from rwkvx_jax.data.pipeline import open_data
from tests.data.token_files import documents, write_binidx


def test_index_bytes_are_those_of_the_format(tmp_path):
    """Two documents of 2 and 3 tokens, uint16: the file spelled out by hand."""
    write_binidx(tmp_path / "x", [np.asarray([7, 0]), np.asarray([8, 9, 0])])
    expected = (
        b"MMIDIDX\0\0"
        + (1).to_bytes(8, "little")
        + b"\x08"
        + (2).to_bytes(8, "little")
        + (3).to_bytes(8, "little")
        + b"".join(n.to_bytes(4, "little") for n in (2, 3))
        + b"".join(n.to_bytes(8, "little") for n in (0, 4))
        + b"".join(n.to_bytes(8, "little") for n in (0, 1, 2))
    )
    assert (tmp_path / "x.idx").read_bytes() == expected
    for name in ("x", "x.bin", "x.idx"):
        stream = Binidx(tmp_path / name)
        assert len(stream) == 5 and stream.dtype == np.uint16
        assert [d.tolist() for d in documents(stream)] == [[7, 0], [8, 9, 0]]
        assert stream.read_mask(1, 3).tolist() == [1, 1, 1]


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_other_integer_types(tmp_path, dtype):
    write_binidx(tmp_path / "x", [np.asarray([100, 3, 0])], dtype)
    stream = Binidx(tmp_path / "x")
    assert stream.read(0, 3).tolist() == [100, 3, 0] and stream.read(0, 3).dtype == np.int32
    stream.check_vocabulary(101)
    with pytest.raises(ConfigError, match="token 100 at position 0 is outside the vocabulary of 9"):
        stream.check_vocabulary(9)


def test_damaged_binidx_files(tmp_path):
    path = tmp_path / "x"
    index, tokens = path.with_suffix(".idx"), path.with_suffix(".bin")
    with pytest.raises(ConfigError, match="x.idx does not exist"):
        Binidx(path)
    write_binidx(path, [np.asarray([7, 0]), np.asarray([8, 9, 0])])
    good_index, good_tokens = index.read_bytes(), tokens.read_bytes()

    def expect(message, new_index=good_index, new_tokens=good_tokens):
        index.write_bytes(new_index)
        tokens.write_bytes(new_tokens)
        with pytest.raises(ConfigError, match=message):
            Binidx(path)

    expect("x.bin is cut short: 9 bytes, x.idx asks for 10", new_tokens=good_tokens[:-1])
    expect("x.bin is too long: 12 bytes, x.idx asks for 10", new_tokens=good_tokens + b"ab")
    expect("x.idx is cut short: 81 bytes", new_index=good_index[:-1])
    expect("x.idx is too long: 83 bytes", new_index=good_index + b"a")
    huge = (2**60).to_bytes(8, "little")
    expect("x.idx is cut short", new_index=good_index[:18] + huge + good_index[26:])
    expect("is not a binidx index", new_index=b"PK" + good_index[2:])
    expect("is not a binidx index", new_index=good_index[:20])
    expect("version 1, type code 6 can't be read", good_index[:17] + b"\x06" + good_index[18:])
    expect("holds no documents", good_index[:18] + bytes(8) + good_index[26:])
    expect("do not follow one another", good_index[:50] + b"\x06" + good_index[51:])
    tokens.unlink()
    with pytest.raises(ConfigError, match="x.bin does not exist"):
        Binidx(path)


def test_negative_tokens_are_outside_the_vocabulary(tmp_path):
    write_binidx(tmp_path / "x", [np.asarray([5, -1])], np.int32)
    with pytest.raises(ConfigError, match="token -1 at position 1"):
        Binidx(tmp_path / "x").check_vocabulary(65536)


def test_binidx_source_is_read_in_place(tmp_path):
    write_binidx(tmp_path / "x", [np.arange(1, 200), np.asarray([255, 0])])
    config = DataConfig(sources=(SourceConfig("binidx", path=str(tmp_path / "x.bin")),))
    opened = open_data(config, workdir=tmp_path, vocab_size=257, process_index=0)
    assert opened.fingerprint["sources"][0]["tokens"] == 201
    assert [path.suffix for path in (tmp_path / "data-cache").iterdir()] == [".hash"]
    sample = opened.dataset(Stage("s", 16, 1, 1, 1e-3))[0]["tokens"]
    np.testing.assert_array_equal(np.diff(sample), np.ones(16))
    write_binidx(tmp_path / "y", [np.asarray([1, 300, 0])])
    config = DataConfig(sources=(SourceConfig("binidx", path=str(tmp_path / "y")),))
    with pytest.raises(ConfigError, match="token 300 at position 1.*vocabulary of 257"):
        open_data(config, workdir=tmp_path, vocab_size=257, process_index=0)


@st.composite
def mutations(draw):
    """A function that damages bytes: flips some, cuts, or repeats a stretch."""
    kind = draw(st.sampled_from(["flip", "cut", "repeat", "overwrite"]))
    start, stop = sorted((draw(st.integers(0, 81)), draw(st.integers(0, 81))))
    value = draw(st.integers(1, 255))
    return {
        "flip": lambda b: b[:start] + bytes([b[start] ^ value]) + b[start + 1 :],
        "cut": lambda b: b[:start] + b[stop + 1 :],
        "repeat": lambda b: b[:stop] + b[start:stop] + b[stop:],
        "overwrite": lambda b: b[:start] + bytes([value]) * (stop - start) + b[stop:],
    }[kind]


def test_a_mutated_index_is_refused_or_changes_nothing(tmp_path):
    path = tmp_path / "x"
    write_binidx(path, [np.asarray([7, 0]), np.asarray([8, 9, 0])])
    index = path.with_suffix(".idx")
    good, expected = index.read_bytes(), [d.tolist() for d in documents(Binidx(path))]
    outcomes = set()

    @settings(max_examples=60, deadline=None)
    @given(mutations())
    def check(mutate):
        index.write_bytes(mutate(good))
        try:
            found = [d.tolist() for d in documents(Binidx(path))]
        except ConfigError as error:
            outcomes.add("refused")
            assert str(path) in str(error)
        else:
            outcomes.add("equal")
            assert found == expected

    check()
    assert "refused" in outcomes


def test_a_file_that_becomes_shorter_while_in_use_is_an_error(tmp_path):
    """Through a memory map this would be SIGBUS."""
    path = tmp_path / "x"
    write_binidx(path, [np.arange(1, 5001)])
    stream = Binidx(path)
    with path.with_suffix(".bin").open("r+b") as file:
        file.truncate(6000)
    np.testing.assert_array_equal(stream.read(2990, 10), np.arange(2991, 3001))
    with pytest.raises(ConfigError, match="x.bin has become shorter .* byte 6000 is gone"):
        stream.read(2990, 11)


def test_targets_of_spans_are_found_in_blocks(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    write_binidx(tmp_path / "x", [np.ones(1000, int)])
    mask = (rng.random(1000) < 0.01).astype(np.uint8)
    (tmp_path / "x.mask").write_bytes(mask.tobytes())
    begins = np.sort(rng.integers(0, 1000, 100))
    ends = np.sort(begins + rng.integers(0, 200, 100)).clip(max=1000)
    monkeypatch.setattr(binidx, "_SCAN_BLOCK", 64)
    found = Binidx(tmp_path / "x").has_targets(begins, ends)
    expected = [bool(mask[a:b].any()) for a, b in zip(begins, ends, strict=True)]
    assert found.tolist() == expected and 20 < sum(expected) < 80
    (tmp_path / "x.mask").unlink()
    assert (Binidx(tmp_path / "x").has_targets(begins, ends) == (ends > begins)).all()


def test_a_huge_hostile_index_is_refused_at_once(tmp_path):
    """20 MB of zeros behind a header that fits them: documents without tokens."""
    write_binidx(tmp_path / "x", [np.asarray([7, 0])])
    header, count = (tmp_path / "x.idx").read_bytes()[:18], 1_000_000
    counts = count.to_bytes(8, "little") + (count + 1).to_bytes(8, "little")
    (tmp_path / "x.idx").write_bytes(header + counts + bytes(20 * count + 8))
    tracemalloc.start()
    begin = time.monotonic()
    with pytest.raises(ConfigError, match="no tokens"):
        Binidx(tmp_path / "x")
    assert time.monotonic() - begin < 2
    assert tracemalloc.get_traced_memory()[1] < 64e6
    tracemalloc.stop()
