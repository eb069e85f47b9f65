"""Sharded training on 8 simulated devices equals training on one; impossible meshes are errors."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rwkvx_jax.checkpoint import flat
from rwkvx_jax.config import ConfigError, LongCEConfig, MeshConfig, OptimizerConfig, Stage
from rwkvx_jax.model import abstract_model, with_params
from rwkvx_jax.sharding import (
    MESH_AXES,
    batch_sharding,
    check_fits,
    constrain,
    make_mesh,
    named_sharding,
    partition_spec,
)
from rwkvx_jax.training.curriculum import next_stage
from rwkvx_jax.training.step import param_shardings
from tests.helpers import assert_close
from tests.model_cases import random_params
from tests.training.training_cases import CURRICULUM, MODEL, RUN, one_device_mesh, random_batch

# Four heads, tensor divides all; a convolution that reaches over the borders of parts.
EVEN = dataclasses.replace(MODEL, vocab_size=258, width=32, key_conv=3)
# A stage switch, LongCE and windows that the context axis does not divide. Adam divides by the
# size of the gradient: only with a large eps are parameters after a step as close as gradients.
TRAINED = (
    Stage("preheat", 40, 8, 1, 1e-2, trainable="attention"),
    Stage("grow", 128, 8, 1, 1e-2, loss="longce", longce=LongCEConfig(window=10, stride=24)),
)
CONFIG = dataclasses.replace(
    CURRICULUM,
    model=EVEN,
    stages=TRAINED,
    optimizer=OptimizerConfig(clip_norm=0.0, eps=1e-2),
    run=dataclasses.replace(RUN, loss_block=96),
)
MESHES = [
    {"data": 1, "fsdp": 2, "tensor": 2, "context": 2},
    pytest.param({"data": 1, "context": 8}, marks=pytest.mark.slow),
    pytest.param({"data": 8}, marks=pytest.mark.slow),
    pytest.param({"data": 1, "fsdp": 8}, marks=pytest.mark.slow),
    pytest.param({"data": 2, "context": 4}, marks=pytest.mark.slow),
]


def train(mesh):
    """Metrics and gradients (ten times the first moment) of a step of each stage; the last state"""
    seen, params = [], random_params(EVEN)
    with jax.set_mesh(mesh):
        for index, stage in enumerate(TRAINED):
            program, state = next_stage(CONFIG, index, mesh, params, None)
            batch = random_batch(8, stage.seq_len, seed=index)
            batch = {name: jax.device_put(x, batch_sharding(mesh, 8)) for name, x in batch.items()}
            state, metrics = program.train_step(state, batch)
            moments = next(s for s in state.opt_state if hasattr(s, "mu"))
            seen.append(jax.device_get((metrics, moments.mu)))
            params = state.params
    return seen, state


@pytest.fixture(scope="module")
def single():
    return train(one_device_mesh())[0]


@pytest.mark.thorough
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_sharded_steps_are_those_of_one_device(single, sizes):
    mesh = make_mesh(MeshConfig(**sizes))
    seen, state = train(mesh)
    for stage, (metrics, gradients), expected in zip(TRAINED, seen, single, strict=True):
        for name in ("loss", "objective", "grad_norm"):
            assert_close(metrics[name], expected[0][name], rel=1e-5, name=f"{stage.name} {name}")
        for (name, found), (_, wanted) in zip(flat(gradients), flat(expected[1]), strict=True):
            assert_close(found, wanted, rel=1e-5, name=f"{stage.name} {name}")
    # Parameters and both moments lie where the rules say, not everywhere.
    matrix = state.params["blocks"]["time_mix"]["receptance"].sharding
    assert matrix.is_equivalent_to(NamedSharding(mesh, P(None, "fsdp", "tensor")), 3)
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


@dataclasses.dataclass(frozen=True)
class Chip:
    """As much of a TPU v5e device as its place in a mesh depends on."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0
    process_index: int = 0


def pod(slices, columns, rows):
    return [
        Chip(number, (x, y, 0), part)
        for number, (part, y, x) in enumerate(np.ndindex(slices, rows, columns))
    ]


