"""Needles, variable tracking, recall and passkeys in books: pinned prompts, lengths, places."""

import hashlib
import re

import numpy as np
import pytest

from rwkvx_jax.config import ConfigError
from rwkvx_jax.tasks.haystack import TextFolder, sentences
from rwkvx_jax.tasks.niah import (
    NEEDLE_TASKS,
    NIAH_RESERVED,
    TRACKING_RESERVED,
    needle_question,
    score,
    tracking_question,
)
from rwkvx_jax.tasks.passkey import (
    FILLER,
    OTHER_WORDING,
    eval_key,
    exact_prompt,
    is_eval_key,
    key_line,
    training_sample,
)
from rwkvx_jax.tasks.recall import pairs_sample, recall_prompt, recall_sample
from rwkvx_jax.tasks.words import ADJECTIVES, NOUNS, draw, draw_distinct, draw_names
from rwkvx_jax.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder of made-up prose: sentence n says so."""
    folder = tmp_path_factory.mktemp("books")
    lines = [f"Here stands sentence {i}, and it\n  says nothing else at all." for i in range(400)]
    (folder / "a.txt").write_text(" ".join(lines[:250]))
    (folder / "b.txt").write_text(" ".join(lines[250:]))
    return TextFolder(folder)


@pytest.fixture(scope="module", params=["byte", "world"])
def tokenizer(request):
    if request.param == "world":
        pytest.importorskip("pyrwkv_tokenizer")
    return load_tokenizer(request.param)


def rng(*seed):
    return np.random.default_rng(seed)


# Tokens and hash of a prompt at length 1000, depth 0.5, generator [1]: what these are must not
# change unnoticed, or scores of different versions can't be compared.
PINNED = {
    "byte single_1": (804, "a6f6a777adb7f9bf"),
    "byte single_2": (872, "202879af48893c7b"),
    "byte single_3": (865, "54fdef3b18138f9e"),
    "byte multikey_1": (868, "4463bca153c03fd4"),
    "byte multikey_2": (857, "850267620960644d"),
    "byte multikey_3": (784, "55fab029207cf667"),
    "world single_1": (854, "e9b5d4a53605d13f"),
    "world single_2": (872, "4836c18ee4f0379c"),
    "world single_3": (872, "effdb2de54d4cd68"),
    "world multikey_1": (872, "567ff28121e914a8"),
    "world multikey_2": (869, "fa5c3bca4bdb01b9"),
    "world multikey_3": (868, "6700259e42db27b9"),
}


@pytest.mark.parametrize("name", NEEDLE_TASKS)
def test_needle_prompts_are_pinned(name, tokenizer, text):
    question = needle_question(NEEDLE_TASKS[name], tokenizer, 1000, 0.5, rng(1), text)
    digest = hashlib.sha256(tokenizer.decode(question.prompt).encode()).hexdigest()[:16]
    assert (len(question.prompt), digest) == PINNED[f"{tokenizer.name} {name}"]


def test_needle_prompt_is_rulers(text):
    byte = load_tokenizer("byte")
    prompt, (value,) = needle_question(NEEDLE_TASKS["single_1"], byte, 740, 0.5, rng(1))
    noise = (
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    )
    key = re.search(r"for (\S+) is:", byte.decode(prompt))[1]
    assert byte.decode(prompt).split("\n") == [
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.",
        noise,
        f"One of the special magic numbers for {key} is: {value}.",
        noise,
        f"What is the special magic number for {key} mentioned in the provided text? "
        f"The special magic number for {key} mentioned in the provided text is",
    ]
    assert re.fullmatch(r"[a-z]+-[a-z]+", key) and re.fullmatch(r"[1-9]\d{6}", value)


@pytest.mark.parametrize("name", NEEDLE_TASKS)
@pytest.mark.parametrize("length", [1000, 2000, 5000])
def test_a_needle_prompt_fills_its_length(name, length, tokenizer, text):
    task = NEEDLE_TASKS[name]
    prompt, (value,) = needle_question(task, tokenizer, length, 0.3, rng(length), text)
    unit = {"text": 12, "repeat": 95, "needle": 130}[task.haystack]
    assert length - NIAH_RESERVED - unit < len(prompt) <= length - NIAH_RESERVED
    lines = tokenizer.decode(prompt)
    assert lines.count(value) == 1
    needles = re.findall(r"One of the special magic (\w+)s for (\S+) is: (\S+)\.", lines)
    (asked,) = re.findall(r"What is the special magic \w+ for (\S+) mentioned", lines)
    assert [v for _, key, v in needles if key == asked] == [value]
    assert len(needles) == task.count or task.haystack == "needle"


@pytest.mark.parametrize("name", ["single_1", "single_2", "multikey_1", "multikey_2"])
def test_the_asked_needle_lies_at_its_depth(name, text):
    byte = load_tokenizer("byte")
    for depth in (0.0, 0.25, 0.8, 1.0):
        prompt, (value,) = needle_question(NEEDLE_TASKS[name], byte, 12_000, depth, rng(5), text)
        context = byte.decode(prompt).split("afterwards.\n")[1].split("\nWhat is")[0]
        start = context.index(value) / len(context)
        assert abs(start - depth) < 0.03, (depth, start)


def test_uuid_values_and_distinct_names():
    for value in (draw("uuids", rng(i)) for i in range(5)):
        assert re.fullmatch(
            r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", value
        )
    assert len(set(draw_distinct("words", 500, rng(0)))) == 500
    assert len(ADJECTIVES) == len(set(ADJECTIVES)) and len(NOUNS) == len(set(NOUNS))
    assert len(set(draw_names(2000, rng(0)))) == 2000
    with pytest.raises(ValueError, match="'colours'"):
        draw("colours", rng(0))


def test_variable_tracking(tokenizer):
    prompt, answers = tracking_question(tokenizer, 4000, rng(3))
    assert 4000 - TRACKING_RESERVED - 100 < len(prompt) <= 4000 - TRACKING_RESERVED
    example, question = tokenizer.decode(prompt).split("\n\nMemorize")
    assert len(tokenizer.encode(example)) <= 500 + 30 or example.count(FILLER) == 5
    assert answers == check_chain(f"Memorize{question}", 5)
    assert check_chain(re.sub(r"(?<=: )( [A-Z]{3}){5}$", "", example), 3)


def check_chain(text, letters):
    """The variables of a prompt whose every line is compared with RULER's of 2026-07-22."""
    first, *_ = variables = re.findall(rf"^VAR ([A-Z]{{{letters}}}) = ", text, re.M)
    (value,) = re.findall(rf"^VAR {first} = (\d{{5}})$", text, re.M)
    chain = [f"VAR {first} = {value}"]
    chain += [f"VAR {variables[i + 1]} = VAR {variables[i]} " for i in range(4)]
    task, context, ending = re.split(r"\n\n|\n(?=Question)", text)
    assert task == (
        "Memorize and track the chain(s) of variable assignment hidden in the following text."
    )
    assert ending == (
        f"Question: Find all variables that are assigned the value {value} in the text above. "
        "Answer: According to the chain(s) of variable assignment in the text above, 5 variables "
        f"are assigned the value {value}, they are: "
    )
    lines = context.split("\n")
    assert [line for line in lines if line != FILLER] == chain and lines.count(FILLER) >= 5
    after = [lines[i + 1] for i, line in enumerate(lines) if line.startswith("VAR")]
    assert after == [FILLER] * 5  # no two beside each other, none at the end
    return tuple(variables)


