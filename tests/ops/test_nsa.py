"""Native Sparse Attention: the oracle against stored results of the published code, the op against
both, documents, offsets and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkvx_jax.ops import blocked_attention, compressed
from rwkvx_jax.ops.block_sparse import sparse_attention
from rwkvx_jax.ops.compressed import chunk_means, compressed_attention
from rwkvx_jax.ops.nsa import native_sparse_attention
from rwkvx_jax.ops.nsa_reference import nsa_reference
from tests.helpers import assert_close, shared_path
from tests.ops.attention_cases import random_qkv


@functools.cache
def stored(name):
    with np.load(shared_path("reference", "neighbours", f"op_nsa_{name}.npz")) as file:
        return dict(file)


def sets_of(selection):
    """Chosen chunks as sorted rows."""
    return np.sort(np.asarray(selection), axis=-1)


@functools.partial(jax.jit, static_argnames="options")
def with_gradients(q, k, v, gates, cotangent, options):
    run = functools.partial(native_sparse_attention, **dict(options))
    out, pullback = jax.vjp(run, q, k, v, gates)
    return out, *pullback(cotangent)


NAMES = "out", "dq", "dk", "dv", "dgates"


def compare(found, expected):
    for name, a, e in zip(NAMES, found, expected, strict=True):
        assert_close(a, e, rel=1e-5 if name == "out" else 1e-4, name=name)


@pytest.mark.parametrize("implementation", ["reference", None])
def test_all_branches_are_those_of_the_published_code(implementation):
    data = stored("full")
    gates = np.stack([data[f"g_{name}"] for name in ("cmp", "slc", "swa")], axis=-1)
    options = {
        "chunk_size": int(data["block_size"]),
        "top_k": int(data["block_count"]),
        "window": int(data["window_size"]),
        "scale": float(data["scale"]),
        "implementation": implementation,
    }
    arrays = (*(data[name] for name in "qkv"), gates, data["ct_o"])
    found = with_gradients(*arrays, tuple(options.items()))
    dgates = np.stack([data[f"dg_{name}"] for name in ("cmp", "slc", "swa")], axis=-1)
    compare(found, (data["o"], *(data[f"d{name}"] for name in "qkv"), dgates))


def test_each_branch_is_that_of_the_published_code():
    data = stored("branches")
    q, k, v = (data[name] for name in "qkv")
    chunk, top_k, scale = int(data["block_size"]), int(data["block_count"]), float(data["scale"])
    chunks = {"chunk_size": chunk, "scale": scale}
    positions = jnp.arange(q.shape[1])[None]
    oracle = jax.jit(functools.partial(nsa_reference, top_k=top_k, window=1, **chunks))(q, k, v)

    @jax.jit
    def compressed_branch(q, k, v):
        means = chunk_means(k, v, chunk)
        return compressed_attention(q, means, positions, count=top_k - 1, **chunks)

    out, chosen = compressed_branch(q, k, v)
    # Theirs name the own chunk, too; it is never among ours.
    own = np.broadcast_to(np.asarray(positions // chunk)[..., None, None], (*chosen.shape[:3], 1))
    for found, choice in ((oracle.compressed, oracle.selection), (out, chosen)):
        assert_close(found, data["o_cmp"], rel=1e-5)
        assert (sets_of(np.concatenate([own, choice], -1)) == data["block_indices"]).all()

    @jax.jit
    def selected(q, k, v):
        run = functools.partial(sparse_attention, top_k=top_k, selection=chosen, **chunks)
        out, pullback = jax.vjp(run, q, k, v)
        return out, *pullback(jnp.asarray(data["ct_both"]))

    out, *gradients = selected(q, k, v)
    assert_close(out, data["o_slc"], rel=1e-5)
    for name, gradient in zip("qkv", gradients, strict=True):
        assert_close(gradient, data[f"d{name}_slc"], rel=1e-4, name=name)


CASES = {  # queries, keys, offset, query and key heads, chunk, top-k, window, documents
    "whole": (77, 77, 0, 4, 2, 8, 4, 13, False),
    "one key head": (61, 61, 0, 4, 1, 6, 3, 100, False),
    "rows": (19, 77, (50, 3), 4, 2, 7, 4, 9, False),
    "documents": (77, 77, 0, 4, 4, 8, 3, 13, True),
    "rows of documents": (19, 77, (50, 3), 4, 2, 5, 4, 1, True),
    "shorter than a chunk": (5, 5, 0, 2, 2, 8, 3, 2, False),
}
IDS = np.repeat([[1, 2, 3, 0], [0, 1, 2, 2]], [19, 40, 11, 7], axis=1)


THOROUGH = "whole", "one key head", "documents"


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.thorough] * (n in THOROUGH)) for n in CASES]
)
def test_the_op_matches_its_oracle(monkeypatch, name):
    monkeypatch.setattr(blocked_attention, "MAX_BLOCK", 16)
    monkeypatch.setattr(compressed, "SCORES_PER_BLOCK", 1)
    monkeypatch.setattr(compressed, "MIN_QUERIES_PER_BLOCK", 16)
    length, keys, offset, heads, groups, chunk, top_k, window, documents = CASES[name]
    q = random_qkv(1, 2, length, heads=heads)[0]
    _, k, v = random_qkv(2, 2, keys, heads=groups, values=12)
    gates, cotangent = random_qkv(3, 2, length, heads=heads, size=3, values=12)[::2]
    offset = jnp.array(offset) if isinstance(offset, tuple) else offset
    ids = jnp.asarray(IDS) if documents else None
    options = {"chunk_size": chunk, "top_k": top_k, "window": window}

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation):
        attend = functools.partial(
            native_sparse_attention,
            q_offset=offset,
            segment_ids=ids,
            implementation=implementation,
            **options,
        )
        out, pullback = jax.vjp(attend, q, k, v, gates)
        return out, *pullback(cotangent)

    compare(run(None), run("reference"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"top_k": 2}, "top_k is 2: NSA always reads"),
        ({"window": None}, "window is None"),
        ({"window": 0}, "window is 0"),
        ({"gates": np.zeros((2, 20, 2, 2), np.float32)}, r"gates are float32\[2, 20, 2, 2\]"),
        ({"gates": np.zeros((2, 20, 2, 3), int)}, "expected floating"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    options = {"gates": np.ones((2, 20, 2, 3), np.float32), "top_k": 3, "window": 4} | changes
    with pytest.raises(ValueError, match=message):
        native_sparse_attention(*random_qkv(0, 2, 20), chunk_size=4, **options)
