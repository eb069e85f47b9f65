"""Decoding: any way of reading a text gives what the whole-sequence forward pass gives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvx_jax.cache import CachePolicy
from rwkvx_jax.checkpoint import load_checkpoint
from rwkvx_jax.config import ConfigError
from rwkvx_jax.model import abstract_model, get_params, unstack, with_params
from rwkvx_jax.snapshots import rewind, snapshot
from tests.helpers import assert_close, assert_within, shared_path
from tests.model_cases import (
    FLOAT32,
    TINY,
    numpy_logits,
    random_params,
)

SELECTED = dataclasses.replace(TINY, num_blocks=1, num_attention_blocks=1)
TIME, PIECE = 61, 20  # 7 chunks and a ragged one; longest piece of a prefill


class Reader:
    """The jitted functions of one model: compiled once for all tests that use them."""

    def __init__(self, config, params, piece=PIECE):
        self.model = abstract_model(config, FLOAT32)
        self.params, self.piece = params, piece
        bind = lambda p: with_params(self.model, p)
        self._decode = jax.jit(lambda p, token, cache: bind(p).decode(token, cache))
        self._prefill = jax.jit(lambda p, tokens, cache, n: bind(p).prefill(tokens, cache, n))
        self._forward = jax.jit(lambda p, tokens: bind(p)(tokens))

    def forward(self, tokens):
        return np.asarray(self._forward(self.params, tokens))

    def steps(self, tokens, cache):
        """Logits [B, T, W] token by token, the rows after each, and the final cache."""
        logits, rows = [], []
        for t in range(tokens.shape[1]):
            out, cache = self._decode(self.params, jnp.asarray(tokens[:, t]), cache)
            logits.append(np.asarray(out))
            rows.append(np.asarray(cache.length))
        return np.stack(logits, 1), np.stack(rows, 1), cache

    def prefill(self, pieces, cache):
        """Reads one piece of text per row (at most `piece` tokens each)."""
        padded = [np.pad(p, (0, self.piece - len(p)), constant_values=7) for p in pieces]
        lengths = jnp.asarray([len(p) for p in pieces], jnp.int32)
        out, cache = self._prefill(
            self.params, jnp.asarray(np.stack(padded), jnp.int32), cache, lengths
        )
        return np.asarray(out), cache


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(2).integers(0, TINY.vocab_size, (2, TIME)).astype(np.int32)


@pytest.fixture(scope="module")
def reader():
    return Reader(TINY, random_params(TINY))


@pytest.fixture(scope="module")
def parallel(reader, tokens):
    """Logits of the whole-sequence pass, and which positions have no near-tie of the gate."""
    safe = [numpy_logits(reader.params, TINY, row)[1] >= 1e-5 for row in tokens]
    skipped = int((~np.stack(safe)).sum())
    print(f"{skipped} positions skipped for near-ties of the gate")
    assert skipped == 0  # a chunk that flips would change all that follows
    return reader.forward(tokens)


def test_step_by_step_is_the_parallel_pass(reader, tokens, parallel):
    logits, rows, _ = reader.steps(tokens, reader.model.init_cache(2, TIME))
    assert_close(logits, parallel, rel=2e-5)
    assert (rows == 1 + np.arange(TIME)).all()


@pytest.mark.thorough
def test_every_way_of_reading_starts_from_the_learned_states(tokens):
    """The equations, the parallel pass, single steps and ragged prefill; a rewound text, too."""
    config = dataclasses.replace(SELECTED, learned_state=True)
    reader = Reader(config, random_params(config))
    parallel = reader.forward(tokens)
    for row, own in zip(tokens, parallel, strict=True):
        assert_close(own, numpy_logits(reader.params, config, row)[0], rel=2e-5)
    plain = jax.tree.map(lambda p: p, reader.params)
    del plain["blocks"]["time_mix"]["initial_state"]
    assert np.abs(Reader(SELECTED, plain).forward(tokens) - parallel)[:, 0].max() > 1e-2
    logits, _, _ = reader.steps(tokens[:, :5], reader.model.init_cache(2, TIME))
    assert_close(logits, parallel[:, :5], rel=2e-5)
    cache, done = reader.model.init_cache(2, TIME), [0, 0]
    empty = jax.tree.map(jnp.copy, snapshot(cache))
    for counts in ([0, 3], [20, 20], [1, 0]):
        pieces = [row[at : at + n] for row, at, n in zip(tokens, done, counts, strict=True)]
        out, cache = reader.prefill(pieces, cache)
        done = [at + n for at, n in zip(done, counts, strict=True)]
        for row in range(2):
            if counts[row]:
                assert_close(out[row], parallel[row, done[row] - 1], rel=2e-5)
    out, _ = reader.prefill(list(tokens[:, :20]), rewind(cache, empty))
    assert_close(out, parallel[:, 19], rel=2e-5)
    layered = unstack(with_params(reader.model, reader.params))  # as generation holds it on a CPU
    out, _ = jax.jit(type(layered).decode)(layered, tokens[:, 0], layered.init_cache(2, TIME))
    assert_close(out, parallel[:, 0], rel=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"num_attention_blocks": 0}, {"attention": "full"}], ids=str)
def test_step_by_step_of_the_baselines(changes, tokens):
    config = dataclasses.replace(TINY, **changes)
    reader = Reader(config, random_params(config))
    logits, _, _ = reader.steps(tokens, reader.model.init_cache(2, TIME))
    assert_close(logits, reader.forward(tokens), rel=2e-5)
    cache = reader.model.init_cache(2, TIME)
    for start in range(0, 60, PIECE):
        out, cache = reader.prefill(list(tokens[:, start : start + PIECE]), cache)
        assert_close(out, logits[:, start + PIECE - 1], rel=2e-5)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "changes",
    [
        {"selector": "bounds", "key_conv": 3},
        {"selector": "max", "selector_blocks": 4},
        pytest.param({"selector": "pooled", "selector_blocks": 2}, marks=pytest.mark.slow),
        pytest.param(
            {"selector": "max", "selector_blocks": 8, "key_conv": 1}, marks=pytest.mark.slow
        ),
        pytest.param({"key_conv": 4}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_other_selectors_and_key_convolution(changes, tokens):
    """The equations, the parallel pass, decoding, ragged prefill, and a compressed cache agree."""
    config = dataclasses.replace(SELECTED, **changes)
    reader = Reader(config, random_params(config))
    parallel = reader.forward(tokens)
    for row, own in zip(tokens, parallel, strict=True):
        expected, margins = numpy_logits(reader.params, config, row)
        assert margins.min() >= 1e-5
        assert_close(own, expected, rel=2e-5)
    plain = dataclasses.replace(config, selector="mean", key_conv=0)
    params = jax.tree.map(lambda p: p, reader.params)
    params["attention_blocks"]["attention"].pop("key_conv", None)
    assert np.abs(Reader(plain, params).forward(tokens) - parallel).max() > 1e-2  # it matters
    logits, _, _ = reader.steps(tokens, reader.model.init_cache(2, TIME))
    assert_close(logits, parallel, rel=2e-5)
    cache, done = reader.model.init_cache(2, TIME), [0, 0]
    for counts in ([20, 1], [0, 2], [20, 20], [20, 18], [1, 20]):
        pieces = [row[at : at + n] for row, at, n in zip(tokens, done, counts, strict=True)]
        out, cache = reader.prefill(pieces, cache)
        done = [at + n for at, n in zip(done, counts, strict=True)]
        for row in range(2):
            if counts[row]:
                assert_close(out[row], parallel[row, done[row] - 1], rel=2e-5)
    policy = CachePolicy(trigger=24, keep=12, window=5)
    make = lambda: reader.model.init_cache(2, TIME, policy=policy)
    logits, rows, _ = reader.steps(tokens, make())
    assert (np.diff(rows) < 0).any()
    cache = make()
    for start in range(0, 60, PIECE):
        out, cache = reader.prefill(list(tokens[:, start : start + PIECE]), cache)
        assert_close(out, logits[:, start + PIECE - 1], rel=2e-5)


def test_the_shared_gate_has_the_mean_selector_only():
    model = abstract_model(dataclasses.replace(TINY, selector="bounds"), FLOAT32)
    with pytest.raises(ConfigError, match="gate \"shared\" .* not 'bounds'"):
        model.init_cache(1, 8, gate="shared")


@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_split_of_ragged_rows_is_the_parallel_pass(reader, tokens, parallel, data):
    """Rows advance by different lengths, none of them included, through prefill and decode."""
    cache, done = reader.model.init_cache(2, TIME), [0, 0]
    while min(done) < TIME:
        step = data.draw(st.booleans()) and max(done) < TIME
        counts = [1 if step else data.draw(st.integers(0, min(PIECE, TIME - at))) for at in done]
        if not any(counts):
            counts = [min(PIECE, TIME - at) for at in done]
        pieces = [row[at : at + n] for row, at, n in zip(tokens, done, counts, strict=True)]
        if step:
            out, cache = reader._decode(reader.params, jnp.asarray(np.concatenate(pieces)), cache)
        else:
            out, cache = reader.prefill(pieces, cache)
        done = [at + n for at, n in zip(done, counts, strict=True)]
        assert list(np.asarray(cache.length)) == done
        for row in range(2):
            if counts[row]:
                assert_close(out[row], parallel[row, done[row] - 1], rel=2e-5)


def test_too_little_room_is_an_error(reader, tokens):
    model = with_params(reader.model, reader.params)
    cache = dataclasses.replace(model.init_cache(1, 16), length=jnp.asarray([10]))
    too_much = "17 tokens do not fit into the cache of 16 rows.*max_length.*CachePolicy"
    with pytest.raises(ConfigError, match=too_much):
        model.prefill(jnp.zeros((1, 7), jnp.int32), cache)
    with pytest.raises(ConfigError, match=too_much):  # padding does not count, the lengths do
        model.prefill(jnp.zeros((1, 9), jnp.int32), cache, jnp.asarray([7]))
    with pytest.raises(ConfigError, match="max_length >= 1"):
        model.init_cache(1, 0)
    with pytest.raises(ConfigError, match="'soft'"):
        model.init_cache(1, 8, gate="soft")


@pytest.mark.parametrize("trigger, keep, window", [(10, 11, 2), (10, 4, 4), (10, 4, 0)])
def test_impossible_policies_are_refused(trigger, keep, window):
    with pytest.raises(ConfigError, match=f"window {window}, keep {keep}, trigger {trigger}"):
        CachePolicy(trigger, keep, window)


@pytest.mark.thorough
def test_prefill_under_a_policy_is_token_by_token(reader, tokens):
    policy = CachePolicy(trigger=24, keep=12, window=5)
    make = lambda: reader.model.init_cache(2, TIME, policy=policy)
    logits, rows, stepped = reader.steps(tokens, make())
    assert rows.max() == 25 and (np.diff(rows) < 0).any()  # compressed at least once
    cache, done = make(), [0, 0]
    for counts in ([20, 3], [20, 20], [20, 20], [1, 18]):
        pieces = [row[at : at + n] for row, at, n in zip(tokens, done, counts, strict=True)]
        out, cache = reader.prefill(pieces, cache)
        done = [at + n for at, n in zip(done, counts, strict=True)]
        for row in range(2):
            assert_close(out[row], logits[row, done[row] - 1], rel=2e-5)
    for name, expected in stepped.pages._asdict().items():
        if expected is not None:
            assert_close(getattr(cache.pages, name), expected, rel=2e-5, name=name)


@pytest.fixture(scope="module")
def reference():
    return np.load(shared_path("reference", "parity", "tiny_rwkvx_ref.npz"))


def official(reference, attention):
    model = load_checkpoint(
        shared_path("reference", "parity", "tiny_rwkvx.pth"),
        chunk_size=int(reference["chunk"]),
        top_k=int(reference["topk"]),
        run=FLOAT32,
        overrides={"attention": attention},
    ).model
    return Reader(model.config, get_params(model))


@pytest.fixture(scope="module")
def sparse(reference):
    return official(reference, "sparse")


@pytest.mark.thorough
def test_official_decoding(reference, sparse):
    tokens = reference["tokens"][None].astype(np.int32)
    logits, _, _ = sparse.steps(tokens, sparse.model.init_cache(1, 120, gate="shared"))
    assert_within(logits[0], reference["A_step120"], 2e-5)
    assert_within(logits[0], reference["B_step120"], 2e-5)
    # The gate as trained reads other chunks, so this comparison can fail.
    logits, _, _ = sparse.steps(tokens[:, :80], sparse.model.init_cache(1, 120))
    assert np.abs(logits[0] - reference["A_step120"][:80]).max() > 1e-2


@pytest.mark.thorough
def test_official_state_after_a_prefill(reference, sparse):
    """Below chunk x top_k tokens every gate reads all: the original's states are ours."""
    tokens = reference["tokens"][:40].astype(np.int32)
    cache = sparse.model.init_cache(1, 120)
    for piece in (tokens[:20], tokens[20:]):
        out, cache = sparse.prefill([piece], cache)
    assert_within(out[0], reference["A_seq40"][-1], 2e-5)
    assert_within(out[0], reference["B_seq40"][-1], 2e-5)
    assert_within(cache.blocks.time_mix.wkv[0, 0], reference["A_state40_wkv0"], 2e-5)
    keys = rows_of(cache.pages.keys[0]).reshape(-1, sparse.model.config.width)[:40]
    assert_within(keys, reference["A_state40_kcache0"], 2e-5)


