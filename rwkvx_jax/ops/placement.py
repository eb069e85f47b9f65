"""Which device computes what: each its own batch rows and heads, on every kind of mesh.

The ops work batch row by batch row and head by head, but with loops and kernels through which
shardings do not propagate. An array's type tells which kinds of mesh axes it lives on:

- Explicit: the sharding is part of the type. `local` runs an op by `shard_map` on those axes.
- Auto: only the compiler knows the sharding. What it can't partition goes through `partitioned`.
- Manual (inside a `shard_map`): the arrays are shards already. Loops only need all of them to be
  marked as varying over the same axes, which `vary_together` does.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec


def local(
    fn: Callable[..., Any],
    arrays: Sequence[jax.Array | None],
    inputs: Sequence[str],
    outputs: str | tuple[str, ...],
    *,
    check_vma: bool = True,
) -> Any:
    """`fn(*arrays)`; over Explicit mesh axes each device computes its own batch rows and heads.

    Rows and heads are sharded as in the first array that shards them. Along all other dimensions
    arrays are gathered first, and results are whole.

    Args:
      fn: function of the arrays, row by row and head by head.
      arrays: its arguments; None for an absent one.
      inputs: a letter for each dimension of each argument: B batch rows, H heads, "." others.
      outputs: the same for the result, or for each of several.
      check_vma: as in `jax.shard_map`; False for kernels that do not declare what varies.
    """
    present = [(x, axes) for x, axes in zip(arrays, inputs, strict=True) if x is not None]
    mesh = _mesh_with(AxisType.Explicit, [x for x, _ in present])
    if mesh is None:
        return fn(*arrays)
    sharded: dict[str, Any] = {}
    for x, axes in present:
        for letter, mesh_axes in zip(axes, jax.typeof(x).sharding.spec, strict=True):
            if letter != "." and mesh_axes is not None:
                sharded.setdefault(letter, mesh_axes)
    spec = lambda axes: PartitionSpec(*map(sharded.get, axes))
    in_specs = tuple(map(spec, inputs))
    arrays = [
        None if x is None else jax.sharding.reshard(x, NamedSharding(mesh, place))
        for x, place in zip(arrays, in_specs, strict=True)
    ]
    return jax.shard_map(
        fn,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=spec(outputs) if isinstance(outputs, str) else tuple(map(spec, outputs)),
        axis_names=set(_axes_of(AxisType.Explicit, mesh)),
        check_vma=check_vma,
    )(*arrays)


def partitioned(fn: Callable[..., Any], *arrays: jax.Array) -> Any:
    """`fn(*arrays)`; over Auto mesh axes each device computes its own batch rows and heads.

    Not on a TPU: its compiler has no custom partitioning, gathers the arrays and computes the whole
    on every device. Not differentiable where there are such axes.

    Args:
      fn: function of the arrays, row by row and head by head; returns a tuple of arrays.
      arrays: [B], [B, T] or [B, T, H, ...], as the results are.
    """
    mesh = _mesh_with(AxisType.Auto, arrays)
    if mesh is None or mesh.size == 1 or _axes_of(AxisType.Manual, mesh):
        return fn(*arrays)
    split = _split_by_compiler(fn, arrays)
    # Which compiler it will be is known when the program is lowered, not while it is traced.
    return jax.lax.platform_dependent(*arrays, tpu=fn, default=split)


def _split_by_compiler(fn, arrays):
    """`fn` as a function that the compiler may split over rows and heads."""

    def partition(mesh, operands, results):
        shardings = tuple(x.sharding for x in results), tuple(x.sharding for x in operands)
        if mesh.empty:  # no array of the program has a sharding: all lie whole on every device
            return mesh, fn, *shardings
        specs = [sharding.spec for side in shardings for sharding in side]
        rows = next((s[0] for s in specs if s and s[0]), None)
        heads = next((s[2] for s in specs if len(s) > 2 and s[2]), None)

        def place(x):
            spec = (rows, None, heads, *[None] * len(x.shape))[: len(x.shape)]
            return NamedSharding(mesh, PartitionSpec(*spec))

        return mesh, fn, tuple(map(place, results)), tuple(map(place, operands))

    numbers = iter(range(1000))
    own = lambda: f"d{next(numbers)}"  # a factor that stays whole
    axes = lambda x: ["b", own(), "h", *(own() for _ in x.shape[3:])][: len(x.shape)]
    sides = [[axes(x) for x in side] for side in (arrays, jax.eval_shape(fn, *arrays))]
    whole = tuple(name for side in sides for x in side for name in x if name not in "bh")
    rule = " -> ".join(", ".join(map(" ".join, side)) for side in sides)
    split = custom_partitioning(fn)
    split.def_partition(partition, sharding_rule=rule, need_replication_factors=whole)
    return split


def vary_together(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays, each marked as varying over all manual mesh axes over which one of them varies.

    What a loop carries has to vary as the result does, and a gradient as its array does. Nothing is
    computed forward; backward, gradients are summed over the axes that were added.
    """
    varying = frozenset().union(*map(_varying, arrays))

    def mark(x):
        missing = tuple(sorted(varying - _varying(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return tuple(map(mark, arrays))


def automatic_axes() -> bool:
    """Whether the mesh in force has Auto axes of several devices: there XLA shards by itself."""
    mesh = jax.sharding.get_abstract_mesh()
    return any(mesh.shape[name] > 1 for name in _axes_of(AxisType.Auto, mesh))


def _varying(x) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying


def _mesh_with(kind: AxisType, arrays: Sequence[jax.Array]) -> AbstractMesh | None:
    """The mesh with axes of that kind on which an array lies, or None."""
    meshes = (jax.typeof(x).sharding.mesh for x in arrays)
    return next((mesh for mesh in meshes if _axes_of(kind, mesh)), None)


def _axes_of(kind: AxisType, mesh: AbstractMesh) -> list[str]:
    pairs = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return [name for name, found in pairs if found == kind]
