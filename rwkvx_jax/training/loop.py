"""The training loop: stages in order in one process, resumed exactly where a run stopped."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from rwkvx_jax.checkpoint import check_resumable, progress_record
from rwkvx_jax.checkpoint_store import CheckpointFailed, Checkpoints
from rwkvx_jax.config import Config, Stage, to_dict
from rwkvx_jax.data.pipeline import OpenData, batches, open_data
from rwkvx_jax.hosts import check_joined, first_does, global_batch, host_rows, stop_signal
from rwkvx_jax.model import Params
from rwkvx_jax.sharding import batch_sharding, check_fits, make_mesh
from rwkvx_jax.storage import exclusive, make_folder, write_whole
from rwkvx_jax.training.curriculum import Position, next_stage, stage_ends
from rwkvx_jax.training.evaluate import check_targets, make_evaluator
from rwkvx_jax.training.memory import check_memory
from rwkvx_jax.training.metrics import MetricsWriter, Reporter
from rwkvx_jax.training.saver import Saver
from rwkvx_jax.training.step import StageProgram, TrainState, initial_params, stage_program
from rwkvx_jax.training.trace import Trace

CONFIG_FILE = "config.json"
LOCK_FILE = "train.lock"


class TrainingStopped(RuntimeError):
    """Training can't go on; the message says at which step and what was kept."""


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
    reporter: Reporter
    trace: Trace
    stopping: Callable[[int], str]  # steps done -> signal because of which to save and stop

    def save(self, position: Position, state: TrainState, *, wait: bool) -> None:
        record = progress_record(self.config, *position, self.data.fingerprint)
        optimizer = {"moments": state.opt_state, "guard": state.guard}
        step = position.total(self.config)
        self.saver.save(step, state.params, optimizer, record, wait=wait)
        self.writer.upload()

    def report_evaluation(self, step: int, stage: Stage, values: dict[str, float]) -> None:
        if values:
            self.writer.write(step, stage.name, values)
            text = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
            self.reporter.message(f"step {step} ({stage.name}): {text}")


class Start(NamedTuple):
    """What a checkpoint gives: where a run goes on, and with what."""

    step: int  # over all stages
    position: Position
    program: StageProgram
    state: TrainState


def fit(
    config: Config,
    workdir: Path,
    initial_params: Params | None = None,
    *,
    resume_step: int | None = None,
) -> Params:
    """Trains all stages of `config`, continuing from the newest checkpoint of `workdir`.

    Args:
      config: the experiment.
      workdir: where checkpoints, metrics and the data cache live; created if need be. All hosts
        see it; an `epath.Path` may lie in a bucket.
      initial_params: parameters to start from (a plain RWKV-7 is expanded where a stage wants
        the hybrid); None initialises them. Not used when a checkpoint is there.
      resume_step: continue from the checkpoint of this step instead; later ones are moved to
        `checkpoints-set-aside` in `workdir`.

    Returns:
      The final parameters.

    Raises:
      ConfigError: anything in the config, the data or the workdir that can't work; a damaged
        checkpoint (DamagedCheckpoint); another training in `workdir`.
      TrainingStopped: a bad step, a checkpoint that can't be written, or SIGTERM, SIGINT or SIGHUP.
    """
    with _compilation_cache(config.run.compilation_cache):
        return _fit(config, workdir, initial_params, resume_step)


def _fit(
    config: Config, workdir: Path, initial_params: Params | None, resume_step: int | None
) -> Params:
    check_joined()
    mesh = make_mesh(config.mesh)
    check_fits(config, mesh)
    check_memory(config, mesh)
    run = config.run
    with ExitStack() as held:
        first_does(
            lambda: held.enter_context(_owned(workdir)),
            f"workdir {workdir} can't be written (choose another with --workdir)",
        )
        data = open_data(config.data, workdir=workdir, vocab_size=config.model.vocab_size)
        check_targets(config, data)  # sequences longer than the corpus fail here, before any work
        held.enter_context(jax.set_mesh(mesh))
        checkpoints = held.enter_context(
            Checkpoints(workdir, keep=run.keep_checkpoints, keep_steps=stage_ends(config))
        )
        reporter = Reporter(active=jax.process_index() == 0)
        kind = mesh.devices.flat[0].device_kind
        hosts = f" of {jax.process_count()} hosts" if jax.process_count() > 1 else ""
        start = _start(config, mesh, data, checkpoints, workdir, resume_step)
        reporter.message(f"{mesh.size} {kind} device(s){hosts}, workdir {workdir}")
        if start is not None:
            for path in checkpoints.set_aside(after=start.step):
                reporter.message(f"moved the checkpoint of a later step to {path}")
            stage, done = config.stages[start.position.stage].name, start.position.stage_step
            reporter.message(
                f"continuing after step {start.step}: stage {stage}, {done} of its steps done"
            )
        writer = _prepare_records(config, workdir, 0 if start is None else start.step)
        trace = Trace(run, workdir)
        with closing(writer), closing(trace), stop_signal() as stopping:
            saver = Saver(checkpoints, workdir, run.storage_patience)
            parts = mesh, data, checkpoints, saver, writer, reporter, trace, stopping
            try:
                return _run_stages(Run(config, workdir, *parts), start, initial_params)
            except (CheckpointFailed, OSError) as error:
                raise TrainingStopped(
                    f"{error}\nThe last good checkpoint in {workdir} is of step "
                    f"{checkpoints.latest()}. Once the cause is mended, the same command continues."
                ) from error


