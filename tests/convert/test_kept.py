"""What a conversion must not change, lose or hide: values, dtypes, order, settings, damage."""

import dataclasses
import json
import resource

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from rwkvx_jax.checkpoint import load_checkpoint
from rwkvx_jax.config import Config, ModelConfig, Stage, to_dict
from rwkvx_jax.convert.__main__ import main
from rwkvx_jax.convert.files import open_tensors
from rwkvx_jax.convert.finite import check_finite
from rwkvx_jax.convert.layout import param_shapes
from rwkvx_jax.convert.load import open_checkpoint
from rwkvx_jax.convert.official import official_to_params, params_to_official
from rwkvx_jax.convert.own import open_own_safetensors, write_own_safetensors
from rwkvx_jax.convert.pth import open_pth, write_pth
from rwkvx_jax.convert.safetensors_file import open_safetensors, write_safetensors
from rwkvx_jax.convert.tensors import ConversionError
from tests.convert.convert_checkpoints import (
    BF16,
    L,
    assert_identical,
    fla_directory,
    fla_tensors,
    official_tensors,
    random_tensors,
    read_all,
    rwkv7,
)


@pytest.fixture
def official():
    """A hybrid's tensors under official names."""
    return official_tensors(blocks=2, attention_blocks=1)


def run(*arguments):
    main([str(argument) for argument in arguments])


def fails(capsys, *arguments):
    with pytest.raises(SystemExit, match="1"):
        run(*arguments)
    return capsys.readouterr().err


@pytest.mark.parametrize(("suffix", "bad"), [(".pth", np.nan), (".safetensors", -np.inf)])
def test_values_that_are_not_finite_are_refused(suffix, bad, official, tmp_path, capsys):
    official["rwkv.ln_out.bias"][3] = bad
    official["rwkv.blocks.1.att.w0"][0, 0, :2] = bad
    source = tmp_path / "source.pth"
    write_pth(source, official)
    with pytest.raises(ConversionError, match="source.pth holds values that are NaN or inf") as got:
        load_checkpoint(source)
    named = ("in 2 tensors", "ln_out.bias (1)", "blocks.time_mix.w0 (2)")
    assert all(part in str(got.value) for part in named)

    out = tmp_path / "out"
    out.mkdir()
    error = fails(capsys, source, out / f"x{suffix}")
    assert all(part in error for part in (*named, "Nothing was written", "--allow-nonfinite"))
    assert not list(out.iterdir())

    run(source, out / f"x{suffix}", "--allow-nonfinite")
    warned = capsys.readouterr().err
    assert "warning" in warned and all(part in warned for part in named)
    copied = read_all(open_checkpoint(out / f"x{suffix}").params)
    assert_identical(copied, read_all(open_checkpoint(source).params))
    with pytest.raises(ConversionError, match="ln_out.bias"):
        load_checkpoint(out / f"x{suffix}")


def test_arrays_on_an_accelerator_are_checked_there(monkeypatch):
    monkeypatch.setattr("rwkvx_jax.convert.finite._is_remote", lambda array: True)
    good = {"a": jnp.ones((3, 4)), "b": jnp.ones(2, jnp.bfloat16)}
    check_finite(good, "x")
    with pytest.raises(ConversionError, match=r"x holds .* in 1 tensors: b \(1\)"):
        check_finite(good | {"b": jnp.array([1, jnp.inf], jnp.bfloat16)}, "x")


def test_every_tensor_keeps_its_dtype(tmp_path):
    tensors = rwkv7(dtype=BF16)
    single = [n for n in tensors if n[-2:] in ("w0", "a0", "v0")] + ["blocks.1.att.k_k"]
    tensors |= {n: (tensors[n].astype(np.float32) + np.float32(1e-3)) for n in single}
    folder = fla_directory(tmp_path / "fla", fla_tensors(tensors))
    run(folder, tmp_path / "direct.pth")
    run(folder, tmp_path / "ours.safetensors")
    run(tmp_path / "ours.safetensors", tmp_path / "again.safetensors")
    run(tmp_path / "again.safetensors", tmp_path / "back.pth")
    for name in ("direct.pth", "back.pth"):
        assert_identical(read_all(open_pth(tmp_path / name)), tensors)


