"""Adapters and learned states: what trains, what the base keeps, and that no reader loses them."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkvx_jax.checkpoint import flat, load_checkpoint, read_workdir
from rwkvx_jax.config import (
    ADAPTERS,
    INITIAL_STATE,
    Config,
    DataConfig,
    LoRAConfig,
    MeshConfig,
    OptimizerConfig,
    Stage,
)
from rwkvx_jax.convert.__main__ import main as convert
from rwkvx_jax.lora import merged, stage_params
from rwkvx_jax.model import abstract_model, get_params, with_params
from rwkvx_jax.modules.parameters import Adapted
from rwkvx_jax.modules.trees import joined
from rwkvx_jax.sharding import batch_sharding, make_mesh
from rwkvx_jax.tokenizer import load_tokenizer
from rwkvx_jax.training.curriculum import next_stage
from rwkvx_jax.training.evaluate import make_evaluator
from rwkvx_jax.training.loop import fit
from rwkvx_jax.training.memory import describe_trainable, parameter_counts, training_bytes
from rwkvx_jax.training.probe import make_probe
from rwkvx_jax.training.step import bind
from rwkvx_jax.training.under_way import StepWatch
from tests.helpers import assert_close
from tests.model_cases import random_params
from tests.training.training_cases import (
    MODEL,
    RUN,
    one_device_mesh,
    random_batch,
    same_bits,
)

# Adam divides by the size of the gradient: with a large eps parameters are as close as gradients.
OPTIMIZER = OptimizerConfig(clip_norm=0.0, eps=1e-2, weight_decay=0.0)
LORA = LoRAConfig(rank=3, alpha=6.0)
STATEFUL = dataclasses.replace(MODEL, learned_state=True)
STAGE = {
    "lora": Stage("tune", 24, 8, 3, 1e-2, trainable="lora", lora=LORA),
    "state": Stage("tune", 24, 8, 3, 1e-1, trainable="state"),
}


def config_of(kind, **changes):
    """One stage that trains adapters or states of a random model."""
    model = STATEFUL if kind == "state" else MODEL
    stage = dataclasses.replace(STAGE[kind], **changes)
    data = DataConfig(reset_at_documents=False)  # a learned state begins no packed document
    return Config(model, (stage,), data=data, optimizer=OPTIMIZER, run=RUN)


def begin(config, mesh=None, seed=0):
    """Program and state at the beginning of a stage, from random parameters of the plain model."""
    return next_stage(config, 0, mesh or one_device_mesh(), random_params(MODEL, seed), None)


def moments(state):
    return next(s for s in state.opt_state if hasattr(s, "mu")).mu


def features(program, params, tokens):
    return jax.jit(lambda p: bind(program.model, p, program.stage).features(tokens))(params)


@pytest.fixture(scope="module")
def batch():
    return random_batch(8, 24)


@pytest.mark.parametrize("kind", ["lora", "state"])
def test_only_what_is_tuned_trains_and_at_first_nothing_is_changed(kind, batch):
    program, state = begin(config_of(kind))
    base = random_params(MODEL)
    tokens = batch["tokens"][:, :-1]
    plain = with_params(abstract_model(MODEL, RUN), base)
    expected = jax.jit(lambda p: with_params(plain, p).features(tokens))(base)
    assert same_bits(features(program, state.params, tokens), expected)

    before = jax.device_get(state.params)
    state, _ = program.train_step(state, jax.tree.map(jnp.asarray, batch))
    state, _ = program.train_step(state, jax.tree.map(jnp.asarray, batch))
    trained = {name for name, _ in flat(before) if program.stage.trains(name)}
    if kind == "state":
        assert trained == {INITIAL_STATE}
    else:
        assert len(trained) == 2 * (4 + 2 + 2) and all(n.startswith("lora.") for n in trained)
    assert {name for name, _ in flat(moments(state))} == trained
    arrays = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(arrays) == 2 * len(trained)  # two moments each, nothing else
    for (name, old), (_, new) in zip(flat(before), flat(state.params), strict=True):
        assert (old.tobytes() != np.asarray(new).tobytes()) == (name in trained), name


@pytest.mark.thorough
def test_merged_parameters_are_the_model_that_was_trained(batch):
    program, state = begin(config_of("lora"))
    for _ in range(3):
        state, _ = program.train_step(state, jax.tree.map(jnp.asarray, batch))
    tokens = batch["tokens"][:, :-1]
    expected = np.asarray(features(program, state.params, tokens))
    base = jax.device_get(state.params)
    plain = merged(state.params, LORA)
    assert [name for name, _ in flat(plain)] == [name for name, _ in flat(random_params(MODEL))]
    model = with_params(program.model, plain)
    assert_close(jax.jit(lambda m: m.features(tokens))(model), expected, rel=1e-5)
    pair = base[ADAPTERS]["blocks"]["channel_mix"]["key"]
    matrix = base["blocks"]["channel_mix"]["key"] + 2.0 * pair["a"] @ pair["b"]  # 6 / 3
    assert np.abs(pair["b"]).max() > 0
    assert_close(plain["blocks"]["channel_mix"]["key"], matrix, rel=1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "kind, sizes",
    [
        ("lora", {"data": 1, "fsdp": 2, "tensor": 2}),
        pytest.param("state", {"data": 1, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
        ("state", {"data": 2, "context": 4}),
    ],
    ids=str,
)
def test_a_mesh_and_accumulation_change_nothing(kind, sizes):
    """Two steps on several devices in two parts are those on one device at once."""
    batches = [random_batch(8, 32, seed) for seed in (0, 1)]

    def train(mesh, **changes):
        config = config_of(kind, seq_len=32, **changes)
        even = dataclasses.replace(config.model, vocab_size=258)
        config = dataclasses.replace(config, model=even)
        plain = dataclasses.replace(even, learned_state=False)
        with jax.set_mesh(mesh):
            program, state = next_stage(config, 0, mesh, random_params(plain), None)
            for batch in batches:
                place = lambda x: jax.device_put(x, batch_sharding(mesh, 8))
                state, metrics = program.train_step(state, jax.tree.map(place, batch))
        return metrics, *jax.device_get((moments(state), state.params)), state

    metrics, grads, params, _ = train(one_device_mesh())
    count = int(np.prod(list(sizes.values())))
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[:count])
    cut_metrics, cut_grads, cut_params, state = train(mesh, accumulation=2)
    for name in ("loss", "grad_norm"):
        assert_close(cut_metrics[name], metrics[name], rel=1e-5, name=name)
    for (name, found), (_, expected) in zip(flat(cut_grads), flat(grads), strict=True):
        assert_close(found, expected, rel=5e-5, name=name)
    for (name, found), (_, expected) in zip(flat(cut_params), flat(params), strict=True):
        assert_close(found, expected, rel=5e-5, name=name)
    if "tensor" in sizes:
        name = "lora.blocks.time_mix.key.b" if kind == "lora" else INITIAL_STATE
        leaf = dict(flat(state.params))[name]
        assert leaf.sharding.shard_shape(leaf.shape) != leaf.shape


@pytest.mark.parametrize("kind", ["lora", "state"])
def test_the_accounts_count_what_is_tuned(kind):
    """Numbers of parameters, the printed line, and the memory of a stage, from its own arrays."""
    config = config_of(kind)
    (stage,) = config.stages
    shapes, _ = stage_params(abstract_model(config.model), stage)
    sizes = {name: leaf.size for name, leaf in flat(shapes)}
    tuned = sum(size for name, size in sizes.items() if stage.trains(name))
    assert parameter_counts(config, stage) == (sum(sizes.values()), tuned) and tuned > 0
    assert describe_trainable(config, stage) == (
        f"{'lora (rank 3)' if kind == 'lora' else 'state'} parameters "
        f"({tuned:,} of {sum(sizes.values()):,})"
    )
    residual = 8 * 24 * MODEL.width * 4
    assert training_bytes(config, stage) == 4 * (sum(sizes.values()) + 3 * tuned) + residual


@pytest.mark.thorough
def test_the_probe_reads_through_adapters():
    config = config_of("lora", seq_len=160)
    config = dataclasses.replace(
        config, run=dataclasses.replace(RUN, eval_batches=0, probe_trials=2)
    )
    program, state = begin(config)
    seen = []
    bound = lambda params: seen.append(bind(program.model, params, program.stage)) or seen[-1]
    probe = make_probe(bound, load_tokenizer("byte"), 160, 2, seed=0)
    assert probe(state.params) in (0.0, 0.5, 1.0)
    assert isinstance(seen[0].blocks.channel_mix.key[...], Adapted)
    data = SimpleNamespace(tokenizer=load_tokenizer("byte"))
    evaluate = make_evaluator(config, program.stage, program, data, one_device_mesh())
    assert evaluate(state.params) == {"passkey_accuracy": probe(state.params)}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Config fields that let the runs of this file share compiled programs and tokens."""
    shared = tmp_path_factory.mktemp("shared")
    run = dataclasses.replace(RUN, compilation_cache=str(shared / "programs"), checkpoint_every=1)
    data = DataConfig(reset_at_documents=False, cache_dir=str(shared / "tokens"))
    return {"run": run, "data": data, "mesh": MeshConfig(data=8)}


