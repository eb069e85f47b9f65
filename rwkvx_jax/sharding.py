"""Mesh, logical axes and their rules.

Every parameter names its logical axes where it is created (`parameter(..., axes=...)` in
`modules/parameters.py`); one table maps logical axes to mesh axes. Without a mesh every function
here is a no-op, so modules can be used on their own. A parameter that no rule covers and a
dimension that a mesh axis does not divide are errors.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rwkvx_jax.config import Config, ConfigError, MeshConfig, ModelConfig

_log = logging.getLogger(__name__)

MESH_AXES = ("data", "fsdp", "tensor", "context")

# Logical axis -> mesh axis (or axes, or None: replicated).
RULES: dict[str, Any] = {
    # parameters
    "layers": None,
    "embed": "fsdp",  # residual-stream side of a matrix
    "heads": "tensor",  # head side of a matrix: H * K channels, or H
    "ffn": "tensor",
    "vocab": "tensor",
    "rank": None,
    "vector": None,  # per-channel vectors and norms: small
    "head_size": None,
    "taps": None,  # of a convolution over time
    # activations
    "batch": ("data", "fsdp"),
    "replica": "data",  # rows, while the width lies over fsdp
    "time": "context",
    "pages": "context",  # of a cache: stretches of its rows
}

# Activations of many short texts: rows take the context axis as well, and no text is cut.
_WHOLE_SEQUENCES = RULES | {
    "batch": ("data", "fsdp", "context"),
    "replica": ("data", "context"),
    "time": None,
    "pages": None,
}
_in_force: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar(
    "rules in force", default=None
)


@contextlib.contextmanager
def whole_sequences() -> Iterator[None]:
    """While code is traced inside, `context` spreads rows instead of cutting sequences.

    For many short texts beside a long one (the windows of LongCE): they then need no
    communication, and no length that the axis divides.
    """
    token = _in_force.set(_WHOLE_SEQUENCES)
    try:
        yield
    finally:
        _in_force.reset(token)


def rule(axis: str | None) -> Any:
    """Mesh axis, axes or None of a logical axis."""
    return None if axis is None else (_in_force.get() or RULES)[axis]


def sequence_parts(length: int) -> int:
    """Into how many parts the mesh in force cuts sequences of `length` tokens; 1: into none.

    A length that the context axis does not divide stays whole.
    """
    parts = ways("time")
    return parts if length % parts == 0 else 1


def ways(axis: str) -> int:
    """Over how many devices the mesh in force spreads a logical axis that they divide."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else _ways(mesh, rule(axis))


def mesh_in_force() -> Mesh | None:
    """The mesh that `jax.set_mesh` put in force, with its devices; None where there is none."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else mesh


def even_rows(rows: int) -> int:
    """The least number of batch rows, from `rows` on, that the mesh in force spreads evenly."""
    return -(-rows // ways("batch")) * ways("batch")


def whole(tree: Any) -> Any:
    """Arrays asked to lie whole on every device, where a mesh is set: so any host reads them."""
    return jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), tree)


def cut_along(axis: str, *sizes: int) -> Any:
    """The mesh axis along which `per_device` cuts a logical axis; None: it stays whole.

    Args:
      axis: logical.
      sizes: of the dimensions along it.
    """
    count = ways(axis)
    return rule(axis) if count > 1 and math.gcd(*sizes) % count == 0 else None


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes data, fsdp, tensor, context over `devices` (default: all).

    Raises:
      ConfigError: the sizes do not multiply to the number of devices, or the devices are not of
        the platform that the config asks for.
    """
    devices = list(jax.devices() if devices is None else devices)
    found = devices[0].platform
    if config.platform not in ("any", found):
        raise ConfigError(
            f"mesh.platform asks for {config.platform}, but JAX found {found} devices: install "
            f"the jax build for {config.platform}, or set mesh.platform to {found}"
        )
    sizes = config.sizes
    given = math.prod(size for size in sizes.values() if size != -1)
    fill, rest = divmod(len(devices), given)
    if rest or (-1 not in sizes.values() and fill != 1):
        raise ConfigError(
            f"mesh {sizes} asks for {'a multiple of ' if -1 in sizes.values() else ''}{given} "
            f"devices, but there are {len(devices)}: change the sizes, or use -1 for one of them"
        )
    shape = tuple(fill if sizes[axis] == -1 else sizes[axis] for axis in MESH_AXES)
    grid = _arrange(devices, shape, config.slice_axis)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def mesh_of(config: MeshConfig) -> Mesh | None:
    """The mesh that inference asks for; None for one device alone, which needs none.

    Raises:
      ConfigError: as `make_mesh` raises it.
    """
    if jax.process_count() == 1 and set(config.sizes.values()) == {1}:
        return None
    return make_mesh(config)


