"""Checkpoints: training state with its position and config, through Orbax.

A step directory holds three items: `params`, `optimizer` and `progress` (JSON: config, stage,
steps, data fingerprint). Orbax writes into a temporary directory and renames it, so a killed
process never leaves a half checkpoint as the latest. Parameters can be read without the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

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
from rwkvx_jax.convert.load import open_checkpoint
from rwkvx_jax.convert.tensors import DTYPES
from rwkvx_jax.model import RWKVX, Params, abstract_model, get_params, with_params

CHECKPOINTS = "checkpoints"


class CheckpointFailed(RuntimeError):
    """A checkpoint could not be written (full disk, permissions); earlier ones are untouched."""


def work_path(path: str | Path) -> Path:
    """A path as given: on a disk, or an `epath.Path` of a bucket (gs://)."""
    return epath.Path(path) if "://" in str(path) else Path(path)


def _absolute(path: Path) -> Path:
    return path.absolute() if isinstance(path, Path) else path


class Checkpoints:
    """The checkpoints of one work directory, numbered by steps over all stages."""

    def __init__(self, workdir: Path, *, keep: int, keep_steps: Sequence[int] = ()):
        """Keeps the newest `keep` checkpoints, and those at `keep_steps` for good."""
        policy = preservation_policy.AnyPreservationPolicy(
            [preservation_policy.LatestN(keep), preservation_policy.CustomSteps(keep_steps)]
        )
        self._directory = _absolute(workdir / CHECKPOINTS)
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy, cleanup_tmp_directories=True
            ),
            item_names=("params", "optimizer", "progress"),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        try:
            with self._writing():
                self._manager.close()
        except CheckpointFailed:
            if kind is None:  # else that error says more
                raise

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, params: Any, optimizer: Any, progress: dict[str, Any]) -> None:
        """Copies the arrays and writes them in the background; a step already there is kept.

        Raises:
          CheckpointFailed: this write, or the one before in the background, failed.
        """
        if step in self._manager.all_steps():
            return
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(params),
                    optimizer=ocp.args.StandardSave(optimizer),
                    progress=ocp.args.JsonSave(progress),
                ),
            )

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
          CheckpointFailed: a write in the background failed.
        """
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Gives failed writes one type: Orbax raises whatever its storage layers raise."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointFailed(
                f"no checkpoint could be written to {self._directory}: {error}"
            ) from error

    def progress(self, step: int) -> dict[str, Any]:
        args = ocp.args.Composite(progress=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args)["progress"]

    def restore(self, step: int, params: Any, optimizer: Any) -> tuple[Any, Any]:
        """Reads parameters and moments into the shapes and shardings of abstract trees."""
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(params),
                optimizer=ocp.args.StandardRestore(optimizer),
            ),
        )
        return restored["params"], restored["optimizer"]


def progress_record(
    config: Config, stage: int, stage_step: int, fingerprint: dict[str, Any]
) -> dict[str, Any]:
    """What a checkpoint remembers beside arrays; the data position follows from the steps."""
    return {
        "config": to_dict(config),
        "stage": stage,
        "stage_step": stage_step,
        "samples": stage_step * config.stages[stage].global_batch,
        "data": fingerprint,
    }


def check_resumable(
    progress: dict[str, Any], config: Config, fingerprint: dict[str, Any], where: Path
) -> None:
    """Refuses to continue a run under another model, data, optimizer or past stages.

    The mesh, `run`, stages that have not begun, and the number of steps of the current stage may
    change.

    Raises:
      ConfigError: lists every field that differs, with both values.
    """
    old = from_dict(Config, progress["config"], "checkpoint")
    current = progress["stage"]
    problems = [
        line
        for part in ("model", "data", "optimizer")
        for line in differences(getattr(old, part), getattr(config, part), part)
        if not line.startswith(("data.cache_dir", "data.cache_per_host", "data.verify"))
    ]
    for index, stage in enumerate(old.stages[: current + 1]):
        new = config.stages[index] if index < len(config.stages) else None
        lines = differences(stage, new, f"stages.{index}")
        problems += [
            line
            for line in lines
            if index < current or not line.startswith(f"stages.{index}.steps:")
        ]
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
    """Loads the newest checkpoint of a workdir, our safetensors, or an official checkpoint.

    Args:
      path: a workdir, .safetensors (ours or official), .pth, or a Hugging Face directory.
      chunk_size: replaces the stored chunk size of the sparse attention.
      top_k: replaces the stored number of chunks that a query reads.
      run: dtypes and implementations; None: float32 on a CPU, bfloat16 elsewhere.
      overrides: further fields of ModelConfig that do not change the parameters.

    Raises:
      ConfigError, ConversionError: nothing readable there, values that are not finite, or overrides
        that do not fit.
    """
    path = work_path(path)
    if not path.exists():
        raise ConfigError(f"no checkpoint at {path}")
    if run is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        run = RunConfig(compute_dtype=dtype)
    changes = dict(overrides or {})
    changes |= {k: v for k, v in {"chunk_size": chunk_size, "top_k": top_k}.items() if v}
    if (path / CHECKPOINTS).is_dir():
        config, stage, step, params = read_workdir(path)
        model_config, data = config.stage_model(stage), config.data
        tokenizer, vocab_file = data.tokenizer, data.vocab_file
        trained_length = config.trained_length(step)
    else:
        own = open_checkpoint(path, dtype=DTYPES["float32"])
        config, vocab_file = None, ""
        step, trained_length = own.trained or (None, None)
        model_config, tokenizer = own.config, own.tokenizer_name
        params = _nested({name: jnp.asarray(p.read()) for name, p in own.params.items()})
    model_config = dataclasses.replace(model_config, **changes)
    _check_shapes(params, model_config, str(path))
    check_finite(dict(flat(params)), str(path))
    model = with_params(abstract_model(model_config, run), params)
    return Loaded(model, tokenizer, vocab_file, config, step, trained_length)


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


def load_initial_params(path: str | Path, config: Config) -> Params:
    """Parameters to start training from: of the hybrid itself, or of the RWKV-7 to be expanded.

    Raises:
      ConfigError: parameters of another shape than the config's; all differences are listed.
    """
    # In the memory of the host: a model that many chips share need not fit into one.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        params = get_params(load_checkpoint(path).model)
    hybrid = "attention_blocks" in params
    if hybrid and not config.stages[0].expanded:
        raise ConfigError(
            f"{path} already has attention blocks, but stage {config.stages[0].name!r} trains the "
            "plain RWKV-7: start from a RWKV-7, or set expanded=True"
        )
    _check_shapes(params, config.model if hybrid else config.model.without_attention(), str(path))
    return params


def _check_shapes(params: Params, config: ModelConfig, where: str) -> None:
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


def flat(params: Params) -> list[tuple[str, Any]]:
    """(dotted name, leaf) of every parameter."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [(".".join(key.key for key in path), leaf) for path, leaf in leaves]


