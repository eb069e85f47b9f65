"""Continues prompts, or chats: `python -m rwkvx_jax.generate --help`."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from rwkvx_jax.cache import CachePolicy
from rwkvx_jax.checkpoint import load_checkpoint
from rwkvx_jax.cli import command_line, parse, settle_platform
from rwkvx_jax.config import ConfigError, MeshConfig
from rwkvx_jax.data.chat import TURN_END, chat_prompt
from rwkvx_jax.generate.engine import Engine
from rwkvx_jax.generate.memory import memory_left, rows_that_fit
from rwkvx_jax.generate.requests import Request
from rwkvx_jax.generate.sampling import Sampling, check_seed
from rwkvx_jax.generate.terminal import show
from rwkvx_jax.generate.texts import continue_texts
from rwkvx_jax.model import RWKVX, abstract_model, get_params, with_params
from rwkvx_jax.sharding import even_rows, in_mesh, mesh_of
from rwkvx_jax.storage import WorkPath
from rwkvx_jax.tokenizer import Tokenizer, load_tokenizer
from rwkvx_jax.training.step import placed_params

_DEFAULT_LENGTH = 4096  # of a chat, or of a text whose length nobody gave
_MOST_ROWS = 8  # by default


@dataclass(frozen=True, kw_only=True)
class Options:
    """Continues prompts with a trained model, or chats with it on a terminal."""

    checkpoint: WorkPath
    """Work directory, .safetensors or .pth."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Text to continue; give it several times to continue several texts side by side."""
    prompts_file: WorkPath | None = None
    """File with one prompt a line, beside those of --prompt."""
    batch: int | None = None
    """Texts side by side; the others wait until one of them has ended. No answer depends on it.
    Default: 8, fewer where there are fewer prompts or the memory holds no more caches."""
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
    mesh: MeshConfig = MeshConfig(data=1)
    """Devices along each mesh axis, as for training: texts over data, heads over tensor, the cache
    of a long text over context. By default one device alone."""

    def __post_init__(self):
        sizes = ("batch", "max_tokens", "max_length", "piece", "chunk_size", "attention_top_k")
        for name in sizes:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}: it must be at least 1")
        check_seed(self.seed, "--seed")
        self.sampling()
        if self.chat == bool(self.prompt or self.prompts_file):
            raise ConfigError("give either --chat, or prompts with --prompt or --prompts-file")
        if self.chat and self.batch is not None:
            raise ConfigError("--batch is of prompts: leave it out with --chat")

    @property
    def stops(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        return 0, *self.stop

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
          ConfigError: no prompts file there, an empty prompt, or one that is not UTF-8.
        """
        texts = list(self.prompt)
        for i, text in enumerate(texts):
            if not text:
                raise ConfigError(f"prompt {i} is empty: give it some text")
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise ConfigError(f"prompt {i} is not valid UTF-8: {text!r}")
        return texts + ([] if self.prompts_file is None else _read_prompts(self.prompts_file))


def _read_prompts(path: Path) -> list[str]:
    """The lines of a file.

    Raises:
      ConfigError: no such file, an empty line, or one that is not UTF-8.
    """
    if not path.is_file():
        raise ConfigError(f"no prompts file {path}")
    lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    texts = []
    for number, line in enumerate(lines if lines[-1] else lines[:-1], 1):
        try:
            texts.append(line.removesuffix(b"\r").decode())
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}, line {number}: not valid UTF-8 ({error})") from error
        if not texts[-1]:
            raise ConfigError(f"{path}, line {number} is empty: give it some text, or remove it")
    if not texts:
        raise ConfigError(f"{path} holds no prompt: write one a line")
    return texts


def run(options: Options, ask: Callable[[str], str] = input) -> None:
    """Continues the prompts, or chats, with answers going to the standard output."""
    prompts = options.prompts()
    mesh = mesh_of(options.mesh)
    loaded = load_checkpoint(  # onto the host: no mesh is in force yet
        options.checkpoint, chunk_size=options.chunk_size, top_k=options.attention_top_k
    )
    name = options.tokenizer or loaded.tokenizer
    if not name:
        raise ConfigError(
            f"{options.checkpoint} does not say which tokenizer it was trained with: name it with "
            "--tokenizer byte or --tokenizer world"
        )
    if options.vocab_file and name != "world":
        raise ConfigError(f"--vocab-file is of the World tokenizer; the model uses {name!r}")
    tokenizer = load_tokenizer(name, options.vocab_file or loaded.vocab_file)
    with in_mesh(mesh):
        engine = _engine(options, loaded.model, tokenizer, prompts)
        del loaded
        if options.chat:
            _chat(engine, tokenizer, options, ask)
        else:
            _continue(engine, tokenizer, options, prompts)


def _engine(options: Options, model: RWKVX, tokenizer: Tokenizer, prompts: list[str]) -> Engine:
    """An engine on the mesh in force, with room for the longest prompt and its answer."""
    needed = max((len(tokenizer.encode(prompt)) for prompt in prompts), default=_DEFAULT_LENGTH)
    answers = 0 if options.chat else options.max_tokens
    policy = None if options.cache_policy is None else CachePolicy(*options.cache_policy)
    length, most = options.max_length or needed + answers, options.batch or _MOST_ROWS
    rows = min(most, max(1, len(prompts)))
    if options.batch is None:
        rows = rows_that_fit(model, rows, length, policy, memory_left())
    abstract = abstract_model(model.config, model.run)
    engine = Engine(
        with_params(abstract, placed_params(abstract, get_params(model))),
        max_length=length,
        batch=even_rows(rows),
        piece=options.piece,
        sampling=options.sampling(),
        policy=policy,
        name=str(options.checkpoint),
    )
    if prompts and engine.max_length is not None and engine.max_length <= needed:
        raise ConfigError(
            f"--max-length {engine.max_length} leaves no room for an answer: the longest prompt "
            f"has {needed} tokens"
        )
    return engine


def _continue(engine: Engine, tokenizer: Tokenizer, options: Options, prompts: list[str]) -> None:
    """Writes each prompt with its continuation; a single one as it grows."""
    requests = [
        Request(tokenizer.encode(prompt), options.max_tokens, options.stops, options.seed + i)
        for i, prompt in enumerate(prompts)
    ]
    single, texts = len(prompts) == 1, list(prompts)
    if single:
        show(prompts[0])

    def add(number: int, text: str) -> None:
        texts[number] += text
        if single:
            show(text)

    try:
        continue_texts(engine, tokenizer, requests, add)
    finally:  # what there is, if one of them fails
        show("\n" if single else "".join(f"--- {i}\n{text}\n" for i, text in enumerate(texts)))
    print(engine.speed, file=sys.stderr)


def _chat(engine: Engine, tokenizer: Tokenizer, options: Options, ask: Callable[[str], str]):
    """Turns of `User:` and `Assistant:` as in data/chat.py, each ended by a blank line: no turn of
    a training document has one inside."""
    said: list[int] = []  # by both, in tokens
    answer = ""

    def answered(number: int, text: str) -> bool:
        nonlocal answer
        answer += text
        show(text)
        return TURN_END in answer

    while True:
        try:
            asked = ask("User: ").strip()
        except EOFError:
            return
        if not asked:
            return
        said += tokenizer.encode(chat_prompt(asked)).tolist()
        engine.hold(said[:-1])
        show("Assistant:")
        answer = ""
        request = Request(said[-1:], options.max_tokens, options.stops, options.seed)
        continue_texts(engine, tokenizer, [request], answered)
        if TURN_END not in answer:  # cut off: the next turn still begins after a blank line
            answer += TURN_END
            show(TURN_END)
        said += tokenizer.encode(answer).tolist()
        print(engine.speed, file=sys.stderr)


def main(argv: list[str], prog: str = "python -m rwkvx_jax.generate") -> None:
    settle_platform()
    with command_line(prog, argv):
        run(parse(Options, argv, prog))


if __name__ == "__main__":
    main(sys.argv[1:])
