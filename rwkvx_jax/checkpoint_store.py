"""The step directories of a run: written whole, verified whenever they are read, never deleted.

A step directory holds three items: `params`, `optimizer` and `progress` (JSON: config, stage,
steps, data fingerprint). Orbax writes into a temporary directory and renames it, so a killed
process never leaves a half checkpoint as the latest. Beside its record `progress` holds a seal: the
step, a digest of every array, and a SHA-256 of all that.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint.checkpoint_managers import preservation_policy

from rwkvx_jax.config import ConfigError, UserError
from rwkvx_jax.digest import (
    changed,
    not_finite,
    seal,
    summarize,
    unseal,
)
from rwkvx_jax.hosts import first_does
from rwkvx_jax.orbax_messages import forget_frames, only_our_messages
from rwkvx_jax.storage import bucket_errors, in_bucket, one_line

CHECKPOINTS = "checkpoints"
SET_ASIDE = "checkpoints-set-aside"
_ITEMS = ("params", "optimizer", "progress")
_RECORD = {"config", "stage", "stage_step", "data"}  # its keys, see `checkpoint.progress_record`
_SETTLE_SECONDS = 0.5  # in which reads and writes that have failed end

_log = logging.getLogger(__name__)


class CheckpointFailed(UserError, RuntimeError):
    """A checkpoint could not be written (full disk, permissions); earlier ones are untouched."""


class NotWritten(CheckpointFailed):
    """The storage refused a checkpoint: trying again may help."""


class DamagedCheckpoint(ConfigError):
    """A checkpoint is not what was saved; the message says what is wrong and where to go on."""


class _Damage(Exception):
    """What is wrong with a step directory."""


class Checkpoints:
    """The checkpoints of one work directory, numbered by steps over all stages."""

    def __init__(self, workdir: Path, *, keep: int | None = None, keep_steps: Sequence[int] = ()):
        """Opens the checkpoints of `workdir`.

        Args:
          workdir: of the run.
          keep: newest checkpoints kept when others are saved; None: only to read.
          keep_steps: steps whose checkpoints are kept for good.
        """
        self._workdir = workdir
        directory = workdir / CHECKPOINTS
        self._directory = directory if in_bucket(workdir) else directory.absolute()
        if keep is None:
            self._options = ocp.CheckpointManagerOptions(
                read_only=True, save_interval_steps=0, create=False
            )
        else:
            policy = preservation_policy.AnyPreservationPolicy(
                [preservation_policy.LatestN(keep), preservation_policy.CustomSteps(keep_steps)]
            )
            self._options = ocp.CheckpointManagerOptions(
                preservation_policy=policy, cleanup_tmp_directories=True
            )
        self._failed = False  # a write: the manager may be in any state
        self._held = contextlib.ExitStack()
        self._held.enter_context(only_our_messages())
        try:
            self._manager = self._open()
        except BaseException:
            self._held.close()
            raise

    def _open(self) -> ocp.CheckpointManager:
        with bucket_errors(self._directory):
            return ocp.CheckpointManager(self._directory, options=self._options, item_names=_ITEMS)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        with self._held:
            try:
                with self._writing():
                    self._manager.close()
            except CheckpointFailed:
                if kind is None:  # else that error says more
                    raise
            finally:
                if self._failed:
                    self._settle()

    def _settle(self) -> None:
        """Waits for what failed reads and writes have left behind, and removes half checkpoints."""
        time.sleep(_SETTLE_SECONDS)
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
            gc.collect()
        # Where others write, half checkpoints are theirs.
        if (
            not self._options.read_only
            and not in_bucket(self._directory)
            and jax.process_index() == 0
        ):
            for half in self._directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(half, ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps of which there is a checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        return max(self.steps(), default=None)

    def choose(self, step: int | None) -> int | None:
        """`step` itself, or the newest one; None if there is none at all.

        Raises:
          ConfigError: there is no checkpoint of `step`.
        """
        if step is None:
            self._warn_of_strangers()
            return self.latest()
        if step not in (steps := self.steps()):
            raise ConfigError(
                f"{self._workdir} has no checkpoint of step {step}; it has those of {steps}"
            )
        return step

    def _warn_of_strangers(self) -> None:
        """Says which entries beside the checkpoints are none: a renamed one would be missed."""
        with bucket_errors(self._directory):
            entries = list(self._directory.iterdir()) if self._directory.exists() else []
        known = lambda name: name.isdecimal() or name.startswith(".") or "orbax" in name
        strangers = sorted(entry.name for entry in entries if not known(entry.name))
        if strangers and jax.process_index() == 0:
            _log.warning("%s: %s left out, no steps of a run", self._directory, strangers)

    def save(self, step: int, params: Any, optimizer: Any, progress: dict[str, Any]) -> None:
        """Copies the arrays and writes them in the background; a step already there is kept.

        Raises:
          CheckpointFailed: a value that is not finite.
          NotWritten: this write, or the one before in the background, failed.
        """
        if self._failed:
            self._begin_anew()
        if step in self._manager.all_steps():
            return
        items = {"params": params, "optimizer": optimizer}
        summaries = {item: summarize(tree) for item, tree in items.items()}
        for item, of_item in summaries.items():
            if problem := not_finite(of_item):
                raise CheckpointFailed(f"step {step} was not saved: {item} has {problem}")
        digests = {
            item: {name: summary.digest for name, summary in of_item.items()}
            for item, of_item in summaries.items()
        }
        record = seal(progress, {"step": step, "digests": digests})
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(params),
                    optimizer=ocp.args.StandardSave(optimizer),
                    progress=ocp.args.JsonSave(record),
                ),
            )

    def writing(self) -> bool:
        """Whether a write in the background goes on; to be asked in jobs of one process only."""
        return self._manager.is_saving_in_progress()

    def begin_anew(self) -> None:
        """Lets the next `save` begin with what is there then, as it does where a write failed; to
        be called where that of another process failed."""
        self._failed = True

    def _begin_anew(self) -> None:
        with self._writing():
            with contextlib.suppress(Exception):  # told already
                self._manager.close()
            self._manager = self._open()
        self._failed = False

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
          NotWritten: a write in the background failed.
        """
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Gives failed writes one type: Orbax raises whatever its storage layers raise."""
        try:
            yield
        except Exception as error:  # bucket libraries have kinds of their own
            self._failed = True
            cause = ": ".join(one_line(error).split(": ")[-2:])  # the last of a chain of places
            forget_frames(error)
            raise NotWritten(f"no checkpoint could be written: {cause}") from error

    # ------------------------------------------------------------------------------------ reading

    def progress(self, step: int) -> dict[str, Any]:
        """The record that `save` was given.

        Raises:
          DamagedCheckpoint: it is not there, not what was saved, or of another step.
        """
        with self._explained(step, ("params", "optimizer")):
            return self._record(step)[0]

    def restore(self, step: int, params: Any, optimizer: Any) -> tuple[Any, Any]:
        """Reads parameters and moments into the shapes and shardings of abstract trees.

        Raises:
          DamagedCheckpoint: they are not there, or not what was saved.
        """
        with self._explained(step, ("params", "optimizer")):
            read = self._read(step, {"params": params, "optimizer": optimizer})
        return read["params"], read["optimizer"]

    def restore_params(self, step: int, params: Any) -> Any:
        """Reads parameters alone; as `restore`."""
        with self._explained(step, ("params",)):
            return self._read(step, {"params": params})["params"]

    def _record(self, step: int) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """The verified record of a step, and its digests by item, if it has any."""
        args = ocp.args.Composite(progress=ocp.args.JsonRestore())
        with _reading("progress"):
            record = self._manager.restore(step, args=args)["progress"]
        try:
            record, sealed = unseal(record)
        except ValueError as error:
            raise _Damage(f"progress: {error}") from error
        if not record.keys() >= _RECORD:
            raise _Damage("progress: it is no record of a training run")
        if sealed is None:
            _warn_of_older_form(str(self._workdir))
            return record, None
        if sealed["step"] != step:
            saved = sealed["step"]
            raise _Damage(f"its directory is named {step}, but it was saved as step {saved}")
        return record, sealed["digests"]

    def _read(self, step: int, targets: dict[str, Any]) -> dict[str, Any]:
        """Items of a step, compared with their digests."""
        digests, found = self._record(step)[1], {}
        for item, target in targets.items():
            with _reading(item):
                args = ocp.args.Composite(**{item: ocp.args.StandardRestore(target)})
                found[item] = self._manager.restore(step, args=args)[item]
            summaries = summarize(found[item])
            whole = digests is None
            problem = not_finite(summaries) if whole else changed(summaries, digests[item])
            if problem:
                raise _Damage(f"{item}: {problem}")
        return found

    @contextlib.contextmanager
    def _explained(self, step: int, items: Sequence[str]) -> Iterator[None]:
        """Makes one error of damage, with the newest step whose `items` are intact."""
        try:
            yield
        except _Damage as damage:
            self._failed = True
            raise DamagedCheckpoint(
                f"checkpoint {step} in {self._directory} is damaged: {damage}. Nothing was changed."
                f"\n{self._remedy(step, items)}"
            ) from damage

    def _remedy(self, step: int, items: Sequence[str]) -> str:
        older = [s for s in self.steps() if s < step][::-1]
        if jax.process_count() > 1:  # that some failed is known to some only: none may go on alone
            intact, what = older[:1], "The next older one (not verified)"
        else:
            intact = list(filter(lambda s: self._intact(s, items), older))[:1]
            what = "The newest intact one"
        if not intact:
            return "No older one is intact: train anew in another --workdir."
        return (
            f"{what} is of step {intact[0]}: to continue training from it add --resume-step "
            f"{intact[0]} (later ones are moved to {SET_ASIDE}, not deleted); to read it, name "
            f"{self._workdir / CHECKPOINTS / str(intact[0])}"
        )

    def _intact(self, step: int, items: Sequence[str]) -> bool:
        """Whether items of a step can be read and are what was saved."""
        try:
            self._read(step, {item: self._stored_shapes(step, item) for item in items})
        except _Damage:
            return False
        return True

    def _stored_shapes(self, step: int, item: str) -> Any:
        """A target for all arrays of an item, from what is stored of it."""
        with _reading(item):
            metadata = ocp.StandardCheckpointHandler().metadata(self._directory / str(step) / item)
            return jax.tree.map(_spread, metadata.tree)

    # ----------------------------------------------------------------------------- setting aside

    def set_aside(self, after: int) -> list[Path]:
        """Moves checkpoints of steps beyond `after` out of the way; returns where to.

        To be called by all processes; the first one moves them.

        Raises:
          ConfigError: they can't be moved.
        """
        later = [step for step in self.steps() if step > after]
        moved = [_free_name(self._workdir / SET_ASIDE / str(step)) for step in later]

        def move() -> None:
            for step, target in zip(later, moved, strict=True):
                target.parent.mkdir(parents=True, exist_ok=True)
                (self._directory / str(step)).rename(target)

        if later:
            first_does(move, f"checkpoints of steps {later} can't be moved to {SET_ASIDE}")
            self._manager.reload()
        return moved


def _free_name(path: Path) -> Path:
    """`path`, or with the first number behind it that makes it new."""
    names = (path if n == 0 else path.with_name(f"{path.name}.{n}") for n in range(10**6))
    return next(name for name in names if not name.exists())


def _spread(leaf: Any) -> jax.ShapeDtypeStruct:
    """The target of an array of which only metadata are known: over all devices where possible."""
    devices = np.asarray(jax.devices())
    even = [d for d, size in enumerate(leaf.shape) if size and size % devices.size == 0]
    spec = PartitionSpec(*["all" if d in even[:1] else None for d in range(len(leaf.shape))])
    sharding = NamedSharding(Mesh(devices, ("all",)), spec)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


@functools.cache
def _warn_of_older_form(workdir: str) -> None:
    _log.warning(
        "the checkpoints of %s were saved by an older version, without digests: damage can't be "
        "told from what was saved",
        workdir,
    )


# ----------------------------------------------------------------------------------------- failures


@contextlib.contextmanager
def _reading(item: str) -> Iterator[None]:
    """Gives failed reads one type: Orbax raises whatever its storage layers raise."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError):  # of this machine, not of the files
        raise
    except Exception as error:
        text = str(error).strip("'\"").splitlines() or [""]
        forget_frames(error)
        raise _Damage(f"{item}: {type(error).__name__}: {text[0][:300]}") from error
