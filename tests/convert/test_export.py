"""`python -m rwkvx_jax.convert SRC DIR --to hub`: a directory that reads back bit for bit."""

import json

import numpy as np
import pytest
import safetensors.numpy

from rwkvx_jax.config import Config, ConfigError, DataConfig, ModelConfig, Stage
from rwkvx_jax.convert.__main__ import main
from rwkvx_jax.convert.export import shard_bytes
from rwkvx_jax.convert.layout import param_shapes
from rwkvx_jax.convert.load import open_checkpoint
from rwkvx_jax.convert.official import official_to_params
from rwkvx_jax.convert.own import Trained, open_own_safetensors, write_own_safetensors
from rwkvx_jax.convert.pth import open_pth, write_pth
from rwkvx_jax.convert.tensors import ConversionError
from tests.convert.convert_checkpoints import (
    BF16,
    assert_identical,
    fla_directory,
    fla_tensors,
    official_tensors,
    random_tensors,
    read_all,
    rwkv7,
    save_run,
)
from tests.evals.eval_models import make_model
from tests.evals.test_report import passkey_run


def export(source, folder, *flags):
    main([str(source), str(folder), "--to", "hub", *flags])
    return open_checkpoint(folder)


def assert_same(actual, expected):
    """Two checkpoints of one content, whatever the layout of their files."""
    assert_identical(read_all(actual.params), read_all(expected.params))
    assert actual._replace(params={}, layout="") == expected._replace(params={}, layout="")


def test_an_official_hybrid_comes_back_to_the_byte(tmp_path):
    tensors = official_tensors(BF16)
    tensors["rwkv.emb.weight"] = official_tensors()["rwkv.emb.weight"]
    write_pth(tmp_path / "source.pth", tensors)
    exported = export(tmp_path / "source.pth", tmp_path / "model", "--top-k", "7")
    assert (exported.config.top_k, exported.layout) == (7, "official")
    assert_identical(safetensors.numpy.load_file(tmp_path / "model" / "model.safetensors"), tensors)
    options = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (options["model_type"], options["dtype"]) == ("rwkvx", "bfloat16")
    main([str(tmp_path / "model"), str(tmp_path / "back.pth")])
    assert_identical(read_all(open_pth(tmp_path / "back.pth")), tensors)


@pytest.mark.parametrize("attention_blocks", [0, 1])
def test_our_own_model_keeps_every_row_and_setting(attention_blocks, tmp_path):
    config = ModelConfig(
        vocab_size=257, num_blocks=2, num_attention_blocks=attention_blocks, width=64,
        selector="max", chunk_size=16, selector_blocks=4, top_k=2, low_rank="rwkv_lm",
    )  # fmt: skip
    params = random_tensors(param_shapes(config))
    source = tmp_path / "source.safetensors"
    write_own_safetensors(source, config, "byte", params, trained=Trained(9, 64))
    exported = export(source, tmp_path / "model")
    assert_same(exported, open_own_safetensors(source))
    stored = safetensors.numpy.load_file(tmp_path / "model" / "model.safetensors")
    prefix = "rwkv." if attention_blocks else ""
    assert f"{prefix}blocks.0.att.v0" in stored


def test_a_model_without_an_official_form_has_our_names(tmp_path):
    config = ModelConfig(vocab_size=257, num_blocks=2, num_attention_blocks=1, width=64, key_conv=2)
    params = random_tensors(param_shapes(config), BF16)
    source = tmp_path / "source.safetensors"
    write_own_safetensors(source, config, "byte", params)
    exported = export(source, tmp_path / "model", "--shard-size", "20KB")
    assert exported.layout == "ours" and exported.config.key_conv == 2
    assert_same(exported, open_own_safetensors(source))


def test_shards_hold_no_more_than_they_may(tmp_path):
    tensors = rwkv7()
    folder = tmp_path / "model"
    source = fla_directory(tmp_path / "fla", fla_tensors(tensors))
    exported = export(source, folder, "--shard-size", "0.3MB")
    assert_same(exported, open_checkpoint(source))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    count = len(shards)
    assert count > 5 and shards[0] == f"model-00001-of-{count:05}.safetensors"
    stored = {}
    for shard in shards:
        part = safetensors.numpy.load_file(folder / shard)
        assert sum(t.nbytes for t in part.values()) <= 300_000 or len(part) == 1
        assert {index["weight_map"][name] for name in part} == {shard}
        stored |= part
    assert_identical(stored, tensors)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    options = json.loads((folder / "config.json").read_text())
    assert (options["model_type"], options["num_heads"], options["head_dim"]) == ("rwkv7", 2, 64)
    files = {file.name for file in folder.iterdir()}
    assert files == {*shards, "config.json", "README.md", "model.safetensors.index.json"}


def test_a_run_goes_to_a_directory(tmp_path):
    model = official_to_params(official_tensors(vocab=257))[0]
    config = Config(model, (Stage("a", 8, 1, 1, 1e-3),), data=DataConfig(tokenizer="byte"))
    run = save_run(tmp_path / "run", config, random_tensors(param_shapes(model)))
    main([str(run), str(tmp_path / "file.safetensors")])
    assert_same(
        export(run, tmp_path / "model"), open_own_safetensors(tmp_path / "file.safetensors")
    )


