"""Tokenizes a corpus once into a binidx file.

The corpus is cut into parts; each finished part is a file of its own, so that an interrupted run
goes on where it stopped, and any number of processes can work side by side. At the end the parts
are joined beside the final names and renamed, the index last: whoever sees the index sees a
complete file.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from rwkvx_jax.config import ConfigError
from rwkvx_jax.data.binidx import Binidx, binidx_file, write_index
from rwkvx_jax.data.sources import EmbeddedCorpus, FileCorpus, Part, encode_part
from rwkvx_jax.data.workers import follow_parent
from rwkvx_jax.tokenizer import Tokenizer

_log = logging.getLogger(__name__)
_FORMAT = 1  # raised when the same text would give other files
_SHOW_AFTER = 2.0  # seconds of work before a progress bar appears
_POLL = 0.5  # seconds between looks at what another process writes
_STALLED = 600.0  # seconds without any progress of it that are an error


def cached(
    corpus: EmbeddedCorpus | FileCorpus,
    tokenizer: Tokenizer,
    cache_dir: Path,
    *,
    writer: bool = True,
    stalled: float = _STALLED,
) -> tuple[Binidx, str]:
    """The tokens of a corpus, from the cache or put into it now.

    Args:
      corpus: what to read.
      tokenizer: how to read it.
      cache_dir: a local directory; created if needed.
      writer: False on all but one process of a job with a common cache: waits for the writer.
      stalled: seconds without progress after which waiting is given up.

    Returns:
      The opened file and the corpus' fingerprint.

    Raises:
      ConfigError: text that can't be tokenized, or a writer that doesn't come forward.
      OSError: the directory can't be written to; finished parts are kept.
    """
    fingerprint = corpus.fingerprint()
    key = hashlib.sha256(f"{_FORMAT} {fingerprint} {tokenizer.fingerprint}".encode()).hexdigest()
    prefix = Path(cache_dir) / f"{corpus.kind}-{tokenizer.name}-{key[:16]}"
    if writer:
        build(corpus, tokenizer, prefix)
    else:
        _wait(prefix, stalled)
    return Binidx(prefix), fingerprint


def build(
    corpus: EmbeddedCorpus | FileCorpus, tokenizer: Tokenizer, prefix: Path, *, workers: int = 0
) -> None:
    """Writes PREFIX.bin, PREFIX.idx and, for chats, PREFIX.mask, unless they are there.

    Args:
      corpus: what to read.
      tokenizer: how to read it.
      prefix: the files' path without extension.
      workers: processes that tokenize; 0: this one.

    Raises:
      ConfigError: text that can't be tokenized (file and place).
      OSError: the directory can't be written to; finished parts are kept.
    """
    index = binidx_file(prefix, "idx")
    if index.exists():
        return
    folder = index.with_suffix(".parts")
    try:
        index.parent.mkdir(parents=True, exist_ok=True)
        with _only_one(index.with_suffix(".lock")):
            if index.exists():  # another process was first
                return
            parts = corpus.parts(tokenizer)
            folder.mkdir(exist_ok=True)
            _match_folder(folder, corpus, tokenizer)
            _encode_all(parts, tokenizer, folder, workers, corpus.name)
            _join([_part_file(folder, i) for i in range(len(parts))], prefix, tokenizer)
            shutil.rmtree(folder)
    except OSError as error:
        error.add_note(f"while tokenizing {corpus.name} into {prefix}; finished parts are kept")
        raise


def _encode_all(
    parts: list[Part], tokenizer: Tokenizer, folder: Path, workers: int, name: str
) -> None:
    """Tokenizes the parts that have no file yet."""
    todo = [i for i in range(len(parts)) if not _part_file(folder, i).exists()]
    if len(todo) < len(parts):
        _log.info("%s: %d of %d parts are there", name, len(parts) - len(todo), len(parts))
    jobs = [(parts[i], _part_file(folder, i)) for i in todo]
    total, done = sum(part.size for part in parts), sum(parts[i].size for i in todo)
    with _progress(f"tokenizing {name}", total, total - done) as advance:
        if workers == 0:
            for part, path in jobs:
                _encode_to_file(tokenizer, part, path)
                advance(part.size)
            return
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(workers, context, follow_parent) as pool:
            work = functools.partial(_encode_to_file, tokenizer)
            tasks = {pool.submit(work, part, path): part for part, path in jobs}
            try:
                for task in concurrent.futures.as_completed(tasks):
                    task.result()
                    advance(tasks[task].size)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _encode_to_file(tokenizer: Tokenizer, part: Part, path: Path) -> None:
    encoded = encode_part(part, tokenizer)
    tokens = encoded.tokens.astype(_dtype(tokenizer))
    arrays = {"tokens": tokens, "sizes": encoded.sizes, "closed": encoded.closed}
    if encoded.mask is not None:
        arrays["mask"] = encoded.mask
    with _new_file(path) as file:
        np.savez(file, **arrays)


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32)


def _join(paths: list[Path], prefix: Path, tokenizer: Tokenizer) -> None:
    """Joins the parts' files in their order; the index appears last."""
    mask_file = binidx_file(prefix, "mask")
    mask_file.unlink(missing_ok=True)
    masked = any(_has_mask(path) for path in paths)
    sizes, closed = [], True
    with contextlib.ExitStack() as stack:
        tokens = stack.enter_context(_new_file(binidx_file(prefix, "bin")))
        mask = stack.enter_context(_new_file(mask_file)) if masked else None
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
        if not sizes:
            raise ConfigError(f"{prefix.name}: the corpus holds no text")
        if max(sizes) > np.iinfo(np.int32).max:
            raise ConfigError(f"{prefix.name}: a document of {max(sizes)} tokens is too long")
    with _new_file(binidx_file(prefix, "idx")) as index:
        write_index(index, np.asarray(sizes, np.int64), _dtype(tokenizer))


