"""A prefix read once and saved: later engines go on from it bit by bit, and no other ones do."""

import dataclasses

import jax
import numpy as np
import pytest

from rwkvx_jax.cache import CachePolicy
from rwkvx_jax.config import ConfigError, MeshConfig
from rwkvx_jax.generate.engine import Engine
from rwkvx_jax.generate.prefix_file import identity_of
from rwkvx_jax.model import abstract_model, get_params, unstack, with_params
from rwkvx_jax.sharding import make_mesh
from tests.generate.engine_cases import CONFIG, FLOAT32, draw_requests, make_engine
from tests.model_cases import random_params

PREFIX = np.random.default_rng(3).integers(1, 40, 21)
REQUESTS = [dataclasses.replace(r, max_tokens=7) for r in draw_requests(5, 4, 20)]  # all have room


@pytest.fixture(scope="module")
def engine():
    return make_engine(2)


@pytest.fixture(scope="module")
def saved(engine, tmp_path_factory):
    """A file, and what is answered behind the prefix in it."""
    path = tmp_path_factory.mktemp("saved") / "prefix.safetensors"
    engine.hold(PREFIX)
    engine.save(path)
    return path, answers(engine)


def answers(engine, requests=REQUESTS):
    found = {answer.number: answer.tokens.tolist() for answer in engine.answer(requests)}
    return [found[i] for i in range(len(requests))]


def test_another_engine_goes_on_bit_by_bit(engine, saved):
    path, expected = saved
    engine.hold([7] * 30)
    answers(engine)  # other keys and values are in the rows now
    read = engine.speed.prompt_tokens
    engine.load(path)
    assert engine.prefix.tolist() == PREFIX.tolist() and engine.speed.prompt_tokens == read
    assert answers(engine) == expected
    again = path.with_name("again")
    engine.save(again)
    assert again.read_bytes() == path.read_bytes()
    engine.hold([*PREFIX, 5])  # goes on from there
    assert engine.speed.prompt_tokens - read == 1 + sum(len(r.prompt) for r in REQUESTS)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "options", [{"batch": 3, "max_length": 70}, {"policy": CachePolicy(20, 12, 5)}]
)
def test_sizes_may_differ_and_policies_are_kept(options, tmp_path):
    options = {"batch": 2} | options
    policy = {"policy": options.get("policy")}
    first, later = make_engine(2, **policy), make_engine(**options)
    first.hold(PREFIX)
    first.save(tmp_path / "prefix")
    later.load(tmp_path / "prefix")
    assert answers(later) == answers(first)


@pytest.mark.thorough
def test_onto_a_mesh(saved):
    path, expected = saved
    with jax.set_mesh(make_mesh(MeshConfig(data=2, tensor=2, context=2))):
        engine = make_engine(2)
        engine.load(path)
        assert answers(engine) == expected


def test_what_can_not_be_gone_on_from_is_refused(engine, saved, tmp_path):
    path, _ = saved
    other = dataclasses.replace(CONFIG, top_k=3)
    changed = random_params(CONFIG)
    changed["blocks"]["channel_mix"]["key"][0, 0, 0] += 1e-3
    build = lambda config, params, run=FLOAT32, **more: Engine(
        with_params(abstract_model(config, run), params), max_length=48, piece=16, **more
    )
    half = dataclasses.replace(FLOAT32, compute_dtype="bfloat16")
    for engine_of, message in (
        (lambda: build(other, random_params(CONFIG)), "top_k 2, and this engine has 3"),
        (lambda: build(CONFIG, changed), "with parameters '.*use the model that made it"),
        (lambda: build(CONFIG, random_params(CONFIG), half), "compute_dtype 'float32', and"),
        (lambda: make_engine(1, policy=CachePolicy(20, 12, 5)), "policy None, and this engine"),
        (lambda: make_engine(1, max_length=20), "make the engine with a larger|more than max_len"),
    ):
        with pytest.raises(ConfigError, match=message):
            engine_of().load(path)
    whole, bad = path.read_bytes(), tmp_path / "bad"
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    for data, message in (
        (whole[:-7], "read the prefix again"),
        (bytes(flipped), "is not what was written.*read the prefix again"),
        (whole.replace(b'prefix": "1"', b'prefix": "2"'), "read the prefix again"),
        (b"", "read the prefix again"),
    ):
        bad.write_bytes(data)
        with pytest.raises(ConfigError, match=message):
            engine.load(bad)
    with pytest.raises(ConfigError, match="No such file"):
        engine.load(tmp_path / "absent")
    engine.hold(())
    with pytest.raises(ConfigError, match="no prefix is held"):
        engine.save(bad)


def test_a_model_is_the_same_stacked_or_not():
    model = with_params(abstract_model(CONFIG, FLOAT32), random_params(CONFIG))
    layered = unstack(model)
    one, other = (identity_of(m, get_params(m), None) for m in (model, layered))
    assert one == other
