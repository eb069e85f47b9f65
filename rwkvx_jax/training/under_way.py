"""A run that is under way: what its stages share, and a look at every step that it makes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from rwkvx_jax.checkpoint import progress_record
from rwkvx_jax.checkpoint_store import CheckpointFailed, Checkpoints
from rwkvx_jax.config import Config, Stage, UserError
from rwkvx_jax.data.pipeline import OpenData
from rwkvx_jax.hosts import first_tells, global_batch
from rwkvx_jax.lora import merged
from rwkvx_jax.modules.trees import Params
from rwkvx_jax.progress import Progress
from rwkvx_jax.sharding import batch_sharding
from rwkvx_jax.training.bad_steps import explain_bad_step
from rwkvx_jax.training.curriculum import Position, stage_ends
from rwkvx_jax.training.evaluate import Tasks, Trained
from rwkvx_jax.training.metrics import TASKS, MetricsWriter
from rwkvx_jax.training.saver import Saver
from rwkvx_jax.training.step import StageProgram, TrainState
from rwkvx_jax.training.timing import RunClock
from rwkvx_jax.training.trace import Trace
from rwkvx_jax.training.watchdog import Watchdog, step_timeout


class TrainingStopped(UserError, RuntimeError):
    """Training can't go on; the message says at which step and what was kept."""


class _Heard(Exception):
    """A signal, by name, that ends what is done between two steps."""


def stopped(signal: str, step: int) -> TrainingStopped:
    """The error that ends a run when a signal has come and a step has been saved."""
    return TrainingStopped(
        f"stopped by {signal} after step {step}; it is saved: the same command continues"
    )


@dataclass
class Run:
    """What all stages of one call of `fit` share."""

    config: Config
    workdir: Path
    mesh: jax.sharding.Mesh
    data: OpenData
    checkpoints: Checkpoints
    saver: Saver
    writer: MetricsWriter
    console: Console
    trace: Trace
    clock: RunClock
    stopping: Callable[[], str]  # signal because of which to save and stop now, or ""
    reached: Position  # of the last step that was reported
    tasks: Tasks | None  # beside each held-out loss

    def save(self, position: Position, state: TrainState, *, wait: bool) -> None:
        record = progress_record(self.config, *position, self.data.fingerprint)
        step = position.total(self.config)
        self.saver.save(step, state.params, state.stored_optimizer(), record, wait=wait)

    def save_records(self, step: int) -> None:
        """To be called with each checkpoint: what a resume reads beside it."""
        self.writer.write_timing(step, self.clock.line())
        self.writer.upload()

    def evaluates(self, step: int) -> bool:
        """Whether a step is followed by held-out losses and tasks."""
        return step in stage_ends(self.config) or due(step, self.config.run.eval_every)

    def owes_tasks(self, step: int) -> bool:
        """Whether the run goes on from a step whose tasks were not finished."""
        if self.tasks is None or not self.evaluates(step):
            return False
        return step != first_tells(lambda: self.writer.tasks_step, "metrics.jsonl can't be read")

    def run_tasks(self, step: int, stage: Stage, program: StageProgram, params: Params) -> str:
        """Asks `run.eval_tasks` of the parameters of a step, of which there is a checkpoint.

        Returns:
          The signal that ended them too early; "" where they are finished and reported.
        """
        if self.tasks is None:
            return ""
        whole = merged(params, stage.lora, keep=True)
        length, tokenizer = self.config.trained_length(step), self.data.tokenizer
        try:
            values = self.tasks(
                Trained(program.model, whole, tokenizer, step, length, self._check_signal)
            )
        except _Heard as heard:
            return str(heard)
        self.report_evaluation(step, stage, values, tasks=len(self.config.run.eval_tasks))
        return ""

    def _check_signal(self) -> None:
        if signal := self.stopping():
            raise _Heard(signal)

    def report_evaluation(
        self, step: int, stage: Stage, values: dict[str, float], tasks: int = 0
    ) -> None:
        """Writes and prints what an evaluation has found; `tasks`: how many gave these values."""
        if values or tasks:
            counted = {TASKS: tasks} if tasks else {}
            self.writer.write(step, stage.name, counted | values, group="eval")
        if values:
            text = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
            self.console.print(f"step {step} ({stage.name}): {text}")

    def report_end(self) -> None:
        done, tokens = self.reached.total(self.config), self.reached.tokens(self.config)
        self.console.print(
            f"{done:,} of {stage_ends(self.config)[-1]:,} steps done, {tokens:,} tokens; "
            f"{self.clock.summary()}; {kept(self.checkpoints)} in {self.workdir}"
        )


def kept(checkpoints: Checkpoints) -> str:
    """What a run that stops leaves, as a clause."""
    if (step := checkpoints.latest()) is None:
        return "there is no checkpoint yet"
    return f"the last checkpoint is of step {step}"


