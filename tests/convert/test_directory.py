"""Directories as the Hugging Face Hub has them: names of tensors, config.json, tokenizers."""

import json

import pytest

from rwkvx_jax.config import ConfigError
from rwkvx_jax.convert import vocabulary
from rwkvx_jax.convert.files import checkpoint_among, write_tensors
from rwkvx_jax.convert.load import open_checkpoint
from rwkvx_jax.convert.official import open_official
from rwkvx_jax.convert.safetensors_file import write_safetensors
from rwkvx_jax.convert.tensors import ConversionError
from rwkvx_jax.tokenizer import standard_table
from tests.convert.convert_checkpoints import (
    RANKS,
    TINY_CONFIG,
    assert_identical,
    fla_directory,
    fla_tensors,
    official_tensors,
    read_all,
    rwkv7,
)

OFFICIAL_CONFIG = TINY_CONFIG | {
    "num_heads": 2,
    "decay_low_rank_dim": RANKS["w"],
    "a_low_rank_dim": RANKS["a"],
    "v_low_rank_dim": RANKS["v"],
    "gate_low_rank_dim": RANKS["g"],
    "intermediate_size": 512,
}


def directory(folder, tensors, options=OFFICIAL_CONFIG, name="model.safetensors"):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(options))
    write_tensors(folder / name, tensors)
    return folder


@pytest.mark.parametrize("prefix", ["", "model.", "rwkv7."])
def test_official_names_with_and_without_a_body(prefix, tmp_path):
    """All released forms: bare names, or all but the head's below the model without its head."""
    tensors = rwkv7(first_value_residual=True)
    named = {n if n == "head.weight" else prefix + n: t for n, t in tensors.items()}
    own = open_checkpoint(directory(tmp_path / "model", named))
    config, params, info = open_official(tensors)
    assert (own.config, own.info, own.trained) == (config, info, None)
    assert_identical(read_all(own.params), read_all(params))


