"""The loss of a learned selector in a train step: its value, whom it reaches, parts, devices."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from rwkvx_jax.config import Config, ConfigError, MeshConfig, OptimizerConfig, Stage
from rwkvx_jax.digest import flat
from rwkvx_jax.model import abstract_model, with_params
from rwkvx_jax.ops.chunk_mass import selection_loss
from rwkvx_jax.ops.selection import selector_of
from rwkvx_jax.sharding import batch_sharding, make_mesh
from rwkvx_jax.training.step import stage_program
from tests.helpers import assert_close
from tests.model_cases import random_params
from tests.training.training_cases import MODEL, RUN, random_batch

TIME = 37
INDEX = dataclasses.replace(  # attention blocks alone: less to compile
    MODEL,
    vocab_size=258,
    num_blocks=0,
    num_attention_blocks=2,
    selector="index",
    selector_blocks=2,
    index_size=4,
)
STAGE = Stage("learn", TIME, 8, 4, 1e-2, selection_loss=0.5)
# Without clipping the first moment after one step is 0.1 times the gradient.
CONFIG = Config(INDEX, (STAGE,), optimizer=OptimizerConfig(policy="rwkv_lm", clip_norm=0), run=RUN)
NAMES = [f"attention_blocks.attention.indexer.{name}_map" for name in ("query", "key")]


def run(stage=STAGE, mesh=None, model=INDEX, **changes):
    """Gradients and metrics of one step, always from the same parameters."""
    mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
    changed = {"model": model, "stages": (stage,), "run": dataclasses.replace(RUN, **changes)}
    config = dataclasses.replace(CONFIG, **changed)
    with jax.set_mesh(mesh):
        program = stage_program(config, stage, mesh)
        state = program.start(random_params(model), None)
        batch = jax.device_put(random_batch(8, TIME), batch_sharding(mesh, 8))
        state, metrics = program.train_step(state, batch)
    moments = next(s for s in state.opt_state if hasattr(s, "mu")).mu
    return dict(flat(jax.device_get(moments))), jax.device_get(metrics)


@functools.cache
def whole():
    return run()


@functools.cache
def without_it():
    return run(dataclasses.replace(STAGE, selection_loss=0))


def same(found, expected, rel=1e-5):
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert_close(found[name], wanted, rel=rel, name=name)


def test_the_metric_is_the_mean_over_choices():
    model = with_params(abstract_model(INDEX, RUN), random_params(INDEX))

    def look(attention, h):
        q, k, _, _ = attention.project(h)
        index = attention.indexer.queries(q), attention.indexer.keys(k)
        return selection_loss(q, k, *index, chunk_size=8, selector=selector_of(INDEX))

    tokens = random_batch(8, TIME)["tokens"][:, :-1]
    _, sums = jax.jit(lambda tokens: model.observe(tokens, look))(tokens)
    assert sums.shape == (2, 8, 2)
    metrics = whole()[1]
    assert_close(metrics["selection_loss"], sums.sum() / (2 * 8 * 2 * (TIME - 8)), rel=1e-5)
    assert_close(
        metrics["objective"] - without_it()[1]["objective"],
        0.5 * metrics["selection_loss"],
        rel=1e-4,
    )


def test_only_the_indexers_learn_from_it():
    without, metrics = without_it()
    assert "selection_loss" not in metrics
    found = whole()[0]
    for name in NAMES:
        assert np.abs(found[name]).max() > 1e-4 and not without[name].any()
    others = lambda moments: {n: x for n, x in moments.items() if n not in NAMES}
    same(others(found), others(without))
    alone, _ = run(dataclasses.replace(STAGE, trainable="indexer"))
    same(alone, {name: found[name] for name in NAMES})


def test_parts_of_a_batch_and_blocks_computed_again_change_nothing():
    found, metrics = run(dataclasses.replace(STAGE, accumulation=4), remat="block")
    same(found, whole()[0])
    for name in ("selection_loss", "objective"):
        assert_close(metrics[name], whole()[1][name], rel=1e-5)


def test_devices_change_nothing():
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    found, metrics = run(mesh=mesh)
    same(found, whole()[0], rel=2e-5)
    assert_close(metrics["selection_loss"], whole()[1]["selection_loss"], rel=1e-5)


@pytest.mark.thorough
def test_devices_teach_the_gate_as_one_does():
    model = dataclasses.replace(INDEX, selector="seer")
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    found, metrics = run(mesh=mesh, model=model)
    expected, wanted = run(model=model)
    same(found, expected, rel=2e-5)
    assert_close(metrics["selection_loss"], wanted["selection_loss"], rel=1e-5)
    assert min(np.abs(found[name]).max() for name in NAMES) > 1e-4


@pytest.mark.parametrize(
    ("changes", "model", "message"),
    [
        ({"selection_loss": -1.0}, {}, "selection_loss is -1.0: it must not be negative"),
        ({"trainable": "lora"}, {}, "selection_loss 0.5 trains indexers, which trainable='lora'"),
        ({"selection_loss": 0.0, "trainable": "indexer"}, {}, "nothing teaches it"),
        ({"seq_len": 16}, {}, "seq_len 16 must be above twice model.chunk_size 8"),
        ({}, {"selector": "mean", "index_size": 0}, 'trains the selector "index"'),
    ],
)
def test_where_nothing_can_be_learned(changes, model, message):
    with pytest.raises(ConfigError, match=message):
        stage = dataclasses.replace(STAGE, **changes)
        dataclasses.replace(CONFIG, model=dataclasses.replace(INDEX, **model), stages=(stage,))


def test_sequences_stay_whole():
    with pytest.raises(ConfigError, match="needs whole sequences, but mesh.context is 2"):
        dataclasses.replace(CONFIG, mesh=MeshConfig(context=2))
