"""Models from anywhere: what comes back, and what a resume or a load refuses."""

import collections
import copy
import dataclasses
import json

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from rwkvx_jax.checkpoint import (
    check_resumable,
    load_checkpoint,
    progress_record,
    read_workdir,
)
from rwkvx_jax.checkpoint_store import CHECKPOINTS, Checkpoints
from rwkvx_jax.config import ConfigError, LongCEConfig, MeshConfig, RunConfig, Stage
from rwkvx_jax.convert.files import write_tensors
from rwkvx_jax.convert.official import params_to_official
from rwkvx_jax.convert.own import write_own_safetensors
from rwkvx_jax.convert.tensors import ConversionError, as_lazy
from rwkvx_jax.digest import flat
from rwkvx_jax.sharding import make_mesh
from rwkvx_jax.training.curriculum import next_stage
from rwkvx_jax.training.initial import load_initial_params
from tests.model_cases import random_params
from tests.training.training_cases import CURRICULUM, MODEL, STAGES, one_device_mesh, same_bits

TEXT = {"tokenizer": "byte", "sources": [{"kind": "text", "sha256": "abc", "tokens": 1000}]}
MESH = one_device_mesh()
PROGRESS = json.loads(json.dumps(progress_record(CURRICULUM, 1, 2, TEXT)))


def changed(part, **values):
    return dataclasses.replace(
        CURRICULUM, **{part: dataclasses.replace(getattr(CURRICULUM, part), **values)}
    )


def with_stage(index, **values):
    stages = list(STAGES)
    stages[index] = dataclasses.replace(stages[index], **values)
    return dataclasses.replace(CURRICULUM, stages=tuple(stages))


@pytest.mark.parametrize(
    "config, line",
    [
        (changed("model", chunk_size=16), "model.chunk_size: 8 -> 16"),
        (changed("data", seed=5), "data.seed: 0 -> 5"),
        (changed("optimizer", policy="rwkvx"), "optimizer.policy: 'rwkv_lm' -> 'rwkvx'"),
        (with_stage(0, steps=5), "stages.0.steps: 4 -> 5"),
        (with_stage(1, peak_lr=0.5), "stages.1.peak_lr: 0.01 -> 0.5"),
        (with_stage(1, longce=LongCEConfig(stride=8)), "stages.1.longce.stride: 4000 -> 8"),
        (with_stage(1, steps=1), "stages.1.steps: 2 steps are done already, the config has 1"),
        (dataclasses.replace(CURRICULUM, stages=STAGES[:1]), "stages.1: Stage("),
    ],
)
def test_resuming_another_run_is_refused(tmp_path, config, line):
    with pytest.raises(ConfigError) as error:
        check_resumable(PROGRESS, config, TEXT, tmp_path)
    assert line in str(error.value)
    assert "another --workdir" in str(error.value) and str(tmp_path) in str(error.value)


def test_other_text_is_refused(tmp_path):
    other = copy.deepcopy(TEXT)
    other["sources"][0]["sha256"] = "def"
    with pytest.raises(ConfigError, match="training text.*abc.*def"):
        check_resumable(PROGRESS, CURRICULUM, other, tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(CURRICULUM, run=RunConfig(), mesh=MeshConfig(fsdp=2)),
        changed("data", cache_dir="elsewhere", cache_per_host=True, verify="full"),
        with_stage(1, steps=300),
        with_stage(2, peak_lr=0.5, seq_len=48),
        with_stage(0, longce=LongCEConfig(at_once=2)),
        with_stage(1, longce=LongCEConfig(at_once=2), steps=300),
        dataclasses.replace(CURRICULUM, stages=(*STAGES, Stage("more", 8, 8, 1, 1e-3))),
        dataclasses.replace(CURRICULUM, stages=STAGES[:2]),
    ],
)
def test_what_may_change_between_two_starts(tmp_path, config):
    check_resumable(PROGRESS, config, TEXT, tmp_path)


def test_a_value_of_before_it_was_renamed_resumes(tmp_path):
    run = {**PROGRESS["config"]["run"], "sparse_attention": "dense"}
    old = {**PROGRESS, "config": {**PROGRESS["config"], "run": run}}
    check_resumable(old, CURRICULUM, TEXT, tmp_path)
    with pytest.raises(ConfigError, match="dense.*reference"):
        RunConfig(sparse_attention="dense")


