"""Transformers in the layouts of Llama and Qwen2: what they compute, and what is refused.

The reference arrays were made by transformers' own models of random weights.
"""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkvx_jax import load_model
from rwkvx_jax.checkpoint import flat, nested
from rwkvx_jax.config import ModelConfig, RunConfig
from rwkvx_jax.convert.__main__ import Options, inspect, main
from rwkvx_jax.convert.llama import llama_config, llama_slots
from rwkvx_jax.convert.load import open_checkpoint
from rwkvx_jax.convert.safetensors_file import write_safetensors
from rwkvx_jax.convert.tensors import ConversionError
from rwkvx_jax.model import get_params, with_params
from tests.helpers import assert_close, shared_path

FLOAT32 = RunConfig(compute_dtype="float32")
LLAMA = {
    "model_type": "llama",
    "vocab_size": 13,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
}
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def directory(folder, options, tensors):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(options))
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    return folder


def tensors_of(options, dtype=np.float32):
    """Random tensors of a model, named and shaped by hand."""
    width, heads, inner = (
        options[name] for name in ("hidden_size", "num_attention_heads", "intermediate_size")
    )
    kv = options.get("num_key_value_heads", heads) * (width // heads)
    shapes = {"model.embed_tokens.weight": (options["vocab_size"], width)}
    for i in range(options["num_hidden_layers"]):
        layer = {
            "input_layernorm.weight": (width,),
            "post_attention_layernorm.weight": (width,),
            "self_attn.q_proj.weight": (width, width),
            "self_attn.k_proj.weight": (kv, width),
            "self_attn.v_proj.weight": (kv, width),
            "self_attn.o_proj.weight": (width, width),
            "mlp.gate_proj.weight": (inner, width),
            "mlp.up_proj.weight": (inner, width),
            "mlp.down_proj.weight": (width, inner),
        }
        if options["model_type"] == "qwen2":
            sizes = {"q": width, "k": kv, "v": kv}
            layer |= {f"self_attn.{x}_proj.bias": (size,) for x, size in sizes.items()}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (width,)
    if not options.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (options["vocab_size"], width)
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def reference(request, tmp_path_factory):
    """A converted model, and what transformers computed with it."""
    source = shared_path("reference", "neighbours", f"model_{request.param}")
    options = json.loads((source / "config.json").read_text())
    weights, arrays = (dict(np.load(source / f"{name}.npz")) for name in ("weights", "ref"))
    folder = tmp_path_factory.mktemp("models")
    found = directory(folder / "theirs", options, weights)
    main([str(found), str(folder / "ours.safetensors")])
    return load_model(folder / "ours.safetensors", run=FLOAT32), arrays


def test_logits_and_loss_are_those_of_transformers(reference):
    model, arrays = reference
    logits = np.asarray(jax.jit(lambda params: with_params(model, params)(arrays["ids"]))(
        get_params(model)
    ))  # fmt: skip
    assert_close(logits, arrays["logits"], rel=1e-5)
    assert_close(cross_entropy(logits, arrays["ids"]), arrays["loss"], rel=1e-5)


def test_gradients_are_those_of_transformers(reference):
    model, arrays = reference
    loss = lambda params: cross_entropy(with_params(model, params)(arrays["ids"]), arrays["ids"])
    found = dict(flat(jax.jit(jax.grad(loss))(get_params(model))))
    names = [name for name in arrays if name.startswith("grad:")]
    places = {slot.name: slot for slot in llama_slots(model.config)}
    assert len(names) == 3
    for name in names:
        slot = places[name.removeprefix("grad:")]
        gradient = slot.encode(np.asarray(found[slot.parameter][slot.row]))
        assert_close(gradient, arrays[name], rel=2e-5, name=name)


def test_reading_in_pieces_is_the_whole_pass(reference):
    model, arrays = reference
    tokens, whole = arrays["ids"], arrays["logits"]
    params, bound = get_params(model), lambda params: with_params(model, params)
    prefill = jax.jit(lambda params, *given: bound(params).prefill(*given))
    decode = jax.jit(lambda params, *given: bound(params).decode(*given))
    cache, at = model.init_cache(2, tokens.shape[1]), 0
    for size in (17, 17):
        logits, cache = prefill(params, tokens[:, at : at + size], cache)
        at += size
        assert_close(logits, whole[:, at - 1], rel=1e-5, name=f"up to {at}")
    for t in range(at, tokens.shape[1]):
        logits, cache = decode(params, tokens[:, t], cache)
        assert_close(logits, whole[:, t], rel=1e-5, name=f"decoded {t}")


def cross_entropy(logits, tokens):
    log = jax.nn.log_softmax(jnp.asarray(logits)[:, :-1])
    return -jnp.take_along_axis(log, jnp.asarray(tokens)[:, 1:, None], axis=-1).mean()


def test_the_config_is_read_from_the_options():
    expected = ModelConfig(
        vocab_size=13,
        num_blocks=0,
        num_attention_blocks=3,
        width=24,
        head_size=4,
        ffn_width=40,
        backbone="llama",
        attention="full",
        num_kv_heads=2,
        rope_theta=500000.0,
    )
    assert llama_config(LLAMA) == expected
    replaced = lambda **changes: dataclasses.replace(expected, **changes)
    qwen = LLAMA | {"model_type": "qwen2", "tie_word_embeddings": True, "sliding_window": 4096}
    assert llama_config(qwen) == replaced(qkv_bias=True, tied_embeddings=True)
    scaled = replaced(rope_scaling=(32.0, 1.0, 4.0, 8192.0))
    assert llama_config(LLAMA | {"rope_scaling": LLAMA_3}) == scaled
    parameters = LLAMA_3 | {"rope_theta": 500000.0}
    del (new := dict(LLAMA))["rope_theta"]
    assert llama_config(new | {"rope_parameters": parameters}) == scaled
    assert llama_config(LLAMA | {"rope_scaling": None, "head_dim": 4}) == expected
    assert llama_config(new).rope_theta == 10000.0
    del new["num_key_value_heads"], new["rms_norm_eps"]
    assert llama_config(new).kv_heads == 6 and llama_config(new).norm_eps == 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "type 'linear'.*only has 'llama3'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is None"),
        ({"rope_scaling": LLAMA_3 | {"factor": 0.5}}, "no valid model.*rope_scaling is .0.5"),
        ({"rope_scaling": 3}, "rope_scaling is 3"),
        ({"use_sliding_window": True}, "use_sliding_window = True .only False"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types sliding_attention"),
        ({"hidden_act": "gelu", "mlp_bias": True}, "hidden_act = 'gelu'.*mlp_bias = True"),
        ({"attention_bias": True}, "attention_bias = True .only False"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = "),
        ({"head_dim": 8}, "6 heads of head_dim 8 are not hidden_size 24"),
        ({"num_key_value_heads": 4}, "no valid model.*num_kv_heads is 4.*6 heads"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers is '3': expected a whole number"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"rms_norm_eps": True}, "rms_norm_eps is True: expected a number"),
        ({"model_type": "mistral"}, "'mistral'; only RWKV-7, Llama and Qwen2"),
    ],
)
def test_what_our_model_lacks_is_refused(options, message, tmp_path):
    """The tensors are not looked at."""
    folder = directory(tmp_path / "model", LLAMA | options, {"x": np.zeros(3, np.float32)})
    with pytest.raises(ConversionError, match=f"config.json: .*{message}"):
        open_checkpoint(folder)


def test_every_tensor_finds_its_place(tmp_path):
    """Old files' frequencies and a tied head that is stored all the same are left out."""
    options = LLAMA | {"model_type": "qwen2", "tie_word_embeddings": True}
    tensors = tensors_of(options)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    found = open_checkpoint(directory(tmp_path / "model", options, tensors))
    assert (found.layout, found.tokenizer_name, found.info) == ("llama", "", None)
    params = {name: tensor.read() for name, tensor in found.params.items()}
    assert sum(array.size for array in params.values()) == found.config.num_parameters
    assert np.array_equal(params["head.weight"], tensors["model.embed_tokens.weight"])
    for i in range(3):
        block = {n.partition(".")[2]: a[i] for n, a in params.items() if n.startswith("attention_")}
        theirs = lambda name, i=i: tensors[f"model.layers.{i}.{name}"]
        assert np.array_equal(block["ln1.scale"], theirs("input_layernorm.weight"))
        assert np.array_equal(block["ln2.scale"], theirs("post_attention_layernorm.weight"))
        assert np.array_equal(block["attention.key"], theirs("self_attn.k_proj.weight").T)
        assert np.array_equal(block["attention.value_bias"], theirs("self_attn.v_proj.bias"))
        assert np.array_equal(block["channel_mix.gate"], theirs("mlp.gate_proj.weight").T)
        assert np.array_equal(block["channel_mix.key"], theirs("mlp.up_proj.weight").T)
        assert np.array_equal(block["channel_mix.value"], theirs("mlp.down_proj.weight").T)


def test_bad_tensors_are_named(tmp_path):
    tensors = tensors_of(LLAMA)
    tensors["model.layers.1.self_attn.q_proj.bias"] = np.ones(24, np.float32)
    tensors["model.layers.2.mlp.up_proj.weight"] = np.ones((24, 40), np.float32)
    del tensors["lm_head.weight"]
    with pytest.raises(ConversionError) as caught:
        open_checkpoint(directory(tmp_path / "model", LLAMA, tensors))
    for part in (
        "missing (1): lm_head.weight",
        "extra (1): model.layers.1.self_attn.q_proj.bias",
        "model.layers.2.mlp.up_proj.weight has shape (24, 40), not (40, 24)",
    ):
        assert part in str(caught.value)


def test_a_file_alone_and_an_official_destination_are_refused(tmp_path):
    folder = directory(tmp_path / "model", LLAMA, tensors_of(LLAMA))
    with pytest.raises(ConversionError, match="tensors of Llama or Qwen2.*name the directory"):
        open_checkpoint(folder / "model.safetensors")
    with pytest.raises(SystemExit):
        main([str(folder), str(tmp_path / "x.pth")])
    assert not (tmp_path / "x.pth").exists()


def test_converted_files_and_directories_are_the_same_model(tmp_path, capsys):
    """Through our layout and a directory for the Hub; described on the way."""
    options = LLAMA | {"tie_word_embeddings": True, "rope_scaling": LLAMA_3}
    source = directory(tmp_path / "theirs", options, tensors_of(options))
    text = "\n".join(inspect(Options(source, inspect=True)))
    assert "Transformer: 3 attention blocks, width 24, 6 heads of 4 (2 of keys and values)" in text
    assert "tensors of Llama's names" in text
    main([str(source), str(tmp_path / "ours.safetensors")])
    main([str(tmp_path / "ours.safetensors"), str(tmp_path / "hub"), "--to", "hub"])
    written = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert "3 attention blocks, width 24" in written
    first = open_checkpoint(source)
    for path in ("ours.safetensors", "hub"):
        again = open_checkpoint(tmp_path / path)
        assert again.config == first.config and again.layout == "ours"
        for name, tensor in first.params.items():
            assert np.array_equal(again.params[name].read(), tensor.read()), name
    assert nested({name: 0 for name in first.params}).keys() == {
        "attention_blocks",
        "head",
        "ln_out",
    }
