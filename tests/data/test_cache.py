"""Corpora and the token cache: exact contents, resumption, clear errors."""

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

from rwkvx_jax.config import ConfigError
from rwkvx_jax.data import sources, stored, token_cache
from rwkvx_jax.data.binidx import Binidx
from rwkvx_jax.data.sources import FileCorpus, open_corpus
from rwkvx_jax.data.token_cache import build, cached
from rwkvx_jax.tokenizer import load_tokenizer
from tests.buckets import bucket  # noqa: F401
from tests.data.token_files import documents

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
        (tmp_path / "*.md", r"no data file matches .*\*.md"),
        (tmp_path / "x.jsonl", 'looks like jsonl: set kind="jsonl"'),
        (tmp_path / "x.bin", 'looks like binidx: set kind="binidx"'),
    ]:
        with pytest.raises(ConfigError, match=message):
            open_corpus("text", str(path))
    (tmp_path / "empty.txt").unlink()
    with pytest.raises(ConfigError, match=r"no data file matches \*.txt below .*; left out: 1 not"):
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
    found = sorted(path.name for path in tmp_path.glob("out*"))
    assert found == ["out.bin", "out.hash", "out.idx", "out.lock"]


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
        ('{"text": null, "messages": null}', 'neither "text" nor "messages"'),
        ("[1]", "no JSON object"),
        ("[" * 200_000 + "]" * 200_000, "recursion"),
        ('{"a":' * 200_000 + "1" + "}" * 200_000, "recursion"),
        ('{"text": 5}', '"text" is not a string'),
        ('{"text": "cut', "Unterminated string"),
        ('{"messages": []}', '"messages" is not a list of turns'),
        ('{"text": "x", "messages": "y"}', '"messages" is not a list of turns'),
        (b'{"text": "\xff"}', "can't decode byte 0xff"),
    ],
)
def test_bad_jsonl_line_names_file_and_line(line, message, tmp_path, small_parts):
    path = tmp_path / "docs.jsonl"
    line = line.encode() if isinstance(line, str) else line
    path.write_bytes(b'{"text": "good"}\n' * 500 + line + b"\n")
    begin = time.monotonic()
    with pytest.raises(ConfigError, match=f"docs.jsonl, line 501: .*{message}"):
        build(open_corpus("jsonl", str(path)), BYTES, tmp_path / "out")
    assert time.monotonic() - begin < 2


def test_null_fields_count_as_absent(tmp_path):
    chat = [{"role": "user", "content": "two"}, {"role": "assistant", "content": "three"}]
    records = [{"text": "one", "messages": None}, {"text": None, "messages": chat}]
    path = tmp_path / "null.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    stream, _ = cached(open_corpus("jsonl", str(path)), BYTES, tmp_path)
    texts = [BYTES.decode(tokens) for tokens in documents(stream)]
    assert texts == ["one", "User: two\n\nAssistant: three\n\n"]


def test_a_byte_order_mark_is_no_text(tmp_path, small_parts):
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.txt").write_bytes(mark + PROSE.encode() * 100)
    (tmp_path / "b.txt").write_bytes(mark)
    (tmp_path / "c.jsonl").write_bytes(mark + json.dumps({"text": PROSE}).encode())
    stream, _ = cached(open_corpus("text", str(tmp_path)), BYTES, tmp_path / "cache")
    assert [BYTES.decode(tokens) for tokens in documents(stream)] == [PROSE * 100]
    stream, _ = cached(open_corpus("jsonl", str(tmp_path)), BYTES, tmp_path / "cache")
    assert [BYTES.decode(tokens) for tokens in documents(stream)] == [PROSE]


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


def test_a_damaged_part_is_made_again(tmp_path, small_parts, monkeypatch, caplog):
    corpus = corpus_of(tmp_path, PROSE * 200)
    build(corpus, BYTES, tmp_path / "whole")

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(token_cache, "_join", interrupt)
        build(corpus, BYTES, tmp_path / "out")
    parts = sorted((tmp_path / "out.parts").glob("*.npz"))
    good = parts[0].read_bytes()
    damaged = [b"", good[:-40], bytes(len(good)), good[:300] + b"\xff" + good[301:]]
    for path, content in zip(parts, damaged, strict=False):
        path.write_bytes(content)
    with parts[4].open("wb") as file:  # a whole file of another kind
        np.save(file, np.arange(5))
    build(corpus, BYTES, tmp_path / "out")
    assert (tmp_path / "out.bin").read_bytes() == (tmp_path / "whole.bin").read_bytes()
    assert sum("is damaged" in record.message for record in caplog.records) == 5


def test_parts_that_were_cut_otherwise_are_thrown_away(tmp_path, small_parts, monkeypatch):
    corpus = corpus_of(tmp_path, PROSE * 200)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(token_cache, "_join", interrupt)
        build(corpus, BYTES, tmp_path / "out")
    monkeypatch.setattr(sources, "_PART_BYTES", 3000)
    build(corpus, BYTES, tmp_path / "out")
    assert BYTES.decode(documents(Binidx(tmp_path / "out"))[0]) == PROSE * 200


def test_a_damaged_list_of_the_parts_is_made_again(tmp_path, small_parts, monkeypatch, caplog):
    (tmp_path / "out.parts").mkdir()
    (tmp_path / "out.parts" / "corpus.json").write_bytes(b"\xff{")
    build(corpus_of(tmp_path, PROSE), BYTES, tmp_path / "out")
    assert BYTES.decode(documents(Binidx(tmp_path / "out"))[0]) == PROSE
    assert "corpus.json is damaged" in caplog.text


def test_a_failed_write_leaves_no_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stored, "write_index", full)
    with pytest.raises(ConfigError, match="No space left on device.*finished parts are kept"):
        build(corpus_of(tmp_path, PROSE), BYTES, tmp_path / "out")
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


def run_cli(*arguments, before=()):
    command = [*before, sys.executable, "-m", "rwkvx_jax.data", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_command_line(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": PROSE}) + "\n")
    arguments = (tmp_path / "a.jsonl", tmp_path / "out", "--tokenizer", "byte", "--workers", 1)
    out, _ = run_cli(*arguments).communicate(timeout=60)
    assert f"1 documents, {len(PROSE.encode()) + 1} tokens" in out.decode()
    assert BYTES.decode(documents(Binidx(tmp_path / "out"))[0]) == PROSE
    again = run_cli(*arguments)
    _, error = again.communicate(timeout=60)
    assert again.returncode == 1 and b"error: " in error and b"exists" in error


def test_a_full_disk_is_one_line_and_leaves_nothing_half(tmp_path):
    """A limit on the size of files stands for the full disk."""
    (tmp_path / "a [b].txt").write_text(PROSE * 3000)
    arguments = (tmp_path / "a [b].txt", tmp_path / "out", "--tokenizer", "byte")
    limited = ["bash", "-c", 'ulimit -f 200; exec "$@"', "bash"]
    process = run_cli(*arguments, "--workers", 1, before=limited)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and error.decode().startswith("error: tokenizing ")
    assert (
        b"File too large" in error
        and b"finished parts are kept" in error
        and error.count(b"\n") == 1
    )
    assert not list(tmp_path.rglob("*.tmp")) and not (tmp_path / "out.idx").exists()
    build(open_corpus("text", str(tmp_path / "a [b].txt")), BYTES, tmp_path / "out")
    assert BYTES.decode(documents(Binidx(tmp_path / "out"))[0]) == PROSE * 3000


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
