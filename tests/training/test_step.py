"""The train step: accumulation, frozen parameters, bad steps, one compilation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkvx_jax.checkpoint import flat
from rwkvx_jax.config import LongCEConfig, OptimizerConfig
from rwkvx_jax.training.step import Guard, from_stored_optimizer, stage_program
from tests.helpers import assert_close
from tests.model_cases import random_params
from tests.training.training_cases import (
    CURRICULUM,
    MODEL,
    STAGES,
    one_device_mesh,
    random_batch,
    random_segments,
    same_bits,
)

# Without clipping the first moment after one step is 0.1 times the gradient.
CONFIG = dataclasses.replace(CURRICULUM, optimizer=OptimizerConfig(clip_norm=0.0))
ALL = dataclasses.replace(STAGES[2], seq_len=24)
TIME = 24


def make(stage):
    mesh = one_device_mesh()
    return stage_program(CONFIG, stage, mesh)


def run(program, batch):
    """One step from the same parameters: the state after it and the metrics."""
    state = program.start(random_params(MODEL), None)
    return program.train_step(state, jax.tree.map(jnp.asarray, batch))


def gradients(state):
    return next(s for s in state.opt_state if hasattr(s, "mu")).mu


@pytest.fixture(scope="module")
def whole():
    return make(ALL)


@pytest.fixture(scope="module")
def batch():
    return random_batch(8, TIME)


@pytest.mark.thorough
@pytest.mark.parametrize("average", ["token", pytest.param("sample", marks=pytest.mark.slow)])
def test_accumulation_is_the_big_batch(whole, batch, average):
    stage = dataclasses.replace(ALL, loss_average=average)
    big = whole if average == "token" else make(stage)
    state, metrics = run(big, batch)
    parts_state, parts_metrics = run(make(dataclasses.replace(stage, accumulation=4)), batch)
    for name in ("loss", "objective", "grad_norm"):
        assert_close(parts_metrics[name], metrics[name], rel=1e-5, name=name)
    for (name, found), (_, expected) in zip(
        flat(gradients(parts_state)), flat(gradients(state)), strict=True
    ):
        assert_close(found, expected, rel=1e-5, name=name)


FIRST = (8, 16, 8, 16, 8, 8, 16, 8)  # tokens of each row's first document: whole chunks
SECOND = (9, 5, 16, 8, 1, 14, 2, 16)  # of its second one; the rest is padding


def packed_and_apart(batch):
    """The batch with two documents a row, and the same documents, a row each."""
    places = np.arange(TIME)[None]
    ends = np.array(FIRST)[:, None], np.array(FIRST)[:, None] + np.array(SECOND)[:, None]
    ids = np.where(places < ends[0], 1, np.where(places < ends[1], 2, 0)).astype(np.int32)
    tokens = np.zeros((16, TIME + 1), np.int32)
    mask = np.zeros((16, TIME), np.float32)
    for row in range(8):
        for which, (start, stop) in enumerate(
            ((0, ends[0][row, 0]), (FIRST[row], ends[1][row, 0]))
        ):
            size = stop - start
            tokens[2 * row + which, :size] = batch["tokens"][row, start:stop]
            mask[2 * row + which, : size - 1] = batch["mask"][row, start : stop - 1]
            if stop == TIME:  # the target behind the row is of the last document
                tokens[2 * row + which, size] = batch["tokens"][row, -1]
                mask[2 * row + which, size - 1] = batch["mask"][row, -1]
    return {**batch, "segment_ids": ids}, {"tokens": tokens, "mask": mask}


def test_a_step_on_packed_documents_is_one_on_documents(batch):
    """Loss and gradients are those of the documents in rows of their own."""
    packed, apart = packed_and_apart(batch)
    expected, wanted = run(make(dataclasses.replace(ALL, global_batch=16)), apart)
    found, metrics = run(make(ALL), packed)
    assert float(metrics["padding"]) == pytest.approx(np.mean(packed["segment_ids"] == 0))
    for name in ("loss", "objective", "grad_norm"):
        assert_close(metrics[name], wanted[name], rel=1e-5, name=name)
    for (name, a), (_, b) in zip(flat(gradients(found)), flat(gradients(expected)), strict=True):
        assert_close(a, b, rel=1e-5, name=name)


@pytest.mark.thorough
def test_held_out_losses_of_packed_documents_are_those_of_documents(whole, batch):
    packed, apart = (jax.tree.map(jnp.asarray, x) for x in packed_and_apart(batch))
    params = whole.start(random_params(MODEL), None).params
    loss, count = whole.eval_step(params, packed)
    expected, wanted = make(dataclasses.replace(ALL, global_batch=16)).eval_step(params, apart)
    assert float(count) == float(wanted) == float(apart["mask"].sum())
    assert_close(loss, expected, rel=1e-5)


@pytest.mark.thorough
def test_documents_of_parts_are_those_of_the_batch(batch):
    """Accumulation of packed rows, LongCE and averages of documents included."""
    packed = {**batch, "segment_ids": random_segments(8, TIME)}
    stage = dataclasses.replace(
        ALL, loss="longce", longce=LongCEConfig(5, 4), loss_average="sample"
    )
    state, metrics = run(make(stage), packed)
    parts_state, parts_metrics = run(make(dataclasses.replace(stage, accumulation=4)), packed)
    assert metrics["objective"] != metrics["loss"]
    for name in ("loss", "objective", "grad_norm"):
        assert_close(parts_metrics[name], metrics[name], rel=2e-5, name=name)
    for found, expected in zip(
        *map(jax.tree.leaves, (gradients(parts_state), gradients(state))), strict=True
    ):
        assert_close(found, expected, rel=2e-5)


@pytest.mark.slow
def test_longce_accumulates_too(batch):
    stage = dataclasses.replace(ALL, loss="longce", longce=LongCEConfig(5, 4))
    state, metrics = run(make(stage), batch)
    parts_state, parts_metrics = run(make(dataclasses.replace(stage, accumulation=2)), batch)
    assert metrics["objective"] != metrics["loss"]
    assert_close(parts_metrics["objective"], metrics["objective"], rel=1e-5)
    for found, expected in zip(
        *map(jax.tree.leaves, (gradients(parts_state), gradients(state))), strict=True
    ):
        assert_close(found, expected, rel=2e-5)


def test_one_compilation_and_an_exact_second_start(whole, batch):
    params = random_params(MODEL)
    state = whole.start(params, None)
    batch = jax.tree.map(jnp.asarray, batch)
    for _ in range(3):
        state, _ = whole.train_step(state, batch)
    # As after a restart: host arrays and a step that is not 0.
    host = jax.device_get(state)
    again = whole.start(host.params, host.opt_state, step=3, guard=host.guard)
    first, _ = whole.train_step(state, batch)
    second, _ = whole.train_step(again, batch)
    assert same_bits(first, second) and int(second.step) == 4
    assert whole.train_step._cache_size() == 1


def test_a_bad_step_changes_nothing_and_is_counted(whole, batch):
    state = whole.start(random_params(MODEL), None)
    good = jax.tree.map(jnp.asarray, batch)
    bad = {**good, "mask": good["mask"].at[0, 0].set(jnp.nan)}
    state, metrics = whole.train_step(state, good)
    before = jax.device_get(state)
    for count in (1, 2):
        state, metrics = whole.train_step(state, bad)
        assert not np.isfinite(metrics["objective"])
        assert (int(metrics["consecutive_skips"]), int(metrics["skipped"])) == (count, count)
    assert same_bits(before.params, state.params) and same_bits(before.opt_state, state.opt_state)
    state, metrics = whole.train_step(state, good)
    assert (int(metrics["consecutive_skips"]), int(metrics["skipped"])) == (0, 2)
    assert not same_bits(before.params, state.params)


@pytest.mark.thorough
def test_preheat_holds_nothing_for_frozen_parameters(batch):
    program = make(dataclasses.replace(STAGES[1], seq_len=TIME))
    params = random_params(MODEL)
    state, _ = run(program, batch)
    trained = {name for name, _ in flat(params) if name.startswith("attention_blocks.")}
    assert {
        f"attention_blocks.{n}" for n, _ in flat(gradients(state)["attention_blocks"])
    } == trained
    arrays = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(arrays) == 2 * len(trained)  # two moments each, nothing else
    for (name, before), (_, after) in zip(flat(params), flat(state.params), strict=True):
        changed = np.asarray(before).tobytes() != np.asarray(after).tobytes()
        assert changed == (name in trained), name


def test_an_update_that_is_not_finite_never_reaches_the_parameters(whole, batch):
    """Loss and gradient are finite; what the optimizer makes of them is not."""
    state = whole.start(random_params(MODEL), None)
    batch = jax.tree.map(jnp.asarray, batch)
    state, metrics = whole.train_step(state, batch)
    assert metrics["finite_update"] and int(metrics["without_target"]) == 1  # of `random_batch`
    position = next(i for i, s in enumerate(state.opt_state) if hasattr(s, "nu"))
    adam = state.opt_state[position]
    # As an eps that a device takes for 0 would: a root of a second moment of about 0.
    second = jax.tree.map(lambda nu: jnp.full_like(nu, -1e30), adam.nu)
    opt_state = (*state.opt_state[:position], adam._replace(nu=second))
    opt_state += state.opt_state[position + 1 :]
    before = jax.device_get(state.params)
    state, metrics = whole.train_step(state._replace(opt_state=opt_state), batch)
    assert np.isfinite(metrics["objective"]) and np.isfinite(metrics["grad_norm"])
    assert not metrics["finite_update"] and int(metrics["consecutive_skips"]) == 1
    assert same_bits(before, state.params)


def test_a_batch_without_targets_changes_nothing(whole, batch):
    state = whole.start(random_params(MODEL), None)
    state, _ = whole.train_step(state, jax.tree.map(jnp.asarray, batch))
    before = jax.device_get(state)
    nothing = {**batch, "mask": np.zeros_like(batch["mask"])}
    state, metrics = whole.train_step(state, jax.tree.map(jnp.asarray, nothing))
    assert (int(metrics["without_target"]), int(metrics["consecutive_skips"])) == (8, 1)
    assert same_bits(before.params, state.params) and same_bits(before.opt_state, state.opt_state)


def test_guard_knows_spikes_from_ordinary_steps():
    guard = Guard.start()
    sound = jnp.bool_(True)
    for norm in (2.0, 3.0, 1.0):
        good, guard = guard.watch(sound, jnp.float32(norm), 10.0)
        assert good
    usual = float(guard.grad_norm_ema)
    assert 1.9 < usual < 2.1
    good, after = guard.watch(sound, jnp.float32(10.1 * usual), 10.0)
    assert not good and float(after.grad_norm_ema) == usual and int(after.skipped) == 1
    assert guard.watch(sound, jnp.float32(9.9 * usual), 10.0)[0]
    assert guard.watch(sound, jnp.float32(1e6), 0.0)[0]  # turned off
    assert not guard.watch(jnp.bool_(False), jnp.float32(1.0), 0.0)[0]
    assert not guard.watch(sound, jnp.float32(jnp.inf), 0.0)[0]


def test_checkpoints_hold_the_optimizer_under_the_names_that_existing_ones_have(whole):
    state = whole.abstract_state()
    stored = state.stored_optimizer()
    assert stored.keys() == {"moments", "guard"}
    assert list(stored["guard"]) == ["usual_norm", "skipped", "in_row"]
    assert from_stored_optimizer(stored) == (state.opt_state, state.guard)
