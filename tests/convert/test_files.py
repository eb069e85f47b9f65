"""Safetensors, sharded checkpoints, our own files, and the command line over all of them."""

import json
import tracemalloc

import numpy as np
import pytest
import safetensors.numpy

from rwkvx_jax import checkpoint
from rwkvx_jax.config import Config, DataConfig, Stage
from rwkvx_jax.convert.__main__ import main
from rwkvx_jax.convert.files import open_tensors, write_tensors
from rwkvx_jax.convert.layout import check_params, param_shapes
from rwkvx_jax.convert.load import open_checkpoint
from rwkvx_jax.convert.official import official_to_params
from rwkvx_jax.convert.own import (
    open_own_safetensors,
    write_own_safetensors,
)
from rwkvx_jax.convert.pth import open_pth, write_pth
from rwkvx_jax.convert.safetensors_file import open_safetensors, write_safetensors
from rwkvx_jax.convert.tensors import DTYPES, ConversionError
from tests.convert.convert_checkpoints import (
    BF16,
    assert_identical,
    edit,
    fla_directory,
    fla_tensors,
    official_shapes,
    official_tensors,
    random_tensors,
    read_all,
    rwkv7,
    save_run,
)
from tests.helpers import shared_path


@pytest.mark.parametrize("dtype", ["float32", BF16, "float16", "float64", "int64", "uint8", "bool"])
def test_safetensors_round_trip_and_agree_with_the_package(dtype, tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"scalar": (), "odd": (5,), "empty": (0, 3), "cube": (2, 3, 4)}
    tensors = {n: (100 * rng.normal(size=s)).astype(dtype) for n, s in shapes.items()}
    tensors = {n: np.asarray(t) for n, t in tensors.items()} | {"byte": np.ones(3, np.uint8)}
    path = tmp_path / "x.safetensors"
    write_safetensors(path, tensors, {"who": "we"})
    opened, metadata = open_safetensors(path)
    assert metadata == {"who": "we"}
    assert_identical(read_all(opened), tensors)
    assert_identical(safetensors.numpy.load_file(path), tensors)
    assert np.array_equal(opened["cube"].read(1), tensors["cube"][1])


