"""The engine: each answer is what its request gets alone, and none is lost."""

import dataclasses

import jax
import numpy as np
import pytest

from rwkvx_jax.cache import CachePolicy
from rwkvx_jax.config import ConfigError, MeshConfig
from rwkvx_jax.generate.engine import Engine
from rwkvx_jax.generate.programs import Programs
from rwkvx_jax.generate.requests import NotFiniteError, Request
from rwkvx_jax.generate.texts import continue_texts
from rwkvx_jax.model import abstract_model, get_params, param_axes, with_params
from rwkvx_jax.sharding import make_mesh
from rwkvx_jax.tokenizer import load_tokenizer
from rwkvx_jax.training.step import shardings_of
from tests.generate.engine_cases import (
    CONFIG,
    DRAWN,
    FLOAT32,
    LONGEST,
    draw_requests,
    make_engine,
)
from tests.model_cases import random_params


@pytest.fixture(scope="module")
def engine():
    return make_engine(4)


@pytest.fixture(scope="module")
def pair():
    return make_engine(2)


@pytest.fixture(scope="module")
def alone():
    return make_engine(1)


def answers_of(engine, requests, prefix=(), **options):
    """The answers by number, none twice."""
    engine.hold(prefix)
    found = list(engine.answer(requests, **options))
    answers = {answer.number: answer for answer in found}
    assert len(answers) == len(found)
    return answers


def solo(engine, request, prefix=()):
    """What the whole text gets alone, without a prefix that is held."""
    whole = dataclasses.replace(request, prompt=[*prefix, *request.prompt])
    return answers_of(engine, [whole])[0].tokens.tolist()


def test_each_answer_is_what_its_request_gets_alone(engine, alone):
    requests, order = list(draw_requests(40)), []
    for number, tokens, problem, *_ in engine.answer(iter(requests)):
        assert (tokens.tolist(), problem) == (solo(alone, requests[number]), ""), number
        order.append(number)
    assert sorted(order) == list(range(40)) != order  # as they come
    programs = engine.rows.programs
    assert programs.read._cache_size() <= 2 and programs.step._cache_size() == 1


def test_tokens_come_one_by_one(engine):
    requests = list(draw_requests(6, 9, 20))
    seen = {number: [] for number in range(6)}
    for number, token, answer in engine.stream(requests):
        if answer is None:
            seen[number].append(token)
        else:
            assert token is None and seen[number] == answer.tokens.tolist()


def test_a_held_prefix_is_read_once(engine, alone, monkeypatch):
    prefix, requests = [3, 1, 4, 1, 5, 9, 2, 6, 5], list(draw_requests(12, 1, 20))
    before = engine.speed.prompt_tokens
    for number, answer in answers_of(engine, requests, prefix).items():
        assert answer.tokens.tolist() == solo(alone, requests[number], prefix)
    prompts = sum(len(r.prompt) for r in requests if r.max_tokens)
    assert engine.speed.prompt_tokens - before == len(prefix) + prompts
    longer = [*prefix, 7, 7]  # only what is new of it
    before = engine.speed.prompt_tokens
    for number, answer in answers_of(engine, requests[:5], longer).items():
        assert answer.tokens.tolist() == solo(alone, requests[number], longer)
    prompts = sum(len(r.prompt) for r in requests[:5] if r.max_tokens)
    assert engine.speed.prompt_tokens - before == 2 + prompts
    other = answers_of(engine, requests[:5], [8, 8])  # begins anew
    assert other[1].tokens.tolist() == solo(alone, requests[1], [8, 8])
    engine.hold(())


def test_prefixes_and_prompts_of_any_length_share_their_programs():
    engine = make_engine(2, piece=64, max_length=100)
    programs = engine.rows.programs
    sizes = lambda: (programs.read._cache_size(), programs.step._cache_size())
    list(engine.answer([Request([1] * 80, 2, ())]))  # chunks of 64 and of 16
    assert sizes() == (2, 1)
    for length in (1, 17, 64, 97):
        engine.hold([2 + length % 30] * length)
        list(engine.answer([Request([1, 2], 2, ())]))
    assert sizes() == (2, 1) and engine.speed.prompt_tokens == 80 + 179 + 4 * 2


def test_prompts_are_not_padded_to_each_other():
    """A short prompt beside a long one is read in chunks of its own row."""
    rows, shapes = make_engine(4, piece=64, max_length=200).rows, []

    def read(params, logits, cache, tokens, counts, row, targets):
        shapes.append((tokens.shape, row, counts.tolist()))
        return logits, cache, None

    rows.programs.read = read
    text = lambda count: np.ones(count, np.int32)
    rows.read({0: text(64), 1: text(3), 2: text(50), 3: text(81)})
    assert shapes == [
        ((1, 64), 0, [64]),
        ((1, 16), 1, [3]),
        ((1, 64), 2, [50]),
        ((1, 64), 3, [64]),
        ((1, 16), 3, [16]),
        ((1, 16), 3, [1]),
    ]
    shapes.clear()
    rows.read({row: text(64 + row) for row in range(4)})
    assert [shape for shape, _, _ in shapes] == [(4, 64), *[(1, 16)] * 3]


