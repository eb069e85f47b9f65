"""The input pipeline: samples are functions of their index, splits and hosts never overlap."""

import dataclasses
import json
import multiprocessing
import os
import pickle
import re
import signal
import time
from contextlib import closing

import numpy as np
import pytest

from rwkvx_jax.config import ConfigError, DataConfig, SourceConfig, Stage
from rwkvx_jax.data.pipeline import batches, open_data
from rwkvx_jax.data.samples import MagicOrder, Windows, magic_prime
from rwkvx_jax.tasks.passkey import TASK, is_eval_key

STAGE = Stage("first", seq_len=64, global_batch=8, steps=3, peak_lr=1e-3)
PASSKEY_STAGE = dataclasses.replace(STAGE, seq_len=128)
LONG_STAGE = dataclasses.replace(STAGE, seq_len=400)


@pytest.fixture
def numbers(tmp_path):
    """A text of 5-digit line numbers: each window tells where it was read."""
    path = tmp_path / "numbers.txt"
    path.write_text("".join(f"{i:05d}\n" for i in range(4000)))
    return path


@pytest.fixture
def opened(numbers, tmp_path):
    return open_numbers(numbers, tmp_path)


def open_numbers(path, workdir, **changes):
    config = DataConfig(path=str(path), **changes)
    return open_data(config, workdir=workdir, vocab_size=257, process_index=0)


def take(dataset, count, **options):
    with closing(batches(dataset, 8, **{"start": 0, **options})) as iterator:
        return [next(iterator) for _ in range(count)]


def rows(batch_list):
    return np.concatenate([batch["tokens"] for batch in batch_list])


def test_samples_have_the_contracted_form(opened):
    sample = opened.dataset(STAGE)[0]
    assert set(sample) == {"tokens", "mask", "segment_ids"}
    assert sample["tokens"].shape == (65,) and sample["tokens"].dtype == np.int32
    assert sample["mask"].shape == (64,) and sample["mask"].dtype == np.float32
    assert (sample["mask"] == 1).all()
    (batch,) = take(opened.dataset(STAGE), 1)
    assert batch["tokens"].shape == (8, 65) and batch["tokens"].dtype == np.int32
    assert batch["mask"].shape == (8, 64) and batch["mask"].dtype == np.float32


def test_an_epoch_reads_every_training_window_once(opened):
    dataset, stream = opened.dataset(STAGE), opened.sources[0].stream
    border = opened.sources[0].split(0.02)
    windows = (border - 1) // 64
    epochs = [
        np.stack([dataset[e * windows + i]["tokens"] for i in range(windows)]) for e in range(2)
    ]
    expected = np.stack([stream.read(64 * w, 65) for w in range(windows)])
    for epoch in epochs:
        order = np.lexsort(epoch.T[::-1])
        np.testing.assert_array_equal(epoch[order], expected[np.lexsort(expected.T[::-1])])
    assert (epochs[0] != epochs[1]).any() and (epochs[0] != expected).any()