@pytest.mark.parametrize(
    "sizes, axis",
    [({"data": 4, "tensor": 4}, "data"), ({"fsdp": -1, "data": 1}, "fsdp")],
    ids=str,
)
def test_slices_lie_along_one_axis(sizes, axis):
    """Only that axis crosses the slow network, once."""
    grid = make_mesh(MeshConfig(**sizes, slice_axis=axis), pod(2, 2, 4)).devices
    along = np.moveaxis(grid, MESH_AXES.index(axis), 0)
    halves = along.reshape(2, -1)
    assert [{chip.slice_index for chip in half} for half in halves] == [{0}, {1}]
    assert len(set(grid.flat)) == 16


def test_meshes_of_slices_that_do_not_fit():
    with pytest.raises(ConfigError, match="2 TPU slices, but mesh.data is 1: .* multiple of 2"):
        make_mesh(MeshConfig(data=1, fsdp=16), pod(2, 2, 4))
    some = pod(1, 4, 4)[:6]  # fill no box: taken in their order
    assert list(make_mesh(MeshConfig(), some).devices.flat) == some


@pytest.mark.parametrize(
    "sizes, changes, message",
    [
        ({"tensor": 8}, {}, "4 heads, which mesh.tensor 8 does not divide"),
        ({"context": 4}, {"seq_len": 40}, r"40 tokens .*context 4 x model.chunk_size 8 = 32"),
        ({"context": 8}, {"seq_len": 28, "expanded": False}, "multiple of mesh.context 8 = 8"),
    ],
    ids=str,
)
def test_configs_that_the_mesh_does_not_divide(sizes, changes, message):
    stage = Stage(
        "long", **{"seq_len": 64, "global_batch": 8, "steps": 1, "peak_lr": 1e-3, **changes}
    )
    config = dataclasses.replace(CURRICULUM, model=EVEN, stages=(stage,))
    with pytest.raises(ConfigError, match=message):
        check_fits(config, make_mesh(MeshConfig(**sizes)))
    check_fits(config, make_mesh(MeshConfig()))


def test_heads_of_keys_that_the_mesh_does_not_divide():
    model = dataclasses.replace(EVEN, num_kv_heads=2)
    config = dataclasses.replace(CURRICULUM, model=model)
    with pytest.raises(ConfigError, match="2 heads of keys and values, which mesh.tensor 4 does"):
        check_fits(config, make_mesh(MeshConfig(tensor=4)))
    check_fits(config, make_mesh(MeshConfig(tensor=2)))


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


@pytest.mark.thorough
@pytest.mark.parametrize(
    "sizes, batch, attention",
    [({"data": 2, "fsdp": 2, "tensor": 2}, 4, "sparse"), ({"data": 4, "tensor": 2}, 3, "full")],
    ids=["spread", "whole"],
)
def test_sharded_reading_is_that_of_one_device(sizes, batch, attention):
    """Prefill in pieces and decoding: texts over data axes that divide them, heads over tensor."""
    config = dataclasses.replace(EVEN, num_attention_blocks=2, attention=attention)
    model = abstract_model(config, RUN)
    params = random_params(config)
    tokens = np.random.default_rng(0).integers(0, 258, (batch, 61)).astype(np.int32)
    lengths = np.arange(29, 29 - batch, -1, dtype=np.int32)  # of the second piece

    def read(params, tokens):
        bound = with_params(model, params)
        logits, cache = bound.prefill(tokens[:, :30], bound.init_cache(batch, 64))
        second, cache = bound.prefill(tokens[:, 30:60], cache, lengths)
        third, cache = bound.decode(tokens[:, 60], cache)
        return (logits, second, third), cache

    expected = jax.device_get(jax.jit(read)(params, tokens))
    mesh = make_mesh(MeshConfig(**sizes))
    with jax.set_mesh(mesh):
        params = jax.device_put(params, param_shardings(model, mesh))
        found = jax.jit(read)(params, jax.device_put(tokens, batch_sharding(mesh, batch)))
    for actual, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close(actual, wanted, rel=1e-5)


def test_constraints_are_nothing_without_a_mesh():
    x = np.ones((2, 3))
    assert constrain(x, "batch", "time") is x
    assert MESH_AXES == ("data", "fsdp", "tensor", "context")