def _start(
    config: Config,
    mesh: jax.sharding.Mesh,
    data: OpenData,
    checkpoints: Checkpoints,
    workdir: Path,
    resume_step: int | None,
) -> Start | None:
    """Reads a checkpoint, changing nothing; None where there is none yet."""
    step = checkpoints.choose(resume_step)
    if step is None:
        return None
    progress = checkpoints.progress(step)
    check_resumable(progress, config, data.fingerprint, workdir)
    position = Position(progress["stage"], progress["stage_step"])
    program = stage_program(config, config.stages[position.stage], mesh)
    target = program.abstract_state()
    params, optimizer = checkpoints.restore(
        step, target.params, {"moments": target.opt_state, "guard": target.guard}
    )
    state = program.start(
        params, optimizer["moments"], step=position.stage_step, guard=optimizer["guard"]
    )
    return Start(step, position, program, state)


def _prepare_records(config: Config, workdir: Path, step: int) -> MetricsWriter:
    """Writes the config, and opens the metrics of a run that goes on after `step`."""
    writer = MetricsWriter(workdir, active=jax.process_index() == 0)

    def prepare() -> None:
        text = json.dumps(to_dict(config), indent=2) + "\n"
        write_whole(workdir / CONFIG_FILE, text.encode())
        writer.open(step)

    first_does(prepare, f"workdir {workdir} can't be written")
    return writer


def _run_stages(run: Run, start: Start | None, params: Params | None) -> Params:
    config, opt_state = run.config, None
    if start is None and params is None:
        params = initial_params(config.stage_model(config.stages[0]), run.mesh)
    for index in range(0 if start is None else start.position.stage, len(config.stages)):
        if start is not None:
            _, position, program, state = start
        else:
            position = Position(index, 0)
            program, state = next_stage(config, index, run.mesh, params, opt_state)
        if position.stage_step < config.stages[index].steps:
            state = _run_stage(run, program, state, position)
        params, opt_state, start = state.params, state.opt_state, None
    return params


def _run_stage(
    run: Run, program: StageProgram, state: TrainState, position: Position
) -> TrainState:
    config, stage = run.config, run.config.stages[position.stage]
    run.reporter.message(
        f"stage {stage.name}: {stage.steps} steps of {stage.global_batch} x {stage.seq_len} "
        f"tokens, {stage.trainable} parameters, loss {stage.loss}"
    )
    iterator = batches(
        run.data.dataset(stage, "train"),
        stage.global_batch,
        start=position.stage_step * stage.global_batch,
        rows=host_rows(batch_sharding(run.mesh, stage.global_batch), stage.global_batch),
        workers=config.run.data_workers,
    )
    evaluate = make_evaluator(config, stage, program, run.data, run.mesh)
    watch = _Watch(run, stage)
    run.reporter.start_stage(stage.name, position.stage_step, stage.steps)
    try:
        with closing(iterator):
            while position.stage_step < stage.steps:
                total = position.total(config)
                run.trace.before(total)
                batch = watch.fetch(iterator)
                state, metrics = program.train_step(state, batch)
                run.trace.after(total, state)
                position = position._replace(stage_step=position.stage_step + 1)
                last = position.stage_step == stage.steps
                watch.submit(position, metrics)
                if last or total + 1 == _due(total + 1, config.run.eval_every):
                    watch.drain()
                    run.report_evaluation(total + 1, stage, evaluate(state.params))
                due = total + 1 == _due(total + 1, config.run.checkpoint_every)
                stopping = run.stopping(total + 1)
                if last or due or stopping or run.saver.retry_due():
                    watch.drain()  # a bad step is found before it is saved
                    end = last and position.stage == len(config.stages) - 1
                    run.save(position, state, wait=bool(stopping) or end)
                if stopping:
                    raise TrainingStopped(
                        f"stopped by {stopping} after step {total + 1}; it is saved: the same "
                        "command continues"
                    )
    finally:
        run.reporter.end_stage()
        watch.end()
    return state