# Written from rwkv_v7_numpy.py of RWKV-LM, which reads the tensors of a block by their order.
RELEASED_BLOCK = """ln1.weight ln1.bias ln2.weight ln2.bias
    att.x_r att.x_w att.x_k att.x_v att.x_a att.x_g
    att.w0 att.r_k att.w1 att.w2 att.a1 att.a2 att.a0 att.g1 att.g2 att.v2 att.v1 att.v0
    att.k_k att.k_a att.receptance.weight att.key.weight att.value.weight att.output.weight
    att.ln_x.weight att.ln_x.bias ffn.x_k ffn.key.weight ffn.value.weight""".split()


def test_tensors_have_the_order_of_the_released_files(tmp_path):
    config = ModelConfig(vocab_size=11, num_blocks=2, num_attention_blocks=0, width=64)
    params = random_tensors(param_shapes(config))
    expected = ["emb.weight", "blocks.0.ln0.weight", "blocks.0.ln0.bias"]
    expected += [f"blocks.{i}.{name}" for i in range(2) for name in RELEASED_BLOCK]
    expected += ["ln_out.weight", "ln_out.bias", "head.weight"]
    write_own_safetensors(tmp_path / "ours.safetensors", config, "", params)
    run(tmp_path / "ours.safetensors", tmp_path / "x.pth")
    assert list(open_pth(tmp_path / "x.pth")) == expected
    # A file of sorted names, as the safetensors package writes it, has no order of its own.
    tensors = read_all(open_pth(tmp_path / "x.pth"))
    safetensors.numpy.save_file(tensors, tmp_path / "sorted.safetensors")
    run(tmp_path / "sorted.safetensors", tmp_path / "y.pth")
    assert list(open_pth(tmp_path / "y.pth")) == expected


def test_tensors_keep_the_order_of_their_source(official, tmp_path):
    turned = dict(reversed(official.items()))
    write_pth(tmp_path / "source.pth", turned)
    run(tmp_path / "source.pth", tmp_path / "ours.safetensors")
    run(tmp_path / "ours.safetensors", tmp_path / "back.pth")
    assert list(open_pth(tmp_path / "back.pth")) == list(turned)
    config, params, info = official_to_params(turned)
    with pytest.raises(ConversionError, match="order of the official file"):
        params_to_official(config, params, dataclasses.replace(info, order=info.order[1:]))


def test_settings_are_kept_or_their_loss_is_said(official, tmp_path, capsys):
    config, params, info = official_to_params(official)
    config = dataclasses.replace(config, chunk_size=32, top_k=2, selector="max", selector_blocks=4)
    write_own_safetensors(tmp_path / "ours.safetensors", config, "", params, info)
    run(tmp_path / "ours.safetensors", tmp_path / "again.safetensors")
    assert "warning" not in capsys.readouterr().err
    assert open_own_safetensors(tmp_path / "again.safetensors").config == config
    for arguments in (["x.pth"], ["x.safetensors", "--to", "official"]):
        run(tmp_path / "ours.safetensors", tmp_path / arguments[0], *arguments[1:])
        error = capsys.readouterr().err
        for lost in ("chunk_size: 32 -> 2048", "top_k: 2 -> 3", "selector: 'max' -> 'mean'",
                     "selector_blocks: 4 -> 8"):  # fmt: skip
            assert lost in error
        assert error.count("warning") == 1 and "low_rank" not in error
    run(tmp_path / "x.pth", tmp_path / "y.pth")
    assert "warning" not in capsys.readouterr().err


def test_a_tokenizer_is_named_only_if_the_vocabulary_holds_its_ids(tmp_path, capsys):
    for vocab, asked, expected in [
        (65529, "auto", ""),
        (65530, "auto", "world"),
        (65536, "auto", "world"),
        (257, "auto", "byte"),
        (256, "byte", "error"),
        (65529, "world", "error"),
        (65530, "byte", "byte"),
    ]:
        source, target = tmp_path / "source.pth", tmp_path / "x.safetensors"
        shape = {"width": 4, "heads": 1, "ffn": 4, "ranks": {"w": 1, "a": 1, "v": 1, "g": 1}}
        write_pth(source, official_tensors(vocab=vocab, blocks=1, attention_blocks=0, **shape))
        if expected == "error":
            error = fails(capsys, source, target, "--tokenizer", asked)
            assert f"the {asked} tokenizer has" in error and str(vocab) in error
        else:
            run(source, target, "--tokenizer", asked)
            assert open_own_safetensors(target).tokenizer_name == expected


