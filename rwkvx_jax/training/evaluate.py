"""Held-out loss and passkey probe of a stage, and what they and training need: targets."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import NamedTuple, Protocol

from jax.sharding import Mesh

from rwkvx_jax.config import Config, ConfigError, Stage
from rwkvx_jax.data.pipeline import OpenData, batches
from rwkvx_jax.hosts import global_batch, host_rows
from rwkvx_jax.model import RWKVX
from rwkvx_jax.modules.trees import Params
from rwkvx_jax.sharding import batch_sharding
from rwkvx_jax.tokenizer import Tokenizer
from rwkvx_jax.training.probe import make_probe
from rwkvx_jax.training.step import StageProgram, bind


class Trained(NamedTuple):
    """A model under training."""

    model: RWKVX  # with shapes in place of arrays
    params: Params  # of a plain model, where the mesh has them
    tokenizer: Tokenizer
    step: int  # over all stages
    length: int | None  # longest training sequence so far
    check: Callable[[], None]  # raises where the run is to stop; equally often by all processes


class Tasks(Protocol):
    """Evaluations of their own; see `rwkvx_jax.eval_tasks`."""

    def go_back(self, step: int) -> None:
        """The run goes on from this step."""

    def __call__(self, trained: Trained) -> dict[str, float]:
        """Numbers of a model, by name; all processes call it.

        Called again with the same parameters, it goes on where `trained.check` has ended it.
        """


def check_targets(config: Config, data: OpenData) -> None:
    """Refuses stages whose held-out samples leave nothing to evaluate.

    Looks at samples until one has a target: usually at the first.

    Raises:
      ConfigError: no held-out sample that is read has a target, or a source holds less than one
        sample.
    """
    for stage in config.stages:
        data.dataset(stage, "train")
        if config.run.eval_batches:
            _check_held_out(data, stage, stage.global_batch * config.run.eval_batches)


def _check_held_out(data: OpenData, stage: Stage, count: int) -> None:
    dataset = data.dataset(stage, "valid")
    if any(dataset[i]["mask"].any() for i in range(count)):
        return
    raise ConfigError(
        f"stage {stage.name!r}: none of the first {count} held-out samples has a target (a token "
        f"that counts in the loss): their answers lie beyond seq_len {stage.seq_len}, or they have "
        'none. Raise seq_len, or use other text (samples="window" reads documents to their end)'
    )


def make_evaluator(
    config: Config, stage: Stage, program: StageProgram, data: OpenData, mesh: Mesh
) -> Callable[[Params], dict[str, float]]:
    """A function from parameters to held-out loss and accuracy of the probe, those asked for."""
    run, probe = config.run, None
    if run.probe_trials:
        bound = partial(bind, program.model, stage=stage)
        probe = make_probe(bound, data.tokenizer, stage.seq_len, run.probe_trials, seed=0)

    def evaluate(params: Params) -> dict[str, float]:
        values = {}
        if run.eval_batches:
            values["held_out_loss"] = _held_out_loss(config, stage, program, data, mesh, params)
        if probe is not None:
            values["passkey_accuracy"] = probe(params)
        return values

    return evaluate


def _held_out_loss(
    config: Config, stage: Stage, program: StageProgram, data: OpenData, mesh: Mesh, params: Params
) -> float:
    """Mean loss over the first held-out batches, the same ones every time."""
    sharding = batch_sharding(mesh, stage.global_batch)
    iterator = batches(
        data.dataset(stage, "valid"),
        stage.global_batch,
        start=0,
        rows=host_rows(sharding, stage.global_batch),
    )
    total = count = 0.0
    with closing(iterator):
        for _, local in zip(range(config.run.eval_batches), iterator, strict=False):
            batch = global_batch(sharding, local, stage.global_batch)
            loss, valid = program.eval_step(params, batch)
            total, count = total + float(loss), count + float(valid)
    return total / count  # above 0: see check_targets
