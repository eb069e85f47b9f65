"""Official and flash-linear-attention layouts: values, round trips, bad input, the command line."""

import dataclasses
import json
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from rwkvx_jax.config import ModelConfig
from rwkvx_jax.convert.__main__ import main
from rwkvx_jax.convert.files import open_tensors, write_tensors
from rwkvx_jax.convert.fla import fla_to_params
from rwkvx_jax.convert.layout import check_params, param_shapes
from rwkvx_jax.convert.official import (
    OfficialInfo,
    official_to_params,
    open_official,
    params_to_official,
)
from rwkvx_jax.convert.own import (
    open_own_safetensors,
    read_own_safetensors,
    write_own_safetensors,
)
from rwkvx_jax.convert.pth import open_pth, write_pth
from rwkvx_jax.convert.safetensors_file import open_safetensors, write_safetensors
from rwkvx_jax.convert.tensors import DTYPES, ConversionError, as_lazy
from tests.convert_checkpoints import (
    BF16,
    RANKS,
    D,
    F,
    H,
    K,
    L,
    M,
    W,
    assert_identical,
    fla_tensors,
    official_shapes,
    official_tensors,
    random_tensors,
    read_all,
)
from tests.helpers import shared_path

TINY_CONFIG = {
    "model_type": "rwkv7",
    "hidden_size": 128,
    "num_hidden_layers": L,
    "vocab_size": W,
    "head_dim": 64,
    "hidden_ratio": 4.0,
    "intermediate_size": None,
    "norm_eps": 1e-5,
    "norm_first": True,
    "hidden_act": "sqrelu",
    "attn": None,
    "value_dim": [128] * L,
}


# safetensors


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


# The official layout


def test_configuration_is_read_off_the_shapes():
    config, params, info = official_to_params(official_tensors())
    assert config == ModelConfig(
        vocab_size=W,
        num_blocks=L,
        num_attention_blocks=M,
        width=D,
        head_size=K,
        ffn_width=F,
        chunk_size=2048,
        top_k=3,
        low_rank_override=tuple(RANKS[p] for p in "wavg"),
    )
    assert info == OfficialInfo("rwkv.", False, "float32")
    assert {n: p.shape for n, p in params.items()} == param_shapes(config)
    given = official_to_params(official_tensors(), chunk_size=64, top_k=5)[0]
    assert given == dataclasses.replace(config, chunk_size=64, top_k=5)


@pytest.mark.parametrize(
    ("width", "rule", "ranks"),
    [
        (768, "rwkvx", (64, 64, 32, 128)),  # both formulas agree
        (512, "rwkvx", (32, 32, 32, 96)),
        (512, "rwkv_lm", (64, 64, 32, 128)),
        (1024, "rwkv_lm", (64, 64, 64, 160)),
        (2560, "rwkvx", (96, 96, 64, 320)),
        (2560, "rwkv_lm", (128, 128, 96, 256)),
    ],
)
def test_both_low_rank_formulas_are_recognised(width, rule, ranks):
    shapes = official_shapes(
        width=width,
        heads=width // 64,
        ffn=4 * width,
        blocks=2,
        ranks=dict(zip("wavg", ranks, strict=True)),
    )
    # Nothing is read, so one number can stand for every tensor.
    tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    config, _, _ = open_official(tensors)
    assert (config.low_rank, config.low_rank_override) == (rule, None)
    assert (config.ranks, config.ffn_width, config.head_size) == (ranks, 0, 64)


def test_one_block_has_no_value_residual_to_measure():
    tensors = official_tensors(blocks=1, attention_blocks=0, prefix="")
    config, params, info = official_to_params(tensors)
    assert config.low_rank_override == (RANKS["w"], RANKS["a"], 32, RANKS["g"])
    assert not params["blocks.time_mix.v1"].any()
    assert_identical(read_all(params_to_official(config, params, info)), tensors)