def test_a_row_is_read_in_place():
    """Not even the keys of that row are copied, let alone the cache."""
    rows = make_engine(4, max_length=1 << 16).rows
    arguments = rows.params, rows.progress.logits, rows.cache, np.ones((1, 16), np.int32)
    count, row = np.asarray([16], np.int32), np.int32(1)
    memory = rows.programs.read.lower(*arguments, count, row, None).compile().memory_analysis()
    assert memory.temp_size_in_bytes < rows.cache.pages.keys.nbytes / 4


def test_requests_that_can_not_be_answered_say_why(engine, alone):
    requests = list(draw_requests(5, 2, 20))
    bad = [
        (Request([], 3), "is empty"),
        (Request([1, 40], 3), "token 40, outside the vocabulary of 40"),
        (Request([1] * 49, 3), "49 tokens, more than max_length 48"),
        (Request([1], 3, seed=-1), "seed is -1"),
        (Request([1], -1), "max_tokens is -1"),
        (Request([1], 1, (99,)), "stop list has token 99"),
        (Request([1, 2], 1, score=True), "max_tokens is 1"),
        (Request([1], 0, score=True), "needs two or more"),
    ]
    mixed = [bad[0][0], requests[0], bad[1][0], bad[2][0], *requests[1:], *[b[0] for b in bad[3:]]]
    found = answers_of(engine, mixed)
    for request, problem in bad:
        answer = found[mixed.index(request)]
        assert problem in answer.problem and not answer.not_finite
        with pytest.raises(ConfigError):
            answer.check()
    for request in requests:
        assert found[mixed.index(request)].tokens.tolist() == solo(alone, request)
    with pytest.raises(ConfigError, match="token 99, outside"):
        engine.hold([99])
    with pytest.raises(ConfigError, match="49 tokens, more than max_length 48"):
        engine.hold([1] * 49)


def test_an_engine_answers_one_call_at_a_time(engine, alone):
    request = Request([1, 2], 9, ())
    answers = engine.stream([request])
    next(answers)
    for act in (lambda: engine.hold([1]), lambda: next(engine.answer([request]))):
        with pytest.raises(ConfigError, match="still answers requests"):
            act()
    answers.close()
    assert answers_of(engine, [request])[0].tokens.tolist() == solo(alone, request)


def failing(program):
    """A jitted function that fails when it has deleted what was donated."""

    def fail(*given, **named):
        program(*given, **named)
        raise MemoryError

    return fail


def test_answers_that_nobody_takes_leave_the_engine_free(engine, alone):
    """Even while the generator that was left is kept alive, as by a traceback."""
    request = Request([1, 2], 9, ())
    answers = engine.answer([request, request])
    next(answers)
    answers.close()

    def fail(number, text):
        if not text:  # the answer is whole
            raise OSError("broken pipe")

    with pytest.raises(OSError) as kept:
        continue_texts(engine, load_tokenizer("byte"), [request, request], fail)
    assert kept.tb
    assert answers_of(engine, [request])[0].tokens.tolist() == solo(alone, request)


@pytest.mark.parametrize("name", ["step", "read", "restart"])
def test_an_engine_goes_on_after_a_call_that_took_its_arrays(pair, alone, name, monkeypatch):
    """As one that runs out of memory does: the prefix is read again."""
    engine, prefix, request = pair, [3, 1, 4], Request([1, 5], 9, ())
    engine.hold(prefix)
    with monkeypatch.context() as patch:
        patch.setattr(engine.rows.programs, name, failing(getattr(engine.rows.programs, name)))
        with pytest.raises(MemoryError):
            list(engine.answer([request]))
        if name == "read":  # fails while the prefix is read again, which is not forgotten
            with pytest.raises(MemoryError):
                list(engine.answer([request]))
    expected = solo(alone, request, prefix)
    for _ in range(2):
        assert [a.tokens.tolist() for a in engine.answer([request])] == [expected]
    assert engine.prefix.tolist() == prefix


def test_a_prefix_that_could_not_be_read_is_not_held(pair, alone, monkeypatch):
    engine, request = pair, Request([1, 5], 9, ())
    engine.hold([3, 1, 4])
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(engine.rows.programs, "read", failing(engine.rows.programs.read))
        engine.hold([3, 1, 4, 1])
    assert not len(engine.prefix)
    assert [a.tokens.tolist() for a in engine.answer([request])] == [solo(alone, request)]
    assert answers_of(engine, [request], [3, 1, 4])[0].tokens.tolist() == solo(
        alone, request, [3, 1, 4]
    )


def test_a_request_may_be_cancelled(engine, alone):
    requests = [dataclasses.replace(r, max_tokens=9, stop=()) for r in draw_requests(9, 3, 20)]
    cancelled = lambda number, tokens: number % 3 == 0 and len(tokens) == 2
    for number, answer in answers_of(engine, requests, ended=cancelled).items():
        expected = solo(alone, requests[number])
        assert answer.tokens.tolist() == (expected[:2] if number % 3 == 0 else expected)


