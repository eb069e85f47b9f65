"""Command line: `python -m rwkvx_jax.convert SRC DST`.

Turns official RWKV-X and RWKV-7 checkpoints and flash-linear-attention's RWKV-7 directories into
ours, and ours into official ones. Tensors are copied one at a time, and the destination appears
only when it is complete.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from rwkvx_jax.config import ConfigError, ModelConfig
from rwkvx_jax.convert.files import TORCH_SUFFIXES, open_tensors, write_tensors
from rwkvx_jax.convert.fla import is_fla, open_fla
from rwkvx_jax.convert.official import open_official, params_to_official
from rwkvx_jax.convert.own import (
    OwnCheckpoint,
    is_own_metadata,
    open_own_safetensors,
    write_own_safetensors,
)
from rwkvx_jax.convert.tensors import DTYPES, ConversionError, LazyTensor, in_dtype, tracked

_WORLD_IDS = 65530  # token ids of the World vocabulary, 0 included
_BYTE_IDS = 257


@dataclasses.dataclass(frozen=True)
class Options:
    """Converts a checkpoint between the official layout and ours."""

    src: tyro.conf.Positional[Path]
    """Official .pth or .safetensors (or *.index.json), a Hugging Face directory of
    flash-linear-attention's RWKV-7, or a .safetensors of ours."""
    dst: tyro.conf.Positional[Path]
    """File to write: .safetensors or .pth."""
    to: Literal["auto", "ours", "official"] = "auto"
    """Layout of the destination. auto: official if the source is ours or the destination is a
    .pth, else ours."""
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"
    """Dtype of the tensors written; keep: as in the source (an official file that became ours
    and turns back: as it was)."""
    tokenizer: Literal["auto", "world", "byte", "none"] = "auto"
    """Tokenizer named in our checkpoint. auto: world or byte if the vocabulary size says so."""
    chunk_size: Annotated[int | None, tyro.conf.arg(metavar="TOKENS")] = None
    """Chunk size of the sparse attention; no official file tells it. Default: 2048, or what our
    own source says."""
    top_k: Annotated[int | None, tyro.conf.arg(metavar="CHUNKS")] = None
    """Chunks that a query reads. Default: 3, or what our own source says."""


def convert(options: Options, console: Console) -> None:
    """Runs one conversion, showing its progress.

    Raises:
      ConversionError, ConfigError: see the readers and writers.
    """
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=console,
    ) as progress:
        task = progress.add_task("reading")

        def advance(name: str, size: int) -> None:
            progress.update(task, advance=size, description=name)

        def watched(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
            progress.update(task, total=sum(tensor.nbytes for tensor in tensors.values()))
            return tracked(tensors, advance)

        checkpoint, from_ours = _open_source(options, watched)
        target = options.to
        if target == "auto":
            official = from_ours or options.dst.suffix in TORCH_SUFFIXES
            target = "official" if official else "ours"
        if target == "ours":
            _write_ours(options, checkpoint)
        else:
            dtype = None if options.dtype == "keep" else DTYPES[options.dtype]
            tensors = params_to_official(
                checkpoint.config, checkpoint.params, checkpoint.info, dtype
            )
            write_tensors(options.dst, tensors)
        progress.update(task, description="done", completed=progress.tasks[task].total)
    console.print(_summary(options.dst, target, checkpoint.config), soft_wrap=True)


def _open_source(options: Options, watched) -> tuple[OwnCheckpoint, bool]:
    """The source as a checkpoint of ours, and whether it is one already."""
    sizes = {"chunk_size": options.chunk_size, "top_k": options.top_k}
    dtype = None if options.dtype == "keep" else DTYPES[options.dtype]
    if is_fla(options.src):
        config, params, info = open_fla(options.src, **sizes, dtype=dtype)
        return _named(options, config, watched(params), info), False
    tensors, metadata = open_tensors(options.src)
    if is_own_metadata(metadata):
        own = open_own_safetensors(options.src)
        given = {name: size for name, size in sizes.items() if size is not None}
        named = _named(options, dataclasses.replace(own.config, **given), own.params, own.info)
        if options.tokenizer == "auto":
            named = named._replace(tokenizer_name=own.tokenizer_name)
        return named._replace(params=in_dtype(watched(own.params), dtype)), True
    try:
        config, params, info = open_official(watched(tensors), **sizes, dtype=dtype)
    except ConversionError as error:
        raise ConversionError(f"{options.src}: {error}") from error
    return _named(options, config, params, info), False


def _named(options: Options, config: ModelConfig, params, info) -> OwnCheckpoint:
    name = options.tokenizer
    if name == "auto":
        known = {_BYTE_IDS: "byte"} | dict.fromkeys((_WORLD_IDS - 1, _WORLD_IDS, 65536), "world")
        name = known.get(config.vocab_size, "none")
    return OwnCheckpoint(config, "" if name == "none" else name, params, info)


def _write_ours(options: Options, checkpoint: OwnCheckpoint) -> None:
    if options.dst.suffix != ".safetensors":
        raise ConversionError(f"{options.dst}: our checkpoints are .safetensors files")
    config, tokenizer, params, info = checkpoint
    write_own_safetensors(options.dst, config, tokenizer, params, info)


def _summary(dst: Path, target: str, config: ModelConfig) -> str:
    return (
        f"{dst}: {'our layout' if target == 'ours' else 'official layout'}, "
        f"{dst.stat().st_size / 1e6:,.1f} MB; {config.num_blocks} RWKV-7 blocks, "
        f"{config.num_attention_blocks} attention blocks, width {config.width}, "
        f"vocabulary {config.vocab_size}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = tyro.cli(Options, prog="python -m rwkvx_jax.convert", args=arguments)
    console = Console(stderr=True)
    try:
        convert(options, console)
    except (ConversionError, ConfigError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
