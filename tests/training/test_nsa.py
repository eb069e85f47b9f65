"""Models with attention "nsa" are trained on packed documents, stored and used."""

import dataclasses

import jax
import numpy as np
import pytest

from rwkvx_jax.checkpoint import load_checkpoint
from rwkvx_jax.config import Config, ConfigError, Stage
from rwkvx_jax.convert.layout import outside_table
from rwkvx_jax.convert.own import write_own_safetensors
from rwkvx_jax.digest import flat
from rwkvx_jax.generate.engine import Engine
from rwkvx_jax.generate.requests import Request
from rwkvx_jax.model import get_params
from rwkvx_jax.training.initial import load_initial_params
from rwkvx_jax.training.loop import fit
from tests.model_cases import random_params
from tests.training.training_cases import CURRICULUM, MODEL, one_device_mesh, same_bits

HYBRID = dataclasses.replace(MODEL, attention="nsa", top_k=3, window_size=10)
PLAIN = dataclasses.replace(HYBRID, num_blocks=0)


@pytest.mark.thorough
def test_it_is_trained_stored_and_used(tmp_path):
    config = dataclasses.replace(CURRICULUM, model=PLAIN, stages=(Stage("all", 48, 8, 3, 1e-2),))
    after = fit(config, tmp_path / "run")
    assert np.abs(after["attention_blocks"]["attention"]["gate"]).max() > 0  # learned
    loaded = load_checkpoint(tmp_path / "run").model
    assert loaded.config == PLAIN and same_bits(get_params(loaded), after)
    file = tmp_path / "ours.safetensors"
    write_own_safetensors(file, PLAIN, "byte", dict(flat(jax.device_get(after))))
    assert same_bits(get_params(load_checkpoint(file).model), after)

    engine = Engine(loaded, max_length=96, batch=1, piece=16)
    requests, prefix = [Request(list(range(n)), 5, (), seed=n) for n in (30, 41)], [7] * 20
    engine.hold(prefix)  # the second text in the place of the first, both behind a prefix
    found = {answer.number: answer.tokens.tolist() for answer in engine.answer(requests)}
    engine.hold([])
    for number, request in enumerate(requests):
        whole = dataclasses.replace(request, prompt=[*prefix, *request.prompt])
        (answer,) = engine.answer([whole])
        assert answer.tokens.tolist() == found[number]


def test_only_our_own_files_hold_it(tmp_path):
    assert outside_table(HYBRID) == "attention='nsa'"
    file = tmp_path / "sparse.safetensors"
    sparse = dataclasses.replace(HYBRID, attention="sparse")
    write_own_safetensors(file, sparse, "byte", dict(flat(random_params(sparse))))
    config = Config(HYBRID, (Stage("all", 48, 8, 1, 1e-3),))
    with pytest.raises(ConfigError, match="model.attention:  there, nsa in the config"):
        load_initial_params(file, config, one_device_mesh())
