"""The model configuration that the shapes of a checkpoint imply, in any layout of the table.

Only sizes are looked at, each at its first occurrence; that all the other tensors agree with them
is for `layout.check` to find. Chunk size and top-k leave no trace in the shapes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import get_args

from rwkvx_jax.config import ConfigError, LowRankRule, ModelConfig, low_rank_widths
from rwkvx_jax.convert.layout import PARAMETERS, Naming
from rwkvx_jax.convert.tensors import ConversionError, LazyTensor

_FEW = 200  # missing tensors that are listed one by one even if most are missing
_BY_NAME = {parameter.name: parameter for parameter in PARAMETERS}


def infer_config(tensors: Mapping[str, LazyTensor], naming: Naming) -> ModelConfig:
    """Reads the configuration off the shapes; what leaves no trace there has official values.

    Args:
      tensors: of a checkpoint in the layout of `naming`.
      naming: the layout.

    Raises:
      ConversionError: this is no RWKV-7 checkpoint, or its sizes make no valid model.
    """
    blocks = _count_layers(tensors, naming.block)
    if not blocks:
        shown = ", ".join(list(tensors)[:5])
        raise ConversionError(
            f"no tensors of RWKV-7 blocks among the {len(tensors)} ({shown}, ...)"
        )
    attention_blocks = 0
    if naming.attention_block is not None:
        attention_blocks = _count_layers(tensors, naming.attention_block)
    _check_counts(tensors, naming, blocks, attention_blocks)
    vocab_size, width = _shape(tensors, naming, "embed", blocks)
    hidden_width = _shape(tensors, naming, "blocks.channel_mix.key", blocks)[1]
    ranks = {}
    for pair in "wavg":
        found = _shape(tensors, naming, f"blocks.time_mix.{pair}1", blocks, required=pair != "v")
        ranks[pair] = found[1] if found else None
    rule, override = _low_rank(width, ranks)
    try:
        return ModelConfig(
            vocab_size=vocab_size,
            num_blocks=blocks,
            num_attention_blocks=attention_blocks,
            width=width,
            head_size=_shape(tensors, naming, "blocks.time_mix.r_k", blocks)[1],
            ffn_width=0 if hidden_width == 4 * width else hidden_width,
            learned_state=_has(tensors, naming, "blocks.time_mix.initial_state"),
            low_rank=rule,
            low_rank_override=override,
        )
    except ConfigError as error:
        raise ConversionError(f"the shapes make no valid model: {error}") from error


def _count_layers(tensors: Mapping[str, LazyTensor], template: str) -> int:
    """One more than the highest layer number among the names."""
    before = re.escape(template.partition("{i}")[0])
    matches = (re.match(rf"{before}([0-9]{{1,18}})\.", name) for name in tensors)
    return max((int(match[1]) + 1 for match in matches if match), default=0)


def _check_counts(
    tensors: Mapping[str, LazyTensor], naming: Naming, blocks: int, attention_blocks: int
) -> None:
    """Refuses numbers of blocks that the number of tensors belies, before blocks are listed."""
    kinds = [p.name.partition(".")[0] for p in PARAMETERS if getattr(p, naming.column)]
    needed = blocks * kinds.count("blocks") + attention_blocks * kinds.count("attention_blocks")
    if needed > 2 * len(tensors) + _FEW:
        raise ConversionError(
            f"by the highest number in a name there are {blocks} RWKV-7 blocks and "
            f"{attention_blocks} attention blocks, which have about {needed} tensors, but there "
            f"are {len(tensors)}: a name is wrong, or most tensors are missing"
        )


def _shape(
    tensors: Mapping[str, LazyTensor],
    naming: Naming,
    parameter: str,
    blocks: int,
    required: bool = True,
) -> tuple[int, int] | None:
    """Our shape of a matrix, at its first occurrence; None if there is none."""
    stored = getattr(_BY_NAME[parameter], naming.column)
    if parameter.startswith("blocks."):
        names = [naming.block.format(stored.name, i=i) for i in range(blocks)]
    else:
        names = [naming.top.format(stored.name)]
    name = next((n for n in names if n in tensors), None)
    if name is None:
        if required:
            raise ConversionError(f"there is no tensor {names[0]}: not an RWKV-7 or RWKV-X model")
        return None
    shape = tensors[name].shape
    if len(shape) != 2:
        raise ConversionError(f"{name} has shape {shape}; a matrix was expected")
    return shape[::-1] if stored.form == "transposed" else shape


def _has(tensors: Mapping[str, LazyTensor], naming: Naming, parameter: str) -> bool:
    """Whether a parameter that every RWKV-7 block has or none is there."""
    stored = getattr(_BY_NAME[parameter], naming.column)
    return stored is not None and naming.block.format(stored.name, i=0) in tensors


def _low_rank(
    width: int, found: Mapping[str, int | None]
) -> tuple[LowRankRule, tuple[int, int, int, int] | None]:
    """The formula that gives the widths found (None: not in the file), or else the widths."""
    for rule in get_args(LowRankRule):
        widths = low_rank_widths(width, rule)._asdict()
        if all(found[pair] in (None, widths[pair]) for pair in "wavg"):
            return rule, None
    unused = low_rank_widths(width, "rwkvx")._asdict()
    return "rwkvx", tuple(found[pair] or unused[pair] for pair in "wavg")
