"""Command line: `python -m rwkvx_jax.convert SRC DST`.

Turns official RWKV-X and RWKV-7 checkpoints and flash-linear-attention's RWKV-7 directories into
ours, and ours (files and training runs) into official ones. Tensors are copied one at a time, and
the destination appears only when it is complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.text import Text

from rwkvx_jax.cli import command_line, parse, settle_platform
from rwkvx_jax.config import ModelConfig
from rwkvx_jax.convert.files import TORCH_SUFFIXES, on_disk, write_tensors
from rwkvx_jax.convert.finite import describe, nonfinite_values
from rwkvx_jax.convert.load import open_checkpoint
from rwkvx_jax.convert.official import lost_in_official, params_to_official
from rwkvx_jax.convert.own import OwnCheckpoint, Trained, own_metadata
from rwkvx_jax.convert.tensors import (
    DTYPES,
    ConversionError,
    LazyTensor,
    as_lazy,
    in_dtype,
    tracked,
)
from rwkvx_jax.progress import Progress
from rwkvx_jax.storage import WorkPath, size
from rwkvx_jax.tokenizer import TOKENIZER_IDS, tokenizer_of

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """Converts a checkpoint between the official layout and ours."""

    src: tyro.conf.Positional[WorkPath]
    """Official .pth or .safetensors (or its *.index.json), a Hugging Face directory of
    flash-linear-attention's RWKV-7, a .safetensors of ours, or the directory of a training run."""
    dst: tyro.conf.Positional[WorkPath]
    """File to write: .safetensors or .pth. Both may lie in a bucket (gs://)."""
    to: Literal["auto", "ours", "official"] = "auto"
    """Layout of the destination. auto: ours for a .safetensors, official for a .pth. An official
    file does not hold chunk size, top-k and other settings; which of them are lost is said."""
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"
    """Dtype of the tensors written; keep: as in the source (an official file that became ours
    and turns back: as it was)."""
    tokenizer: Literal["auto", "world", "byte", "none"] = "auto"
    """Tokenizer named in our checkpoint. auto: what the source or its vocabulary size says."""
    chunk_size: Annotated[int | None, tyro.conf.arg(metavar="TOKENS")] = None
    """Chunk size of the sparse attention, which no official file tells. Default: what our own
    source says, else 2048."""
    top_k: Annotated[int | None, tyro.conf.arg(metavar="CHUNKS")] = None
    """Chunks that a query reads. Default: what our own source says, else 3."""
    step: int | None = None
    """Which checkpoint of a training run: the newest, or one that is kept (as the last of each
    stage)."""
    allow_nonfinite: bool = False
    """Copy values that are NaN or infinite, with a warning; without this they are an error."""


def convert(options: Options, console: Console) -> None:
    """Runs one conversion, showing its progress.

    Raises:
      ConversionError, ConfigError: see the readers and writers.
    """
    with contextlib.ExitStack() as held:
        _convert(options, _open(options, held), console)


def _convert(options: Options, source: OwnCheckpoint, console: Console) -> None:
    source = source._replace(tokenizer_name=_tokenizer(options, source, console))
    official = options.to == "official" or (
        options.to == "auto" and options.dst.suffix in TORCH_SUFFIXES
    )
    if not official and options.dst.suffix != ".safetensors":
        raise ConversionError(f"{options.dst}: our checkpoints are .safetensors files")
    bad: dict[str, int] = {}
    total = sum(param.nbytes for param in source.params.values())
    with Progress(console, total, "bytes", str(options.dst)) as bar:

        def seen(name: str, array: np.ndarray) -> None:
            bad[name] = bad.get(name, 0) + nonfinite_values(array)
            bar.describe(name)
            bar.advance(array.nbytes)

        def accept() -> None:
            if (problem := describe(bad)) and not options.allow_nonfinite:
                raise ConversionError(
                    f"{options.src} holds {problem}. Nothing was written; --allow-nonfinite copies "
                    "them"
                )

        source = source._replace(params=tracked(source.params, seen))
        if official:
            tensors, metadata = _official(options, source, console), {}
        else:
            tensors = source.params
            metadata = own_metadata(
                source.config, source.tokenizer_name, source.info, source.trained
            )
        write_tensors(options.dst, tensors, metadata, accept)
    if problem := describe(bad):
        _say(console, f"warning: {options.dst} holds {problem}")
    _say(console, _summary(options.dst, official, source.config))


