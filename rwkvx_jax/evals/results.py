"""The results file of an evaluation: every trial, written while it runs, never lost, never rerun.

The file is replaced as a whole after each batch of trials, under a lock, so a killed process leaves
the last complete state. The same command run again finds its finished trials there. A file only
grows: it takes more models and more trials of the same settings, and refuses a command that would
leave something it holds out of its summary. What another process writes there meanwhile is kept
too. Numbers that are not finite never get in.
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from rwkvx_jax.config import ConfigError
from rwkvx_jax.evals import jsonfiles
from rwkvx_jax.storage import exclusive, in_bucket

FORMAT = 1

_log = logging.getLogger(__name__)

Record = dict[str, Any]


class Results:
    """Trials by model, on disk.

    document: what the file holds: task, command, versions, settings (equal in every run that
    adds to it), plan (the newest run's), and panels, one a model: its description, a summary and
    its trials.
    """

    def __init__(
        self,
        path: Path,
        *,
        task: str,
        settings: Record,
        plan: Record,
        key_fields: Sequence[str],
        planned: Iterable[tuple],
        panels: Sequence[Record],
        identity_fields: Sequence[str],
        summarize: Callable[[list[Record]], Record],
    ):
        """Starts the file, or takes over what an earlier run left in it.

        Args:
          path: of the JSON file.
          task: its name.
          settings: what every trial depends on beside its key and its model.
          plan: what this run was asked to do.
          key_fields: fields of a trial that tell it apart from all others of its model.
          planned: keys of all trials that the plan contains.
          panels: descriptions of the models, each with a "label".
          identity_fields: those parts of a description on which a trial depends.
          summarize: summary of a model's trials.

        Raises:
          ConfigError: the file holds something else; says what differs.
        """
        self.path, self._key_fields, self._summarize = path, tuple(key_fields), summarize
        self._planned, self._identity_fields = set(planned), tuple(identity_fields)
        self.document: Record = {
            "task": task,
            "format": FORMAT,
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "versions": {"jax": jax.__version__, "rwkvx-jax": _own_version()},
            "device": jax.devices()[0].device_kind,
            "settings": settings,
            "plan": plan,
            "panels": [dict(panel, summary={}, trials=[]) for panel in panels],
        }
        self._seen, self._warned = _state(path), False
        if self._seen:
            self._take_over(self._read())
        path.parent.mkdir(parents=True, exist_ok=True)

    def trials(self, label: str) -> list[Record]:
        """Finished trials of a model."""
        return self._panel(label)["trials"]

    def summary(self, label: str) -> Record:
        return self._summarize(self.trials(label))

    def finished(self, label: str) -> set[tuple]:
        """Keys of the finished trials of a model."""
        return {self._key(trial) for trial in self.trials(label)}

    def add(self, label: str, trials: Iterable[Record]) -> None:
        """Appends finished trials and writes the file.

        Raises:
          ConfigError: trials with numbers that are not finite; they are left out, the others kept.
        """
        trials = list(trials)
        good = [trial for trial in trials if not jsonfiles.not_finite(trial)]
        if good:
            self._append(label, good)
            self.save()
        for trial in trials:
            if name := jsonfiles.not_finite(trial):
                key = ", ".join(f"{field} {trial[field]}" for field in self._key_fields)
                raise ConfigError(
                    f"{label}: {name} of {self.document['task']} trial {key} is not finite (NaN or "
                    f"infinity): {jsonfiles.NOT_FINITE_REMEDY}"
                )

    def save(self) -> None:
        """Replaces the file in one step; a reader sees the old or the new one, never a half.

        Raises:
          ConfigError: another process wrote trials there that this evaluation must not hold; the
            trials of this batch are not saved then.
        """
        with exclusive(self.path.with_name(f"{self.path.name}.lock")):
            if _state(self.path) not in (None, self._seen):
                if not self._warned:
                    _log.warning("%s: another process writes it too; all is kept", self.path)
                self._warned = True
                self._take_over(self._read())
            self._replace()

    def _replace(self) -> None:
        for panel in self.document["panels"]:
            panel["trials"].sort(key=self._key)
            panel["summary"] = self._summarize(panel["trials"])
        jsonfiles.write(self.path, self.document)
        self._seen = _state(self.path)

    def _panel(self, label: str) -> Record:
        return next(p for p in self.document["panels"] if p["label"] == label)

    def _append(self, label: str, trials: Iterable[Record]) -> None:
        """Adds the trials that are not there yet."""
        finished = self.finished(label)
        self.trials(label).extend(t for t in trials if self._key(t) not in finished)

    def _key(self, trial: Record) -> tuple:
        return tuple(trial[field] for field in self._key_fields)

    def _read(self) -> Record:
        old = jsonfiles.read(self.path)
        expected = {"task": self.document["task"], "format": FORMAT}
        found = {k: old.get(k) for k in expected} if isinstance(old, dict) else {}
        if found != expected:
            raise ConfigError(
                f"{self.path} exists but is no results file of {expected}: use another --output"
            )
        return old

    def _take_over(self, old: Record) -> None:
        """Adds the trials of another run, if this run's plan covers all of them."""
        try:
            problems = self._merge(old)
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{self.path} exists but has another shape than a results file ({error!r}): use "
                "another --output"
            ) from error
        if problems:
            raise ConfigError(
                f"{self.path} holds trials of another evaluation (file -> now):\n  "
                + "\n  ".join(problems)
                + "\nA file takes more models and more trials, never fewer or other ones: use "
                "another --output, or remove the file."
            )

    def _merge(self, old: Record) -> list[str]:
        """Adds the trials of another run; what forbids it."""
        problems = _changes("", old["settings"], self.document["settings"])
        labels = {panel["label"]: panel for panel in self.document["panels"]}
        for before in old["panels"]:
            label = before["label"]
            if not before["trials"]:
                continue
            if label not in labels:
                problems.append(f"it also holds {label!r}, which this command does not name")
                continue
            for field in self._identity_fields:
                problems += _changes(f"{label}: {field}", before[field], labels[label][field])
            outside = [t for t in before["trials"] if self._key(t) not in self._planned]
            if outside:
                first = {field: outside[0][field] for field in self._key_fields}
                problems.append(
                    f"{label}: {len(outside)} of its trials are not part of this command, "
                    f"such as {first}"
                )
            self._append(label, before["trials"])
        return problems


def _changes(name: str, old: Any, new: Any) -> list[str]:
    """Lines "field: old -> new" for every difference of two JSON values."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in sorted(old.keys() | new.keys())
            for line in _changes(f"{name}.{key}".lstrip("."), old.get(key), new.get(key))
        ]
    new = json.loads(jsonfiles.as_text(new))  # tuples become lists, as they did in the file
    return [] if old == new else [f"{name}: {old!r} -> {new!r}"]


def _state(file: Path) -> tuple[int, ...] | None:
    """What changes whenever the file is replaced or written; None where there is none."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    if in_bucket(file):
        return int(status.mtime or 0), status.length
    return status.st_ino, status.st_mtime_ns, status.st_size


def _own_version() -> str:
    try:
        return metadata.version("rwkvx-jax")
    except metadata.PackageNotFoundError:  # run from a plain copy of the sources
        return "unknown"