def in_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """Puts a mesh in force; None: leaves everything as it is."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def _arrange(devices: Sequence[jax.Device], shape: tuple[int, ...], slice_axis: str) -> np.ndarray:
    """Devices as a grid of this shape: neighbours in it are neighbours on the network.

    Chips of one TPU slice talk over their own links (ICI), slices over the data centre's network
    (DCN), which is far slower. So slices lie one after the other along `slice_axis` alone.
    """
    if devices[0].platform != "tpu" or not _fill_boxes(devices):
        return np.asarray(devices).reshape(shape)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    across = tuple(slices if axis == slice_axis else 1 for axis in MESH_AXES)
    if any(size % ways for size, ways in zip(shape, across, strict=True)):
        raise ConfigError(
            f"the devices are {slices} TPU slices, but mesh.{slice_axis} is "
            f"{shape[MESH_AXES.index(slice_axis)]}: make it a multiple of {slices}, or let slices "
            "lie along another axis with mesh.slice_axis"
        )
    within = tuple(size // ways for size, ways in zip(shape, across, strict=True))
    if slices == 1:
        return mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(
        within, across, devices, allow_split_physical_axes=True
    )


def _fill_boxes(devices: Sequence[jax.Device]) -> bool:
    """Whether the chips of each slice are all those of a box, as a whole slice is."""
    boxes: dict[int, list[Any]] = {}
    for device in devices:
        boxes.setdefault(getattr(device, "slice_index", 0), []).append(device)
    full = lambda box: math.prod(np.ptp([d.coords for d in box], axis=0) + 1)
    return all(len({tuple(d.coords) for d in box}) == full(box) for box in boxes.values())


def check_heads(model: ModelConfig, tensor: int) -> None:
    """Raises ConfigError where so many devices along `tensor` do not divide the model's heads."""
    choices = model.choices, " that choose chunks"
    for heads, what in ((model.num_heads, ""), (model.kv_heads, " of keys and values"), choices):
        if heads % tensor:
            raise ConfigError(
                f"the model has {heads} heads{what}, which mesh.tensor {tensor} does not divide: "
                "use a divisor of the number of heads"
            )


def check_choices(model: ModelConfig, tensor: int, parts: int) -> None:
    """Raises ConfigError where so many devices along `tensor`, and `parts` along `context`, would
    have some of the heads that choose chunks together, but not all of them."""
    alone = model.choices == model.num_heads or model.learned_selector
    if parts == 1 or alone or model.choices // tensor % parts == 0:
        return
    field, other = "selection_groups", ', or use selector="index" or "seer"'
    if model.attention == "nsa":
        field, other = "num_kv_heads", ""
    raise ConfigError(
        f"mesh.context {parts} would part heads that choose chunks together: make model.{field} "
        f"{model.choices} a multiple of mesh.tensor x mesh.context = {tensor * parts}{other}"
    )


def check_shared_choices(model: ModelConfig, context: int) -> None:
    """Raises ConfigError where so many devices along `context` would part what blocks share."""
    if model.shares_choices and context > 1:
        raise ConfigError(
            f"model.share_selection_every {model.share_selection_every} hands the chunks that one "
            f"attention block chose to the next, but with mesh.context {context} no device knows "
            "the choices of whole sequences: use mesh.context 1 (mesh.tensor parts heads), or "
            "share_selection_every 1"
        )


def check_fits(config: Config, mesh: Mesh) -> None:
    """Raises ConfigError where the mesh does not divide what the stages of `config` compute."""
    model, tensor, parts = config.model, mesh.shape["tensor"], mesh.shape["context"]
    check_heads(model, tensor)
    check_choices(model, tensor, parts)
    check_shared_choices(model, parts)
    for stage in config.stages:
        batch_sharding(mesh, stage.global_batch)
        model = config.stage_model(stage)
        chunked = model.num_attention_blocks > 0 and model.attention != "full"
        unit = model.chunk_size if chunked else 1
        if parts > 1 and stage.seq_len % (parts * unit):
            of_chunks = f" x model.chunk_size {unit}" if chunked else ""
            raise ConfigError(
                f"stage {stage.name!r}: sequences of {stage.seq_len} tokens can't be cut evenly; "
                f"make seq_len a multiple of mesh.context {parts}{of_chunks} = {parts * unit}"
            )