@pytest.mark.parametrize("seq_len", [16, 64, 200])
def test_held_out_text_is_never_trained_on(opened, seq_len):
    """Also across stages of different lengths: the border is one token of the stream."""
    stage = dataclasses.replace(STAGE, seq_len=seq_len)
    border = opened.sources[0].split(0.02)
    stream = opened.sources[0].stream
    assert abs(len(stream) - border - 0.02 * len(stream)) < 1
    train, valid = (opened.dataset(stage, split) for split in ("train", "valid"))
    held_out = opened.tokenizer.decode(stream.read(border, len(stream) - border))
    for i in range(2 * border // seq_len):
        lines = opened.tokenizer.decode(train[i]["tokens"]).split("\n")[1:-1]
        assert lines and not set(lines) & set(held_out.split("\n"))
    for i in range(2 * (len(stream) - border) // seq_len):
        assert opened.tokenizer.decode(valid[i]["tokens"]) in held_out


def test_order_depends_on_seed_and_stage_only(numbers, tmp_path):
    stage_b = dataclasses.replace(STAGE, name="second")
    longer = dataclasses.replace(STAGE, steps=1000, peak_lr=1.0)
    first, again, other_seed = (open_numbers(numbers, tmp_path, seed=seed) for seed in (0, 0, 1))
    base = rows(take(first.dataset(STAGE), 3))
    np.testing.assert_array_equal(base, rows(take(again.dataset(longer), 3)))
    assert (base != rows(take(first.dataset(stage_b), 3))).any()
    assert (base != rows(take(other_seed.dataset(STAGE), 3))).any()


@pytest.mark.thorough
@pytest.mark.parametrize("workers", [0, 2])
def test_restart_at_any_index(opened, workers):
    dataset = opened.dataset(STAGE)
    whole = rows(take(dataset, 6))
    np.testing.assert_array_equal(rows(take(dataset, 3, start=24, workers=workers)), whole[24:])
    begin = time.perf_counter()
    far = rows(take(dataset, 1, start=8 * 10**9))
    assert time.perf_counter() - begin < 2
    np.testing.assert_array_equal(far[3], dataset[8 * 10**9 + 3]["tokens"])


@pytest.mark.parametrize(
    "shares", [([0, 1, 2, 3], [4, 5, 6, 7]), ([0, 1, 4, 5], [2, 3], [6, 7])], ids=len
)
def test_global_order_does_not_depend_on_the_hosts(opened, shares):
    """Hosts with as many rows each, and hosts whose chips lie apart in the mesh."""
    dataset = opened.dataset(STAGE)
    one = take(dataset, 3, start=8)
    parts = [take(dataset, 3, start=8, rows=rows) for rows in shares]
    for step in range(3):
        for rows, part in zip(shares, parts, strict=True):
            np.testing.assert_array_equal(part[step]["tokens"], one[step]["tokens"][rows])


@pytest.mark.parametrize("rows", [[7, 8], [-1], []])
def test_rows_that_a_batch_does_not_have(opened, rows):
    with pytest.raises(ConfigError, match=r"rows \[.*are not some of the 8"):
        batches(opened.dataset(STAGE), 8, start=0, rows=rows)


def test_mixture_shares_and_stage_weights(numbers, tmp_path):
    sources = (SourceConfig("text", 0.3), SourceConfig("passkey", 0.7))
    opened = open_numbers(numbers, tmp_path, sources=sources)

    def passkey_share(stage, count=400):
        dataset = opened.dataset(stage)
        texts = (opened.tokenizer.decode(dataset[i]["tokens"]) for i in range(count))
        return np.mean(["pass key" in text for text in texts])

    assert abs(passkey_share(PASSKEY_STAGE) - 0.7) < 0.01
    reweighted = dataclasses.replace(PASSKEY_STAGE, source_weights=(3.0, 1.0))
    assert abs(passkey_share(reweighted) - 0.25) < 0.01
    text_only = dataclasses.replace(PASSKEY_STAGE, source_weights=(1.0, 0.0))
    assert passkey_share(text_only, 50) == 0


def test_passkey_splits_use_disjoint_keys(tmp_path):
    config = DataConfig(sources=(SourceConfig("passkey"),))
    opened = open_data(config, workdir=tmp_path, vocab_size=257, process_index=0)
    for split in ("train", "valid"):
        dataset = opened.dataset(PASSKEY_STAGE, split)
        texts = [opened.tokenizer.decode(dataset[i]["tokens"]) for i in range(50)]
        keys = [int(text.removesuffix(".").split()[-1]) for text in texts]
        assert all(is_eval_key(key) == (split == "valid") for key in keys)
        assert len(set(keys)) == 50
    too_short = dataclasses.replace(STAGE, seq_len=90)
    with pytest.raises(ConfigError, match="too short"):
        opened.dataset(too_short)
    json.dumps(opened.fingerprint)


def test_recall_documents(tmp_path):
    config = DataConfig(sources=(SourceConfig("recall", pairs=5, questions=2),))
    opened = open_data(config, workdir=tmp_path, vocab_size=257, process_index=0)
    for split in ("train", "valid"):
        dataset = opened.dataset(LONG_STAGE, split)
        samples = [dataset[i] for i in range(20)]
        assert all(len(s["tokens"]) == 401 and s["mask"].sum() == 400 for s in samples)
        texts = [opened.tokenizer.decode(s["tokens"]) for s in samples]
        numbers = [re.findall(r"^[a-z]{5}: (\d{5})$", text, re.M) for text in texts]
        assert {len(found) for found in numbers} == {7} and len(set(texts)) == 20
        assert all(is_eval_key(int(n)) == (split == "valid") for n in sum(numbers, []))
    with pytest.raises(ConfigError, match="too short for 5 pairs"):
        opened.dataset(dataclasses.replace(STAGE, seq_len=100))
    json.dumps(opened.fingerprint)


def test_pairs_are_stated_again_and_again(tmp_path):
    config = DataConfig(sources=(SourceConfig("pairs", pairs=6),))
    opened = open_data(config, workdir=tmp_path, vocab_size=257, process_index=0)
    for split in ("train", "valid"):
        dataset = opened.dataset(LONG_STAGE, split)
        counts, questions = [], 0
        for i in range(40):
            sample = dataset[i]
            assert len(sample["tokens"]) == 401
            text = opened.tokenizer.decode(sample["tokens"])
            stated = re.findall(r"\n([a-z]{5}): (\d{5})\n", text)
            assert len(stated) > 2 * len(set(stated))  # said again, always with its own number
            assert len({name for name, _ in stated}) == len(set(stated))
            assert all(is_eval_key(int(n)) == (split == "valid") for _, n in stated)
            asked = re.findall(r"\nWhich number has ([a-z]{5})\?\n([a-z]{5}):", text)
            assert all(name == again for name, again in asked)
            counts.append(len(set(stated)))
            questions += len(asked)
        assert set(counts) == {2, 3, 4, 5, 6} and 150 < questions < 350


def test_answers_alone_can_count(numbers, tmp_path):
    kinds = ("passkey", "book-passkey", "recall", "book-recall", "pairs")
    counted = {}
    for kind in kinds:
        source = SourceConfig(kind, pairs=3, questions=2, targets="answers")
        opened = open_numbers(numbers, tmp_path, sources=(source,), held_out=0.3)
        sample = opened.dataset(LONG_STAGE)[0]
        targets = sample["tokens"][1:][sample["mask"] > 0]
        counted[kind] = opened.tokenizer.decode(targets)
        assert sample["mask"].dtype == np.float32 and sample["mask"].shape == (400,)
    assert all(re.fullmatch(r"( \d{5}){1}", counted[kind]) for kind in kinds[:2])
    assert all(re.fullmatch(r"( \d{5}){2}", counted[kind]) for kind in kinds[2:4])
    assert re.fullmatch(r"( \d{5})+( \d*)?", counted["pairs"]) and len(counted["pairs"]) > 60
    with pytest.raises(ConfigError, match='source "text": targets is "answers"'):
        SourceConfig("text", targets="answers")


def test_answers_can_weigh_as_much_as_their_text(numbers, tmp_path):
    for kind in ("passkey", "book-passkey", "recall", "book-recall", "pairs"):
        samples = {}
        for targets in ("balanced", "answers"):
            source = SourceConfig(kind, pairs=3, questions=2, targets=targets)
            opened = open_numbers(numbers, tmp_path, sources=(source,), held_out=0.3)
            samples[targets] = opened.dataset(LONG_STAGE)[0]
        np.testing.assert_array_equal(samples["balanced"]["tokens"], samples["answers"]["tokens"])
        weights, answers = samples["balanced"]["mask"], samples["answers"]["mask"] > 0
        assert weights.dtype == np.float32
        np.testing.assert_allclose(weights[answers].sum(), 200, rtol=1e-6)
        np.testing.assert_allclose(weights[~answers].sum(), 200, rtol=1e-6)
        assert len(set(weights[answers])) == len(set(weights[~answers])) == 1
    with pytest.raises(ConfigError, match='source "text": targets is "balanced"'):
        SourceConfig("text", targets="balanced")


def test_facts_and_copies_in_books(numbers, tmp_path):
    """Training has training's phrases and its own part of the text, held-out samples the others."""
    long = dataclasses.replace(LONG_STAGE, seq_len=900)
    for kind in ("lookup", "book-lookup", "book-copy"):
        source = SourceConfig(kind, pairs=3, questions=2)
        opened = open_numbers(numbers, tmp_path, sources=(source,), held_out=0.4)
        datasets = {split: opened.dataset(long, split) for split in ("train", "valid")}
        decode = opened.tokenizer.decode
        texts = {
            split: [decode(data[i]["tokens"]) for i in range(40)]
            for split, data in datasets.items()
        }
        assert not set(texts["train"]) & set(texts["valid"]) and len(set(texts["train"])) == 40
        np.testing.assert_array_equal(
            datasets["train"][7]["tokens"], datasets["train"][7]["tokens"]
        )
        if kind != "book-copy":
            tasks = ["\n".join(t) for t in texts.values()]
            assert ["I forgot the" in t for t in tasks] == [True, False]
            assert ["next to" in t for t in tasks] == [False, True]


def test_recall_in_books_keeps_the_text(numbers, tmp_path):
    source = SourceConfig("book-recall", pairs=3, questions=2)
    opened = open_numbers(numbers, tmp_path, sources=(source,), held_out=0.3)
    stream = opened.sources[0].stream
    whole = opened.tokenizer.decode(stream.read(0, len(stream)))
    dataset = opened.dataset(LONG_STAGE)
    for i in range(20):
        text = opened.tokenizer.decode(dataset[i]["tokens"])
        body = text.split("\nWhich number has ")[0]
        pieces = re.split(r"\n[a-z]{5}: \d{5}\n", body.split("\n", 1)[1])
        assert len(pieces) == 4 and "".join(pieces) in whole and len("".join(pieces)) > 50
    long = dataclasses.replace(STAGE, seq_len=len(stream) + 1000)
    with pytest.raises(ConfigError, match="made in books needs"):
        opened.dataset(long)


def test_passkeys_in_books_keep_to_their_part_of_the_text(numbers, tmp_path):
    opened = open_numbers(numbers, tmp_path, sources=(SourceConfig("book-passkey"),), held_out=0.3)
    source = opened.sources[0]
    border = source.split(0.3)
    whole = opened.tokenizer.decode(source.stream.read(0, len(source.stream)))
    for split, part in (("train", whole[:border]), ("valid", whole[border - 1 :])):
        dataset = opened.dataset(LONG_STAGE, split)
        texts = [opened.tokenizer.decode(dataset[i]["tokens"]) for i in range(30)]
        assert len(set(texts)) == 30
        for text in texts:
            hidden = re.search(r"\nThe pass key is (\d+)\. Remember it\. .*?\.\n", text)
            assert is_eval_key(int(hidden[1])) == (split == "valid")
            assert text.endswith(f"The pass key is {hidden[1]}.")
            before = text[: hidden.start()].removeprefix(TASK + "\n")
            after = text[hidden.end() :].rsplit("\nWhat is the pass key?")[0]
            assert len(before + after) > 50 and before + after in part
    long = dataclasses.replace(STAGE, seq_len=len(source.stream))
    with pytest.raises(ConfigError, match="of text in one piece, and there are"):
        opened.dataset(long)


@pytest.mark.parametrize(
    "flags, message", [({"pairs": 0}, "pairs is 0"), ({"pairs": 3, "questions": 4}, "4 questions")]
)
def test_bad_recall_settings(flags, message):
    with pytest.raises(ConfigError, match=message):
        SourceConfig("recall", **flags)
    with pytest.raises(ConfigError, match="pairs is 1; a document has at least 2"):
        SourceConfig("pairs", pairs=1)


def test_embedded_corpus_is_the_default(tmp_path):
    opened = open_data(DataConfig(), workdir=tmp_path, vocab_size=257, process_index=0)
    assert len(opened.sources[0].stream) > 300_000
    assert opened.fingerprint["sources"][0]["tokens"] == len(opened.sources[0].stream)
    assert list((tmp_path / "data-cache").glob("embedded-byte-*.idx"))
    assert "Python" in opened.sources[0].name


def test_fingerprint_follows_text_and_tokenizer(numbers, tmp_path):
    first = open_numbers(numbers, tmp_path).fingerprint
    assert first == json.loads(json.dumps(open_numbers(numbers, tmp_path / "b").fingerprint))
    with numbers.open("a") as file:
        file.write("x")
    assert first != open_numbers(numbers, tmp_path).fingerprint


def test_document_samples_are_cut_and_padded(tmp_path):
    path = tmp_path / "docs.jsonl"
    sizes = (3, 20, 64, 65, 200, 1, 9, 30)
    texts = [letter * size for letter, size in zip("abcdefgh", sizes, strict=True)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sources = (SourceConfig("jsonl", samples="document"),)
    opened = open_numbers(path, tmp_path, sources=sources, held_out=0.077)
    train, valid = opened.dataset(STAGE), opened.dataset(STAGE, "valid")
    found = {opened.tokenizer.decode(train[i]["tokens"]): train[i] for i in range(7)}
    assert set(found) == {text[:65] for text in texts[:7]}
    assert opened.tokenizer.decode(valid[0]["tokens"]) == texts[7]
    short = found["aaa"]
    assert short["tokens"].tolist() == [98, 98, 98] + [0] * 62
    assert short["mask"].tolist() == [1, 1, 1] + [0] * 61  # the end of the document counts
    assert found["e" * 65]["mask"].sum() == 64


@pytest.fixture
def numbered_documents(tmp_path):
    """Texts of 0 to 15 digits of 3-digit numbers: no two windows are alike."""
    sizes = np.cumsum([3 * (1 + i % 5) if i % 4 else 0 for i in range(16)])
    digits = "".join(f"{i:03d}" for i in range(sizes[-1]))
    texts = [digits[a:b] for a, b in zip((0, *sizes), sizes, strict=False)]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.mark.parametrize("order", ["shuffle", "rwkvx"])
def test_windows_know_where_documents_begin(numbered_documents, order, tmp_path):
    """Ids count the documents of each window from 1, and no document predicts the next."""
    source = (SourceConfig("jsonl"),)
    stage = dataclasses.replace(STAGE, seq_len=7)
    opened = open_numbers(numbered_documents, tmp_path, sources=source, order=order, held_out=0.0)
    stream, dataset = opened.sources[0].stream, opened.dataset(stage)
    plain = Windows(stream, 0, len(stream), 7)
    document = np.repeat(np.arange(len(stream.sizes)), stream.sizes)
    found = set()
    for i in range(12):
        sample = dataset[i]
        (w,) = [
            w for w in range(len(plain))
            if np.array_equal(plain[w]["tokens"], sample["tokens"])
        ]  # fmt: skip
        numbers = document[7 * w : 7 * w + 8]
        expected = np.cumsum(np.diff(numbers[:-1], prepend=numbers[0]) != 0) + 1
        np.testing.assert_array_equal(sample["segment_ids"], expected)
        np.testing.assert_array_equal(sample["mask"], numbers[1:] == numbers[:-1])
        assert sample["segment_ids"].dtype == np.int32 and sample["mask"].dtype == np.float32
        found |= set(expected.tolist())
    assert {1, 2, 3} <= found
    off = dataclasses.replace(opened.config, reset_at_documents=False)
    sample = dataclasses.replace(opened, config=off).dataset(stage)[0]
    assert set(sample) == {"tokens", "mask"} and sample["mask"].all()


def test_what_has_segment_ids():
    synthetic, windows, chats = (
        SourceConfig("passkey"), SourceConfig("text"), SourceConfig("jsonl", samples="document")
    )  # fmt: skip
    assert not DataConfig(sources=(synthetic, chats)).segmented
    assert DataConfig(sources=(synthetic, windows)).segmented
    assert not DataConfig(sources=(windows,), reset_at_documents=False).segmented
    packed = SourceConfig("jsonl", samples="packed")
    assert DataConfig(sources=(packed,), reset_at_documents=False).segmented


def test_magic_prime_of_the_published_runs():
    assert magic_prime(1_498_226_207, 512) == 2_926_181  # MiniPile
    assert magic_prime(36_627_478_782, 64_000) == 572_303  # ProLong-64K
    with pytest.raises(ConfigError, match="too few windows"):
        magic_prime(3 * 64, 64)


@pytest.mark.parametrize(
    "rule, expected",
    # p = 11, floor(11 * 0.618...) = 6: i^3 mod 11, and 6 (i + 1)^3 mod 11, worked out by hand.
    [
        ("rwkvx", [0, 1, 8, 5, 9, 4, 7, 2, 6, 3, 10, 0, 1]),
        ("rwkv_lm", [6, 4, 8, 10, 2, 9, 1, 3, 7, 5, 0, 6, 4]),
    ],
)
def test_official_orders(rule, expected, numbers, tmp_path):
    opened = open_numbers(numbers, tmp_path, held_out=0.0, order=rule)
    seq_len = (len(opened.sources[0].stream) - 1) // 13
    windows = Windows(opened.sources[0].stream, 0, len(opened.sources[0].stream), seq_len)
    order = MagicOrder(windows, rule)
    assert len(order) == 11
    assert [order.window(i) for i in range(13)] == expected
    dataset = opened.dataset(dataclasses.replace(STAGE, seq_len=seq_len))
    for i, window in enumerate(expected):
        np.testing.assert_array_equal(dataset[i]["tokens"], windows[window]["tokens"])


def test_clear_errors_before_any_work(numbers, tmp_path):
    with pytest.raises(
        ConfigError, match="model.vocab_size is 256, but the byte tokenizer has 257"
    ):
        open_data(DataConfig(), workdir=tmp_path, vocab_size=256, process_index=0)
    opened = open_numbers(numbers, tmp_path)
    too_long = dataclasses.replace(STAGE, seq_len=30_000)
    message = r"stage 'first': .*numbers.txt has 23520 training tokens, not one window of 30000"
    with pytest.raises(ConfigError, match=message):
        opened.dataset(too_long)
    with pytest.raises(ConfigError, match="held-out tokens.*raise data.held_out"):
        opened.dataset(dataclasses.replace(STAGE, seq_len=600), "valid")
    with pytest.raises(ConfigError, match='kind "jsonl" needs a path'):
        open_numbers("", tmp_path, sources=(SourceConfig("jsonl"),))
    with pytest.raises(ConfigError, match="read in place: gs://bucket/cache has to be on a local"):
        open_numbers(numbers, tmp_path, cache_dir="gs://bucket/cache")
    with pytest.raises(ConfigError, match='order "rwkvx" is one of windows'):
        DataConfig(order="rwkvx", sources=(SourceConfig("jsonl", samples="document"),))


def test_datasets_pickle_small(opened):
    assert len(pickle.dumps(opened.sources[0].stream)) < 1000


def test_a_dead_worker_is_an_error(opened):
    with closing(batches(opened.dataset(STAGE), 8, start=0, workers=1)) as iterator:
        next(iterator)
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGKILL)
        begin = time.monotonic()
        with pytest.raises(RuntimeError, match="terminated unexpectedly with exit code -9"):
            for _ in range(20):
                next(iterator)
        assert time.monotonic() - begin < 20


def test_close_ends_workers(opened):
    iterator = batches(opened.dataset(STAGE), 8, start=0, workers=1)
    next(iterator)
    assert multiprocessing.active_children()
    iterator.close()
    assert not multiprocessing.active_children()
