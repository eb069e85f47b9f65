"""Shared pieces of the evaluations: intervals, batches, the reader, opening checkpoints."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkvx_jax.checkpoint import Loaded, flat
from rwkvx_jax.config import Config, ConfigError, DataConfig, ModelConfig, RunConfig, Stage
from rwkvx_jax.convert.own import write_own_safetensors
from rwkvx_jax.evals.intervals import share_with_interval, wilson
from rwkvx_jax.evals.models import EvalModel, EvalOptions, as_model, open_models
from rwkvx_jax.evals.plots import HeatMap, draw
from rwkvx_jax.evals.readers import GreedyReader, affordable_batch
from rwkvx_jax.evals.runner import even_batches
from rwkvx_jax.generate.rows import Rows
from rwkvx_jax.model import abstract_model, with_params
from rwkvx_jax.tokenizer import load_tokenizer
from tests.evals.eval_models import TINY, random_params
from tests.helpers import assert_close

# The recurrence that compiles fastest: what is tested here is how prompts are read.
FLOAT32 = RunConfig(compute_dtype="float32", recurrence="sequential")


@pytest.fixture(scope="module")
def model():
    return with_params(abstract_model(TINY, FLOAT32), random_params(TINY))


@pytest.fixture(scope="module")
def tested(model):
    return as_model(Loaded(model, "byte", "", None, None, None), Path("tiny"), "tiny")


@pytest.mark.parametrize(
    "correct, trials, low, high",
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (8, 10, 0.4902, 0.9433),
        (50, 100, 0.4038, 0.5962),
    ],
)
def test_wilson_interval_has_the_published_values(correct, trials, low, high):
    assert_close(wilson(correct, trials), (low, high), rel=2e-4)


def test_share_of_nothing_claims_nothing():
    assert share_with_interval(0, 0) == {
        "trials": 0,
        "correct": 0,
        "accuracy": None,
        "low": 0.0,
        "high": 1.0,
    }


@pytest.mark.parametrize(
    "count, size, sizes", [(0, 4, []), (4, 4, [4]), (9, 4, [3, 3, 3]), (5, 4, [2, 3])]
)
def test_batches_are_few_and_even(count, size, sizes):
    batches = list(even_batches(list(range(count)), size))
    assert [len(batch) for batch in batches] == sizes
    assert [i for batch in batches for i in batch] == list(range(count))


def greedy_by_full_passes(model, prompt, count):
    """The oracle: a whole forward pass for every token of the answer."""
    forward = jax.jit(lambda tokens: model(tokens))
    tokens = np.zeros((1, 64), np.int32)
    tokens[0, : len(prompt)] = prompt
    for i in range(len(prompt), len(prompt) + count):
        tokens[0, i] = int(jnp.argmax(forward(tokens)[0, i - 1]))
    return tokens[0, len(prompt) : len(prompt) + count]


@pytest.mark.thorough
@pytest.mark.parametrize("attention", [True, False])
def test_reader_continues_as_full_passes_do(tested, attention):
    if not attention:
        tested = tested.without_attention()
    params = jax.tree.map(jnp.asarray, tested.params)
    model = with_params(abstract_model(tested.config, FLOAT32), params)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(1, 257, n).astype(np.int32) for n in (43, 7, 16)]
    read = []
    reader = GreedyReader(tested, prefill_chunk=16, batch=4, longest=1)  # too low: it has to grow
    answers = reader(prompts, 8, read.append)
    assert answers.shape == (3, 8)
    for prompt, answer in zip(prompts, answers, strict=True):
        np.testing.assert_array_equal(answer, greedy_by_full_passes(model, prompt, 8))
    assert sum(read) == sum(map(len, prompts))
    seen = []
    cut = reader(
        prompts, 8, read.append, lambda answer: seen.append(len(answer)) or len(answer) > 2
    )
    np.testing.assert_array_equal(cut[:, :3], answers[:, :3])
    assert not cut[:, 3:].any() and seen == [1] * 3 + [2] * 3 + [3] * 3
    # An answer's end does not depend on its neighbours', nor do damaged ones touch them.
    ends = {prompt: int(answers[i, i]) for i, prompt in enumerate("abc")}
    cut = reader(prompts, 8, read.append, lambda answer: answer[-1] in ends.values())
    for row, whole in zip(cut, answers, strict=True):
        stop = int(np.argmax(np.isin(whole, list(ends.values()))))
        np.testing.assert_array_equal(row, [*whole[: stop + 1], *[0] * (7 - stop)])
    engine = reader._engine
    embed = engine.rows.params["embed"].at[prompts[1][3], 0].set(jnp.nan)
    engine.rows.params = engine.rows.params | {"embed": embed}
    clean = [i for i in (0, 2) if prompts[1][3] not in [*prompts[i], *answers[i]]]
    damaged = reader(prompts, 8, read.append)
    assert (damaged[1] == -2).all() and clean
    np.testing.assert_array_equal(damaged[clean], answers[clean])


@pytest.mark.thorough
@pytest.mark.parametrize("attention", [True, False])
def test_what_prompts_share_is_read_once_and_changes_nothing(tested, attention, monkeypatch):
    if not attention:
        tested = tested.without_attention()
    rng = np.random.default_rng(2)
    draw = lambda n: rng.integers(1, 257, n).astype(np.int32)
    trunk = draw(90)
    prompts = [np.concatenate([trunk[:cut], draw(100 - cut)]) for cut in (5, 5, 37, 37, 64, 89)]
    other = [draw(50), trunk[:33]]  # begins anew, and with fewer tokens than are known
    batches = [prompts[:2], prompts[2:4], prompts[4:], other, [trunk[:40]], prompts[:1]]
    shared = GreedyReader(tested, prefill_chunk=16, batch=2, longest=100)
    fed, read = [], Rows.read

    def counted(self, texts, advance):
        fed.append(max(map(len, texts.values())))
        read(self, texts, advance)

    monkeypatch.setattr(Rows, "read", counted)
    found, amounts = [], []
    for batch in batches:
        fed.clear()
        found.append(shared(batch, 6, lambda count: None))
        amounts.append(sum(fed))
    assert amounts == [100, 100, 100 - 32, 50, 40, 100]
    alone = GreedyReader(tested, prefill_chunk=16, batch=2, longest=100)
    for batch, answers in zip(batches, found, strict=True):
        for prompt, answer in zip(batch, answers, strict=True):
            alone([draw(3)], 1, lambda count: None)  # so that nothing is shared
            expected = alone([prompt], 6, lambda count: None)[0]
            np.testing.assert_array_equal(answer, expected)


def test_attention_matters_in_the_reader_test(model, tested):
    tokens = np.arange(1, 65)[None]
    off = tested.without_attention()
    plain = with_params(abstract_model(off.config, FLOAT32), off.params)
    assert float(jnp.abs(model(tokens) - plain(tokens)).max()) > 0.1


@pytest.mark.parametrize(
    "config, length, prefill_chunk, batch",
    [
        (ModelConfig.tiny(), 1024, 256, 32),
        (ModelConfig.tiny(), 16384, 2048, 4),
        (ModelConfig.tiny(), 16384, 16384, 1),
        (ModelConfig.rwkvx_0b2(), 8192, 2048, 2),
        (ModelConfig.rwkvx_0b2(), 1_000_000, 2048, 1),
    ],
)
def test_default_batch_bounds_memory(config, length, prefill_chunk, batch):
    tested = EvalModel("", config, FLOAT32, {}, None, "", None, None)
    assert affordable_batch(tested, length, prefill_chunk) == batch


def test_identity_sees_every_bit(tested):
    before = tested.description["parameters"]
    assert before == tested.description["parameters"]
    params = jax.tree.map(np.array, tested.params)
    params["head"]["weight"].view(np.uint8)[0, 0] ^= 1
    assert tested._replace(params=params).description["parameters"] != before


@pytest.mark.parametrize("step, expected", [(0, None), (1, 128), (10, 128), (11, 512), (30, 512)])
def test_trained_length_counts_stages_that_have_begun(step, expected):
    stages = (
        Stage("a", 128, 1, 10, 1e-3),
        Stage("b", 512, 1, 10, 1e-3),
        Stage("c", 256, 1, 10, 1e-3),
    )
    assert Config(TINY, stages, DataConfig()).trained_length(step) == expected


def options(*paths, **flags):
    return EvalOptions(checkpoint=tuple(map(Path, paths)), output=Path("out"), **flags)


def save(path, config, tokenizer):
    write_own_safetensors(path, config, tokenizer, dict(flat(random_params(config))))
    return path


def test_open_models_names_and_overrides(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    paths = [save(tmp_path / d / "m.safetensors", TINY, "byte") for d in "ab"]
    models = open_models(options(*paths, chunk_size=4))
    assert [s.label for s in models] == [str(path) for path in paths]
    assert [(s.config.chunk_size, s.config.top_k) for s in models] == [(4, 2)] * 2
    assert [s.label for s in open_models(options(paths[0]))] == ["m.safetensors"]


@pytest.mark.thorough
def test_open_models_refuses_what_cannot_be_compared(tmp_path):
    pytest.importorskip("pyrwkv_tokenizer")
    byte = save(tmp_path / "byte.safetensors", TINY, "byte")
    world_config = dataclasses.replace(TINY, vocab_size=65536, width=16)
    world = save(tmp_path / "world.safetensors", world_config, "world")
    with pytest.raises(ConfigError, match="byte.safetensors and .*world.safetensors use different"):
        open_models(options(byte, world))
    unknown = save(tmp_path / "unknown.safetensors", TINY, "")
    with pytest.raises(ConfigError, match="unknown.safetensors does not say which tokenizer"):
        open_models(options(unknown))
    small = save(tmp_path / "small.safetensors", dataclasses.replace(TINY, vocab_size=99), "byte")
    with pytest.raises(ConfigError, match="vocabulary of 99, too small"):
        open_models(options(small))
    with pytest.raises(ConfigError, match="no checkpoint at .*absent"):
        open_models(options(tmp_path / "absent"))


@pytest.mark.parametrize(
    "paths, flags, message",
    [
        ([], {}, "no checkpoint given"),
        (["a", "a"], {}, "given twice"),
        (["a"], {"limit": 0}, "--limit is 0"),
        (["a"], {"chunk_size": 0}, "--chunk-size is 0"),
        (["a"], {"prefill_chunk": -1}, "--piece is -1"),
        (["a"], {"seed": -1}, "--seed is -1"),
        (["a"], {"seed": 2**70}, "it must lie between 0 and 4294967295"),
    ],
)
def test_bad_flags(paths, flags, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        options(*paths, **flags)


def test_an_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="file is a file; name a folder"):
            EvalOptions(checkpoint=(Path("a"),), output=output)


def test_names_of_models_are_one_line(tmp_path):
    path = save(tmp_path / "a\x1b[31m\n$b$.safetensors", TINY, "byte")
    (tested,) = open_models(options(path))
    assert tested.label == "a\\x1b[31m\\n$b$.safetensors"
    map_of = HeatMap(tested.label + "$", "", (8,), (0.5,), *np.ones((2, 1, 1), int), None)
    draw([map_of] * 2, tmp_path / "x.png", title="t", x_label="x", y_label="y")
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_subject_tokenizer_is_the_models(tested):
    assert tested.tokenizer.fingerprint == load_tokenizer("byte").fingerprint