def test_shards_and_torch_files(tmp_path):
    tensors = rwkv7()
    expected = read_all(open_official(tensors)[1])
    torch = directory(tmp_path / "torch", tensors, name="RWKV-x070-World.pth")
    assert_identical(read_all(open_checkpoint(torch).params), expected)
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    weight_map = {}
    for number, part in enumerate((list(tensors)[:40], list(tensors)[40:]), 1):
        shard = f"model-{number:05}-of-00002.safetensors"
        write_safetensors(sharded / shard, {n: tensors[n] for n in part})
        weight_map |= dict.fromkeys(part, shard)
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    (sharded / "config.json").write_text(json.dumps(OFFICIAL_CONFIG))
    assert_identical(read_all(open_checkpoint(sharded).params), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 64}, "hidden_size is 64, but the tensors say 128"),
        ({"gate_low_rank_dim": 64}, "gate_low_rank_dim is 64, but the tensors say 9"),
        ({"model_type": "rwkv6"}, "model_type is 'rwkv6'"),
        ({"use_deep_embed": True}, "use_deep_embed = True"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(options, message, tmp_path):
    folder = directory(tmp_path / "model", rwkv7(), OFFICIAL_CONFIG | options)
    with pytest.raises(ConversionError, match=message):
        open_checkpoint(folder)


def test_other_head_sizes_are_another_model_elsewhere(tmp_path):
    options = {"model_type": "rwkv7", "head_dim": 16}
    small = directory(tmp_path / "model", official_tensors(prefix="", attention_blocks=0), options)
    with pytest.raises(ConversionError, match="head_dim 16, .* epsilon 0.00016"):
        open_checkpoint(small)


def test_several_candidates_are_listed():
    names = ["README.md", "a.pth", "b.pth", "old/c.pth"]
    with pytest.raises(
        ConversionError, match=r"org/x holds 2 .*: a.pth, b.pth. Name .*org/x/a.pth"
    ):
        checkpoint_among(names, "hf://org/x")
    assert checkpoint_among([*names, "model.safetensors"], "x") == "model.safetensors"
    assert checkpoint_among(["README.md", "a.pth", "old/c.pth"], "x") == "a.pth"
    with pytest.raises(ConversionError, match="holds 1 files that may be .*: old/c.pth. Name one"):
        checkpoint_among(["README.md", "old/c.pth"], "x")
    with pytest.raises(ConversionError, match="holds no checkpoint; looked for model.safetensors"):
        checkpoint_among(["README.md", "model-00001-of-00002.gguf"], "x")


def tokenizer_json(table, **changes):
    """A tokenizer.json that splits into the longest tokens of a table, over the byte alphabet."""
    characters = vocabulary._byte_characters()
    vocab = {"".join(characters[byte] for byte in t): i for i, t in enumerate(table) if t}
    vocab |= {"<end>": 0} | {f"\ue000{i}": i for i, t in enumerate(table) if not t and i}
    content = {
        "model": {"type": "WordPiece", "continuing_subword_prefix": "", "vocab": vocab},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        "normalizer": None,
        "added_tokens": [{"id": 0, "content": "<end>"}],
    }
    return json.dumps(content | changes)


def byte_model(folder):
    """A directory of a model over bytes."""
    return directory(folder, official_tensors(prefix="", vocab=257), {"model_type": "rwkvx"})


def test_a_tokenizer_like_ours_is_accepted(tmp_path):
    folder = byte_model(tmp_path / "model")
    table = standard_table("byte")
    (folder / "tokenizer.json").write_text(tokenizer_json([*table, b"", b""]))
    lines = [f"{i} {token!r} 1\n" for i, token in enumerate(table) if token]
    (folder / "rwkv_vocab_v1.txt").write_text("".join(lines))
    assert open_checkpoint(folder).tokenizer_name == "byte"


def test_another_tokenizer_is_refused(tmp_path):
    folder = byte_model(tmp_path / "model")
    file = folder / "tokenizer.json"
    table = standard_table("byte")
    bpe = {"type": "BPE", "vocab": json.loads(tokenizer_json(table))["model"]["vocab"]}
    extra = [{"id": 257, "content": "<think>"}]
    for content, message in [
        (tokenizer_json([b"", *reversed(table[1:])]), r"256 ids differ: 1 is b'\\xff' there"),
        (tokenizer_json([*table, b"ab"]), "1 ids differ: 257 is b'ab' there, b'' here"),
        (tokenizer_json(table, added_tokens=extra), "1 ids differ: 257 is b'<think>' there"),
        (tokenizer_json(table, model=bpe), "model.type is 'BPE' there"),
        (tokenizer_json(table, normalizer={"type": "NFC"}), "normalizer is {'type': 'NFC'}"),
        (tokenizer_json(table, model={"vocab": {"a": -1}}), "token 'a' has the id -1"),
        (tokenizer_json(table, model=3), "no tokenizer with a vocabulary"),
        ("[]", "no tokenizer with a vocabulary"),
        ("{", "can't be read"),
        (" " * (4 << 20) + "{}", "JSON has 4194305 bytes; .* needs more than 4194304"),
    ]:  # fmt: skip
        file.write_text(content)
        with pytest.raises(ConversionError, match=message):
            open_checkpoint(folder)
    assert open_checkpoint(folder / "model.safetensors").tokenizer_name == "byte"
    file.unlink()
    lines = [f"{i} {token!r} 1\n" for i, token in enumerate(table) if token]
    (folder / "rwkv_vocab_v1.txt").write_text("".join([*lines, "300 'ab' 2\n"]))
    with pytest.raises(ConversionError, match="rwkv_vocab_v1.txt is another tokenizer.* 300 is"):
        open_checkpoint(folder)
    (folder / "rwkv_vocab_v1.txt").write_text("no vocabulary\n")
    with pytest.raises(ConfigError, match="rwkv_vocab_v1.txt, line 1"):
        open_checkpoint(folder)


def test_a_model_of_no_tokenizer_of_ours_is_not_checked(tmp_path):
    folder = fla_directory(tmp_path / "model", fla_tensors(rwkv7()))
    (folder / "tokenizer.json").write_text("[]")
    assert open_checkpoint(folder).tokenizer_name == ""


def test_the_world_vocabulary_is_that_of_the_package(tmp_path):
    table = standard_table("world")
    if table is None:
        pytest.skip("needs pyrwkv-tokenizer")
    file = tmp_path / "tokenizer.json"
    file.write_text(tokenizer_json(table + [b""] * 6))
    vocabulary.check_vocabulary(tmp_path, "world")
    table[300], table[65000] = table[65000], table[300]
    file.write_text(tokenizer_json(table))
    with pytest.raises(
        ConversionError, match="2 ids differ: 300 is b' quest.* 65000 is b' A' there"
    ):
        vocabulary.check_vocabulary(tmp_path, "world")


def test_without_the_package_a_difference_is_still_found(tmp_path, monkeypatch):
    monkeypatch.setattr("rwkvx_jax.tokenizer._packaged_vocabulary", lambda: None)
    (tmp_path / "tokenizer.json").write_text(tokenizer_json(standard_table("byte")))
    with pytest.raises(ConversionError, match="another one .pyrwkv-tokenizer"):
        vocabulary.check_vocabulary(tmp_path, "world")
