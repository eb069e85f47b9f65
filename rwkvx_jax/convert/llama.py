"""Transformers of Hugging Face's layouts of Llama and Qwen2, as our parameters. Reading only.

Both have the same names; Qwen2 has biases on queries, keys and values. The mathematics is in the
config.json: `llama_config` makes a model of it, or refuses an option that our model lacks. Rotary
positions pair channels as ours do, so that matrices are only transposed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rwkvx_jax.config import ConfigError, ModelConfig
from rwkvx_jax.convert.layout import Form, Slot, check, param_shapes, to_params
from rwkvx_jax.convert.tensors import ConversionError, LazyTensor

KINDS = ("llama", "qwen2")
"""Values of model_type."""

_TIED = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"
# By our names: theirs (within a layer, or whole), without ".weight", and their form.
_ATTENTION = {"receptance": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
_MLP = {"gate": "gate_proj", "key": "up_proj", "value": "down_proj"}
_NAMES: dict[str, tuple[str, Form]] = {
    "embed": (_TIED, "plain"),
    "attention_blocks.ln1.scale": ("input_layernorm.weight", "plain"),
    **{
        f"attention_blocks.attention.{ours}": (f"self_attn.{theirs}.weight", "transposed")
        for ours, theirs in _ATTENTION.items()
    },
    **{
        f"attention_blocks.attention.{ours}_bias": (f"self_attn.{theirs}.bias", "plain")
        for ours, theirs in _ATTENTION.items()
    },
    "attention_blocks.ln2.scale": ("post_attention_layernorm.weight", "plain"),
    **{
        f"attention_blocks.channel_mix.{ours}": (f"mlp.{theirs}.weight", "transposed")
        for ours, theirs in _MLP.items()
    },
    "ln_out.scale": ("model.norm.weight", "plain"),
    "head.weight": (_HEAD, "transposed"),
}
# Options that change the mathematics: the values of our model, which are the defaults as well.
_REQUIRED = {
    "hidden_act": "silu",
    "attention_bias": False,  # of Llama: biases on the output, too
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
_ROPE_SCALING = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


def has_llama_names(names: Collection[str]) -> bool:
    """Whether these names of tensors are those of Llama and Qwen2."""
    return any("model.layers." in name and ".self_attn.q_proj." in name for name in names)


def llama_config(options: Mapping[str, Any]) -> ModelConfig:
    """The model that a config.json of one of `KINDS` describes.

    Raises:
      ConversionError: an option that our model lacks, that is missing or of no use; names it.
    """
    _check_options(options)
    width, heads = _size(options, "hidden_size"), _size(options, "num_attention_heads")
    theta, scaling = _rope(options)
    try:
        return ModelConfig(
            vocab_size=_size(options, "vocab_size"),
            num_blocks=0,
            num_attention_blocks=_size(options, "num_hidden_layers"),
            width=width,
            head_size=width // heads,
            ffn_width=_size(options, "intermediate_size"),
            backbone="llama",
            norm_eps=_number(options, "rms_norm_eps", 1e-6),
            tied_embeddings=options.get("tie_word_embeddings") is True,
            attention="full",
            num_kv_heads=_size(options, "num_key_value_heads", heads),
            qkv_bias=options["model_type"] == "qwen2",
            rope_theta=theta,
            rope_scaling=scaling,
        )
    except ConfigError as error:
        raise ConversionError(f"the options make no valid model: {error}") from error


def open_llama(
    tensors: Mapping[str, LazyTensor], options: Mapping[str, Any], dtype: np.dtype | None = None
) -> tuple[ModelConfig, dict[str, LazyTensor]]:
    """A Transformer under the names of Llama and Qwen2 as our parameters, read lazily.

    Args:
      tensors: of the model.
      options: its config.json.
      dtype: of the parameters; None keeps the stored one.

    Returns:
      The configuration and our parameters by name.

    Raises:
      ConversionError: as `llama_config`; tensors that are missing, extra or contradict the options
        (all of them listed).
    """
    config = llama_config(options)
    # Old files hold the rotary frequencies, which follow from the options; some with a tied head
    # hold it twice.
    tensors = {name: t for name, t in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    if config.tied_embeddings:
        tensors.pop(_HEAD, None)
    wanted = list(llama_slots(config))
    check(tensors, wanted)
    return config, to_params(config, tensors, wanted, dtype)


def llama_slots(config: ModelConfig) -> Iterator[Slot]:
    """Every tensor of a Transformer in this layout."""
    for name, shape in param_shapes(config).items():
        stored, form = _NAMES[name]
        if name == "head.weight" and config.tied_embeddings:
            stored, form = _TIED, "plain"
        if not name.startswith("attention_blocks."):
            yield Slot(name, None, shape, stored, form)
            continue
        for i in range(shape[0]):
            yield Slot(name, i, shape[1:], f"model.layers.{i}.{stored}", form)


def check_llama_file(directory: Path, options: Mapping[str, Any]) -> None:
    """Raises ConversionError, which names the file, as `llama_config` does."""
    try:
        llama_config(options)
    except ConversionError as error:
        raise ConversionError(f"{directory}: {error}") from error


def _check_options(options: Mapping[str, Any]) -> None:
    wrong = [
        f"{name} = {options[name]!r:.60} (only {value!r})"
        for name, value in _REQUIRED.items()
        if options.get(name, value) != value
    ]
    kinds = options.get("layer_types") or []
    if other := sorted({str(kind) for kind in kinds} - {"full_attention"}):
        wrong.append(f"layer_types {', '.join(other):.60} (only full_attention)")
    if wrong:
        raise ConversionError(f"options that our model does not have: {', '.join(wrong)}")
    width, heads = _size(options, "hidden_size"), _size(options, "num_attention_heads")
    head_size = options.get("head_dim") or width // heads
    if head_size * heads != width:
        raise ConversionError(
            f"{heads} heads of head_dim {head_size!r:.60} are not hidden_size {width}: our model "
            "has heads that share out its width"
        )


def _rope(options: Mapping[str, Any]) -> tuple[float, tuple[float, float, float, float] | None]:
    """`ModelConfig.rope_theta` and `rope_scaling`, from options of old and of new files."""
    new = options.get("rope_parameters")
    scaling = new if new is not None else options.get("rope_scaling")
    scaling = {} if scaling is None else scaling
    if not isinstance(scaling, dict):
        raise ConversionError(f"rope_scaling is {scaling!r:.60}: expected an object or null")
    theta = _number(scaling if "rope_theta" in scaling else options, "rope_theta", 10000.0)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ConversionError(
            f"rope_scaling of type {kind!r:.60}: of those that change the rotary frequencies our "
            "model only has 'llama3'"
        )
    factor, low, high, original = (_number(scaling, name) for name in _ROPE_SCALING)
    return theta, (factor, low, high, original)


def _number(options: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = options.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConversionError(f"{name} is {value!r:.60}: expected a number")
    return float(value)


def _size(options: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = options.get(name, default)
    value = default if value is None else value
    if type(value) is not int or value < 1:
        raise ConversionError(f"{name} is {value!r:.60}: expected a whole number of at least 1")
    return value
