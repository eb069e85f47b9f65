"""The training loop: stages in order in one process, resumed exactly where a run stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache
from rich.console import Console

from pallas_kernels.chips import peak_flops
from rwkvx_jax.checkpoint import check_resumable
from rwkvx_jax.checkpoint_store import CheckpointFailed, Checkpoints
from rwkvx_jax.config import Config, ConfigError, to_dict
from rwkvx_jax.data.pipeline import OpenData, batches, open_data
from rwkvx_jax.hosts import check_joined, first_does, host_rows, stop_signal
from rwkvx_jax.lora import merged
from rwkvx_jax.modules.trees import Params
from rwkvx_jax.progress import Progress
from rwkvx_jax.sharding import batch_sharding, check_fits, make_mesh
from rwkvx_jax.storage import exclusive, make_folder, write_whole
from rwkvx_jax.training.curriculum import Position, next_stage, stage_ends
from rwkvx_jax.training.evaluate import Tasks, check_targets, make_evaluator
from rwkvx_jax.training.initial import load_initial_params
from rwkvx_jax.training.memory import check_memory, describe_trainable
from rwkvx_jax.training.metrics import MetricsWriter
from rwkvx_jax.training.model_flops import step_flops
from rwkvx_jax.training.saver import Saver
from rwkvx_jax.training.step import (
    StageProgram,
    TrainState,
    from_stored_optimizer,
    initial_params,
    stage_program,
)
from rwkvx_jax.training.timing import RunClock
from rwkvx_jax.training.trace import Trace
from rwkvx_jax.training.under_way import (
    Run,
    StepWatch,
    TrainingStopped,
    due,
    kept,
    stopped,
)

CONFIG_FILE = "config.json"
LOCK_FILE = "train.lock"


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
    init_from: str | Path | None = None,
    resume_step: int | None = None,
    tasks: Tasks | None = None,
) -> Params:
    """Trains all stages of `config`, continuing from the newest checkpoint of `workdir`.

    Args:
      config: the experiment.
      workdir: where checkpoints, metrics and the data cache live; created if need be. All hosts
        see it; an `epath.Path` may lie in a bucket.
      initial_params: parameters to start from (a plain RWKV-7 is expanded where a stage wants
        the hybrid); None initialises them. Not used when a checkpoint is there.
      init_from: a workdir, .safetensors or .pth to read them from, straight onto the mesh; not
        even looked at when a checkpoint is there.
      resume_step: continue from the checkpoint of this step instead; later ones are moved to
        `checkpoints-set-aside` in `workdir`.
      tasks: `rwkvx_jax.eval_tasks.EvalTasks(config.run.eval_tasks, workdir)`, where there are some.

    Returns:
      The final parameters; adapters of the last stage are added to their matrices.

    Raises:
      ConfigError: anything in the config, the data or the workdir that can't work; a damaged
        checkpoint (DamagedCheckpoint); another training in `workdir`.
      ConversionError: `init_from` is a damaged file.
      TrainingStopped: a bad step, a checkpoint that can't be written, or SIGTERM, SIGINT or SIGHUP.
    """
    if config.run.eval_tasks and tasks is None:
        raise ConfigError(
            f"run.eval_tasks is {config.run.eval_tasks}: call fit with tasks=rwkvx_jax.eval_tasks."
            "EvalTasks(config.run.eval_tasks, workdir), or leave it empty"
        )
    with _compilation_cache(config.run.compilation_cache):
        return _fit(config, workdir, initial_params, init_from, resume_step, tasks)


def _fit(
    config: Config,
    workdir: Path,
    initial_params: Params | None,
    init_from: str | Path | None,
    resume_step: int | None,
    tasks: Tasks | None,
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
        console = _open_console()
        kind = mesh.devices.flat[0].device_kind
        hosts = f" of {jax.process_count()} hosts" if jax.process_count() > 1 else ""
        start = _start(config, mesh, data, checkpoints, workdir, resume_step)
        console.print(f"{mesh.size} {kind} device(s){hosts}, workdir {workdir}")
        if start is None and init_from is not None:
            initial_params = load_initial_params(init_from, config, mesh)
        if start is not None:
            for path in checkpoints.set_aside(after=start.step):
                console.print(f"moved the checkpoint of a later step to {path}")
            stage, done = config.stages[start.position.stage].name, start.position.stage_step
            console.print(
                f"continuing after step {start.step}: stage {stage}, {done} of its steps done"
            )
        writer = _prepare_records(config, workdir, 0 if start is None else start.step, tasks)
        clock = _start_clock(writer, console, mesh, 0 if start is None else start.step)
        trace = Trace(run, workdir)
        try:
            with closing(writer), closing(trace), stop_signal() as stopping:
                saver = Saver(checkpoints, workdir, run.storage_patience)
                parts = mesh, data, checkpoints, saver, writer, console, trace, clock, stopping
                reached = Position(0, 0) if start is None else start.position
                progress = Run(config, workdir, *parts, reached, tasks)
                try:
                    return _run_stages(progress, start, initial_params)
                finally:
                    progress.report_end()
        except (CheckpointFailed, OSError) as error:
            raise TrainingStopped(
                f"{workdir}: {error}\n{kept(checkpoints).capitalize()}. Once the cause is mended, "
                "the same command continues."
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
    params, stored = checkpoints.restore(step, target.params, target.stored_optimizer())
    opt_state, guard = from_stored_optimizer(stored)
    state = program.start(params, opt_state, step=position.stage_step, guard=guard)
    return Start(step, position, program, state)


def _prepare_records(
    config: Config, workdir: Path, step: int, tasks: Tasks | None
) -> MetricsWriter:
    """Writes the config, and opens the metrics of a run that goes on after `step`."""
    writer = MetricsWriter(workdir, active=jax.process_index() == 0)

    def prepare() -> None:
        text = json.dumps(to_dict(config), indent=2) + "\n"
        write_whole(workdir / CONFIG_FILE, text.encode())
        writer.open(step, text)
        if tasks is not None:
            tasks.go_back(step)

    first_does(prepare, f"workdir {workdir} can't be written")
    return writer


def _open_console() -> Console:
    """The standard output, where the first process says what happens; texts are no markup."""
    quiet = jax.process_index() != 0
    return Console(quiet=quiet, highlight=False, markup=False, emoji=False, soft_wrap=True)


def _start_clock(
    writer: MetricsWriter, console: Console, mesh: jax.sharding.Mesh, step: int
) -> RunClock:
    """The clock of a run that goes on after `step`."""
    kind = mesh.devices.flat[0].device_kind
    peak = peak_flops(kind)
    if peak is None:
        console.print(f"unknown chip {kind!r}: model-flops utilisation (mfu) is not reported")
    clock = RunClock(writer.before, peak and peak * mesh.size)
    if writer.before is None:  # so that time until the first checkpoint counts, too
        writer.write_timing(step, clock.totals())
    return clock


def _run_stages(run: Run, start: Start | None, initial: Params | None) -> Params:
    config, opt_state = run.config, None
    if start is not None:
        params = start.state.params
    elif initial is not None:
        params = initial
    else:
        params = initial_params(config.stage_model(config.stages[0]), run.mesh)
    if start is not None and run.owes_tasks(start.step):
        stage = config.stages[start.position.stage]
        with run.clock.spending("evaluation"):
            if signal := run.run_tasks(start.step, stage, start.program, params):
                raise stopped(signal, start.step)
    for index in range(0 if start is None else start.position.stage, len(config.stages)):
        if start is not None:
            _, position, program, state = start
        else:
            position = Position(index, 0)
            program, state = next_stage(config, index, run.mesh, params, opt_state)
        if position.stage_step < config.stages[index].steps:
            state = _run_stage(run, program, state, position)
        params, opt_state, start = state.params, state.opt_state, None
    return merged(params, config.stages[-1].lora)


def _run_stage(
    run: Run, program: StageProgram, state: TrainState, position: Position
) -> TrainState:
    config, stage = run.config, run.config.stages[position.stage]
    run.console.print(
        f"stage {stage.name}: {stage.steps} steps of {stage.global_batch} x {stage.seq_len} "
        f"tokens, {describe_trainable(config, stage)}, loss {stage.loss}"
    )
    for line in run.data.describe_packing(stage):
        run.console.print(line)
    iterator = batches(
        run.data.dataset(stage, "train"),
        stage.global_batch,
        start=position.stage_step * stage.global_batch,
        rows=host_rows(batch_sharding(run.mesh, stage.global_batch), stage.global_batch),
        workers=config.run.data_workers,
    )
    evaluate = make_evaluator(config, stage, program, run.data, run.mesh)
    run.clock.start_stage(stage.global_batch * stage.seq_len, step_flops(config, stage))
    begun = position.stage_step
    bar = Progress(run.console, stage.steps, "steps", stage.name, done=begun, ends=True)
    watch = StepWatch(run, stage, position, bar)
    try:
        with bar, closing(iterator):
            while position.stage_step < stage.steps:
                total = position.total(config)
                run.trace.before(total)
                batch = watch.fetch(iterator)
                with watch.compiling():
                    state, metrics = program.train_step(state, batch)
                run.trace.after(total, state)
                position = position._replace(stage_step=position.stage_step + 1)
                last = position.stage_step == stage.steps
                watch.submit(position, metrics)
                evaluates = run.evaluates(total + 1)
                if evaluates:
                    with watch.interrupted("evaluation"):
                        run.report_evaluation(total + 1, stage, evaluate(state.params))
                tasks = evaluates and run.tasks is not None
                save = last or tasks or due(total + 1, config.run.checkpoint_every)
                stopping = run.stopping()
                if save or stopping or run.saver.retry_due():
                    with watch.interrupted("checkpoint"):  # a bad step is found before it is saved
                        run.save(position, state, wait=bool(stopping) or last)
                    run.save_records(total + 1)
                if tasks and not stopping:  # now that their errors lose no step
                    with watch.interrupted("evaluation"), watch.unhurried():
                        stopping = run.run_tasks(total + 1, stage, program, state.params)
                    if stopping:
                        run.save(position, state, wait=True)  # should that have failed before
                if stopping:
                    raise stopped(stopping, total + 1)
    finally:
        watch.end()
    return state


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
    before = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    compilation_cache.reset_cache()  # a cache that was opened before stays with its directory
    compilation_cache.set_cache_dir(directory)
    try:
        yield
    finally:
        compilation_cache.reset_cache()
        jax.config.update("jax_compilation_cache_dir", before)
