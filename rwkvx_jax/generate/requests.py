"""What an engine is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rwkvx_jax.config import ConfigError

Tokens = Sequence[int] | np.ndarray
"""Of one text."""


class NotFiniteError(ConfigError):
    """A model gave logits that are not finite, from which no token can be chosen."""


@dataclass(frozen=True)
class Request:
    """A text to be continued, or scored.

    Attributes:
      prompt: token ids behind the prefix that the engine holds; at least one.
      max_tokens: most tokens of the answer.
      stop: tokens before which it ends.
      seed: of what is drawn.
      score: how well the prompt itself is predicted is wanted too.
    """

    prompt: Tokens
    max_tokens: int
    stop: Sequence[int] = (0,)
    seed: int = 0
    score: bool = False


class TokenScores(NamedTuple):
    """How a text's predictions went, one after the other.

    Attributes:
      losses: float32 [T], nats.
      hits: bool [T], whether the token was the most likely one.
    """

    losses: np.ndarray
    hits: np.ndarray


class Answer(NamedTuple):
    """What became of a request.

    Attributes:
      number: of the request, from 0 in the order they came.
      tokens: int32, without the stop token.
      problem: why it could not be answered, or only so far; "" where all went well.
      not_finite: whether the problem is that logits were NaN or infinite.
      scores: of predicting prompt[1:], where they were asked for.
    """

    number: int
    tokens: np.ndarray
    problem: str = ""
    not_finite: bool = False
    scores: TokenScores | None = None

    def check(self) -> None:
        """Raises what kept the request from its answer.

        Raises:
          NotFiniteError: logits that are not finite.
          ConfigError: a request that can't be answered.
        """
        if self.problem:
            raise (NotFiniteError if self.not_finite else ConfigError)(self.problem)
