"""Models from anywhere: what comes back, and what a resume or a load refuses."""

import copy
import dataclasses
import json

import numpy as np
import pytest

from rwkvx_jax.checkpoint import (
    check_resumable,
    load_checkpoint,
    load_initial_params,
    progress_record,
    read_workdir,
)
from rwkvx_jax.checkpoint_store import CHECKPOINTS, Checkpoints
from rwkvx_jax.config import ConfigError, MeshConfig, RunConfig, Stage
from tests.model_cases import random_params
from tests.training_cases import CURRICULUM, MODEL, STAGES, same_bits

TEXT = {"tokenizer": "byte", "sources": [{"kind": "text", "sha256": "abc", "tokens": 1000}]}
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
        dataclasses.replace(CURRICULUM, stages=(*STAGES, Stage("more", 8, 8, 1, 1e-3))),
        dataclasses.replace(CURRICULUM, stages=STAGES[:2]),
    ],
)
def test_what_may_change_between_two_starts(tmp_path, config):
    check_resumable(PROGRESS, config, TEXT, tmp_path)


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


def test_initial_parameters_have_to_fit(plain_run, tmp_path):
    assert same_bits(
        load_initial_params(plain_run, CURRICULUM), random_params(MODEL.without_attention())
    )
    with pytest.raises(ConfigError, match=r"(?s)another shape.*model.width: 16 there, 32 in") as e:
        load_initial_params(plain_run, changed("model", width=32))
    assert "model.ffn_width: 64 there, 128" in str(e.value) and "blocks." not in str(e.value)
    save_run(tmp_path, CURRICULUM, random_params(MODEL), 2)
    with pytest.raises(ConfigError, match="already has attention blocks, but stage 'rwkv7'"):
        load_initial_params(tmp_path, CURRICULUM)
    hybrid = dataclasses.replace(CURRICULUM, stages=STAGES[1:])
    assert same_bits(load_initial_params(tmp_path, hybrid), random_params(MODEL))
