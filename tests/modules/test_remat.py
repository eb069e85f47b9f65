"""Remat policies change what is kept for the backward pass, never what comes out."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import pytest

from rwkvx_jax.checkpoint import flat
from rwkvx_jax.config import MeshConfig, ModelConfig, RunConfig
from rwkvx_jax.model import abstract_model, with_params
from rwkvx_jax.perf import topology
from rwkvx_jax.sharding import make_mesh
from tests.helpers import assert_close
from tests.model_cases import random_params

MODEL = ModelConfig(
    vocab_size=32, num_blocks=2, num_attention_blocks=1, width=32, head_size=16, chunk_size=8,
    top_k=2,
)  # fmt: skip
POLICIES = typing.get_args(typing.get_type_hints(RunConfig)["remat"])


def loss(remat, model=MODEL, dtype="float32"):
    bound = abstract_model(model, RunConfig(compute_dtype=dtype, remat=remat))

    def loss(params, tokens):
        return jnp.mean(jnp.square(with_params(bound, params).features(tokens)))

    return loss


def value_and_gradient(remat, mesh):
    tokens = jax.random.randint(jax.random.key(0), (2, 32), 0, MODEL.vocab_size)
    with jax.set_mesh(mesh):
        return jax.jit(jax.value_and_grad(loss(remat)))(random_params(MODEL), tokens)


@pytest.fixture(scope="module")
def everything_kept():
    return value_and_gradient("none", make_mesh(MeshConfig(data=1), jax.devices()[:1]))


# Sharded training under "none" and "block" is that of one device: tests/test_sharding.py.
@pytest.mark.thorough
@pytest.mark.parametrize(
    "remat, sizes",
    [(remat, {"data": 1}) for remat in POLICIES if remat != "none"]
    + [(remat, {"data": 1, "fsdp": 2, "context": 2}) for remat in ("save_projections", "offload")],
)
def test_every_policy_gives_the_same_gradients(remat, sizes, everything_kept):
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[: 4 if len(sizes) > 1 else 1])
    found, gradients = value_and_gradient(remat, mesh)
    assert_close(found, everything_kept[0], rel=1e-6)
    for (name, x), (_, y) in zip(flat(gradients), flat(everything_kept[1]), strict=True):
        assert_close(x, y, rel=1e-5, name=name)


def backward_program(remat, model=MODEL, dtype="float32", time=32):
    params = jax.eval_shape(lambda: random_params(model))
    tokens = jax.ShapeDtypeStruct((1, time), jnp.int32)
    return str(jax.make_jaxpr(jax.grad(loss(remat, model, dtype)))(params, tokens))


@pytest.mark.thorough
def test_policies_compute_again_what_they_say():
    programs = {remat: backward_program(remat) for remat in POLICIES}
    products = {remat: text.count("dot_general[") for remat, text in programs.items()}
    assert products["none"] < products["save_projections"] < products["block"]
    assert products["offload"] == products["block"]
    assert "pinned_host" in programs["offload"] or "Host" in programs["offload"]
    # A block of RWKV-7 has seven products before its last one (whose result no gradient needs)
    # that are kept, besides three second matrices of low-rank pairs, which are not; g's is one too.
    recomputed = products["block"] - products["save_projections"]
    rwkv, attention = 3 + 4 + 1 + 1, 3 + 1 + 1  # r k v, four ranks, output, ffn key; q k v, ...
    assert recomputed == rwkv + attention


@pytest.mark.thorough
@pytest.mark.skipif(not topology.is_available(), reason="libtpu is not installed")
def test_kernels_do_not_run_again_where_their_results_are_kept():
    model = dataclasses.replace(MODEL, width=128, head_size=64, chunk_size=128)
    mesh = topology.topology_mesh("v5e:2x2", {"data": 1, "fsdp": 1, "tensor": 1, "context": 1})

    def runs(remat):
        with jax.set_mesh(mesh):
            text = backward_program(remat, model, "bfloat16", 512)
        names = "wkv7_forward", "select_chunks", "block_sparse_own_forward"
        return [text.count(f"name={name}") for name in names]

    assert runs("block") == [2, 2, 2]
    assert runs("save_projections") == [1, 1, 1]
