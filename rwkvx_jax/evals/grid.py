"""Tasks whose questions form a grid of prompt lengths and depths, with several trials in each cell.

A task says how a prompt is made and an answer judged (`Grid`); asking in batches, summing up and
showing heat maps is the same for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import tyro
from rich.console import Console

from rwkvx_jax.cache import MOST_ROWS, CachePolicy
from rwkvx_jax.cli_help import listed
from rwkvx_jax.config import ConfigError
from rwkvx_jax.evals import runner
from rwkvx_jax.evals.intervals import Estimate, share_with_interval
from rwkvx_jax.evals.models import (
    EvalModel,
    EvalOptions,
    require_at_least_1,
    with_attention_off,
)
from rwkvx_jax.evals.plots import HeatMap, draw, name_of, part_of, print_table
from rwkvx_jax.evals.readers import STEP_TOKENS, GreedyReader, affordable_batch, check_memory
from rwkvx_jax.evals.results import Results, Task
from rwkvx_jax.evals.runner import even_batches
from rwkvx_jax.evals.tables import Table
from rwkvx_jax.generate.memory import memory_left
from rwkvx_jax.progress import Progress
from rwkvx_jax.records import Record
from rwkvx_jax.sharding import even_rows
from rwkvx_jax.tokenizer import Tokenizer

_PREFILL_CHUNK = {"cpu": 256}  # longer ones are no faster there
_DEFAULT_PREFILL_CHUNK = 2048
_CPU_ROWS, _CPU_PROMPT_TOKENS = 4, 131_072
_MOST_TRIALS = 1_000_000  # of a model


Lengths = Annotated[tuple[int, ...], listed(int, "N,N,...")]
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

    lengths: Lengths
    """Prompt lengths in tokens."""
    depths: int = 10
    """Depths of what is asked for, evenly spaced from 0 to 100 %."""
    trials: int = 5
    """Questions at every length and depth."""
    prefill_chunk: Annotated[int | None, tyro.conf.arg(name="piece")] = None
    """Tokens of a prompt read at once. Default: 2048, on a CPU 256. What consecutive prompts begin
    with together is read once, in whole chunks."""
    policy: Policy = None
    """Compresses the cache of keys and values (see docs/generation.md) instead of keeping all: when
    it holds more than TRIGGER tokens, KEEP stay, the last WINDOW among them."""
    compare_without_attention: bool = False
    """Also shows each model with its attention blocks taken out."""

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "lengths", tuple(sorted(set(self.lengths))))
        self._check_plan()

    def _check_plan(self) -> None:
        """Refuses a plan that makes no sense or could never be run, before it is written out.

        Raises:
          ConfigError: an option out of bounds, or too many trials together.
        """
        lengths = self.lengths
        if not lengths or min(lengths) < 1:
            raise ConfigError(
                f"--lengths is {lengths}: give numbers of at least 1, such as 1000,2000"
            )
        if max(lengths) > MOST_ROWS:
            raise ConfigError(f"--lengths has {max(lengths):,}: a prompt has at most {MOST_ROWS:,}")
        require_at_least_1(self, "depths", "trials")
        if (total := len(lengths) * self.depths * self.trials) > _MOST_TRIALS:
            raise ConfigError(
                f"{len(lengths)} --lengths, {self.depths:,} --depths and {self.trials:,} --trials "
                f"make {total:,} trials, and a results file takes {_MOST_TRIALS:,}: lower --depths "
                "or --trials"
            )

    @property
    def depth_shares(self) -> tuple[float, ...]:
        """The depths, from 0 to 1."""
        steps = max(1, self.depths - 1)
        return tuple(round(i / steps, 6) for i in range(self.depths))


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
    models: Sequence[EvalModel],
    console: Console,
    make_reader: Callable[..., Any] = GreedyReader,
) -> Results:
    """Asks what an earlier run has not, and keeps the answers.

    Args:
      grid: the task.
      options: the flags.
      models: with the same tokenizer.
      console: shows the progress.
      make_reader: (model, prefill_chunk=, batch=, longest=, policy=) -> a function as
        `GreedyReader` is one.

    Raises:
      ConfigError: lengths that can't hold a prompt, no attention blocks to take out, or a results
        file of another evaluation.
    """
    if options.compare_without_attention:
        models = with_attention_off(models)
    check_sizes(grid, options, models)
    trials = grid.plan()
    for trial in trials[: len(trials) // len(grid.lengths)]:  # the shortest are the first to fail
        grid.prompt(models[0].tokenizer, trial)
    plan = {"lengths": grid.lengths, "depths": grid.depths, "trials": grid.trials}
    task = Task(
        name=grid.task,
        settings=grid.settings | _policy_settings(options),
        plan=plan | {"limit": options.limit},
        trials=trials,
        chosen=trials[: options.limit],
        answer=partial(_answer, grid, options, make_reader),
        summarize=summarize,
        size=lambda trial: trial.length,
    )
    return runner.evaluate(task, options.output, models, console)


def check_sizes(grid: Grid, options: GridOptions, models: Sequence[EvalModel]) -> None:
    """Refuses prompts that do not fit into the memory; see `check_memory`."""
    longest, free = max(grid.lengths), memory_left()
    batch = options.batch and min(options.batch, grid.trials * len(grid.depths))
    chunk = _prefill_chunk(options, longest)
    for model in models:
        check_memory(model, longest, chunk, options.policy, free, batch)


def _policy_settings(options: GridOptions) -> Record:
    """The compression of the cache, on which answers depend; nothing where there is none."""
    return {} if options.policy is None else {"policy": asdict(options.policy)}


def _prefill_chunk(options: GridOptions, longest: int) -> int:
    default = _PREFILL_CHUNK.get(jax.default_backend(), _DEFAULT_PREFILL_CHUNK)
    return min(options.prefill_chunk or default, longest)


def _step_tokens(prefill_chunk: int, longest: int) -> int:
    """Tokens that all rows of a batch read at once. On a CPU one row keeps all cores busy: few rows
    where prompts are long, some for the answers' sake."""
    if jax.default_backend() != "cpu":
        return STEP_TOKENS
    return prefill_chunk * max(1, min(_CPU_ROWS, _CPU_PROMPT_TOKENS // longest))


def _answer(
    grid: Grid,
    options: GridOptions,
    make_reader: Callable[..., Any],
    model: EvalModel,
    trials: Sequence[Trial],
    progress: Progress,
) -> Iterator[list[Record]]:
    """Asks one model, in batches of equal length."""
    tokenizer, longest, policy = model.tokenizer, max(grid.lengths), options.policy
    chunk, count = _prefill_chunk(options, longest), grid.answer_length(tokenizer)
    by_length = [[t for t in trials if t.length == length] for length in grid.lengths]
    most, step = max(map(len, by_length)), _step_tokens(chunk, longest)
    batch = options.batch or affordable_batch(model, longest + count, chunk, step, policy)
    batch = min(most, batch)
    # As many batches, but the last one as full as the others.
    batch = even_rows(-(-most // -(-most // batch)))
    reader = make_reader(model, prefill_chunk=chunk, batch=batch, longest=longest, policy=policy)
    for chosen in (part for same in by_length for part in even_batches(same, batch)):
        progress.describe(f"{model.label}, length {chosen[0].length:,}")
        prompts = [grid.prompt(tokenizer, trial) for trial in chosen]
        answers = reader(prompts, count, progress.advance, partial(grid.ended, tokenizer))
        yield [
            trial._asdict()
            | {"prompt_tokens": len(prompt)}
            | grid.judge(tokenizer, trial, answer)
            | ({} if (answer >= 0).all() else {"a logit": math.nan})
            for trial, prompt, answer in zip(chosen, prompts, answers, strict=True)
        ]


def table(models: list[Record]) -> Table:
    """A row a model: right answers in per cent at each length, with intervals."""
    lengths = sorted({cell["length"] for p in models for cell in p["summary"]["by_length"]})
    rows = []
    for model in models:
        cells = {cell["length"]: cell for cell in model["summary"]["by_length"]}
        texts = [_share(cells[n]) if n in cells else "–" for n in lengths]
        rows.append([model["label"], *texts, _share(model["summary"]["all"])])
    columns = [f"{n:,}" for n in lengths]
    return Table(["model (right answers, %, with 95 % interval)", *columns, "all"], rows)


def score(summary: Record) -> Estimate:
    """Right answers in per cent."""
    whole = summary["all"]
    return Estimate(*(100 * whole[name] for name in ("accuracy", "low", "high")))


def _share(cell: Record) -> str:
    if not cell["trials"]:
        return "–"
    low, high = 100 * cell["low"], 100 * cell["high"]
    return f"{100 * cell['accuracy']:.1f} ({low:.0f} to {high:.0f})"


def heat_maps(grid: Grid, results: Results) -> list[HeatMap]:
    """The counts of every model in a results file."""
    rows = {length: i for i, length in enumerate(grid.lengths)}
    columns = {depth: i for i, depth in enumerate(grid.depths)}
    maps = []
    for model in results.document["models"]:
        shape = len(rows), len(columns)
        correct, trials = np.zeros(shape), np.zeros(shape, int)
        for trial in model["trials"]:
            cell = rows[trial["length"]], columns[trial["depth"]]
            trials[cell] += 1
            correct[cell] += trial["correct"]
        step, trained = model["step"], model["trained_length"]
        facts = [f"step {step:,}"] if step is not None else []
        facts += [f"trained on up to {trained:,} tokens"] if trained is not None else []
        planned = trials.size * grid.trials
        facts += filter(None, [part_of(len(model["trials"]), planned, "trials")])
        name, note = name_of(model), ", ".join(facts)
        maps.append(HeatMap(name, note, grid.lengths, grid.depths, correct, trials, trained))
    return maps


def show(
    grid: Grid, results: Results, console: Console, *, title: str, unit: str, depth_label: str
) -> None:
    """Draws the figure and prints the tables.

    Args:
      grid: the task.
      results: of all its models.
      console: the terminal.
      title: of the figure.
      unit: what lengths are counted in.
      depth_label: what a depth is; "" where the only one means nothing.
    """
    maps, labels = heat_maps(grid, results), {"y_label": depth_label}
    labels["x_label"] = f"prompt length ({unit})"

    def tables() -> None:
        for heat_map in maps:
            print_table(console, heat_map, length_header="tokens")

    runner.show(results, console, lambda path: draw(maps, path, title=title, **labels), tables)
