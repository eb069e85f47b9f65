"""Corpora, the binidx format and the token cache: exact contents, resumption, clear errors."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from rwkvx_jax.config import ConfigError, DataConfig, SourceConfig, Stage
from rwkvx_jax.data import sources, token_cache
from rwkvx_jax.data.binidx import Binidx, write_index
from rwkvx_jax.data.chat import render_chat
from rwkvx_jax.data.pipeline import open_data
from rwkvx_jax.data.sources import FileCorpus, open_corpus
from rwkvx_jax.data.token_cache import build, cached
from rwkvx_jax.tokenizer import load_tokenizer
from tests.buckets import bucket  # noqa: F401

BYTES = load_tokenizer("byte")
PROSE = "Call me Ishmael.\n\nSome years ago — never mind how long precisely 🙂 —\n  I sailed.\n"


@pytest.fixture(scope="module")
def world():
    pytest.importorskip("pyrwkv_tokenizer")
    return load_tokenizer("world")


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of about 2 kB, so that small files are cut into many."""
    monkeypatch.setattr(sources, "_PART_BYTES", 2000)
    monkeypatch.setattr(sources, "_CUT_WINDOW", 40)


def documents(stream):
    return [
        stream.read(int(start), int(size))
        for start, size in zip(stream.starts, stream.sizes, strict=True)
    ]


def write_binidx(prefix, documents, dtype=np.uint16):
    prefix.with_suffix(".bin").write_bytes(np.concatenate(documents).astype(dtype).tobytes())
    with prefix.with_suffix(".idx").open("wb") as file:
        write_index(file, np.asarray([len(d) for d in documents]), np.dtype(dtype))


# --- binidx -------------------------------------------------------------------------------------


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
    expect("x.idx is cut short: 81 bytes", new_index=good_index[:-1])
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
    assert not (tmp_path / "data-cache").exists()
    sample = opened.dataset(Stage("s", 16, 1, 1, 1e-3))[0]["tokens"]
    np.testing.assert_array_equal(np.diff(sample), np.ones(16))
    write_binidx(tmp_path / "x", [np.asarray([1, 300, 0])])
    with pytest.raises(ConfigError, match="token 300 at position 1.*vocabulary of 257"):
        open_data(config, workdir=tmp_path, vocab_size=257, process_index=0)


# --- corpora ------------------------------------------------------------------------------------