def _has_mask(path: Path) -> bool:
    with np.load(path) as part:
        return "mask" in part


def _part_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.npz"


def _match_folder(folder: Path, corpus: EmbeddedCorpus | FileCorpus, tokenizer: Tokenizer) -> None:
    """Throws away parts which another corpus or tokenizer left."""
    expected = {"format": _FORMAT, "tokenizer": tokenizer.fingerprint, "files": corpus.listing()}
    note = folder / "corpus.json"
    if note.exists() and json.loads(note.read_text()) == expected:
        return
    for old in folder.glob("*.npz"):
        old.unlink()
    with _new_file(note) as file:
        file.write(json.dumps(expected).encode())


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name when the block ends without error, and is complete then."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Lets one process at a time into the block; the system frees the lock of a dead one.

    The file goes when the block succeeds. Processes that still wait on it then must look whether
    there is anything left to do.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:  # some network file systems have no locks
            _log.warning("%s can't be locked (%s): start one process only", path, error)
        yield
        path.unlink(missing_ok=True)


def _wait(prefix: Path, stalled: float) -> None:
    """Waits until another process has written the index."""
    index = binidx_file(prefix, "idx")
    folder, seen, since = index.with_suffix(".parts"), None, time.monotonic()
    while not index.exists():
        state = _state(folder)
        if state != seen:
            seen, since = state, time.monotonic()
        if time.monotonic() - since > stalled:
            raise ConfigError(
                f"waited {stalled:.0f} s for process 0 to write {index}: data.cache_dir must lie "
                "on storage that all hosts share; otherwise set data.cache_per_host"
            )
        time.sleep(_POLL)


def _state(folder: Path) -> list[tuple[str, int]]:
    """Names and sizes of the files that are being written."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(folder):
            with contextlib.suppress(FileNotFoundError):
                found.append((entry.name, entry.stat().st_size))
    return sorted(found)


@contextlib.contextmanager
def _progress(label: str, total: int, done: int) -> Iterator[Callable[[int], None]]:
    """A progress bar over bytes, shown once the work turns out to take long."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    task = bar.add_task(label, total=total, completed=done)
    begin, shown = time.monotonic(), False

    def advance(size: int) -> None:
        nonlocal shown
        bar.advance(task, size)
        if not shown and time.monotonic() - begin > _SHOW_AFTER:
            bar.start()
            shown = True

    try:
        yield advance
    finally:
        if shown:
            bar.stop()
