"""Continues many prompts at once: prompts are read in pieces, then one jitted step per token.

Pieces have one length and the cache one size, so that each of the two functions is compiled once;
the cache is donated and written in place. What a text gets does not depend on its neighbours: one
that has ended stays as it is while the others go on. On a CPU each layer's weights lie in arrays of
their own (`model.unstack`), which a decode step reads at the speed of memory. Where a mesh is in
force, texts, states and pages lie over it. Tokens reach the caller as they come (`texts`: as text).
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rwkvx_jax.cache import Cache, CachePolicy, spread
from rwkvx_jax.config import ConfigError
from rwkvx_jax.generate.chunks import prefill_chunks
from rwkvx_jax.generate.memory import check_memory
from rwkvx_jax.generate.sampling import NOT_FINITE, Sampling, check_seed, count_token, sample
from rwkvx_jax.model import RWKVX, Params, get_params, unstack, with_params
from rwkvx_jax.ops.dispatch import current_platform
from rwkvx_jax.sharding import constrain, whole
from rwkvx_jax.snapshots import Snapshot, choose, rewind, snapshot, wiped

ENDED = -1
"""In place of a token: the text has ended."""


class NotFiniteError(ConfigError):
    """A model gave logits that are not finite, from which no token can be chosen."""


class Progress(NamedTuple):
    """What a decode step carries beside the cache."""

    logits: jax.Array  # [B, W], of the next token
    keys: jax.Array  # [B] PRNG keys
    counts: jax.Array | None  # [B, W] float32, what was generated so far

    def spread(self) -> Progress:
        """Itself, asked to lie over the mesh in force."""
        tokens = lambda x: constrain(x, "batch", "vocab")
        counts = None if self.counts is None else tokens(self.counts)
        return Progress(tokens(self.logits), whole(self.keys), counts)


def _pick(rows: jax.Array, new: Progress, old: Progress) -> Progress:
    """`new` of the texts where rows [B], `old` elsewhere."""
    pick = lambda x, y: jnp.where(rows.reshape(-1, *[1] * (y.ndim - 1)), x, y)
    return jax.tree.map(pick, new, old)


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
    marks: weakref.WeakSet[Mark] = field(default_factory=weakref.WeakSet)  # that still hold

    def go_back(self, read: np.ndarray) -> None:
        """Notes that so much of each text is left: marks behind it no longer hold."""
        for mark in list(self.marks):
            if (mark.read > read).any():
                self.marks.discard(mark)
        self.read = read.copy()


Tokens = Sequence[int] | np.ndarray
"""Of one text."""


@dataclass(frozen=True, eq=False)
class Mark:
    """A point of texts in progress to come back to; see `Engine.mark`."""

    state: Snapshot
    progress: Progress
    read: np.ndarray


def _check_mark(session: Session, mark: Mark) -> None:
    if mark not in session.marks:
        raise ConfigError("this mark is not of these texts, or lies behind an earlier rewind")


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
        name: str = "the model",
    ):
        """
        Args:
          model: its parameters are copied on a CPU (layer by layer); they lie where the mesh in
            force wants them, which has to be in force at every later call as well.
          max_length: rows of the cache for each text.
          batch: texts side by side.
          piece: prompt tokens read at once.
          sampling: None: greedy.
          policy: compresses the cache instead of refusing texts beyond `max_length`.
          name: of the model, for errors.

        Raises:
          ConfigError: a size below 1, or a cache that does not fit into the memory.
        """
        for size, value in (("max_length", max_length), ("batch", batch), ("piece", piece)):
            if value < 1:
                raise ConfigError(f"{size} is {value}: it must be at least 1")
        check_memory(model, batch, max_length, policy)
        self.batch, self.vocab_size = batch, model.config.vocab_size
        self.sampling = sampling or Sampling()
        unlimited = policy is not None or not model.config.num_attention_blocks
        self.max_length = None if unlimited else max_length
        self._piece, self._rows, self._policy = min(piece, max_length), max_length, policy
        self._name = name
        layered = unstack(model) if current_platform() == "cpu" else model
        self.params = get_params(layered)
        self._abstract = jax.eval_shape(lambda: layered)
        self._begin = jax.jit(self._nothing_read)
        self._read = jax.jit(self._read_piece, donate_argnums=(2, 3))
        self._step = jax.jit(self._next_token, donate_argnums=(1, 2))
        self._restart = jax.jit(
            self._begun_anew, donate_argnums=(0, 1), static_argnames="wipe", keep_unused=True
        )

    def start(self, prompts: Sequence[Tokens], seeds: Sequence[int] | None = None) -> Session:
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
          ConfigError: another number of seeds than of texts, or a seed outside 0 to 2^32 - 1.
        """
        seeds = range(self.batch) if seeds is None else seeds
        if len(seeds) != self.batch:
            raise ConfigError(f"{len(seeds)} seeds for an engine of batch {self.batch}")
        for seed in seeds:
            check_seed(seed)
        cache = self._abstract.init_cache(self.batch, self._rows, policy=self._policy)
        progress = self._begin(np.asarray(seeds, np.uint32))
        return Session(cache, progress, np.zeros(self.batch, np.int64))

    def feed(self, session: Session, texts: Sequence[Tokens]) -> None:
        """Reads further tokens of each text (an empty list: none), as `start` does the first."""
        checked = [self._checked(i, text, session) for i, text in enumerate(texts)]
        lengths = np.asarray([len(text) for text in checked], np.int32)
        begin = time.perf_counter()
        for chunk, valid in prefill_chunks(checked, self._piece):
            logits, session.cache = self._read(
                self.params, chunk, session.progress.logits, session.cache, valid
            )
            session.progress = session.progress._replace(logits=logits)
        session.progress.logits.block_until_ready()
        session.read += lengths
        session.speed.prompt_tokens += int(lengths.sum())
        session.speed.prompt_seconds += time.perf_counter() - begin

    @property
    def rewinds(self) -> bool:
        """Whether texts can be taken back to a mark: not where a policy drops rows."""
        return self._policy is None

    def mark(self, session: Session) -> Mark:
        """Where the texts are now.

        Raises:
          ConfigError: under a policy, which can't be undone.
        """
        if not self.rewinds:
            raise ConfigError("texts read under a cache policy can't be rewound: read them anew")
        # Reading on donates the originals.
        state, progress = jax.tree.map(jnp.copy, (snapshot(session.cache), session.progress))
        mark = Mark(state, progress, session.read.copy())
        session.marks.add(mark)
        return mark

    def rewind(self, session: Session, mark: Mark) -> None:
        """Takes back everything read and generated since the mark: penalties and seeds too.

        Raises:
          ConfigError: a mark of other texts, or one behind a point that the session was taken back
            to: what it stands for has been overwritten.
        """
        _check_mark(session, mark)
        state, progress = jax.tree.map(jnp.copy, (mark.state, mark.progress))
        session.cache, session.progress = rewind(session.cache, state), progress
        session.go_back(mark.read)

    def restart(
        self,
        session: Session,
        rows: np.ndarray,
        seeds: np.ndarray,
        mark: Mark | None = None,
        *,
        wipe: bool = False,
    ) -> None:
        """Ends some texts, and begins others in their place.

        Args:
          session: the texts.
          rows: bool [B], which are to end; the others stay as they are.
          seeds: uint32 [B], of the new ones.
          mark: where the new ones begin, with penalties of nothing; None: nothing has been read.
          wipe: also overwrites the keys and values that the ended texts leave behind, where their
            logits were not finite: out of reach, they would still spoil sums.

        Raises:
          ConfigError: a mark that does not hold (see `rewind`).
        """
        begin = None
        if mark is not None:
            _check_mark(session, mark)
            begin = mark.state, mark.progress.logits
        session.cache, session.progress = self._restart(
            session.cache, session.progress, begin, rows, seeds, wipe=wipe
        )
        session.go_back(np.where(rows, 0 if mark is None else mark.read, session.read))

    def next_tokens(self, session: Session, active: np.ndarray | None = None) -> np.ndarray:
        """Chooses the next token of each text and reads it.

        Args:
          session: the texts.
          active: bool [B], the texts that go on (None: all); the others stay as they are.

        Returns:
          int32 [B]: tokens; ENDED (-1) for texts that are not active, NOT_FINITE (-2) for those
          whose logits are NaN or infinite (nothing good comes of them any more).

        Raises:
          ConfigError: an active text that fills the cache.
        """
        active = np.ones(self.batch, bool) if active is None else np.asarray(active, bool)
        if self._full(session)[active].any():
            raise ConfigError(
                f"the text has {session.read[active].max()} tokens, all that the cache holds: make "
                "the engine with a larger max_length, or with a CachePolicy"
            )
        if not active.any():
            return np.full(self.batch, ENDED, np.int32)
        begin = time.perf_counter()
        token, session.progress, session.cache = self._step(
            self.params, session.progress, session.cache, active
        )
        token = np.asarray(token)
        session.read += token >= 0
        session.speed.tokens += int((token >= 0).sum())
        session.speed.seconds += time.perf_counter() - begin
        return token

    def _full(self, session: Session) -> np.ndarray:
        """Whether a text has as many tokens as it may have, bool [B]."""
        if self.max_length is None:
            return np.zeros(self.batch, bool)
        return session.read >= self.max_length

    def stream(
        self, session: Session, max_tokens: int, stop: Sequence[int] = (0,)
    ) -> Iterator[np.ndarray]:
        """Tokens of each text, int32 [B] at a time; ENDED (-1) where a text has ended.

        A text ends before a stop token, after `max_tokens`, or where it fills the cache, whatever
        the others do; the stream ends with the last of them.

        Raises:
          ConfigError: a stop token outside the vocabulary.
          NotFiniteError: texts whose logits were not finite, when all others have ended.
        """
        if bad := [t for t in stop if not 0 <= t < self.vocab_size]:
            raise ConfigError(f"stop token {bad[0]} is not in the vocabulary of {self.vocab_size}")
        active, failed = np.ones(self.batch, bool), np.zeros(self.batch, bool)
        for _ in range(max_tokens):
            active &= ~self._full(session)
            if not active.any():
                break
            token = self.next_tokens(session, active)
            failed |= token == NOT_FINITE
            active &= (token >= 0) & ~np.isin(token, np.asarray(stop, np.int32))
            if not active.any():
                break
            yield np.where(active, token, ENDED)
        for row in np.flatnonzero(failed):
            raise NotFiniteError(
                f"{self._name}: the logits of prompt {row} are not finite (NaN or infinity) after "
                f"{session.read[row]} tokens: its parameters are damaged, or numbers overflow in "
                "this compute dtype"
            )

    def _checked(self, index: int, tokens: Tokens, session: Session) -> np.ndarray:
        self.check_tokens(f"prompt {index}", tokens)
        self.check_length(f"prompt {index}", int(session.read[index]) + len(tokens))
        return np.asarray(tokens, np.int32)

    def check_tokens(self, name: str, tokens: Tokens) -> None:
        """Raises ConfigError for ids outside the vocabulary, in a text called `name`."""
        text = np.asarray(tokens, np.int64)
        outside = text[(text < 0) | (text >= self.vocab_size)]
        if outside.size:
            raise ConfigError(
                f"{name} has token {outside[0]}, outside the vocabulary of {self.vocab_size}: use "
                "the tokenizer that the model was trained with"
            )

    def check_length(self, name: str, tokens: int) -> None:
        """Raises ConfigError for more tokens than a text may have."""
        if self.max_length is not None and tokens > self.max_length:
            raise ConfigError(
                f"{name} makes {tokens} tokens, more than max_length {self.max_length}: raise "
                "max_length, or give a CachePolicy that drops old rows"
            )

    def _nothing_read(self, seeds: jax.Array) -> Progress:
        logits = jnp.zeros((self.batch, self.vocab_size), jnp.float32)
        counts = jnp.zeros_like(logits) if self.sampling.penalizes else None
        return Progress(logits, jax.vmap(jax.random.key)(seeds), counts).spread()

    def _begun_anew(self, cache: Cache, progress: Progress, begin, rows, seeds, *, wipe: bool):
        fresh = self._nothing_read(seeds)
        if begin is None:
            empty = self._abstract.init_cache(self.batch, self._rows, policy=self._policy)
            begin = snapshot(empty), fresh.logits
        state, logits = begin
        cache = rewind(cache, choose(rows, state, snapshot(cache)))
        if wipe:
            cache = wiped(cache, rows)
        new = fresh._replace(logits=logits)
        return spread(cache), _pick(rows, new, progress).spread()

    def _read_piece(self, params, part, logits, cache, valid):
        model = with_params(self._abstract, params)
        new, cache = model.prefill(part, cache, valid)
        logits = jnp.where((valid > 0)[:, None], new, logits)
        return constrain(logits, "batch", "vocab"), cache

    def decode(self, params: Params, token: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """`model.decode` under given parameters (`self.params`), to be jitted with the cache
        donated."""
        return with_params(self._abstract, params).decode(token, cache)

    def _next_token(self, params, progress: Progress, cache: Cache, active: jax.Array):
        split = jax.vmap(partial(jax.random.split, num=2))(progress.keys)
        token = sample(progress.logits, split[:, 1], self.sampling, progress.counts)
        counts = progress.counts
        if counts is not None:
            counts = count_token(counts, token, self.sampling)
        model = with_params(self._abstract, params)
        features, cache = model.read(token[:, None], cache, active.astype(jnp.int32))
        new = Progress(model.head(features[:, 0]), split[:, 0], counts)
        if self.batch > 1:  # a single text has no neighbour that goes on without it
            new = _pick(active, new, progress)
        return whole(jnp.where(active, token, ENDED)), new.spread(), cache
