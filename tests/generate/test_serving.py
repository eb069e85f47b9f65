"""Continuous batching: each answer is what its request gets alone, and none is lost."""

import dataclasses

import jax
import numpy as np
import pytest

from rwkvx_jax.cache import CachePolicy
from rwkvx_jax.config import ConfigError, MeshConfig, ModelConfig
from rwkvx_jax.generate.engine import Engine
from rwkvx_jax.generate.sampling import Sampling
from rwkvx_jax.generate.serving import Request, serve
from rwkvx_jax.model import abstract_model, get_params, param_axes, with_params
from rwkvx_jax.sharding import make_mesh
from rwkvx_jax.training.step import shardings_of
from tests.model_cases import FLOAT32, random_params

CONFIG = ModelConfig(
    vocab_size=40,
    num_blocks=1,
    num_attention_blocks=1,
    width=32,
    head_size=16,
    chunk_size=8,
    top_k=2,
    low_rank_override=(5, 6, 7, 9),
)
DRAWN = Sampling(0.9, 0.9, 0, 0.4, 0.3, 0.9)
LONGEST = 48


def make_engine(batch, **options):
    model = with_params(abstract_model(CONFIG, FLOAT32), random_params(CONFIG))
    return Engine(
        model, **{"max_length": LONGEST, "batch": batch, "piece": 16, "sampling": DRAWN} | options
    )


@pytest.fixture(scope="module")
def engine():
    return make_engine(4)


@pytest.fixture(scope="module")
def alone():
    return make_engine(1)


def draw_requests(count, seed=0, longest=LONGEST):
    """Prompts from one token to a full cache, stops that some reach, limits from none on."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        prompt = rng.integers(1, 40, rng.integers(1, longest + 1))
        stop = tuple(int(t) for t in rng.integers(0, 40, rng.integers(0, 3)))
        yield Request(prompt.tolist(), int(rng.integers(0, 20)), stop, seed=number)


def solo(engine, request, prefix=()):
    session = engine.start([[*prefix, *request.prompt]], [request.seed])
    return [int(row[0]) for row in engine.stream(session, request.max_tokens, request.stop)]


def test_each_answer_is_what_its_request_gets_alone(engine, alone):
    requests = list(draw_requests(40))
    answers = list(serve(engine, iter(requests)))
    assert sorted(answer.number for answer in answers) == list(range(40))
    assert [a.number for a in answers] != sorted(a.number for a in answers)  # as they come
    for number, tokens, problem in answers:
        assert (tokens.tolist(), problem) == (solo(alone, requests[number]), ""), number
    assert len({len(answer.tokens) for answer in answers}) > 5
    assert engine._read._cache_size() == engine._step._cache_size() == 1


def test_a_common_prefix_is_read_once(engine, alone, monkeypatch):
    prefix, requests = [3, 1, 4, 1, 5, 9, 2, 6, 5], list(draw_requests(12, 1, 20))
    read, feed = [], engine.feed
    monkeypatch.setattr(
        engine, "feed", lambda session, texts: (read.extend(texts), feed(session, texts))
    )
    for number, tokens, _ in serve(engine, requests, prefix=prefix):
        assert tokens.tolist() == solo(alone, requests[number], prefix)
    prompts = sum(len(r.prompt) for r in requests if r.max_tokens)
    assert sum(map(len, read)) == 4 * len(prefix) + prompts


def test_requests_that_can_not_be_answered_say_why(engine, alone):
    requests = list(draw_requests(5, 2, 20))
    bad = [
        (Request([], 3), "is empty"),
        (Request([1, 40], 3), "token 40, outside the vocabulary of 40"),
        (Request([1] * 49, 3), "49 tokens, more than max_length 48"),
        (Request([1], 3, seed=-1), "seed is -1"),
        (Request([1], -1), "max_tokens is -1"),
    ]
    mixed = [bad[0][0], requests[0], bad[1][0], bad[2][0], *requests[1:], bad[3][0], bad[4][0]]
    found = {answer.number: answer for answer in serve(engine, mixed)}
    for request, problem in bad:
        assert problem in found[mixed.index(request)].problem
    for request in requests:
        assert found[mixed.index(request)].tokens.tolist() == solo(alone, request)
    with pytest.raises(ConfigError, match="token 99, outside"):
        next(serve(engine, requests, prefix=[99]))


def test_a_request_may_be_cancelled(engine, alone):
    requests = [dataclasses.replace(r, max_tokens=9, stop=()) for r in draw_requests(9, 3, 20)]
    cancelled = lambda number, tokens: number % 3 == 0 and len(tokens) == 2
    for number, tokens, _ in serve(engine, requests, ended=cancelled):
        expected = solo(alone, requests[number])
        assert tokens.tolist() == (expected[:2] if number % 3 == 0 else expected)


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
    answers = {answer.number: answer for answer in serve(engine, requests, prefix=[7, 8, 9])}
    for i, request in enumerate(requests):
        expected = solo(alone, request, (7, 8, 9))
        if i in (0, 3, 4):
            assert "not finite" in answers[i].problem and not len(answers[i].tokens)
        elif 39 not in expected:
            assert answers[i].tokens.tolist() == expected


@pytest.mark.thorough
def test_under_a_policy():
    policy = CachePolicy(trigger=20, keep=12, window=5)
    engine, alone = (make_engine(batch, policy=policy) for batch in (3, 1))
    requests = list(draw_requests(12, 6))
    for number, tokens, _ in serve(engine, requests, prefix=[5, 6]):
        assert tokens.tolist() == solo(alone, requests[number], (5, 6))


class Traced(Engine):
    """Notes what is traced, and so compiled."""

    def __init__(self, *arguments, **options):
        self.traced = []
        super().__init__(*arguments, **options)

    def _read_piece(self, *arguments):
        self.traced.append("read")
        return super()._read_piece(*arguments)

    def _next_token(self, *arguments):
        self.traced.append("step")
        return super()._next_token(*arguments)


@pytest.mark.thorough
def test_over_a_mesh(alone):
    mesh = make_mesh(MeshConfig(data=2, tensor=2, context=2))
    model = abstract_model(CONFIG, FLOAT32)
    axes = shardings_of(get_params(model), param_axes(model), mesh)
    requests = list(draw_requests(16, 7))
    with jax.set_mesh(mesh):
        params = jax.device_put(random_params(CONFIG), axes)
        engine = Traced(
            with_params(model, params), max_length=LONGEST, batch=4, piece=16, sampling=DRAWN
        )
        answers = list(serve(engine, requests, prefix=[1, 2, 3]))
    assert engine.traced == ["read", "step"]
    assert sorted(answer.number for answer in answers) == list(range(16))
    for number, tokens, problem in answers:
        if not problem:
            assert tokens.tolist() == solo(alone, requests[number], (1, 2, 3))


@pytest.mark.slow
def test_ten_thousand_requests(engine, alone):
    """None lost, none mixed up."""
    expected = {}
    for i, request in enumerate(draw_requests(300, 8)):
        expected[i] = request, solo(alone, request)
    many = (expected[i % 300][0] for i in range(10_000))
    cancelled = lambda number, tokens: number % 7 == 0 and len(tokens) == 3
    seen = np.zeros(10_000, int)
    for number, tokens, problem in serve(engine, many, ended=cancelled):
        seen[number] += 1
        wanted = expected[number % 300][1]
        assert tokens.tolist() == (wanted[:3] if number % 7 == 0 else wanted) and not problem
    assert (seen == 1).all()
