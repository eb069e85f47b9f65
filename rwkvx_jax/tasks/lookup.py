"""Facts in many wordings, scattered in text and asked for: retrieval that is no trick of wording.

A document states facts (tasks/phrases.py) as sentences or as lines of one notation, in filler or in
running text, and asks for some of them, before the text, behind it, or both. Facts that nobody asks
for are in the way: the same attribute of others, and another attribute of the same owner.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from rwkvx_jax.config import ConfigError
from rwkvx_jax.tasks.documents import Document, document_of
from rwkvx_jax.tasks.passkey import filler_tokens
from rwkvx_jax.tasks.phrases import PHRASES, Part, draw_owner, draw_value
from rwkvx_jax.tokenizer import Tokenizer

_LINES_SHARE = 0.4  # documents whose facts are lines of one notation
_FIRST_SHARE = 0.2  # documents that ask before the text already
SHORTEST = 192
"""Tokens of the shortest window: four in ten documents of one fact have room there, in bytes."""
_SAME_OWNER = 0.2  # facts about the owner of the one before, another attribute

Text = Callable[[int, np.random.Generator], np.ndarray]


class Fact(NamedTuple):
    """An attribute of an owner, and its value."""

    what: str
    who: str
    value: str


class Question(NamedTuple):
    """A prompt, and what answers it."""

    prompt: np.ndarray
    answer: str


def lookup_prompt(
    tokenizer: Tokenizer,
    length: int,
    depth: float,
    rng: np.random.Generator,
    *,
    facts: int,
    part: Part = "evaluation",
    text: Text | None = None,
) -> Question:
    """A question behind a text of exactly `length` tokens with it.

    Args:
      tokenizer: the model's own.
      length: tokens of the prompt, the answer not counted.
      depth: place of the asked fact among the tokens of filler, from 0 to 1; the others are
        anywhere.
      rng: source of everything random.
      facts: how many there are.
      part: whose phrases are used.
      text: (count, rng) -> so many tokens of running text; None: the repeated filler.

    Raises:
      ConfigError: a length that can't hold facts and question.
    """
    document = _Facts(tokenizer, facts, part, rng)
    asked = int(rng.integers(facts))
    question = document.question(asked)
    body = document.body(length - len(question), length, text, {asked: depth})
    return Question(np.concatenate([body, question]), document.facts[asked].value)


def lookup_sample(
    tokenizer: Tokenizer,
    seq_len: int,
    rng: np.random.Generator,
    *,
    pairs: int,
    questions: int = 1,
    held_out: bool = False,
    text: Text | None = None,
) -> Document:
    """One document that fills a training window.

    Args:
      tokenizer: the model's own.
      seq_len: tokens of a window, the last target not counted.
      rng: source of everything random.
      pairs: most facts; their number is drawn from 1 on, small ones as often as large, and halved
        until all fit. A single one that does not fit is drawn anew.
      questions: most questions, each about another fact.
      held_out: take the evaluation's phrases instead of those of training.
      text: (count, rng) -> so many tokens of running text; None: the repeated filler.

    Raises:
      ConfigError: a window below SHORTEST.
    """
    part: Part = "evaluation" if held_out else "training"
    if seq_len < SHORTEST:
        raise ConfigError(
            f"a window of {seq_len} tokens is too short for facts and questions: lookup documents "
            f"need {SHORTEST}; lengthen the stage, or leave the source out of it"
        )
    count = int(round(pairs ** rng.random()))
    while True:
        try:
            return _sample(tokenizer, seq_len, rng, count, questions, part, text)
        except _TooLong:
            count = max(1, count // 2)


class _TooLong(ConfigError):
    """Facts and questions that a document has no room for."""


def _sample(tokenizer, seq_len, rng, count, questions, part, text) -> Document:
    document = _Facts(tokenizer, count, part, rng)
    asked = rng.permutation(count)[: int(rng.integers(1, min(questions, count) + 1))]
    first = rng.random() < _FIRST_SHARE
    line_break = tokenizer.encode("\n")
    before = [document.question(int(asked[0]), cue=False), line_break] if first else []
    parts: list[tuple[np.ndarray, bool]] = []
    for i in asked:
        parts += [(document.question(int(i)), False), (document.answer(int(i)), True)]
        parts.append((tokenizer.encode("."), False))
    parts.append((np.asarray([tokenizer.end_of_document], np.int32), False))
    room = seq_len + 1 - sum(len(p) for p, _ in parts) - sum(map(len, before))
    body = document.body(room, seq_len, text)
    return document_of([*[(q, False) for q in before], (body, False), *parts], seq_len + 1)


class _Facts:
    """Facts, and the tokens that state them and ask for them."""

    def __init__(self, tokenizer: Tokenizer, count: int, part: Part, rng: np.random.Generator):
        self._tokenizer, self._phrases, self._rng = tokenizer, PHRASES[part], rng
        lines = rng.random() < _LINES_SHARE
        self._line = str(rng.choice(self._phrases.lines)) if lines else None
        self.facts: list[Fact] = []
        known: set[tuple[str, str]] = set()
        what = str(rng.choice(self._phrases.attributes))
        while len(self.facts) < count:
            again = self.facts and not lines and rng.random() < _SAME_OWNER
            who = self.facts[-1].who if again else draw_owner(part, rng)
            own = str(rng.choice(self._phrases.attributes)) if again else what
            if (own, who) not in known:
                known.add((own, who))
                self.facts.append(Fact(own, who, draw_value(part, rng)))

    def statement(self, fact: Fact) -> np.ndarray:
        """Tokens of a line or a sentence with line breaks around it."""
        fill = fact._asdict()
        if self._line is not None:
            return self._tokenizer.encode(f"\n{self._line.format(**fill)}\n")
        draw = lambda phrases: str(self._rng.choice(phrases))
        opening, closing = draw(self._phrases.openings), draw(self._phrases.closings)
        core = draw(self._phrases.statements).format(**fill)
        if not opening or opening.rstrip()[-1] in ".!":
            core = core[0].upper() + core[1:]
        return self._tokenizer.encode(f"\n{opening}{core}.{closing}\n")

    def question(self, asked: int, cue: bool = True) -> np.ndarray:
        """Tokens of a question; with its cue up to where the value follows."""
        texts = self._phrases.questions
        question, answer = texts[int(self._rng.integers(len(texts)))]
        fill = self.facts[asked]._asdict()
        text = f"\n{question.format(**fill)}{answer.format(**fill) if cue else ''}"
        return self._tokenizer.encode(text[0] + text[1].upper() + text[2:])

    def answer(self, asked: int) -> np.ndarray:
        """Tokens of a value."""
        return self._tokenizer.encode(f" {self.facts[asked].value}")

    def body(
        self,
        length: int,
        whole: int,
        text: Text | None,
        depths: dict[int, float] | None = None,
    ) -> np.ndarray:
        """Task line and all facts in filler or text, int32 [length].

        Args:
          length: tokens.
          whole: length of the document, for the error.
          text: see `lookup_sample`.
          depths: places of some facts in the text, from 0 to 1; the others are anywhere.
        """
        task = self._tokenizer.encode(str(self._rng.choice(self._phrases.tasks)))
        stated = [self.statement(fact) for fact in self.facts]
        room = length - len(task) - sum(map(len, stated))
        if room < 0:
            raise _TooLong(
                f"a lookup document of {whole} tokens is too short for {len(stated)} facts: they "
                f"and the questions take {whole - room} tokens of the {self._tokenizer.name} "
                "tokenizer; use fewer pairs or a longer document"
            )
        places = self._rng.integers(0, room + 1, len(stated))
        for fact, depth in (depths or {}).items():
            places[fact] = round(depth * room)
        order = np.argsort(places, kind="stable")
        between = filler_tokens(self._tokenizer, room) if text is None else text(room, self._rng)
        filler = np.split(between, places[order])
        parts = [p for cut, i in zip(filler, order, strict=False) for p in (cut, stated[i])]
        return np.concatenate([task, *parts, filler[-1]]).astype(np.int32)
