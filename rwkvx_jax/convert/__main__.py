"""Command line: `python -m rwkvx_jax.convert SRC DST`, and `--inspect SRC`.

Turns official RWKV-X and RWKV-7 checkpoints, and directories of flash-linear-attention's RWKV-7, of
Llama and of Qwen2, into ours, and ours (files and training runs) into official ones. Tensors are
copied one at a time, and the destination appears only when it is complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from rich.console import Console

from rwkvx_jax.cli import command_line, parse, settle_platform
from rwkvx_jax.config import ConfigError, ModelConfig
from rwkvx_jax.convert.export import (
    check_new_directory,
    exported_tensors,
    model_card,
    shard_bytes,
    write_directory,
)
from rwkvx_jax.convert.files import TORCH_SUFFIXES, write_tensors
from rwkvx_jax.convert.inspection import Facts, describe, facts_of_file
from rwkvx_jax.convert.layout import param_shapes
from rwkvx_jax.convert.load import open_checkpoint
from rwkvx_jax.convert.official import (
    has_official_form,
    lost_in_official,
    params_to_official,
)
from rwkvx_jax.convert.own import OwnCheckpoint, Trained, own_metadata
from rwkvx_jax.convert.places import on_disk
from rwkvx_jax.convert.tensors import (
    DTYPES,
    ConversionError,
    LazyTensor,
    in_dtype,
)
from rwkvx_jax.convert.watched import say, watched
from rwkvx_jax.generate.terminal import show
from rwkvx_jax.storage import WorkPath, files_below, size
from rwkvx_jax.tokenizer import TOKENIZER_IDS, tokenizer_of

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """Converts a checkpoint between the official layout and ours."""

    src: tyro.conf.Positional[WorkPath]
    """Official .pth or .safetensors (or its *.index.json), a directory with one of them as the
    Hugging Face Hub has it (also flash-linear-attention's RWKV-7, Llama, Qwen2), a .safetensors of
    ours, or the directory of a training run; in a bucket (gs://), or on the Hub
    (hf://org/name[@revision][/file])."""
    dst: tyro.conf.Positional[WorkPath | None] = None
    """File to write, on a disk or in a bucket (gs://): .safetensors or .pth."""
    inspect: bool = False
    """Write nothing; print what SRC is and what it can be used for."""
    to: Literal["auto", "ours", "official", "hub"] = "auto"
    """Layout of the destination. auto: ours for a .safetensors, official for a .pth. An official
    file does not hold chunk size, top-k and other settings; which of them are lost is said. hub: a
    new directory for the Hugging Face Hub, with config.json, official tensors and a model card."""
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
    shard_size: str = "5GB"
    """With --to hub: most bytes of tensors in one file."""
    results: WorkPath | None = None
    """With --to hub: a folder of eval.py's results, whose tables go into the model card."""
    adapter: bool = False
    """Write only what the run's stage has tuned (LoRA factors or initial states)."""
    merge: WorkPath | None = None
    """Adapter to apply to SRC, which must be the model that the adapter's stage started from."""
    allow_nonfinite: bool = False
    """Copy values that are NaN or infinite, with a warning; without this they are an error."""

    def __post_init__(self):
        if self.inspect and self.dst is not None:
            raise ConfigError(f"--inspect writes nothing: leave out the destination {self.dst}")
        if not self.inspect and self.dst is None:
            raise ConfigError(
                f"no destination for {self.src}: name the file to write, or only look with "
                "--inspect"
            )
        if self.results is not None and self.to != "hub":
            raise ConfigError("--results goes into a model card: add --to hub")
        if self.adapter and (self.inspect or self.merge is not None or self.to != "auto"):
            raise ConfigError("--adapter goes with none of --inspect, --merge and --to")
        if self.inspect and self.merge is not None:
            raise ConfigError("--merge writes a model: leave out --inspect")
        if self.adapter and self.dst.suffix != ".safetensors":
            raise ConfigError(f"{self.dst}: an adapter is written as a .safetensors file")
        shard_bytes(self.shard_size)


def inspect(options: Options) -> list[str]:
    """What the source of the options is, as lines of text.

    Raises:
      ConversionError, ConfigError: see the readers.
    """
    # The command line stands above the rooms; imported here, as it brings in the whole model.
    from rwkvx_jax.checkpoint import CHECKPOINTS, describe_workdir, find_step

    run_and_step = find_step(options.src, options.step)
    if run_and_step is None:
        with on_disk(options.src) as path:
            facts = facts_of_file(path, open_checkpoint(path))
        return describe(str(options.src), facts)
    workdir, step = run_and_step
    run = describe_workdir(workdir, step)
    files = files_below(workdir / CHECKPOINTS / str(run.step), "")
    data = run.config.data
    facts = Facts(
        f"training run, checkpoint of step {run.step} (stage {run.stage.name})",
        sum(size(file) for file in files if file.is_file()),
        run.model_config,
        {"float32": len(param_shapes(run.model_config))},
        data.tokenizer,
        data.vocab_file,
        Trained(run.step, run.config.trained_length(run.step)),
    )
    return describe(str(options.src), facts)


def convert(options: Options, console: Console) -> None:
    """Runs one conversion, showing its progress.

    Raises:
      ConversionError, ConfigError: see the readers and writers.
    """
    results = ""
    if options.to == "hub":
        check_new_directory(options.dst)
        results = _results(options)
    with _opened(options) as (source, extra):
        source = _configured(options, source)
        source = source._replace(tokenizer_name=_tokenizer(options, source, console))
        if options.to == "hub":
            _export(options, source, results, console)
        else:
            _convert(options, source, extra, console)


@contextlib.contextmanager
def _opened(options: Options) -> Iterator[tuple[OwnCheckpoint, dict[str, str]]]:
    """What is to be written, and metadata beside that of a model."""
    from rwkvx_jax.adapter import merged_with, open_adapter, run_adapter  # as in `inspect`
    from rwkvx_jax.checkpoint import open_any

    dtype = _dtype(options)
    if options.adapter:
        adapter = run_adapter(options.src, options.step)
        tuned = adapter.tuned
        yield tuned._replace(params=in_dtype(tuned.params, dtype)), adapter.metadata
    elif options.merge is not None:
        base = open_any(options.src, options.step)
        with base as source, on_disk(options.merge) as file:
            merged = merged_with(source, open_adapter(file), str(options.src))
            yield merged._replace(params=in_dtype(merged.params, dtype)), {}
    else:
        with open_any(options.src, options.step, dtype) as source:
            yield source, {}


def _results(options: Options) -> str:
    """Tables of evaluations, one level of headings below a model card's."""
    if options.results is None:
        return ""
    from rwkvx_jax.evals.report import as_markdown, find_runs, sections  # draws: slow to import

    found = [s._replace(figures=[]) for s in sections(find_runs([options.results]))]
    text = as_markdown("Results", found)
    return re.sub("^#", "##", text, flags=re.MULTILINE)


def _export(options: Options, source: OwnCheckpoint, results: str, console: Console) -> None:
    """Writes a directory for the Hub."""
    with _watched(options, source, console) as (read, accept):
        tensors = exported_tensors(read, _dtype(options))
        names = "official" if has_official_form(source.config) else "our"
        facts = Facts(
            f"safetensors, tensors of {names} names",
            sum(tensor.nbytes for tensor in tensors.values()),
            source.config,
            Counter(tensor.dtype.name for tensor in tensors.values()),
            source.tokenizer_name,
            "",
            source.trained,
        )
        name = options.dst.absolute().name
        card = model_card(name, describe(name, facts), results, source.config)
        write_directory(options.dst, read, tensors, card, shard_bytes(options.shard_size), accept)
    say(
        console,
        f"{options.dst}: directory for the Hub, {facts.bytes / 1e6:,.1f} MB of tensors of {names} "
        f"names; send it with `hf upload ORGANIZATION/{name} {options.dst}`",
    )


def _watched(options: Options, source: OwnCheckpoint, console: Console):
    return watched(
        source,
        options.src,
        options.dst,
        console,
        allow_nonfinite=options.allow_nonfinite,
        remedy="--allow-nonfinite copies them",
    )


def _convert(
    options: Options, source: OwnCheckpoint, extra: Mapping[str, str], console: Console
) -> None:
    """Writes a single file."""
    official = options.to == "official" or (
        options.to == "auto" and options.dst.suffix in TORCH_SUFFIXES
    )
    if not official and options.dst.suffix != ".safetensors":
        raise ConversionError(
            f"{options.dst}: our checkpoints are .safetensors files (for a directory with a "
            "config.json add --to hub)"
        )
    with _watched(options, source, console) as (source, accept):
        if official:
            tensors, metadata = _official(options, source, console), {}
        else:
            tensors = source.params
            metadata = own_metadata(
                source.config, source.tokenizer_name, source.info, source.trained
            ) | dict(extra)
        write_tensors(options.dst, tensors, metadata, accept)
    if options.adapter:
        say(
            console,
            f"{options.dst}: adapter, {size(options.dst) / 1e6:,.1f} MB; apply it to its base with "
            f"`rwkvx convert BASE NEW.safetensors --merge {options.dst}`",
        )
    else:
        say(console, _summary(options.dst, official, source.config))


def _dtype(options: Options) -> np.dtype | None:
    return None if options.dtype == "keep" else DTYPES[options.dtype]


def _configured(options: Options, source: OwnCheckpoint) -> OwnCheckpoint:
    """The source with those settings that the options give."""
    settings = {"chunk_size": options.chunk_size, "top_k": options.top_k}
    given = {name: size for name, size in settings.items() if size is not None}
    return source._replace(config=dataclasses.replace(source.config, **given))


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
    say(console, f"warning: {problem}; no tokenizer is named in the file")
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
        say(
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
        f"{size(dst) / 1e6:,.1f} MB; {config.blocks_title}, width {config.width}, "
        f"vocabulary {config.vocab_size}{states}"
    )


def main(argv: list[str], prog: str = "python -m rwkvx_jax.convert") -> None:
    settle_platform()
    with command_line(prog, argv):
        options = parse(Options, argv, prog)
        if options.inspect:
            show("".join(f"{line}\n" for line in inspect(options)))
        else:
            convert(options, Console(stderr=True))


if __name__ == "__main__":
    main(sys.argv[1:])
