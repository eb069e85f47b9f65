"""Packed documents: nothing is lost or repeated, no border is a target, a packing is stored."""

import dataclasses
import json
import re
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvx_jax.config import Config, ConfigError, DataConfig, ModelConfig, SourceConfig, Stage
from rwkvx_jax.data import packing
from rwkvx_jax.data.binidx import Binidx
from rwkvx_jax.data.chat import render_chat
from rwkvx_jax.data.packing import Cache, best_fit, open_packing
from rwkvx_jax.data.pipeline import batches, open_data
from rwkvx_jax.data.samples import Packed
from rwkvx_jax.tokenizer import load_tokenizer
from tests.data.token_files import write_binidx

STAGE = Stage("first", seq_len=60, global_batch=8, steps=3, peak_lr=1e-3)
PACKED = SourceConfig("jsonl", samples="packed")


def numbered(folder, sizes, mask=None):
    """A stream in which every token is its own place, from 1 on."""
    places = np.arange(1, sum(sizes) + 1)
    write_binidx(folder / "s", np.split(places, np.cumsum(sizes)[:-1]), np.int32)
    if mask is not None:
        (folder / "s.mask").write_bytes(mask.tobytes())
    return Binidx(folder / "s")


def pack(stream, seq_len, *, align=1, seed=0, begin=0, end=None):
    end = len(stream) if end is None else end
    cache = Cache(stream.prefix.parent / "cache", writer=True)
    windows = open_packing(stream, begin, end, seq_len, align, seed, cache)
    return Packed(stream, windows, begin, end, seq_len, align)


def segments(sample):
    """Inputs of each document of a sample; fails where ids skip, decrease or come back."""
    ids = sample["segment_ids"]
    changes = ids[ids > 0][np.append(True, np.diff(ids[ids > 0]) != 0)]
    np.testing.assert_array_equal(changes, np.arange(1, ids.max() + 1))
    return [sample["tokens"][:-1][ids == number] for number in changes]


# --- the packing ----------------------------------------------------------------------------------