def test_sharded_checkpoints_are_one(tmp_path):
    tensors = official_tensors()
    names = list(tensors)
    weight_map = {n: f"model-{i % 2}.safetensors" for i, n in enumerate(names)}
    for shard in set(weight_map.values()):
        part = {n: tensors[n] for n in names if weight_map[n] == shard}
        safetensors.numpy.save_file(part, tmp_path / shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_identical(read_all(open_tensors(index)[0]), tensors)
    assert_identical(read_all(open_tensors(tmp_path)[0]), tensors)

    index.write_text(json.dumps({"weight_map": weight_map | {"absent": "model-0.safetensors"}}))
    with pytest.raises(ConversionError, match=r"\['absent'\] are not in the shards"):
        open_tensors(index)
    index.write_text(json.dumps({"weight_map": {"x": "model-7.safetensors"}}))
    with pytest.raises(ConversionError, match=r"\['model-7.safetensors'\] are missing"):
        open_tensors(index)
    index.write_text(json.dumps({"weight_map": {"x": "../secret.safetensors"}}))
    with pytest.raises(ConversionError, match="not plain names"):
        open_tensors(index)
    index.write_text("{}")
    with pytest.raises(ConversionError, match="weight_map"):
        open_tensors(index)


def test_unreadable_sources_are_named(tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b"\xff" * 5)
    (tmp_path / "other.npz").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for name, message in [
        ("cut.safetensors", "not a readable safetensors file"),
        ("other.npz", "unknown kind of file"),
        ("absent.pth", "does not exist"),
        ("folder", "holds no checkpoint"),
    ]:
        with pytest.raises(ConversionError, match=message):
            open_tensors(tmp_path / name)
    with pytest.raises(ConversionError, match="must end in"):
        write_tensors(tmp_path / "x.npz", {})


def test_our_file_holds_model_and_tokenizer(tmp_path):
    config, params, info = official_to_params(official_tensors())
    path = tmp_path / "ours.safetensors"
    write_own_safetensors(path, config, "byte", params)
    own = open_own_safetensors(path)
    assert (own.config, own.tokenizer_name, own.info) == (config, "byte", None)
    assert_identical(read_all(own.params), params)
    write_own_safetensors(path, config, "byte", params, info)
    assert open_own_safetensors(path).info == info


def test_any_checkpoint_opens_in_the_dtype_asked_for(tmp_path):
    tensors = rwkv7(dtype=BF16)
    write_pth(tmp_path / "official.pth", tensors)
    fla_directory(tmp_path / "fla", fla_tensors(tensors))
    main([str(tmp_path / "official.pth"), str(tmp_path / "ours.safetensors")])
    expected = official_to_params(tensors)[1]
    for name in ("official.pth", "fla", "ours.safetensors"):
        opened = open_checkpoint(tmp_path / name, dtype=DTYPES["float32"])
        assert (opened.config.chunk_size, opened.config.top_k) == (2048, 3)
        assert_identical(read_all(opened.params), expected)


def test_bad_files_of_ours_are_explained(tmp_path):
    config, params, _ = official_to_params(official_tensors())
    path = tmp_path / "ours.safetensors"
    write_safetensors(path, params)
    with pytest.raises(ConversionError, match="without our metadata.*convert"):
        open_own_safetensors(path)
    write_own_safetensors(path, config, "", params)
    tensors, metadata = open_safetensors(path)
    tensors = read_all(tensors)
    fields = json.loads(metadata["model_config"])
    for changed, message in [
        (metadata | {"rwkvx_jax_format": "3"}, "format 3.*update"),
        (
            metadata | {"model_config": json.dumps(fields | {"colour": 1})},
            r"unknown key \['colour'",
        ),
        (metadata | {"model_config": json.dumps(fields | {"width": 64})}, "has shape"),
        (metadata | {"model_config": "{"}, "ours.safetensors"),
    ]:
        write_safetensors(path, tensors, changed)
        with pytest.raises(ConversionError, match=message):
            open_own_safetensors(path)
    with pytest.raises(ConversionError, match="extra"):
        write_own_safetensors(path, config, "", params | {"x": np.ones(1)})


@pytest.mark.parametrize("dtype", [np.float32, BF16])
@pytest.mark.parametrize("source_suffix", [".pth", ".safetensors"])
def test_command_line_round_trip(dtype, source_suffix, tmp_path, capsys):
    tensors = official_tensors(dtype, first_value_residual=True)
    source, ours = tmp_path / f"source{source_suffix}", tmp_path / "ours.safetensors"
    write_tensors(source, tensors)
    main([str(source), str(ours), "--chunk-size", "32", "--top-k", "2"])
    own = open_own_safetensors(ours)
    assert (own.config.chunk_size, own.config.top_k, own.tokenizer_name) == (32, 2, "")
    assert {p.dtype for p in own.params.values()} == {np.dtype(dtype)}
    for suffix in (".pth", ".safetensors"):
        back = tmp_path / f"back{suffix}"
        main([str(ours), str(back), "--to", "official"])
        assert_identical(read_all(open_tensors(back)[0]), tensors)
    assert "official layout" in capsys.readouterr().err


def test_command_line_options(tmp_path):
    tensors = official_tensors(vocab=257)
    source, ours = tmp_path / "source.pth", tmp_path / "ours.safetensors"
    write_pth(source, tensors)
    main([str(source), str(ours), "--dtype", "bfloat16"])
    own = open_own_safetensors(ours)
    assert own.tokenizer_name == "byte"
    assert {p.dtype for p in own.params.values()} == {BF16}
    args = ["--to", "ours", "--top-k", "7", "--dtype", "float32", "--tokenizer", "none"]
    main([str(ours), str(tmp_path / "again.safetensors"), *args])
    again = open_own_safetensors(tmp_path / "again.safetensors")
    assert (again.config.top_k, again.config.chunk_size, again.tokenizer_name) == (7, 2048, "")
    assert {p.dtype for p in again.params.values()} == {np.dtype(np.float32)}
    main([str(source), str(tmp_path / "half.pth"), "--dtype", "float16"])
    half = read_all(open_pth(tmp_path / "half.pth"))
    assert_identical(half, {n: t.astype(np.float16) for n, t in tensors.items()})


def test_command_line_converts_fla(tmp_path):
    official = rwkv7(dtype=BF16)
    folder = fla_directory(tmp_path / "model", fla_tensors(official, fused=True))
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.pth"
    main([str(folder), str(ours)])
    main([str(ours), str(back)])
    assert_identical(read_all(open_pth(back)), official)


def test_command_line_converts_training_runs(tmp_path):
    model = official_to_params(official_tensors())[0]
    params = random_tensors(param_shapes(model))
    stages = (Stage("short", 8, 1, 1, 1e-3), Stage("long", 16, 1, 1, 1e-3))
    config = Config(model, stages, data=DataConfig(tokenizer="world"))
    save_run(tmp_path / "run", config, params)
    ours, official = tmp_path / "ours.safetensors", tmp_path / "official.pth"
    main([str(tmp_path / "run"), str(ours), "--to", "ours"])
    assert open_own_safetensors(ours).trained == (2, 16)
    loaded = checkpoint.load_checkpoint(ours)
    assert (loaded.step, loaded.trained_length) == (2, 16)
    main([str(ours), str(tmp_path / "again.safetensors"), "--to", "ours"])
    assert open_own_safetensors(tmp_path / "again.safetensors").trained == (2, 16)
    main([str(tmp_path / "run"), str(ours), "--to", "ours", "--step", "1"])
    own = open_own_safetensors(ours)
    # 11 ids are too few for the tokenizer that the run names.
    assert (own.config, own.tokenizer_name, own.trained) == (model, "", (1, 8))
    assert_identical(read_all(own.params), params)
    main([str(tmp_path / "run"), str(official), "--step", "1", "--dtype", "bfloat16"])
    tensors = read_all(open_pth(official))
    assert {n: t.shape for n, t in tensors.items()} == official_shapes()
    assert {t.dtype for t in tensors.values()} == {BF16}


def test_only_runs_have_steps(tmp_path, capsys):
    write_pth(tmp_path / "source.pth", official_tensors())
    with pytest.raises(SystemExit, match="1"):
        main([str(tmp_path / "source.pth"), str(tmp_path / "x.safetensors"), "--step", "1"])
    assert "--step 1 chooses among the checkpoints" in capsys.readouterr().err


def test_command_line_errors_leave_no_file(tmp_path, capsys):
    source, out = tmp_path / "source.pth", tmp_path / "out"
    out.mkdir()
    tensors = official_tensors()
    write_pth(source, tensors)
    damaged = tmp_path / "damaged.pth"
    raw = bytearray(source.read_bytes())
    raw[raw.rindex(tensors["moba.0.ffn.value.weight"].tobytes())] ^= 1
    damaged.write_bytes(raw)
    write_pth(tmp_path / "short.pth", edit(tensors, {"rwkv.ln_out.bias": None}))
    for source_name, target, message in [
        ("absent.pth", "x.safetensors", "no checkpoint at"),
        ("source.pth", "x.npz", "safetensors"),
        ("damaged.pth", "x.safetensors", "CRC-32"),
        ("damaged.pth", "x.pth", "CRC-32"),
        ("short.pth", "x.safetensors", "missing (1): rwkv.ln_out.bias"),
    ]:
        with pytest.raises(SystemExit, match="1"):
            main([str(tmp_path / source_name), str(out / target)])
        error = capsys.readouterr().err
        assert "error: " in error and message in error
        assert not list(out.iterdir())


@pytest.mark.parametrize("direction", ["ours", "official"])
def test_conversion_holds_one_tensor_at_a_time(direction, tmp_path):
    shape = {"width": 512, "heads": 8, "ffn": 2048, "blocks": 4, "attention_blocks": 4}
    tensors = official_tensors(BF16, **shape)
    largest = max(t.nbytes for t in tensors.values())
    assert sum(t.nbytes for t in tensors.values()) > 20 * largest
    source, target = tmp_path / "source.pth", tmp_path / "ours.safetensors"
    write_pth(source, tensors)
    if direction == "official":
        main([str(source), str(target)])
        source, target = target, source
    del tensors
    main([str(source), str(target)])  # imports and caches are not what is measured
    tracemalloc.start()
    main([str(source), str(target)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # A tensor, its transposed copy, and a constant for buffers and the progress display.
    assert peak < 2 * largest + 2e6, (peak, largest)
    own = open_own_safetensors(tmp_path / "ours.safetensors")
    check_params(param_shapes(own.config), own.params)


@pytest.mark.parametrize("name", ["tiny_rwkvx.pth", "tiny_rwkv7.pth"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_reference_files_round_trip_through_our_layout(name, suffix, tmp_path):
    source = shared_path("reference", "parity", name)
    ours, back = tmp_path / "ours.safetensors", tmp_path / f"back{suffix}"
    main([str(source), str(ours)])
    main([str(ours), str(back), "--to", "official"])
    assert_identical(read_all(open_tensors(back)[0]), read_all(open_pth(source)))
    config = open_own_safetensors(ours).config
    assert (config.num_blocks, config.width, config.vocab_size) == (4, 128, 300)
    assert config.num_attention_blocks == (2 if "rwkvx" in name else 0)
    assert (config.head_size, config.ffn_width, config.low_rank) == (64, 0, "rwkvx")
