"""The models under test: which ones a command names, how they are loaded and described."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import jax
import numpy as np
import tyro
from jax.experimental import multihost_utils

from rwkvx_jax.checkpoint import Loaded, flat, load_checkpoint
from rwkvx_jax.config import ConfigError, MeshConfig, ModelConfig, RunConfig, to_dict
from rwkvx_jax.generate.sampling import check_seed
from rwkvx_jax.generate.terminal import one_line
from rwkvx_jax.model import RWKVX, abstract_model, get_params
from rwkvx_jax.modules.trees import Params
from rwkvx_jax.storage import WorkPath, in_bucket, make_folder
from rwkvx_jax.tokenizer import Tokenizer, load_tokenizer
from rwkvx_jax.training.step import placed_params

_ADDED = (  # fields of ModelConfig since version 0.2.0
    "learned_state",
    "mixer",
    "backbone",
    "norm_eps",
    "tied_embeddings",
    "num_kv_heads",
    "qkv_bias",
    "rope_theta",
    "rope_scaling",
    "shared_attention",
    "index_size",
    "selection_groups",
    "selection_join",
    "forced_chunks",
    "selection_span",
    "selection_spans",
    "share_selection_every",
    "window_size",
)
IDENTITY_FIELDS = ("model", "parameters", "compute_dtype", "tokenizer", "vocabulary")
"""Those fields of a model's description that decide its answers."""

ATTENTION_OFF = ", attention blocks off"
"""How the label of a model ends whose attention blocks are taken out."""


Selector = Literal["mean", "max", "pooled", "bounds"]


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Flags of every task that evaluates checkpoints."""

    checkpoint: Annotated[tuple[WorkPath, ...], tyro.conf.UseAppendAction] = ()
    """Work directory, .safetensors or .pth; give it several times to compare models."""
    output: WorkPath
    """Directory of the results, on a disk or gs://. Run again with the same one, finished trials
    are not repeated."""
    seed: int = 0
    """Seed of everything random in the prompts."""
    limit: int | None = None
    """Run only the first N trials of each model; a later run without it does the rest."""
    batch: int | None = None
    """Prompts read side by side. Default: 8192 / --piece, fewer where long caches need
    the memory."""
    prefill_chunk: Annotated[int, tyro.conf.arg(name="piece")] = 2048
    """Tokens of a prompt read at once."""
    chunk_size: int | None = None
    """Replaces the chunk size of the sparse attention that the checkpoint was trained with."""
    top_k: int | None = None
    """Replaces the number of chunks that a query reads."""
    selector: Selector | None = None
    """Replaces the way in which a query scores chunks; see docs/attention.md."""
    vocab_file: str = ""
    """Vocabulary of the World tokenizer, where pyrwkv-tokenizer is not installed."""
    mesh: MeshConfig = MeshConfig(data=1)
    """Devices along each mesh axis, as for training: prompts over data, heads over tensor, the
    cache of a long prompt over context. By default one device alone."""

    def __post_init__(self):
        if not self.checkpoint:
            raise ConfigError("no checkpoint given: name one with --checkpoint PATH")
        if len(set(self.checkpoint)) < len(self.checkpoint):
            raise ConfigError("a checkpoint is given twice: every --checkpoint must differ")
        require_at_least_1(self, "limit", "batch", "prefill_chunk", "chunk_size", "top_k")
        check_seed(self.seed, "--seed")
        check_output(self.output)


def require_at_least_1(options: Any, *names: str) -> None:
    """Refuses sizes below 1 among the fields of a task's options; None counts as not given.

    Raises:
      ConfigError: names the flag and its value.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            flag = {"prefill_chunk": "piece"}.get(name, name.replace("_", "-"))
            raise ConfigError(f"--{flag} is {value}: it must be at least 1")


def check_output(path: Path) -> None:
    """Refuses an --output that can't be a folder.

    Raises:
      ConfigError: it, or a folder above it, is a file; or nothing can be written to its bucket.
    """
    if in_bucket(path):
        try:
            make_folder(path)
        except OSError as error:
            raise ConfigError(f"--output can't be written: {error}") from error
        return
    for folder in (path, *path.parents):
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"--output {path}: {folder} is a file; name a folder")