def test_directories_and_globs(tmp_path):
    for name in ("b.txt", "a.txt", "deep/er/c.txt", "notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"I am {name}.")
    (tmp_path / "empty.txt").touch()

    def names(path):
        return [os.path.relpath(name, tmp_path) for name, *_ in FileCorpus("text", path).listing()]

    assert names(str(tmp_path)) == ["a.txt", "b.txt", "deep/er/c.txt"]
    assert names(f"{tmp_path}/?.txt") == ["a.txt", "b.txt"]
    assert names(f"{tmp_path}/**/*.*") == ["a.txt", "b.txt", "deep/er/c.txt", "notes.md"]
    assert names(str(tmp_path / "notes.md")) == ["notes.md"]
    stream, _ = cached(FileCorpus("text", str(tmp_path)), BYTES, tmp_path / "cache")
    texts = [BYTES.decode(tokens) for tokens in documents(stream)]
    assert texts == ["I am a.txt.", "I am b.txt.", "I am deep/er/c.txt."]
    assert all(tokens[-1] == 0 for tokens in documents(stream))


def test_missing_empty_and_mistaken_files(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "x.jsonl").write_text("{}")
    for path, message in [
        (tmp_path / "no.txt", "data file .*no.txt does not exist"),
        (tmp_path / "empty.txt", "data file .*empty.txt is empty"),
        (tmp_path / "*.md", r"no file matches .*\*.md"),
        (tmp_path / "x.jsonl", 'looks like jsonl: set kind="jsonl"'),
        (tmp_path / "x.bin", 'looks like binidx: set kind="binidx"'),
    ]:
        with pytest.raises(ConfigError, match=message):
            open_corpus("text", str(path))
    (tmp_path / "empty.txt").unlink()
    with pytest.raises(ConfigError, match=r"no file matches \*.txt below"):
        open_corpus("text", str(tmp_path))
    with pytest.raises(ConfigError, match='"\\*\\*" does not work in gs://b/\\*\\*/x'):
        open_corpus("text", "gs://b/**/x")


def test_invalid_utf8_names_file_and_byte(tmp_path, small_parts):
    path = tmp_path / "bad.txt"
    path.write_bytes(b"fine line\n" * 700 + b"\xffoops")
    with pytest.raises(
        ConfigError, match="bad.txt is not valid UTF-8: invalid start byte at byte 7000"
    ):
        build(open_corpus("text", str(path)), BYTES, tmp_path / "out")
    assert not (tmp_path / "out.idx").exists()


@pytest.mark.parametrize("name", ["byte", "world"])
@pytest.mark.parametrize("workers", [0, 2])
def test_cutting_a_file_changes_no_token(name, workers, tmp_path, small_parts, request):
    tokenizer = request.getfixturevalue("world") if name == "world" else BYTES
    texts = [PROSE * 200, "short", PROSE * 3, "x" * 9000, PROSE * 40]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    corpus = open_corpus("text", str(tmp_path))
    assert len(corpus.parts(tokenizer)) > 8
    build(corpus, tokenizer, tmp_path / "out", workers=workers)
    found = documents(Binidx(tmp_path / "out"))
    assert len(found) == len(texts)
    for tokens, text in zip(found, texts, strict=True):
        np.testing.assert_array_equal(tokens, np.append(tokenizer.encode(text), 0))
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.bin", "out.idx"]


def test_a_cut_between_two_windows_is_found(monkeypatch):
    monkeypatch.setattr(sources, "_CUT_WINDOW", 40)
    data = b"x" * 39 + b"\nT" + b"x" * 100
    place = sources._find_cut(io.BytesIO(data), 0, len(data), lambda d: d.rfind(b"\nT") + 1)
    assert place == 40


@pytest.mark.parametrize("workers", [0, 2])
def test_jsonl_documents(tmp_path, small_parts, workers):
    texts = [f"Document {i}: " + "é" * (i % 50) for i in range(200)]
    lines = [json.dumps({"text": text, "id": i}) for i, text in enumerate(texts)]
    lines[10:10] = ["", json.dumps({"text": ""})]
    path = tmp_path / "docs.jsonl"
    path.write_text("\n".join(lines))  # no line break at the end
    build(open_corpus("jsonl", str(path)), BYTES, tmp_path / "out", workers=workers)
    stream = Binidx(tmp_path / "out")
    assert [BYTES.decode(tokens) for tokens in documents(stream)] == texts
    assert not stream.masked


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"title": "x"}', 'neither "text" nor "messages"'),
        ("[1]", 'neither "text" nor "messages"'),
        ('{"text": 5}', '"text" is not a string'),
        ('{"text": "cut', "Unterminated string"),
        ('{"messages": []}', '"messages" is not a list of turns'),
        ('{"messages": [{"role": "user"}]}', 'has no "content" string'),
        ('{"messages": [{"role": "bot", "content": "x"}]}', "role 'bot' is none of"),
        (b'{"text": "\xff"}', "can't decode byte 0xff"),
    ],
)
def test_bad_jsonl_line_names_file_and_line(line, message, tmp_path, small_parts):
    path = tmp_path / "docs.jsonl"
    line = line.encode() if isinstance(line, str) else line
    path.write_bytes(b'{"text": "good"}\n' * 500 + line + b"\n")
    with pytest.raises(ConfigError, match=f"docs.jsonl, line 501: .*{message}"):
        build(open_corpus("jsonl", str(path)), BYTES, tmp_path / "out")


CHAT = [
    {"role": "user", "content": "Hello there "},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long."},
]


def test_chat_template_and_mask():
    tokens, mask = render_chat(CHAT, BYTES)
    text = "User: Hello there\n\nAssistant: Hi!\n\nUser: Bye\n\nAssistant: So long.\n\n"
    assert BYTES.decode(tokens) == text and tokens[-1] == 0
    counted = "".join(c for c, m in zip(text, mask[:-1], strict=True) if m)
    assert counted == " Hi!\n\n So long.\n\n"
    assert mask[-1] == 1
    assert render_chat(CHAT[:1], BYTES)[1].sum() == 0