def test_a_tracking_prompt_is_pinned():
    byte = load_tokenizer("byte")
    prompt, answers = tracking_question(byte, 2200, rng(0))
    assert byte.decode(prompt).replace(FILLER, "...") == PINNED_TRACKING
    assert answers == ("OYHVR", "AKWOA", "TSWEC", "WAOCH", "MKKAA")


PINNED_TRACKING = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "VAR WQN = 75653\n...\nVAR HIB = VAR WQN \n...\nVAR BAE = VAR HIB \n...\n"
    "VAR VQX = VAR BAE \n...\nVAR NPZ = VAR VQX \n...\n"
    "Question: Find all variables that are assigned the value 75653 in the text above. "
    "Answer: According to the chain(s) of variable assignment in the text above, 5 variables are "
    "assigned the value 75653, they are:  WQN HIB BAE VQX NPZ\n\n"
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "VAR OYHVR = 21185\n...\nVAR AKWOA = VAR OYHVR \n...\n...\nVAR TSWEC = VAR AKWOA \n...\n"
    "...\n...\nVAR WAOCH = VAR TSWEC \n...\n...\n...\nVAR MKKAA = VAR WAOCH \n...\n"
    "Question: Find all variables that are assigned the value 21185 in the text above. "
    "Answer: According to the chain(s) of variable assignment in the text above, 5 variables are "
    "assigned the value 21185, they are: "
)