def due(step: int, every: int) -> bool:
    """Whether `step` is a multiple of `every` (0: never)."""
    return every > 0 and step % every == 0


class StepWatch:
    """Looks at each step's metrics one step late, so that looking never stalls the device."""

    def __init__(self, run: Run, stage: Stage, position: Position, bar: Progress):
        self._run, self._stage, self._bar = run, stage, bar
        self._pending: tuple[Position, dict[str, Any]] | None = None
        self._sharding = batch_sharding(run.mesh, stage.global_batch)
        self._clock = time.perf_counter()
        self._compiling = 0.0  # seconds of the step that is open
        self._compiled = False
        self._without_target = 0
        first = f"step {position.total(run.config) + 1}"
        self._dog = Watchdog(step_timeout(run.config.run), stage.name, first)

    def fetch(self, iterator: Iterator[dict[str, np.ndarray]]) -> dict[str, jax.Array]:
        with self._run.clock.spending("data_wait"):
            batch = next(iterator)
        return global_batch(self._sharding, batch, self._stage.global_batch)

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """For the call of a step, which compiles the first time."""
        if self._compiled:
            yield
            return
        begin = time.perf_counter()
        with self._dog.paused():
            yield
        self._compiled = True
        self._compiling = time.perf_counter() - begin

    @contextmanager
    def interrupted(self, what: str) -> Iterator[None]:
        """Reports the step that is open; what is done inside counts as `what`, not as a step."""
        self.drain()
        then = self._dog.waiting_for
        self._dog.finished(f"the {what} before {then}")
        with self._run.clock.spending(what):
            yield
        self._dog.finished(then)
        self._clock = time.perf_counter()

    @contextmanager
    def unhurried(self) -> Iterator[None]:
        """For what takes as long as it takes, inside of `interrupted`."""
        with self._dog.paused():
            yield

    def submit(self, position: Position, metrics: dict[str, jax.Array]) -> None:
        self.drain()
        self._pending = position, metrics

    def drain(self) -> None:
        """Reports the step that is still open, if any, and stops the run if it went wrong."""
        if self._pending is None:
            return
        (position, metrics), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        total = position.total(self._run.config)
        self._dog.finished(f"step {total + 1}")
        self._run.reached = position
        finite_update = bool(values.pop("finite_update"))
        self._count_without_target(total, values)
        if skips := int(values.pop("consecutive_skips")):
            self._handle_bad_step(total, values, skips, finite_update)
        self._run.clock.step(seconds, self._compiling, kept=not skips)
        first, self._compiling = self._compiling > 0, 0.0
        rate = self._stage.seq_len * self._stage.global_batch / seconds
        self._bar.advance(1, f"loss {values['loss']:.4f}, {rate:,.0f} tokens/s")
        if first:
            self._bar.start_clock()
        if due(total, self._run.config.run.log_every) or skips:
            if values["without_target"] == self._stage.global_batch:
                del values["loss"], values["objective"]  # there is none
            values["tokens_seen"] = position.tokens(self._run.config)
            self._run.writer.write(total, self._stage.name, values, group="train")
            self._run.writer.write_timing(total, self._run.clock.line())

    def _count_without_target(self, total: int, values: dict[str, float]) -> None:
        """Counts samples that add nothing to the loss, and says so at the first."""
        count, batch = int(values["without_target"]), self._stage.global_batch
        if count and not self._without_target:
            self._run.console.print(
                f"{count} of the {batch} samples of step {total} have no target: their answers lie "
                f"beyond seq_len {self._stage.seq_len}, or they have none"
            )
        self._without_target += count

    def end(self) -> None:
        """To be called at the end of the stage."""
        self._dog.close()
        if self._without_target:
            self._run.console.print(
                f"{self._without_target} samples of stage {self._stage.name} had no target"
            )

    def _handle_bad_step(
        self, total: int, values: dict[str, float], skips: int, finite_update: bool
    ) -> None:
        kind, advice = explain_bad_step(values, self._stage, total, finite_update)
        run = self._run.config.run
        if run.bad_step == "stop" or skips > run.max_skipped:
            with contextlib.suppress(CheckpointFailed):  # that the step is bad says more
                self._run.checkpoints.wait()
            remedy = "continue past single bad steps with --run.bad-step skip"
            if run.bad_step == "skip":
                remedy = f"allow more than {run.max_skipped} in a row with --run.max-skipped"
            raise TrainingStopped(
                f"{kind} (stage {self._stage.name}); parameters were not changed by it, "
                f"{kept(self._run.checkpoints)}. {advice}, or {remedy}"
            )
        self._run.console.print(f"skipped a step: {kind}")
