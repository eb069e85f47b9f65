"""Tokenizers: exact round trips, ids equal to the reference encoder, safe cuts, bad files."""

import pickle
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvx_jax.config import ConfigError
from rwkvx_jax.tokenizer import load_tokenizer, read_vocabulary, tokenizer_of
from tests.helpers import shared_path

ALL_BYTES = bytes(range(256)) + bytes(reversed(range(256)))
TEXT = "The pass key is 33004.\n\n\tΣ ナイン 🙂 e\u0301  \r\n" * 3


def small_vocabulary(path):
    """All bytes plus a few longer tokens, written in the file format."""
    tokens = [bytes([i]) for i in range(256)] + [b"ab", b"abcd", b"\n\n", "é".encode(), b"  "]
    path.write_text("".join(f"{i} {t!r} {len(t)}\n" for i, t in enumerate(tokens, 1)))
    return str(path)


@pytest.fixture(scope="module")
def world():
    pytest.importorskip("pyrwkv_tokenizer")
    return load_tokenizer("world")


@pytest.fixture(scope="module")
def slow_world(world):
    """The World vocabulary with the encoder of this project."""
    slow = load_tokenizer("world")
    slow._fast = None
    return slow


def test_byte_ids():
    tokenizer = load_tokenizer("byte")
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (257, 0)
    ids = tokenizer.encode("Aé")
    assert ids.dtype == np.int32
    assert ids.tolist() == [66, 0xC3 + 1, 0xA9 + 1]
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(ALL_BYTES)) == ALL_BYTES
    assert tokenizer.decode([66, 0, 67]) == "AB"


def test_world_known_ids(world):
    assert (world.vocab_size, world.end_of_document) == (65530, 0)
    assert world.encode("33004").tolist() == [653, 620, 53]
    assert world.encode(" 33004").tolist() == [3506, 620, 53]
    assert world.encode("\n").tolist() == [11]
    assert world.encode("\n\n").tolist() == [261]
    assert world.encode("").dtype == np.int32


@pytest.mark.parametrize("name", ["byte", "world", "slow_world"])
def test_round_trip_of_any_bytes(name, request):
    tokenizer = load_tokenizer("byte") if name == "byte" else request.getfixturevalue(name)

    @settings(max_examples=60, deadline=None)
    @given(st.binary(max_size=300))
    def check(data):
        assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data

    check()
    for data in (ALL_BYTES, TEXT.encode(), TEXT.encode()[:-30] + b"\xff\xe3\x83"):
        assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_own_encoder_equals_the_package(world, slow_world):
    text = shared_path("data", "gutenberg_clean", "war_and_peace.txt").read_text("utf-8")
    start = time.perf_counter()
    expected = world.encode(text)
    seconds = time.perf_counter() - start
    assert len(expected) / seconds >= 1e6, f"{len(expected) / seconds:.0f} tokens/s"
    np.testing.assert_array_equal(slow_world.encode(text[:400_000]), world.encode(text[:400_000]))
    np.testing.assert_array_equal(slow_world.encode(TEXT), world.encode(TEXT))
    assert world.decode(expected) == text


@pytest.mark.slow
def test_own_encoder_equals_the_package_on_the_whole_book(world, slow_world):
    text = shared_path("data", "gutenberg_clean", "war_and_peace.txt").read_text("utf-8")
    np.testing.assert_array_equal(slow_world.encode(text), world.encode(text))


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="install pyrwkv-tokenizer, or set data.vocab_file"):
        load_tokenizer("world")
    tokenizer = load_tokenizer("world", small_vocabulary(tmp_path / "vocab.txt"))
    assert tokenizer.encode("abcdabc").tolist() == [258, 257, 100]
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(ALL_BYTES)) == ALL_BYTES
    assert tokenizer.encode("abcda").tolist() == [258, 98]  # ends inside a longer token


def test_user_vocabulary_with_the_package(tmp_path, world):
    tokenizer = load_tokenizer("world", small_vocabulary(tmp_path / "vocab.txt"))
    text = "abcdab é  \n\n\nabc"
    np.testing.assert_array_equal(tokenizer.encode(text), tokenizer._greedy(text.encode()))
    assert tokenizer.fingerprint != world.fingerprint


