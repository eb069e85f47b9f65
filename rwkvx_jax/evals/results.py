"""The results file of an evaluation: every trial, written while it runs, never lost, never rerun.

A file of records (records.py): a header says what was asked of which models, and each line below it
is one finished trial. It only grows: the same command run again finds its finished trials there,
and one that asks for more models or trials adds a header of its own. A command that would leave out
something that the file holds is refused. Summaries are computed when the file is read.
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from rwkvx_jax import records
from rwkvx_jax.config import ConfigError
from rwkvx_jax.evals.models import IDENTITY_FIELDS
from rwkvx_jax.hosts import first_does, first_tells, record_file
from rwkvx_jax.progress import Progress
from rwkvx_jax.records import Record

FORMAT = 2
_BEGINS = b'{"format": '
_NAMES = b'"identity"', b'"models"'  # in every header, should its beginning be damaged

_log = logging.getLogger(__name__)

Summarize = Callable[[list[Record]], Record]


class Contents:
    """What the lines of a results file say.

    Attributes:
      headers: in their order.
      models: descriptions by label, in the order of their first mention; that of a model with
        trials is the one they were made with.
    """

    def __init__(self, path: Path):
        self._path = path
        self.headers: list[Record] = []
        self.models: dict[str, Record] = {}
        self._trials: dict[str, dict[tuple, Record]] = {}

    def take(self, lines: Iterable[Any]) -> None:
        """Adds lines.

        Raises:
          ConfigError: a line of another shape, or of another model under the same name.
        """
        doubles = 0
        try:
            for line in lines:
                if "format" in line:
                    self._take_header(line)
                else:
                    doubles += not self._take_trial(line)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ConfigError(
                f"{self._path} exists but has another shape than a results file ({error!r}): use "
                "another --output, or remove it"
            ) from error
        if doubles:
            _log.warning("%s: %d trials stand twice; the first count", self._path, doubles)

    def _take_header(self, header: Record) -> None:
        if header["format"] != FORMAT:
            raise ConfigError(
                f"{self._path} has format {header['format']!r}, and this version reads {FORMAT}: "
                "use another --output"
            )
        for field, kind in (("task", str), ("settings", dict), ("key", list), ("identity", list)):
            if not isinstance(header[field], kind):
                raise TypeError(f"{field} is {header[field]!r}")
        self.headers.append(header)
        for model in header["models"]:
            if not self._trials.get(model["label"]):
                self.models[model["label"]] = model

    def _take_trial(self, line: Record) -> bool:
        """Adds a trial; False where its model has it already."""
        header = self.headers[-1]
        label = line["model"]
        model = {m["label"]: m for m in header["models"]}[label]
        for field in header["identity"]:
            if model[field] != self.models[label][field]:
                raise ConfigError(f"{self._path} holds trials of two models named {label!r}")
        key = tuple(line[field] for field in header["key"])
        trials = self._trials.setdefault(label, {})
        if not trials:
            self.models[label] = model
        if key in trials:
            return False
        trials[key] = {name: value for name, value in line.items() if name != "model"}
        return True

    def trials(self, label: str) -> list[Record]:
        """Finished trials of a model, in the order of their keys."""
        return [trial for _, trial in sorted(self._trials.get(label, {}).items())]

    def keys(self, label: str) -> Set[tuple]:
        """Keys of the finished trials of a model."""
        return self._trials.get(label, {}).keys()

    def document(self, summarize: Summarize) -> Record:
        """The newest header; its models are all of the file's, each with `summary` and `trials`."""
        models = []
        for label, description in self.models.items():
            trials = self.trials(label)
            models.append(description | {"summary": summarize(trials), "trials": trials})
        return self.headers[-1] | {"models": models}