def test_what_is_not_finite_spoils_no_later_text(alone):
    """One token's embedding is NaN: its text fails, and the next ones in its row do not."""
    params = jax.tree.map(np.copy, random_params(CONFIG))
    params["embed"][39] = np.nan
    model = with_params(abstract_model(CONFIG, FLOAT32), params)
    engine = Engine(model, max_length=LONGEST, batch=2, piece=16, sampling=DRAWN)
    rng = np.random.default_rng(5)
    requests = [
        Request([*rng.integers(1, 39, 20).tolist(), *([39] if i in (0, 3, 4) else []), 5], 4, ())
        for i in range(8)
    ]
    requests.insert(2, Request([5, 39, 5, 6], 0, score=True))
    answers = answers_of(engine, requests, [7, 8, 9])
    assert not np.isfinite(answers.pop(2).scores.losses[1:]).any()
    del requests[2]
    for i, (request, (_, answer)) in enumerate(zip(requests, sorted(answers.items()), strict=True)):
        expected = solo(alone, request, (7, 8, 9))
        if i in (0, 3, 4):
            assert "the model: the logits of prompt" in answer.problem and not len(answer.tokens)
            with pytest.raises(NotFiniteError, match="25 tokens"):
                answer.check()
        elif 39 not in expected:
            assert answer.tokens.tolist() == expected


def test_a_last_token_that_is_not_finite_spoils_no_later_text(alone):
    """It is read before its text ends, which is then whole."""
    params = jax.tree.map(np.copy, random_params(CONFIG))
    params["embed"][10:] = np.nan
    model = with_params(abstract_model(CONFIG, FLOAT32), params)
    engine = Engine(model, max_length=LONGEST, batch=1, piece=16, sampling=DRAWN)
    rng = np.random.default_rng(6)
    requests = [Request(rng.integers(1, 10, 20).tolist(), 1, (), seed=i) for i in range(6)]
    found = {n: answer.tokens.tolist() for n, answer in answers_of(engine, requests).items()}
    assert max(found[n][0] for n in range(5)) >= 10  # whose embedding is NaN
    assert [found[n] for n in range(6)] == [solo(alone, request) for request in requests]


def test_a_policy_that_never_compresses_leaves_the_limit():
    engine = make_engine(1, max_length=16, policy=CachePolicy(trigger=20, keep=12, window=5))
    assert engine.max_length == 16
    (answer,) = engine.answer([Request([1, 2, 3], 99, ())])
    assert len(answer.tokens) == 13


@pytest.mark.thorough
def test_under_a_policy():
    policy = CachePolicy(trigger=20, keep=12, window=5)
    engine, alone = (make_engine(batch, policy=policy) for batch in (3, 1))
    requests, prefix = list(draw_requests(12, 6)), [5, 6, *range(1, 25)]
    before = engine.speed.prompt_tokens
    for number, answer in answers_of(engine, requests, prefix).items():
        assert answer.tokens.tolist() == solo(alone, requests[number], prefix)
    prompts = sum(len(r.prompt) for r in requests if r.max_tokens)
    assert engine.speed.prompt_tokens - before == len(prefix) + prompts
    (refused,) = engine.answer([Request([1, 2], 0, score=True)])
    assert "under a cache policy nothing is scored" in refused.problem


@pytest.mark.thorough
@pytest.mark.parametrize(
    "mesh", [{"data": 2, "tensor": 2, "context": 2}, {"tensor": 2, "context": 4}]
)
def test_over_a_mesh(alone, mesh, monkeypatch):
    mesh, traced = make_mesh(MeshConfig(**{"data": 1} | mesh)), []
    for name in ("_read_chunk", "_next_token"):
        original = getattr(Programs, name)
        noted = lambda *given, name=name, original=original: traced.append(name) or original(*given)
        monkeypatch.setattr(Programs, name, noted)
    model = abstract_model(CONFIG, FLOAT32)
    axes = shardings_of(get_params(model), param_axes(model), mesh)
    requests = list(draw_requests(16, 7, 40))
    with jax.set_mesh(mesh):
        params = jax.device_put(random_params(CONFIG), axes)
        engine = Engine(
            with_params(model, params), max_length=LONGEST, batch=4, piece=16, sampling=DRAWN
        )
        answers = answers_of(engine, requests, [1, 2, 3])
        scored = [Request([7, *range(1, 9 + 8 * i)], 0, score=True) for i in range(3)]
        scores = answers_of(engine, [*scored, requests[0]], [1, 2, 3])
    for number, answer in answers_of(alone, scored, [1, 2, 3]).items():
        np.testing.assert_allclose(scores[number].scores.losses, answer.scores.losses, rtol=1e-5)
    assert scores[3].tokens.tolist() == answers[0].tokens.tolist()
    assert sorted(set(traced)) == ["_next_token", "_read_chunk"] and len(traced) <= 5
    assert sorted(answers) == list(range(16))
    for number, answer in answers.items():
        assert answer.tokens.tolist() == solo(alone, requests[number], (1, 2, 3))