def test_the_card_tells_the_model_and_its_results(tmp_path):
    write_pth(tmp_path / "source.pth", official_tensors())
    export(tmp_path / "source.pth", tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: rwkvx-jax\n") and "\n# model\n" in card
    assert "RWKV-X: 3 RWKV-7 blocks, 1 attention blocks" in card and "## Results" not in card
    passkey_run(tmp_path / "results", make_model("one"))
    export(tmp_path / "source.pth", tmp_path / "other", "--results", str(tmp_path / "results"))
    card = (tmp_path / "other" / "README.md").read_text()
    assert "\n## Results\n\n### Summary\n" in card and "\n### Passkey retrieval\n" in card
    assert "RWKV-X: one" in card and "![" not in card  # figures would not come along


def test_a_directory_that_fails_leaves_nothing(tmp_path, capsys):
    tensors = official_tensors()
    tensors["rwkv.ln_out.bias"] = tensors["rwkv.ln_out.bias"] * np.nan
    write_pth(tmp_path / "source.pth", tensors)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "README.md").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for args, message in [
        (["source.pth", "model"], "NaN or infinite, in 1 tensors"),
        (["source.pth", "full"], "full exists: name a new directory"),
        (["source.pth", "absent/model"], "absent does not exist"),
        (["source.pth", "model", "--results", "{}/absent"], "absent does not exist"),
    ]:
        args = [a.format(tmp_path) if "{}" in a else a for a in args]
        args[:2] = [str(tmp_path / name) for name in args[:2]]
        with pytest.raises(SystemExit, match="1"):
            main([*args, "--to", "hub"])
        assert message in capsys.readouterr().err
        assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(SystemExit, match="1"):
        main([str(tmp_path / "source.pth"), "gs://bucket/model", "--to", "hub"])
    assert "a directory for the Hub is written to a disk" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--to", "hub", "--shard-size", "5 apples"], "--shard-size is '5 apples': write a size"),
        (["--results", "x"], "--results goes into a model card: add --to hub"),
    ],
)
def test_flags_that_can_not_be_meant(flags, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["source.pth", "model", *flags])
    assert message in " ".join(capsys.readouterr().err.split())


def test_sizes_of_shards():
    assert [shard_bytes(t) for t in ("5GB", "0.5 MB", "7B", "1kb")] == [5 * 10**9, 500_000, 7, 1000]
    for text in ("", "0GB", "-1GB", "5GiB", "0.1B"):
        with pytest.raises(ConfigError, match="write a size such as 5GB"):
            shard_bytes(text)


def test_a_file_of_the_directory_tells_its_settings_alone(tmp_path):
    write_pth(tmp_path / "source.pth", official_tensors())
    folder = tmp_path / "model"
    export(tmp_path / "source.pth", folder, "--top-k", "7", "--shard-size", "5KB")
    index = open_checkpoint(folder / "model.safetensors.index.json")
    assert_same(index, open_checkpoint(folder))
    assert index.config.top_k == 7
    export(tmp_path / "source.pth", tmp_path / "one", "--top-k", "7")
    assert_same(open_checkpoint(tmp_path / "one" / "model.safetensors"), index)


def test_settings_that_contradict_each_other_are_refused(tmp_path):
    write_pth(tmp_path / "source.pth", official_tensors())
    export(tmp_path / "source.pth", tmp_path / "a")
    export(tmp_path / "source.pth", tmp_path / "b", "--top-k", "7")
    (tmp_path / "a" / "config.json").write_bytes((tmp_path / "b" / "config.json").read_bytes())
    with pytest.raises(ConversionError, match="describe different models"):
        open_checkpoint(tmp_path / "a")


def test_damaged_settings_are_refused(tmp_path):
    """Of a directory whose tensors another program wrote again, without our metadata."""
    write_pth(tmp_path / "source.pth", official_tensors())
    export(tmp_path / "source.pth", tmp_path / "model", "--top-k", "7")
    folder = tmp_path / "model"
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    assert open_checkpoint(folder).config.top_k == 7
    file = folder / "config.json"
    options = json.loads(file.read_text())
    settings = options["rwkvx_jax"]
    for changed, message in [
        (3, "rwkvx_jax is no table of texts"),
        (settings | {"tokenizer": 3}, "rwkvx_jax is no table of texts"),
        (settings | {"rwkvx_jax_format": "9"}, "format 9, .*update it"),
        (settings | {"model_config": "{"}, "JSON can't be read"),
        ({k: v for k, v in settings.items() if k != "tokenizer"}, "lacks 'tokenizer'"),
        (settings | {"model_config": json.dumps({"width": 64})}, "do not fit"),
    ]:
        file.write_text(json.dumps(options | {"rwkvx_jax": changed}))
        with pytest.raises(ConversionError, match=message):
            open_checkpoint(tmp_path / "model")
