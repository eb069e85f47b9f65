"""The training loop: stages in order in one process, resumed exactly where a run stopped."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from rwkvx_jax.checkpoint import (
    CheckpointFailed,
    Checkpoints,
    check_resumable,
    progress_record,
)
from rwkvx_jax.config import Config, ConfigError, RunConfig, Stage, UserError, to_dict
from rwkvx_jax.data.pipeline import OpenData, batches, open_data
from rwkvx_jax.hosts import check_joined, global_batch, host_rows, stop_signal
from rwkvx_jax.model import Params
from rwkvx_jax.sharding import batch_sharding, check_fits, make_mesh
from rwkvx_jax.training.curriculum import Position, next_stage, stage_ends
from rwkvx_jax.training.metrics import MetricsWriter, Reporter
from rwkvx_jax.training.probe import make_probe
from rwkvx_jax.training.step import StageProgram, TrainState, initial_params, stage_program

CONFIG_FILE = "config.json"


class TrainingStopped(UserError, RuntimeError):
    """Training can't go on; the message says at which step and what was kept."""


class Trace:
    """Writes the trace of `run.profile_steps`; it may begin late, after a resume, and end early."""

    def __init__(self, config: RunConfig, workdir: Path):
        self._first, self._end = config.profile_range() or (0, 0)
        self._directory = str(workdir / "tensorboard")
        self._open = False

    def before(self, step: int) -> None:
        """To be called before step `step`, counted from 0."""
        if self._first <= step < self._end and not self._open:
            jax.profiler.start_trace(self._directory)
            self._open = True

    def after(self, step: int, state: TrainState) -> None:
        """To be called after step `step` with what it made."""
        if step + 1 == self._end and self._open:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        if self._open:
            jax.profiler.stop_trace()
            self._open = False


@dataclass
class Run:
    """What all stages of one call of `fit` share."""

    config: Config
    workdir: Path
    mesh: jax.sharding.Mesh
    data: OpenData
    checkpoints: Checkpoints
    writer: MetricsWriter
    reporter: Reporter
    trace: Trace
    stopping: Callable[[int], bool]  # steps done -> whether to save and stop: SIGTERM came

    def save(self, position: Position, state: TrainState) -> None:
        record = progress_record(self.config, *position, self.data.fingerprint)
        optimizer = {"moments": state.opt_state, "guard": state.guard}
        self.checkpoints.save(position.total(self.config), state.params, optimizer, record)
        self.writer.upload()


def fit(config: Config, workdir: Path, initial_params: Params | None = None) -> Params:
    """Trains all stages of `config`, continuing from the newest checkpoint of `workdir`.

    Args:
      config: the experiment.
      workdir: where checkpoints, metrics and the data cache live; created if need be. All hosts
        see it; an `epath.Path` may lie in a bucket.
      initial_params: parameters to start from (a plain RWKV-7 is expanded where a stage wants
        the hybrid); None initialises them. Not used when a checkpoint is there.

    Returns:
      The final parameters.

    Raises:
      ConfigError: anything in the config, the data or the workdir that can't work.
      TrainingStopped: a loss that is not finite, a checkpoint that can't be written, or SIGTERM.
    """
    with _compilation_cache(config.run.compilation_cache):
        return _fit(config, workdir, initial_params)


def _fit(config: Config, workdir: Path, initial_params: Params | None) -> Params:
    check_joined()
    mesh = make_mesh(config.mesh)
    check_fits(config, mesh)
    if config.run.profile_steps and not isinstance(workdir, Path):
        raise ConfigError(
            f"run.profile_steps: a trace can't be written to {workdir}; use a --workdir on a disk"
        )
    first = jax.process_index() == 0
    reporter = Reporter(active=first)
    _prepare_workdir(workdir, active=first)
    data = open_data(config.data, workdir=workdir, vocab_size=config.model.vocab_size)
    for stage in config.stages:  # sequences longer than the corpus fail here, before any work
        data.dataset(stage, "train")
        if config.run.eval_batches:
            data.dataset(stage, "valid")
    run_config = config.run
    with (
        jax.set_mesh(mesh),
        Checkpoints(
            workdir, keep=run_config.keep_checkpoints, keep_steps=stage_ends(config)
        ) as checkpoints,
    ):
        latest = checkpoints.latest()
        if latest is not None:
            check_resumable(checkpoints.progress(latest), config, data.fingerprint, workdir)
        if first:
            (workdir / CONFIG_FILE).write_text(json.dumps(to_dict(config), indent=2) + "\n")
        writer = MetricsWriter(workdir, resume_step=latest or 0, active=first)
        trace = Trace(config.run, workdir)
        kind = mesh.devices.flat[0].device_kind
        hosts = f" of {jax.process_count()} hosts" if jax.process_count() > 1 else ""
        reporter.message(f"{mesh.size} {kind} device(s){hosts}, workdir {workdir}")
        with closing(writer), closing(trace), stop_signal() as stopping:
            run = Run(config, workdir, mesh, data, checkpoints, writer, reporter, trace, stopping)
            try:
                return _run_stages(run, latest, initial_params)
            except (CheckpointFailed, OSError) as error:
                raise TrainingStopped(
                    f"{error}\nThe last good checkpoint in {workdir} is of step "
                    f"{checkpoints.latest()}. Once the cause is mended, the same command continues."
                ) from error


