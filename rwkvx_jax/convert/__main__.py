"""Command line: `python -m rwkvx_jax.convert SRC DST`.

Turns official RWKV-X and RWKV-7 checkpoints and flash-linear-attention's RWKV-7 directories into
ours, and ours (files and training runs) into official ones. Tensors are copied one at a time, and
the destination appears only when it is complete.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from rwkvx_jax.cli import command_line, parse, settle_platform
from rwkvx_jax.config import ModelConfig
from rwkvx_jax.convert.files import TORCH_SUFFIXES, write_tensors
from rwkvx_jax.convert.load import open_checkpoint
from rwkvx_jax.convert.official import params_to_official
from rwkvx_jax.convert.own import OwnCheckpoint, Trained, is_own, write_own_safetensors
from rwkvx_jax.convert.tensors import DTYPES, ConversionError, as_lazy, in_dtype, tracked


@dataclass(frozen=True)
class Options:
    """Converts a checkpoint between the official layout and ours."""

    src: tyro.conf.Positional[Path]
    """Official .pth or .safetensors (or its *.index.json), a Hugging Face directory of
    flash-linear-attention's RWKV-7, a .safetensors of ours, or the directory of a training run."""
    dst: tyro.conf.Positional[Path]
    """File to write: .safetensors or .pth."""
    to: Literal["auto", "ours", "official"] = "auto"
    """Layout of the destination. auto: official if the source is ours or the destination is a
    .pth, else ours."""
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


def convert(options: Options, console: Console) -> None:
    """Runs one conversion, showing its progress.

    Raises:
      ConversionError, ConfigError: see the readers and writers.
    """
    source, is_ours = _open(options)
    if options.tokenizer != "auto":
        name = "" if options.tokenizer == "none" else options.tokenizer
        source = source._replace(tokenizer_name=name)
    target = options.to
    if target == "auto":
        to_official = is_ours or options.dst.suffix in TORCH_SUFFIXES
        target = "official" if to_official else "ours"
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        total = sum(param.nbytes for param in source.params.values())
        task = progress.add_task("", total=total)

        def advance(name: str, size: int) -> None:
            progress.update(task, advance=size, description=name)

        _write(options, target, source._replace(params=tracked(source.params, advance)))
        progress.update(task, description="done", completed=total)
    console.print(_summary(options.dst, target, source.config), soft_wrap=True)


def _dtype(options: Options) -> np.dtype | None:
    return None if options.dtype == "keep" else DTYPES[options.dtype]


def _open(options: Options) -> tuple[OwnCheckpoint, bool]:
    """The source, and whether it is in our layout already."""
    settings = {"chunk_size": options.chunk_size, "top_k": options.top_k}
    run = _open_run(options.src, options.step)
    if run is None:
        if options.step is not None:
            raise ConversionError(
                f"--step {options.step} chooses among the checkpoints of a training run, which "
                f"{options.src} is not"
            )
        source = open_checkpoint(options.src, **settings, dtype=_dtype(options))
        return source, is_own(options.src)
    given = {name: size for name, size in settings.items() if size is not None}
    params = in_dtype(run.params, _dtype(options))
    return run._replace(config=dataclasses.replace(run.config, **given), params=params), True


def _open_run(directory: Path, step: int | None) -> OwnCheckpoint | None:
    """A checkpoint of a training run (None: the newest); None if the directory is not that of
    one."""
    # The command line stands above the rooms; imported here, as it brings in the whole model.
    from rwkvx_jax.checkpoint import CHECKPOINTS, flat, read_workdir

    if not (directory / CHECKPOINTS).is_dir():
        return None
    config, stage, step, params = read_workdir(directory, step)
    params = as_lazy(dict(flat(params)))
    trained = Trained(step, config.trained_length(step))
    return OwnCheckpoint(config.stage_model(stage), config.data.tokenizer, params, None, trained)


def _write(options: Options, target: str, source: OwnCheckpoint) -> None:
    config, tokenizer, params, info, trained = source
    if target == "official":
        tensors = params_to_official(config, params, info, _dtype(options))
        write_tensors(options.dst, tensors)
    elif options.dst.suffix == ".safetensors":
        write_own_safetensors(options.dst, config, tokenizer, params, info, trained)
    else:
        raise ConversionError(f"{options.dst}: our checkpoints are .safetensors files")


def _summary(dst: Path, target: str, config: ModelConfig) -> str:
    return (
        f"{dst}: {'our layout' if target == 'ours' else 'official layout'}, "
        f"{dst.stat().st_size / 1e6:,.1f} MB; {config.num_blocks} RWKV-7 blocks, "
        f"{config.num_attention_blocks} attention blocks, width {config.width}, "
        f"vocabulary {config.vocab_size}"
    )


def main(argv: list[str]) -> None:
    prog = "python -m rwkvx_jax.convert"
    settle_platform()
    with command_line(prog, argv):
        convert(parse(Options, argv, prog), Console(stderr=True))


if __name__ == "__main__":
    main(sys.argv[1:])
