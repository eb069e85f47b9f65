"""Prompts and continuations as text, which never ends inside a UTF-8 character."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace

from rwkvx_jax.generate.engine import Engine
from rwkvx_jax.generate.requests import Request
from rwkvx_jax.generate.rows import Speed
from rwkvx_jax.tokenizer import Tokenizer


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


def continue_texts(
    engine: Engine,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    show: Callable[[int, str], bool | None],
) -> None:
    """Shows what each text goes on with, as it comes; whole characters only.

    Args:
      engine: continues them.
      tokenizer: of the model.
      requests: the texts.
      show: told the number of a text and what comes next; if it says so, the text ends there.

    Raises:
      ConfigError, NotFiniteError: a text that can't be continued, when all others are whole.
    """
    streams, failed = [TextStream(tokenizer) for _ in requests], None
    said = lambda number, tokens: bool(show(number, streams[number].push(tokens[-1])))
    with closing(engine.answer(requests, ended=said)) as answers:
        for answer in answers:
            show(answer.number, streams[answer.number].finish())
            failed = failed or (answer if answer.problem else None)
    if failed is not None:
        failed.check()


def generate(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_tokens: int,
    *,
    stop: Sequence[int] = (0,),
    seeds: Sequence[int] | None = None,
) -> tuple[list[str], Speed]:
    """Continues texts, any number of them: the continuations, and how fast they came.

    Args:
      engine: continues them.
      tokenizer: of the model.
      prompts: what follows the prefix that the engine holds.
      max_tokens: most tokens of each.
      stop: tokens before which a text ends.
      seeds: one a text; default 0, 1, 2, ... A text depends on its own seed alone.

    Raises:
      ConfigError, NotFiniteError: a text that can't be continued.
    """
    seeds, texts = range(len(prompts)) if seeds is None else seeds, [""] * len(prompts)

    def add(number: int, text: str) -> None:
        texts[number] += text

    requests = [
        Request(tokenizer.encode(prompt), max_tokens, stop, seed)
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    before = replace(engine.speed)
    continue_texts(engine, tokenizer, requests, add)
    return texts, engine.speed.since(before)
