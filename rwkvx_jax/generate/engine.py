"""Answers any number of requests with the few rows of one model: continuous batching.

A text that ends makes room for the next request at once, whatever its neighbours do. What requests
begin with together is held: read once, and kept between calls and, by `save`, between runs. What a
request gets does not depend on its neighbours; one that can't be answered says why, and the others
go on. Where a mesh is in force, texts, states and pages lie over it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from rwkvx_jax.cache import CachePolicy
from rwkvx_jax.config import ConfigError
from rwkvx_jax.generate.memory import check_memory
from rwkvx_jax.generate.prefix_file import Identity, identity_of, read_prefix, write_prefix
from rwkvx_jax.generate.programs import Held
from rwkvx_jax.generate.requests import Answer, Request, Tokens, TokenScores
from rwkvx_jax.generate.rows import Rows, Speed
from rwkvx_jax.generate.sampling import NOT_FINITE, Sampling, check_seed
from rwkvx_jax.model import RWKVX

_log = logging.getLogger(__name__)

Ended = Callable[[int, Sequence[int]], bool]
"""(number of a request, its answer so far) -> whether it needs no further token."""


class Token(NamedTuple):
    """A token of an answer, as it comes.

    Attributes:
      number: of the request.
      token: None: the answer is whole.
      answer: then this is it.
    """

    number: int
    token: int | None
    answer: Answer | None = None


@dataclass
class _Text:
    number: int
    request: Request
    room: int  # most tokens of its answer
    tokens: list[int] = field(default_factory=list)

    def ended(
        self, problem: str = "", not_finite: bool = False, scores: TokenScores | None = None
    ) -> Token:
        tokens = np.asarray(self.tokens, np.int32)
        return Token(self.number, None, Answer(self.number, tokens, problem, not_finite, scores))


class Engine:
    """Continues and scores texts with one model.

    Attributes:
      batch: rows.
      max_length: tokens, prompt and answer together, that a text may have (None: no limit, under a
        policy or without attention blocks).
      rows: what is on the device.
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
          piece: most prompt tokens of a text read at once.
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
        compressed = policy is not None and policy.trigger < max_length  # else it never is
        unlimited = compressed or not model.config.num_attention_blocks
        self.max_length = None if unlimited else max_length
        self._policy, self._name = policy, name
        self.rows = Rows(
            model, batch, max_length, min(piece, max_length), sampling or Sampling(), policy
        )
        self._texts: list[_Text | None] = [None] * batch
        self._busy = self._more = False
        self._prefix = np.zeros(0, np.int32)
        self._held: Held | None = None
        self._has = np.ones(batch, bool)  # rows with the keys and values of what is held
        self._spoilt = np.zeros(batch, bool)  # rows that may hold keys that are not finite

    @property
    def speed(self) -> Speed:
        """Tokens and seconds so far."""
        return self.rows.speed

    def hold(self, prefix: Tokens, advance: Callable[[int], None] = lambda count: None) -> None:
        """Reads what all further requests begin with; their prompts are what follows it.

        Only what goes beyond the prefix held so far is read, where the new one begins with that.

        Args:
          prefix: token ids; none: requests begin at nothing.
          advance: told how many tokens have been read, as they are.

        Raises:
          ConfigError: tokens outside the vocabulary, more than `max_length`, or requests that are
            still being answered.
        """
        self._check_idle()
        self._check_tokens("the prefix", prefix)
        text = np.asarray(prefix, np.int32)
        self._check_length("the prefix", len(text))
        self._renew()
        known = 0 if self._held is None else len(self._prefix)
        if not np.array_equal(text[:known], self._prefix[:known]):
            known = 0
        if known == len(text) == len(self._prefix):
            return
        every = np.ones(self.batch, bool) if self.rows.together else np.arange(self.batch) == 0
        try:
            self._begin(every, np.zeros(self.batch, np.uint32), known)
            self.rows.read({int(row): text[known:] for row in np.flatnonzero(every)}, advance)
            held = self.rows.keep(0)
        except BaseException:
            self._take(text[:0], None, every)
            raise
        self._take(text, held, every)

    def _take(self, prefix: np.ndarray, held: Held | None, has: np.ndarray) -> None:
        """Begins requests at this from now on."""
        self._prefix, self._held = prefix, held if len(prefix) else None
        self._has = has if len(prefix) and self._policy is None else np.ones(self.batch, bool)

    def save(self, path: str | os.PathLike) -> None:
        """Writes what is held to a file, from which engines with this model can `load` it.

        Raises:
          ConfigError: nothing is held, requests are still being answered, several processes, or
            the file can't be written.
        """
        self._check_idle()
        self._recover()
        if self._held is None:
            raise ConfigError("no prefix is held: give one with hold(prefix) before save")
        self._check_alone()
        held = self.rows.with_pages(self._held, int(np.argmax(self._has)))
        write_prefix(Path(path), self._prefix, held, self.rows.config, self._identity())

    def load(self, path: str | os.PathLike) -> None:
        """Holds the prefix that an engine with the same model and policy has saved; `max_length`,
        `batch`, sampling and mesh may differ.

        Raises:
          ConfigError: another model or policy, a damaged file, a prefix longer than `max_length`,
            or as `save` raises it.
        """
        self._check_idle()
        self._check_alone()
        tokens, held = read_prefix(Path(path), self.rows.programs.empty(1), self._identity())
        self._check_length(f"the prefix in {path}", len(tokens))
        self._renew()
        every = np.ones(self.batch, bool)
        self._take(tokens, self.rows.place(held), every)

    @property
    def prefix(self) -> np.ndarray:
        """What is held, int32 [T]."""
        return self._prefix

    def _renew(self) -> None:
        """Makes the rows anew where a call has failed that had been given their arrays: what is
        held is lost then, but for its tokens."""
        if self.rows.broken(self._held):
            _log.warning("%s: a call failed, and its rows are made anew", self._name)
            self.rows.renew()
            self._held, self._has = None, np.ones(self.batch, bool)
            self._spoilt = np.zeros(self.batch, bool)

    def _recover(self) -> None:
        """As `_renew`, and reads what was held again."""
        self._renew()
        if self._held is None and len(self._prefix):
            prefix = self._prefix
            try:
                self.hold(prefix)
            finally:  # should it fail, the next call tries again
                self._prefix = prefix

    def _identity(self) -> Identity:
        return identity_of(self.rows.programs.abstract, self.rows.params, self._policy)

    def _check_alone(self) -> None:
        if jax.process_count() > 1:
            raise ConfigError(
                f"{jax.process_count()} processes share this engine: a prefix is saved and loaded "
                "by one process only; hold it by its tokens"
            )

    def answer(
        self,
        requests: Iterable[Request],
        *,
        ended: Ended = lambda number, tokens: False,
        advance: Callable[[int], None] = lambda count: None,
    ) -> Generator[Answer, None, None]:
        """Answers of all requests, each as soon as it is whole; see `stream`."""
        with closing(self.stream(requests, ended=ended, advance=advance)) as events:
            for event in events:
                if event.answer is not None:
                    yield event.answer

    def stream(
        self,
        requests: Iterable[Request],
        *,
        ended: Ended = lambda number, tokens: False,
        advance: Callable[[int], None] = lambda count: None,
    ) -> Generator[Token, None, None]:
        """Tokens of all requests, as they come.

        An answer ends before a stop token, after `max_tokens`, or where its text fills the cache.
        Where an earlier call failed and took the cache with it, a new one is made, and the prefix
        is read again.

        Args:
          requests: taken one by one, as rows become free.
          ended: asked after each token; so a request is cancelled, too.
          advance: told how many prompt tokens have been read, as they are.

        Raises:
          ConfigError: requests of another call are still being answered.
        """
        self._check_idle()
        self._recover()
        waiting, self._busy = enumerate(requests), True
        try:
            while True:
                yield from self._fill(waiting, advance)
                if any(self._texts):
                    yield from self._step(ended)
                elif not self._more:
                    return
        finally:
            self._spoilt |= [text is not None and text.request.score for text in self._texts]
            self._texts, self._busy = [None] * self.batch, False

    def _fill(
        self, waiting: Iterator[tuple[int, Request]], advance: Callable[[int], None]
    ) -> Iterator[Token]:
        """Gives free rows to requests, and reads these; ends those that are whole then."""
        fresh: dict[int, _Text] = {}
        self._more = True
        for row in [row for row, text in enumerate(self._texts) if text is None]:
            for number, request in waiting:
                problem, room = self._room(request)
                text = _Text(number, request, room)
                if not problem and (room or request.score):
                    self._texts[row] = fresh[row] = text
                    break
                yield text.ended(problem)
            else:
                self._more = False
                break
        if not fresh:
            return
        seeds = np.zeros(self.batch, np.uint32)
        seeds[[*fresh]] = [text.request.seed for text in fresh.values()]
        self._begin(np.isin(np.arange(self.batch), [*fresh]), seeds, len(self._prefix))
        prompts = {row: np.asarray(text.request.prompt, np.int32) for row, text in fresh.items()}
        scored = {row: p for row, p in prompts.items() if fresh[row].request.score}
        self.rows.read({row: p for row, p in prompts.items() if row not in scored}, advance)
        found = self.rows.score(scored, advance)
        for row, scores in found.items():  # before the first yield, from which none may come back
            self._spoilt[row] |= not np.isfinite(scores.losses).all()
            self._texts[row] = None
        for row, scores in found.items():
            yield fresh[row].ended(scores=scores)

    def _step(self, ended: Ended) -> Iterator[Token]:
        """One more token of each text; ends those that are whole then."""
        active = np.asarray([text is not None for text in self._texts])
        for row, token in enumerate(map(int, self.rows.next_tokens(active))):
            text = self._texts[row]
            if text is None:
                continue
            if token == NOT_FINITE:
                self._texts[row] = None
                yield text.ended(self._not_finite(text, row), not_finite=True)
                continue
            done = token in text.request.stop
            if not done:
                text.tokens.append(token)
                yield Token(text.number, token)
                done = ended(text.number, text.tokens) or len(text.tokens) == text.room
            if done:
                self._texts[row] = None
                yield text.ended()

    def _begin(self, new: np.ndarray, seeds: np.ndarray, length: int) -> None:
        """Begins new texts at so many tokens of the prefix: at all of them, or at none."""
        if length:
            for row in np.flatnonzero(new & ~self._has):
                self.rows.copy(int(np.argmax(self._has)), int(row))
                self._has[row] = True
        held = self._held if length else None
        wipe = bool((new & (self._spoilt | self.rows.not_finite())).any())
        self.rows.restart(new, seeds, held, length, wipe=wipe)
        self._spoilt &= ~new

    def _not_finite(self, text: _Text, row: int) -> str:
        return (
            f"{self._name}: the logits of prompt {text.number} are not finite (NaN or infinity) "
            f"after {self.rows.lengths[row]} tokens: its parameters are damaged, or numbers "
            "overflow in this compute dtype"
        )

    def _room(self, request: Request) -> tuple[str, int]:
        """Why a request can't be read ("" if it can), and how many tokens its answer may have."""
        name, tokens = "the prompt", len(self._prefix) + len(request.prompt)
        try:
            if not len(request.prompt):
                raise ConfigError("the prompt is empty: give it at least one token")
            if request.max_tokens < 0:
                raise ConfigError(f"max_tokens is {request.max_tokens}: ask for 0 tokens or more")
            if request.score and (request.max_tokens or len(request.prompt) < 2):
                raise ConfigError(
                    f"max_tokens is {request.max_tokens} and the prompt has {len(request.prompt)} "
                    "tokens: to be scored, it needs two or more, and max_tokens 0"
                )
            if request.score and self._policy is not None:
                raise ConfigError("under a cache policy nothing is scored: make an engine without")
            check_seed(request.seed)
            self._check_tokens(name, request.prompt)
            self._check_tokens("its stop list", request.stop)
            self._check_length(name, tokens - request.score)
        except ConfigError as error:
            return str(error), 0
        room = self.max_length
        return "", request.max_tokens if room is None else min(request.max_tokens, room - tokens)

    def _check_idle(self) -> None:
        if self._busy:
            raise ConfigError(
                "this engine still answers requests: take all answers, or close their iterator"
            )

    def _check_tokens(self, name: str, tokens: Tokens) -> None:
        """Raises ConfigError for ids outside the vocabulary, in a text called `name`."""
        text = np.asarray(tokens, np.int64)
        outside = text[(text < 0) | (text >= self.vocab_size)]
        if outside.size:
            raise ConfigError(
                f"{name} has token {outside[0]}, outside the vocabulary of {self.vocab_size}: use "
                "the tokenizer that the model was trained with"
            )

    def _check_length(self, name: str, tokens: int) -> None:
        """Raises ConfigError for more tokens than a text may have."""
        if self.max_length is not None and tokens > self.max_length:
            raise ConfigError(
                f"{name} makes {tokens} tokens, more than max_length {self.max_length}: raise "
                "max_length, or give a CachePolicy that drops old rows"
            )
