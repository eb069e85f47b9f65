"""Continues prompts greedily, reporting how far they are read.

Prompts are read in pieces of one length by the generation engine, so that long ones never become
one huge forward pass. All share a cache that holds the longest, hence one compilation: reading a
piece hardly costs more in a large cache, while compiling anew costs more than reading many short
prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rwkvx_jax.cache import CachePolicy, cache_bytes
from rwkvx_jax.config import ConfigError
from rwkvx_jax.evals.common import Subject
from rwkvx_jax.generate.engine import Engine, Mark, Session
from rwkvx_jax.generate.sampling import NOT_FINITE
from rwkvx_jax.model import abstract_model, with_params

# Memory for the caches and activations of one batch where nobody says how many prompts it has.
_BATCH_BYTES = 2**30
# Tokens that all rows of a batch read at once; more of them keep no device busier.
STEP_TOKENS = 8192
# Activations of one piece, in widths: the hidden layer of the channel mix and a dozen others.
_ACTIVATION_WIDTHS = 32


class GreedyReader:
    """A function from prompts to their most likely continuations."""

    def __init__(
        self,
        subject: Subject,
        *,
        piece: int,
        batch: int,
        longest: int,
        policy: CachePolicy | None = None,
    ):
        """
        Args:
          subject: the model; its parameters move to the device with the first prompts.
          piece: tokens read at once.
          batch: rows; smaller batches are padded.
          longest: tokens of the longest prompt to come; a longer one is compiled for anew.
          policy: compression of the cache; None keeps every key and value.
        """
        self._subject, self._piece, self._batch, self._policy = subject, piece, batch, policy
        self._pieces = -(-longest // piece)
        self._rows = 0
        self._engine: Engine | None = None
        self._session: Session | None = None
        self._mark: Mark | None = None  # behind what the last prompts had in common
        self._shared = np.zeros(0, np.int32)  # which is this

    def __call__(
        self,
        prompts: Sequence[np.ndarray],
        count: int,
        advance: Callable[[int], None],
        ended: Callable[[np.ndarray], bool] = lambda answer: False,
    ) -> np.ndarray:
        """Continues each prompt.

        Args:
          prompts: at most `batch` arrays of int32 tokens, none empty.
          count: tokens of each answer.
          advance: told how many prompt tokens have been read, piece by piece.
          ended: whether an answer so far, int32 [n], needs no further token.

        Returns:
          int32 [len(prompts), count]; token 0 behind an answer's end, NOT_FINITE from where on
          logits were not finite. Each answer is what its prompt alone gives.
        """
        longest = max(map(len, prompts))
        self._pieces = max(self._pieces, -(-longest // self._piece))
        engine = self._engine_for(self._pieces * self._piece + count)
        begin = self._read_shared(engine, prompts, advance)
        session = self._session
        padding = [prompts[0][begin : begin + 1]] * (self._batch - len(prompts))
        for start in range(begin, longest, step := self._piece * self._pieces_at_once()):
            texts = [prompt[start : start + step] for prompt in prompts]
            engine.feed(session, texts + [text[start - begin :] for text in padding])
            advance(sum(map(len, texts)))
        answers = np.zeros((len(prompts), count), np.int32)
        active = np.arange(self._batch) < len(prompts)
        for i in range(count):
            tokens = engine.next_tokens(session, active)
            for row in np.flatnonzero(active):
                answers[row, i] = tokens[row]
                active[row] = tokens[row] != NOT_FINITE and not ended(answers[row, : i + 1])
                if tokens[row] == NOT_FINITE:
                    answers[row, i:] = NOT_FINITE
            if not active.any():
                break
        if (answers == NOT_FINITE).any():
            # Its keys and values, though out of reach after a rewind, would spoil sums with zeros.
            self._session = self._mark = None
        return answers

    def _read_shared(self, engine: Engine, prompts: Sequence[np.ndarray], advance) -> int:
        """Reads what all prompts begin with, in whole pieces; returns how many tokens that is.

        What the prompts before had in common too is not read again. All rows stand there then, with
        at least one token of each prompt left.
        """
        shared = 0 if self._policy else _common(prompts) // self._piece * self._piece
        done = len(self._shared)
        if self._mark is not None and np.array_equal(self._shared, prompts[0][: min(done, shared)]):
            engine.rewind(self._session, self._mark)
            advance(done * len(prompts))
        else:
            self._session = None  # frees its cache before the next one is made
            self._session, done = engine.open(), 0
        for start in range(done, shared, step := self._piece * self._pieces_at_once()):
            text = prompts[0][start : min(shared, start + step)]
            engine.feed(self._session, [text] * self._batch)
            advance(len(text) * len(prompts))
        if self._policy is None:
            self._mark, self._shared = engine.mark(self._session), prompts[0][:shared]
        return shared

    def _pieces_at_once(self) -> int:
        """Pieces between two reports of progress, for which the device has to come to rest."""
        return max(1, STEP_TOKENS // (self._piece * self._batch))

    def _engine_for(self, rows: int) -> Engine:
        """The engine, made anew where its cache has fewer rows."""
        if rows > self._rows:
            self._engine = None  # frees its parameters before they are copied again
            self._session = self._mark = None
            abstract = abstract_model(self._subject.config, self._subject.run)
            model = with_params(abstract, jax.device_put(self._subject.params))
            self._engine = Engine(
                model,
                max_length=rows,
                batch=self._batch,
                piece=self._piece,
                policy=self._policy,
                name=self._subject.label,
            )
            self._rows = rows
        return self._engine


def _common(prompts: Sequence[np.ndarray]) -> int:
    """Tokens that all prompts begin with, fewer than any of them has."""
    size = min(map(len, prompts)) - 1
    first = prompts[0][:size]
    for other in prompts[1:]:
        differ = np.flatnonzero(first != other[: len(first)])
        first = first[: differ[0]] if len(differ) else first
    return len(first)


def affordable_batch(
    subject: Subject,
    length: int,
    piece: int,
    tokens: int = STEP_TOKENS,
    policy: CachePolicy | None = None,
) -> int:
    """Prompts of this length to read side by side: at least 1, else as many as fit into so many
    tokens read at once and into about a gigabyte."""
    most = _BATCH_BYTES // _prompt_bytes(subject, length, piece, policy)
    return max(1, min(tokens // piece, most))


def check_memory(
    subject: Subject,
    length: int,
    piece: int,
    policy: CachePolicy | None,
    free: int | None,
    batch: int | None = None,
) -> None:
    """Refuses prompts that do not fit into the memory that is left, before any is made.

    Args:
      subject: the model.
      length: tokens of the longest prompt.
      piece: tokens read at once.
      policy: compression of the cache.
      free: bytes; None: nobody knows.
      batch: prompts to be read side by side; None: as many as fit, so one has to.

    Raises:
      ConfigError: says how much is needed.
    """
    needed = (batch or 1) * _prompt_bytes(subject, length, piece, policy)
    if free is not None and needed > free:
        what = "a prompt" if batch is None else f"a batch of {batch:,} prompts"
        raise ConfigError(
            f"{subject.label}: {what} of {length:,} tokens needs {needed / 1e9:,.1f} GB of cache "
            f"and activations, and {free / 1e9:,.1f} GB are free: leave out the longest lengths, "
            "lower --batch, or bound the cache with --policy TRIGGER,KEEP,WINDOW"
        )


def _prompt_bytes(subject: Subject, length: int, piece: int, policy: CachePolicy | None) -> int:
    """Memory of one prompt: its tokens, its cache, and the activations of a piece."""
    config, dtype = subject.config, jnp.dtype(subject.run.compute_dtype)
    held = cache_bytes(config, dtype, 1, length, policy) + 8 * length
    return held + _ACTIVATION_WIDTHS * piece * config.width * dtype.itemsize