def _nested(flat_params: dict[str, Any]) -> Params:
    tree: Params = {}
    for name, leaf in flat_params.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


@contextlib.contextmanager
def _without_message(text: str) -> Iterator[None]:
    """Keeps one of Orbax's messages out of the log."""
    keep = lambda record: not record.getMessage().startswith(text)
    logger = logging.getLogger("absl")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def read_workdir(workdir: Path, step: int | None = None) -> tuple[Config, Stage, int, Any]:
    """Config, stage, step and parameters (as host arrays on the default device) of a run.

    Raises:
      ConfigError: there is no checkpoint, or not the asked one.
    """
    if not (workdir / CHECKPOINTS).is_dir():
        raise ConfigError(f"{workdir} holds no run: no {CHECKPOINTS} directory in it")
    options = ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False)
    names = ("params", "optimizer", "progress")
    directory = _absolute(workdir / CHECKPOINTS)
    with (
        _without_message("Given directory is read only"),  # as asked for, not worth a warning
        ocp.CheckpointManager(directory, options=options, item_names=names) as manager,
    ):
        steps = sorted(manager.all_steps())
        if not steps or step not in (None, *steps):
            raise ConfigError(f"{workdir} has checkpoints of steps {steps}, not of step {step}")
        step = steps[-1] if step is None else step
        args = ocp.args.Composite(progress=ocp.args.JsonRestore())
        progress = manager.restore(step, args=args)["progress"]
        config = from_dict(Config, progress["config"], "checkpoint")
        stage = config.stages[progress["stage"]]
        # Onto one device, whatever devices wrote it.
        device = jax.config.jax_default_device or jax.local_devices()[0]
        here = jax.sharding.SingleDeviceSharding(device)
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
            get_params(abstract_model(config.stage_model(stage))),
        )
        args = ocp.args.Composite(params=ocp.args.StandardRestore(target))
        params = manager.restore(step, args=args)["params"]
    return config, stage, step, params
