"""Choices among the chunks of the best spans, and of forced chunks: every form against the oracle,
the oracle against choices among all chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkvx_jax.ops.paged_selection import select_pages
from rwkvx_jax.ops.selection import Selector, select_chunks
from rwkvx_jax.ops.selection_reference import select_chunks_reference
from tests.ops.attention_cases import random_qkv

SPANS = Selector("bounds", span=4, spans=3)
SELECTORS = [
    SPANS,
    SPANS._replace(blocks=4, forced="previous"),
    SPANS._replace(together=2, forced="both"),
    SPANS._replace(together=2, joined="max", span=3),
    SPANS._replace(together=2, blocks=2),
    Selector("mean", forced="previous"),
    Selector("max", 4, forced="first"),
    Selector("bounds", together=4, forced="both"),
]
CHUNK, LENGTH = 8, 187


def vectors(heads=8, groups=2):
    q, _, _ = random_qkv(0, 2, LENGTH, heads=heads)
    _, k, _ = random_qkv(1, 2, LENGTH, heads=groups)
    return q, k


@pytest.mark.parametrize("selector", SELECTORS, ids=str)
def test_choices_equal_their_oracle(selector):
    q, k = vectors()
    options = {"chunk_size": CHUNK, "top_k": 5, "selector": selector}
    expected = select_chunks_reference(q, k, **options)
    actual = jax.jit(lambda q, k: select_chunks(q, k, **options))(q, k)
    np.testing.assert_array_equal(actual, expected)
    if selector.span:
        everything = select_chunks_reference(
            q, k, **options | {"selector": selector._replace(span=0)}
        )
        differ = (np.sort(everything) != np.sort(expected)).any(-1)
        assert differ[:, CHUNK * 12 :].any()
        first_whole = (
            CHUNK * selector.span * selector.spans
        )  # up to there every span is looked into
        assert not differ[:, :first_whole].any()
    for chunk in {"previous": (-1,), "first": (0,), "both": (-1, 0)}.get(selector.forced, ()):
        own = np.arange(LENGTH) // CHUNK
        forced = np.where(own > 0, own - 1 if chunk else 0, -2)[None, :, None, None]
        assert ((expected == forced).any(-1) | (forced[..., 0] == -2)).all()


@pytest.mark.parametrize("selector", [s for s in SELECTORS if s.span], ids=str)
@pytest.mark.parametrize("at", [0, 7, 63, 95, 96, 130, 186])
def test_one_token_reads_few_rows_and_chooses_alike(selector, at):
    q, k = vectors()
    pages = -(-(LENGTH // CHUNK + 1) // selector.span) * selector.span
    rows = selector.rows_of(k, CHUNK).swapaxes(1, 2)
    missing = ((0, 0), (0, 0), (0, pages * selector.rows - rows.shape[2]), (0, 0))
    rows = jnp.pad(rows, missing, constant_values=-jnp.inf)
    positions = jnp.array([[at], [max(at - 5, 0)]])
    one = jnp.stack([q[row, position] for row, position in enumerate(positions)])
    stored = jnp.stack([jnp.full_like(rows, jnp.nan), rows])
    run = lambda name, spans: select_pages(
        one,
        stored,
        1,
        positions,
        chunk_size=CHUNK,
        count=4,
        selector=selector,
        span_rows=spans,
        implementation=name,
    )
    spans = selector.span_rows(rows)
    found = run("spans", jnp.stack([jnp.full_like(spans, jnp.nan), spans]))
    np.testing.assert_array_equal(found, run("slice", None))
    options = {"chunk_size": CHUNK, "top_k": 5, "selector": selector}
    expected = select_chunks_reference(q, k, **options)
    for row, position in enumerate(positions):
        np.testing.assert_array_equal(found[row, 0], expected[row, position[0]])


def test_where_bounds_tell_spans_apart_the_choice_is_that_among_all():
    """If the worst chunk chosen scores above every span left out, nothing better was left out."""
    q, k = vectors()
    q = jnp.abs(q)
    strong = jnp.where((jnp.arange(LENGTH) // (CHUNK * 4) == 1)[None, :, None, None], 6.0, 0.0)
    options = {"chunk_size": CHUNK, "top_k": 4}
    spans = select_chunks_reference(q, k + strong, **options, selector=SPANS)
    everything = select_chunks_reference(q, k + strong, **options, selector=Selector("bounds"))
    np.testing.assert_array_equal(spans[:, CHUNK * 12 :], everything[:, CHUNK * 12 :])


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        (Selector("mean", span=4), 'its kind "bounds"; or make span 0'),
        (Selector("bounds", span=4, spans=1), "both must be at least 2"),
        (Selector(forced="last"), "choose none, previous, first or both"),
    ],
)
def test_selectors_that_make_no_sense_are_refused(selector, message):
    q, k = vectors()
    with pytest.raises(ValueError, match=message):
        select_chunks(q, k, chunk_size=CHUNK, top_k=3, selector=selector)
