"""Command line: `python -m rwkvx_jax.expand_checkpoint BASE HYBRID`.

Block expansion of a pretrained RWKV-7 into an RWKV-X with new attention blocks, without training.
With --attention-init zero (the paper) or aligned the hybrid computes what the RWKV-7 computes, to
the bit; with copy (the repository) it does not. The same happens at the first expanded stage of a
training run; this command makes a file of it.
"""

from __future__ import annotations

import collections
import dataclasses
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import tyro
from rich.console import Console

from rwkvx_jax.checkpoint import nested, open_any
from rwkvx_jax.cli import command_line, parse, settle_platform
from rwkvx_jax.config import ConfigError
from rwkvx_jax.convert.own import OwnCheckpoint, own_metadata
from rwkvx_jax.convert.safetensors_file import write_safetensors
from rwkvx_jax.convert.tensors import DTYPES, as_lazy, in_dtype
from rwkvx_jax.convert.watched import say, watched
from rwkvx_jax.digest import flat
from rwkvx_jax.storage import WorkPath, size
from rwkvx_jax.training.expand import expand, parameters_read

_SETTINGS = (  # flags that are fields of ModelConfig
    "attention",
    "chunk_size",
    "top_k",
    "window_size",
    "selector",
    "selector_blocks",
    "index_size",
    "selection_groups",
    "selection_join",
    "share_selection_every",
    "key_conv",
    "attention_init",
    "init_seed",
)


@dataclass(frozen=True)
class Options:
    """Gives attention blocks to a pretrained RWKV-7."""

    src: tyro.conf.Positional[WorkPath]
    """The RWKV-7: .pth or .safetensors, a directory as the Hugging Face Hub has it, hf://org/name,
    or the directory of a training run."""
    dst: tyro.conf.Positional[WorkPath]
    """The hybrid: a .safetensors file of ours."""
    blocks: Annotated[int, tyro.conf.arg(metavar="M")]
    """Attention blocks; their number divides that of the RWKV-7 blocks."""
    attention: Literal["sparse", "full", "nsa"] | None = None
    """Kind of the attention blocks. This flag and those below: by default what the source says, an
    official file the values of the paper (sparse, 2048, 3, mean, zero)."""
    chunk_size: Annotated[int | None, tyro.conf.arg(metavar="TOKENS")] = None
    """Tokens of one chunk of the sparse attention."""
    top_k: Annotated[int | None, tyro.conf.arg(metavar="CHUNKS")] = None
    """Chunks that a query reads."""
    window_size: Annotated[int | None, tyro.conf.arg(metavar="TOKENS")] = None
    """Keys that the window branch of attention nsa reads."""
    selector: Literal["mean", "max", "pooled", "bounds", "index", "seer"] | None = None
    """How a query scores chunks; see docs/selectors.md."""
    selector_blocks: int | None = None
    """Parts of a chunk for the selectors max, pooled and index."""
    index_size: int | None = None
    """Channels of the vectors of the selectors index and seer; 0: as many as a head has."""
    selection_groups: int | None = None
    """Choices of chunks, each shared by neighbouring heads; 0: each head chooses for itself."""
    selection_join: Literal["sum", "max"] | None = None
    """What the scores of heads that choose together count as."""
    share_selection_every: int | None = None
    """Attention blocks that read the chunks which the first of them chose; 1: each chooses."""
    key_conv: int | None = None
    """Width of a causal convolution on the attention keys; 0 for none."""
    attention_init: Literal["zero", "copy", "aligned"] | None = None
    """New attention blocks: zero output projections; copies of the preceding RWKV-7 blocks'
    projections; or zero output projections with keys that equal the queries."""
    init_seed: int | None = None
    """Seed of the random values."""
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"
    """Dtype of the tensors written; keep: as in the source, and of the new blocks that of most
    tensors there."""
    step: int | None = None
    """Which checkpoint of a training run."""


def expanded(options: Options, base: OwnCheckpoint) -> OwnCheckpoint:
    """The hybrid that the options make of an RWKV-7; of it only what is copied is read.

    Raises:
      ConfigError: the source has attention blocks, or the options make no valid model.
    """
    if base.config.num_attention_blocks:
        raise ConfigError(
            f"{options.src} already has {base.config.num_attention_blocks} attention blocks: name "
            "an RWKV-7"
        )
    if options.blocks < 1:
        raise ConfigError(f"--blocks is {options.blocks}: name at least one attention block")
    values = {name: getattr(options, name) for name in _SETTINGS}
    given = {name: value for name, value in values.items() if value is not None}
    config = dataclasses.replace(base.config, num_attention_blocks=options.blocks, **given)
    read = in_dtype(base.params, DTYPES["float32"])
    known = nested({name: read[name].read() for name in parameters_read(config)})
    blocks = expand(known, config)["attention_blocks"]
    new = as_lazy({f"attention_blocks.{n}": a for n, a in flat(jax.device_get(blocks))})
    dtypes = collections.Counter(param.dtype for param in base.params.values())
    new = in_dtype(new, dtypes.most_common(1)[0][0])
    return OwnCheckpoint(config, base.tokenizer_name, {**base.params, **new}, None)


def run(options: Options, console: Console) -> None:
    """Writes the hybrid; it appears only when it is complete.

    Raises:
      ConfigError, ConversionError: see `expanded`, the readers and the writer.
    """
    if options.dst.suffix != ".safetensors":
        raise ConfigError(f"{options.dst}: the hybrid is written as a .safetensors file of ours")
    dtype = None if options.dtype == "keep" else DTYPES[options.dtype]
    with open_any(options.src, options.step, dtype) as base:
        hybrid = expanded(options, base)
        remedy = "use an earlier checkpoint"
        watch = watched(hybrid, options.src, options.dst, console, remedy=remedy)
        with watch as (source, accept):
            metadata = own_metadata(source.config, source.tokenizer_name)
            write_safetensors(options.dst, source.params, metadata, accept)
    config = hybrid.config
    say(
        console,
        f"{options.dst}: {size(options.dst) / 1e6:,.1f} MB; "
        f"{config.num_blocks} {config.mixer_title} blocks, "
        f"{config.num_attention_blocks} new attention blocks ({config.attention_init}), "
        f"{config.num_parameters:,} parameters",
    )


def main(argv: list[str], prog: str = "python -m rwkvx_jax.expand_checkpoint") -> None:
    settle_platform()
    with command_line(prog, argv):
        run(parse(Options, argv, prog), Console(stderr=True))


if __name__ == "__main__":
    main(sys.argv[1:])
