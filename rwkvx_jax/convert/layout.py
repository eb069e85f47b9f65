"""Which parameter of ours is which tensor of the other layouts, and the machinery that uses it.

Ours are stacked over the layers along axis 0 and keep every matrix as [in, out]; official files
and flash-linear-attention's keep one tensor per layer, and linear layers as [out, in]. One table
says all of it; `to_params` and `from_params` follow the table in either direction, lazily.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping
from typing import Literal, NamedTuple

import numpy as np

from rwkvx_jax.config import ModelConfig
from rwkvx_jax.convert.tensors import DTYPES, ConversionError, LazyTensor, cast
from rwkvx_jax.digest import flat

Form = Literal["plain", "transposed", "wrapped", "vector"]
"""How a tensor is stored elsewhere: as it is; transposed; as [1, 1, D]; as a vector with any
number of leading ones."""


class Stored(NamedTuple):
    """Name (within its layer, or whole) and form of a tensor in another layout."""

    name: str
    form: Form = "plain"


class Parameter(NamedTuple):
    """One parameter of ours. `dims` spells its shape without the layer axis: letters as everywhere,
    and w, a, v, g for the four low-rank widths."""

    name: str
    dims: str
    official: Stored
    fla: Stored | None = None


def _norm(ours: str, official: str, fla: str | None) -> list[Parameter]:
    return [
        Parameter(
            f"{ours}.{part}",
            "D",
            Stored(f"{official}.{torch_part}"),
            Stored(f"{fla}.{torch_part}") if fla else None,
        )
        for part, torch_part in (("scale", "weight"), ("bias", "bias"))
    ]


def _linear(ours: str, dims: str, official: str, fla: str | None = None) -> Parameter:
    fla_stored = Stored(f"{fla}.weight", "transposed") if fla else None
    return Parameter(ours, dims, Stored(f"{official}.weight", "transposed"), fla_stored)


def _vector(ours: str, official: str, fla: str | None = None) -> Parameter:
    fla_stored = Stored(fla, "vector") if fla else None
    return Parameter(ours, "D", Stored(official, "wrapped"), fla_stored)


def _time_mix(name: str) -> Parameter:
    """A vector or low-rank matrix of the time mix, by its official name."""
    ours, official, fla = f"blocks.time_mix.{name}", f"att.{name}", f"attn.{name}"
    if name == "r_k":
        return Parameter(ours, "HK", Stored(official), Stored(fla))
    if name in ("k_k", "k_a"):
        return _vector(ours, official, fla)
    pair, part = name
    fla = f"attn.{pair}_lora.lora"
    if part == "0":
        return _vector(ours, official, f"{fla}.2.bias")
    dims, layer = (f"D{pair}", 0) if part == "1" else (f"{pair}D", 2)
    return Parameter(ours, dims, Stored(official), Stored(f"{fla}.{layer}.weight", "transposed"))


def _channel_mix(ours: str, fla: str | None) -> list[Parameter]:
    def inner(name):
        return f"{fla}.{name}" if fla else None

    return [
        _vector(f"{ours}.x_k", "ffn.x_k", inner("x_k")),
        _linear(f"{ours}.key", "DF", "ffn.key", inner("key")),
        _linear(f"{ours}.value", "FD", "ffn.value", inner("value")),
    ]


_PROJECTIONS = {"receptance": "r_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}

# Within a block, the table has the order of the released RWKV-7 files, on which readers by order
# (RWKV-LM's rwkv_v7_numpy.py) rely.
_TIME_MIX_ORDER = "w0 r_k w1 w2 a1 a2 a0 g1 g2 v2 v1 v0 k_k k_a"

PARAMETERS: tuple[Parameter, ...] = (
    Parameter("embed", "WD", Stored("emb.weight"), Stored("model.embeddings.weight")),
    *_norm("ln0", "blocks.0.ln0", "model.layers.0.pre_norm"),
    *_norm("blocks.ln1", "ln1", "attn_norm"),
    *_norm("blocks.ln2", "ln2", "ffn_norm"),
    *(_vector(f"blocks.time_mix.x_{s}", f"att.x_{s}", f"attn.x_{s}") for s in "rwkvag"),
    *map(_time_mix, _TIME_MIX_ORDER.split()),
    *(
        _linear(f"blocks.time_mix.{name}", "DD", f"att.{name}", f"attn.{fla}")
        for name, fla in _PROJECTIONS.items()
    ),
    *_norm("blocks.time_mix.ln_x", "att.ln_x", "attn.g_norm"),
    # Named and laid out as RWKV-PEFT stores the result of its state tuning.
    Parameter("blocks.time_mix.initial_state", "HVK", Stored("att.time_state")),
    *_channel_mix("blocks.channel_mix", "ffn"),
    *_norm("attention_blocks.ln1", "ln1", None),
    *_norm("attention_blocks.ln2", "ln2", None),
    *(_linear(f"attention_blocks.attention.{name}", "DD", f"att.{name}") for name in _PROJECTIONS),
    Parameter("attention_blocks.attention.key_conv", "CD", None, None),
    *_channel_mix("attention_blocks.channel_mix", None),
    *_norm("ln_out", "ln_out", "model.norm"),
    _linear("head.weight", "DW", "head", "lm_head"),
)

VALUE_RESIDUAL = tuple(f"blocks.time_mix.v{i}" for i in range(3))
"""Parameters that exist in our stack for block 0 as well, where nothing uses them."""


def _dim_sizes(config: ModelConfig) -> dict[str, int]:
    return {
        "W": config.vocab_size,
        "D": config.width,
        "H": config.num_heads,
        "K": config.head_size,
        "V": config.head_size if config.learned_state else 0,  # of learned states only
        "F": config.hidden_width,
        "C": config.key_conv,
        **config.ranks._asdict(),
    }


def _stack_size(parameter: Parameter, config: ModelConfig) -> int | None:
    """Layers in the parameter's stack; None if it is not stacked."""
    if parameter.name.startswith("blocks."):
        return config.num_blocks
    if parameter.name.startswith("attention_blocks."):
        return config.num_attention_blocks
    return None


