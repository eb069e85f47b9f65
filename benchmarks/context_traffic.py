"""What devices that share a sequence send each other, read from the compiled program.

    python benchmarks/context_traffic.py [--lengths 16384 65536] [--topology v5e:2x4]

Compiles forward and backward of a time mix with its channel mix, and of sparse attention by both
ways of reading across devices, for 8 devices along `context`; simulated CPU devices, or the chips
of a TPU topology that need not be there. Counted is what one device sends, each operation once.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from rwkvx_jax.config import MeshConfig, ModelConfig, RunConfig
from rwkvx_jax.model import abstract_model, get_params, with_params
from rwkvx_jax.modules import context
from rwkvx_jax.ops.block_sparse import sparse_attention
from rwkvx_jax.plan import collectives, hlo, topology
from rwkvx_jax.sharding import make_mesh, partition_spec

PARTS = 8


def sent(text: str) -> dict[str, int]:
    """Bytes that one of PARTS devices sends in each kind of collective of an HLO text."""
    totals: dict[str, int] = {}
    for computation in hlo.parse(text).computations.values():
        for instruction in computation.instructions.values():
            if collectives.kind_of(instruction) is None:
                continue
            one = collectives.read(instruction, computation, PARTS)
            totals[one.kind] = totals.get(one.kind, 0) + round(one.wire_bytes)
    return totals


def compiled(fn, mesh, *arguments) -> str:
    """HLO of fn on the mesh."""
    with jax.set_mesh(mesh):
        return jax.jit(fn).lower(*arguments).compile().as_text()


def spread(mesh, axes, shape, dtype) -> jax.ShapeDtypeStruct:
    """An argument with these logical axes."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, partition_spec(axes)))


def block_traffic(mesh, length: int, width: int = 256) -> dict[str, int]:
    """Of forward and backward of one RWKV-7 block, by its input."""
    config = ModelConfig(
        vocab_size=64, num_blocks=1, num_attention_blocks=0, width=width, head_size=64
    )
    model = abstract_model(config, RunConfig(compute_dtype="bfloat16", remat="none"))
    whole = lambda p: spread(mesh, (None,) * p.ndim, p.shape, p.dtype)

    def loss(x, params):
        block = jax.tree.map(lambda p: p[0], with_params(model, params).blocks)
        y, _, _ = block(x, jnp.zeros_like(x), jnp.bool(True), model.run)
        return jnp.square(y.astype(jnp.float32)).sum()

    x = spread(mesh, ("batch", "time", None), (1, length, width), jnp.bfloat16)
    text = compiled(jax.grad(loss), mesh, x, jax.tree.map(whole, get_params(model)))
    return sent(text)


def attention_traffic(mesh, length: int, heads: int, chunk_size: int = 2048) -> dict[str, int]:
    """Of forward and backward of sparse attention with `heads` heads of 64 channels."""
    op = partial(sparse_attention, chunk_size=chunk_size, top_k=3)

    def loss(q, k, v):
        return jnp.square(context.attention(op, q, k, v).astype(jnp.float32)).sum()

    x = spread(mesh, ("batch", "time", "heads", None), (1, length, heads, 64), jnp.bfloat16)
    text = compiled(jax.grad(loss, (0, 1, 2)), mesh, x, x, x)
    return sent(text)


def _row(name: str, totals: dict[str, int]) -> None:
    detail = ", ".join(f"{kind} {size:,}" for kind, size in sorted(totals.items()))
    print(f"{name:<44}{sum(totals.values()):>14,}   {detail}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384, 65536])
    parser.add_argument("--topology", help="e.g. v5e:2x4; default: simulated CPU devices")
    flags = parser.parse_args()
    topology.on_cpu()
    if flags.topology:
        devices = topology.topology_devices(flags.topology)
    else:
        jax.config.update("jax_num_cpu_devices", PARTS)
        devices = jax.devices()
    mesh = make_mesh(MeshConfig(data=-1, context=PARTS), devices)
    print(f"bytes sent by one of {PARTS} devices, {flags.topology or 'simulated on the CPU'}")
    for length in flags.lengths:
        _row(f"RWKV-7 block, width 256, {length} tokens", block_traffic(mesh, length))
    for length in flags.lengths:
        for heads, way in ((PARTS, "heads traded"), (1, "keys and values collected")):
            totals = attention_traffic(mesh, length, heads)
            per_head = {kind: size // heads for kind, size in totals.items()}
            _row(f"attention, a head, {way}, {length}", per_head)


if __name__ == "__main__":
    main()
