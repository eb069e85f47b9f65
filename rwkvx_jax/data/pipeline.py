"""From a data config to batches: random access all the way.

Sample i of a stage is a pure function of the config and i: which source, which epoch, which
window. The index of the next sample is therefore the whole state of the input: training restarts
at any step, and any number of hosts reads the same global order.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import grain
import numpy as np
from absl import flags

from rwkvx_jax.config import ConfigError, DataConfig, SourceConfig, Stage
from rwkvx_jax.data.binidx import Binidx, binidx_file
from rwkvx_jax.data.chat import TEMPLATE
from rwkvx_jax.data.hashes import check_hashes
from rwkvx_jax.data.packing import PACKING, Cache, open_packing
from rwkvx_jax.data.samples import (
    Documents,
    MagicOrder,
    OneSegment,
    Packed,
    Pieces,
    Synthetic,
    Windows,
)
from rwkvx_jax.data.sources import open_corpus
from rwkvx_jax.data.token_cache import cached
from rwkvx_jax.data.workers import follow_parent
from rwkvx_jax.tasks.copying import copy_sample
from rwkvx_jax.tasks.lookup import lookup_sample
from rwkvx_jax.tasks.passkey import training_sample
from rwkvx_jax.tasks.recall import pairs_sample, recall_sample
from rwkvx_jax.tokenizer import Tokenizer, load_tokenizer

Split = Literal["train", "valid"]
Batch = dict[str, np.ndarray]

# Kinds of sources that are made on the fly, and those of them that put their lines into books.
_IN_BOOKS = {"book-passkey", "book-recall", "book-lookup", "book-copy"}
_SYNTHETIC = {"passkey", "recall", "pairs", "lookup"} | _IN_BOOKS

_log = logging.getLogger(__name__)
_READ_THREADS = 2
_BATCHES_AHEAD = 4


@dataclass(frozen=True)
class OpenSource:
    """A source of the mixture, ready to be read.

    Attributes:
      config: its part of the config.
      name: for messages.
      stream: its tokens; None for documents made on the fly.
    """

    config: SourceConfig
    name: str
    stream: Binidx | None = None

    def split(self, held_out: float) -> int:
        """The token at which the held-out part begins: the same for all stages."""
        return len(self.stream) - math.ceil(len(self.stream) * held_out)


@dataclass(frozen=True)
class OpenData:
    """Opened training data.

    Attributes:
      config: what it was opened from.
      tokenizer: shared by all sources.
      sources: in the order of the config.
      fingerprint: JSON-able identity of tokenizer and text; a run resumes only on the same.
      cache_dir: where packings are kept.
      writer: whether this process writes them.
    """

    config: DataConfig
    tokenizer: Tokenizer
    sources: tuple[OpenSource, ...]
    fingerprint: dict[str, Any]
    cache_dir: str
    writer: bool

    def dataset(self, stage: Stage, split: Split = "train") -> grain.MapDataset:
        """The endless samples of a stage.

        Args:
          stage: its length, name and mixture.
          split: "train", or "valid" for the text and keys that are never trained on.

        Returns:
          A dataset whose item i is {"tokens": int32 [seq_len + 1], "mask": float32 [seq_len]};
          mask is what the target token weighs in the loss: 1 or 0, but in documents made on the
          fly with targets="balanced". If documents of a window do not see each other (samples
          "packed", or `reset_at_documents`), all samples also have "segment_ids", int32 [seq_len]:
          1, 2, ... for the documents of a window, 0 for padding.

        Raises:
          ConfigError: a source that holds less than one sample, or none with anything to learn.
        """
        weights = stage.source_weights or tuple(s.config.weight for s in self.sources)
        used = [i for i, weight in enumerate(weights) if weight > 0]
        parts = [self._source_dataset(i, stage, split) for i in used]
        # Whole numbers from 100 up: grain rounds weights down to those.
        smallest = min(weights[i] for i in used)
        return grain.MapDataset.mix(parts, [round(100 * weights[i] / smallest) for i in used])

    def describe_packing(self, stage: Stage) -> list[str]:
        """A line for each source of a stage whose documents are packed: how well they fit."""
        weights = stage.source_weights or (1.0,) * len(self.sources)
        used = [s for s, weight in zip(self.sources, weights, strict=True) if weight > 0]
        packed = [s for s in used if s.config.samples == "packed"]
        return [f"{s.name}: {self._stream_samples(s, stage, 'train')}" for s in packed]

    def _source_dataset(self, index: int, stage: Stage, split: Split) -> grain.MapDataset:
        source, seed = self.sources[index], _seed(self.config.seed, stage.name, index, split)
        if source.config.kind in _SYNTHETIC:
            make = self._synthetic(source, stage, split)
            samples = Synthetic(make, stage.seq_len, seed, source.config.targets)
            return grain.MapDataset.source(self._with_segments(samples))
        samples = self._stream_samples(source, stage, split)
        if split == "train" and self.config.order != "shuffle":
            samples = MagicOrder(samples, self.config.order)
            return grain.MapDataset.source(samples).repeat(None)
        samples = self._with_segments(samples)
        return grain.MapDataset.source(samples).shuffle(seed=seed).repeat(None)

    def _with_segments(self, samples: Windows | Documents | Packed | Synthetic):
        """Samples as those of all sources have to be that go into one batch."""
        numbered = isinstance(samples, Packed) or (isinstance(samples, Windows) and samples.reset)
        return samples if numbered or not self.config.segmented else OneSegment(samples)

    def _synthetic(self, source: OpenSource, stage: Stage, split: Split):
        """The maker of documents of a source, a function of a generator."""
        config, shared = source.config, {"held_out": split == "valid"}
        window = (self.tokenizer, stage.seq_len)
        if config.kind == "pairs":
            return functools.partial(pairs_sample, *window, pairs=config.pairs, **shared)
        if config.kind in _IN_BOOKS:
            shared["text"] = Pieces(source.stream, *self._bounds(source, split))
        if config.kind == "book-copy":
            return functools.partial(copy_sample, stage.seq_len, text=shared["text"])
        if config.kind in ("passkey", "book-passkey"):
            return functools.partial(training_sample, *window, **shared)
        asked = {"pairs": config.pairs, "questions": config.questions}
        sample = lookup_sample if config.kind in ("lookup", "book-lookup") else recall_sample
        return functools.partial(sample, *window, **asked, **shared)

    def _bounds(self, source: OpenSource, split: Split) -> tuple[int, int]:
        border = source.split(self.config.held_out)
        return (0, border) if split == "train" else (border, len(source.stream))

    def _stream_samples(self, source: OpenSource, stage: Stage, split: Split):
        begin, end = self._bounds(source, split)
        make, noun = {
            "window": (self._windows, "window"),
            "document": (Documents, "document"),
            "packed": (self._packed, "packed window"),
        }[source.config.samples]
        samples = make(source.stream, begin, end, stage.seq_len)
        if len(samples) == 0:
            what = "training" if split == "train" else "held-out"
            remedy = "give it more text or shorten the stage"
            if split == "valid":
                remedy = "raise data.held_out or set run.eval_batches to 0"
            raise ConfigError(
                f"stage {stage.name!r}: {source.name} has {end - begin} {what} tokens, not one "
                f"{noun} of {stage.seq_len} + 1 tokens; {remedy}"
            )
        if source.stream.masked or source.config.samples != "window":
            _check_targets(samples, f"stage {stage.name!r}: {source.name}", noun)
        return samples

    def _windows(self, stream: Binidx, begin: int, end: int, seq_len: int) -> Windows:
        return Windows(stream, begin, end, seq_len, self.config.reset_at_documents)

    def _packed(self, stream: Binidx, begin: int, end: int, seq_len: int) -> Packed | tuple[()]:
        if begin == end:
            return ()
        cache = Cache(
            _local(self.cache_dir, "data.cache_dir"),
            self.writer,
            self.config.verify == "full" and self.writer,
        )
        align = self.config.align_documents
        windows = open_packing(stream, begin, end, seq_len, align, self.config.seed, cache)
        return Packed(stream, windows, begin, end, seq_len, align)


def open_data(
    data: DataConfig, *, workdir: Path, vocab_size: int, process_index: int | None = None
) -> OpenData:
    """Opens the tokenizer and all sources; text is tokenized into the cache if it isn't there.

    Args:
      data: what to read.
      workdir: the cache lies in its `data-cache`, unless `data.cache_dir` names another place.
      vocab_size: rows of the model's embedding.
      process_index: of a job of several processes, only 0 writes the cache; None asks jax.

    Raises:
      ConfigError: a vocabulary larger than the model's, a source that can't be read, text that
        can't be tokenized, a token outside the vocabulary.
    """
    tokenizer = load_tokenizer(data.tokenizer, data.vocab_file)
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"model.vocab_size is {vocab_size}, but the {data.tokenizer} tokenizer has "
            f"{tokenizer.vocab_size} ids"
        )
    if process_index is None:
        import jax  # not at the top: worker processes don't need it

        process_index = jax.process_index()
    writer = process_index == 0 or data.cache_per_host
    sources, identities = [], []
    for config in data.sources:
        source, identity = _open_source(config, data, tokenizer, vocab_size, workdir, writer)
        sources.append(source)
        packing = {"packing": PACKING} if config.samples == "packed" else {}
        identities.append({"kind": config.kind, **identity, **packing})
    fingerprint = {"tokenizer": tokenizer.fingerprint, "sources": identities}
    return OpenData(data, tokenizer, tuple(sources), fingerprint, _cache_dir(data, workdir), writer)


@functools.lru_cache(maxsize=64)  # a run opens the samples of a stage more than once
def _check_targets(samples: Windows | Documents | Packed, where: str, kind: str) -> None:
    """Warns of samples in which no token counts in the loss.

    Raises:
      ConfigError: there are no others.
    """
    empty = np.flatnonzero(~samples.has_targets())
    if empty.size == 0:
        return
    message = (
        f"{where}: in {empty.size} of {len(samples)} {kind}s no token counts in the loss within "
        f"{samples.seq_len} + 1 tokens (an answer may lie further on); the first is {kind} "
        f"{empty[0]}, from token {samples.first_token(empty[0])} of {samples.stream.prefix}.bin on"
    )
    if empty.size == len(samples):
        raise ConfigError(f"{message}; raise the stage's seq_len or give it other text")
    _log.warning("%s", message)


def _open_source(
    config: SourceConfig,
    data: DataConfig,
    tokenizer: Tokenizer,
    vocab_size: int,
    workdir: Path,
    writer: bool,
) -> tuple[OpenSource, dict[str, Any]]:
    if config.kind in _SYNTHETIC - _IN_BOOKS:
        return OpenSource(config, config.kind), {}
    path = config.path or data.path
    if config.kind == "binidx":
        stream = Binidx(_local(path, "a binidx source"))
        _verify(stream.prefix, data, workdir, writer)
        stream.check_vocabulary(vocab_size)
        return OpenSource(config, str(path), stream), stream.fingerprint()
    corpus = open_corpus("text" if config.kind in _IN_BOOKS else config.kind, path)
    full = data.verify == "full" and writer
    cache_dir = _local(_cache_dir(data, workdir), "data.cache_dir")
    stream, fingerprint = cached(corpus, tokenizer, cache_dir, writer=writer, full_check=full)
    identity = {"sha256": fingerprint, "tokens": len(stream)}
    if stream.masked:  # with another template the same text is other data
        identity["template"] = TEMPLATE
    return OpenSource(config, corpus.name, stream), identity


def _verify(prefix: Path, data: DataConfig, workdir: Path, writer: bool) -> None:
    """Compares a binidx source with its hashes, or with those of its first use in this run."""
    record = binidx_file(prefix, "hash")
    remedy = "restore it, or tokenize its text again"
    if not record.exists():
        folder = _cache_dir(data, workdir)
        place = hashlib.sha256(str(prefix.resolve()).encode()).hexdigest()[:16]
        record = None if "://" in folder else Path(folder) / f"{prefix.name}-{place}.hash"
        remedy = f"restore it, or remove {record} if the change is meant"
    full = data.verify == "full" and writer
    if full and record is None:
        raise ConfigError(
            f'data.verify="full" has nothing to compare {prefix}.bin with: set data.cache_dir to a '
            "folder on a disk, where its hashes are kept"
        )
    check_hashes(prefix, record, full=full, write=writer, remedy=remedy)


def _cache_dir(data: DataConfig, workdir: Path) -> str:
    return data.cache_dir or str(workdir / "data-cache")


def _local(path: str, what: str) -> Path:
    if not path:
        raise ConfigError(f"{what} needs a path")
    if "://" in path:
        raise ConfigError(f"{what} is read in place: {path} has to be on a local disk")
    return Path(path)


@dataclass(frozen=True)
class _HostShare:
    """One host's samples of every global batch from `start` on: its rows in their order."""

    dataset: grain.MapDataset
    start: int
    global_batch: int
    rows: tuple[int, ...]

    def __len__(self) -> int:
        return (len(self.dataset) - self.start) // self.global_batch * len(self.rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        batch, place = divmod(index, len(self.rows))
        return self.dataset[self.start + batch * self.global_batch + self.rows[place]]


