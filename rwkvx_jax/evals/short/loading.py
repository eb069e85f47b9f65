"""lm_eval's tasks for `eval.py short`: the paper's on local files, lm_eval's own, and a user's."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rwkvx_jax.config import ConfigError
from rwkvx_jax.evals.short import data as data_files
from rwkvx_jax.records import Record

_LOADERS = ("json", "csv", "text", "parquet", "arrow")  # of local files, in a task's dataset_path


class Chosen(Protocol):
    """Options that say which tasks; see `ShortOptions`."""

    tasks: tuple[str, ...]
    data_dir: Path | None
    include_path: Path | None
    fewshot: int | None
    seed: int


class Benchmarks(NamedTuple):
    """lm_eval's Task objects by name, and what lm_eval is to run: these, or groups of them."""

    tasks: dict[str, Any]
    roots: list[Any]


def load_tasks(options: Chosen) -> Benchmarks:
    """The tasks of a command; MMLU becomes one a subject.

    Raises:
      ConfigError: a malformed file, or a task that lm_eval does not know or can't fetch.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # read on import: its bars would tear ours
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # a process that runs JAX must not fork
    if options.data_dir is not None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read on import too
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.api.task import ConfigurableTask

    local = [n for n in options.tasks if options.data_dir is not None and n in data_files.TASKS]
    configs = [c for name in local for c in offline_configs(name, options.data_dir)]
    tasks = {config["task"]: ConfigurableTask(config=config) for config in configs}
    roots = list(tasks.values())
    if named := [name for name in options.tasks if name not in local]:
        found = _load_named(named, options)
        inner = {child for children in found["group_map"].values() for child in children}
        roots += [v for k, v in (found["groups"] | found["tasks"]).items() if k not in inner]
        tasks |= found["tasks"]
    for task in tasks.values():
        if options.fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=options.fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=options.seed)
    return Benchmarks(tasks, roots)


def _load_named(names: list[str], options: Chosen) -> dict[str, Any]:
    """Tasks and groups that lm_eval or --include-path has by name."""
    from datasets.exceptions import DatasetsError
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._factory import TaskFactory

    class Factory(TaskFactory):
        """lm_eval's takes the paths of local data from the folder in which it is started."""

        def _load_full_config(self, entry: Any, overrides: Any = None) -> Record:
            config = super()._load_full_config(entry, overrides)
            if _is_included(entry.yaml_path, options.include_path):
                return _beside(config, entry.yaml_path.parent)
            return config

    manager = TaskManager(
        include_path=options.include_path, include_defaults=options.data_dir is None
    )
    manager._factory = Factory()
    where = f" and --include-path {options.include_path}" if options.include_path else ""
    try:
        return manager.load(names)
    except ConfigError:
        raise
    except KeyError as error:
        raise ConfigError(
            f"{error.args[0]}; `lm_eval ls tasks`{where} tell which there are"
        ) from error
    except (OSError, ConnectionError) as error:
        raise ConfigError(
            f"lm_eval can't fetch the data of {', '.join(names)} ({error}): the paper's tasks "
            "also run on local files, see --data-dir"
        ) from error
    except (ValueError, DatasetsError) as error:
        raise ConfigError(f"lm_eval can't load {', '.join(names)}: {error}") from error


def _is_included(file: Path | None, folder: Path | None) -> bool:
    """Whether a task's file lies in --include-path."""
    return bool(file and folder) and folder.resolve() in file.resolve().parents


def _beside(config: Record, folder: Path) -> Record:
    """A task's config whose local data is looked for beside its file.

    Raises:
      ConfigError: there is none.
    """
    given = config.get("dataset_kwargs") or {}
    if config.get("dataset_path") not in _LOADERS:
        return config

    def placed(files: Any) -> Any:
        if isinstance(files, dict):
            return {split: placed(own) for split, own in files.items()}
        if isinstance(files, list):
            return [placed(own) for own in files]
        if not isinstance(files, str):
            raise ConfigError(f"task {config.get('task')}: {files!r} is no path of data")
        if "://" in files:
            return files
        if not glob.glob(str(folder / files)):
            raise ConfigError(f"task {config.get('task')}: its data {folder / files} is not there")
        return str(folder / files)

    paths = {name: placed(given[name]) for name in ("data_files", "data_dir") if name in given}
    return config | {"dataset_kwargs": given | paths}


def fingerprint(task: Any, include_path: Path | None) -> str:
    """Hash of a task's documents, and of its file where that is the user's own and may change, so
    that answers on other questions are never mixed in."""
    digest = hashlib.blake2b(digest_size=6)
    for doc in task.eval_docs:  # of any kind, NaN included: this is hashed, not stored
        digest.update(json.dumps(doc, sort_keys=True, default=str).encode())
    config = task.dump_config()
    source = (config.get("metadata") or {}).get("config_source")
    if _is_included(Path(source) if source else None, include_path):
        asked = {k: v for k, v in config.items() if k not in ("metadata", "dataset_kwargs")}
        digest.update(json.dumps(asked, sort_keys=True, default=str).encode())
    return digest.hexdigest()


class Served:
    """Records as lm_eval takes a data set; its results call it by its file."""

    def __init__(self, path: Path, splits: dict[str, list[Record]]):
        self._path = str(path)
        self._splits = lambda: splits  # lm_eval copies what a config holds, but no function

    def __call__(self, **metadata: Any) -> dict[str, Any]:
        import datasets

        return {k: datasets.Dataset.from_list(v) for k, v in self._splits().items()}

    def __str__(self) -> str:
        return self._path


def offline_configs(name: str, data_dir: Path) -> list[Record]:
    """lm_eval task configs of one of the paper's tasks on local files."""
    import yaml

    path, file = Path(__file__).parent / "tasks" / f"{name}.yaml", data_dir / f"{name}.jsonl"
    config = yaml.safe_load(path.read_text())
    records = data_files.read_records(file, name)
    if name != "mmlu":
        return [config | {"custom_dataset": Served(file, {"test": records})}]
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
                "custom_dataset": Served(file, {"test": of_subject(records), "dev": dev}),
            }
        )
    return configs