def outside_table(config: ModelConfig) -> str | None:
    """A part of a model that the table does not describe, and no other layout has; None if there
    is none."""
    plain = ModelConfig()
    fields = ["mixer", "backbone", "tied_embeddings"]
    if config.num_attention_blocks:
        fields += ["qkv_bias", "rope_theta", "shared_attention"]
    values = {name: getattr(config, name) for name in fields}
    found = [f"{name}={x!r}" for name, x in values.items() if x != getattr(plain, name)]
    if config.kv_heads != config.num_heads and config.num_attention_blocks:
        found.append(f"num_kv_heads={config.num_kv_heads}")
    if config.attention == "nsa" and config.num_attention_blocks:
        found.append("attention='nsa'")
    if config.learned_selector and config.num_attention_blocks:
        found.append(f"selector={config.selector!r}")
    if not config.num_blocks:
        found.append("num_blocks=0")
    return found[0] if found else None


def param_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all our parameters, by name."""
    if outside_table(config):
        return dict(_shapes_of_model(config))
    sizes = _dim_sizes(config)
    shapes = {}
    for parameter in PARAMETERS:
        layers = _stack_size(parameter, config)
        stack = () if layers is None else (layers,)
        shape = stack + tuple(sizes[d] for d in parameter.dims)
        if 0 not in shape:
            shapes[parameter.name] = shape
    return shapes


@functools.cache
def _shapes_of_model(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """`param_shapes` of a model that the table does not describe."""
    from rwkvx_jax.model import abstract_model, get_params  # slow to import, and seldom needed

    return {name: leaf.shape for name, leaf in flat(get_params(abstract_model(config)))}


class Naming(NamedTuple):
    """Another layout: its column in the table and its templates for names ({i}: the layer)."""

    column: Literal["official", "fla"]
    top: str
    block: str
    attention_block: str | None = None
    first_value_residual: bool = False
    """Whether block 0 has v0, v1, v2 (unused there)."""


class Slot(NamedTuple):
    """One tensor of another layout and its place in ours."""

    parameter: str
    row: int | None  # layer; None if the parameter is not stacked
    shape: tuple[int, ...]  # ours, of one layer
    name: str  # theirs
    form: Form

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in the other layout (for "vector", one of those allowed)."""
        if self.form == "transposed":
            return self.shape[::-1]
        return (1, 1, *self.shape) if self.form == "wrapped" else self.shape

    def accepts(self, shape: tuple[int, ...]) -> bool:
        if self.form == "vector":
            return shape[-1:] == self.shape and set(shape[:-1]) <= {1}
        return shape == self.stored_shape

    def decode(self, array: np.ndarray) -> np.ndarray:
        """Their array as ours."""
        return array.T if self.form == "transposed" else array.reshape(self.shape)

    def encode(self, array: np.ndarray) -> np.ndarray:
        """Our array as theirs."""
        return array.T if self.form == "transposed" else array.reshape(self.stored_shape)


def slots(config: ModelConfig, naming: Naming) -> Iterator[Slot]:
    """Every tensor that a checkpoint of this model has in another layout."""
    sizes = _dim_sizes(config)
    for parameter in PARAMETERS:
        stored: Stored | None = getattr(parameter, naming.column)
        layers = _stack_size(parameter, config)
        shape = tuple(sizes[d] for d in parameter.dims)
        if stored is None or layers == 0 or 0 in shape:
            continue
        if layers is None:
            yield Slot(parameter.name, None, shape, naming.top.format(stored.name), stored.form)
            continue
        in_block = parameter.name.startswith("blocks.")
        template = naming.block if in_block else naming.attention_block
        skip_first = parameter.name in VALUE_RESIDUAL and not naming.first_value_residual
        for i in range(1 if skip_first else 0, layers):
            name = template.format(stored.name, i=i)
            yield Slot(parameter.name, i, shape, name, stored.form)