def test_values_arrive_in_their_places():
    tensors = official_tensors()
    _, params, _ = official_to_params(tensors)

    def theirs(name, stack=range(L), prefix="rwkv.blocks"):
        return np.stack([tensors[f"{prefix}.{i}.{name}"] for i in stack])

    expected = {
        "embed": tensors["rwkv.emb.weight"],
        "head.weight": tensors["rwkv.head.weight"].T,
        "ln0.scale": tensors["rwkv.blocks.0.ln0.weight"],
        "ln0.bias": tensors["rwkv.blocks.0.ln0.bias"],
        "ln_out.scale": tensors["rwkv.ln_out.weight"],
        "ln_out.bias": tensors["rwkv.ln_out.bias"],
        "blocks.time_mix.r_k": theirs("att.r_k"),
        "blocks.time_mix.ln_x.scale": theirs("att.ln_x.weight"),
        "blocks.time_mix.ln_x.bias": theirs("att.ln_x.bias"),
        "blocks.channel_mix.x_k": theirs("ffn.x_k")[:, 0, 0],
        "blocks.channel_mix.key": theirs("ffn.key.weight").swapaxes(1, 2),
        "blocks.channel_mix.value": theirs("ffn.value.weight").swapaxes(1, 2),
        "attention_blocks.channel_mix.x_k": theirs("ffn.x_k", range(M), "moba")[:, 0, 0],
    }
    for ln in ("ln1", "ln2"):
        expected[f"blocks.{ln}.scale"] = theirs(f"{ln}.weight")
        expected[f"blocks.{ln}.bias"] = theirs(f"{ln}.bias")
        expected[f"attention_blocks.{ln}.scale"] = theirs(f"{ln}.weight", range(M), "moba")
        expected[f"attention_blocks.{ln}.bias"] = theirs(f"{ln}.bias", range(M), "moba")
    for vector in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "k_k", "k_a", "w0", "a0"):
        expected[f"blocks.time_mix.{vector}"] = theirs(f"att.{vector}")[:, 0, 0]
    for matrix in ("w1", "w2", "a1", "a2", "g1", "g2"):
        expected[f"blocks.time_mix.{matrix}"] = theirs(f"att.{matrix}")
    for matrix in ("receptance", "key", "value", "output"):
        linear = f"att.{matrix}.weight"
        expected[f"blocks.time_mix.{matrix}"] = theirs(linear).swapaxes(1, 2)
        attention = theirs(linear, range(M), "moba").swapaxes(1, 2)
        expected[f"attention_blocks.attention.{matrix}"] = attention
    for matrix in ("key", "value"):
        attention = theirs(f"ffn.{matrix}.weight", range(M), "moba").swapaxes(1, 2)
        expected[f"attention_blocks.channel_mix.{matrix}"] = attention
    for name in ("v0", "v1", "v2"):
        ours = params.pop(f"blocks.time_mix.{name}")
        assert not ours[0].any()
        assert np.array_equal(ours[1:], theirs(f"att.{name}", range(1, L)).reshape(ours[1:].shape))
    assert set(params) == set(expected)
    for name, value in expected.items():
        assert np.array_equal(params[name], value), name


@pytest.mark.parametrize("dtype", [np.float32, BF16, np.float16])
@pytest.mark.parametrize("first_value_residual", [False, True])
@pytest.mark.parametrize(("prefix", "attention_blocks"), [("rwkv.", 1), ("rwkv.", 0), ("", 0)])
def test_round_trips_are_byte_identical(dtype, first_value_residual, prefix, attention_blocks):
    tensors = official_tensors(
        dtype,
        prefix=prefix,
        attention_blocks=attention_blocks,
        first_value_residual=first_value_residual,
    )
    config, params, info = official_to_params(tensors)
    assert {p.dtype for p in params.values()} == {np.dtype(np.float32)}
    back = params_to_official(config, params, info)
    assert list(back) == list(tensors)
    assert_identical(read_all(back), tensors)