class EvalModel(NamedTuple):
    """A model under evaluation; its parameters stay on the host until its turn comes, or lie where
    a training has them."""

    label: str
    config: ModelConfig
    run: RunConfig
    params: Params  # numpy arrays, or those of a training
    tokenizer: Tokenizer
    checkpoint: str
    step: int | None
    trained_length: int | None  # longest training sequence so far, if known
    # Called whenever answers have been kept; ends the evaluation by an error.
    check: Callable[[], None] = lambda: None

    @property
    def abstract(self) -> RWKVX:
        """The model with shapes in place of arrays."""
        return abstract_model(self.config, self.run)

    def placed(self) -> Params:
        """The parameters on the device, or over the mesh in force.

        Raises:
          ConfigError: a mesh that does not divide them.
        """
        return placed_params(self.abstract, self.params)

    @property
    def description(self) -> dict[str, Any]:
        """JSON form of everything known of the model, `IDENTITY_FIELDS` included."""
        return {
            "label": self.label,
            "checkpoint": self.checkpoint,
            "step": self.step,
            "trained_length": self.trained_length,
            "model": _identifying(self.config),
            "parameters": _digest(self.params),
            "compute_dtype": self.run.compute_dtype,
            "tokenizer": self.tokenizer.name,
            "vocabulary": self.tokenizer.fingerprint,
        }

    def without_attention(self) -> EvalModel:
        """The same model with its attention blocks taken out."""
        params = {name: p for name, p in self.params.items() if name != "attention_blocks"}
        return self._replace(
            label=f"{self.label}{ATTENTION_OFF}",
            config=self.config.without_attention(),
            params=params,
        )


def open_models(options: EvalOptions) -> list[EvalModel]:
    """Loads every checkpoint of the command line.

    Raises:
      ConfigError, ConversionError: a checkpoint that can't be read, that tells no tokenizer, or
        whose tokenizer differs from the first one's.
    """
    names = [path.resolve().name for path in options.checkpoint]
    models: list[EvalModel] = []
    for path, name in zip(options.checkpoint, names, strict=True):
        label = one_line(name if names.count(name) == 1 else str(path))
        models.append(load_model(path, label, options))
        first, last = models[0], models[-1]
        if first.tokenizer.fingerprint != last.tokenizer.fingerprint:
            raise ConfigError(
                f"{first.checkpoint} and {path} use different vocabularies (tokenizers "
                f"{first.tokenizer.name} and {last.tokenizer.name}): their lengths can't share a "
                "figure; evaluate them one by one"
            )
    return models


class Replaced(Protocol):
    """Options that say how a checkpoint is read; see `EvalOptions`."""

    chunk_size: int | None
    top_k: int | None
    selector: str | None
    vocab_file: str


def load_model(path: Path, label: str, options: Replaced) -> EvalModel:
    """Loads one checkpoint.

    Raises:
      ConfigError, ConversionError: it can't be read, or tells no tokenizer.
    """
    loaded = load_checkpoint(
        path,
        chunk_size=options.chunk_size,
        top_k=options.top_k,
        overrides={"selector": options.selector} if options.selector else None,
    )
    return as_model(loaded, path, label, options.vocab_file)


def as_model(loaded: Loaded, path: Path, label: str, vocab_file: str = "") -> EvalModel:
    """A loaded checkpoint as a model under test, its arrays moved to the host."""
    config = loaded.model.config
    if not loaded.tokenizer:
        raise ConfigError(
            f"{path} does not say which tokenizer it was trained with (vocabulary "
            f"{config.vocab_size}): name one with `python -m rwkvx_jax.convert {path} "
            "NEW.safetensors --tokenizer world` (or byte) and evaluate the new file"
        )
    tokenizer = load_tokenizer(loaded.tokenizer, vocab_file or loaded.vocab_file)
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"{path} has a vocabulary of {config.vocab_size}, too small for the "
            f"{tokenizer.name} tokenizer with {tokenizer.vocab_size} ids"
        )
    return EvalModel(
        label=label,
        config=config,
        run=loaded.model.run,
        params=jax.device_get(get_params(loaded.model)),
        tokenizer=tokenizer,
        checkpoint=str(path),
        step=loaded.step,
        trained_length=loaded.trained_length,
    )


def _identifying(config: ModelConfig) -> dict[str, Any]:
    """The fields of a model; those that results of older versions lack, only where they say
    something: the same model keeps its results."""
    absent = {field.name: field.default for field in fields(ModelConfig) if field.name in _ADDED}
    return {k: v for k, v in to_dict(config).items() if k not in absent or v != absent[k]}


def with_attention_off(models: Sequence[EvalModel]) -> list[EvalModel]:
    """Each model, followed by itself without its attention blocks where it has some.

    Raises:
      ConfigError: none has any beside recurrent blocks.
    """
    hybrid = lambda model: model.config.num_attention_blocks and model.config.num_blocks
    if not any(map(hybrid, models)):
        raise ConfigError(
            "--compare-without-attention: no checkpoint here has attention blocks beside others"
        )
    pairs = [[model, model.without_attention()] if hybrid(model) else [model] for model in models]
    return [model for pair in pairs for model in pair]


def _digest(params: Params) -> str:
    """A hash of all parameters, bit by bit."""
    digest = hashlib.blake2b(digest_size=16)
    for name, leaf in flat(params):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        leaf = np.ascontiguousarray(leaf)
        digest.update(f"{name} {leaf.dtype} {leaf.shape}".encode())
        digest.update(leaf.view(np.uint8).data)
    return digest.hexdigest()
