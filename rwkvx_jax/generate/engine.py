"""Continues many prompts at once: prompts are read in pieces, then one jitted step per token.

Pieces have one length and the cache one size, so that each of the two functions is compiled once;
the cache is donated and written in place. On a CPU each layer's weights lie in arrays of their own
(`model.unstack`), which a decode step reads at the speed of memory. Tokens reach the caller as they
come, as text that never ends inside a UTF-8 character.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rwkvx_jax.cache import Cache, CachePolicy, Snapshot, rewind, snapshot
from rwkvx_jax.config import ConfigError
from rwkvx_jax.generate.sampling import Sampling, count_token, sample
from rwkvx_jax.model import RWKVX, Params, get_params, unstack, with_params
from rwkvx_jax.ops.dispatch import current_platform
from rwkvx_jax.tokenizer import Tokenizer


class Progress(NamedTuple):
    """What a decode step carries beside the cache."""

    logits: jax.Array  # [B, W], of the next token
    keys: jax.Array  # [B] PRNG keys
    counts: jax.Array | None  # [B, W] float32, what was generated so far


@dataclass
class Speed:
    """Tokens and seconds of one generation, compilation included where it happened."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    tokens: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        rate = lambda count, seconds: f"{count / seconds if seconds else 0.0:.1f} tokens/s"
        return (
            f"prompt {self.prompt_tokens} tokens, {rate(self.prompt_tokens, self.prompt_seconds)}; "
            f"generated {self.tokens} tokens, {rate(self.tokens, self.seconds)}"
        )


@dataclass
class Session:
    """Texts in progress: the state after all tokens read, and what comes next."""

    cache: Cache
    progress: Progress
    read: np.ndarray  # [B] tokens of each text
    speed: Speed = field(default_factory=Speed)


class Mark(NamedTuple):
    """A point of texts in progress to come back to; see `Engine.mark`."""

    state: Snapshot
    logits: jax.Array
    read: np.ndarray