def test_a_run_from_before_documents_began_anew_goes_on_as_it_was(tmp_path):
    data = {k: v for k, v in PROGRESS["config"]["data"].items() if k != "reset_at_documents"}
    old = {**PROGRESS, "config": {**PROGRESS["config"], "data": data}}
    check_resumable(old, changed("data", reset_at_documents=False), TEXT, tmp_path)
    with pytest.raises(ConfigError, match="data.reset_at_documents: False -> True"):
        check_resumable(old, CURRICULUM, TEXT, tmp_path)


def save_run(workdir, config, params, stage):
    with Checkpoints(workdir, keep=1) as checkpoints:
        checkpoints.save(
            7, params, {"moments": np.zeros(1)}, progress_record(config, stage, 1, TEXT)
        )
        checkpoints.wait()


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("plain")
    save_run(workdir, CURRICULUM, random_params(MODEL.without_attention()), 0)
    return workdir


def test_a_workdir_is_a_model(plain_run):
    config, stage, step, params = read_workdir(plain_run)
    assert (config, stage, step) == (CURRICULUM, STAGES[0], 7)
    assert same_bits(params, random_params(MODEL.without_attention()))
    loaded = load_checkpoint(plain_run, chunk_size=4)
    assert (loaded.tokenizer, loaded.step) == ("byte", 7)
    assert loaded.model.config == dataclasses.replace(MODEL.without_attention(), chunk_size=4)
    assert load_checkpoint(plain_run / CHECKPOINTS / "7").step == 7


def test_loading_errors(tmp_path, plain_run):
    with pytest.raises(ConfigError, match="no checkpoint at .*absent"):
        load_checkpoint(tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"no checkpoint of step 3; it has those of \[7\]"):
        read_workdir(plain_run, step=3)
    with pytest.raises(ConfigError, match=r"no checkpoint at .*checkpoints/3"):
        load_checkpoint(plain_run / CHECKPOINTS / "3")
    with pytest.raises(ConfigError, match="holds no run"):
        read_workdir(tmp_path)
    (tmp_path / CHECKPOINTS).mkdir()
    with pytest.raises(ConfigError, match="has no checkpoint yet: .* run.checkpoint_every"):
        read_workdir(tmp_path)
    with pytest.raises(ConfigError, match=r"embed: \(257, 16\) there, \(300, 16\) wanted"):
        load_checkpoint(plain_run, overrides={"vocab_size": 300})


@pytest.mark.thorough
def test_initial_parameters_have_to_fit(plain_run, tmp_path):
    assert same_bits(
        load_initial_params(plain_run, CURRICULUM, MESH), random_params(MODEL.without_attention())
    )
    with pytest.raises(ConfigError, match=r"(?s)another shape.*model.width: 16 there, 32 in") as e:
        load_initial_params(plain_run, changed("model", width=32), MESH)
    assert "model.ffn_width: 64 there, 128" in str(e.value) and "blocks." not in str(e.value)
    save_run(tmp_path, CURRICULUM, random_params(MODEL), 2)
    with pytest.raises(ConfigError, match="already has attention blocks, but stage 'rwkv7'"):
        load_initial_params(tmp_path, CURRICULUM, MESH)
    hybrid = dataclasses.replace(CURRICULUM, stages=STAGES[1:])
    assert same_bits(load_initial_params(tmp_path, hybrid, MESH), random_params(MODEL))


@pytest.mark.thorough
def test_learned_states_are_never_dropped_at_a_start(tmp_path):
    run_on = changed("data", reset_at_documents=False)
    model = dataclasses.replace(MODEL, learned_state=True)
    stateful = dataclasses.replace(run_on, model=model)
    params = random_params(stateful.model)
    save_run(tmp_path, stateful, params, 2)
    with pytest.raises(ConfigError, match="learned initial states.*model.learned_state is False"):
        load_initial_params(tmp_path, dataclasses.replace(CURRICULUM, stages=STAGES[1:]), MESH)
    config = dataclasses.replace(stateful, stages=STAGES[1:])
    assert same_bits(load_initial_params(tmp_path, config, MESH), params)


