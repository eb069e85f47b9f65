"""The chat template of RWKV-X: strings written out by hand, masks, samples."""

import dataclasses
import json
import re

import numpy as np
import pytest

from rwkvx_jax.config import ConfigError, DataConfig, SourceConfig, Stage
from rwkvx_jax.data import chat
from rwkvx_jax.data.chat import chat_prompt, render_chat
from rwkvx_jax.data.pipeline import open_data
from rwkvx_jax.tokenizer import load_tokenizer

BYTES = load_tokenizer("byte")


@pytest.fixture(scope="module")
def world():
    pytest.importorskip("pyrwkv_tokenizer")
    return load_tokenizer("world")


CHAT = [
    {"role": "user", "content": "Hello there "},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long."},
]


def said(messages):
    """Text of a conversation, and the part of it that counts."""
    tokens, mask = render_chat(messages, BYTES)
    assert tokens[-1] == 0 and mask[-1] == 0 and len(tokens) == len(mask)
    return BYTES.decode(tokens), BYTES.decode(tokens[mask == 1])


def turns(*contents, system=None):
    roles = ("user", "assistant") * len(contents)
    found = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return found if system is None else [{"role": "system", "content": system}, *found]


@pytest.mark.parametrize(
    "messages, text, counted",
    [
        (
            CHAT,
            "User: Hello there\n\nAssistant: Hi!\n\nUser: Bye\n\nAssistant: So long.\n\n",
            " Hi!\n\n So long.\n\n",
        ),
        (CHAT[:1], "User: Hello there\n\n", ""),
        (  # shared/cases/chat.jsonl
            turns("One.\n\nTwo?", "First.\r\n\r\nSecond.\n \nThird.", system="Be brief."),
            "User: Be brief.\nOne.\nTwo?\n\nAssistant: First.\r\nSecond.\nThird.\n\n",
            " First.\r\nSecond.\nThird.\n\n",
        ),
        (
            turns("  Hi\n", " a\n\n\n \t\n  b\n\nc ", system=" Rules:\n\n- one \n"),
            "User: Rules:\n- one\n  Hi\n\nAssistant: a\n  b\nc\n\n",
            " a\n  b\nc\n\n",
        ),
        (turns("Hi", "Yo", system=" \n"), "User: Hi\n\nAssistant: Yo\n\n", " Yo\n\n"),
        (turns("Hi", " \n"), "User: Hi\n\nAssistant:", ""),
        (turns("", "Yo"), "User:Assistant: Yo\n\n", " Yo\n\n"),
        ([{"role": "Assistant", "content": "Yo"}], "Assistant: Yo\n\n", " Yo\n\n"),
    ],
)
def test_a_conversation_is_that_of_the_original(messages, text, counted):
    """Written out by hand from `sft/src/dataset.py` of RWKV-X."""
    assert said(messages) == (text, counted)


def test_a_prompt_is_the_beginning_of_the_conversation():
    assert chat_prompt("Hello") == "User: Hello\n\nAssistant:"
    system, question = "Be brief.", " One.\n\nTwo?"
    whole, _ = said(turns(question, "answer", system=system))
    assert whole == chat_prompt(question, system) + " answer\n\n"


@pytest.mark.parametrize(
    "messages, message",
    [
        ([], '"messages" is not a list of turns'),
        ({"role": "user"}, '"messages" is not a list of turns'),
        (["x"], 'turn 0 has no "content" string'),
        ([CHAT[0], {"role": "user", "content": None}], 'turn 1 has no "content" string'),
        ([{"content": "x"}], 'turn 0 has no "role" string'),
        ([{"role": ["user"], "content": "x"}], 'turn 0 has no "role" string'),
        ([{"role": "bot" * 99, "content": "x"}], "turn 0: role 'botbot.{9,30} is none of system"),
        ([*CHAT, {"role": "system", "content": "x"}], "turn 4 is a system turn: only the first"),
        (turns(system="x"), "a system turn needs a user turn after it"),
        ([*turns(system="x"), CHAT[1]], "a system turn needs a user turn after it"),
    ],
)
def test_turns_of_another_form(messages, message):
    with pytest.raises(ValueError, match=message):
        render_chat(messages, BYTES)


def test_chat_in_world_tokens(world):
    """Three tokens of `Assistant:` are masked, and the turns split as the whole text does."""
    tokens, mask = render_chat(CHAT[:2], world)
    np.testing.assert_array_equal(
        tokens[:-1], world.encode("User: Hello there\n\nAssistant: Hi!\n\n")
    )
    assert world.encode("Assistant:").tolist() == [5585, 41693, 59]
    user = len(world.encode("User: Hello there\n\n"))
    assert mask.tolist() == [0] * (user + 3) + [1] * (len(mask) - user - 4) + [0]
    assert 261 in tokens[mask == 1]  # the stop token is learned


def test_chat_masks_reach_the_samples(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text((json.dumps({"messages": CHAT}) + "\n") * 20 + json.dumps({"text": "plain"}))
    tokens, mask = render_chat(CHAT, BYTES)
    for samples in ("window", "document"):
        config = DataConfig(sources=(SourceConfig("jsonl", path=str(path), samples=samples),))
        opened = open_data(config, workdir=tmp_path, vocab_size=257, process_index=0)
        stream = opened.sources[0].stream
        assert stream.masked and stream.read_mask(len(stream) - 6, 6).tolist() == [1] * 6
        dataset = opened.dataset(Stage("s", len(tokens) - 1, 1, 1, 1e-3))
        for sample in (dataset[i] for i in range(15)):
            counted = sample["mask"] == 1
            text = BYTES.decode(sample["tokens"][1:][counted])
            assert text and ":" not in text and "U" not in text  # a shifted mask has one
            if samples == "document" and "plain" not in text:
                np.testing.assert_array_equal(counted, mask[1:])
                assert text == " Hi!\n\n So long.\n\n"


# --- conversations without anything to learn ------------------------------------------------------


def open_chats(path, *conversations, samples="document"):
    path.write_text("".join(json.dumps({"messages": c}) + "\n" for c in conversations))
    config = DataConfig(sources=(SourceConfig("jsonl", path=str(path), samples=samples),))
    config = dataclasses.replace(config, held_out=0.0)
    return open_data(config, workdir=path.parent, vocab_size=257, process_index=0)


@pytest.mark.parametrize("samples", ["document", "window"])
def test_samples_without_targets_are_counted(samples, tmp_path, caplog):
    late = turns("word " * 40, "yes")
    opened = open_chats(tmp_path / "c.jsonl", CHAT, late, CHAT, late, samples=samples)
    for _ in range(2):  # said once
        opened.dataset(Stage("s", 64, 1, 1, 1e-3))
    (record,) = caplog.records
    first = len(render_chat(CHAT, BYTES)[0])
    if samples == "document":
        assert "in 2 of 4 documents no token counts in the loss within 64 + 1" in record.message
        assert f"the first is document 1, from token {first} of " in record.message
    else:
        assert re.search(r"in [2-6] of \d+ windows no token counts", record.message)
    caplog.clear()
    opened.dataset(Stage("s", 250, 1, 1, 1e-3))
    assert not caplog.records
    with pytest.raises(ConfigError, match=r"in 3 of 3 documents no token counts .* seq_len"):
        open_chats(tmp_path / "c.jsonl", late, late, late).dataset(Stage("s", 64, 1, 1, 1e-3))


def test_the_template_belongs_to_the_identity_of_conversations(tmp_path):
    (identity,) = open_chats(tmp_path / "c.jsonl", CHAT).fingerprint["sources"]
    assert identity["template"] == chat.TEMPLATE