def test_chat_in_world_tokens(world):
    """Three tokens of `Assistant:` are masked, and the turns split as the whole text does."""
    tokens, mask = render_chat(CHAT[:2], world)
    np.testing.assert_array_equal(
        tokens[:-1], world.encode("User: Hello there\n\nAssistant: Hi!\n\n")
    )
    assert len(world.encode("Assistant:")) == 3
    user = len(world.encode("User: Hello there\n\n"))
    assert mask.tolist() == [0] * (user + 3) + [1] * (len(mask) - user - 3)
    assert 261 in tokens[mask == 1]  # the stop token is learned


def test_chat_masks_reach_the_samples(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text((json.dumps({"messages": CHAT}) + "\n") * 20 + json.dumps({"text": "plain"}))
    tokens, mask = render_chat(CHAT, BYTES)
    for samples in ("window", "document"):
        config = DataConfig(sources=(SourceConfig("jsonl", path=str(path), samples=samples),))
        opened = open_data(config, workdir=tmp_path, vocab_size=257, process_index=0)
        stream = opened.sources[0].stream
        assert stream.masked and stream.read_mask(len(stream) - 6, 6).tolist() == [1] * 6
        dataset = opened.dataset(Stage("s", len(tokens) - 1, 1, 1, 1e-3))
        for sample in (dataset[i] for i in range(15)):
            counted = sample["mask"] == 1
            text = BYTES.decode(sample["tokens"][1:][counted])
            assert text and ":" not in text and "U" not in text  # a shifted mask has one
            if samples == "document" and "plain" not in text:
                np.testing.assert_array_equal(counted, mask[1:])
                assert text == " Hi!\n\n So long.\n\n"


def test_bucket_paths(tmp_path, bucket):  # noqa: F811
    """The same code reads gs:// paths."""
    for name, text in (("a.txt", "first"), ("deep/b.txt", "second"), ("deep/c.md", "third")):
        bucket.pipe(f"bucket/set/{name}", text.encode())
    for path, expected in [
        ("gs://bucket/set", ["first", "second"]),
        ("gs://bucket/set/deep/*", ["second", "third"]),
        ("gs://bucket/set/a.txt", ["first"]),
    ]:
        stream, _ = cached(open_corpus("text", path), BYTES, tmp_path)
        assert [BYTES.decode(tokens) for tokens in documents(stream)] == expected
    with pytest.raises(ConfigError, match="gs://bucket/none.txt does not exist"):
        open_corpus("text", "gs://bucket/none.txt")


# --- the cache ----------------------------------------------------------------------------------


def corpus_of(tmp_path, text):
    path = tmp_path / "corpus.txt"
    path.write_text(text)
    return open_corpus("text", str(path))


def test_cache_is_keyed_by_contents_and_tokenizer(tmp_path, world, monkeypatch):
    cache = tmp_path / "cache"
    first, fingerprint = cached(corpus_of(tmp_path, "one"), BYTES, cache)
    (tmp_path / "corpus.txt").rename(tmp_path / "moved.txt")
    moved = open_corpus("text", str(tmp_path / "moved.txt"))
    monkeypatch.setattr(token_cache, "encode_part", None)  # would fail if called
    again, same = cached(moved, BYTES, cache)
    assert again.prefix == first.prefix and same == fingerprint
    monkeypatch.undo()
    other_text, _ = cached(corpus_of(tmp_path, "two"), BYTES, cache)
    other_tokens, _ = cached(moved, world, cache)
    assert len({first.prefix, other_text.prefix, other_tokens.prefix}) == 3


def test_interrupted_work_goes_on_and_nothing_half_is_visible(tmp_path, small_parts, monkeypatch):
    corpus = corpus_of(tmp_path, PROSE * 200)
    build(corpus, BYTES, tmp_path / "whole")
    encoded = []

    def encode_until(limit):
        def encode(part, tokenizer):
            if len(encoded) == limit:
                raise KeyboardInterrupt
            encoded.append(part)
            return sources.encode_part(part, tokenizer)

        return encode

    monkeypatch.setattr(token_cache, "encode_part", encode_until(3))
    with pytest.raises(KeyboardInterrupt):
        build(corpus, BYTES, tmp_path / "out")
    assert not list(tmp_path.glob("out.[bi]*"))
    assert len(list((tmp_path / "out.parts").glob("*.npz"))) == 3
    monkeypatch.setattr(token_cache, "encode_part", encode_until(-1))
    build(corpus, BYTES, tmp_path / "out")
    assert len(encoded) == len(corpus.parts(BYTES)) == len(set(encoded))
    for extension in ("bin", "idx"):
        whole, out = ((tmp_path / f"{n}.{extension}").read_bytes() for n in ("whole", "out"))
        assert whole == out


def test_parts_of_another_corpus_are_thrown_away(tmp_path, small_parts, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(token_cache, "_join", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(corpus_of(tmp_path, PROSE * 200), BYTES, tmp_path / "out")
    monkeypatch.undo()
    changed = PROSE.upper() * 201
    build(corpus_of(tmp_path, changed), BYTES, tmp_path / "out")
    assert BYTES.decode(documents(Binidx(tmp_path / "out"))[0]) == changed


def test_a_failed_write_leaves_no_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_cache, "write_index", full)
    with pytest.raises(OSError, match="No space left") as error:
        build(corpus_of(tmp_path, PROSE), BYTES, tmp_path / "out")
    assert "finished parts are kept" in error.value.__notes__[0]
    assert not (tmp_path / "out.idx").exists() and not list(tmp_path.glob("*.tmp"))
    monkeypatch.undo()
    build(corpus_of(tmp_path, PROSE), BYTES, tmp_path / "out")
    assert BYTES.decode(documents(Binidx(tmp_path / "out"))[0]) == PROSE


def test_only_process_0_writes_and_others_wait(tmp_path):
    corpus = corpus_of(tmp_path, PROSE)
    with pytest.raises(ConfigError, match="waited 0 s for process 0.*data.cache_per_host"):
        cached(corpus, BYTES, tmp_path / "cache", writer=False, stalled=0.0)
    assert not (tmp_path / "cache").exists()
    results = []
    waiting = threading.Thread(
        target=lambda: results.append(cached(corpus, BYTES, tmp_path / "cache", writer=False))
    )
    waiting.start()
    time.sleep(0.1)
    assert not results
    expected, _ = cached(corpus, BYTES, tmp_path / "cache")
    waiting.join(timeout=20)
    assert results[0][0].prefix == expected.prefix


def test_concurrent_writers_share_one_result(tmp_path, small_parts, monkeypatch):
    corpus, encoded = corpus_of(tmp_path, PROSE * 300), []

    def encode(part, tokenizer):
        encoded.append(part)
        return sources.encode_part(part, tokenizer)

    monkeypatch.setattr(token_cache, "encode_part", encode)
    threads = [
        threading.Thread(target=build, args=(corpus, BYTES, tmp_path / "out")) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(encoded) == len(corpus.parts(BYTES))
    assert BYTES.decode(documents(Binidx(tmp_path / "out"))[0]) == PROSE * 300


# --- command line -------------------------------------------------------------------------------


def run_cli(*arguments, **options):
    command = [sys.executable, "-m", "rwkvx_jax.data", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_command_line(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": PROSE}) + "\n")
    arguments = (tmp_path / "a.jsonl", tmp_path / "out", "--tokenizer", "byte", "--workers", 1)
    out, _ = run_cli(*arguments).communicate(timeout=60)
    assert f"1 documents, {len(PROSE.encode()) + 1} tokens" in out.decode()
    assert BYTES.decode(documents(Binidx(tmp_path / "out"))[0]) == PROSE
    again = run_cli(*arguments)
    _, error = again.communicate(timeout=60)
    assert again.returncode == 1 and b"error: " in error and b"exists" in error


@pytest.mark.slow
def test_command_line_resumes_after_sigkill(tmp_path):
    (tmp_path / "a.txt").write_text(PROSE * 500_000)
    arguments = (tmp_path / "a.txt", tmp_path / "out", "--tokenizer", "byte", "--workers", 1)
    process = run_cli(*arguments)
    parts = tmp_path / "out.parts"
    deadline = time.monotonic() + 60
    while len(list(parts.glob("*.npz"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=20)  # its worker must not live on
    assert not (tmp_path / "out.idx").exists()
    _, error = run_cli(*arguments).communicate(timeout=120)
    assert b"parts are there" in error
    stream = Binidx(tmp_path / "out")
    assert len(stream) == 500_000 * len(PROSE.encode()) + 1
    tokens = np.append(np.tile(BYTES.encode(PROSE), 500_000), 0)
    np.testing.assert_array_equal(stream.read(0, len(stream)), tokens)
