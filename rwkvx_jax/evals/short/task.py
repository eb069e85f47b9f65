"""Short-context benchmarks through lm-evaluation-harness, in the layout of the paper's table.

The eight tasks of the paper run offline on local files (`--data-dir`, see data_files.py); every
other lm_eval task runs by its name, with data from the Hugging Face hub, and task files of the
user's own (`--include-path`) with data beside them. lm_eval is an optional extra, and never brings
torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from rwkvx_jax.cli_help import listed
from rwkvx_jax.config import ConfigError
from rwkvx_jax.data.chat import TEMPLATE
from rwkvx_jax.evals import runner
from rwkvx_jax.evals.models import IDENTITY_FIELDS, EvalModel, EvalOptions
from rwkvx_jax.evals.results import Results, Task
from rwkvx_jax.evals.short import data as data_files
from rwkvx_jax.evals.short.files import check_samples, folder_of, write_results
from rwkvx_jax.evals.short.loading import Benchmarks, fingerprint, load_tasks
from rwkvx_jax.evals.short.table import draw, print_table, summarize
from rwkvx_jax.hosts import first_does
from rwkvx_jax.progress import Progress
from rwkvx_jax.records import Record, as_text

_BOOTSTRAPS = 1000  # for the errors that lm_eval has no formula of; its own 100,000 take minutes


@dataclass(frozen=True, kw_only=True)
class ShortOptions(EvalOptions):
    """Short-context benchmarks through lm_eval; --limit is documents of each task."""

    tasks: Annotated[tuple[str, ...], listed(str, "TASK,TASK,...")] = data_files.TASKS
    """The paper's, or any of lm_eval by name."""
    data_dir: Path | None = None
    """Folder of local files for the paper's tasks; without it lm_eval fetches all data."""
    include_path: Path | None = None
    """Folder of lm_eval task files (YAML) of your own. Paths of local data in them count from the
    task file."""
    apply_chat_template: bool = False
    """Asks in turns of User: and Assistant:, as models that were trained on chats expect."""
    log_samples: bool = False
    """Writes lm_eval's samples_<task>_*.jsonl beside its results_*.json."""
    fewshot: int | None = None
    """Replaces the number of examples in a prompt (MMLU 5, the paper's others 0) where a task
    allows it."""

    def __post_init__(self):
        super().__post_init__()
        if not self.tasks:
            raise ConfigError("--tasks is empty: name some, such as piqa arc_easy")
        if len(set(self.tasks)) < len(self.tasks):
            raise ConfigError(f"--tasks {' '.join(self.tasks)} names a task twice")
        if self.fewshot is not None and self.fewshot < 0:
            raise ConfigError(f"--fewshot is {self.fewshot}: it must not be negative")
        if self.include_path is not None and not self.include_path.is_dir():
            raise ConfigError(f"--include-path {self.include_path} is no folder of task files")
        if self.data_dir is not None:
            papers = tuple(name for name in self.tasks if name in data_files.TASKS)
            others = [name for name in self.tasks if name not in papers]
            if others and self.include_path is None:
                raise ConfigError(
                    f"--data-dir holds the paper's tasks only, not {', '.join(others)}: run these "
                    "without it, into another --output, or name their files with --include-path"
                )
            data_files.check_files(self.data_dir, papers)


def check_installed() -> None:
    """Raises ConfigError where lm_eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "eval.py short needs lm-evaluation-harness: pip install 'rwkvx-jax[eval]' "
            "(or pip install lm_eval)"
        )


class Asked(NamedTuple):
    """A document of a task; the hash of the task's data keeps answers on other data apart."""

    task: str
    document: int
    data: str


def evaluate(options: ShortOptions, models: Sequence[EvalModel], console: Console) -> Results:
    """Runs what is not answered yet, and keeps it in short.jsonl.

    Raises:
      ConfigError: lm_eval or data missing, malformed records, or a results file of another
        evaluation.
    """
    check_installed()
    found = load_tasks(options)
    counts = {name: len(task.eval_docs) for name, task in found.tasks.items()}
    data = {name: fingerprint(task, options.include_path) for name, task in found.tasks.items()}
    trials = [Asked(name, i, data[name]) for name, count in counts.items() for i in range(count)]
    settings = {"seed": options.seed, "fewshot": options.fewshot}
    task = Task(
        name="short",
        settings=settings | ({"chat_template": TEMPLATE} if options.apply_chat_template else {}),
        plan={"tasks": options.tasks, "documents": counts, "limit": options.limit},
        trials=trials,
        chosen=[t for t in trials if options.limit is None or t.document < options.limit],
        answer=partial(_answer, options, found, data),
        summarize=summarize,
        size=lambda trial: 0,  # how many tokens there are is known when lm_eval asks for them
    )
    results = runner.evaluate(task, options.output, models, console)
    for model in models if options.log_samples else ():
        first_does(
            partial(check_samples, options.output, model.checkpoint, counts),
            f"{options.output} can't be read",
        )
    return results


