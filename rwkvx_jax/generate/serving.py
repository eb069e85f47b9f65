"""Answers any number of requests with an engine of a few rows: continuous batching.

A text that ends makes room for the next request at once, whatever its neighbours do. What requests
begin with together is read once, by all rows. A request gets what it would get alone; one that
can't be answered says why, and the others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from rwkvx_jax.config import ConfigError
from rwkvx_jax.generate.engine import Engine, Mark, Session, Tokens
from rwkvx_jax.generate.sampling import NOT_FINITE, check_seed


@dataclass(frozen=True)
class Request:
    """A text to be continued.

    Attributes:
      prompt: token ids behind the common prefix; at least one.
      max_tokens: most tokens of the answer.
      stop: tokens before which it ends.
      seed: of what is drawn.
    """

    prompt: Tokens
    max_tokens: int
    stop: Sequence[int] = (0,)
    seed: int = 0


class Answer(NamedTuple):
    """What became of a request.

    Attributes:
      number: of the request, from 0 in the order they came.
      tokens: int32, without the stop token.
      problem: why it could not be answered, or only so far; "" where all went well.
    """

    number: int
    tokens: np.ndarray
    problem: str = ""


@dataclass
class _Text:
    number: int
    request: Request
    tokens: list[int] = field(default_factory=list)
    problem: str = ""
    room: int = 0  # most tokens

    def answer(self) -> Answer:
        return Answer(self.number, np.asarray(self.tokens, np.int32), self.problem)


def serve(
    engine: Engine,
    requests: Iterable[Request],
    *,
    prefix: Tokens = (),
    ended: Callable[[int, Sequence[int]], bool] = lambda number, tokens: False,
) -> Iterator[Answer]:
    """Answers of all requests, each as soon as it is whole.

    Args:
      engine: its `batch` rows are shared out.
      requests: taken one by one, as rows become free.
      prefix: what all of them begin with; under a cache policy every row reads it anew.
      ended: asked with the number of a request and its answer so far, after each token, whether it
        needs no further one; so a request is cancelled, too.

    Raises:
      ConfigError: a prefix that does not fit, or has tokens outside the vocabulary.
    """
    rows = _Rows(engine, prefix)
    waiting = enumerate(requests)
    while True:
        yield from rows.fill(waiting)
        if not any(rows.texts):
            return
        yield from rows.step(ended)


class _Rows:
    """The rows of an engine and what they work at."""

    def __init__(self, engine: Engine, prefix: Tokens):
        self._engine, self._prefix = engine, np.asarray(prefix, np.int32)
        self._session: Session = engine.open()
        self._mark: Mark | None = None
        self.texts: list[_Text | None] = [None] * engine.batch
        self._spoilt = np.zeros(engine.batch, bool)  # rows with keys that are not finite
        if len(self._prefix) and engine.rewinds:
            engine.feed(self._session, [self._prefix] * engine.batch)
            self._mark = engine.mark(self._session)

    def fill(self, waiting: Iterator[tuple[int, Request]]) -> Iterator[Answer]:
        """Gives free rows to requests, and reads these; answers of those that can't be read."""
        new = np.zeros(self._engine.batch, bool)
        for row in np.flatnonzero([text is None for text in self.texts]):
            for number, request in waiting:
                text = _Text(number, request)
                text.problem, text.room = self._room(request)
                if text.room:
                    self.texts[row], new[row] = text, True
                    break
                yield text.answer()
        if not new.any():
            return
        seeds = np.asarray([text.request.seed if text else 0 for text in self.texts], np.uint32)
        wipe = bool((new & self._spoilt).any())
        self._engine.restart(self._session, new, seeds, self._mark, wipe=wipe)
        self._spoilt &= ~new
        prompts = [text.request.prompt if text else () for text in self.texts]
        read = [prompt if fresh else () for prompt, fresh in zip(prompts, new, strict=True)]
        if self._mark is None and len(self._prefix):
            read = [[*self._prefix, *prompt] if len(prompt) else prompt for prompt in read]
        self._engine.feed(self._session, read)

    def step(self, ended: Callable[[int, Sequence[int]], bool]) -> Iterator[Answer]:
        """One more token of each text; answers of those that are whole then."""
        active = np.asarray([text is not None for text in self.texts])
        for row, token in enumerate(self._engine.next_tokens(self._session, active)):
            text = self.texts[row]
            if text is None:
                continue
            done = token == NOT_FINITE or token in text.request.stop
            if token == NOT_FINITE:
                text.problem = "its logits are not finite (NaN or infinity)"
                self._spoilt[row] = True
            elif not done:
                text.tokens.append(int(token))
                done = len(text.tokens) == text.room or ended(text.number, text.tokens)
            if done:
                self.texts[row] = None
                yield text.answer()

    def _room(self, request: Request) -> tuple[str, int]:
        """Why a request can't be read ("" if it can), and how many tokens its answer may have."""
        name, tokens = "the prompt", len(self._prefix) + len(request.prompt)
        try:
            if not len(request.prompt):
                raise ConfigError("the prompt is empty: give it at least one token")
            if request.max_tokens < 0:
                raise ConfigError(f"max_tokens is {request.max_tokens}: ask for 0 tokens or more")
            check_seed(request.seed)
            self._engine.check_tokens(name, request.prompt)
            self._engine.check_length(name, tokens)
        except ConfigError as error:
            return str(error), 0
        room = self._engine.max_length
        return "", request.max_tokens if room is None else min(request.max_tokens, room - tokens)
