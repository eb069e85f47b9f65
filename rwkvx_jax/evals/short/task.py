"""Short-context benchmarks through lm-evaluation-harness, in the layout of the paper's table.

The eight tasks of the paper run offline on local files (`--data-dir`, see data_files.py); every
other lm_eval task runs by its name, with data from the Hugging Face hub. lm_eval is an optional
extra, and never brings torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from rwkvx_jax.config import ConfigError
from rwkvx_jax.evals import runner
from rwkvx_jax.evals.models import IDENTITY_FIELDS, EvalModel, EvalOptions
from rwkvx_jax.evals.results import Results
from rwkvx_jax.evals.runner import Task
from rwkvx_jax.evals.short import data as data_files
from rwkvx_jax.evals.short.table import draw, print_table, summarize
from rwkvx_jax.progress import Progress
from rwkvx_jax.records import Record, as_text


@dataclass(frozen=True, kw_only=True)
class ShortOptions(EvalOptions):
    """Short-context benchmarks through lm_eval; --limit is documents of each task."""

    tasks: tuple[str, ...] = data_files.TASKS
    """The paper's, or any of lm_eval by name."""
    data_dir: Path | None = None
    """Folder of local files for the paper's tasks; without it lm_eval fetches all data."""
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
        if self.data_dir is not None:
            others = [name for name in self.tasks if name not in data_files.TASKS]
            if others:
                raise ConfigError(
                    f"--data-dir holds the paper's tasks only, not {', '.join(others)}: run these "
                    "without it, into another --output"
                )
            data_files.check_files(self.data_dir, self.tasks)


def check_installed() -> None:
    """Raises ConfigError where lm_eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "eval.py short needs lm-evaluation-harness: pip install 'rwkvx-jax[eval]' "
            "(or pip install lm_eval)"
        )


def load_tasks(options: ShortOptions) -> dict[str, Any]:
    """lm_eval's Task objects by name; MMLU becomes one a subject.

    Raises:
      ConfigError: a malformed file, or a task that lm_eval does not know or can't fetch.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # read on import: its bars would tear ours
    if options.data_dir is not None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # likewise
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

    if options.data_dir is not None:
        configs = [c for name in options.tasks for c in offline_configs(name, options.data_dir)]
        tasks = {config["task"]: ConfigurableTask(config=config) for config in configs}
    else:
        try:
            tasks = TaskManager().load(list(options.tasks))["tasks"]
        except KeyError as error:
            raise ConfigError(f"{error.args[0]}; `lm_eval ls tasks` lists them") from error
        except (OSError, ConnectionError) as error:
            raise ConfigError(
                f"lm_eval can't fetch the data of {', '.join(options.tasks)} ({error}): the "
                "paper's tasks also run on local files, see --data-dir"
            ) from error
    for task in tasks.values():
        if options.fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=options.fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=options.seed)
    return tasks


def offline_configs(name: str, data_dir: Path) -> list[dict[str, Any]]:
    """lm_eval task configs of one of the paper's tasks on local files."""
    import datasets
    import yaml

    path = Path(__file__).parent / "tasks" / f"{name}.yaml"
    config = yaml.safe_load(path.read_text())
    records = data_files.read_records(data_dir / f"{name}.jsonl", name)
    serve = lambda splits, **_: {k: datasets.Dataset.from_list(v) for k, v in splits.items()}
    if name != "mmlu":
        return [config | {"custom_dataset": partial(serve, {"test": records})}]
    examples = data_files.read_records(data_dir / "mmlu_dev.jsonl", name)
    configs = []
    for subject in sorted({record["subject"] for record in records}):
        of_subject = lambda rows, subject=subject: [r for r in rows if r["subject"] == subject]
        if len(dev := of_subject(examples)) < config["num_fewshot"]:
            raise ConfigError(
                f"{data_dir / 'mmlu_dev.jsonl'} has {len(dev)} records of the subject {subject}: "
                f"MMLU's prompts show {config['num_fewshot']}"
            )
        spoken = subject.replace("_", " ")
        configs.append(
            config
            | {
                "task": f"mmlu_{subject}",
                "description": "The following are multiple choice questions (with answers) about "
                f"{spoken}.\n\n",
                "custom_dataset": partial(serve, {"test": of_subject(records), "dev": dev}),
            }
        )
    return configs


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
    tasks = load_tasks(options)
    counts = {name: len(task.eval_docs) for name, task in tasks.items()}
    data = {name: _fingerprint(task) for name, task in tasks.items()}
    trials = [Asked(name, i, data[name]) for name, count in counts.items() for i in range(count)]
    task = Task(
        name="short",
        settings={"seed": options.seed, "fewshot": options.fewshot},
        plan={"tasks": options.tasks, "documents": counts, "limit": options.limit},
        trials=trials,
        chosen=[t for t in trials if options.limit is None or t.document < options.limit],
        answer=partial(_answer, options, tasks, data),
        summarize=summarize,
        size=lambda trial: 0,  # how many tokens there are is known when lm_eval asks for them
    )
    return runner.evaluate(task, options.output, models, console)


def _fingerprint(task: Any) -> str:
    """Hash of a task's documents, so that answers on other data are never mixed in."""
    digest = hashlib.blake2b(digest_size=6)
    for doc in task.eval_docs:  # of any kind, NaN included: this is hashed, not stored
        digest.update(json.dumps(doc, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _answer(
    options: ShortOptions,
    tasks: dict[str, Any],
    data: dict[str, str],
    model: EvalModel,
    chosen: Sequence[Asked],
    progress: Progress,
) -> Iterator[list[Record]]:
    """All trials of one model; answers that its file holds are not computed again."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from rwkvx_jax.evals.short.harness import AnswerFile, HarnessModel

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
        found = simple_evaluate(
            model=harness,
            tasks=list(tasks.values()),
            task_manager=TaskManager(include_defaults=False),
            limit=options.limit,
            bootstrap_iters=0,
            random_seed=options.seed,
            numpy_random_seed=options.seed,
            fewshot_random_seed=options.seed,
        )
    yield [
        _trial(task, data[task], samples)
        for task, all_samples in found["samples"].items()
        for samples in _by_document(all_samples)
    ]


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


def run(options: ShortOptions) -> None:
    """The command: evaluates, writes short.jsonl and short.png, prints the paper's table."""

    def show(results: Results, models: Sequence[EvalModel], console: Console) -> None:
        tables = partial(print_table, results, console)
        runner.show(results, console, partial(draw, results), tables)

    check_installed()
    runner.run(options, evaluate, show)
