"""Facts in many wordings: what is kept apart, lengths, answers that are there; copied passages."""

import re
from itertools import chain

import numpy as np
import pytest

from rwkvx_jax.config import ConfigError
from rwkvx_jax.tasks.copying import copy_sample
from rwkvx_jax.tasks.lookup import SHORTEST, lookup_prompt, lookup_sample
from rwkvx_jax.tasks.niah import NEEDLE_TASKS, needle_question
from rwkvx_jax.tasks.passkey import OFFICIAL_WORDING
from rwkvx_jax.tasks.phrases import PHRASES, words
from rwkvx_jax.tokenizer import load_tokenizer

BYTE = load_tokenizer("byte")


def rng(seed=0):
    return np.random.default_rng(seed)


def sample(seed, length=1500, **flags):
    return lookup_sample(BYTE, length, rng(seed), **{"pairs": 8, "questions": 3} | flags)


def pieces(text):
    """What stands between the fields of a phrase, if it is long enough to be told."""
    return [part.strip() for part in re.split(r"\{\w+\}", text) if len(part.strip()) > 4]


def phrases_of(part):
    own = PHRASES[part]
    flat = chain(own.openings, own.statements, own.closings, chain(*own.questions), own.tasks)
    return {piece.lower() for phrase in flat for piece in pieces(phrase)}


def test_nothing_is_in_both_parts():
    training, evaluation = PHRASES["training"], PHRASES["evaluation"]
    for name, ours, theirs in zip(training._fields, training, evaluation, strict=True):
        assert not (set(ours) & set(theirs)) - {""}, name
    for ours, theirs in zip(words("training"), words("evaluation"), strict=True):
        assert ours and theirs and not set(ours) & set(theirs)


def test_training_documents_have_no_phrase_of_any_evaluation():
    texts = [BYTE.decode(sample(seed).tokens).lower() for seed in range(300)]
    kept = phrases_of("evaluation") | {f" {what} " for what in PHRASES["evaluation"].attributes}
    kept |= {"pass key", "special magic", "mentioned in the provided text"}
    for phrase in kept:
        assert not any(phrase in text for text in texts), phrase
    evaluated = [BYTE.decode(sample(seed, held_out=True).tokens).lower() for seed in range(300)]
    for phrase in phrases_of("evaluation"):
        assert any(phrase in text for text in evaluated), phrase
    assert "pass key" in OFFICIAL_WORDING.line
    needle = needle_question(NEEDLE_TASKS["single_1"], BYTE, 900, 0.5, rng()).prompt
    assert "special magic" in BYTE.decode(needle)


@pytest.mark.parametrize("length", [700, 701, 1500])
@pytest.mark.parametrize("part", ["training", "evaluation"])
def test_prompts_have_their_length_and_hold_the_answer_at_its_depth(length, part):
    for seed, depth in enumerate([0.0, 0.4, 1.0]):
        prompt, answer = lookup_prompt(BYTE, length, depth, rng(seed), facts=2, part=part)
        assert prompt.shape == (length,) and prompt.dtype == np.int32
        text = BYTE.decode(prompt)
        assert answer in text[: text.rindex("\n")] and not text.endswith(" ")
        filler = [m.start() for m in re.finditer("The grass", text)]
        place = text.index(answer)
        assert depth != 0.0 or place < filler[0] + 400
        assert depth != 1.0 or place > filler[-1] - 200


def test_every_answer_of_a_training_document_is_stated_before():
    lengths = set()
    for seed in range(60):
        tokens, answers = sample(seed)
        assert tokens.shape == answers.shape == (1501,) and tokens[-1] == BYTE.end_of_document
        edges = np.flatnonzero(np.diff(np.r_[0, answers.astype(int), 0]))
        assert len(edges) >= 2
        for begin, end in edges.reshape(-1, 2):
            answer = BYTE.decode(tokens[begin:end])
            assert answer[0] == " " and answer[1:] in BYTE.decode(tokens[: begin - 1])
            lengths.add(len(answer))
    assert len(lengths) > 10, "values of many kinds"


def test_too_short():
    with pytest.raises(ConfigError, match="too short for 40 facts"):
        lookup_prompt(BYTE, 700, 0.5, rng(), facts=40)


@pytest.mark.parametrize("held_out", [False, True])
def test_documents_have_fewer_facts_where_not_all_fit(held_out):
    """No draw of a long run may fail: windows hold what fits, or are refused at once."""
    for seed in range(400):
        tokens, answers = sample(seed, SHORTEST, pairs=40, held_out=held_out)
        assert len(tokens) == SHORTEST + 1 and answers.any()
    with pytest.raises(ConfigError, match=f"documents need {SHORTEST}"):
        sample(0, SHORTEST - 1, held_out=held_out)


def test_copied_passages_have_been_there():
    source = rng(5).integers(1, 257, 5000).astype(np.int32)
    text = lambda count, rng: source[:count]
    shares = []
    for seed in range(20):
        tokens, answers = copy_sample(2000, rng(seed), text=text)
        assert tokens.shape == answers.shape == (2001,) and tokens.dtype == np.int32
        edges = np.flatnonzero(np.diff(np.r_[0, answers.astype(int), 0]))
        for begin, end in edges.reshape(-1, 2):
            known = tokens[begin - 8 : end].tobytes()  # with its beginning, which is no answer
            assert known in tokens[: begin - 8].tobytes()
        fresh = np.isin(np.arange(2001), np.flatnonzero(answers), invert=True)
        assert fresh[:48].all()
        shares.append(answers.mean())
    assert 0.2 < np.mean(shares) < 0.6
