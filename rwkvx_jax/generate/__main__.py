"""Continues prompts, or chats: `python -m rwkvx_jax.generate --help`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from rwkvx_jax.cache import CachePolicy
from rwkvx_jax.checkpoint import load_checkpoint
from rwkvx_jax.cli import command_line, parse, settle_platform
from rwkvx_jax.config import ConfigError
from rwkvx_jax.generate.engine import Engine, Session, TextStream, generate
from rwkvx_jax.generate.sampling import Sampling
from rwkvx_jax.tokenizer import Tokenizer, load_tokenizer

_DEFAULT_LENGTH = 4096  # of a chat, or of a text whose length nobody gave


@dataclass(frozen=True, kw_only=True)
class Options:
    """Continues prompts with a trained model, or chats with it on a terminal."""

    checkpoint: Path
    """Work directory, .safetensors or .pth."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Text to continue; give it several times to continue several texts side by side."""
    prompts_file: Path | None = None
    """File with one prompt a line, beside those of --prompt."""
    chat: bool = False
    """Talk with the model, turn by turn; an empty line or the end of the input ends it."""
    max_tokens: int = 200
    """Most tokens of each answer."""
    max_length: int | None = None
    """Tokens that the cache holds, prompt and answers together. Default: as many as are needed, or
    4096 in a chat."""
    temperature: float = 1.0
    """0: always the most likely token."""
    top_p: float = 0.85
    """Draws from the fewest tokens whose probabilities sum to at least this."""
    top_k: int = 0
    """Draws from so many most likely tokens; 0: from all."""
    presence_penalty: float = 0.2
    """Subtracted from the logit of every token generated before."""
    frequency_penalty: float = 0.2
    """Subtracted from a logit as often as its token was generated before."""
    penalty_decay: float = 0.996
    """Factor on those counts with each further token."""
    seed: int = 0
    """Seed of the first text; the others count on from it."""
    stop: Annotated[tuple[int, ...], tyro.conf.UseAppendAction] = ()
    """Token that ends a text, beside 0, the end of a document."""
    piece: int = 512
    """Tokens of a prompt read at once."""
    cache_policy: tuple[int, int, int] | None = None
    """TRIGGER KEEP WINDOW: compress the cache to KEEP rows, the newest WINDOW among them, when it
    holds more than TRIGGER."""
    chunk_size: int | None = None
    """Replaces the chunk size of the sparse attention."""
    attention_top_k: int | None = None
    """Replaces the number of chunks that a token reads."""
    tokenizer: Literal["", "byte", "world"] = ""
    """Tokenizer, where the checkpoint does not name it."""
    vocab_file: str = ""
    """Vocabulary of the World tokenizer, where pyrwkv-tokenizer is not installed."""

    def __post_init__(self):
        for name in ("max_tokens", "max_length", "piece", "chunk_size", "attention_top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}: it must be at least 1")
        if self.seed < 0:
            raise ConfigError(f"--seed is {self.seed}: it must not be negative")
        self.sampling()
        if self.chat == bool(self.prompt or self.prompts_file):
            raise ConfigError("give either --chat, or prompts with --prompt or --prompts-file")

    def sampling(self) -> Sampling:
        return Sampling(
            self.temperature,
            self.top_p,
            self.top_k,
            self.presence_penalty,
            self.frequency_penalty,
            self.penalty_decay,
        )

    def prompts(self) -> list[str]:
        """All prompts.

        Raises:
          ConfigError: no prompts file there, or an empty prompt.
        """
        texts = list(self.prompt)
        if self.prompts_file is not None:
            if not self.prompts_file.is_file():
                raise ConfigError(f"no prompts file {self.prompts_file}")
            texts += self.prompts_file.read_text().splitlines()
        if "" in texts:
            raise ConfigError(f"prompt {texts.index('')} is empty: give it some text")
        return texts


def run(options: Options, ask: Callable[[str], str] = input) -> None:
    """Continues the prompts, or chats, with answers going to the standard output."""
    prompts = options.prompts()
    loaded = load_checkpoint(
        options.checkpoint, chunk_size=options.chunk_size, top_k=options.attention_top_k
    )
    name = options.tokenizer or loaded.tokenizer
    if not name:
        raise ConfigError(
            f"{options.checkpoint} does not say which tokenizer it was trained with: name it with "
            "--tokenizer byte or --tokenizer world"
        )
    tokenizer = load_tokenizer(name, options.vocab_file or loaded.vocab_file)
    needed = max((len(tokenizer.encode(prompt)) for prompt in prompts), default=_DEFAULT_LENGTH)
    answers = 0 if options.chat else options.max_tokens
    policy = None if options.cache_policy is None else CachePolicy(*options.cache_policy)
    engine = Engine(
        loaded.model,
        max_length=options.max_length or needed + answers,
        batch=max(1, len(prompts)),
        piece=options.piece,
        sampling=options.sampling(),
        policy=policy,
    )
    del loaded
    if options.chat:
        _chat(engine, tokenizer, options, ask)
    elif len(prompts) == 1:
        session = engine.start([tokenizer.encode(prompts[0])], [options.seed])
        _show(prompts[0])
        for text in _answer(engine, session, tokenizer, options, (0, *options.stop)):
            _show(text)
        _show("\n")
        print(session.speed, file=sys.stderr)
    else:
        seeds = range(options.seed, options.seed + len(prompts))
        stop = (0, *options.stop)
        texts, speed = generate(
            engine, tokenizer, prompts, options.max_tokens, stop=stop, seeds=seeds
        )
        for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            print(f"--- {i}\n{prompt}{text}")
        print(speed, file=sys.stderr)


def _answer(
    engine: Engine, session: Session, tokenizer: Tokenizer, options: Options, stop: tuple[int, ...]
) -> Iterator[str]:
    stream = TextStream(tokenizer)
    for (token,) in engine.stream(session, options.max_tokens, stop):
        yield stream.push(int(token))
    yield stream.finish()


def _chat(engine: Engine, tokenizer: Tokenizer, options: Options, ask: Callable[[str], str]):
    """Turns of `User:` and `Assistant:` as in data/chat.py; a blank line ends an answer."""
    session = None
    while True:
        try:
            said = ask("User: ").strip()
        except EOFError:
            return
        if not said:
            return
        turn = tokenizer.encode(f"User: {said}\n\nAssistant:")
        if session is None:
            session = engine.start([turn], [options.seed])
        else:
            engine.feed(session, [turn])
        _show("Assistant:")
        answer, closed = "", False
        for text in _answer(engine, session, tokenizer, options, (0, *options.stop)):
            answer += text
            closed = answer.rstrip(" ").endswith("\n\n") and bool(answer.strip())
            _show(text)
            if closed:
                break
        if not closed:  # cut off: the next turn still begins after a blank line
            engine.feed(session, [tokenizer.encode("\n\n")])
            _show("\n\n")
        print(session.speed, file=sys.stderr)


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def main(argv: list[str]) -> None:
    prog = "python -m rwkvx_jax.generate"
    settle_platform()
    with command_line(prog, argv):
        run(parse(Options, argv, prog))


if __name__ == "__main__":
    main(sys.argv[1:])
