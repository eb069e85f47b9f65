"""Sharded training on 8 simulated devices equals training on one; impossible meshes are errors."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rwkvx_jax.checkpoint import flat
from rwkvx_jax.config import ConfigError, MeshConfig, OptimizerConfig
from rwkvx_jax.sharding import (
    MESH_AXES,
    batch_sharding,
    constrain,
    make_mesh,
    named_sharding,
    partition_spec,
)
from rwkvx_jax.training.step import stage_program
from tests.helpers import assert_close
from tests.model_cases import quick_compile, random_params  # noqa: F401
from tests.training_cases import CURRICULUM, MODEL, STAGES, one_device_mesh, random_batch

EVEN = dataclasses.replace(MODEL, vocab_size=258)  # the tensor axis divides it
CONFIG = dataclasses.replace(CURRICULUM, model=EVEN, optimizer=OptimizerConfig(clip_norm=0.0))


def one_step(mesh):
    """Metrics, gradients (ten times the first moment) and state after one step."""
    program = stage_program(CONFIG, STAGES[2], mesh)
    batch = random_batch(8, STAGES[2].seq_len)
    with jax.set_mesh(mesh):
        state = program.start(random_params(EVEN), None)
        batch = {name: jax.device_put(x, batch_sharding(mesh, 8)) for name, x in batch.items()}
        state, metrics = program.train_step(state, batch)
    moments = next(s for s in state.opt_state if hasattr(s, "mu"))
    return metrics, moments.mu, state


@pytest.fixture(scope="module")
def single():
    metrics, gradients, _ = one_step(one_device_mesh())
    return jax.device_get((metrics, gradients))


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_sharded_step_is_the_single_device_step(single, sizes):
    mesh = make_mesh(MeshConfig(**sizes))
    metrics, gradients, state = one_step(mesh)
    for name in ("loss", "objective", "grad_norm"):
        assert_close(metrics[name], single[0][name], rel=1e-5, name=name)
    for (name, found), (_, expected) in zip(flat(gradients), flat(single[1]), strict=True):
        assert_close(found, expected, rel=1e-5, name=name)
    # Parameters and both moments lie where the rules say, not everywhere.
    matrix = state.params["blocks"]["time_mix"]["receptance"].sharding
    assert matrix.spec == P(None, "fsdp", "tensor")
    moments = next(s for s in state.opt_state if hasattr(s, "mu"))
    for tree in (moments.mu, moments.nu):
        assert tree["blocks"]["time_mix"]["receptance"].sharding == matrix


def test_meshes_that_do_not_fit_the_devices():
    assert make_mesh(MeshConfig(data=-1, tensor=2)).shape == {
        "data": 4, "fsdp": 1, "tensor": 2, "context": 1
    }  # fmt: skip
    with pytest.raises(ConfigError, match="a multiple of 3 devices, but there are 8"):
        make_mesh(MeshConfig(data=-1, tensor=3))
    with pytest.raises(ConfigError, match="asks for 4 devices, but there are 8"):
        make_mesh(MeshConfig(data=4))
    with pytest.raises(ConfigError, match="asks for tpu, but JAX found cpu"):
        make_mesh(MeshConfig(platform="tpu"))


def test_dimensions_and_axes_that_no_rule_covers():
    mesh = make_mesh(MeshConfig(data=-1, tensor=4))
    with pytest.raises(ConfigError, match=r"time_mix.key: dimension 1 \(heads\) of size 6 .*by 4"):
        named_sharding(mesh, ("embed", "heads"), (8, 6), "time_mix.key")
    with pytest.raises(ConfigError, match=r"logical axis \['colour'\]"):
        partition_spec(("colour",))


def test_uneven_batches_are_replicated_and_said_so(caplog):
    mesh = make_mesh(MeshConfig())
    assert batch_sharding(mesh, 16).spec == P(("data", "fsdp"), None)
    with caplog.at_level(logging.WARNING):
        assert batch_sharding(mesh, 6).spec == P()
        batch_sharding(mesh, 6)
    assert caplog.text.count("6 samples can't be spread over 8 devices") == 1
    with jax.set_mesh(mesh):
        total = jax.jit(lambda x: constrain(x, "batch", None).sum())(jnp.ones((6, 3)))
    assert total == 18


def test_constraints_are_nothing_without_a_mesh():
    x = np.ones((2, 3))
    assert constrain(x, "batch", "time") is x
    assert MESH_AXES == ("data", "fsdp", "tensor", "context")
