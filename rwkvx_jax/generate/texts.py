"""Prompts and continuations as text, which never ends inside a UTF-8 character."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence

from rwkvx_jax.generate.engine import Engine, NotFiniteError, Session, Speed
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


def stream_texts(
    engine: Engine,
    session: Session,
    tokenizer: Tokenizer,
    max_tokens: int,
    stop: Sequence[int] = (0,),
) -> Iterator[list[str]]:
    """What each text goes on with, as it comes; whole characters only.

    Raises:
      ConfigError, NotFiniteError: as `Engine.stream` does, when all other texts are whole.
    """
    streams = [TextStream(tokenizer) for _ in range(engine.batch)]
    try:
        for tokens in engine.stream(session, max_tokens, stop):
            yield [
                stream.push(int(token)) if token >= 0 else ""
                for stream, token in zip(streams, tokens, strict=True)
            ]
    except NotFiniteError:
        yield [stream.finish() for stream in streams]
        raise
    yield [stream.finish() for stream in streams]


def generate(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_tokens: int,
    *,
    stop: Sequence[int] = (0,),
    seeds: Sequence[int] | None = None,
) -> tuple[list[str], Speed]:
    """Continues texts: the continuations, and how fast they came.

    Raises:
      ConfigError, NotFiniteError: as `Engine.start` and `Engine.stream` do.
    """
    session = engine.start([tokenizer.encode(prompt) for prompt in prompts], seeds)
    parts = list(stream_texts(engine, session, tokenizer, max_tokens, stop))
    return ["".join(own) for own in zip(*parts, strict=True)], session.speed
