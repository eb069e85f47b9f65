"""Readers: what a model makes of prompts and texts, reporting how far they are read.

An engine reads and continues them, on one device or over the mesh in force. All share a cache that
holds the longest: reading a chunk hardly costs more in a large cache, while compiling anew costs
more than reading many short prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

import jax.numpy as jnp
import numpy as np

from rwkvx_jax.cache import CachePolicy, cache_bytes
from rwkvx_jax.config import ConfigError
from rwkvx_jax.evals.models import EvalModel
from rwkvx_jax.generate.engine import Engine
from rwkvx_jax.generate.requests import Request, TokenScores
from rwkvx_jax.generate.sampling import NOT_FINITE
from rwkvx_jax.model import with_params
from rwkvx_jax.sharding import even_rows, mesh_in_force, ways

# Memory for the caches and activations of one batch where nobody says how many prompts it has.
_BATCH_BYTES = 2**30
# Tokens that all rows of a batch read at once; more of them keep no device busier.
STEP_TOKENS = 8192
# Activations of one chunk, in widths: the hidden layer of the channel mix and a dozen others.
_ACTIVATION_WIDTHS = 32


class GreedyReader:
    """A function from prompts to their most likely continuations."""

    def __init__(
        self,
        model: EvalModel,
        *,
        prefill_chunk: int,
        batch: int,
        longest: int,
        policy: CachePolicy | None = None,
    ):
        """
        Args:
          model: its parameters move to the device with the first prompts.
          prefill_chunk: most tokens of a prompt read at once.
          batch: rows, shared out to the prompts.
          longest: tokens of the longest prompt to come; a longer one is compiled for anew.
          policy: compression of the cache; None keeps every key and value.
        """
        self._model, self._batch, self._policy = model, even_rows(batch), policy
        self._chunk, self._chunks = prefill_chunk, -(-longest // prefill_chunk)
        self._rows = 0
        self._engine: Engine | None = None

    def __call__(
        self,
        prompts: Sequence[np.ndarray],
        count: int,
        advance: Callable[[int], None],
        ended: Callable[[np.ndarray], bool] = lambda answer: False,
    ) -> np.ndarray:
        """Continues prompts; what all of them begin with is read once, and not again where those of
        the next call begin with it.

        Args:
          prompts: int32 tokens, none empty.
          count: tokens of each answer.
          advance: told how many prompt tokens have been read, as they are.
          ended: whether an answer so far, int32 [n], needs no further token.

        Returns:
          int32 [len(prompts), count]; token 0 behind an answer's end, NOT_FINITE from where on
          logits were not finite. Each answer is what its prompt alone gives.
        """
        answers = np.zeros((len(prompts), count), np.int32)
        for number, answer in self.answer_all(prompts, count, advance, ended):
            answers[number] = answer
        return answers

    def answer_all(
        self,
        prompts: Sequence[np.ndarray],
        count: int,
        advance: Callable[[int], None],
        ended: Callable[[np.ndarray], bool] = lambda answer: False,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Continues prompts as the call does: numbers of prompts and their answers, as they come.

        A prefix is held in whole prefill chunks: its end then rarely lies in what is not yet of the
        next prompts' common beginning.
        """
        self._chunks = max(self._chunks, -(-max(map(len, prompts)) // self._chunk))
        engine = self._engine_for(self._chunks * self._chunk + count)
        shared = _common(prompts) // self._chunk * self._chunk
        left = shared

        def advance_all(count: int) -> None:
            nonlocal left
            left -= count
            advance(count * len(prompts))

        engine.hold(prompts[0][:shared], advance_all)
        advance_all(left)  # what was held before
        requests = (Request(prompt[shared:], count, stop=()) for prompt in prompts)
        done = lambda _, tokens: ended(np.asarray(tokens, np.int32))
        with closing(engine.answer(requests, ended=done, advance=advance)) as answers:
            for found in answers:
                if found.problem and not found.not_finite:
                    found.check()
                answer = np.full(count, NOT_FINITE if found.not_finite else 0, np.int32)
                answer[: len(found.tokens)] = found.tokens
                yield found.number, answer

    def _engine_for(self, rows: int) -> Engine:
        """The engine, made anew where its cache has fewer rows."""
        if rows > self._rows:
            self._engine = None  # frees its arrays before there are new ones
            self._engine = make_engine(self._model, rows, self._batch, self._chunk, self._policy)
            self._rows = rows
        return self._engine


def make_engine(
    model: EvalModel, rows: int, batch: int, chunk: int, policy: CachePolicy | None = None
) -> Engine:
    """An engine for a model under test."""
    return Engine(
        with_params(model.abstract, model.placed()),
        max_length=rows,
        batch=batch,
        piece=chunk,
        policy=policy,
        name=model.label,
    )


def _common(prompts: Sequence[np.ndarray]) -> int:
    """Tokens that all prompts begin with, fewer than any of them has."""
    size = min(map(len, prompts)) - 1
    first = prompts[0][:size]
    for other in prompts[1:]:
        differ = np.flatnonzero(first != other[: len(first)])
        first = first[: differ[0]] if len(differ) else first
    return len(first)


class TextScorer:
    """Scores of long texts, read through the cache: few compilations for any length."""

    def __init__(self, model: EvalModel, *, prefill_chunk: int, batch: int, longest: int):
        """
        Args:
          model: its parameters move to the device.
          prefill_chunk: most tokens of a text read at once.
          batch: rows, shared out to the texts.
          longest: predictions of the longest text.
        """
        rows = -(-longest // prefill_chunk) * prefill_chunk
        self._engine = make_engine(model, rows, even_rows(batch), prefill_chunk)

    def __call__(
        self, texts: Sequence[np.ndarray], advance: Callable[[int], None] = lambda count: None
    ) -> list[TokenScores]:
        """Scores of predicting texts[i][1:] one by one.

        Args:
          texts: int32 arrays of T + 1 tokens, each T from 1 to `longest`.
          advance: told how many tokens have been read, as they are.

        Returns:
          T predictions for each text.
        """
        found: dict[int, TokenScores] = {}
        requests = (Request(text, 0, score=True) for text in texts)
        with closing(self._engine.answer(requests, advance=advance)) as answers:
            for answer in answers:
                answer.check()
                found[answer.number] = answer.scores
        return [found[i] for i in range(len(texts))]


def affordable_batch(
    model: EvalModel,
    length: int,
    prefill_chunk: int,
    tokens: int = STEP_TOKENS,
    policy: CachePolicy | None = None,
) -> int:
    """Prompts of this length to read side by side: at least 1 on each device along the data axes,
    else as many as fit into so many tokens that each reads at once, and into about a gigabyte of
    each device."""
    mesh = mesh_in_force()
    most = _BATCH_BYTES * (mesh.size if mesh else 1)
    most //= _prompt_bytes(model, length, prefill_chunk, policy)
    return even_rows(max(1, min(ways("batch") * tokens // prefill_chunk, most)))


def check_memory(
    model: EvalModel,
    length: int,
    prefill_chunk: int,
    policy: CachePolicy | None,
    free: int | None,
    batch: int | None = None,
) -> None:
    """Refuses prompts that do not fit into the memory that is left, before any is made.

    Args:
      model: that reads them.
      length: tokens of the longest prompt.
      prefill_chunk: tokens read at once.
      policy: compression of the cache.
      free: bytes; None: nobody knows.
      batch: prompts to be read side by side; None: as many as fit, so one has to.

    Raises:
      ConfigError: says how much is needed.
    """
    needed = even_rows(batch or 1) * _prompt_bytes(model, length, prefill_chunk, policy)
    if free is not None and needed > free:
        what = "a prompt" if batch is None else f"a batch of {batch:,} prompts"
        raise ConfigError(
            f"{model.label}: {what} of {length:,} tokens needs {needed / 1e9:,.1f} GB of cache "
            f"and activations, and {free / 1e9:,.1f} GB are free: leave out the longest lengths, "
            "lower --batch, or bound the cache with --policy TRIGGER,KEEP,WINDOW"
        )


def _prompt_bytes(
    model: EvalModel, length: int, prefill_chunk: int, policy: CachePolicy | None
) -> int:
    """Memory of one prompt: its tokens, its cache, and the activations of a chunk."""
    config, dtype = model.config, jnp.dtype(model.run.compute_dtype)
    held = cache_bytes(config, dtype, 1, length, policy) + 8 * length
    return held + _ACTIVATION_WIDTHS * prefill_chunk * config.width * dtype.itemsize
