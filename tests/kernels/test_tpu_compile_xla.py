"""What README's table calls "compiled (v5e)" beside the kernels: every form XLA compiles, gradients
included; and the precision of a model's products.

Needs the TPU compiler (libtpu), no TPU.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rwkvx_jax import (
    full_attention,
    generalized_delta_rule,
    select_chunks,
    sparse_attention,
    wkv7,
)
from rwkvx_jax.cache import CachePolicy
from rwkvx_jax.config import RunConfig
from rwkvx_jax.model import abstract_model
from rwkvx_jax.ops.selection import Selector
from rwkvx_jax.perf import hlo, topology
from tests.model_cases import TINY

pytestmark = [
    pytest.mark.optimized,
    pytest.mark.skipif(
        not topology.is_available(), reason="libtpu is not installed: pip install 'jax[tpu]'"
    ),
]

B, T, H, K = 1, 128, 2, 64

# Operation with its settings, and the number of arrays [B, T, H, K] it takes.
FORMS = {
    f"{operation.__name__}-{form}": (partial(operation, implementation=form, **settings), arrays)
    for operation, arrays, settings, forms in (
        (wkv7, 6, {}, ("sequential", "chunked", "associative")),
        (generalized_delta_rule, 6, {}, ("sequential", "chunked", "associative")),
        (
            sparse_attention,
            3,
            {"chunk_size": 32, "top_k": 2},
            ("reference", "xla", "masked"),
        ),
        (sparse_attention, 3, {"chunk_size": 32, "top_k": 4}, ("full",)),
        (full_attention, 3, {}, ("reference", "blocked")),
    )
    for form in forms
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", FORMS)
def test_a_form_and_its_gradients_compile(name):
    form, arrays = FORMS[name]
    mesh = topology.topology_mesh("v5e:2x2", {"data": 4})

    def forward_and_backward(*inputs):
        outputs, pullback = jax.vjp(form, *inputs)
        return outputs, pullback(outputs)

    inputs = _inputs(mesh, arrays)
    compiled = jax.jit(forward_and_backward).lower(*inputs).compile()
    assert [gradient.shape for gradient in compiled.out_info[1]] == [(B, T, H, K)] * arrays


@pytest.mark.parametrize("kind", ["mean", "max", "pooled", "bounds"])
def test_the_gate_compiles(kind):
    selector = Selector(kind, blocks=4 if kind in ("max", "pooled") else 1)
    gate = partial(select_chunks, chunk_size=32, top_k=2, selector=selector, implementation="xla")
    mesh = topology.topology_mesh("v5e:2x2", {"data": 4})
    compiled = jax.jit(gate).lower(*_inputs(mesh, 2)).compile()
    assert compiled.out_info.dtype == jnp.int32


def _inputs(mesh, arrays):
    sharding = NamedSharding(mesh, PartitionSpec())
    return [jax.ShapeDtypeStruct((B, T, H, K), jnp.float32, sharding=sharding)] * arrays


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_are_as_precise_as_the_compute_dtype(dtype):
    """A sequence, a piece with compression, and one token: float32 is float32 in every product."""
    policy = CachePolicy(trigger=20, keep=16, window=4)

    def run(model, tokens):
        logits, cache = model.prefill(tokens, model.init_cache(1, 64, policy=policy))
        return model(tokens), logits, model.decode(tokens[:, 0], cache)[0]

    mesh = topology.topology_mesh("v5e:2x2", {"data": 4})
    everywhere = NamedSharding(mesh, PartitionSpec())
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)
    model = jax.tree.map(place, abstract_model(TINY, RunConfig(compute_dtype=dtype)))
    tokens = place(jax.ShapeDtypeStruct((1, 24), jnp.int32))
    module = hlo.parse(jax.jit(run).lower(model, tokens).compile().as_text())
    found = {"f32": set(), "bf16": set()}
    for computation in module.computations.values():
        for one in computation.instructions.values():
            if one.opcode in ("dot", "convolution"):
                precision = re.search(r"operand_precision=\{(\w+),\1\}", one.attributes)
                precision = precision[1] if precision else "default"
                found[computation.operands(one)[0].array.dtype].add(precision)
    if dtype == "float32":
        assert found == {"f32": {"highest"}, "bf16": set()}
    else:  # float32 arrays inside the recurrence, whose inputs three passes hold, and attention
        assert found["f32"] == {"highest", "high"} and "default" in found["bf16"]
