"""Tasks whose questions form a grid of prompt lengths and depths, with several trials in each cell.

A task says how a prompt is made and an answer judged (`Grid`); running it in batches, keeping the
trials, summing them up and showing them as heat maps is the same for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import tyro
from rich.console import Console

from rwkvx_jax.cache import MOST_ROWS, CachePolicy
from rwkvx_jax.config import ConfigError
from rwkvx_jax.evals.common import (
    IDENTITY_FIELDS,
    EvalOptions,
    Subject,
    even_batches,
    share_with_interval,
)
from rwkvx_jax.evals.heatmap import HeatMap, draw, print_table
from rwkvx_jax.evals.reader import (
    STEP_TOKENS,
    GreedyReader,
    affordable_batch,
    check_memory,
)
from rwkvx_jax.evals.results import Results
from rwkvx_jax.generate.memory import memory_left
from rwkvx_jax.progress import Progress
from rwkvx_jax.records import Record
from rwkvx_jax.tokenizer import Tokenizer

_PIECE = {"cpu": 256}  # longer ones are no faster there
_DEFAULT_PIECE = 2048
_CPU_ROWS, _CPU_PROMPT_TOKENS = 4, 131_072
_MOST_TRIALS = 1_000_000  # of a model: the file is written anew after every batch


def _parse_lengths(words: list[str]) -> tuple[int, ...]:
    return () if words == ["auto"] else tuple(int(word) for word in words[0].split(","))


Lengths = Annotated[
    tuple[int, ...],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="N,N,...",
        instance_from_str=_parse_lengths,
        is_instance=lambda x: isinstance(x, tuple),
        str_from_instance=lambda x: [",".join(map(str, x)) or "auto"],
    ),
]
"""Type of a flag such as --lengths 1024,4096; "auto", the empty tuple, leaves it to the task."""


def _parse_policy(words: list[str]) -> CachePolicy | None:
    return None if words == ["none"] else CachePolicy(*map(int, words[0].split(",")))


Policy = Annotated[
    CachePolicy | None,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="TRIGGER,KEEP,WINDOW",
        instance_from_str=_parse_policy,
        is_instance=lambda x: x is None or isinstance(x, CachePolicy),
        str_from_instance=lambda x: ["none" if x is None else ",".join(map(str, vars(x).values()))],
    ),
]
"""Type of a flag such as --policy 20000,16000,2000."""


@dataclass(frozen=True, kw_only=True)
class GridOptions(EvalOptions):
    """Flags of every grid."""

    piece: int | None = None
    """Tokens of a prompt read at once. Default: 2048, on a CPU 256. What consecutive prompts begin
    with together is read once, in whole pieces."""
    policy: Policy = None
    """Compresses the cache of keys and values (see docs/generation.md) instead of keeping all: when
    it holds more than TRIGGER tokens, KEEP stay, the last WINDOW among them."""


def check_plan(lengths: Sequence[int], depths: int, trials: int) -> None:
    """Refuses a plan that makes no sense or could never be run, before it is written out.

    Raises:
      ConfigError: an option out of bounds, or too many trials together.
    """
    if not lengths or min(lengths) < 1:
        raise ConfigError(f"--lengths is {lengths}: give numbers of at least 1, such as 1000,2000")
    if max(lengths) > MOST_ROWS:
        raise ConfigError(f"--lengths has {max(lengths):,}: a prompt has at most {MOST_ROWS:,}")
    for name, value in (("depths", depths), ("trials", trials)):
        if value < 1:
            raise ConfigError(f"--{name} is {value}: it must be at least 1")
    if (total := len(lengths) * depths * trials) > _MOST_TRIALS:
        raise ConfigError(
            f"{len(lengths)} --lengths, {depths:,} --depths and {trials:,} --trials make {total:,} "
            f"trials, and a results file takes {_MOST_TRIALS:,}: lower --depths or --trials"
        )


class Trial(NamedTuple):
    """One question of a grid."""

    length: int
    depth: float  # from 0 to 1
    trial: int


@dataclass(frozen=True)
class Grid:
    """The questions of a task.

    Attributes:
      task: its name, and that of its files.
      settings: what the questions depend on beside their trial, as JSON.
      lengths: ascending.
      depths: ascending, from 0 to 1.
      trials: of each length and depth.
      prompt: tokens of a question, int32; (tokenizer, trial) alone determine it.
      answer_length: most tokens that any answer of the task may have.
      judge: (tokenizer, trial, tokens of the answer) -> fields of its record: what was asked and
        answered, and "correct", from 0 to 1. Called after `prompt` of the same trial.
      ended: (tokenizer, tokens of an answer so far) -> whether further ones change nothing.
    """

    task: str
    settings: Record
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    trials: int
    prompt: Callable[[Tokenizer, Trial], np.ndarray]
    answer_length: Callable[[Tokenizer], int]
    judge: Callable[[Tokenizer, Trial, np.ndarray], Record]
    ended: Callable[[Tokenizer, np.ndarray], bool] = lambda tokenizer, answer: False

    def plan(self) -> list[Trial]:
        """All trials, in the order in which they are run: short prompts first."""
        return [
            Trial(length, depth, trial)
            for length in self.lengths
            for depth in self.depths
            for trial in range(self.trials)
        ]


def with_attention_off(subjects: Sequence[Subject]) -> list[Subject]:
    """Each model, followed by itself without its attention blocks where it has some.

    Raises:
      ConfigError: none has any.
    """
    if not any(subject.config.num_attention_blocks for subject in subjects):
        raise ConfigError("--compare-without-attention: no checkpoint here has attention blocks")
    pairs = [
        [subject, subject.without_attention()] if subject.config.num_attention_blocks else [subject]
        for subject in subjects
    ]
    return [panel for pair in pairs for panel in pair]


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


def evaluate(
    grid: Grid,
    options: GridOptions,
    panels: Sequence[Subject],
    console: Console,
    make_reader: Callable[..., Any] = GreedyReader,
) -> Results:
    """Runs what an earlier run has not finished, and writes the results file.

    Args:
      grid: the task.
      options: the flags.
      panels: models with the same tokenizer.
      console: shows the progress.
      make_reader: (subject, piece=, batch=, longest=, policy=) -> a function as `GreedyReader` is
        one.

    Raises:
      ConfigError: lengths that can't hold a prompt, or a results file of another evaluation.
    """
    check_sizes(grid, options, panels)
    trials = grid.plan()
    for trial in trials[: len(trials) // len(grid.lengths)]:  # the shortest are the first to fail
        grid.prompt(panels[0].tokenizer, trial)
    results = Results(
        options.output / f"{grid.task}.jsonl",
        task=grid.task,
        settings=grid.settings | _policy_settings(options),
        plan={
            "lengths": grid.lengths,
            "depths": grid.depths,
            "trials": grid.trials,
            "limit": options.limit,
        },
        key_fields=Trial._fields,
        planned=trials,
        models=[panel.description for panel in panels],
        identity_fields=IDENTITY_FIELDS,
        summarize=summarize,
    )
    finished = {panel.label: results.finished(panel.label) for panel in panels}
    if skipped := sum(map(len, finished.values())):
        console.print(f"{skipped} finished trials found in {results.path}", soft_wrap=True)
    pending = [
        [trial for trial in trials[: options.limit] if trial not in finished[panel.label]]
        for panel in panels
    ]
    total = sum(trial.length for todo in pending for trial in todo)
    with Progress(console, total, "tokens") as tracker:
        for panel, todo in zip(panels, pending, strict=True):
            if todo:
                _run(grid, options, panel, todo, results, tracker, make_reader)
    return results


def check_sizes(grid: Grid, options: GridOptions, panels: Sequence[Subject]) -> None:
    """Refuses prompts that do not fit into the memory; see `check_memory`."""
    longest, free = max(grid.lengths), memory_left()
    batch = options.batch and min(options.batch, grid.trials * len(grid.depths))
    for panel in panels:
        check_memory(panel, longest, _piece_of(options, longest), options.policy, free, batch)


def _policy_settings(options: GridOptions) -> Record:
    """The compression of the cache, on which answers depend; nothing where there is none."""
    return {} if options.policy is None else {"policy": asdict(options.policy)}


def _piece_of(options: GridOptions, longest: int) -> int:
    return min(options.piece or _PIECE.get(jax.default_backend(), _DEFAULT_PIECE), longest)


def _step_tokens(piece: int, longest: int) -> int:
    """Tokens that all rows of a batch read at once. On a CPU one row keeps all cores busy, and each
    row reads what the prompts share: few rows where they are long, some for the answers' sake."""
    if jax.default_backend() != "cpu":
        return STEP_TOKENS
    return piece * max(1, min(_CPU_ROWS, _CPU_PROMPT_TOKENS // longest))


def _run(
    grid: Grid,
    options: GridOptions,
    panel: Subject,
    trials: Sequence[Trial],
    results: Results,
    tracker: Progress,
    make_reader: Callable[..., Any],
) -> None:
    """Runs the trials of one model in batches of equal length."""
    tokenizer, longest = panel.tokenizer, max(grid.lengths)
    piece = _piece_of(options, longest)
    count, policy = grid.answer_length(tokenizer), options.policy
    by_length = [[t for t in trials if t.length == length] for length in grid.lengths]
    most = max(map(len, by_length))
    rows = longest + count
    affordable = affordable_batch(panel, rows, piece, _step_tokens(piece, longest), policy)
    batch = min(most, options.batch or affordable)
    batch = -(-most // -(-most // batch))  # as many batches, but the last one as full as the others
    reader = make_reader(panel, piece=piece, batch=batch, longest=longest, policy=policy)
    batches = [chosen for same in by_length for chosen in even_batches(same, batch)]
    for i, chosen in enumerate(batches):
        tracker.describe(f"{panel.label}, length {chosen[0].length:,}")
        prompts = [grid.prompt(tokenizer, trial) for trial in chosen]
        answers = reader(prompts, count, tracker.advance, partial(grid.ended, tokenizer))
        results.add(
            panel.label,
            [
                trial._asdict()
                | {"prompt_tokens": len(prompt)}
                | grid.judge(tokenizer, trial, answer)
                | ({} if (answer >= 0).all() else {"a logit": math.nan})
                for trial, prompt, answer in zip(chosen, prompts, answers, strict=True)
            ],
        )
        if i == 0:
            tracker.start_clock()


def heat_maps(grid: Grid, results: Results) -> list[HeatMap]:
    """The counts of every model in a results file."""
    rows = {length: i for i, length in enumerate(grid.lengths)}
    columns = {depth: i for i, depth in enumerate(grid.depths)}
    maps = []
    for panel in results.document["models"]:
        shape = len(rows), len(columns)
        correct, trials = np.zeros(shape), np.zeros(shape, int)
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
                grid.lengths,
                grid.depths,
                correct,
                trials,
                trained,
            )
        )
    return maps


def show(
    grid: Grid, results: Results, console: Console, *, title: str, unit: str, depth_label: str
) -> Path:
    """Draws the figure, prints the tables, and returns the path of the figure.

    Args:
      grid: the task.
      results: of all its models.
      console: the terminal.
      title: of the figure.
      unit: what lengths are counted in.
      depth_label: what a depth is; "" where the only one means nothing.
    """
    maps = heat_maps(grid, results)
    path = results.path.with_suffix(".png")
    draw(maps, path, title=title, x_label=f"prompt length ({unit})", y_label=depth_label)
    for heat_map in maps:
        print_table(console, heat_map, length_header="tokens")
    console.print(f"wrote {results.path} and {path}", soft_wrap=True)
    return path
