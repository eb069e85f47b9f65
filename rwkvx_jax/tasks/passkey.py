"""Passkey texts: a number hidden in repeated filler, asked for at the end.

Training documents and evaluation prompts come from here, so that they can't drift apart. Two
protocols: `official_prompt` is the text of the RWKV-X repository, measured in characters;
`exact_prompt` has the same five lines with the filler cut at a given number of the model's own
tokens, or a piece of a book in its place. Keys are split by a hash into those seen in training and
those kept for evaluation; `OTHER_WORDING` and keys of other lengths are never trained on at all.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from rwkvx_jax.config import ConfigError
from rwkvx_jax.tasks.documents import Document, document_of
from rwkvx_jax.tokenizer import Tokenizer


class Wording(NamedTuple):
    """The fixed lines around a key; `line` has {key} in it."""

    task: str
    line: str
    question: str


TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
QUESTION = "What is the pass key? The pass key is"
OFFICIAL_WORDING = Wording(
    TASK, "The pass key is {key}. Remember it. {key} is the pass key.", QUESTION
)
OTHER_WORDING = Wording(
    "Somewhere in the following pages a secret code is written down. Look out for it and keep it "
    "in mind, you will need it at the end.",
    "Write this down: the secret code is {key}, and nothing but {key} opens the door.",
    "Which code opens the door? It is the secret code",
)
"""Lines that no training document has."""

OFFICIAL_TRIALS = 5
"""Trials of the repository's protocol; it uses the same five keys at every length and depth."""

_KEYS = (10_000, 100_000)  # five digits: every answer has the same length in bytes
_EVAL_SHARE = 10  # one key in so many is kept for evaluation
_RESERVED_TRIALS = 100  # official keys of these trials are never trained on


def key_line(key: int) -> str:
    """The line that hides the key."""
    return OFFICIAL_WORDING.line.format(key=key)


def official_prompt(key: int, characters: int, prefix_characters: int) -> str:
    """The repository's prompt: `characters` of filler, the key after the first
    `prefix_characters` of them; the filler starts anew behind the key."""
    if not 0 <= prefix_characters <= characters:
        raise ValueError(f"prefix_characters {prefix_characters} is not within 0..{characters}")
    filler = " ".join([FILLER] * (characters // len(FILLER) + 1))
    prefix, suffix = filler[:prefix_characters], filler[: characters - prefix_characters]
    return "\n".join([TASK, prefix, key_line(key), suffix, QUESTION])


def official_characters(length: int) -> int:
    """Filler characters which the repository takes for a length in World tokens."""
    return int(3.75 * length / 1000) * 1000


def official_key(trial: int) -> int:
    """The repository's key of a trial, whatever the length and depth."""
    return int(np.random.RandomState(trial).randint(1, 50_000))


def answer_tokens(tokenizer: Tokenizer, key: int) -> np.ndarray:
    """What a model has to continue a prompt with, int32 [A]."""
    return tokenizer.encode(f" {key}")


def exact_prompt(
    tokenizer: Tokenizer,
    key: int,
    length: int,
    depth: float,
    *,
    text: Callable[[int], np.ndarray] | None = None,
    wording: Wording = OFFICIAL_WORDING,
) -> np.ndarray:
    """A prompt of exactly `length` tokens, int32 [length].

    Args:
      tokenizer: the model's own.
      key: the hidden number.
      length: tokens of the prompt, the answer not counted.
      depth: place of the key, 0 (filler only behind it) to 1 (only before it).
      text: count -> so many tokens of running text to hide the key in; None: the repeated filler,
        which starts anew behind the key.
      wording: of the other lines.

    A length that can't hold all five lines drops the first one.

    Raises:
      ConfigError: a length that can't even hold the key line and the question.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth is {depth}: it must lie in [0, 1]")
    task, question = _fixed_lines(tokenizer, wording)
    hidden = tokenizer.encode(f"\n{wording.line.format(key=key)}\n")
    room = length - len(hidden) - len(question)
    if room < 0:
        raise ConfigError(
            f"a passkey prompt of {length} tokens is too short: key and question alone take "
            f"{length - room} tokens of the {tokenizer.name} tokenizer"
        )
    if room < len(task):
        task = task[:0]
    room -= len(task)
    before = round(depth * room)
    if text is None:
        filler = filler_tokens(tokenizer, room)
        prefix, suffix = filler[:before], filler[: room - before]
    else:
        prefix, suffix = np.split(text(room), [before])
    return np.concatenate([task, prefix, hidden, suffix, question])


def training_sample(
    tokenizer: Tokenizer,
    seq_len: int,
    rng: np.random.Generator,
    *,
    held_out: bool = False,
    text: Callable[[int, np.random.Generator], np.ndarray] | None = None,
) -> Document:
    """One document that fills a training window: prompt, answer, full stop, end of document.

    Args:
      tokenizer: the model's own.
      seq_len: tokens of a window, the last target not counted.
      rng: source of the key and its depth.
      held_out: take an evaluation key instead of a training key.
      text: (count, rng) -> so many tokens of running text to hide the key in; None: the repeated
        filler.

    Raises:
      ConfigError: a window that can't hold the key line, the question and the answer.
    """
    key = eval_key(rng) if held_out else train_key(rng)
    ending = np.append(tokenizer.encode("."), np.int32(tokenizer.end_of_document))
    answer = answer_tokens(tokenizer, key)
    piece = None if text is None else lambda count: text(count, rng)
    length, depth = seq_len + 1 - len(answer) - len(ending), rng.random()
    prompt = exact_prompt(tokenizer, key, length, depth, text=piece)
    return document_of([(prompt, False), (answer, True), (ending, False)], seq_len + 1)


def is_eval_key(key: int) -> bool:
    """Whether a key is kept for evaluation: one in ten by its hash, and the official ones."""
    digest = hashlib.sha256(f"passkey {key}".encode()).digest()
    return int.from_bytes(digest[:8]) % _EVAL_SHARE == 0 or key in _official_keys()


def train_key(rng: np.random.Generator) -> int:
    """A random five-digit key that is never used in evaluation."""
    while is_eval_key(key := int(rng.integers(*_KEYS))):
        pass
    return key


def eval_key(rng: np.random.Generator, digits: int = 5) -> int:
    """A random key of so many digits that is never trained on."""
    while not is_eval_key(key := int(rng.integers(10 ** (digits - 1), 10**digits))):
        pass
    return key


@functools.cache
def _official_keys() -> frozenset[int]:
    return frozenset(official_key(trial) for trial in range(_RESERVED_TRIALS))


def filler_tokens(tokenizer: Tokenizer, count: int) -> np.ndarray:
    """The first `count` tokens of the endlessly repeated filler, int32 [count]."""
    first, again = _filler_period(tokenizer)
    return np.concatenate([first, np.resize(again, max(0, count - len(first)))])[:count]


@functools.lru_cache(maxsize=8)
def _fixed_lines(tokenizer: Tokenizer, wording: Wording) -> tuple[np.ndarray, np.ndarray]:
    """The first line with its line break, and the last line after its own."""
    return tokenizer.encode(wording.task + "\n"), tokenizer.encode("\n" + wording.question)


@functools.lru_cache(maxsize=8)
def _filler_period(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    return tokenizer.encode(FILLER), tokenizer.encode(" " + FILLER)