def check(tensors: Mapping[str, LazyTensor], wanted: Collection[Slot]) -> None:
    """Checks names, shapes and dtypes of a checkpoint before any data is read.

    Raises:
      ConversionError: lists every missing tensor, extra tensor, wrong shape and integer dtype.
    """
    by_name = {slot.name: slot for slot in wanted}
    problems = _names("missing", by_name.keys() - tensors.keys())
    problems += _names("extra", tensors.keys() - by_name.keys())
    for name, slot in by_name.items():
        tensor = tensors.get(name)
        if tensor is None:
            continue
        if not slot.accepts(tensor.shape):
            problems.append(f"{name} has shape {tensor.shape}, not {slot.stored_shape}")
        if tensor.dtype not in DTYPES.values():
            problems.append(f"{name} has dtype {tensor.dtype}, which is no floating-point weight")
    if problems:
        raise ConversionError("the tensors do not fit together: " + "; ".join(problems))


def check_params(shapes: Mapping[str, tuple[int, ...]], params: Mapping[str, LazyTensor]) -> None:
    """Checks our own parameters against the shapes that a configuration gives them.

    Raises:
      ConversionError: lists every missing or extra parameter and every wrong shape.
    """
    problems = _names("missing", shapes.keys() - params.keys())
    problems += _names("extra", params.keys() - shapes.keys())
    problems += [
        f"{name} has shape {params[name].shape}, not {shape}"
        for name, shape in shapes.items()
        if name in params and params[name].shape != shape
    ]
    if problems:
        raise ConversionError(
            "the parameters do not fit the model configuration: " + "; ".join(problems)
        )


def _names(what: str, names: Collection[str]) -> list[str]:
    return [f"{what} ({len(names)}): {', '.join(sorted(names))}"] if names else []


def to_params(
    config: ModelConfig,
    tensors: Mapping[str, LazyTensor],
    wanted: Collection[Slot],
    dtype: np.dtype | None,
) -> dict[str, LazyTensor]:
    """Our parameters, each read from the other layout's tensors layer by layer.

    Args:
      config: the model.
      tensors: the other layout's; names and shapes as `check` demands.
      wanted: the slots of that layout.
      dtype: of the result; None keeps the common dtype of each parameter's layers (where they
        differ, a wider one that holds all their values).
    """
    places: dict[str, dict[int | None, Slot]] = {}
    for slot in wanted:
        places.setdefault(slot.parameter, {})[slot.row] = slot
    return {
        name: _stacked(name, shape, places.get(name, {}), tensors, dtype)
        for name, shape in param_shapes(config).items()
    }


def _stacked(name, shape, rows: dict[int | None, Slot], tensors, dtype) -> LazyTensor:
    # `rows` lacks block 0's value residual unless the file has it (all of it, if L is 1).
    found = {tensors[slot.name].dtype for slot in rows.values()}
    if dtype is None:
        wide = DTYPES["float64" if DTYPES["float64"] in found else "float32"]
        dtype = found.pop() if len(found) == 1 else wide

    def layer(row: int | None) -> np.ndarray:
        slot = rows.get(row)
        if slot is None:
            return np.zeros(shape[1:], dtype)
        return cast(slot.decode(tensors[slot.name].read()), dtype, slot.name)

    def load(row: int | None) -> np.ndarray:
        if row is not None or None in rows:
            return layer(row)
        stack = np.empty(shape, dtype)
        for i in range(shape[0]):
            stack[i] = layer(i)
        return stack

    return LazyTensor(name, shape, dtype, load, by_rows=None not in rows)


def from_params(
    params: Mapping[str, LazyTensor], wanted: Collection[Slot], dtypes: Mapping[str, np.dtype]
) -> dict[str, LazyTensor]:
    """The other layout's tensors, each read from its row of our parameters.

    Args:
      params: ours; names and shapes as `check_params` demands.
      wanted: the slots of the other layout.
      dtypes: of every tensor of the other layout, by its name.
    """

    def tensor(slot: Slot) -> LazyTensor:
        dtype = dtypes[slot.name]

        def load(row):
            array = slot.encode(cast(params[slot.parameter].read(slot.row), dtype, slot.name))
            return array if row is None else array[row]

        return LazyTensor(slot.name, slot.stored_shape, dtype, load)

    return {slot.name: tensor(slot) for slot in wanted}