class Engine:
    """Reads and continues texts with one model.

    Attributes:
      params: the parameters, as `decode` takes them.
      max_length: tokens, prompt and answer together, that a text may have (None: no limit, under a
        policy or without attention blocks).
    """

    def __init__(
        self,
        model: RWKVX,
        *,
        max_length: int,
        batch: int = 1,
        piece: int = 512,
        sampling: Sampling | None = None,
        policy: CachePolicy | None = None,
    ):
        """
        Args:
          model: its parameters are copied on a CPU (layer by layer).
          max_length: rows of the cache for each text.
          batch: texts side by side.
          piece: prompt tokens read at once.
          sampling: None: greedy.
          policy: compresses the cache instead of refusing texts beyond `max_length`.

        Raises:
          ConfigError: a size below 1.
        """
        for name, value in (("max_length", max_length), ("batch", batch), ("piece", piece)):
            if value < 1:
                raise ConfigError(f"{name} is {value}: it must be at least 1")
        self.batch, self.vocab_size = batch, model.config.vocab_size
        self.sampling = sampling or Sampling()
        unlimited = policy is not None or not model.config.num_attention_blocks
        self.max_length = None if unlimited else max_length
        self._piece, self._rows, self._policy = piece, max_length, policy
        layered = unstack(model) if current_platform() == "cpu" else model
        self.params = get_params(layered)
        self._abstract = jax.eval_shape(lambda: layered)
        self._read = jax.jit(self._read_piece, donate_argnums=(2, 3))
        self._step = jax.jit(self._next_token, donate_argnums=(1, 2))

    def start(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int] | None = None
    ) -> Session:
        """Reads prompts (as many as `batch`; none empty).

        Args:
          prompts: token ids of each text.
          seeds: one a text; default 0, 1, 2, ... A text depends on its own seed alone.

        Raises:
          ConfigError: another number of prompts, an empty one, an id outside the vocabulary, or a
            prompt too long for `max_length`.
        """
        session = self.open(seeds)
        if len(prompts) != self.batch:
            raise ConfigError(f"{len(prompts)} prompts for an engine of batch {self.batch}")
        empty = [i for i, prompt in enumerate(prompts) if not len(prompt)]
        if empty:
            raise ConfigError(f"prompt {empty[0]} is empty: give it at least one token")
        self.feed(session, prompts)
        return session

    def open(self, seeds: Sequence[int] | None = None) -> Session:
        """Texts of which nothing has been read yet, to be given their first tokens by `feed`.

        Args:
          seeds: as `start` takes them.

        Raises:
          ConfigError: another number of seeds than of texts.
        """
        seeds = range(self.batch) if seeds is None else seeds
        if len(seeds) != self.batch:
            raise ConfigError(f"{len(seeds)} seeds for an engine of batch {self.batch}")
        model = with_params(self._abstract, self.params)
        shape = (self.batch, self.vocab_size)
        progress = Progress(
            jnp.zeros(shape, jnp.float32),
            jnp.stack([jax.random.key(seed) for seed in seeds]),
            jnp.zeros(shape, jnp.float32) if self.sampling.penalizes else None,
        )
        cache = model.init_cache(self.batch, self._rows, policy=self._policy)
        return Session(cache, progress, np.zeros(self.batch, np.int64))

    def feed(self, session: Session, texts: Sequence[Sequence[int]]) -> None:
        """Reads further tokens of each text (an empty list: none), as `start` does the first."""
        texts = [self._checked(i, text, session) for i, text in enumerate(texts)]
        lengths = np.asarray([len(text) for text in texts], np.int32)
        begin = time.perf_counter()
        for start in range(0, int(lengths.max()), self._piece):
            part = np.zeros((self.batch, self._piece), np.int32)
            for row, text in zip(part, texts, strict=True):
                cut = text[start : start + self._piece]
                row[: len(cut)] = cut
            valid = np.clip(lengths - start, 0, self._piece)
            logits, session.cache = self._read(
                self.params, part, session.progress.logits, session.cache, valid
            )
            session.progress = session.progress._replace(logits=logits)
        session.progress.logits.block_until_ready()
        session.read += lengths
        session.speed.prompt_tokens += int(lengths.sum())
        session.speed.prompt_seconds += time.perf_counter() - begin

    def mark(self, session: Session) -> Mark:
        """Where the texts are now.

        Raises:
          ConfigError: under a policy, which can't be undone.
        """
        if self._policy is not None:
            raise ConfigError("texts read under a cache policy can't be rewound: read them anew")
        state = jax.tree.map(jnp.copy, snapshot(session.cache))  # reading on donates the original
        return Mark(state, jnp.copy(session.progress.logits), session.read.copy())

    def rewind(self, session: Session, mark: Mark) -> None:
        """Takes back everything read and generated since the mark, of the same session."""
        session.cache = rewind(session.cache, jax.tree.map(jnp.copy, mark.state))
        session.progress = session.progress._replace(logits=jnp.copy(mark.logits))
        session.read = mark.read.copy()

    def next_tokens(self, session: Session) -> np.ndarray:
        """Chooses the next token of each text and reads it, int32 [B]."""
        if self.max_length is not None and session.read.max() >= self.max_length:
            raise ConfigError(
                f"the text has {session.read.max()} tokens, all that the cache holds: make the "
                "engine with a larger max_length, or with a CachePolicy"
            )
        begin = time.perf_counter()
        token, session.progress, session.cache = self._step(
            self.params, session.progress, session.cache
        )
        token = np.asarray(token)
        session.read += 1
        session.speed.tokens += self.batch
        session.speed.seconds += time.perf_counter() - begin
        return token

    def stream(
        self, session: Session, max_tokens: int, stop: Sequence[int] = (0,)
    ) -> Iterator[np.ndarray]:
        """Tokens of each text, int32 [B] at a time; -1 where a text has ended.

        A text ends before a stop token. Ends when all have ended, after `max_tokens`, or where the
        cache is full.
        """
        if bad := [t for t in stop if not 0 <= t < self.vocab_size]:
            raise ConfigError(f"stop token {bad[0]} is not in the vocabulary of {self.vocab_size}")
        ended = np.zeros(self.batch, bool)
        for _ in range(max_tokens):
            if self.max_length is not None and session.read.max() >= self.max_length:
                return
            token = self.next_tokens(session)
            ended |= np.isin(token, np.asarray(stop, np.int32))
            if ended.all():
                return
            yield np.where(ended, -1, token)

    def _checked(self, index: int, text: Sequence[int], session: Session) -> np.ndarray:
        text = np.asarray(text, np.int64)
        outside = text[(text < 0) | (text >= self.vocab_size)]
        if outside.size:
            raise ConfigError(
                f"prompt {index} has token {outside[0]}, outside the vocabulary of "
                f"{self.vocab_size}: use the tokenizer that the model was trained with"
            )
        total = int(session.read[index]) + len(text)
        if self.max_length is not None and total > self.max_length:
            raise ConfigError(
                f"prompt {index} makes {total} tokens, more than max_length {self.max_length}: "
                "raise max_length, or give a CachePolicy that drops old rows"
            )
        return text.astype(np.int32)

    def _read_piece(self, params, part, logits, cache, valid):
        model = with_params(self._abstract, params)
        new, cache = model.prefill(part, cache, valid)
        return jnp.where((valid > 0)[:, None], new, logits), cache

    def decode(self, params: Params, token: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """`model.decode` under given parameters (`self.params`), to be jitted with the cache
        donated."""
        return with_params(self._abstract, params).decode(token, cache)

    def _next_token(self, params, progress: Progress, cache: Cache):
        split = jax.vmap(partial(jax.random.split, num=2))(progress.keys)
        token = sample(progress.logits, split[:, 1], self.sampling, progress.counts)
        counts = progress.counts
        if counts is not None:
            counts = count_token(counts, token, self.sampling)
        logits, cache = self.decode(params, token, cache)
        return token, Progress(logits, split[:, 0], counts), cache


class TextStream:
    """Turns tokens into text as they come; bytes of an unfinished character are held back."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that this token completes; an id that the vocabulary lacks gives U+FFFD."""
        try:
            data = self._tokenizer.decode_bytes([token])
        except ValueError:
            data = "\N{REPLACEMENT CHARACTER}".encode()
        return self._decoder.decode(data)

    def finish(self) -> str:
        """What is left; an unfinished character becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)


def generate(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_tokens: int,
    *,
    stop: Sequence[int] = (0,),
    seeds: Sequence[int] | None = None,
) -> tuple[list[str], Speed]:
    """Continues texts: the continuations, and how fast they came."""
    session = engine.start([tokenizer.encode(prompt) for prompt in prompts], seeds)
    streams = [TextStream(tokenizer) for _ in prompts]
    texts = ["" for _ in prompts]
    for tokens in engine.stream(session, max_tokens, stop):
        for i, token in enumerate(tokens):
            if token >= 0:
                texts[i] += streams[i].push(int(token))
    return [
        text + stream.finish() for text, stream in zip(texts, streams, strict=True)
    ], session.speed
