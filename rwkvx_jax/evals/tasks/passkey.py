"""Passkey retrieval: a number hidden in filler, asked for at the end, by length and depth.

Two protocols. "exact" hits a length in the model's own tokens; "official" is the RWKV-X
repository's prompt, cut by characters for World tokens. Keys are the repository's or random ones;
neither kind ever occurs in training documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from rich.console import Console

from rwkvx_jax.config import ConfigError
from rwkvx_jax.evals import grid, runner
from rwkvx_jax.evals.grid import Grid, GridOptions, Lengths, Trial
from rwkvx_jax.evals.models import EvalModel
from rwkvx_jax.evals.readers import GreedyReader
from rwkvx_jax.evals.results import Results
from rwkvx_jax.records import Record
from rwkvx_jax.storage import WorkPath
from rwkvx_jax.tasks.haystack import open_folder
from rwkvx_jax.tasks.passkey import (
    OFFICIAL_TRIALS,
    OFFICIAL_WORDING,
    OTHER_WORDING,
    answer_tokens,
    eval_key,
    exact_prompt,
    is_eval_key,
    official_characters,
    official_key,
    official_prompt,
)
from rwkvx_jax.tokenizer import Tokenizer

_DEFAULT_LENGTHS = {
    "exact": (1024, 2048, 4096, 8192),
    "official": tuple(range(2000, 32001, 2000)),  # the repository's
}


@dataclass(frozen=True, kw_only=True)
class PasskeyOptions(GridOptions):
    """Hides a number in filler text and asks for it; draws accuracy by length and depth."""

    lengths: Lengths = ()
    """Prompt lengths in tokens. Default: 1024,2048,4096,8192; official: 2000,4000,...,32000."""
    depths: int = 10
    """Depths of the key: shares of the filler before it, evenly spaced. Protocol exact: 0 to 100 %,
    both included; official: 0, 1/N, ..., (N-1)/N."""
    trials: int = OFFICIAL_TRIALS
    """Keys tried at every length and depth."""
    keys: Literal["auto", "official", "random"] = "auto"
    """official: the repository's, the same at every length and depth; random: drawn anew for every
    trial. auto: official under the official protocol, else random."""
    protocol: Literal["exact", "official"] = "exact"
    """exact: prompts of exactly so many of the model's own tokens; official: the repository's
    length rule and answer length (World tokenizer only)."""
    haystack: WorkPath | None = None
    """A .txt file, a folder of them or a quoted pattern: hides the key in a part of this text,
    another one for each trial, instead of in repeated sentences (protocol exact)."""
    digits: int = 5
    """Length of random keys; training documents have 5 digits."""
    wording: Literal["official", "other"] = "official"
    """other: lines around the key that no training document has (protocol exact)."""

    def __post_init__(self):
        if not self.lengths:
            object.__setattr__(self, "lengths", _DEFAULT_LENGTHS[self.protocol])
        super().__post_init__()
        if self.keys == "auto":
            object.__setattr__(self, "keys", "official" if self.official else "random")
        if not 3 <= self.digits <= 9:
            raise ConfigError(f"--digits is {self.digits}: keys have 3 to 9")
        if self.digits != 5 and self.keys == "official":
            raise ConfigError("--digits goes with --keys random: the official keys are given")
        if self.official and (self.haystack is not None or self.wording != "official"):
            raise ConfigError("--haystack and --wording go with --protocol exact")
        if self.keys == "official":
            for trial in range(self.trials):
                if not is_eval_key(official_key(trial)):
                    raise ConfigError(
                        f"--trials {self.trials} with official keys: from trial {trial} on they "
                        "may occur in training texts; use fewer, or --keys random"
                    )

    @property
    def official(self) -> bool:
        return self.protocol == "official"

    @property
    def depth_shares(self) -> tuple[float, ...]:
        """The depths, from 0 to 1."""
        if not self.official:
            return super().depth_shares
        return tuple(round(i / self.depths, 6) for i in range(self.depths))


def key_of(options: PasskeyOptions, trial: Trial) -> int:
    """The number to hide; a random one depends on its trial alone, not on the others planned."""
    if options.keys == "official":
        return official_key(trial.trial)
    return eval_key(_generator(options, trial), options.digits)


def _generator(options: PasskeyOptions, trial: Trial) -> np.random.Generator:
    depth = round(trial.depth * 1e6)
    return np.random.default_rng([options.seed, trial.length, depth, trial.trial])


def prompt_of(options: PasskeyOptions, tokenizer: Tokenizer, trial: Trial) -> np.ndarray:
    """Tokens of a prompt, int32.

    Raises:
      ConfigError: a length that can't hold the fixed lines.
    """
    key = key_of(options, trial)
    if not options.official:
        text = _text_of(options, tokenizer, trial) if options.haystack else None
        wording = OFFICIAL_WORDING if options.wording == "official" else OTHER_WORDING
        return exact_prompt(tokenizer, key, trial.length, trial.depth, text=text, wording=wording)
    characters = official_characters(trial.length)
    if characters == 0:
        raise ConfigError(
            f"length {trial.length} is too short for the official protocol: its filler is counted "
            "in thousands of characters; use at least 267 tokens"
        )
    return tokenizer.encode(official_prompt(key, characters, round(characters * trial.depth)))


def _text_of(
    options: PasskeyOptions, tokenizer: Tokenizer, trial: Trial
) -> Callable[[int], np.ndarray]:
    """count -> so many tokens of the haystack, from a place that depends on the trial alone."""
    folder = open_folder(str(options.haystack))
    rng = _generator(options, trial)
    start = int(rng.spawn(1)[0].integers(len(folder.tokens(tokenizer))))
    return lambda count: folder.window(tokenizer, start, count)


def answer_length(options: PasskeyOptions, tokenizer: Tokenizer, key: int) -> int:
    """Tokens that a model may use for its answer."""
    if options.official:
        return len(tokenizer.encode(str(key)))
    return len(answer_tokens(tokenizer, key))


def judge(
    options: PasskeyOptions, tokenizer: Tokenizer, trial: Trial, answer: np.ndarray
) -> Record:
    """What was hidden and answered, the answer cut to the tokens it may use."""
    key = key_of(options, trial)
    text = tokenizer.decode(answer[: answer_length(options, tokenizer, key)])
    return {"key": key, "answer": text, "correct": text.strip() == str(key)}


def passkey_grid(options: PasskeyOptions) -> Grid:
    """The task as a grid of questions."""

    def longest_answer(tokenizer: Tokenizer) -> int:
        keys = {key_of(options, trial) for trial in questions.plan()}
        return max(answer_length(options, tokenizer, key) for key in keys)

    settings = {"protocol": options.protocol, "keys": options.keys, "seed": options.seed}
    if options.haystack is not None:
        settings["haystack"] = open_folder(str(options.haystack)).fingerprint
    if options.digits != 5:
        settings["digits"] = options.digits
    if options.wording != "official":
        settings["wording"] = options.wording
    questions = Grid(
        task="passkey",
        settings=settings,
        lengths=options.lengths,
        depths=options.depth_shares,
        trials=options.trials,
        prompt=partial(prompt_of, options),
        answer_length=longest_answer,
        judge=partial(judge, options),
    )
    return questions


def evaluate(
    options: PasskeyOptions,
    models: Sequence[EvalModel],
    console: Console,
    make_reader: Callable[..., Any] = GreedyReader,
) -> Results:
    """Runs what is not finished yet; see `grid.evaluate`.

    Raises:
      ConfigError: a protocol that does not fit the tokenizer, lengths too short for a prompt, no
        attention blocks to take out, or a results file of another evaluation.
    """
    tokenizer = models[0].tokenizer
    if options.official and tokenizer.name != "world":
        raise ConfigError(
            f"--protocol official counts characters for the World tokenizer, and "
            f"{models[0].checkpoint} uses the {tokenizer.name} tokenizer: use --protocol exact"
        )
    return grid.evaluate(passkey_grid(options), options, models, console, make_reader)


def run(options: PasskeyOptions, models: Sequence[EvalModel] | None = None) -> None:
    """The command: evaluates, writes passkey.jsonl and passkey.png, prints the tables."""

    def show(results: Results, models: Sequence[EvalModel], console: Console) -> None:
        unit = f"{models[0].tokenizer.name} tokens"
        grid.show(
            passkey_grid(options),
            results,
            console,
            title=_title(options),
            unit="World tokens, the repository's rule" if options.official else unit,
            depth_label="depth of the key (% of the filler)",
        )

    runner.run(options, evaluate, show, models)


def _title(options: PasskeyOptions) -> str:
    where = "a book" if options.haystack is not None else "repeated filler"
    keys = f"{options.keys} keys" + (f" of {options.digits} digits" if options.digits != 5 else "")
    wording = ", unseen wording" if options.wording != "official" else ""
    policy = f", cache policy {vars(options.policy)}" if options.policy else ""
    return (
        f"Passkey retrieval by prompt length and depth\nprotocol {options.protocol}, in {where}, "
        f"{keys}{wording}, {options.trials} trials a cell, seed {options.seed}{policy}"
    )
