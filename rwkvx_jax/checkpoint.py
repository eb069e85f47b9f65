"""Models from anywhere, and what a run remembers and refuses when it is resumed.

Checkpoints themselves are read and written in `checkpoint_store`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rwkvx_jax.checkpoint_store import CHECKPOINTS, Checkpoints
from rwkvx_jax.config import (
    Config,
    ConfigError,
    ModelConfig,
    RunConfig,
    Stage,
    differences,
    from_dict,
    to_dict,
)
from rwkvx_jax.convert.finite import check_finite
from rwkvx_jax.convert.hub import hub_address
from rwkvx_jax.convert.load import open_checkpoint
from rwkvx_jax.convert.own import OwnCheckpoint, Trained
from rwkvx_jax.convert.places import on_disk
from rwkvx_jax.convert.tensors import DTYPES, as_lazy, in_dtype
from rwkvx_jax.digest import flat
from rwkvx_jax.lora import merged, stage_params
from rwkvx_jax.model import RWKVX, abstract_model, get_params, with_params
from rwkvx_jax.modules.trees import Params, select
from rwkvx_jax.storage import bucket_errors, in_hub, work_path

_log = logging.getLogger(__name__)


def progress_record(
    config: Config, stage: int, stage_step: int, fingerprint: dict[str, Any]
) -> dict[str, Any]:
    """What a checkpoint remembers beside arrays; the data position follows from the steps."""
    return {
        "config": to_dict(config),
        "stage": stage,
        "stage_step": stage_step,
        "data": fingerprint,
    }


def _saved_config(progress: dict[str, Any]) -> Config:
    """The config of a checkpoint; values that have been renamed since are understood, and what did
    not exist is what was done then."""
    values = progress["config"]
    part = lambda name: values.get(name) if isinstance(values, dict) else None
    run, data = part("run"), part("data")
    if isinstance(run, dict) and run.get("sparse_attention") == "dense":
        values = {**values, "run": {**run, "sparse_attention": "reference"}}
    if isinstance(data, dict) and "reset_at_documents" not in data:
        values = {**values, "data": {**data, "reset_at_documents": False}}
    return from_dict(Config, values, "checkpoint")


def check_resumable(
    progress: dict[str, Any], config: Config, fingerprint: dict[str, Any], where: Path
) -> None:
    """Refuses to continue a run under another model, data, optimizer or past stages.

    The mesh, `run`, stages that have not begun, the number of steps of the current stage, and
    `longce.at_once` (which changes results by rounding only, as the mesh does) may change.

    Raises:
      ConfigError: lists every field that differs, with both values.
    """
    old = _saved_config(progress)
    current = progress["stage"]
    problems = [
        line
        for part in ("model", "data", "optimizer")
        for line in differences(getattr(old, part), getattr(config, part), part)
        if not line.startswith(("data.cache_dir", "data.cache_per_host", "data.verify"))
    ]
    for index, stage in enumerate(old.stages[: current + 1]):
        new = config.stages[index] if index < len(config.stages) else None
        may_change = [f"stages.{index}.longce.at_once:"]
        may_change += [f"stages.{index}.steps:"] if index == current else []
        lines = differences(stage, new, f"stages.{index}")
        problems += [line for line in lines if not line.startswith(tuple(may_change))]
    if progress["data"] != fingerprint:
        problems.append(f"training text: {progress['data']} -> {fingerprint}")
    if not problems and progress["stage_step"] > config.stages[current].steps:
        problems.append(
            f"stages.{current}.steps: {progress['stage_step']} steps are done already, "
            f"the config has {config.stages[current].steps}"
        )
    if problems:
        raise ConfigError(
            f"{where} holds a run with another configuration (checkpoint -> now):\n  "
            + "\n  ".join(problems)
            + "\nUse another --workdir, or restore these values."
        )


class SavedRun(NamedTuple):
    """A checkpoint of a run of ours."""

    config: Config
    stage: Stage
    step: int  # over all stages
    params: Params

    @property
    def model_config(self) -> ModelConfig:
        """Of the model that the stage trains."""
        return self.config.stage_model(self.stage)


class Loaded(NamedTuple):
    """A model from anywhere, and what is known of it."""

    model: RWKVX
    tokenizer: str  # "" if unknown
    vocab_file: str
    config: Config | None  # the experiment, if it is a run of ours
    step: int | None
    trained_length: int | None  # longest training sequence so far


def load_checkpoint(
    path: str | Path,
    *,
    chunk_size: int | None = None,
    top_k: int | None = None,
    run: RunConfig | None = None,
    overrides: dict[str, Any] | None = None,
) -> Loaded:
    """Loads a checkpoint of a workdir, our safetensors, or an official checkpoint.

    Args:
      path: a workdir (its newest checkpoint), WORKDIR/checkpoints/STEP, .safetensors (ours or
        official), .pth, or a directory of the Hugging Face Hub's form; on a disk or in a bucket
        (gs://). Or hf://org/name[@revision][/file], on the Hub itself.
      chunk_size: replaces the stored chunk size of the sparse attention.
      top_k: replaces the stored number of chunks that a query reads.
      run: dtypes and implementations; None: float32 on a CPU, bfloat16 elsewhere.
      overrides: further fields of ModelConfig that do not change the parameters. With another
        selector than its learned one the indexers of a checkpoint are left out.

    Raises:
      ConfigError, ConversionError: nothing readable there, values that are not finite, or overrides
        that do not fit.
    """
    path, run_and_step = locate(path)
    if run is None:
        on_cpu = jax.default_backend() == "cpu"
        run = RunConfig(compute_dtype="float32" if on_cpu else "bfloat16")
    changes = dict(overrides or {})
    changes |= {k: v for k, v in {"chunk_size": chunk_size, "top_k": top_k}.items() if v}

    def bound(config: ModelConfig, params: Params) -> RWKVX:
        if config.learned_selector and changes.get("selector", config.selector) != config.selector:
            config, params = _without_indexers(config, params)
        config = dataclasses.replace(config, **changes)
        check_shapes(params, config, str(path))
        check_finite(dict(flat(params)), str(path))
        return with_params(abstract_model(config, run), params)

    if run_and_step is not None:
        saved = read_workdir(*run_and_step)
        config, data, step = saved.config, saved.config.data, saved.step
        model = bound(saved.model_config, saved.params)
        length = config.trained_length(step)
        return Loaded(model, data.tokenizer, data.vocab_file, config, step, length)
    with on_disk(path) as file:
        own = open_checkpoint(file, dtype=DTYPES["float32"])
        params = nested({name: jnp.asarray(p.read()) for name, p in own.params.items()})
    model = bound(own.config, params)
    return Loaded(model, own.tokenizer_name, "", None, *(own.trained or (None, None)))


def _without_indexers(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """The same model choosing chunks by bounds of its keys, heads together as far as they share
    these."""
    params = select(params, lambda name: ".indexer." not in name)
    groups = config.selection_groups and max(config.selection_groups, config.kv_heads)
    return dataclasses.replace(
        config, selector="bounds", index_size=0, selection_groups=groups
    ), params


@contextlib.contextmanager
def open_any(
    path: str | Path, step: int | None = None, dtype: np.dtype | None = None
) -> Iterator[OwnCheckpoint]:
    """A checkpoint of whatever kind as ours, for as long as the block reads it.

    Args:
      path: as `load_checkpoint` takes it.
      step: of a run; None: the newest.
      dtype: of the parameters; None keeps the stored one.

    Raises:
      ConfigError, ConversionError: nothing readable there, or a step of what is no run.
    """
    run_and_step = find_step(path, step)
    if run_and_step is None:
        with on_disk(work_path(path)) as file:
            yield open_checkpoint(file, dtype=dtype)
        return
    own = as_own(read_workdir(*run_and_step))
    yield own._replace(params=in_dtype(own.params, dtype))


def as_own(run: SavedRun) -> OwnCheckpoint:
    """A checkpoint of a run as one of our files holds it."""
    tokenizer = "" if run.config.data.vocab_file else run.config.data.tokenizer
    if run.config.data.vocab_file:
        _log.warning(
            "the vocabulary %s of the run is not kept, hence no tokenizer is named in the file",
            run.config.data.vocab_file,
        )
    trained = Trained(run.step, run.config.trained_length(run.step))
    params = as_lazy(dict(flat(run.params)))
    return OwnCheckpoint(run.model_config, tokenizer, params, None, trained)


def load_model(
    path: str | Path,
    *,
    chunk_size: int | None = None,
    top_k: int | None = None,
    run: RunConfig | None = None,
    **overrides: Any,
) -> RWKVX:
    """The model of `load_checkpoint`; `overrides` are further fields of ModelConfig."""
    return load_checkpoint(
        path, chunk_size=chunk_size, top_k=top_k, run=run, overrides=overrides
    ).model


def check_shapes(params: Params, config: ModelConfig, where: str) -> None:
    """Raises ConfigError, with all differences, for parameters that are not those of `config`.

    Args:
      params: arrays, or anything else with a shape.
      config: of the model.
      where: the checkpoint, for the message.
    """
    expected = {name: leaf.shape for name, leaf in flat(get_params(abstract_model(config)))}
    found = {name: leaf.shape for name, leaf in flat(params)}
    lines = [
        f"{name}: {found.get(name, 'absent')} there, {expected.get(name, 'absent')} wanted"
        for name in sorted(expected.keys() | found.keys())
        if found.get(name) != expected.get(name)
    ]
    if lines:
        raise ConfigError(
            f"{where} holds a model of another shape than the config's:\n  " + "\n  ".join(lines)
        )


def nested(flat_params: dict[str, Any]) -> Params:
    """A tree of parameters from its leaves by dotted name."""
    tree: Params = {}
    for name, leaf in flat_params.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def locate(path: str | Path) -> tuple[Path, tuple[Path, int | None] | None]:
    """The `work_path` of a checkpoint, and what `find_run` says of it.

    Of one on the Hub, where there are no runs, only the form of its address is checked.

    Raises:
      ConfigError, ConversionError: there is nothing, or it can't be read.
    """
    path = work_path(path)
    if in_hub(path):
        hub_address(path)
        return path, None
    try:
        with bucket_errors(path):
            exists, run_and_step = path.exists(), find_run(path)
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error}") from error
    if not exists:
        raise ConfigError(f"no checkpoint at {path}")
    return path, run_and_step


def find_step(path: str | Path, step: int | None) -> tuple[Path, int | None] | None:
    """Workdir and step of the checkpoint of a run; None for one of another kind.

    Args:
      path: as `load_checkpoint` takes it.
      step: that is asked for, instead of the one that the path means.

    Raises:
      ConfigError, ConversionError: as `locate`; or a step is asked for of another kind.
    """
    path, run_and_step = locate(path)
    if run_and_step is not None:
        return run_and_step if step is None else (run_and_step[0], step)
    if step is not None:
        raise ConfigError(
            f"--step {step} chooses among the checkpoints of a training run, which {path} is not"
        )
    return None


def find_run(path: Path) -> tuple[Path, int | None] | None:
    """Workdir and step (None: the newest) that a path means; None if it is neither of a run."""
    if path.parent.name == CHECKPOINTS and path.name.isdecimal():
        return path.parent.parent, int(path.name)
    return (path, None) if (path / CHECKPOINTS).is_dir() else None


def on_one_device(shapes: Params, axes: Params) -> Params:
    """A target to restore parameters into: the default device, whatever devices wrote them."""
    device = jax.config.jax_default_device or jax.local_devices()[0]  # type: ignore[attr-defined]
    here = jax.sharding.SingleDeviceSharding(device)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), shapes
    )


def read_workdir(
    workdir: Path,
    step: int | None = None,
    *,
    accept: Callable[[ModelConfig], None] = lambda config: None,
    target: Callable[[Params, Params], Params] = on_one_device,
    merge: bool = True,
) -> SavedRun:
    """A checkpoint of a run; adapters that a stage was training are added to their matrices.

    Args:
      workdir: of the run.
      step: of the checkpoint; None: the newest.
      accept: told the model that the run has trained; may refuse it before anything is read.
      target: gives parameters with shardings from their shapes and logical axes.
      merge: False leaves adapters by themselves, under `ADAPTERS`.

    Raises:
      ConfigError: there is no checkpoint, or not the asked one, or it is damaged.
    """
    with _opened(workdir, step) as (checkpoints, run):
        accept(run.model_config)
        model = abstract_model(run.model_config)
        params = checkpoints.restore_params(run.step, target(*stage_params(model, run.stage)))
    return run._replace(params=merged(params, run.stage.lora) if merge else params)


def describe_workdir(workdir: Path, step: int | None = None) -> SavedRun:
    """A checkpoint of a run as `read_workdir` gives it, but for its parameters: they are not read.

    Raises:
      ConfigError: there is no checkpoint, or not the asked one, or its record is damaged.
    """
    with _opened(workdir, step) as (_, run):
        return run


@contextlib.contextmanager
def _opened(workdir: Path, step: int | None) -> Iterator[tuple[Checkpoints, SavedRun]]:
    """The checkpoints of a run, and one of them without its parameters."""
    if not (workdir / CHECKPOINTS).is_dir():
        raise ConfigError(f"{workdir} holds no run: no {CHECKPOINTS} directory in it")
    with Checkpoints(workdir) as checkpoints:
        step = checkpoints.choose(step)
        if step is None:
            raise ConfigError(
                f"{workdir} has no checkpoint yet: its training did not reach the first one (of "
                "run.checkpoint_every steps)"
            )
        progress = checkpoints.progress(step)
        config = _saved_config(progress)
        yield checkpoints, SavedRun(config, config.stages[progress["stage"]], step, {})