def _say(console: Console, line: str) -> None:
    """Prints a line as it is: paths and names are no markup, and may not be UTF-8."""
    console.print(Text(line.encode(errors="backslashreplace").decode()), soft_wrap=True)


def _dtype(options: Options) -> np.dtype | None:
    return None if options.dtype == "keep" else DTYPES[options.dtype]


def _open(options: Options, held: contextlib.ExitStack) -> OwnCheckpoint:
    """The source, which can be read until `held` ends."""
    source = _open_run(options.src, options.step)
    if source is None:
        if options.step is not None:
            raise ConversionError(
                f"--step {options.step} chooses among the checkpoints of a training run, which "
                f"{options.src} is not"
            )
        src = held.enter_context(on_disk(options.src))
        source = open_checkpoint(src, dtype=_dtype(options))
    else:
        source = source._replace(params=in_dtype(source.params, _dtype(options)))
    settings = {"chunk_size": options.chunk_size, "top_k": options.top_k}
    given = {name: size for name, size in settings.items() if size is not None}
    return source._replace(config=dataclasses.replace(source.config, **given))


def _open_run(directory: Path, step: int | None) -> OwnCheckpoint | None:
    """A checkpoint of a training run (None: the newest); None if the directory is not that of
    one."""
    # The command line stands above the rooms; imported here, as it brings in the whole model.
    from rwkvx_jax.checkpoint import flat, locate, read_workdir

    _, found = locate(directory)
    if found is None:
        return None
    workdir, named = found
    run = read_workdir(workdir, named if step is None else step)
    params = as_lazy(dict(flat(run.params)))
    trained = Trained(run.step, run.config.trained_length(run.step))
    tokenizer = run.config.data.tokenizer
    if run.config.data.vocab_file:
        tokenizer = ""
        _log.warning(
            "the vocabulary %s of the run is not kept, hence no tokenizer is named in the file",
            run.config.data.vocab_file,
        )
    return OwnCheckpoint(run.model_config, tokenizer, params, None, trained)


def _tokenizer(options: Options, source: OwnCheckpoint, console: Console) -> str:
    """The tokenizer's name for our file: one that fits the vocabulary, or "".

    Raises:
      ConversionError: one was asked for that needs a larger vocabulary.
    """
    asked = {"auto": source.tokenizer_name, "none": ""}.get(options.tokenizer, options.tokenizer)
    vocab_size = source.config.vocab_size
    if not asked or vocab_size >= TOKENIZER_IDS[asked]:
        return asked
    problem = f"the {asked} tokenizer has {TOKENIZER_IDS[asked]} ids, the model {vocab_size}"
    if options.tokenizer != "auto":
        raise ConversionError(f"{problem}: choose another --tokenizer, or none")
    _say(console, f"warning: {problem}; no tokenizer is named in the file")
    return ""


def _official(options: Options, source: OwnCheckpoint, console: Console) -> dict[str, LazyTensor]:
    """The official tensors; says what of the model they do not tell."""
    config = source.config
    tensors = params_to_official(config, source.params, source.info, _dtype(options))
    lost = lost_in_official(config, tensors)
    if source.tokenizer_name != tokenizer_of(config.vocab_size):
        lost.append(f"tokenizer: {source.tokenizer_name}")
    if source.trained is not None:
        lost.append(f"training step: {source.trained.step}")
    if lost:
        _say(
            console,
            f"warning: {options.dst} is an official file, which does not hold these settings "
            f"(-> what is read back): {', '.join(lost)}. Keep a copy in our layout (.safetensors), "
            "or give them again when the file is used",
        )
    return tensors


def _summary(dst: Path, official: bool, config: ModelConfig) -> str:
    states = ", learned initial states" if config.learned_state else ""
    return (
        f"{dst}: {'official' if official else 'our'} layout, "
        f"{size(dst) / 1e6:,.1f} MB; {config.num_blocks} RWKV-7 blocks, "
        f"{config.num_attention_blocks} attention blocks, width {config.width}, "
        f"vocabulary {config.vocab_size}{states}"
    )


def main(argv: list[str]) -> None:
    prog = "python -m rwkvx_jax.convert"
    settle_platform()
    with command_line(prog, argv):
        convert(parse(Options, argv, prog), Console(stderr=True))


if __name__ == "__main__":
    main(sys.argv[1:])