def test_score_is_the_share_found():
    assert score("it is 1234567, I think", ("1234567",)) == 1
    assert score("ABCDE, fghij", ("abcde", "FGHIJ", "KLMNO", "PQRST")) == 0.5
    assert score("", ("1",)) == 0


def test_sentences():
    parts = ["A cat sat.", "“Why?”", "It did so! (Once.)", "At 3.5 percent e.g. now."]
    assert sentences(" ".join(parts)) == ["A cat sat.", "“Why?”", "It did so!", "(Once.)", parts[3]]


def test_text_folder(tmp_path, text):
    assert text.text(6) == "Here stands sentence 0, and it"
    total = len(text.words)
    assert text.text(total + 3).endswith("at all. Here stands sentence")
    byte = load_tokenizer("byte")
    tokens = text.tokens(byte)
    np.testing.assert_array_equal(text.window(byte, 7, 20), tokens[7:27])
    np.testing.assert_array_equal(text.window(byte, len(tokens) - 2, 5)[2:], tokens[:3])
    with pytest.raises(ConfigError, match="haystack file .*absent does not exist"):
        TextFolder(tmp_path / "absent")
    with pytest.raises(ConfigError, match="no haystack file matches .*txt below"):
        TextFolder(tmp_path)
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfone two")
    assert TextFolder(tmp_path).words == ["one", "two"]
    (tmp_path / "x.txt").write_text(" \n ")
    with pytest.raises(ConfigError, match="holds no text"):
        TextFolder(tmp_path)
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfa word")
    assert TextFolder(tmp_path).words == ["a", "word"]  # without the byte order mark
    (tmp_path / "x.txt").write_bytes(b"ab\xff")
    with pytest.raises(ConfigError, match="not valid UTF-8: .* at byte 2"):
        TextFolder(tmp_path / "x.txt")


@pytest.mark.parametrize("name", ["single_1", "tracking"])
def test_too_short_prompts_are_refused(name, tokenizer):
    with pytest.raises(ConfigError, match="of 150 tokens is too short.* for the answer"):
        if name == "tracking":
            tracking_question(tokenizer, 150, rng(0))
        else:
            needle_question(NEEDLE_TASKS[name], tokenizer, 150, 0.5, rng(0))


@pytest.mark.parametrize("pairs, length", [(16, 500), (64, 1500), (256, 4096)])
def test_recall_prompt(tokenizer, pairs, length):
    for depth in (0.0, 0.5, 1.0):
        prompt, value = recall_prompt(tokenizer, length, pairs, depth, rng(pairs))
        assert prompt.shape == (length,) and prompt.dtype == np.int32 and is_eval_key(value)
        lines = tokenizer.decode(prompt).split("\n")
        stated = [tuple(line.split(": ")) for line in lines if re.fullmatch(r"[a-z]{5}: \d+", line)]
        assert len(dict(stated)) == pairs == len(stated)
        place = round(depth * (pairs - 1))
        assert stated[place][1] == str(value)
        assert lines[-2:] == [f"Which number has {stated[place][0]}?", f"{stated[place][0]}:"]


def test_recall_prompt_is_pinned():
    byte = load_tokenizer("byte")
    prompt, value = recall_prompt(byte, 300, 4, 0.4, rng(0))
    assert byte.decode(prompt) == PINNED_RECALL and value == 13022


PINNED_RECALL = (
    "Each name below has a number. Remember them all, I will ask for some.\n"
    "The grass is green. The sky is blue. \n"
    "tomej: 45473\n"
    "The sun is yellow. Here we go. There and back again\n"
    "babat: 13022\n"
    ". The\n"
    "pumoz: 11989\n"
    " grass is green. \n"
    "roniz: 57305\n"
    "The sky is blue. The sun is yello\n"
    "Which number has babat?\n"
    "babat:"
)


