"""Passkey texts: the official protocol's numbers, exact lengths, disjoint keys, documents."""

import numpy as np
import pytest

from rwkvx_jax.config import ConfigError
from rwkvx_jax.tasks.passkey import (
    FILLER,
    OFFICIAL_TRIALS,
    answer_tokens,
    eval_key,
    exact_prompt,
    is_eval_key,
    key_line,
    official_characters,
    official_key,
    official_prompt,
    train_key,
    training_sample,
)
from rwkvx_jax.tokenizer import load_tokenizer


@pytest.fixture(scope="module", params=["byte", "world"])
def tokenizer(request):
    if request.param == "world":
        pytest.importorskip("pyrwkv_tokenizer")
    return load_tokenizer(request.param)


def test_official_keys():
    assert [official_key(k) for k in range(5)] == [2733, 33004, 23721, 5995, 17531]


@pytest.mark.parametrize(
    "length, tokens", [(2000, 1928), (8000, 8060), (32000, 32060), (64000, 64060)]
)
def test_official_prompt_has_the_token_counts_of_the_repository(length, tokens):
    pytest.importorskip("pyrwkv_tokenizer")
    prompt = official_prompt(official_key(0), official_characters(length), 0)
    assert len(load_tokenizer("world").encode(prompt)) == tokens


def test_official_prompt_layout():
    assert official_characters(2000) == 7000
    lines = official_prompt(5995, 1000, 300).split("\n")
    assert len(lines) == 5
    assert [len(lines[1]), len(lines[3])] == [300, 700]
    assert lines[3].startswith(lines[1])  # the filler starts anew behind the key
    assert lines[2] == "The pass key is 5995. Remember it. 5995 is the pass key."
    assert lines[4] == "What is the pass key? The pass key is"
    with pytest.raises(ValueError, match="prefix_characters 11"):
        official_prompt(5995, 10, 11)


@pytest.mark.parametrize("length", [128, 249, 250, 256, 257, 1000, 4097])
@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
def test_exact_prompt_length_and_depth(tokenizer, length, depth):
    prompt = exact_prompt(tokenizer, 54321, length, depth)
    assert prompt.shape == (length,) and prompt.dtype == np.int32
    text = tokenizer.decode(prompt)
    assert text.endswith("\nWhat is the pass key? The pass key is")
    assert text.count("\n") == (4 if text.startswith("There is an important") else 3)
    before, after = text.split(f"\n{key_line(54321)}\n")
    filler_before = len(tokenizer.encode(before.split("\n")[-1]))
    filler_after = len(tokenizer.encode(after.split("\n")[0]))
    expected = depth * (filler_before + filler_after)
    assert abs(filler_before - expected) <= 2  # a cut word may split into more tokens


def test_exact_prompt_follows_the_official_text(tokenizer):
    """With whole sentences on both sides it is the official prompt, character by character.

    World token counts differ a little: the whole text has tokens that span its line breaks.
    """
    filler = 5 * (len(FILLER) + 1) - 1
    text = official_prompt(33004, 2 * filler, filler)
    count = len(tokenizer.encode(text))
    slack = range(1) if tokenizer.name == "byte" else range(-8, 9)
    prompts = [exact_prompt(tokenizer, 33004, count + more, 0.5) for more in slack]
    assert text in [tokenizer.decode(prompt) for prompt in prompts]


def test_short_prompt_drops_the_task_line_and_too_short_is_an_error(tokenizer):
    assert tokenizer.decode(exact_prompt(tokenizer, 54321, 250, 0)).startswith("There is")
    lines = f"\n{key_line(54321)}\n", "\nWhat is the pass key? The pass key is"
    minimum = sum(len(tokenizer.encode(line)) for line in lines)
    assert key_line(54321) in tokenizer.decode(exact_prompt(tokenizer, 54321, minimum, 0.5))
    with pytest.raises(ConfigError, match=f"take {minimum} tokens"):
        exact_prompt(tokenizer, 54321, minimum - 1, 0.5)
    with pytest.raises(ValueError, match="depth is 1.5"):
        exact_prompt(tokenizer, 54321, 400, 1.5)


@pytest.mark.parametrize("seq_len", [128, 256, 1024])
def test_training_sample(tokenizer, seq_len):
    rng = np.random.default_rng(3)
    keys, depths = set(), set()
    for _ in range(20):
        sample, answers = training_sample(tokenizer, seq_len, rng)
        assert sample.shape == (seq_len + 1,) and sample.dtype == np.int32
        assert sample[-1] == tokenizer.end_of_document
        text = tokenizer.decode(sample)
        key = int(text.removesuffix(".").split()[-1])
        assert key_line(key) in text and not is_eval_key(key)
        prompt = text.removesuffix(f" {key}.")
        assert prompt.endswith("The pass key is")
        answer = answer_tokens(tokenizer, key)
        np.testing.assert_array_equal(sample[-2 - len(answer) : -2], answer)
        assert answers[-2 - len(answer) : -2].all() and answers.sum() == len(answer)
        keys.add(key)
        depths.add(text.index(key_line(key)))
    assert len(keys) == 20
    if seq_len == 1024:
        assert len(depths) > 15


def test_training_sample_is_a_function_of_its_generator(tokenizer):
    samples = [
        training_sample(tokenizer, 300, np.random.default_rng([7, i])).tokens for i in (0, 0, 1)
    ]
    np.testing.assert_array_equal(samples[0], samples[1])
    assert (samples[0] != samples[2]).any()
    held_out = training_sample(tokenizer, 300, np.random.default_rng(0), held_out=True).tokens
    assert is_eval_key(int(tokenizer.decode(held_out).removesuffix(".").split()[-1]))


def test_key_pools_are_disjoint():
    train = {train_key(np.random.default_rng(i)) for i in range(500)}
    held_out = {eval_key(np.random.default_rng(i)) for i in range(500)}
    assert not train & held_out
    assert all(10_000 <= key < 100_000 for key in train | held_out)
    assert all(is_eval_key(official_key(k)) for k in range(4 * OFFICIAL_TRIALS))
    share = np.mean([is_eval_key(key) for key in range(10_000, 30_000)])
    assert 0.09 < share < 0.11
    # Pinned: the evaluation keys of a checkpoint must stay unseen by it.
    expected = [10014, 10022, 10024, 10034, 10041, 10045, 10056, 10057]
    assert [key for key in range(10_000, 10_060) if is_eval_key(key)] == expected
