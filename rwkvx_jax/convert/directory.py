"""config.json of a Hugging Face directory: which model it describes, held against the tensors.

The mathematics of an RWKV-7 is fixed where such a file may choose it, so that an option that
changes it is refused. Its sizes are read off the tensors; the file must not contradict them. Of a
Transformer the file says everything, see `llama.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rwkvx_jax.config import ModelConfig
from rwkvx_jax.convert import llama
from rwkvx_jax.convert.tensors import ConversionError, read_json

CONFIG_FILE = "config.json"
SETTINGS = "rwkvx_jax"
"""The option that holds what `own.own_metadata` says, in directories that were written here."""
_KINDS = ("rwkv7", "rwkv7_fla", "rwkvx", "rwkv")  # "rwkv": also of transformers' RWKV-4
# Options that change the mathematics: the values of RWKV-7, which are the defaults as well.
_REQUIRED = {
    "norm_first": True,
    "norm_bias": True,
    "norm_eps": 1e-5,
    "hidden_act": "sqrelu",
    "attn": None,
    "architecture_version": "rwkv7",
    "use_deep_embed": False,
}
_HEAD_EPSILON = 64e-5  # of the normalisation of heads in the official code


def read_options(directory: Path) -> dict[str, Any]:
    """The options of a directory's config.json; none where there is no such file.

    Raises:
      ConversionError: the file can't be read, is of another model or of a run of ours without a
        checkpoint, or has an option that our model lacks.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        return {}
    options = read_json(path)
    options = options if isinstance(options, dict) else {}
    if {"model", "stages"} <= options.keys():
        raise ConversionError(
            f"{directory} is a training run that has saved no checkpoint yet: wait for its first "
            "one (run.checkpoint_every)"
        )
    kind = options.get("model_type")
    if kind in llama.KINDS:
        llama.check_llama_file(path, options)
        return options
    if kind not in _KINDS:
        raise ConversionError(
            f"{path}: model_type is {kind!r:.60}; only RWKV-7, Llama and Qwen2 can be converted"
        )
    wrong = [
        f"{name} = {options[name]!r:.60} (only {value!r})"
        for name, value in _REQUIRED.items()
        if options.get(name, value) != value
    ]
    if wrong:
        raise ConversionError(f"{path}: options that our model does not have: {', '.join(wrong)}")
    settings = options.get(SETTINGS, {})
    texts = settings.values() if isinstance(settings, dict) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise ConversionError(f"{path}: {SETTINGS} is no table of texts: the file is damaged")
    return options


def check_sizes(directory: Path, options: Mapping[str, Any], config: ModelConfig) -> None:
    """Holds the options of `read_options` against the sizes of the tensors.

    Raises:
      ConversionError: names every option that contradicts them; or heads that other programs
        normalise with another epsilon than the official code.
    """
    if options.get("model_type") in llama.KINDS:
        return  # the tensors were checked against these options
    ranks = config.ranks
    sizes = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_blocks,
        "intermediate_size": config.hidden_width,
        "head_dim": config.head_size,
        "head_size": config.head_size,
        "num_heads": config.num_heads,
        "num_attention_heads": config.num_heads,
        "decay_low_rank_dim": ranks.w,
        "a_low_rank_dim": ranks.a,
        "v_low_rank_dim": ranks.v,
        "gate_low_rank_dim": ranks.g,
    }
    wrong = [
        f"{name} is {options[name]!r:.60}, but the tensors say {size}"
        for name, size in sizes.items()
        if options.get(name) not in (None, size)
    ]
    path = directory / CONFIG_FILE
    if wrong:
        raise ConversionError(f"{path}: {'; '.join(wrong)}")
    epsilon = config.head_size * _REQUIRED["norm_eps"]
    if options.get("model_type") in ("rwkv7", "rwkv7_fla") and not math.isclose(
        epsilon, _HEAD_EPSILON
    ):
        raise ConversionError(
            f"{path}: with head_dim {config.head_size}, models of type {options['model_type']} "
            f"normalise heads with epsilon {epsilon:g}; ours is {_HEAD_EPSILON:g} as in the "
            "official code, which agrees only for head_dim 64"
        )