def test_recall_sample_asks_and_answers(tokenizer):
    sample, answers = recall_sample(tokenizer, 1200, rng(2), pairs=30, questions=7)
    assert sample.shape == (1201,) and sample[-1] == tokenizer.end_of_document
    text = tokenizer.decode(sample)
    stated = dict(re.findall(r"^([a-z]{5}): (\d+)$", text.split("\nWhich number")[0], re.M))
    asked = re.findall(r"\nWhich number has (\w+)\?\n(\w+): (\d+)", text)
    assert len({name for name, _, _ in asked}) == 7 and len(stated) == 30
    assert all(name == again and stated[name] == value for name, again, value in asked)
    assert not any(is_eval_key(int(value)) for value in stated.values())
    assert tokenizer.decode(sample[answers]).split() == [value for _, _, value in asked]
    held_out = recall_sample(tokenizer, 1200, rng(2), pairs=30, held_out=True).tokens
    values = re.findall(r"^[a-z]{5}: (\d+)$", tokenizer.decode(held_out), re.M)
    assert len(values) == 31 and all(is_eval_key(int(value)) for value in values)


def test_only_restated_numbers_of_pairs_are_answers(tokenizer):
    tokens, answers = pairs_sample(tokenizer, 700, rng(1), pairs=5)
    assert tokens.shape == answers.shape == (701,)
    stated = re.findall(r"\n[a-z]{5}: (\d+)(?=\n)", tokenizer.decode(tokens))
    first = dict(zip(reversed(stated), range(len(stated))[::-1], strict=True))
    again = [number for i, number in enumerate(stated) if first[number] != i]
    found = tokenizer.decode(tokens[answers]).split()
    assert found[: len(again)] == again and len(found) - len(again) in (0, 1)  # one may be cut


def test_recall_that_does_not_fit():
    byte = load_tokenizer("byte")
    with pytest.raises(ConfigError, match="of 900 tokens is too short for 64 pairs: they and the"):
        recall_prompt(byte, 900, 64, 0.5, rng(0))
    with pytest.raises(ConfigError, match="3 questions about 2 pairs"):
        recall_sample(byte, 900, rng(0), pairs=2, questions=3)


def test_passkey_inside_a_book(tokenizer, text):
    window = lambda count: text.window(tokenizer, 40, count)
    prompt = exact_prompt(tokenizer, 54321, 700, 0.25, text=window)
    assert prompt.shape == (700,)
    before, after = tokenizer.decode(prompt).split(f"\n{key_line(54321)}\n")
    book = before.split("\n")[1] + after.split("\n")[0]
    assert book == tokenizer.decode(window(len(book) * 2))[: len(book)]  # goes on behind the key
    assert abs(len(before.split("\n")[1]) / len(book) - 0.25) < 0.02


def test_training_sample_inside_a_book(tokenizer, text):
    piece = lambda count, rng: text.window(tokenizer, int(rng.integers(100)), count)
    sample = training_sample(tokenizer, 600, rng(4), text=piece).tokens
    again = training_sample(tokenizer, 600, rng(4), text=piece).tokens
    np.testing.assert_array_equal(sample, again)
    words = tokenizer.decode(sample)
    key = int(words.removesuffix(".").split()[-1])
    assert len(sample) == 601 and not is_eval_key(key) and key_line(key) in words
    assert "says nothing else" in words and "The grass is green" not in words


def test_other_wording_and_key_lengths(tokenizer):
    words = tokenizer.decode(exact_prompt(tokenizer, 123, 400, 0.5, wording=OTHER_WORDING))
    assert "the secret code is 123, and nothing but 123 opens" in words
    assert words.endswith("\nWhich code opens the door? It is the secret code")
    assert "pass key" not in words
    for digits in (3, 8):
        keys = [eval_key(rng(i), digits) for i in range(20)]
        assert {len(str(key)) for key in keys} == {digits} and all(map(is_eval_key, keys))


def test_a_pattern_leaves_files_out(tmp_path):
    (tmp_path / "SOURCE.txt").write_text("where it is from")
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    assert TextFolder(tmp_path).words == ["where", "it", "is", "from", "first", "second"]
    assert TextFolder(tmp_path / "[!A-Z]*.txt").words == ["first", "second"]
    with pytest.raises(ConfigError, match="no haystack file matches .*c\\*.txt"):
        TextFolder(tmp_path / "c*.txt")