class Crash(Exception):
    """Stands for the end of the process."""


def crash_at(config, step):
    """`StepWatch.submit`, but the process ends when the loop has just made step `step`."""
    submit = StepWatch.submit

    def spy(self, position, metrics):
        submit(self, position, metrics)
        if position.total(config) == step:
            raise Crash

    return spy


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["lora", pytest.param("state", marks=pytest.mark.slow)])
def test_runs_resume_to_the_last_bit_and_every_reader_sees_the_tuned_model(
    kind, settings, tmp_path, monkeypatch
):
    """A stage that tunes, then one that trains everything."""
    tune = dataclasses.replace(STAGE[kind], steps=2)
    stages = (tune, Stage("all", 24, 8, 1, 1e-2))
    config = dataclasses.replace(config_of(kind), stages=stages, **settings)
    final = fit(config, tmp_path / "whole", random_params(MODEL))

    for step in (2, 3):  # inside the tuning stage, and after it
        with monkeypatch.context() as patch, pytest.raises(Crash):
            patch.setattr(StepWatch, "submit", crash_at(config, step))
            fit(config, tmp_path / "killed", random_params(MODEL))
    assert same_bits(fit(config, tmp_path / "killed", random_params(MODEL)), final)
    first, second = ((tmp_path / name / "metrics.jsonl") for name in ("whole", "killed"))
    assert first.read_bytes() == second.read_bytes()

    tuned = read_workdir(tmp_path / "whole", 2).params
    assert {n for n, _ in flat(tuned)} == {n for n, _ in flat(random_params(config.model))}
    base = dict(flat(random_params(MODEL)))
    changed = {n for n, p in flat(tuned) if not same_bits(p, base.get(n, jnp.zeros(p.shape)))}
    adapted = {n for n in base if LORA.adapts(n)}
    assert changed == ({INITIAL_STATE} if kind == "state" else adapted)
    loaded = load_checkpoint(tmp_path / "whole" / "checkpoints" / "2")
    assert same_bits(get_params(loaded.model), tuned)
    for name in ("file.safetensors", "official.pth"):
        convert([str(tmp_path / "whole" / "checkpoints" / "2"), str(tmp_path / name)])
        written = load_checkpoint(tmp_path / name).model
        assert written.config.learned_state == (kind == "state")
        assert jax.tree.all(jax.tree.map(np.array_equal, get_params(written), used(tuned, name)))


def used(params, name):
    """What a file holds: an official one no value residual of block 0, which nothing uses."""
    if not name.endswith(".pth"):
        return params
    mix = params["blocks"]["time_mix"]
    unused = {part: mix[part].at[0].set(0) for part in ("v0", "v1", "v2")}
    return joined(params, {"blocks": {"time_mix": unused}})