@pytest.mark.parametrize("name", ["tiny_rwkvx.pth", "tiny_rwkv7.pth"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_reference_files_round_trip_through_our_layout(name, suffix, tmp_path):
    source = shared_path("reference", "parity", name)
    ours, back = tmp_path / "ours.safetensors", tmp_path / f"back{suffix}"
    assert main([str(source), str(ours)]) == 0
    assert main([str(ours), str(back)]) == 0
    assert_identical(read_all(open_tensors(back)[0]), read_all(open_pth(source)))
    config = open_own_safetensors(ours).config
    assert (config.num_blocks, config.width, config.vocab_size) == (4, 128, 300)
    assert config.num_attention_blocks == (2 if "rwkvx" in name else 0)
    assert (config.head_size, config.ffn_width, config.low_rank) == (64, 0, "rwkvx")


def test_real_reverse_weights_fit_the_layout():
    """A trained RWKV-7 under other names; its blocks, renamed, are the official ones."""
    path = ("reference", "parity", "rwkv7_reverse_weights", "260123_reverse_L2_only_rwkv7.pth")
    tensors = {}
    for name, tensor in open_pth(shared_path(*path)).items():
        module, _, inner = name.partition(".")
        outer = {"e": "emb", "lno": "ln_out", "o": "head"}
        if module in outer and name != "o.bias":
            tensors[f"{outer[module]}.{inner}"] = tensor
        kind = {"rwkv": "att", "ffn": "ffn", "ln": {"a": "ln1", "b": "ln2"}.get(module[-1])}
        kind = kind.get(module.rstrip("12abc"))
        if kind:
            layer = int(module.strip("rwkvflnabc")) - 1
            tensors[f"blocks.{layer}.{kind}.{inner}"] = tensor
    for part in ("weight", "bias"):
        tensors[f"blocks.0.ln0.{part}"] = tensors[f"ln_out.{part}"]
    config, params, info = official_to_params(tensors)
    assert (config.ranks, config.head_size, config.num_heads) == ((8, 8, 8, 8), 16, 2)
    assert info.first_value_residual and info.prefix == ""
    assert_identical(read_all(params_to_official(config, params, info)), read_all(as_lazy(tensors)))


def test_mixed_dtypes_come_back():
    tensors = official_tensors(BF16)
    for name in ("rwkv.blocks.1.att.w0", "rwkv.emb.weight"):
        tensors[name] = official_tensors(seed=1)[name]
    config, params, info = open_official(tensors)
    assert info.other_dtypes == {"rwkv.blocks.1.att.w0": "float32", "rwkv.emb.weight": "float32"}
    assert params["blocks.time_mix.w0"].dtype == np.float32
    assert params["blocks.time_mix.w1"].dtype == BF16
    assert_identical(read_all(params_to_official(config, read_all(params), info)), tensors)


@pytest.mark.parametrize("attention_blocks", [0, M])
def test_our_own_models_are_written_as_the_trainers_write(attention_blocks):
    """Without a source file: RWKV-X has prefixes and no unused tensors, RWKV-7 the contrary."""
    config = official_to_params(official_tensors(attention_blocks=attention_blocks))[0]
    params = random_tensors(param_shapes(config))
    official = params_to_official(config, {n: jnp.asarray(p) for n, p in params.items()})
    hybrid = attention_blocks > 0
    expected = official_shapes(
        attention_blocks=attention_blocks,
        prefix="rwkv." if hybrid else "",
        first_value_residual=not hybrid,
    )
    assert {n: t.shape for n, t in official.items()} == expected
    half = params_to_official(config, params, dtype=DTYPES["bfloat16"])
    assert {t.dtype for t in read_all(half).values()} == {BF16}
    again = official_to_params(read_all(official))[1]
    if not hybrid:
        assert_identical(again, params)


def edit(tensors, changes):
    """A copy with tensors replaced, or removed where the change is None."""
    return {n: t for n, t in (tensors | changes).items() if t is not None}


BLOCK1 = "rwkv.blocks.1."


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        (
            {f"{BLOCK1}att.w0": None, "moba.0.ln1.bias": None, "rwkv.other": np.ones(3)},
            ["missing (2): moba.0.ln1.bias, rwkv.blocks.1.att.w0", "extra (1): rwkv.other"],
        ),
        (
            {f"{BLOCK1}att.w1": np.ones((D, 4)), f"{BLOCK1}ffn.key.weight": np.ones((D, F))},
            [f"att.w1 has shape ({D}, 4), not ({D}, 5)", "ffn.key.weight has shape (32, 48)"],
        ),
        ({"moba.0.ffn.x_k": np.ones(D)}, ["moba.0.ffn.x_k has shape (32,), not (1, 1, 32)"]),
        ({"rwkv.head.weight": np.ones((W + 1, D))}, ["head.weight has shape (12, 32)"]),
        ({f"{BLOCK1}att.r_k": np.ones((K, H))}, ["att.r_k has shape (16, 2), not (2, 16)"]),
        ({"rwkv.blocks.0.att.r_k": np.ones((3, 5))}, ["32 is not divisible", "5"]),
        ({"rwkv.blocks.0.att.v1": np.ones((D, 7))}, ["missing (2): rwkv.blocks.0.att.v0"]),
        ({"rwkv.emb.weight": None}, ["no tensor rwkv.emb.weight"]),
        ({"rwkv.emb.weight": np.ones(3)}, ["rwkv.emb.weight has shape (3,)"]),
        ({"rwkv.ln_out.bias": np.ones(D, np.int32)}, ["rwkv.ln_out.bias has dtype int32"]),
        ({"moba.1.ln1.bias": np.ones(D)}, ["num_attention_blocks 2 does not divide", "3"]),
    ],
)
def test_bad_official_tensors_are_all_listed(changes, messages):
    with pytest.raises(ConversionError) as caught:
        official_to_params(edit(official_tensors(), changes))
    for message in messages:
        assert message in str(caught.value)


