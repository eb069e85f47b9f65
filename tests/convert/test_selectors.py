"""Checkpoints with learned selectors: kept, read with other selectors, and begun from without."""

import dataclasses

import jax
import numpy as np
import pytest

from rwkvx_jax.checkpoint import load_checkpoint
from rwkvx_jax.config import Config, ConfigError, Stage
from rwkvx_jax.convert.layout import outside_table
from rwkvx_jax.convert.own import write_own_safetensors
from rwkvx_jax.digest import flat
from rwkvx_jax.model import get_params
from rwkvx_jax.training.curriculum import next_stage
from rwkvx_jax.training.initial import load_initial_params
from tests.helpers import assert_close
from tests.model_cases import random_params
from tests.modules.test_indexer import INDEX, TOKENS, model_of
from tests.training.training_cases import one_device_mesh

BOUNDS = dataclasses.replace(INDEX, selector="bounds", index_size=0)
SHARED = dataclasses.replace(INDEX, num_kv_heads=2, selection_groups=1)
SEER = dataclasses.replace(SHARED, selector="seer", selection_groups=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("selectors")
    for name, config in (("index", SHARED), ("bounds", BOUNDS), ("seer", SEER)):
        params = dict(flat(random_params(config)))
        write_own_safetensors(folder / f"{name}.safetensors", config, "byte", params)
    return folder


@pytest.mark.parametrize("config", [SHARED, SEER], ids=["index", "seer"])
def test_an_indexer_is_kept_or_left_out(folder, config):
    path, params = folder / f"{config.selector}.safetensors", random_params(config)
    kept = load_checkpoint(path).model
    assert kept.config == config
    assert_close(jax.jit(kept)(TOKENS), jax.jit(model_of(config, params))(TOKENS), rel=1e-6)
    without = load_checkpoint(path, overrides={"selector": "mean"}).model
    assert without.config == dataclasses.replace(
        config, selector="mean", index_size=0, selection_groups=2
    )
    assert "indexer" not in get_params(without)["attention_blocks"]["attention"]
    alone = dataclasses.replace(config, num_kv_heads=0, selection_groups=0)
    assert outside_table(alone) == f"selector={config.selector!r}"


def test_training_goes_on_from_a_model_without_an_indexer(folder):
    stage = Stage("learn", 32, 8, 1, 1e-3, trainable="indexer", selection_loss=1.0)
    config = Config(dataclasses.replace(INDEX, index_size=0), (stage,))
    mesh = one_device_mesh()
    params = load_initial_params(folder / "bounds.safetensors", config, mesh)
    _, state = next_stage(config, 0, mesh, params, None)
    maps = state.params["attention_blocks"]["attention"]["indexer"]["key_map"]
    np.testing.assert_array_equal(maps, np.broadcast_to(np.eye(8), (2, 4, 8, 8)))
    back = Config(BOUNDS, (dataclasses.replace(stage, trainable="all", selection_loss=0),))
    with pytest.raises(ConfigError, match="model.selector: index there,  in the config"):
        load_initial_params(folder / "index.safetensors", back, mesh)
    other = Config(dataclasses.replace(SHARED, selector="seer", selection_groups=2), (stage,))
    with pytest.raises(ConfigError, match="model.selector: index there, seer in the config"):
        load_initial_params(folder / "index.safetensors", other, mesh)