def read_contents(path: Path) -> Contents | None:
    """A results file as it is on the disk; None for a file of anything else.

    Raises:
      ConfigError: a damaged one.
    """
    begins = records.head(path, 4096)  # much else is JSON lines
    if not begins.startswith(_BEGINS) and not all(name in begins for name in _NAMES):
        return None
    contents = Contents(path)
    contents.take(records.read(path, "remove it, or evaluate again"))
    return contents if contents.headers else None


@dataclass(frozen=True)
class Task:
    """What is asked, and how it is answered.

    Attributes:
      name: of the task; that of its files has _ for each -.
      settings: what every trial depends on beside its key and its model, as JSON.
      plan: what this run was asked to do, as JSON.
      trials: keys of all trials, named tuples, in their order.
      chosen: those that this run is to finish.
      answer: (model, some of the trials, progress) -> their records, batch by batch: each with the
        fields of its key. It reports to the progress what `size` counts.
      summarize: summary of a model's trials.
      size: what a trial adds to the progress.
      unit: what that counts.
      identity: fields of a model's description on which its trials depend.
      alone: whether the results file may hold no trials but these.
    """

    name: str
    settings: Record
    plan: Record
    trials: Sequence[Any]
    chosen: Sequence[Any]
    answer: Callable[[Any, Sequence[Any], Progress], Iterable[list[Record]]]
    summarize: Summarize
    size: Callable[[Any], int]
    unit: str = "tokens"
    identity: Sequence[str] = IDENTITY_FIELDS
    alone: bool = True


