"""Key-value recall: lines "name: number" scattered in filler or a book, some asked for at the end;
and, to learn it from, documents full of such lines that are stated again and again.

With more pairs than a recurrent state holds, only attention can answer. Names are drawn anew for
every document; numbers are the passkeys, split into those seen in training and those kept for
evaluation.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rwkvx_jax.config import ConfigError
from rwkvx_jax.tasks.documents import Document, document_of
from rwkvx_jax.tasks.passkey import answer_tokens, eval_key, filler_tokens, train_key
from rwkvx_jax.tasks.words import draw_names
from rwkvx_jax.tokenizer import Tokenizer

_ASKED_SHARE = 0.3  # lines of a document of `pairs_sample` that follow a question
_TASK = "Each name below has a number. Remember them all, I will ask for some.\n"


def recall_prompt(
    tokenizer: Tokenizer, length: int, pairs: int, depth: float, rng: np.random.Generator
) -> tuple[np.ndarray, int]:
    """A question of exactly `length` tokens, and the number that answers it.

    Args:
      tokenizer: the model's own.
      length: tokens of the prompt, the answer not counted.
      pairs: names with numbers in it.
      depth: place of the asked pair among all, 0 (the first) to 1 (the last).
      rng: source of names, numbers and the amounts of filler between them.

    Returns:
      Tokens int32 [length]; the answer's are `answer_tokens` of the number.

    Raises:
      ConfigError: a length that can't hold all pairs and the question.
    """
    document = _Document(tokenizer, pairs, rng, held_out=True)
    asked = round(depth * (pairs - 1))
    question = document.question(asked)
    return np.concatenate(
        [document.body(length - len(question), length), question]
    ), document.numbers[asked]


def recall_sample(
    tokenizer: Tokenizer,
    seq_len: int,
    rng: np.random.Generator,
    *,
    pairs: int,
    questions: int = 1,
    held_out: bool = False,
    text: Callable[[int, np.random.Generator], np.ndarray] | None = None,
) -> Document:
    """One document that fills a training window: pairs in filler, questions with their answers, end
    of document.

    Args:
      tokenizer: the model's own.
      seq_len: tokens of a window, the last target not counted.
      rng: source of everything random.
      pairs: names with numbers in it.
      questions: how many different ones are asked for, at most `pairs`.
      held_out: take evaluation numbers instead of training numbers.
      text: (count, rng) -> so many tokens of running text to scatter the pairs in; None: the
        repeated filler.

    Raises:
      ConfigError: more questions than pairs, or a window that can't hold it all.
    """
    if questions > pairs:
        raise ConfigError(f"recall: {questions} questions about {pairs} pairs; ask for fewer")
    document = _Document(tokenizer, pairs, rng, held_out=held_out)
    parts = []
    for asked in rng.permutation(pairs)[:questions]:
        answer = answer_tokens(tokenizer, document.numbers[asked])
        parts += [(document.question(asked), False), (answer, True)]
    parts.append((np.asarray([tokenizer.end_of_document], np.int32), False))
    room = seq_len + 1 - sum(len(part) for part, _ in parts)
    return document_of([(document.body(room, seq_len, text), False), *parts], seq_len + 1)


def pairs_sample(
    tokenizer: Tokenizer,
    seq_len: int,
    rng: np.random.Generator,
    *,
    pairs: int,
    held_out: bool = False,
) -> Document:
    """A window of 2 to `pairs` pairs, drawn again and again, some after the question of a recall
    document. All but a pair's first number can be known, so that looking names up is learned from
    far fewer tokens than from documents that ask at their end.

    Arguments as those of `recall_sample`.
    """
    document = _Document(tokenizer, int(rng.integers(2, pairs + 1)), rng, held_out=held_out)
    parts, count, stated, line_break = [], 0, set(), tokenizer.encode("\n")
    while count < seq_len + 1:
        index, asked = int(rng.integers(len(document.names))), rng.random() < _ASKED_SHARE
        question = document.question(index)
        if not asked:
            question = tokenizer.encode(f"\n{document.names[index]}:")
        answer = answer_tokens(tokenizer, document.numbers[index])
        parts += [(question, False), (answer, index in stated), (line_break, False)]
        stated.add(index)
        count += len(question) + len(answer) + len(line_break)
    return document_of(parts, seq_len + 1)


class _Document:
    """Names, their numbers, and the text that states them."""

    def __init__(
        self, tokenizer: Tokenizer, pairs: int, rng: np.random.Generator, *, held_out: bool
    ):
        draw = eval_key if held_out else train_key
        self._tokenizer, self._rng = tokenizer, rng
        self.names = draw_names(pairs, rng)
        self.numbers = [draw(rng) for _ in range(pairs)]

    def question(self, asked: int) -> np.ndarray:
        """Tokens of a question, up to where its number follows."""
        name = self.names[asked]
        return self._tokenizer.encode(f"\nWhich number has {name}?\n{name}:")

    def body(
        self,
        length: int,
        whole: int,
        text: Callable[[int, np.random.Generator], np.ndarray] | None = None,
    ) -> np.ndarray:
        """Task line and all pairs with filler or text between them, int32 [length]; `whole` is the
        length of the document, for the error."""
        encode = self._tokenizer.encode
        lines = [encode(f"\n{n}: {v}\n") for n, v in zip(self.names, self.numbers, strict=True)]
        task = encode(_TASK)
        room = length - len(task) - sum(map(len, lines))
        if room < 0:
            raise ConfigError(
                f"a recall document of {whole} tokens is too short for {len(lines)} pairs: they "
                f"and the questions take {whole - room} tokens of the {self._tokenizer.name} "
                "tokenizer; use fewer pairs or a longer document"
            )
        cuts = np.sort(self._rng.integers(0, room + 1, len(lines)))
        between = filler_tokens(self._tokenizer, room) if text is None else text(room, self._rng)
        filler = np.split(between, cuts)
        parts = [part for pair in zip(filler, lines, strict=False) for part in pair]
        return np.concatenate([task, *parts, filler[-1]])
