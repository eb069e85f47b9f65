"""What a checkpoint is and what it can be used for, as lines of text. No parameter is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from rwkvx_jax.config import ModelConfig, to_dict
from rwkvx_jax.convert.files import INDEX, files_of
from rwkvx_jax.convert.own import OwnCheckpoint, Trained
from rwkvx_jax.storage import size
from rwkvx_jax.tokenizer import TOKENIZER_IDS

_LAYOUTS = {
    "ours": "tensors of our names",
    "official": "tensors of the official names",
    "fla": "tensors of flash-linear-attention's names",
    "llama": "tensors of Llama's names",
}


class Facts(NamedTuple):
    """What is told of a checkpoint."""

    form: str  # what kind of file, directory or run it is
    bytes: int  # on the disk
    config: ModelConfig
    dtypes: Mapping[str, int]  # how many parameters (arrays) have each dtype
    tokenizer: str  # "" if unknown
    vocab_file: str  # of a run with a vocabulary of its own
    trained: Trained | None


def facts_of_file(path: Path, checkpoint: OwnCheckpoint) -> Facts:
    """The facts of a single file, an index or a directory on a disk.

    Args:
      path: what was opened.
      checkpoint: what `open_checkpoint` gave for it.
    """
    files = files_of(path)
    if path.is_dir():
        form = f"directory with {_counted(files)}"
    elif path.name.endswith(INDEX):
        form = f"index of {_counted(files)}"
    else:
        form = f"{path.suffix} file"
    return Facts(
        f"{form}, {_LAYOUTS[checkpoint.layout]}",
        sum(map(size, files)),
        checkpoint.config,
        Counter(param.dtype.name for param in checkpoint.params.values()),
        checkpoint.tokenizer_name,
        "",
        checkpoint.trained,
    )


def _counted(files: list[Path]) -> str:
    return files[0].name if len(files) == 1 else f"{len(files)} {files[0].suffix} files"


def describe(name: str, facts: Facts) -> list[str]:
    """Lines "field  text" on a checkpoint.

    Args:
      name: of the checkpoint, as the user gave it.
      facts: of it.
    """
    config = facts.config
    fields = {
        "checkpoint": name,
        "form": facts.form,
        "size": f"{facts.bytes / 1e6:,.1f} MB on the disk",
        "model": f"{config.title}: {', '.join(_parts(config))}",
        "parameters": f"{config.num_parameters:,}",
        "dtypes": ", ".join(f"{dtype} ({count} arrays)" for dtype, count in facts.dtypes.items()),
        "tokenizer": _tokenizer(facts),
        "training": _training(facts.trained),
        "config": ", ".join(f"{name} {value}" for name, value in to_dict(config).items()),
        **_uses(name, facts),
    }
    return [f"{field:<12}{text}" for field, text in fields.items()]


def _parts(config: ModelConfig) -> Iterator[str]:
    """The sizes of a model."""
    if config.num_blocks:
        yield f"{config.num_blocks} {config.mixer_title} blocks"
    if config.num_attention_blocks:
        where = f" (one after every {config.blocks_per_group})" if config.num_blocks else ""
        shared = ", all the same" if config.shared_attention else ""
        yield f"{config.num_attention_blocks} attention blocks{where}{shared}"
    yield f"width {config.width}"
    grouped = config.kv_heads != config.num_heads
    kv = f" ({config.kv_heads} of keys and values)" if grouped else ""
    yield f"{config.num_heads} heads of {config.head_size}{kv}"
    yield f"channel mix {config.hidden_width}"
    yield f"vocabulary {config.vocab_size}"


def _tokenizer(facts: Facts) -> str:
    if facts.vocab_file:
        return f"{facts.tokenizer}, with the vocabulary {facts.vocab_file}"
    return facts.tokenizer or "not known"


def _training(trained: Trained | None) -> str:
    if trained is None:
        return "not known"
    length = "" if trained.length is None else f", sequences of up to {trained.length} tokens"
    return f"step {trained.step}{length}"


def _uses(name: str, facts: Facts) -> dict[str, str]:
    """What the checkpoint can be used for; what else that needs."""
    config = facts.config
    text = "yes"
    fitting = [name for name, ids in TOKENIZER_IDS.items() if ids <= config.vocab_size]
    if not facts.tokenizer and fitting:
        text = (
            "needs a tokenizer: name the one of its training with `python -m rwkvx_jax.convert "
            f"{name} NEW.safetensors --tokenizer {'|'.join(fitting)}`"
        )
    elif not facts.tokenizer:
        text = f"no: a vocabulary of {config.vocab_size} is too small for our tokenizers"
    elif not facts.vocab_file and TOKENIZER_IDS[facts.tokenizer] > config.vocab_size:
        text = (
            f"no: the {facts.tokenizer} tokenizer has {TOKENIZER_IDS[facts.tokenizer]} ids, the "
            f"model {config.vocab_size}"
        )
    start = "yes, where the config has this model and the first stage has expanded=True"
    expansion = "has attention blocks already"
    if not config.num_attention_blocks:
        start = "yes, where the config has this RWKV-7; attention blocks come with expansion"
        expansion = "needed for attention blocks: `python -m rwkvx_jax.expand_checkpoint`"
    return {
        "load_model": "yes",
        "generate": text,
        "eval": text,
        "--init-from": start,
        "expansion": expansion,
    }