class Results:
    """Trials by model, on disk.

    Attributes:
      path: of the file.
    """

    def __init__(self, path: Path, task: Task, models: Sequence[Record]):
        """Takes over what an earlier run left in the file.

        Args:
          path: of the file; its name ends in .jsonl.
          task: whose trials it is to hold.
          models: their descriptions, each with a "label".

        Raises:
          ConfigError: the file holds something else; says what differs.
        """
        self.path, self._summarize, self._warned = path, task.summarize, False
        self._planned = set(task.trials) if task.alone else None
        header = {
            "format": FORMAT,
            "task": task.name,
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "versions": {"jax": jax.__version__, "rwkvx-jax": _own_version()},
            "device": jax.devices()[0].device_kind,
            "settings": task.settings,
            "plan": task.plan,
            "key": task.trials[0]._fields,
            "identity": task.identity,
            "models": models,
        }
        self._header: Record = json.loads(records.as_text(header))
        self._file, self._contents = record_file(path), Contents(path)
        first_does(lambda: _refuse_other_forms(path), f"{path} can't be read")
        if first_tells(path.exists, f"{path} can't be read"):
            with self._file.locked():
                self._take_over()
        self._written = any(_without_run(h) == _without_run(self._header) for h in self._headers)

    @property
    def _headers(self) -> list[Record]:
        return self._contents.headers

    @property
    def document(self) -> Record:
        """What the file says (see `Contents.document`), under the header of this run."""
        shown = self._contents.document(self._summarize) if self._headers else {}
        models = {model["label"]: model for model in shown.get("models", [])}
        empty = {"summary": self._summarize([]), "trials": []}
        own = {m["label"]: models.get(m["label"], m | empty) for m in self._header["models"]}
        return self._header | {"models": list((own | models).values())}

    def trials(self, label: str) -> list[Record]:
        """Finished trials of a model."""
        return self._contents.trials(label)

    def summary(self, label: str) -> Record:
        return self._summarize(self.trials(label))

    def finished(self, label: str) -> set[tuple]:
        """Keys of the finished trials of a model."""
        return set(self._contents.keys(label))

    def add(self, label: str, trials: Iterable[Record]) -> None:
        """Appends finished trials; those that the file holds already are left out.

        Raises:
          ConfigError: trials with numbers that are not finite: they are left out, the others kept;
            or another process wrote trials there that this evaluation must not hold: none is saved.
        """
        trials = list(trials)
        if good := [trial for trial in trials if not records.not_finite(trial)]:
            self._append(label, good)
        for trial in trials:
            if name := records.not_finite(trial):
                key = ", ".join(f"{field} {trial[field]}" for field in self._header["key"])
                raise ConfigError(
                    f"{label}: {name} of {self._header['task']} trial {key} is not finite (NaN or "
                    f"infinity): {records.NOT_FINITE_REMEDY}"
                )

    def _append(self, label: str, trials: Sequence[Record]) -> None:
        with self._file.locked():
            if self._take_over() and not self._warned:
                _log.warning("%s: another process writes it too; all is kept", self.path)
                self._warned = True
            finished = self._contents.keys(label)
            key = lambda trial: tuple(trial[field] for field in self._header["key"])
            lines = [{"model": label} | t for t in trials if key(t) not in finished]
            if not lines:
                return
            # Trials belong to the models of the header above them.
            if not self._written or self._headers[-1]["models"] != self._header["models"]:
                lines.insert(0, self._header)
            self._file.append(lines)
            self._contents.take(lines)
            self._written = True

    def _take_over(self) -> bool:
        """Reads what others wrote, if this run's plan covers all of it; whether there was any."""
        lines = self._file.new(begins=_BEGINS)
        if lines and not self._headers:
            self._check_kind(lines[0])
        self._contents.take(lines)
        if lines and (problems := self._problems()):
            raise ConfigError(
                f"{self.path} holds trials of another evaluation (file -> now):\n  "
                + "\n  ".join(problems)
                + "\nA file takes more models and more trials, never fewer or other ones: use "
                "another --output, or remove the file."
            )
        return bool(lines)

    def _check_kind(self, first: Any) -> None:
        expected = {"task": self._header["task"], "format": FORMAT}
        found = {k: first.get(k) for k in expected} if isinstance(first, dict) else {}
        if found != expected:
            raise ConfigError(
                f"{self.path} exists but is no results file of {expected}: use another --output"
            )

    def _problems(self) -> list[str]:
        """What forbids to add this run's trials to those in the file."""
        problems: list[str] = []
        for header in self._headers:
            problems += _changes("", header["settings"], self._header["settings"])
            problems += _changes("fields of a trial", header["key"], self._header["key"])
        own = {model["label"]: model for model in self._header["models"]}
        for label, before in self._contents.models.items():
            if not self._contents.keys(label):
                continue
            if label not in own:
                problems.append(f"it also holds {label!r}, which this command does not name")
                continue
            for field in self._header["identity"]:
                old, new = before.get(field), own[label].get(field)
                problems += _changes(f"{label}: {field}", old, new)
            outside = self.finished(label) - self._planned if self._planned is not None else ()
            if outside:
                first = dict(zip(self._header["key"], min(outside), strict=True))
                problems.append(
                    f"{label}: {len(outside)} of its trials are not part of this command, "
                    f"such as {first}"
                )
        return list(dict.fromkeys(problems))


def _without_run(header: Record) -> Record:
    """A header without what differs from run to run of one command."""
    return {k: v for k, v in header.items() if k not in ("command", "versions", "device")}


def _refuse_other_forms(path: Path) -> None:
    """Refuses to begin a file anew beside the same results in another form."""
    packed, old = path.with_name(f"{path.name}.gz"), path.with_suffix(".json")
    if path.exists():
        return
    if packed.exists():
        raise ConfigError(f"{packed} holds these results, compressed: unpack it with gunzip first")
    if old.exists():
        raise ConfigError(f"{old} is a results file of version 0.1: use another --output")


def _changes(name: str, old: Any, new: Any) -> list[str]:
    """Lines "field: old -> new" for every difference of two JSON values."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in sorted(old.keys() | new.keys())
            for line in _changes(f"{name}.{key}".lstrip("."), old.get(key), new.get(key))
        ]
    return [] if old == new else [f"{name}: {old!r} -> {new!r}"]


def _own_version() -> str:
    try:
        return metadata.version("rwkvx-jax")
    except metadata.PackageNotFoundError:  # run from a plain copy of the sources
        return "unknown"
