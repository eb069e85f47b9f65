"""Requests that share what they begin with: groups, calls, and the arrays of a call."""

import itertools

import numpy as np
import pytest

from rwkvx_jax.evals.short import batching
from rwkvx_jax.evals.short.batching import common_sizes, group_rows, pack, plan_calls


def make_requests(rng, count, letters=2):
    """Requests of which many begin alike, some are equal."""
    draw = lambda most: tuple(rng.integers(1, 1 + letters, rng.integers(1, most)).tolist())
    heads = [draw(40) for _ in range(1 + count // 4)]
    contexts = [heads[rng.integers(len(heads))] + draw(9) for _ in range(1 + count // 2)]
    return [(contexts[rng.integers(len(contexts))], draw(6)) for _ in range(count)]


def cost_of(groups):
    """What `group_rows` makes small."""
    texts = sum(len(text) for group in groups for text in group.texts())
    return texts + batching._ROW_COST * sum(len(g.rows) for g in groups if len(g.rows) > 1)


def test_groups_answer_everything_at_the_least_cost():
    rng = np.random.default_rng(0)
    for _ in range(10):
        requests = make_requests(rng, 10)
        groups = group_rows(requests)
        asked = [
            (number, row.inputs[:begin], targets)
            for group in groups
            for row in group.rows
            for number, begin, targets in row.requests
        ]
        assert sorted(asked) == [(i, *request) for i, request in enumerate(requests)]
        rows = sorted({context + targets[:-1] for context, targets in requests})
        assert [row.inputs for group in groups for row in group.rows] == rows
        best = np.inf
        for cuts in itertools.product((False, True), repeat=len(rows) - 1):  # all intervals
            bounds = [0, *np.flatnonzero(cuts) + 1, len(rows)]
            parts = [rows[a:b] for a, b in itertools.pairwise(bounds)]
            whole = 0
            for part in parts:
                shared = len(part[0]) if len(part) == 1 else 0
                while len(part) > 1 and all(
                    row[: shared + 1] == part[0][: shared + 1] and len(row) > shared for row in part
                ):
                    shared += 1
                whole += shared + sum(len(row) - shared for row in part)
                whole += batching._ROW_COST * len(part) * (len(part) > 1)
            best = min(best, whole)
        assert cost_of(groups) == best


def test_one_letter_answers_are_one_row_and_questions_share_their_examples():
    examples = tuple(range(100, 160))
    questions = [(*range(first, first + 20), 99) for first in (200, 300, 400)]
    requests = [(examples + q, (letter,)) for q in questions for letter in (1, 2, 3, 4)]
    (group,) = group_rows(requests)
    assert group.shared == 60 and [len(row.requests) for row in group.rows] == [4, 4, 4]
    assert sum(map(len, group.texts())) == 60 + 3 * 21


def replay(packed, sizes):
    """Texts before each place, as a device that follows the arrays reads them: [step, lane, i]."""
    before = {}
    text, kept = [[] for _ in range(sizes.lanes)], [None] * sizes.lanes
    for step in range(packed.step_count):
        for lane in range(sizes.lanes):
            if packed.back[step, lane]:
                text[lane] = list(kept[lane])
            if packed.fresh[step, lane]:
                text[lane] = []
            for i in range(packed.lengths[step, lane]):
                text[lane].append(int(packed.tokens[step, lane, i]))
                flat = (step * sizes.lanes + lane) * sizes.width + i
                before[flat] = tuple(text[lane])
            if packed.keep[step, lane]:
                kept[lane] = list(text[lane])
    return before


@pytest.mark.parametrize("lanes, prefill_chunk", [(1, 16), (3, 4), (8, 7), (50, 16)])
def test_arrays_say_what_the_requests_ask(lanes, prefill_chunk, monkeypatch):
    monkeypatch.setattr(batching, "_STEPS", 9)
    requests = make_requests(np.random.default_rng(lanes), 60, letters=7)
    calls = plan_calls(group_rows(requests), lanes, prefill_chunk)
    sizes = common_sizes(calls, lanes, prefill_chunk)
    found = {}
    for call in calls:
        packed, answers = pack(call, sizes)
        assert packed.tokens.shape == (sizes.steps, lanes, prefill_chunk)
        assert packed.targets.shape == (sizes.places, batching.ALTERNATIVES)
        before = replay(packed, sizes)
        ends = [*answers.begins[1:], len(answers.indices)]
        for number, begin, end in zip(answers.requests, answers.begins, ends, strict=True):
            where = np.unravel_index(answers.indices[begin:end], packed.targets.shape)
            assert where[0].max() < packed.place_count
            found[number] = [
                (before[int(packed.places[line])], int(packed.targets[line, column]))
                for line, column in zip(*where, strict=True)
            ]
    for number, (context, targets) in enumerate(requests):
        expected = [(context + targets[:i], target) for i, target in enumerate(targets)]
        assert found[number] == expected