def test_stored_data_is_verified_when_it_is_read(official, tmp_path):
    config, params, info = official_to_params(official)
    path = tmp_path / "x.safetensors"
    write_own_safetensors(path, config, "", params, info)
    whole = path.read_bytes()
    data_start = 8 + int.from_bytes(whole[:8], "little")

    damaged = bytearray(whole)
    place = whole.index(params["blocks.time_mix.w1"].tobytes(), data_start) + 9
    damaged[place] ^= 1
    path.write_bytes(damaged)
    opened = open_own_safetensors(path).params
    for row in (None, 0, 1):  # the damage is in row 0; a row is only as good as its tensor
        with pytest.raises(ConversionError, match="x.safetensors: the data of blocks.time_mix.w1"):
            opened["blocks.time_mix.w1"].read(row)
    assert np.array_equal(opened["embed"].read(), params["embed"])
    with pytest.raises(ConversionError, match="is not what was written"):
        load_checkpoint(path)

    for old, new in ((b'"chunk_size\\": 2048', b'"chunk_size\\": 2049'), (b"w1", b"w2")):
        assert old in whole[:data_start]
        path.write_bytes(whole.replace(old, new, 1))
        with pytest.raises(ConversionError, match="header is not the one that was written|twice"):
            open_own_safetensors(path)

    path.write_bytes(whole)
    tensors, metadata = open_safetensors(path)
    safetensors.numpy.save_file(read_all(tensors), path, metadata)  # as older versions wrote it
    assert_identical(read_all(open_own_safetensors(path).params), params)


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "model.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_taken_off_and_said(wrapper, official, tmp_path, caplog):
    write_pth(tmp_path / "x.pth", {wrapper + name: t for name, t in official.items()})
    run(tmp_path / "x.pth", tmp_path / "back.pth")
    assert_identical(read_all(open_pth(tmp_path / "back.pth")), official)
    assert "begins with '" in caplog.text and "taken off" in caplog.text
    one_bare = {wrapper + name: t for name, t in official.items()} | {"bare": np.ones(3)}
    with pytest.raises(ConversionError):
        official_to_params(one_bare)


def test_a_pointer_of_git_lfs_is_explained(tmp_path, capsys):
    for name in ("x.safetensors", "x.pth"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        error = fails(capsys, tmp_path / name, tmp_path / "y.pth")
        assert name in error and "Git LFS pointer" in error and "git lfs pull" in error


@pytest.mark.parametrize("name", ["x[red]y", "x[/b]y", "x:smile:y"])
def test_paths_are_no_markup(name, official, tmp_path, capsys):
    folder = tmp_path / name
    folder.mkdir(parents=True)
    write_pth(folder / "source.pth", official)
    run(folder / "source.pth", folder / "ours.safetensors")
    shown = name.encode(errors="backslashreplace").decode()
    assert f"{shown}/ours.safetensors: our layout" in capsys.readouterr().err


def test_tensor_names_are_no_markup_in_the_progress_display(tmp_path, capsys):
    write_pth(tmp_path / "x.pth", {"[/b]": np.ones(3, np.float32)})
    assert "no tensors of RWKV-7 blocks" in fails(capsys, tmp_path / "x.pth", tmp_path / "y.pth")


def test_a_full_disk_is_one_line_and_leaves_nothing(official, tmp_path, capsys):
    write_pth(tmp_path / "source.pth", official)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name in ("y.pth", "y.safetensors"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (10000, hard))
        try:
            error = fails(capsys, tmp_path / "source.pth", tmp_path / name)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert f"error: cannot write {tmp_path / name}: File too large" in error
        assert [p.name for p in tmp_path.iterdir()] == ["source.pth"]


def test_a_run_without_a_checkpoint_is_explained(tmp_path, capsys):
    config = Config(ModelConfig.tiny(), (Stage("short", 8, 1, 1, 1e-3),))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(to_dict(config)))
    error = fails(capsys, tmp_path / "run", tmp_path / "x.pth")
    assert f"{tmp_path / 'run'} is a training run that has saved no checkpoint yet" in error


def test_a_conversion_of_official_files_keeps_whatever_is_not_ours(tmp_path):
    """Metadata of other programs does not make a file ours, nor hashes."""
    tensors = official_tensors(blocks=L)
    write_safetensors(tmp_path / "x.safetensors", tensors, {"format": "pt"})
    opened, metadata = open_tensors(tmp_path / "x.safetensors")
    assert metadata == {"format": "pt"}
    assert_identical(read_all(opened), tensors)
    assert_identical(safetensors.numpy.load_file(tmp_path / "x.safetensors"), tensors)