def test_a_convolution_of_keys_is_a_matter_of_hybrids(plain_run, tmp_path):
    """A plain RWKV-7 has none, whatever its config says; hybrids must have the config's."""
    plain = random_params(MODEL.without_attention())
    conv = changed("model", key_conv=2)
    assert same_bits(load_initial_params(plain_run, conv, MESH), plain)
    save_run(tmp_path, conv, random_params(conv.model), 2)
    with pytest.raises(ConfigError, match="another shape.*\n  model.key_conv: 2 there, 3 in the"):
        load_initial_params(
            tmp_path, dataclasses.replace(changed("model", key_conv=3), stages=STAGES[1:]), MESH
        )
    hybrid = dataclasses.replace(conv, stages=STAGES[1:])
    assert same_bits(load_initial_params(tmp_path, hybrid, MESH), random_params(conv.model))


EVEN = dataclasses.replace(CURRICULUM, model=dataclasses.replace(MODEL, vocab_size=258))


@pytest.fixture(scope="module")
def plain_files(tmp_path_factory):
    """The same RWKV-7 as a run, in a file of ours, and in an official one."""
    folder = tmp_path_factory.mktemp("files")
    config = EVEN.model.without_attention()
    params = random_params(config)
    save_run(folder / "run", EVEN, params, 0)
    params = dict(flat(params))
    write_own_safetensors(folder / "own.safetensors", config, "byte", params)
    write_tensors(folder / "official.pth", params_to_official(config, as_lazy(params)))
    return folder


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name, inits",
    [
        ("run", ("copy", "zero", "aligned")),
        ("own.safetensors", ("copy",)),
        ("official.pth", ("copy",)),
    ],
)
def test_a_mesh_starts_with_what_one_device_starts_with(plain_files, monkeypatch, name, inits):
    """Each device gets its parts and no more, and no other backend is asked for."""
    monkeypatch.setattr(jax, "local_devices", lambda *_, backend=None: _only_default(backend))
    states, alone = [], None
    for mesh in (MESH, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        with jax.set_mesh(mesh):
            params = load_initial_params(plain_files / name, EVEN, mesh)
            states.append([_first_state(init, mesh, params) for init in inits])
        alone = alone or params  # of the first mesh
    for init, one, spread in zip(inits, *states, strict=True):
        assert same_bits(one, spread), init
    with jax.set_mesh(mesh):  # from one device of the mesh, as callers of `fit` may have them
        assert same_bits(_first_state("copy", mesh, alone), states[1][0])
    source = states[1][0]["blocks"]["time_mix"]["key"]
    new = states[1][0]["attention_blocks"]["attention"]["key"]  # the first one is "copy"
    np.testing.assert_array_equal(new, source[1::2])
    assert source.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    held, whole = _bytes_held(params), sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert len(held) == 8 and max(held.values()) < 0.4 * whole  # matrices by 4, vectors whole


def _first_state(init, mesh, params):
    """Parameters that the first stage of the hybrid starts with."""
    model = dataclasses.replace(EVEN.model, attention_init=init)
    config = dataclasses.replace(EVEN, model=model, stages=STAGES[1:])
    return next_stage(config, 0, mesh, params, None)[1].params


def _only_default(backend):
    assert backend is None
    return jax.devices()


def _bytes_held(params):
    """Bytes of parameters on each device."""
    held = collections.Counter()
    for leaf in jax.tree.leaves(params):
        held.update({shard.device.id: shard.data.nbytes for shard in leaf.addressable_shards})
    return held


def test_files_with_values_that_are_not_finite_start_nothing(plain_files, tmp_path):
    config = EVEN.model.without_attention()
    params = dict(flat(random_params(config)))
    params["ln_out.scale"][0] = np.nan
    write_own_safetensors(tmp_path / "nan.safetensors", config, "byte", params)
    with pytest.raises(ConversionError, match=r"infinite, in 1 tensors: ln_out.scale \(1\)"):
        load_initial_params(tmp_path / "nan.safetensors", EVEN, MESH)