def _run_stages(run: Run, latest: int | None, params: Params | None) -> Params:
    config = run.config
    position, opt_state = Position(0, 0), None
    if latest is not None:
        progress = run.checkpoints.progress(latest)
        position = Position(progress["stage"], progress["stage_step"])
        program = stage_program(config, config.stages[position.stage], run.mesh)
        target = program.abstract_state()
        params, optimizer = run.checkpoints.restore(
            latest, target.params, {"moments": target.opt_state, "guard": target.guard}
        )
        run.reporter.message(
            f"continuing after step {latest}: stage {config.stages[position.stage].name}, "
            f"{position.stage_step} of its steps done"
        )
        state = program.start(
            params, optimizer["moments"], step=position.stage_step, guard=optimizer["guard"]
        )
    elif params is None:
        params = initial_params(config.stage_model(config.stages[0]), run.mesh)
    for index in range(position.stage, len(config.stages)):
        stage = config.stages[index]
        if index > position.stage or latest is None:
            program, state = next_stage(config, index, run.mesh, params, opt_state)
            position = Position(index, 0)
        if position.stage_step < stage.steps:
            state = _run_stage(run, program, state, position)
        params, opt_state = state.params, state.opt_state
        latest = None
    run.checkpoints.wait()
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
    evaluate = _evaluator(run, program, stage)
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
                    evaluate(total + 1, state.params)
                due = total + 1 == _due(total + 1, config.run.checkpoint_every)
                stopping = run.stopping(total + 1)
                if last or due or stopping:
                    watch.drain()  # a bad step is found before it is saved
                    run.save(position, state)
                if stopping:
                    run.checkpoints.wait()
                    raise TrainingStopped(
                        f"stopped by SIGTERM after step {total + 1}; it is saved: the same "
                        "command continues"
                    )
    finally:
        run.reporter.end_stage()
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
        if in_row := int(values.pop("in_row")):
            self._handle_bad_step(total, values, in_row)
        rate = self._stage.seq_len * self._stage.global_batch / seconds
        if total == _due(total, self._run.config.run.log_every) or in_row:
            self._run.writer.write(total, self._stage.name, values)
            timing = {"step_seconds": seconds, "data_wait_seconds": self._wait}
            self._run.writer.write_timing(total, {**timing, "tokens_per_second": rate})
        self._run.reporter.step(position.stage_step, values["loss"], rate)

    def _handle_bad_step(self, total: int, values: dict[str, float], in_row: int) -> None:
        loss, norm = values["objective"], values["grad_norm"]
        kind = "spike" if math.isfinite(loss) and math.isfinite(norm) else "not finite"
        what = f"{kind}: loss {loss}, gradient norm {norm} at step {total}"
        run = self._run.config.run
        if run.bad_step == "stop" or in_row > run.max_skipped:
            self._run.checkpoints.wait()
            remedy = "continue past single bad steps with --run.bad-step skip"
            if run.bad_step == "skip":
                remedy = f"allow more than {run.max_skipped} in a row with --run.max-skipped"
            raise TrainingStopped(
                f"{what} (stage {self._stage.name}); parameters were not changed by it, the last "
                f"checkpoint is of step {self._run.checkpoints.latest()}. Lower peak_lr, or "
                f"{remedy}"
            )
        self._run.reporter.message(f"skipped a step: {what}")


def _evaluator(run: Run, program: StageProgram, stage: Stage):
    """A function (step, params) that reports held-out loss and the passkey probe."""
    config = run.config.run
    probe = None
    if config.probe_trials:
        probe = make_probe(
            program.model, run.data.tokenizer, stage.seq_len, config.probe_trials, seed=0
        )

    def evaluate(step: int, params: Params) -> None:
        values = {}
        if config.eval_batches:
            values["held_out_loss"] = _held_out_loss(run, program, stage, params)
        if probe is not None:
            values["passkey_accuracy"] = probe(params)
        if values:
            run.writer.write(step, stage.name, values)
            text = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
            run.reporter.message(f"step {step} ({stage.name}): {text}")

    return evaluate


def _held_out_loss(run: Run, program: StageProgram, stage: Stage, params: Params) -> float:
    """Mean loss over the first held-out batches, the same ones every time."""
    sharding = batch_sharding(run.mesh, stage.global_batch)
    iterator = batches(
        run.data.dataset(stage, "valid"),
        stage.global_batch,
        start=0,
        rows=host_rows(sharding, stage.global_batch),
    )
    total = count = 0.0
    with closing(iterator):
        for _, local in zip(range(run.config.run.eval_batches), iterator, strict=False):
            batch = global_batch(sharding, local, stage.global_batch)
            loss, valid = program.eval_step(params, batch)
            total, count = total + float(loss), count + float(valid)
    return total / max(count, 1.0)


def _prepare_workdir(workdir: Path, *, active: bool) -> None:
    if not active:
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / CONFIG_FILE).touch()
    except OSError as error:
        raise ConfigError(
            f"workdir {workdir} can't be written ({error}): choose another with --workdir"
        ) from error


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
