"""Whole models with each sequence mixer, compiled for a TPU that is not here: the blocks run the
Pallas kernels of the general delta rule.

Needs the TPU compiler (libtpu), no TPU.
"""

import re

import jax
import jax.numpy as jnp
import pytest

from rwkvx_jax.config import MeshConfig, ModelConfig, RunConfig
from rwkvx_jax.model import abstract_model, get_params, with_params
from rwkvx_jax.perf import topology
from rwkvx_jax.sharding import batch_sharding, make_mesh
from rwkvx_jax.training.step import param_shardings

pytestmark = [
    pytest.mark.optimized,
    pytest.mark.skipif(
        not topology.is_available(), reason="libtpu is not installed: pip install 'jax[tpu]'"
    ),
]

# Head size, and which kernels; RWKV-4 has none.
MIXERS = {
    "gated_deltanet": (128, "scalar_delta_rule"),
    "deltanet": (64, "scalar_delta_rule"),
    "kda": (128, "vector_delta_rule"),
    "mamba2": (64, "scalar_linear_attention"),
    "lightning": (128, "scalar_linear_attention"),
    "rwkv6": (64, "vector_linear_attention"),
    "rwkv5": (64, "vector_linear_attention"),
    "rwkv4": (64, None),
}


def compiled_gradients(mixer: str, head_size: int, **sizes: int) -> str:
    """HLO of the gradient of a model of three blocks, 2 x 1024 tokens, on a mesh of v5e."""
    mesh = make_mesh(MeshConfig(**sizes), topology.topology_devices("v5e:2x2"))
    config = ModelConfig(
        vocab_size=128, num_blocks=2, num_attention_blocks=1, width=256, head_size=head_size,
        chunk_size=256, mixer=mixer,
    )  # fmt: skip
    model = abstract_model(config, RunConfig(compute_dtype="bfloat16"))
    params = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        get_params(model),
        param_shardings(model, mesh),
    )
    tokens = jax.ShapeDtypeStruct((2, 1024), jnp.int32, sharding=batch_sharding(mesh, 2))

    def loss(params, tokens):
        return with_params(model, params).features(tokens).astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss)).lower(params, tokens).compile().as_text()


def recurrences(text: str) -> dict[str, str]:
    """Kernels of recurrences, with what they return first: y, or the gradient of r."""
    found = re.findall(r"%(\w+ward)[\w.]* = \((\S+?)\{.*custom-call\(.*tpu_custom_call", text)
    return {name: x for name, x in found if re.search("delta_rule|linear_attention", name)}


def check(mixer: str, y: str, **sizes: int) -> None:
    head_size, name = MIXERS[mixer]
    found = recurrences(compiled_gradients(mixer, head_size, **sizes))
    assert set(found) == ({f"{name}_forward", f"{name}_backward"} if name else set())
    assert not name or found[f"{name}_forward"] == f"bf16{y}"


@pytest.mark.parametrize(
    "mixer",
    [
        pytest.param(mixer, marks=getattr(pytest.mark, "thorough" if mixer == "mamba2" else "slow"))
        for mixer in MIXERS
    ],
)
def test_a_model_takes_the_kernels_of_its_mixer(mixer):
    """Each chip on its row and half of the heads."""
    check(mixer, "[1,1024,256]" if mixer == "mamba2" else "[1,1024,128]", data=2, tensor=2)


@pytest.mark.slow
@pytest.mark.parametrize("mixer, y", [("gated_deltanet", "256"), ("mamba2", "768")])
def test_parts_of_sequences_take_the_kernels(mixer, y):
    """Each chip on half of the tokens, and V + K columns a head."""
    check(mixer, f"[2,512,{y}]", data=1, tensor=2, context=2)
