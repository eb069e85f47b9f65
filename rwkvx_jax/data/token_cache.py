"""Tokenizes a corpus once into a binidx file.

The corpus is cut into parts; each finished part is a file of its own, so that an interrupted run
goes on where it stopped, and any number of processes can work side by side. At the end the parts
are joined beside the final names and renamed, the index last: whoever sees the index sees a
complete file, with its hashes beside it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import hashlib
import json
import logging
import multiprocessing
import shutil
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from rwkvx_jax import progress
from rwkvx_jax.config import ConfigError
from rwkvx_jax.data.binidx import Binidx, binidx_file
from rwkvx_jax.data.sources import EmbeddedCorpus, FileCorpus, Part, encode_part
from rwkvx_jax.data.stored import STALLED, finish, is_complete, open_stored, remove_old
from rwkvx_jax.data.workers import follow_parent
from rwkvx_jax.storage import exclusive, new_file
from rwkvx_jax.tokenizer import Tokenizer

_log = logging.getLogger(__name__)
_FORMAT = 2  # raised when the same text would give other files


def cached(
    corpus: EmbeddedCorpus | FileCorpus,
    tokenizer: Tokenizer,
    cache_dir: Path,
    *,
    writer: bool = True,
    full_check: bool = False,
    stalled: float = STALLED,
) -> tuple[Binidx, str]:
    """The tokens of a corpus, from the cache or put into it now.

    Args:
      corpus: what to read.
      tokenizer: how to read it.
      cache_dir: a local directory; created if needed.
      writer: False on all but one process of a job with a common cache: waits for the writer.
      full_check: compares every byte with what was stored, not samples alone.
      stalled: seconds without progress after which waiting is given up.

    Returns:
      The opened file and the corpus' fingerprint.

    Raises:
      ConfigError: text that can't be tokenized, a directory that can't be written to (finished
        parts are kept), a cache that is not what was stored, or a writer that doesn't come forward.
    """
    fingerprint = corpus.fingerprint()
    key = hashlib.sha256(f"{_FORMAT} {fingerprint} {tokenizer.fingerprint}".encode()).hexdigest()
    prefix = Path(cache_dir) / f"{corpus.kind}-{tokenizer.name}-{key[:16]}"
    stream = open_stored(
        prefix,
        lambda: build(corpus, tokenizer, prefix),
        writer=writer,
        full_check=full_check,
        stalled=stalled,
        remedy=f"remove {prefix}.* and the text is tokenized again",
    )
    return stream, fingerprint


def build(
    corpus: EmbeddedCorpus | FileCorpus, tokenizer: Tokenizer, prefix: Path, *, workers: int = 0
) -> None:
    """Writes PREFIX.bin, .idx, .hash and, for chats, .mask, unless they are there.

    Args:
      corpus: what to read.
      tokenizer: how to read it.
      prefix: the files' path without extension.
      workers: processes that tokenize; 0: this one.

    Raises:
      ConfigError: text that can't be tokenized (file and place), or a file that can't be read or
        written; finished parts are kept.
    """
    index = binidx_file(prefix, "idx")
    if is_complete(index):
        return
    try:
        index.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(index.with_suffix(".lock")):
            if is_complete(index):  # another process was first
                return
            _build(corpus, tokenizer, prefix, workers)
    except BrokenProcessPool as error:
        raise ConfigError(
            f"a process that tokenized {corpus.name} was killed, maybe for lack of memory; "
            "finished parts are kept: give the same command again, with fewer workers"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"tokenizing {corpus.name} into {prefix} failed: {error}; finished parts are kept: "
            "once the cause is mended, the same command goes on from them"
        ) from error


def _build(
    corpus: EmbeddedCorpus | FileCorpus, tokenizer: Tokenizer, prefix: Path, workers: int
) -> None:
    folder = binidx_file(prefix, "parts")
    parts = corpus.parts(tokenizer)
    folder.mkdir(exist_ok=True)
    _match_folder(folder, corpus, tokenizer, parts)
    _encode_all(parts, tokenizer, folder, workers, corpus.name)
    _join([_part_file(folder, i) for i in range(len(parts))], prefix, tokenizer)
    shutil.rmtree(folder)


def _encode_all(
    parts: list[Part], tokenizer: Tokenizer, folder: Path, workers: int, name: str
) -> None:
    """Tokenizes the parts that have no file yet."""
    todo = [i for i in range(len(parts)) if not _is_whole(_part_file(folder, i))]
    if len(todo) < len(parts):
        _log.info("%s: %d of %d parts are there", name, len(parts) - len(todo), len(parts))
    jobs = [(parts[i], _part_file(folder, i)) for i in todo]
    total, done = sum(part.size for part in parts), sum(parts[i].size for i in todo)
    with progress.of_bytes(f"tokenizing {name}", total, total - done) as bar:
        if workers == 0:
            for part, path in jobs:
                _encode_to_file(tokenizer, part, path)
                bar.advance(part.size)
            return
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(workers, context, follow_parent) as pool:
            work = functools.partial(_encode_to_file, tokenizer)
            tasks = {pool.submit(work, part, path): part for part, path in jobs}
            try:
                for task in concurrent.futures.as_completed(tasks):
                    task.result()
                    bar.advance(tasks[task].size)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _encode_to_file(tokenizer: Tokenizer, part: Part, path: Path) -> None:
    encoded = encode_part(part, tokenizer)
    tokens = encoded.tokens.astype(_dtype(tokenizer))
    arrays = {"tokens": tokens, "sizes": encoded.sizes, "closed": encoded.closed}
    if encoded.mask is not None:
        arrays["mask"] = encoded.mask
    with new_file(path) as file:
        np.savez(file, **arrays)


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32)


def _is_whole(path: Path) -> bool:
    """Whether a part is there and can be read; one that can't is removed."""
    if not path.exists():
        return False
    try:
        with np.load(path) as part:
            arrays = {name: part[name] for name in part.files}
        sizes, mask = arrays["sizes"], arrays.get("mask", arrays["tokens"])
        if sizes.sum() != len(arrays["tokens"]) or len(mask) != len(arrays["tokens"]):
            raise ValueError("its sizes do not belong to its tokens")
        bool(arrays["closed"])
    except Exception as error:  # a damaged archive fails in a dozen ways
        _log.warning("%s is damaged (%s): it is made again", path, error)
        path.unlink()
        return False
    return True