def test_other_models_are_refused():
    with pytest.raises(ConversionError, match="no tensors of RWKV-7 blocks among the 1"):
        official_to_params({"model.layers.0.mlp.weight": np.ones((2, 2))})
    with pytest.raises(ConversionError, match="no tensors of RWKV-7 blocks among the 0"):
        official_to_params({})


def test_params_that_do_not_fit_are_all_listed():
    config, params, _ = official_to_params(official_tensors())
    changed = edit(params, {"embed": None, "other": np.ones(1), "ln_out.bias": np.ones(3)})
    with pytest.raises(ConversionError) as caught:
        params_to_official(config, changed)
    for part in ("missing (1): embed", "extra (1): other", "ln_out.bias has shape (3,), not (32,)"):
        assert part in str(caught.value)


def test_values_too_large_for_a_dtype_are_named():
    config, params, info = official_to_params(official_tensors())
    params["ln_out.scale"] = params["ln_out.scale"] * 1e6
    half = params_to_official(config, params, info, DTYPES["float16"])
    with pytest.raises(ConversionError, match="rwkv.ln_out.weight holds values.*float16"):
        half["rwkv.ln_out.weight"].read()
    half["rwkv.head.weight"].read()


# flash-linear-attention


def fla_directory(folder, tensors, options=TINY_CONFIG):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(options))
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


def rwkv7(**layout):
    """A random RWKV-7 with heads of 64, as flash-linear-attention's epsilon demands."""
    shape = {"width": 128, "heads": 2, "ffn": 512, "attention_blocks": 0, "prefix": ""}
    return official_tensors(**shape, **layout)


@pytest.mark.parametrize("dtype", [np.float32, BF16])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("first_value_residual", [False, True])
def test_fla_equals_the_official_file(dtype, fused, first_value_residual, tmp_path):
    official = rwkv7(dtype=dtype, first_value_residual=first_value_residual)
    tensors = fla_tensors(official, fused=fused, wrapped=first_value_residual)
    assert fused == any(n.endswith("x_x") for n in tensors)
    config, params, info = fla_to_params(fla_directory(tmp_path / "model", tensors))
    expected_config, expected, expected_info = official_to_params(official)
    assert config == expected_config
    assert info == expected_info
    assert_identical(params, expected)


def test_fla_torch_shards_and_tied_embeddings(tmp_path):
    tensors = fla_tensors(rwkv7())
    del tensors["lm_head.weight"]
    names = list(tensors)
    weight_map = {}
    for number, part in enumerate((names[:30], names[30:])):
        shard = f"pytorch_model-{number}.bin"
        write_pth(tmp_path / shard, {n: tensors[n] for n in part})
        weight_map |= dict.fromkeys(part, shard)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text(json.dumps(TINY_CONFIG | {"tie_word_embeddings": True}))
    _, params, _ = fla_to_params(tmp_path)
    assert np.array_equal(params["head.weight"], params["embed"].T)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"attn": {"layers": [1]}}, "attn = "),
        ({"norm_first": False, "hidden_act": "relu"}, "norm_first = False.*hidden_act = 'relu'"),
        ({"norm_eps": 1e-6}, "norm_eps = 1e-06"),
        ({"hidden_size": 64}, "hidden_size is 64, but the tensors say 128"),
        ({"num_hidden_layers": 5}, "num_hidden_layers is 5, but the tensors say 3"),
    ],
)
def test_other_fla_options_are_refused(options, message, tmp_path):
    folder = fla_directory(tmp_path / "model", fla_tensors(rwkv7()), TINY_CONFIG | options)
    with pytest.raises(ConversionError, match=message):
        fla_to_params(folder)