def batches(
    dataset: grain.MapDataset,
    global_batch: int,
    *,
    start: int,
    rows: Sequence[int] | None = None,
    workers: int = 0,
) -> Generator[Batch, None, None]:
    """This host's part of every batch, prepared ahead of its use.

    Args:
      dataset: samples of a stage.
      global_batch: samples of a step over all hosts.
      start: index of the first sample, steps done x global_batch.
      rows: which of the samples of a step this host reads; None: all.
      workers: processes that prepare batches; 0: threads of this process.

    Returns:
      An iterator with a `close()` that ends threads and workers; its items hold the samples'
      arrays stacked, [len(rows), ...]. Row r of a batch is the same sample on any number of hosts.
      A worker that dies raises RuntimeError.

    Raises:
      ConfigError: a row that the batch does not have, or no rows.
    """
    rows = tuple(range(global_batch) if rows is None else rows)
    if not rows or not 0 <= min(rows) <= max(rows) < global_batch:
        raise ConfigError(f"rows {list(rows)} are not some of the {global_batch} of a global batch")
    share = _HostShare(dataset, start, global_batch, rows)
    read = grain.ReadOptions(num_threads=_READ_THREADS, prefetch_buffer_size=_BATCHES_AHEAD)
    stream = (
        grain.MapDataset.source(share).batch(len(rows), drop_remainder=True).to_iter_dataset(read)
    )
    if workers:
        if not flags.FLAGS.is_parsed():  # grain reads flags when it starts workers
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        # Through pipes: shared memory would stay behind when a run is killed.
        through_pipes = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
        stream = grain.experimental.WithOptionsIterDataset(stream, through_pipes)
        stream = stream.mp_prefetch(options, worker_init_fn=_prepare_worker)
    return iter(stream)


def _prepare_worker(index: int, count: int) -> None:
    follow_parent()


def _seed(*values: object) -> int:
    digest = hashlib.sha256(repr(values).encode()).digest()
    return int.from_bytes(digest[:4])
