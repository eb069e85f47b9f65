"""Which parameters each policy treats how, name by name, and the learning-rate schedules."""

import math

import jax
import numpy as np
import pytest

from rwkvx_jax.checkpoint import flat
from rwkvx_jax.config import ConfigError, OptimizerConfig, Stage
from rwkvx_jax.model import abstract_model, get_params, param_axes
from rwkvx_jax.training.optimizer import (
    Treatment,
    learning_rate,
    make_optimizer,
    treatment,
    treatments,
)
from tests.helpers import assert_close
from tests.model_cases import TINY

MATRICES = {
    "embed",
    "head.weight",
    *(f"blocks.time_mix.{n}" for n in ("receptance", "key", "value", "output")),
    *(f"attention_blocks.attention.{n}" for n in ("receptance", "key", "value", "output")),
    *(f"{b}.channel_mix.{n}" for b in ("blocks", "attention_blocks") for n in ("key", "value")),
}
LOW_RANK = {f"blocks.time_mix.{p}{i}" for p in "wavg" for i in "12"}
VECTORS = {
    *(f"blocks.time_mix.x_{s}" for s in "rwkvag"),
    *(f"blocks.time_mix.{p}0" for p in "wav"),
    "blocks.time_mix.k_k",
    "blocks.time_mix.k_a",
    "blocks.channel_mix.x_k",
    "attention_blocks.channel_mix.x_k",
    *(
        f"{norm}.{part}"
        for norm in (
            "ln0",
            "ln_out",
            "blocks.ln1",
            "blocks.ln2",
            "blocks.time_mix.ln_x",
            "attention_blocks.ln1",
            "attention_blocks.ln2",
        )
        for part in ("scale", "bias")
    ),
}


def plan(policy):
    found = treatments(policy, param_axes(abstract_model(TINY)))
    leaves = jax.tree_util.tree_leaves_with_path(
        found, is_leaf=lambda leaf: isinstance(leaf, Treatment)
    )
    return [(".".join(key.key for key in path), leaf) for path, leaf in leaves]


@pytest.mark.parametrize(
    "policy, decayed, doubled",
    [
        ("rwkvx", MATRICES | LOW_RANK | {"blocks.time_mix.r_k"}, set()),
        ("rwkv_lm", MATRICES, {"blocks.time_mix.w0"}),
    ],
)
def test_policies_parameter_by_parameter(policy, decayed, doubled):
    names = [name for name, _ in plan(policy)]
    assert len(names) == len(set(names))
    assert set(names) == MATRICES | LOW_RANK | VECTORS | {"blocks.time_mix.r_k"}
    assert set(names) == {name for name, _ in flat(get_params(abstract_model(TINY)))}
    assert {name for name, t in plan(policy) if t.decay} == decayed
    assert {name for name, t in plan(policy) if t.rate != 1} == doubled
    assert {t.rate for name, t in plan(policy) if name in doubled} <= {2.0}


def test_decay_of_other_mixers_is_on_their_large_matrices():
    decays = lambda name: (
        treatment("rwkv_lm", f"blocks.time_mix.{name}", ("layers", "x", "y")).decay
    )
    assert all(map(decays, ("gate", "receptance", "key", "value", "output")))
    assert not any(map(decays, ("beta", "alpha", "conv", "x", "u", "x_1", "w1", "g2")))


def test_unknown_policy_is_refused():
    with pytest.raises(ConfigError, match="'adafactor'.*rwkvx or rwkv_lm"):
        treatment("adafactor", "embed", ("vocab", "embed"))


@pytest.mark.thorough
def test_update_is_clipped_adamw():
    config = OptimizerConfig(b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.1, clip_norm=1.0)
    params = {"m": np.array([[1.0, -2.0]], np.float32), "v": np.array([3.0], np.float32)}
    optimizer = make_optimizer(config, {"m": Treatment(True, 1.0), "v": Treatment(False, 1.0)})
    state = optimizer.init(params)
    mean = square = 0
    rng = np.random.default_rng(0)
    for step in range(1, 4):
        gradient = rng.standard_normal(3) * 3
        grads = {
            "m": gradient[None, :2].astype(np.float32),
            "v": gradient[2:].astype(np.float32),
        }
        updates, state = optimizer.update(grads, state, params)
        clipped = gradient / max(1.0, np.linalg.norm(gradient))
        mean, square = 0.9 * mean + 0.1 * clipped, 0.99 * square + 0.01 * clipped**2
        adam = mean / (1 - 0.9**step) / (np.sqrt(square / (1 - 0.99**step)) + 1e-8)
        assert_close(updates["m"][0], adam[:2] + 0.1 * params["m"][0], rel=1e-5)
        assert_close(updates["v"], adam[2:], rel=1e-5)


@pytest.mark.parametrize(
    "schedule, middle, end",
    [("constant", 1e-3, 1e-3), ("cosine", 5.5e-4, 1e-4), ("linear", 5.5e-4, 1e-4)],
)
def test_schedules(schedule, middle, end):
    stage = Stage("s", 8, 1, 100, 1e-3, schedule=schedule, final_lr=1e-4)
    rate = learning_rate(stage)
    assert_close([rate(0), rate(50), rate(100)], [1e-3, middle, end], rel=1e-5)


def slow_rate(stage, step):
    """The rate as the callback of RWKV-LM and RWKV-X works it out, which counts tokens."""
    tokens = stage.seq_len * stage.global_batch
    done, warmup = step * tokens, stage.warmup_steps * tokens
    progress = max(0.0, min(1.0, (done - warmup) / (stage.steps * tokens - warmup)))
    ratio = stage.final_lr / stage.peak_lr
    rate = {
        "constant": stage.peak_lr,
        "linear": stage.peak_lr + (stage.final_lr - stage.peak_lr) * progress,
        "cosine": stage.peak_lr
        * (0.5 + ratio / 2 + (0.5 - ratio / 2) * math.cos(math.pi * progress)),
    }[stage.schedule]
    if step < stage.warmup_steps:
        rate *= 0.01 + 0.99 * step / stage.warmup_steps
    return rate


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_schedules_count_from_the_end_of_the_warm_up(schedule):
    stage = Stage("s", 8, 4, 1000, 6e-4, schedule=schedule, final_lr=6e-5, warmup_steps=100)
    steps = [0, 1, 50, 99, 100, 101, 325, 550, 775, 999, 1000]
    rate = learning_rate(stage)
    assert_close([rate(i) for i in steps], [slow_rate(stage, i) for i in steps], rel=1e-5)
    if schedule == "cosine":  # half of the way: counted from step 0 it would be 13 % less
        assert_close(rate(550), 3.3e-4, rel=1e-5)


def test_a_stage_that_only_warms_up():
    rate = learning_rate(Stage("s", 8, 1, 10, 1e-3, warmup_steps=10, schedule="cosine"))
    assert_close([rate(0), rate(5)], [1e-5, 1e-3 * (0.01 + 0.99 / 2)], rel=1e-5)