def _join(paths: list[Path], prefix: Path, tokenizer: Tokenizer) -> None:
    """Joins the parts' files in their order; hashes and index appear last."""
    remove_old(prefix)
    sizes = _join_tokens(paths, prefix)
    if not sizes:
        raise ConfigError(f"{prefix.name}: the corpus holds no text")
    if max(sizes) > np.iinfo(np.int32).max:
        raise ConfigError(f"{prefix.name}: a document of {max(sizes)} tokens is too long")
    finish(prefix, np.asarray(sizes, np.int64), _dtype(tokenizer))


def _join_tokens(paths: list[Path], prefix: Path) -> list[int]:
    """Writes tokens and mask; returns the size of each document."""
    masked = any(_has_mask(path) for path in paths)
    sizes, closed = [], True
    with contextlib.ExitStack() as stack:
        tokens = stack.enter_context(new_file(binidx_file(prefix, "bin")))
        mask = stack.enter_context(new_file(binidx_file(prefix, "mask"))) if masked else None
        for path in paths:
            with np.load(path) as part:
                found = part["sizes"].tolist()
                tokens.write(part["tokens"].tobytes())
                if mask is not None:
                    counts = part["mask"] if "mask" in part else np.ones(sum(found), np.uint8)
                    mask.write(counts.tobytes())
                if found and not closed:  # a document that goes on counts once
                    sizes[-1] += found.pop(0)
                sizes.extend(found)
                closed = bool(part["closed"])
    return sizes


def _has_mask(path: Path) -> bool:
    with np.load(path) as part:
        return "mask" in part


def _part_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.npz"


def _match_folder(
    folder: Path, corpus: EmbeddedCorpus | FileCorpus, tokenizer: Tokenizer, parts: list[Part]
) -> None:
    """Throws away parts which another corpus, tokenizer or way of cutting left."""
    expected = {"format": _FORMAT, "tokenizer": tokenizer.fingerprint, "files": corpus.listing()}
    expected["parts"] = hashlib.sha256(repr(parts).encode()).hexdigest()
    note = folder / "corpus.json"
    if note.exists() and _read_note(note) == expected:
        return
    for old in folder.glob("*.npz"):
        old.unlink()
    with new_file(note) as file:
        file.write(json.dumps(expected).encode())


def _read_note(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        _log.warning("%s is damaged (%s): the parts beside it are made again", path, error)
        return None
