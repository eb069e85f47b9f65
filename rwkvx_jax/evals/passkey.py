"""Passkey retrieval: a number hidden in filler, asked for at the end, by length and depth.

Two protocols. "exact" hits a length in the model's own tokens; "official" is the RWKV-X
repository's prompt, cut by characters for World tokens. Keys are the repository's or random ones;
neither kind ever occurs in training documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro
from rich.console import Console

from rwkvx_jax.config import ConfigError
from rwkvx_jax.evals.common import (
    IDENTITY_FIELDS,
    EvalOptions,
    Subject,
    Tracker,
    even_batches,
    open_subjects,
    share_with_interval,
)
from rwkvx_jax.evals.heatmap import HeatMap, draw, print_table
from rwkvx_jax.evals.reader import GreedyReader, affordable_batch
from rwkvx_jax.evals.results import Record, Results
from rwkvx_jax.tasks.passkey import (
    OFFICIAL_TRIALS,
    answer_tokens,
    eval_key,
    exact_prompt,
    is_eval_key,
    official_characters,
    official_key,
    official_prompt,
)
from rwkvx_jax.tokenizer import Tokenizer

_KEY_FIELDS = ("length", "depth", "trial")
_DEFAULT_LENGTHS = {
    "exact": (1024, 2048, 4096, 8192),
    "official": tuple(range(2000, 32001, 2000)),  # the repository's
}


def _parse_lengths(words: list[str]) -> tuple[int, ...]:
    return () if words == ["auto"] else tuple(int(word) for word in words[0].split(","))


_Lengths = Annotated[
    tuple[int, ...],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="N,N,...",
        instance_from_str=_parse_lengths,
        is_instance=lambda x: isinstance(x, tuple),
        str_from_instance=lambda x: [",".join(map(str, x)) or "auto"],
    ),
]


@dataclass(frozen=True, kw_only=True)
class PasskeyOptions(EvalOptions):
    """Hides a number in filler text and asks for it; draws accuracy by length and depth."""

    lengths: _Lengths = ()
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
    compare_without_attention: bool = False
    """Also shows each model with its attention blocks taken out."""

    def __post_init__(self):
        super().__post_init__()
        if self.keys == "auto":
            object.__setattr__(self, "keys", "official" if self.official else "random")
        lengths = self.lengths or _DEFAULT_LENGTHS[self.protocol]
        object.__setattr__(self, "lengths", tuple(sorted(set(lengths))))
        for name, value in (("depths", self.depths), ("trials", self.trials)):
            if value < 1:
                raise ConfigError(f"--{name} is {value}: it must be at least 1")
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
        steps = self.depths if self.official else max(1, self.depths - 1)
        return tuple(round(i / steps, 6) for i in range(self.depths))


class Trial(NamedTuple):
    """One question; with the options and the tokenizer it determines the prompt."""

    length: int
    depth: float
    trial: int


def plan(options: PasskeyOptions) -> list[Trial]:
    """All trials, in the order in which they are run: short prompts first."""
    return [
        Trial(length, depth, trial)
        for length in options.lengths
        for depth in options.depth_shares
        for trial in range(options.trials)
    ]


def key_of(options: PasskeyOptions, trial: Trial) -> int:
    """The number to hide; a random one depends on its trial alone, not on the others planned."""
    if options.keys == "official":
        return official_key(trial.trial)
    depth = round(trial.depth * 1e6)
    return eval_key(np.random.default_rng([options.seed, trial.length, depth, trial.trial]))


def prompt_of(options: PasskeyOptions, tokenizer: Tokenizer, trial: Trial) -> np.ndarray:
    """Tokens of a prompt, int32.

    Raises:
      ConfigError: a length that can't hold the fixed lines.
    """
    key = key_of(options, trial)
    if not options.official:
        return exact_prompt(tokenizer, key, trial.length, trial.depth)
    characters = official_characters(trial.length)
    if characters == 0:
        raise ConfigError(
            f"length {trial.length} is too short for the official protocol: its filler is counted "
            "in thousands of characters; use at least 267 tokens"
        )
    return tokenizer.encode(official_prompt(key, characters, round(characters * trial.depth)))


def answer_length(options: PasskeyOptions, tokenizer: Tokenizer, key: int) -> int:
    """Tokens that a model may use for its answer."""
    if options.official:
        return len(tokenizer.encode(str(key)))
    return len(answer_tokens(tokenizer, key))


def judge(
    options: PasskeyOptions, tokenizer: Tokenizer, trial: Trial, prompt: np.ndarray, answer
) -> Record:
    """JSON record of a trial: its answer, cut to the tokens it may use, and whether it is right."""
    key = key_of(options, trial)
    text = tokenizer.decode(answer[: answer_length(options, tokenizer, key)])
    return {
        **trial._asdict(),
        "key": key,
        "prompt_tokens": len(prompt),
        "answer": text,
        "correct": text.strip() == str(key),
    }


def summarize(trials: Sequence[Record]) -> Record:
    """Shares with intervals: of all trials, by length, and by length and depth."""

    def share(chosen: Sequence[Record]) -> Record:
        return share_with_interval(sum(t["correct"] for t in chosen), len(chosen))

    def split(*fields: str) -> list[Record]:
        groups: dict[tuple, list[Record]] = {}
        for trial in trials:
            groups.setdefault(tuple(trial[f] for f in fields), []).append(trial)
        return [
            dict(zip(fields, key, strict=True)) | share(chosen)
            for key, chosen in sorted(groups.items())
        ]

    return {
        "all": share(trials),
        "by_length": split("length"),
        "by_length_and_depth": split("length", "depth"),
    }


def panels_of(options: PasskeyOptions, subjects: Sequence[Subject]) -> list[Subject]:
    """The models to show, and checks of everything that can be checked before they run.

    Raises:
      ConfigError: a protocol that does not fit the tokenizer, lengths too short for a prompt, or
        no attention blocks to take out.
    """
    tokenizer = subjects[0].tokenizer
    if options.official and tokenizer.name != "world":
        raise ConfigError(
            f"--protocol official counts characters for the World tokenizer, and "
            f"{subjects[0].checkpoint} uses the {tokenizer.name} tokenizer: use --protocol exact"
        )
    shortest = plan(options)[: options.depths * options.trials]
    for trial in shortest:
        prompt_of(options, tokenizer, trial)
    if not options.compare_without_attention:
        return list(subjects)
    if not any(subject.config.num_attention_blocks for subject in subjects):
        raise ConfigError("--compare-without-attention: no checkpoint here has attention blocks")
    return [
        panel
        for subject in subjects
        for panel in (
            [subject, subject.without_attention()]
            if subject.config.num_attention_blocks
            else [subject]
        )
    ]


def evaluate(
    options: PasskeyOptions,
    subjects: Sequence[Subject],
    console: Console,
    make_reader: Callable[..., Any] = GreedyReader,
) -> Results:
    """Runs what an earlier run has not finished, and writes passkey.json.

    Args:
      options: the flags.
      subjects: models with the same tokenizer.
      console: shows the progress.
      make_reader: (subject, piece=, batch=, longest=) -> a function as `GreedyReader` is one.
    """
    panels = panels_of(options, subjects)
    trials = plan(options)
    results = Results(
        options.output / "passkey.json",
        task="passkey",
        settings={"protocol": options.protocol, "keys": options.keys, "seed": options.seed},
        plan={
            "lengths": options.lengths,
            "depths": options.depth_shares,
            "trials": options.trials,
            "limit": options.limit,
        },
        key_fields=_KEY_FIELDS,
        planned=trials,
        panels=[panel.description for panel in panels],
        identity_fields=IDENTITY_FIELDS,
        summarize=summarize,
    )
    pending = {}
    for panel in panels:
        finished = results.finished(panel.label)
        pending[panel.label] = [t for t in trials[: options.limit] if t not in finished]
    if skipped := sum(len(results.finished(panel.label)) for panel in panels):
        console.print(f"{skipped} finished trials found in {results.path}", soft_wrap=True)
    total = sum(trial.length for chosen in pending.values() for trial in chosen)
    with Tracker(console, "tokens", total) as tracker:
        for panel in panels:
            if pending[panel.label]:
                _run(options, panel, pending[panel.label], results, tracker, make_reader)
    results.save()
    return results


def _run(
    options: PasskeyOptions,
    panel: Subject,
    trials: Sequence[Trial],
    results: Results,
    tracker: Tracker,
    make_reader: Callable[..., Any],
) -> None:
    """Runs the trials of one model in batches of equal length."""
    tokenizer = panel.tokenizer
    longest = max(options.lengths)
    piece = min(options.piece, longest)
    count = max(answer_length(options, tokenizer, key_of(options, t)) for t in plan(options))
    largest = options.batch or affordable_batch(panel, longest + count, piece)
    per_length = min(options.depths * options.trials, len(trials))
    batch = -(-per_length // -(-per_length // largest))
    reader = make_reader(panel, piece=piece, batch=batch, longest=longest)
    for length in options.lengths:
        tracker.describe(f"{panel.label}, length {length:,}")
        for chosen in even_batches([t for t in trials if t.length == length], batch):
            prompts = [prompt_of(options, tokenizer, trial) for trial in chosen]
            answers = reader(prompts, count, tracker.advance)
            results.add(
                panel.label,
                [
                    judge(options, tokenizer, *each)
                    for each in zip(chosen, prompts, answers, strict=True)
                ],
            )


def heat_maps(options: PasskeyOptions, results: Results) -> list[HeatMap]:
    """The counts of every model in a results file."""
    rows = {length: i for i, length in enumerate(options.lengths)}
    columns = {depth: i for i, depth in enumerate(options.depth_shares)}
    maps = []
    for panel in results.document["panels"]:
        correct, trials = np.zeros((2, len(rows), len(columns)), int)
        for trial in panel["trials"]:
            cell = rows[trial["length"]], columns[trial["depth"]]
            trials[cell] += 1
            correct[cell] += trial["correct"]
        step, trained = panel["step"], panel["trained_length"]
        facts = [f"step {step:,}"] if step is not None else []
        facts += [f"trained on up to {trained:,} tokens"] if trained is not None else []
        maps.append(
            HeatMap(
                panel["label"],
                ", ".join(facts),
                options.lengths,
                options.depth_shares,
                correct,
                trials,
                trained,
            )
        )
    return maps


def run(options: PasskeyOptions) -> None:
    """The command: evaluates, writes passkey.json and passkey.png, prints the tables."""
    console = Console(highlight=False)
    subjects = open_subjects(options)
    try:
        results = evaluate(options, subjects, console)
    except KeyboardInterrupt:
        console.print("interrupted: finished trials are saved, the same command goes on from there")
        raise SystemExit(130) from None
    maps = heat_maps(options, results)
    tokenizer = subjects[0].tokenizer.name
    unit = "World tokens, the repository's rule" if options.official else f"{tokenizer} tokens"
    figure = options.output / "passkey.png"
    draw(
        maps,
        figure,
        title=(
            f"Passkey retrieval by prompt length and depth\nprotocol {options.protocol}, "
            f"{options.keys} keys, {options.trials} trials a cell, seed {options.seed}"
        ),
        x_label=f"prompt length ({unit})",
        y_label="depth of the key (% of the filler)",
    )
    wide = console if console.is_terminal else Console(highlight=False, width=240)
    for heat_map in maps:
        print_table(wide, heat_map, length_header="tokens")
    console.print(f"wrote {results.path} and {figure}", soft_wrap=True)