def slow_best_fit(sizes, capacity):
    """Room left in each bin: the longest item first, each into the fullest bin that holds it."""
    rooms = []
    for size in sorted(sizes, reverse=True):
        fitting = [room for room in rooms if room >= size]
        room = min(fitting, default=capacity)
        if fitting:
            rooms.remove(room)
        rooms.append(room - size)
    return sorted(rooms)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_packing_is_best_fit_decreasing(data):
    capacity = data.draw(st.integers(1, 40))
    sizes = data.draw(st.lists(st.integers(1, capacity), max_size=120))
    bins, count = best_fit(np.asarray(sizes, np.int64), capacity)
    loads = np.bincount(bins, weights=sizes, minlength=count).astype(int)
    assert sorted(capacity - loads) == slow_best_fit(sizes, capacity)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_an_epoch_holds_every_token_once(data):
    sizes = data.draw(
        st.lists(st.sampled_from([0, 1, 2, 3, 7, 11, 12, 13, 24, 25, 40]), min_size=1)
    )
    sizes[data.draw(st.integers(0, len(sizes) - 1))] = data.draw(st.integers(1, 60))
    total, seq_len = sum(sizes), 12
    begin = data.draw(st.integers(0, total - 1))
    end = data.draw(st.integers(begin + 1, total))
    align = data.draw(st.sampled_from([1, 3, 4, 12]))
    mask = np.asarray(data.draw(st.lists(st.booleans(), min_size=total, max_size=total)), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        stream = numbered(Path(folder), sizes, mask if data.draw(st.booleans()) else None)
        samples = pack(stream, seq_len, align=align, begin=begin, end=end)
        found = [samples[i] for i in range(len(samples))]
        with_targets = samples.has_targets()
    document = np.repeat(np.arange(len(sizes)), sizes)  # of each place
    inputs, targets = [], []
    for sample, has_targets in zip(found, with_targets, strict=True):
        tokens, ids = sample["tokens"], sample["segment_ids"]
        assert tokens.shape == (seq_len + 1,) and tokens.dtype == ids.dtype == np.int32
        assert ids.shape == sample["mask"].shape == (seq_len,)
        assert sample["mask"].dtype == np.float32 and sample["mask"].any() == has_targets
        for piece in segments(sample):
            assert (np.diff(piece) == 1).all() and len(set(document[piece - 1])) == 1
            assert np.flatnonzero(tokens == piece[0])[0] % align == 0
            inputs.extend(piece)
        if align == 1:  # padding only at the end
            assert (np.diff((ids == 0).astype(int)) >= 0).all()
        assert not tokens[:-1][ids == 0].any() and not sample["mask"][ids == 0].any()
        counted = sample["mask"] > 0
        targets.extend(zip(tokens[:-1][counted], tokens[1:][counted], strict=True))
    assert sorted(inputs) == list(range(begin + 1, end + 1))
    inside = [place for place in range(begin + 1, end) if document[place] == document[place - 1]]
    counts = [place for place in inside if not stream.masked or mask[place]]
    assert sorted(targets) == [(place, place + 1) for place in counts]


def test_pieces_of_a_window_and_equal_lengths_are_in_random_order(tmp_path):
    stream = numbered(tmp_path, [7, 3, 2] * 200)
    first, again, other = (pack(stream, 12, seed=seed) for seed in (0, 0, 1))
    tokens = lambda samples: np.stack([samples[i]["tokens"] for i in range(200)])
    np.testing.assert_array_equal(tokens(first), tokens(again))
    assert len(first) == 200 and first.padding == 0  # three that fit in each
    orders = {tuple(map(len, segments(first[i]))) for i in range(200)}
    assert len(orders) == 6
    assert (np.sort(tokens(first), axis=0) != np.sort(tokens(other), axis=0)).any()


def test_documents_of_one_length_fill_windows_with_gaps(tmp_path):
    samples = pack(numbered(tmp_path, [5] * 7), 12, align=4)
    assert len(samples) == 7 and samples.padding == pytest.approx(1 - 35 / 84)
    samples = pack(numbered(tmp_path, [3] * 7), 12, align=4)
    assert len(samples) == 3
    (full, *_) = (samples[i] for i in range(3) if samples[i]["segment_ids"].max() == 3)
    assert full["segment_ids"].tolist() == [1, 1, 1, 0, 2, 2, 2, 0, 3, 3, 3, 0]
    assert full["mask"].tolist() == [1, 1, 0, 0] * 3
    assert "7 documents, or pieces of longer ones, packed into 3 windows of 12" in str(samples)


# --- what is stored -------------------------------------------------------------------------------


@pytest.fixture
def fresh():
    open_packing.cache_clear()
    yield
    open_packing.cache_clear()


def test_a_packing_is_made_once(tmp_path, fresh, monkeypatch):
    stream = numbered(tmp_path, [5, 3, 30, 1, 9])
    first = pack(stream, 12)
    open_packing.cache_clear()
    monkeypatch.setattr(packing, "packed", lambda *_: pytest.fail("packed again"))
    again = pack(stream, 12)
    for i in range(len(first)):
        np.testing.assert_array_equal(first[i]["tokens"], again[i]["tokens"])
    for changes in ({"seq_len": 13}, {"align": 4}, {"seed": 1}, {"end": 47}, {"begin": 1}):
        with pytest.raises(pytest.fail.Exception, match="packed again"):
            pack(stream, **{"seq_len": 12} | changes)


def test_other_processes_wait_for_the_first(tmp_path, fresh):
    stream, results = numbered(tmp_path, [5, 3, 30, 1, 9]), []
    others = Cache(tmp_path / "cache", writer=False)
    wait = lambda: results.append(open_packing(stream, 0, 48, 12, 1, 0, others))
    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.1)
    assert not results
    pack(stream, 12)
    waiting.join(timeout=20)
    assert results[0].prefix == pack(stream, 12).windows.prefix


def test_a_damaged_packing_is_told(tmp_path, fresh):
    stream = numbered(tmp_path, [5, 3, 30, 1, 9])
    rows = lambda samples: [samples[i]["tokens"].tolist() for i in range(4)]
    before = rows(pack(stream, 12))
    (places,) = (tmp_path / "cache").glob("packing-12-*.bin")
    whole = places.read_bytes()
    places.write_bytes(whole[:-8] + b"\1" * 8)
    open_packing.cache_clear()
    with pytest.raises(ConfigError, match=r"packing-12-.*bin does not hold.*are packed again"):
        pack(stream, 12)
    places.with_suffix(".hash").unlink()  # none to trust: it is made again
    assert rows(pack(stream, 12)) == before
    assert places.read_bytes() == whole


def test_a_packing_that_cannot_be_stored(tmp_path, fresh):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ConfigError, match="the packing of .*s can't be stored"):
        pack(numbered(tmp_path, [5]), 12)


# --- through the pipeline -------------------------------------------------------------------------


def write_texts(path, sizes):
    """Documents of one repeated letter each, with the end of the document as the last token."""
    texts = [chr(97 + i % 26) * (size - 1) for i, size in enumerate(sizes)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts if text))


