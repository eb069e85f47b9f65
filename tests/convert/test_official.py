"""The official layout: configuration from shapes, values in their places, exact round trips."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from rwkvx_jax.checkpoint import flat
from rwkvx_jax.config import ModelConfig
from rwkvx_jax.convert.layout import param_shapes
from rwkvx_jax.convert.official import (
    OfficialInfo,
    lost_in_official,
    official_to_params,
    open_official,
    params_to_official,
)
from rwkvx_jax.convert.pth import open_pth
from rwkvx_jax.convert.tensors import DTYPES, ConversionError, as_lazy
from rwkvx_jax.model import abstract_model, get_params
from tests.convert.convert_checkpoints import (
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
    edit,
    official_shapes,
    official_tensors,
    random_tensors,
    read_all,
)
from tests.helpers import shared_path


def test_configuration_is_read_off_the_shapes():
    tensors = official_tensors()
    config, params, info = official_to_params(tensors)
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
    assert info == OfficialInfo("rwkv.", False, "float32", {}, tuple(tensors))
    assert {n: p.shape for n, p in params.items()} == param_shapes(config)


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


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_attention_blocks": 0},
        {"key_conv": 3},
        {"num_attention_blocks": 0, "key_conv": 3},
        {"learned_state": True},
        {"head_size": 16, "ffn_width": 96, "low_rank_override": (3, 4, 5, 6)},
    ],
)
def test_the_table_knows_every_parameter_of_the_model(changes):
    config = ModelConfig(vocab_size=300, num_blocks=4, num_attention_blocks=2, width=128)
    config = dataclasses.replace(config, **changes)
    params = get_params(abstract_model(config))
    assert {name: leaf.shape for name, leaf in flat(params)} == param_shapes(config)


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


@pytest.mark.parametrize("attention_blocks", [0, M])
def test_learned_states_have_the_names_of_rwkv_peft(attention_blocks):
    """One tensor [H, V, K] a block, beside those of a model without them."""
    states = {f"blocks.{i}.att.time_state": (H, K, K) for i in range(L)}
    shapes = official_shapes(attention_blocks=attention_blocks, prefix="")
    tensors = random_tensors(shapes | states)
    config, params, info = official_to_params(tensors)
    assert config.learned_state and config.num_attention_blocks == attention_blocks
    for i in range(L):
        theirs = tensors[f"blocks.{i}.att.time_state"]
        assert np.array_equal(params["blocks.time_mix.initial_state"][i], theirs)
    assert_identical(read_all(params_to_official(config, params, info)), tensors)
    official = params_to_official(config, params)  # as a run of ours is written
    assert {n for n in official if "time_state" in n} == {
        ("rwkv." if attention_blocks else "") + name for name in states
    }
    assert lost_in_official(config, official) == []
    del tensors["blocks.1.att.time_state"]
    with pytest.raises(ConversionError, match=r"missing \(1\): blocks.1.att.time_state"):
        official_to_params(tensors)


def test_a_key_convolution_has_no_official_form():
    config = ModelConfig(
        vocab_size=300, num_blocks=2, num_attention_blocks=1, width=128, key_conv=3
    )
    params = {n: np.zeros(shape, np.float32) for n, shape in param_shapes(config).items()}
    with pytest.raises(ConversionError, match="key_conv=3 has no official form"):
        params_to_official(config, params)
