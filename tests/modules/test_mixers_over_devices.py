"""Mixers on several simulated devices: gradients of a model equal those on one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkvx_jax.checkpoint import flat
from rwkvx_jax.config import MeshConfig, ModelConfig
from rwkvx_jax.model import abstract_model, create_model, get_params, param_axes, with_params
from rwkvx_jax.sharding import make_mesh
from rwkvx_jax.training.step import shardings_of
from tests.helpers import assert_close
from tests.model_cases import FLOAT32, perturbed

MODEL = ModelConfig(
    vocab_size=38, num_blocks=2, num_attention_blocks=0, width=32, head_size=8, ffn_width=48
)
MESHES = ({"data": 2, "tensor": 2}, {"data": 1, "context": 2, "tensor": 2})


@pytest.mark.parametrize(
    "mixer",
    [
        "mamba2",  # one head of b and c for all, convolutions over borders
        pytest.param("gated_deltanet", marks=pytest.mark.thorough),
        pytest.param("kda", marks=pytest.mark.thorough),
        pytest.param("lightning", marks=pytest.mark.thorough),
        pytest.param("rwkv6", marks=pytest.mark.thorough),
        pytest.param("rwkv4", marks=pytest.mark.thorough),
    ],
)
def test_gradients_over_devices_are_those_of_one(mixer):
    config = dataclasses.replace(MODEL, mixer=mixer)
    model = abstract_model(config, FLOAT32)
    params = perturbed(jax.jit(lambda: get_params(create_model(config)))())
    # 6 tokens on each of two devices: as many as taps reach back, twice.
    tokens = np.random.default_rng(0).integers(0, 38, (2, 12)).astype(np.int32)
    weights = np.random.default_rng(1).standard_normal((2, 12, 38)).astype(np.float32)
    objective = lambda params: jnp.sum(with_params(model, params)(tokens) * weights)
    expected = jax.jit(jax.grad(objective))(params)
    for sizes in MESHES[: 1 if mixer == "rwkv4" else 2]:  # which has no context parallelism
        mesh = make_mesh(MeshConfig(**sizes), jax.devices()[:4])
        spread = jax.device_put(params, shardings_of(get_params(model), param_axes(model), mesh))
        with jax.set_mesh(mesh):
            found = jax.jit(jax.grad(objective))(spread)
        for (name, leaf), (_, wanted) in zip(flat(found), flat(expected), strict=True):
            assert_close(leaf, wanted, rel=2e-5, name=f"{sizes} {name}")