def _due(step: int, every: int) -> int:
    """`step` if it is a multiple of `every`, else -1 (0 = never)."""
    return step if every and step % every == 0 else -1


class _Watch:
    """Looks at each step's metrics one step late, so that looking never stalls the device."""

    def __init__(self, run: Run, stage: Stage):
        self._run, self._stage = run, stage
        self._pending: tuple[Position, dict[str, Any]] | None = None
        self._sharding = batch_sharding(run.mesh, stage.global_batch)
        self._clock = time.perf_counter()
        self._wait = 0.0
        self._without_target = 0

    def fetch(self, iterator: Iterator[dict[str, np.ndarray]]) -> dict[str, jax.Array]:
        start = time.perf_counter()
        batch = next(iterator)
        self._wait = time.perf_counter() - start
        return global_batch(self._sharding, batch, self._stage.global_batch)

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
        finite_update = bool(values.pop("finite_update"))
        self._count_without_target(total, values)
        if in_row := int(values.pop("in_row")):
            self._handle_bad_step(total, values, in_row, finite_update)
        rate = self._stage.seq_len * self._stage.global_batch / seconds
        self._run.reporter.step(position.stage_step, values["loss"], rate)
        if total == _due(total, self._run.config.run.log_every) or in_row:
            if values["without_target"] == self._stage.global_batch:
                del values["loss"], values["objective"]  # there is none
            self._run.writer.write(total, self._stage.name, values)
            timing = {"step_seconds": seconds, "data_wait_seconds": self._wait}
            self._run.writer.write_timing(total, {**timing, "tokens_per_second": rate})

    def _count_without_target(self, total: int, values: dict[str, float]) -> None:
        """Counts samples that add nothing to the loss, and says so at the first."""
        count, batch = int(values["without_target"]), self._stage.global_batch
        if count and not self._without_target:
            self._run.reporter.message(
                f"{count} of the {batch} samples of step {total} have no target: their answers lie "
                f"beyond seq_len {self._stage.seq_len}, or they have none"
            )
        self._without_target += count

    def end(self) -> None:
        """To be called at the end of the stage."""
        if self._without_target:
            self._run.reporter.message(
                f"{self._without_target} samples of stage {self._stage.name} had no target"
            )

    def _handle_bad_step(
        self, total: int, values: dict[str, float], in_row: int, finite_update: bool
    ) -> None:
        loss, norm = values["objective"], values["grad_norm"]
        advice = "Lower peak_lr"
        if values["without_target"] == self._stage.global_batch:
            kind = f"no sample with a target at step {total}"
            advice = f"Raise seq_len (it is {self._stage.seq_len})"
        elif not (math.isfinite(loss) and math.isfinite(norm)):
            kind = f"not finite: loss {loss}, gradient norm {norm} at step {total}"
        elif not finite_update:
            kind = f"update not finite (loss {loss}, gradient norm {norm}) at step {total}"
            advice = "Raise optimizer.eps or lower peak_lr"
        else:
            kind = f"spike: loss {loss}, gradient norm {norm} at step {total}"
        run = self._run.config.run
        if run.bad_step == "stop" or in_row > run.max_skipped:
            self._run.checkpoints.wait()
            remedy = "continue past single bad steps with --run.bad-step skip"
            if run.bad_step == "skip":
                remedy = f"allow more than {run.max_skipped} in a row with --run.max-skipped"
            raise TrainingStopped(
                f"{kind} (stage {self._stage.name}); parameters were not changed by it, the last "
                f"checkpoint is of step {self._run.checkpoints.latest()}. {advice}, or {remedy}"
            )
        self._run.reporter.message(f"skipped a step: {kind}")


@contextmanager
def _owned(workdir: Path) -> Iterator[None]:
    """Makes a work directory, of which no other process is the owner as long as this lasts."""
    make_folder(workdir)
    with exclusive(
        workdir / LOCK_FILE,
        busy=f"another training runs in {workdir}: wait for its end, or use another --workdir",
    ):
        yield


@contextmanager
def _compilation_cache(directory: str):
    """Keeps compiled programs in `directory`, or where the process keeps them already."""
    if not directory:
        yield
        return
    before = jax.config.jax_compilation_cache_dir
    compilation_cache.reset_cache()  # a cache that was opened before stays with its directory
    compilation_cache.set_cache_dir(directory)
    try:
        yield
    finally:
        compilation_cache.reset_cache()
        jax.config.update("jax_compilation_cache_dir", before)
