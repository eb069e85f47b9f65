"""Writes a directory as the Hugging Face Hub has them: config.json, tensors, a model card.

The tensors have the official names, which other programs know; a model without an official form
has ours. What they do not tell of the model is in the metadata of their files, so that a file alone
tells it as well, and in the config.json, which a reader can see; they are held against each other.
So the directory reads back as the checkpoint that it was written from.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rwkvx_jax.config import ConfigError, ModelConfig
from rwkvx_jax.convert.directory import CONFIG_FILE, SETTINGS
from rwkvx_jax.convert.files import INDEX
from rwkvx_jax.convert.layout import outside_table
from rwkvx_jax.convert.official import has_official_form, params_to_official
from rwkvx_jax.convert.own import OwnCheckpoint, own_metadata
from rwkvx_jax.convert.safetensors_file import write_safetensors
from rwkvx_jax.convert.tensors import ConversionError, LazyTensor
from rwkvx_jax.storage import in_bucket, in_hub

CARD = "README.md"
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]?)B", re.IGNORECASE | re.ASCII)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_STEM = "model"


def shard_bytes(text: str) -> int:
    """The number of bytes that a size such as "5GB" names; units are powers of 1000.

    Raises:
      ConfigError: no such size, or none of at least one byte.
    """
    match = _SIZE.fullmatch(text.strip())
    number = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if number < 1:
        raise ConfigError(f"--shard-size is {text!r}: write a size such as 5GB or 500MB")
    return number


def check_new_directory(path: Path) -> None:
    """Raises ConversionError unless a directory can be made at `path` that replaces nothing."""
    if in_bucket(path) or in_hub(path):
        raise ConversionError(
            f"{path}: a directory for the Hub is written to a disk; send it on from there, to the "
            "Hub with `hf upload`"
        )
    if not path.parent.is_dir():
        raise ConversionError(f"cannot write {path}: directory {path.parent} does not exist")
    if path.absolute() == Path.cwd():
        raise ConversionError(f"{path} is the current directory: name a new one")
    if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
        raise ConversionError(
            f"{path} exists: name a new directory, so that nothing of another model stays in it"
        )


def exported_tensors(source: OwnCheckpoint, dtype: np.dtype | None) -> dict[str, LazyTensor]:
    """The tensors of a directory, under official names where the model has an official form.

    Args:
      source: the checkpoint.
      dtype: of all tensors; None: that of the official file it came from, without one its own.
    """
    if not has_official_form(source.config):
        return dict(source.params)
    return params_to_official(source.config, source.params, source.info, dtype, every_row=True)


def write_directory(
    path: Path,
    source: OwnCheckpoint,
    tensors: Mapping[str, LazyTensor],
    card: str,
    shard_size: int,
    accept: Callable[[], None],
) -> None:
    """Writes the directory; it appears only when it is complete.

    Args:
      path: destination, as `check_new_directory` wants it.
      source: the checkpoint.
      tensors: of the directory, as `exported_tensors` gives them.
      card: text of the model card.
      shard_size: most bytes of tensors in one file, but for a single tensor that is larger.
      accept: called when all is written; if it raises, the directory does not appear.

    Raises:
      ConversionError: it can't be written.
    """
    shards = _shards(tensors, shard_size)
    names = [f"{_STEM}.safetensors"]
    if len(shards) > 1:
        count = len(shards)
        names = [f"{_STEM}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    settings = own_metadata(source.config, source.tokenizer_name, source.info, source.trained)
    metadata = settings | {"format": "pt"}  # without which transformers refuses a file
    with _made_whole(path) as folder:
        for name, shard in zip(names, shards, strict=True):
            write_safetensors(folder / name, {n: tensors[n] for n in shard}, metadata)
        if len(shards) > 1:
            places = {n: name for name, shard in zip(names, shards, strict=True) for n in shard}
            size = sum(tensor.nbytes for tensor in tensors.values())
            index = {"metadata": {"total_size": size}, "weight_map": places}
            _write_json(folder / f"{_STEM}.safetensors{INDEX}", index)
        _write_json(folder / CONFIG_FILE, _options(source.config, tensors) | {SETTINGS: settings})
        (folder / CARD).write_text(card, encoding="utf-8")
        accept()


@contextlib.contextmanager
def _made_whole(path: Path) -> Iterator[Path]:
    """A folder to fill that takes its name when the block ends without error."""
    path = path.absolute()
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise ConversionError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _shards(tensors: Mapping[str, LazyTensor], most: int) -> list[list[str]]:
    """Names of the tensors of each file, in order."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    return shards


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def _options(config: ModelConfig, tensors: Mapping[str, LazyTensor]) -> dict[str, Any]:
    """The sizes of a model under the names that transformers' RWKV-7 has for them."""
    ranks = {
        "decay_low_rank_dim": config.ranks.w,
        "a_low_rank_dim": config.ranks.a,
        "v_low_rank_dim": config.ranks.v,
        "gate_low_rank_dim": config.ranks.g,
    }
    norms = {"norm_eps": config.norm_eps, "norm_bias": True} if config.backbone == "rwkv" else {}
    dtypes = [tensor.dtype.name for tensor in tensors.values()]
    return {
        "model_type": _model_type(config),
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_blocks,
        "intermediate_size": config.hidden_width,
        "num_heads": config.num_heads,
        "head_dim": config.head_size,
        **(ranks if config.mixer == "rwkv7" else {}),
        **norms,
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "dtype": max(set(dtypes), key=dtypes.count),
    }


def _model_type(config: ModelConfig) -> str:
    """The name for a model of transformers if it is one: an RWKV-7 without attention blocks and
    learned states, its heads of 64 (there, others are normalised with another epsilon)."""
    plain = not outside_table(config) and not config.learned_state
    plain = plain and config.num_attention_blocks == 0 and config.head_size == 64
    return "rwkv7" if plain else "rwkvx"


def model_card(name: str, facts: Sequence[str], results: str, config: ModelConfig) -> str:
    """The text of a model card, Markdown.

    Args:
      name: of the directory.
      facts: lines of `inspection.describe`.
      results: Markdown with tables of evaluations, or "".
      config: the model.
    """
    listed = "\n".join(f"    {line}" for line in facts)
    tags = f"- rwkv\n- {config.mixer}" if config.num_blocks else "- transformer"
    return f"""---
library_name: rwkvx-jax
pipeline_tag: text-generation
tags:
{tags}
---

# {name}

{listed}

Load it with rwkvx-jax, from this directory or from the Hub:

```python
from rwkvx_jax import load_model

model = load_model("hf://ORGANIZATION/{name}")
```

The settings that the tensors do not tell are in the metadata of their files, and in `config.json`
under `{SETTINGS}`. The license of the weights and what they were trained on are not stated here.
{results and chr(10) + results}"""