def opened(path, *, process_index=0, source=PACKED, **changes):
    config = DataConfig(**{"path": str(path), "sources": (source,), "held_out": 0.0} | changes)
    return open_data(config, workdir=path.parent, vocab_size=257, process_index=process_index)


@pytest.fixture
def texts(tmp_path):
    write_texts(tmp_path / "t.jsonl", np.random.default_rng(0).integers(2, 90, 300).tolist())
    return tmp_path / "t.jsonl"


def take(dataset, count, **options):
    with closing(batches(dataset, 8, **{"start": 0, **options})) as iterator:
        return [next(iterator) for _ in range(count)]


def windows_of(data, stage):
    """Windows of an epoch, as the first source tells."""
    (line,) = data.describe_packing(stage)
    return int(re.search(r"packed into ([\d,]+) windows", line)[1].replace(",", ""))


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def test_batches_have_segment_ids(texts):
    (batch,) = take(opened(texts).dataset(STAGE), 1)
    assert {name: (x.shape, x.dtype.name) for name, x in batch.items()} == {
        "tokens": ((8, 61), "int32"),
        "mask": ((8, 60), "float32"),
        "segment_ids": ((8, 60), "int32"),
    }
    run_on = opened(texts, source=SourceConfig("jsonl"), reset_at_documents=False).dataset(STAGE)
    assert set(run_on[0]) == {"tokens", "mask"}


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.thorough)])
def test_restart_at_any_batch(texts, workers):
    dataset = opened(texts, align_documents=4).dataset(STAGE)
    whole = take(dataset, 6)
    for begin in (1, 4):
        for found, wanted in zip(
            take(dataset, 2, start=8 * begin, workers=workers), whole[begin:], strict=False
        ):
            assert_same(found, wanted)
    assert_same(take(dataset, 1, start=8 * 10**9)[0], take(dataset, 1, start=8 * 10**9)[0])


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_rows_of_one_order(texts, hosts):
    one = take(opened(texts).dataset(STAGE), 3, start=8)
    for host in range(hosts):
        open_packing.cache_clear()
        rows = list(range(8))[host * 8 // hosts : (host + 1) * 8 // hosts]
        dataset = opened(texts, process_index=host).dataset(STAGE)
        for found, wanted in zip(take(dataset, 3, start=8, rows=rows), one, strict=True):
            assert_same(found, {name: x[rows] for name, x in wanted.items()})


def test_the_order_of_windows_changes_with_epoch_and_seed(texts):
    data = opened(texts)
    dataset, count = data.dataset(STAGE), windows_of(data, STAGE)
    rows = np.stack([dataset[i]["tokens"] for i in range(2 * count)])
    assert (rows[:count] != rows[count:]).any()
    other = opened(texts, seed=1).dataset(STAGE)
    assert any((other[i]["tokens"] != rows[i]).any() for i in range(8))
    (line,) = data.describe_packing(STAGE)
    padding = np.mean([dataset[i]["segment_ids"] == 0 for i in range(count)])
    assert line.startswith(f"{texts}: ") and line.endswith(f" {100 * padding:.2f} % padding")


def test_the_document_across_the_border_is_cut_there(tmp_path):
    write_texts(tmp_path / "t.jsonl", [30, 100, 40])
    data = opened(tmp_path / "t.jsonl", held_out=0.5)
    train, valid = data.dataset(STAGE), data.dataset(STAGE, "valid")
    texts = lambda dataset, count: sorted(
        "".join(data.tokenizer.decode(piece)[:1] + str(len(piece)))
        for i in range(count)
        for piece in segments(dataset[i])
    )
    assert texts(train, 2) == ["a30", "b55"]
    assert texts(valid, 2) == ["b45", "c40"]
    (border,) = (
        dict(train[i]) for i in range(2) if 55 in (train[i]["segment_ids"] > 0).sum(keepdims=True)
    )
    assert border["mask"].sum() == 54 and border["tokens"][55] == 0


def test_conversations_keep_their_masks(tmp_path):
    tokenizer = load_tokenizer("byte")
    turns = lambda i: [
        {"role": "user", "content": "x" * (i % 7)},
        {"role": "assistant", "content": "yes" * (1 + i % 3)},
    ]
    lines = [json.dumps({"messages": turns(i)}) for i in range(40)]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    stage = dataclasses.replace(STAGE, seq_len=128)
    data = opened(tmp_path / "c.jsonl")
    dataset = data.dataset(stage)
    found = []
    for sample in (dataset[i] for i in range(windows_of(data, stage))):
        for number in range(1, sample["segment_ids"].max() + 1):
            here = sample["segment_ids"] == number
            counted = sample["tokens"][1:][here & (sample["mask"] > 0)]
            found.append((sample["tokens"][:-1][here].tolist(), counted.tolist()))
    rendered = [render_chat(turns(i), tokenizer) for i in range(40)]
    wanted = [(tokens.tolist(), tokens[mask > 0].tolist()) for tokens, mask in rendered]
    assert sorted(found) == sorted(wanted)


def test_binidx_documents_are_those_of_its_index(tmp_path):
    sizes = [3, 61, 0, 1, 120, 8]
    numbered(tmp_path, [min(size, 250) for size in sizes])
    source = SourceConfig("binidx", path=str(tmp_path / "s"), samples="packed")
    dataset = opened(tmp_path / "s.bin", source=source).dataset(STAGE)
    lengths = sorted(len(piece) for i in range(4) for piece in segments(dataset[i]))
    assert lengths == [1, 1, 3, 8, 60, 60, 60]


def test_other_samples_beside_packed_ones_are_one_segment(tmp_path):
    write_texts(tmp_path / "t.jsonl", [20, 7, 90] * 20)
    stage = dataclasses.replace(STAGE, seq_len=128)
    others = (SourceConfig("passkey"), SourceConfig("jsonl"))
    others += (SourceConfig("jsonl", samples="document"),)
    data = opened(tmp_path / "t.jsonl", sources=(PACKED, *others), reset_at_documents=False)
    whole = {"segment_ids": [1] * 128}
    for index in (1, 2):
        only = dataclasses.replace(stage, source_weights=tuple(np.eye(4)[index].tolist()))
        assert data.dataset(only)[0]["segment_ids"].tolist() == whole["segment_ids"]
    documents = data.dataset(dataclasses.replace(stage, source_weights=(0.0, 0.0, 0.0, 1.0)))
    assert {int(documents[i]["segment_ids"].sum()) for i in range(60)} == {20, 7, 90}
    assert set(take(data.dataset(stage), 1)[0]) == {"tokens", "mask", "segment_ids"}


def test_the_algorithm_belongs_to_the_identity_of_the_data(texts):
    (identity,) = opened(texts).fingerprint["sources"]
    assert identity["packing"] == packing.PACKING
    (identity,) = opened(texts, source=SourceConfig("jsonl")).fingerprint["sources"]
    assert "packing" not in identity


def test_what_can_not_be_packed(tmp_path, caplog):
    for kind in ("passkey", "book-recall", "pairs"):
        with pytest.raises(ConfigError, match=f'"{kind}": samples is "packed", but its documents'):
            SourceConfig(kind, samples="packed")
    with pytest.raises(ConfigError, match="align_documents is 4, but no source has samples="):
        DataConfig(align_documents=4)
    with pytest.raises(ConfigError, match="align_documents is 0: it must be at least 1"):
        DataConfig(sources=(PACKED,), align_documents=0)
    with pytest.raises(ConfigError, match='order "rwkvx" is one of windows'):
        DataConfig(sources=(PACKED,), order="rwkvx")
    data = DataConfig(sources=(PACKED,), align_documents=16)
    with pytest.raises(ConfigError, match="'first': data.align_documents 16 does not divide .* 60"):
        Config(ModelConfig.tiny(), (STAGE,), data=data)
    write_texts(tmp_path / "t.jsonl", [30] * 5)
    with pytest.raises(ConfigError, match="0 held-out tokens, not one packed window of 60"):
        opened(tmp_path / "t.jsonl").dataset(STAGE, "valid")
    with pytest.raises(ConfigError, match="data.cache_dir is read in place: gs://"):
        numbered(tmp_path, [5, 9])
        source = SourceConfig("binidx", path=str(tmp_path / "s"), samples="packed")
        opened(tmp_path / "s.bin", source=source, cache_dir="gs://b/c").dataset(STAGE)


def test_documents_of_one_token_teach_nothing(tmp_path, caplog):
    numbered(tmp_path, [1] * 130)
    source = SourceConfig("binidx", path=str(tmp_path / "s"), samples="packed")
    with pytest.raises(ConfigError, match="in 3 of 3 packed windows no token counts in the loss"):
        opened(tmp_path / "s.bin", source=source).dataset(STAGE)
    numbered(tmp_path, [1] * 120 + [60])
    (tmp_path / "data-cache").rename(tmp_path / "old")  # of the file that was here
    opened(tmp_path / "s.bin", source=source).dataset(STAGE)
    assert "in 2 of 3 packed windows no token counts in the loss" in caplog.text