def test_bad_fla_tensors_are_named(tmp_path):
    tensors = fla_tensors(rwkv7())
    changes = {
        "model.layers.1.attn.k_k": None,
        "model.layers.2.attn.w_lora.lora.0.weight": np.ones((128, 5), np.float32),
        "model.layers.0.attn.rotary": np.ones(3, np.float32),
    }
    with pytest.raises(ConversionError) as caught:
        fla_to_params(fla_directory(tmp_path / "a", edit(tensors, changes)))
    for part in ("missing (1): model.layers.1.attn.k_k", "extra (1): model.layers.0.attn.rotary",
                 "model.layers.2.attn.w_lora.lora.0.weight has shape (128, 5)"):  # fmt: skip
        assert part in str(caught.value)
    fused = edit(tensors, {"model.layers.0.attn.x_x": np.ones((5, 128), np.float32)})
    with pytest.raises(ConversionError, match=r"x_x has shape \(5, 128\)"):
        fla_to_params(fla_directory(tmp_path / "b", fused))
    small = fla_tensors(official_tensors(attention_blocks=0, prefix=""))
    options = TINY_CONFIG | {"hidden_size": D, "head_dim": K}
    with pytest.raises(ConversionError, match="head_dim 16 .* epsilon 0.00016"):
        fla_to_params(fla_directory(tmp_path / "c", small, options))


# Our files and the command line


def test_our_file_holds_model_and_tokenizer(tmp_path):
    config, params, info = official_to_params(official_tensors(), chunk_size=64)
    path = tmp_path / "ours.safetensors"
    write_own_safetensors(path, config, "byte", params)
    read_config, tokenizer, read_params = read_own_safetensors(path)
    assert (read_config, tokenizer) == (config, "byte")
    assert_identical(read_params, params)
    assert open_own_safetensors(path).info is None
    half = read_own_safetensors(path, DTYPES["bfloat16"])[2]
    assert np.array_equal(half["embed"], params["embed"].astype(BF16))
    write_own_safetensors(path, config, "byte", params, info)
    assert open_own_safetensors(path).info == info


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
        (metadata | {"rwkvx_jax_format": "2"}, "format 2.*update"),
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
    assert main([str(source), str(ours), "--chunk-size", "32", "--top-k", "2"]) == 0
    own = open_own_safetensors(ours)
    assert (own.config.chunk_size, own.config.top_k, own.tokenizer_name) == (32, 2, "")
    assert {p.dtype for p in own.params.values()} == {np.dtype(dtype)}
    for suffix in (".pth", ".safetensors"):
        back = tmp_path / f"back{suffix}"
        assert main([str(ours), str(back)]) == 0
        assert_identical(read_all(open_tensors(back)[0]), tensors)
    assert "official layout" in capsys.readouterr().err


def test_command_line_options(tmp_path):
    tensors = official_tensors(vocab=257)
    source, ours = tmp_path / "source.pth", tmp_path / "ours.safetensors"
    write_pth(source, tensors)
    assert main([str(source), str(ours), "--dtype", "bfloat16"]) == 0
    own = open_own_safetensors(ours)
    assert own.tokenizer_name == "byte"
    assert {p.dtype for p in own.params.values()} == {BF16}
    args = ["--to", "ours", "--top-k", "7", "--dtype", "float32", "--tokenizer", "none"]
    assert main([str(ours), str(tmp_path / "again.safetensors"), *args]) == 0
    again = open_own_safetensors(tmp_path / "again.safetensors")
    assert (again.config.top_k, again.config.chunk_size, again.tokenizer_name) == (7, 2048, "")
    assert {p.dtype for p in again.params.values()} == {np.dtype(np.float32)}
    assert main([str(source), str(tmp_path / "half.pth"), "--dtype", "float16"]) == 0
    half = read_all(open_pth(tmp_path / "half.pth"))
    assert_identical(half, {n: t.astype(np.float16) for n, t in tensors.items()})


def test_command_line_converts_fla(tmp_path):
    official = rwkv7(dtype=BF16)
    folder = fla_directory(tmp_path / "model", fla_tensors(official, fused=True))
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.pth"
    assert main([str(folder), str(ours)]) == 0
    assert main([str(ours), str(back)]) == 0
    assert_identical(read_all(open_pth(back)), official)


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
        ("absent.pth", "x.safetensors", "does not exist"),
        ("source.pth", "x.npz", "safetensors"),
        ("damaged.pth", "x.safetensors", "CRC-32"),
        ("damaged.pth", "x.pth", "CRC-32"),
        ("short.pth", "x.safetensors", "missing (1): rwkv.ln_out.bias"),
    ]:
        assert main([str(tmp_path / source_name), str(out / target)]) == 1
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
        assert main([str(source), str(target)]) == 0
        source, target = target, source
    del tensors
    assert main([str(source), str(target)]) == 0  # imports and caches are not what is measured
    tracemalloc.start()
    assert main([str(source), str(target)]) == 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # A tensor, its transposed copy, and a constant for buffers and the progress display.
    assert peak < 2 * largest + 2e6, (peak, largest)
    check_params(*open_own_safetensors(tmp_path / "ours.safetensors")[0:3:2])