def _answer(
    options: ShortOptions,
    found: Benchmarks,
    data: dict[str, str],
    model: EvalModel,
    chosen: Sequence[Asked],
    progress: Progress,
) -> Iterator[list[Record]]:
    """All trials of one model; answers that its file holds are not computed again."""
    from rwkvx_jax.evals.short.answers import AnswerFile
    from rwkvx_jax.evals.short.harness import HarnessModel

    description = model.description
    identity = as_text([description[field] for field in IDENTITY_FIELDS])
    name = hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
    path = options.output / "short_answers" / f"{name}.jsonl"
    with AnswerFile.open(path) as answers:
        harness = HarnessModel(
            model,
            answers,
            prefill_chunk=options.prefill_chunk,
            batch=options.batch,
            start=partial(_begin, progress, model.label),
        )
        results, general = _evaluate(options, found, harness, model.checkpoint)
    first_does(
        lambda: write_results(options.output, results, general, options.log_samples),
        f"{options.output} can't be written",
    )
    yield [
        _trial(task, data[task], samples)
        for task, all_samples in results["samples"].items()
        for samples in _by_document(all_samples)
    ]


def _evaluate(options: ShortOptions, found: Benchmarks, harness: Any, checkpoint: str):
    """lm_eval's own results, as of its command, and its description of the run."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    tracker = EvaluationTracker()
    replaced = {name: getattr(options, name) for name in ("chunk_size", "top_k", "selector")}
    results = simple_evaluate(
        model=harness,
        model_args={"pretrained": checkpoint} | {k: v for k, v in replaced.items() if v},
        tasks=found.roots,
        task_manager=TaskManager(include_defaults=False),
        batch_size=options.batch,
        device=jax.default_backend(),
        limit=options.limit,
        bootstrap_iters=_BOOTSTRAPS,
        evaluation_tracker=tracker,
        apply_chat_template=options.apply_chat_template,
        random_seed=options.seed,
        numpy_random_seed=options.seed,
        torch_random_seed=options.seed,
        fewshot_random_seed=options.seed,
    )
    return results, tracker.general_config_tracker


def _begin(progress: Progress, label: str, what: str, total: int) -> Callable[[int], None]:
    """Begins to count the tokens of one kind of request; returns what is told of them."""
    progress.restart(f"{label}, {what}", total)
    return progress.advance


def _by_document(samples: Sequence[Record]) -> list[list[Record]]:
    """lm_eval's samples of each document: one for each filter of its answers."""
    documents: dict[int, list[Record]] = {}
    for sample in samples:
        documents.setdefault(sample["doc_id"], []).append(sample)
    return list(documents.values())


def _trial(task: str, data: str, samples: Sequence[Record]) -> Record:
    """The trial of one document; metrics of several filters are called "METRIC,FILTER"."""
    first = samples[0]
    several = len(samples) > 1
    metrics = {
        f"{name},{sample['filter']}" if several else name: _plain(sample[name])
        for sample in samples
        for name in sample["metrics"]
    }
    answers = [answer for (answer,) in first["resps"]]
    return {"task": task, "document": first["doc_id"], "data": data, "answers": answers} | {
        "metrics": metrics
    }


def _plain(value: Any) -> Any:
    """A metric of one document as JSON takes it."""
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return value.item() if isinstance(value, np.generic) else value


def run(options: ShortOptions, models: Sequence[EvalModel] | None = None) -> None:
    """The command: evaluates, writes short.jsonl and short.png, prints the paper's table."""

    def show(results: Results, models: Sequence[EvalModel], console: Console) -> None:
        runner.shows(draw, print_table)(results, models, console)
        for model in models:
            folder = folder_of(options.output, model.checkpoint)
            console.print(f"lm_eval's own results: {folder}", soft_wrap=True)

    check_installed()
    runner.run(options, evaluate, show, models)
