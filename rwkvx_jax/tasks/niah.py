"""Needles in a haystack and variable tracking, as RULER defines them (arXiv 2404.06654).

A prompt is as long as fits: its haystack grows unit by unit (a filler line, a word of text, a
distracting needle) while the tokens of the whole prompt and those reserved for the answer do not
exceed the length. Differences from RULER: the needle that is asked for lies at a given depth and
not at a random one, its haystack grows by single units, and names come from our own word lists.

Variable tracking is that of RULER's repository as of 2026-07-22 (c3f5e3b), blank by blank: words,
separators, places, the solved example, and the blank at the end of the prompt. lm_eval 0.4.13 has
an older version: "assgined", noise joined by blanks, an example of other length, no last blank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from rwkvx_jax.config import ConfigError
from rwkvx_jax.tasks.haystack import TextFolder, sentences
from rwkvx_jax.tasks.passkey import FILLER
from rwkvx_jax.tasks.words import Kind, draw, draw_distinct
from rwkvx_jax.tokenizer import Tokenizer

NIAH_RESERVED = 128
"""Tokens that RULER keeps free for the answer to a needle question."""
TRACKING_RESERVED = 30
"""Tokens that RULER keeps free for the answer to variable tracking."""

_TASK = (
    "A special magic {what} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {what} afterwards."
)
_QUESTION = (
    "What is the special magic {what} for {key} mentioned in the provided text? "
    "The special magic {what} for {key} mentioned in the provided text is"
)
_NEEDLE = "One of the special magic {what}s for {key} is: {value}."

_TRACKING = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\nQuestion: Find all variables that are assigned the value {value} in the text above."
)
_TRACKING_ANSWER = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} "
    "variables are assigned the value {value}, they are: "
)
_VARIABLES = 5  # of a chain: four hops
_EXAMPLE_TOKENS = 500  # at most, without its answer
_EXAMPLE_LETTERS, _LETTERS = 3, 5


@dataclass(frozen=True)
class Needles:
    """A needle task.

    haystack: "repeat" (RULER's noise lines), "text" (a folder of texts, where RULER has essays) or
    "needle" (nothing but needles). keys, values: what is drawn for them. count: needles with keys
    of their own, beside those of a "needle" haystack; one is asked for.
    """

    haystack: Literal["repeat", "text", "needle"]
    keys: Kind
    values: Kind
    count: int = 1


NEEDLE_TASKS = {
    "single_1": Needles("repeat", "words", "numbers"),
    "single_2": Needles("text", "words", "numbers"),
    "single_3": Needles("text", "words", "uuids"),
    "multikey_1": Needles("text", "words", "numbers", count=4),
    "multikey_2": Needles("needle", "words", "numbers"),
    "multikey_3": Needles("needle", "uuids", "uuids"),
}
"""RULER's names and settings."""


class Question(NamedTuple):
    """A prompt and what its answer has to contain."""

    prompt: np.ndarray  # int32 [N]
    answers: tuple[str, ...]


def needle_question(
    task: Needles,
    tokenizer: Tokenizer,
    length: int,
    depth: float,
    rng: np.random.Generator,
    text: TextFolder | None = None,
) -> Question:
    """A needle question whose prompt leaves `NIAH_RESERVED` of `length` tokens free.

    Args:
      task: one of `NEEDLE_TASKS`.
      tokenizer: the model's own.
      length: tokens of prompt and answer.
      depth: place of the asked needle among the units of the haystack, 0 (before all) to 1.
      rng: source of names, and of the other needles' places.
      text: the haystack, for tasks of kind "text".

    Raises:
      ConfigError: a length that can't hold the needles and the question.
    """
    keys = draw_distinct(task.keys, task.count, rng)
    values = [draw(task.values, rng) for _ in keys]
    places = np.concatenate([[depth], rng.random(task.count - 1)])
    what = task.values.removesuffix("s")
    needle = lambda key, value: _NEEDLE.format(what=what, key=key, value=value)
    needles = [needle(key, value) for key, value in zip(keys, values, strict=True)]
    seed = rng.integers(2**63)

    def build(units: int) -> str:
        if task.haystack == "text":
            parts, separator = sentences(text.text(units)), " "
        elif task.haystack == "repeat":
            parts, separator = [FILLER] * units, "\n"
        else:
            distractors = np.random.default_rng(seed)
            parts, separator = [], "\n"
            while len(parts) < units:
                if (key := draw(task.keys, distractors)) != keys[0]:
                    parts.append(needle(key, draw(task.values, distractors)))
        context = separator.join(_insert(parts, needles, places))
        question = _QUESTION.format(what=what, key=keys[0])
        return "\n".join([_TASK.format(what=what), context, question])

    prompt = _longest(build, tokenizer, length, NIAH_RESERVED, "a needle prompt")
    return Question(prompt, (values[0],))


def tracking_question(tokenizer: Tokenizer, length: int, rng: np.random.Generator) -> Question:
    """Variable tracking: one chain of five assignments in noise, after one solved example.

    The answers are the five variables that hold the asked value.

    Args:
      tokenizer: the model's own.
      length: tokens of prompt and answer.
      rng: source of names, values and places.

    Raises:
      ConfigError: a length that can't hold example, chain and question.
    """
    example, least = _Chain(_EXAMPLE_LETTERS, rng), _VARIABLES
    units = _most_units(example.text, tokenizer, _EXAMPLE_TOKENS, least) or least
    solved = f"{example.text(units)} {' '.join(example.variables)}\n\n"
    chain = _Chain(_LETTERS, rng)
    build = lambda units: solved + chain.text(units)
    what = "a variable-tracking prompt"
    prompt = _longest(build, tokenizer, length, TRACKING_RESERVED, what, least)
    return Question(prompt, tuple(chain.variables))


class _Chain:
    """VAR A = 12345, VAR B = VAR A, ... in order, each before another one of the noise lines."""

    def __init__(self, letters: int, rng: np.random.Generator):
        alphabet = list("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
        names: dict[str, None] = {}
        while len(names) < _VARIABLES:
            names["".join(rng.choice(alphabet, letters))] = None
        self.variables = list(names)
        self.value = int(rng.integers(10_000, 99_999))
        self._seed = rng.integers(2**63)

    def text(self, units: int) -> str:
        """Task, context with so many noise lines, question, beginning of the answer."""
        first, *others = self.variables
        chain = [f"VAR {first} = {self.value}"]
        chain += [f"VAR {b} = VAR {a} " for a, b in zip(self.variables, others, strict=False)]
        places = np.random.default_rng(self._seed).choice(units, len(chain), replace=False)
        lines = [FILLER] * units
        for place, line in reversed(list(zip(np.sort(places), chain, strict=True))):
            lines.insert(place, line)
        context = "\n".join(lines)
        ending = _TRACKING_ANSWER.format(count=len(self.variables), value=self.value)
        return _TRACKING.format(context=context, value=self.value) + ending


def score(answer: str, expected: tuple[str, ...]) -> float:
    """RULER's measure: the share of the expected strings that the answer holds, upper or lower
    case."""
    answer = answer.lower()
    return sum(text.lower() in answer for text in expected) / len(expected)


def _insert(parts: list[str], needles: list[str], places: np.ndarray) -> list[str]:
    """Parts with needle i before part number places[i] * len(parts); equal ones in their order."""
    result, taken = [], 0
    for i in np.argsort(places, kind="stable"):
        until = int(round(places[i] * len(parts)))
        result += [*parts[taken:until], needles[i]]
        taken = until
    return [*result, *parts[taken:]]


def _longest(
    build: Callable[[int], str],
    tokenizer: Tokenizer,
    length: int,
    reserved: int,
    what: str,
    least: int = 0,
) -> np.ndarray:
    """Tokens of the longest text that leaves `reserved` of `length` tokens free."""
    units = _most_units(build, tokenizer, length - reserved, least)
    if units is None:
        shortest = len(tokenizer.encode(build(least))) + reserved
        raise ConfigError(
            f"{what} of {length} tokens is too short: with the least haystack it takes {shortest} "
            f"tokens of the {tokenizer.name} tokenizer, {reserved} of them for the answer"
        )
    return tokenizer.encode(build(units))


def _most_units(
    build: Callable[[int], str], tokenizer: Tokenizer, room: int, least: int
) -> int | None:
    """The largest n >= least for which build(n) has at most `room` tokens; None if there is none.

    Lengths are nearly linear in n: guesses along the secant, a little to either side in turn, find
    it in a few steps.
    """
    count = lambda n: len(tokenizer.encode(build(n)))
    low, high = (least, count(least)), (least + 8, count(least + 8))
    if low[1] > room:
        return None
    while high[1] <= room:
        rate = max((high[1] - low[1]) / (high[0] - low[0]), 1e-3)
        units = high[0] + int(1.02 * (room - high[1]) / rate) + 1
        low, high = high, (units, count(units))
    above = False
    while high[0] - low[0] > 1:
        share = (room - low[1]) / (high[1] - low[1])
        margin = max(1, (high[0] - low[0]) // 64)
        guess = low[0] + int(share * (high[0] - low[0])) + (margin if above else -margin)
        guess = min(max(guess, low[0] + 1), high[0] - 1)
        if above := (tokens := count(guess)) <= room:
            low = guess, tokens
        else:
            high = guess, tokens
    return low[0]