def policy_of(reference, name):
    return CachePolicy(
        trigger=int(reference[f"{name}_max_kv_cache_size"]),
        keep=int(reference[f"{name}_min_kv_cache_size"]),
        window=int(reference[f"{name}_kv_cache_window_size"]),
    )


def rows_of(pages):
    """Pages [B, H, N, C, K] of one block as the original's rows [N C, H K]."""
    return np.asarray(pages)[0].reshape(pages.shape[1], -1, pages.shape[-1]).swapaxes(0, 1)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["kvm", pytest.param("kvm2", marks=pytest.mark.slow)])
def test_official_cache_compression(reference, sparse, name):
    tokens = reference["tokens"][None].astype(np.int32)
    cache = sparse.model.init_cache(1, 120, gate="shared", policy=policy_of(reference, name))
    logits, rows, cache = sparse.steps(tokens, cache)
    assert (rows[0] == reference[f"B_step120_{name}_len"]).all()
    assert_within(logits[0], reference[f"B_step120_{name}"], 2e-5)
    count = int(cache.length[0])
    finals = {f"B_{name}_final_k0": cache.pages.keys, f"B_{name}_final_v0": cache.pages.values}
    for key, pages in finals.items():
        if key in reference:  # the second policy has keys only
            found = rows_of(pages[0]).reshape(-1, sparse.model.config.width)[:count]
            assert_within(found, reference[key], 2e-5)


def test_official_recurrent_state(reference):
    model = load_checkpoint(shared_path("reference", "parity", "tiny_rwkv7.pth"), run=FLOAT32).model
    reader = Reader(model.config, get_params(model), piece=60)
    tokens = reference["tokens"][None, :60].astype(np.int32)
    out, cache = reader.prefill(list(tokens), model.init_cache(1, 60))
    assert_within(out[0], reference["D_rwkv7_step60"][-1], 2e-5)
    assert_within(cache.blocks.time_mix.wkv[0, 0], reference["D_rwkv7_state_wkv0"], 2e-5)