def partition_spec(axes: Sequence[str | None]) -> PartitionSpec:
    """The mesh axes of an array whose dimensions have these logical axes.

    Raises:
      ConfigError: an axis that no rule covers.
    """
    unknown = [axis for axis in axes if axis is not None and axis not in RULES]
    if unknown:
        raise ConfigError(f"no sharding rule for logical axis {unknown}; known are {list(RULES)}")
    return PartitionSpec(*map(rule, axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Asks for x to be sharded by its logical axes; a no-op where no mesh is set.

    A dimension that the mesh does not divide stays whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, _fitting_spec(mesh, axes, [(axes, x)]))


def named_sharding(
    mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int], name: str
) -> NamedSharding:
    """Sharding of an array called `name`; a dimension that is not divisible is an error."""
    spec = partition_spec(axes)
    for dimension, (size, mesh_axes) in enumerate(zip(shape, spec, strict=True)):
        if size % (count := _ways(mesh, mesh_axes)):
            parts = [mesh_axes] if isinstance(mesh_axes, str) else list(mesh_axes)
            raise ConfigError(
                f"{name}: dimension {dimension} ({axes[dimension]}) of size {size} is not "
                f"divisible by {count}, the size of mesh axes {parts}; change the mesh"
            )
    return NamedSharding(mesh, spec)


def batch_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """Sharding of token batches [B, T + 1] of B = `rows`: rows over the data axes, time whole.

    The extra target token makes the length indivisible; activations are cut along `context`
    inside the step. Rows that the data axes do not divide lie on every device of one host; on
    several hosts, each of which reads rows of its own, they are an error.
    """
    ways = _ways(mesh, RULES["batch"])
    if rows % ways == 0:
        return NamedSharding(mesh, PartitionSpec(RULES["batch"], None))
    if jax.process_count() > 1:
        raise ConfigError(
            f"a global batch of {rows} samples can't be shared out by {jax.process_count()} hosts: "
            f"it is not divisible by {ways}, the devices along mesh axes {list(RULES['batch'])}; "
            "change the batch, or give other mesh axes more devices"
        )
    _warn_uneven(rows, ways)
    return replicated(mesh)


@functools.cache
def _warn_uneven(rows: int, ways: int) -> None:
    _log.warning(
        "a batch of %d samples can't be spread over %d devices evenly: some will idle", rows, ways
    )


def fitting_sharding(mesh: Mesh, axes: Sequence[str | None], x: Any) -> NamedSharding:
    """Where `constrain` puts x (an array or its shape): what the mesh does not divide is whole."""
    return NamedSharding(mesh, _fitting_spec(mesh, axes, [(axes, x)]))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def per_device(
    fn: Callable[..., Any], in_axes: Sequence[Sequence[str | None]], out_axes: Any
) -> Callable[..., Any]:
    """`fn`, run by each device on its own part of the arguments where a mesh is set.

    For operations that work row by row and head by head, which the partitioner can't see (kernels,
    loops of data-dependent length). An axis that the mesh does not divide, in all arguments that
    have it, stays whole.

    Args:
      fn: function of arrays.
      in_axes: logical axes of each argument, which may be None.
      out_axes: logical axes of the result, or a tuple of them for a tuple of results.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return fn

    def call(*arguments: jax.Array | None) -> Any:
        pairs = zip(in_axes, arguments, strict=True)
        given = [(axes, argument) for axes, argument in pairs if argument is not None]
        spec = lambda axes: _fitting_spec(mesh, axes, given)
        several = isinstance(out_axes[0], tuple)
        out_specs = tuple(map(spec, out_axes)) if several else spec(out_axes)
        in_specs = tuple(
            PartitionSpec() if argument is None else spec(axes)
            for axes, argument in zip(in_axes, arguments, strict=True)
        )
        return jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, check_vma=False)(
            *arguments
        )

    return call


def _fitting_spec(mesh: Any, axes: Sequence[str | None], given: Sequence[Any]) -> PartitionSpec:
    """Mesh axes of `axes`, None where they do not divide it in all arrays: (axes, array) each."""

    def fits(axis: str | None) -> Any:
        sizes = (
            size
            for own, array in given
            for name, size in zip(own, array.shape, strict=True)
            if name == axis
        )
        return rule(axis) if math.gcd(*sizes) % _ways(mesh, rule(axis)) == 0 else None

    return PartitionSpec(*map(fits, axes))


def _ways(mesh: Any, mesh_axes: Any) -> int:
    """Devices along a mesh axis, several, or none."""
    parts = (mesh_axes,) if isinstance(mesh_axes, str) else (mesh_axes or ())
    return math.prod(mesh.shape[part] for part in parts)
