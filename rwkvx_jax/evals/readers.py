"""Readers: what a model makes of prompts and texts, reporting how far they are read.

Prompts are read in prefill chunks through the decode cache, on one device or over the mesh in
force. All share a cache that holds the longest, hence one compilation: reading a chunk hardly costs
more in a large cache, while compiling anew costs more than reading many short prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rwkvx_jax.cache import CachePolicy, cache_bytes
from rwkvx_jax.config import ConfigError
from rwkvx_jax.evals.models import EvalModel
from rwkvx_jax.generate.chunks import prefill_chunks
from rwkvx_jax.generate.engine import Engine, Mark, Session
from rwkvx_jax.generate.sampling import NOT_FINITE
from rwkvx_jax.generate.serving import Request, serve
from rwkvx_jax.model import RWKVX, with_params
from rwkvx_jax.sharding import even_rows, mesh_in_force, ways, whole

_BLOCK_LOGITS = 1 << 26  # at most so many at once, a quarter of a gigabyte
# On a CPU a block should stay in cache between its products and their sums.
_PLACE_LOGITS = {"cpu": 1 << 21}
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
          prefill_chunk: tokens read at once.
          batch: rows; smaller batches are padded.
          longest: tokens of the longest prompt to come; a longer one is compiled for anew.
          policy: compression of the cache; None keeps every key and value.
        """
        self._model, self._batch, self._policy = model, even_rows(batch), policy
        self._chunk, self._chunks = prefill_chunk, -(-longest // prefill_chunk)
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
          advance: told how many prompt tokens have been read, as they are.
          ended: whether an answer so far, int32 [n], needs no further token.

        Returns:
          int32 [len(prompts), count]; token 0 behind an answer's end, NOT_FINITE from where on
          logits were not finite. Each answer is what its prompt alone gives.
        """
        longest = max(map(len, prompts))
        self._chunks = max(self._chunks, -(-longest // self._chunk))
        engine = self._engine_for(self._chunks * self._chunk + count)
        begin = self._read_shared(engine, prompts, advance)
        session = self._session
        padding = [prompts[0][begin : begin + 1]] * (self._batch - len(prompts))
        for start in range(begin, longest, step := self._chunk * self._chunks_at_once()):
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

    def answer_all(
        self,
        prompts: Sequence[np.ndarray],
        count: int,
        advance: Callable[[int], None],
        ended: Callable[[np.ndarray], bool] = lambda answer: False,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Continues any number of prompts of any length, each as soon as a row is free.

        Args: as of the call, but that a prompt is told of when its answer is whole.

        Yields:
          The number of a prompt, and its answer [count], as the call returns it.
        """
        self._chunks = max(self._chunks, -(-max(map(len, prompts)) // self._chunk))
        engine = self._engine_for(self._chunks * self._chunk + count)
        self._session = self._mark = None  # frees its cache before the next one is made
        shared = _common(prompts)
        requests = (Request(prompt[shared:], count, stop=()) for prompt in prompts)
        done = lambda _, tokens: ended(np.asarray(tokens, np.int32))
        for found in serve(engine, requests, prefix=prompts[0][:shared], ended=done):
            answer = np.full(count, NOT_FINITE if found.problem else 0, np.int32)
            answer[: len(found.tokens)] = found.tokens
            advance(len(prompts[found.number]))
            yield found.number, answer

    def _read_shared(self, engine: Engine, prompts: Sequence[np.ndarray], advance) -> int:
        """Reads what all prompts begin with, in whole chunks; returns how many tokens that is.

        What the prompts before had in common too is not read again. All rows stand there then, with
        at least one token of each prompt left.
        """
        shared = 0 if self._policy else _common(prompts) // self._chunk * self._chunk
        done = len(self._shared)
        if self._mark is not None and np.array_equal(self._shared, prompts[0][: min(done, shared)]):
            engine.rewind(self._session, self._mark)
            advance(done * len(prompts))
        else:
            self._session = None  # frees its cache before the next one is made
            self._session, done = engine.open(), 0
        for start in range(done, shared, step := self._chunk * self._chunks_at_once()):
            text = prompts[0][start : min(shared, start + step)]
            engine.feed(self._session, [text] * self._batch)
            advance(len(text) * len(prompts))
        if self._policy is None:
            self._mark, self._shared = engine.mark(self._session), prompts[0][:shared]
        return shared

    def _chunks_at_once(self) -> int:
        """Chunks between two reports of progress, for which the device has to come to rest."""
        return max(1, STEP_TOKENS // (self._chunk * self._batch))

    def _engine_for(self, rows: int) -> Engine:
        """The engine, made anew where its cache has fewer rows."""
        if rows > self._rows:
            self._engine = None  # frees its parameters before they are copied again
            self._session = self._mark = None
            self._engine = Engine(
                with_params(self._model.abstract, self._model.placed()),
                max_length=rows,
                batch=self._batch,
                piece=self._chunk,
                policy=self._policy,
                name=self._model.label,
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


def score_places(
    model: RWKVX,
    features: jax.Array,  # [N, D]
    places: jax.Array,  # [U] int32, rows of the features
    targets: jax.Array,  # [U, A] int32
    count: jax.Array | int,
) -> tuple[jax.Array, jax.Array]:
    """Scores A tokens each at chosen places; nothing is computed beyond the first `count` places.

    Returns:
      Logarithms of the tokens' probabilities [U, A], and whether each is the most likely one.
    """
    number = len(places)
    limit = _PLACE_LOGITS.get(jax.default_backend(), _BLOCK_LOGITS)
    block = min(number, max(1, limit // model.config.vocab_size))
    padding = -number % block
    places, targets = jnp.pad(places, (0, padding)), jnp.pad(targets, ((0, padding), (0, 0)))

    def one_block(i: jax.Array, scores: tuple[jax.Array, jax.Array]):
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, i * block, block)
        logits, wanted = model.head(features[cut(places)]), cut(targets)
        own = jnp.take_along_axis(logits, wanted, axis=1)
        logs = own - jax.nn.logsumexp(logits, axis=1, keepdims=True)
        hits = jnp.argmax(logits, axis=1)[:, None] == wanted
        put = lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, i * block, 0)
        return put(scores[0], logs), put(scores[1], hits)

    start = jnp.zeros(targets.shape, jnp.float32), jnp.zeros(targets.shape, bool)
    logs, hits = jax.lax.fori_loop(0, -(-count // block), one_block, start)
    return logs[:number], hits[:number]


class TokenScores(NamedTuple):
    """How a text's predictions went, one after the other.

    Attributes:
      losses: float32 [T], nats.
      hits: bool [T], whether the token was the most likely one.
    """

    losses: np.ndarray
    hits: np.ndarray


class TextScorer:
    """Scores of long texts, read through the cache: one compilation for any length."""

    def __init__(self, model: EvalModel, *, prefill_chunk: int, batch: int, longest: int):
        """
        Args:
          model: its parameters move to the device.
          prefill_chunk: tokens read at once.
          batch: texts side by side; smaller batches are padded.
          longest: predictions of the longest text.
        """
        self._chunk, self._batch = prefill_chunk, even_rows(batch)
        self._rows = -(-longest // prefill_chunk) * prefill_chunk
        self._model, self._params = model.abstract, model.placed()
        self._score = jax.jit(self._score_chunk, donate_argnums=2)

    def __call__(
        self, texts: Sequence[np.ndarray], advance: Callable[[int], None] = lambda count: None
    ) -> list[TokenScores]:
        """Scores of predicting texts[i][1:] one by one.

        Args:
          texts: at most `batch` int32 arrays of T + 1 tokens, each T from 1 to `longest`.
          advance: told how many tokens have been read, as they are.

        Returns:
          T predictions for each text.
        """
        padding = [np.zeros(0, np.int32)] * (self._batch - len(texts))
        inputs = prefill_chunks([*(text[:-1] for text in texts), *padding], self._chunk)
        targets = prefill_chunks([*(text[1:] for text in texts), *padding], self._chunk)
        cache = self._model.init_cache(self._batch, self._rows)
        read = []
        for (tokens, counts), (wanted, _) in zip(inputs, targets, strict=True):
            scores, cache = self._score(self._params, (tokens, wanted), cache, counts)
            read.append(jax.device_get(scores))
            advance(int(counts.sum()))
        losses, hits = (np.concatenate(parts, axis=1) for parts in zip(*read, strict=True))
        cut = lambda row, count: TokenScores(losses[row, :count], hits[row, :count])
        return [cut(row, len(text) - 1) for row, text in enumerate(texts)]

    def _score_chunk(self, params, tokens, cache, counts):
        model = with_params(self._model, params)
        features, cache = model.read(tokens[0], cache, counts)
        batch, time, width = features.shape
        every, targets = jnp.arange(batch * time), tokens[1].reshape(-1, 1)
        logs, hits = score_places(model, features.reshape(-1, width), every, targets, every.size)
        return whole((-logs.reshape(batch, time), hits.reshape(batch, time))), cache


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
