"""What devices that share a sequence send each other, read from the compiled program.

Counted is what one device sends: of a block each operation once, of a decode step as often as its
loops over layers run it.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from rwkvx_jax.config import Config, ModelConfig, RunConfig
from rwkvx_jax.model import abstract_model, get_params, with_params
from rwkvx_jax.modules import context
from rwkvx_jax.ops.block_sparse import sparse_attention
from rwkvx_jax.perf import collectives, hlo, work
from rwkvx_jax.perf.programs import read_program
from rwkvx_jax.sharding import partition_spec


def _sent(text: str, devices: int) -> dict[str, int]:
    """Bytes that one device sends in each kind of collective of an HLO text."""
    totals: dict[str, int] = {}
    for computation in hlo.parse(text).computations.values():
        for instruction in computation.instructions.values():
            if collectives.kind_of(instruction) is None:
                continue
            one = collectives.read(instruction, computation, devices)
            totals[one.kind] = totals.get(one.kind, 0) + round(one.wire_bytes)
    return totals


def _compiled(fn, mesh, *arguments) -> str:
    """HLO of fn on the mesh."""
    with jax.set_mesh(mesh):
        return jax.jit(fn).lower(*arguments).compile().as_text()


def _spread(mesh, axes, shape, dtype) -> jax.ShapeDtypeStruct:
    """An argument with these logical axes."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, partition_spec(axes)))


def block_traffic(mesh: Mesh, length: int, width: int = 256) -> dict[str, int]:
    """Bytes by kind of collective: forward and backward of one RWKV-7 block, by its input.

    Args:
      mesh: the whole of it shares the sequence.
      length: T, of the whole sequence.
      width: D.
    """
    config = ModelConfig(
        vocab_size=64, num_blocks=1, num_attention_blocks=0, width=width, head_size=64
    )
    model = abstract_model(config, RunConfig(compute_dtype="bfloat16", remat="none"))
    whole = lambda p: _spread(mesh, (None,) * p.ndim, p.shape, p.dtype)

    def loss(x, params):
        block = jax.tree.map(lambda p: p[0], with_params(model, params).blocks)
        y, _, _ = block(x, jnp.zeros_like(x), jnp.bool(True), model.run)
        return jnp.square(y.astype(jnp.float32)).sum()

    x = _spread(mesh, ("batch", "time", None), (1, length, width), jnp.bfloat16)
    text = _compiled(jax.grad(loss), mesh, x, jax.tree.map(whole, get_params(model)))
    return _sent(text, mesh.size)


def attention_traffic(
    mesh: Mesh, length: int, heads: int, chunk_size: int = 2048
) -> dict[str, int]:
    """The same for sparse attention with `heads` heads of 64 channels, top-k 3."""
    op = partial(sparse_attention, chunk_size=chunk_size, top_k=3)

    def loss(q, k, v):
        return jnp.square(context.attention(op, q, k, v).astype(jnp.float32)).sum()

    x = _spread(mesh, ("batch", "time", "heads", None), (1, length, heads, 64), jnp.bfloat16)
    text = _compiled(jax.grad(loss, (0, 1, 2)), mesh, x, x, x)
    return _sent(text, mesh.size)


def decode_traffic(config: Config, mesh: Mesh, length: int, batch: int = 1) -> dict[str, float]:
    """Bytes by kind of collective: one decode step with a cache of `length` rows.

    Args:
      config: the experiment.
      mesh: texts lie along its data axes, heads along `tensor`, pages along `context`.
      length: rows of the cache.
      batch: texts.
    """
    with jax.set_mesh(mesh):
        text = read_program(config, mesh, batch, length, 1).lower().compile().as_text()
    totals: dict[str, float] = {}
    for one in work.read_work(hlo.parse(text), mesh.size)[0]:
        if one.collective:
            kind, sent = one.collective.kind, one.times * one.collective.wire_bytes
            totals[kind] = totals.get(kind, 0.0) + sent
    return totals