@pytest.mark.parametrize("name", ["byte", "world"])
def test_safe_cut_keeps_the_ids(name, request):
    tokenizer = request.getfixturevalue("world") if name == "world" else load_tokenizer("byte")
    data = ("Once. There\n\nwas a Σ key\n  indented\n" * 20).encode()
    whole = tokenizer.encode_bytes(data)
    cuts = {tokenizer.safe_cut(data[:end]) for end in range(2, len(data))} - {0}
    assert len(cuts) > 20
    for cut in cuts:
        parts = [tokenizer.encode_bytes(data[:cut]), tokenizer.encode_bytes(data[cut:])]
        np.testing.assert_array_equal(np.concatenate(parts), whole, err_msg=f"cut at {cut}")
        (data[:cut] + b"|" + data[cut:]).decode()  # no character is torn
    assert tokenizer.safe_cut("é".encode()) == 0
    assert tokenizer.safe_cut(b"  ") == (0 if name == "world" else 1)


def test_decode_of_unknown_ids(world):
    assert world.decode([66, 65535, 67]) == "A\N{REPLACEMENT CHARACTER}B"
    with pytest.raises(ValueError, match="token 65535 is not in the world vocabulary"):
        world.decode_bytes([65535])
    with pytest.raises(ValueError, match="token -1"):
        load_tokenizer("byte").decode_bytes([-1])


def test_pickle(world):
    for tokenizer in (load_tokenizer("byte"), world):
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert copy.fingerprint == tokenizer.fingerprint
        np.testing.assert_array_equal(copy.encode(TEXT), tokenizer.encode(TEXT))


def test_bad_vocabulary_files(tmp_path):
    path = tmp_path / "vocab.txt"
    with pytest.raises(ConfigError, match="does not exist"):
        read_vocabulary(path)
    small_vocabulary(path)
    good = path.read_text().splitlines()
    for line, message in [
        ("300", "line 3: expected `id literal length`"),
        ("3 b'xy' 5", "line 3: id 3 or length 5 is wrong"),
        ("3 __import__('os') 1", "line 3: expected"),
        ("3 1 1", "line 3: expected"),
        ("3 'a','b' 2", "is neither a string nor bytes"),
        ("3 '\\ud800' 3", "line 3: expected"),
        ("3 " + "(" * 100_000 + " 1", "line 3: expected .*found '3 \\(+'"),
        ("200000000 b'xy' 2", "line 3: id 200000000 is too large: ids end at 1,048,575"),
        ("2 b'\\x02' 1", "line 3: id 2 occurs twice"),
        ("3 b'xy' 2", r"no token for the single byte b'\\x02'"),
    ]:
        path.write_text("\n".join([*good[:2], line, *good[3:]]))
        with pytest.raises(ConfigError, match=message):
            read_vocabulary(path)
    path.write_bytes(b"1 '\xff' 1\n")
    with pytest.raises(ConfigError, match="vocab.txt is no vocabulary: it is not valid UTF-8"):
        read_vocabulary(path)
    with pytest.raises(ConfigError, match='choose "byte" or "world"'):
        load_tokenizer("words")


def test_hostile_vocabularies_are_refused_at_once(tmp_path):
    path = tmp_path / "vocab.txt"
    for content in (b"1 '" + b"a" * 20_000_000, b"1 b'\\x00' 1\n" * 2_000_000, b"\0" * 20_000_000):
        path.write_bytes(content)
        tracemalloc.start()
        begin = time.perf_counter()
        with pytest.raises(ConfigError, match="vocab.txt, line [12]: "):
            read_vocabulary(path)
        assert time.perf_counter() - begin < 2 and tracemalloc.get_traced_memory()[1] < 1e6
        tracemalloc.stop()


def test_a_vocabulary_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "vocab.txt"
    small_vocabulary(path)
    plain = read_vocabulary(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_vocabulary(path) == plain


def test_the_tokenizer_of_a_model(world):
    assert [tokenizer_of(n) for n in (257, 65536, 1000)] == ["byte", "world", ""]
    assert tokenizer_of(world.vocab_size) == "world"
    assert tokenizer_of(world.vocab_size - 1) == ""  # it has no row for the last id
