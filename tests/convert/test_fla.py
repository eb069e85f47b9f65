"""flash-linear-attention's RWKV-7 directories, old and new, against the official layout."""

import dataclasses
import json

import numpy as np
import pytest

from rwkvx_jax.convert.load import open_checkpoint
from rwkvx_jax.convert.official import open_official
from rwkvx_jax.convert.pth import write_pth
from rwkvx_jax.convert.tensors import ConversionError
from tests.convert.convert_checkpoints import (
    BF16,
    TINY_CONFIG,
    D,
    K,
    assert_identical,
    edit,
    fla_directory,
    fla_tensors,
    official_tensors,
    read_all,
    rwkv7,
)


@pytest.mark.parametrize("dtype", [np.float32, BF16])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("first_value_residual", [False, True])
def test_fla_equals_the_official_file(dtype, fused, first_value_residual, tmp_path):
    official = rwkv7(dtype=dtype, first_value_residual=first_value_residual)
    tensors = fla_tensors(official, fused=fused, wrapped=first_value_residual)
    assert fused == any(n.endswith("x_x") for n in tensors)
    config, _, params, info, *_ = open_checkpoint(fla_directory(tmp_path / "model", tensors))
    expected_config, expected, expected_info = open_official(official)
    assert config == expected_config
    assert info == dataclasses.replace(expected_info, order=())
    assert_identical(read_all(params), read_all(expected))


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
    params = open_checkpoint(tmp_path).params
    assert np.array_equal(params["head.weight"].read(), params["embed"].read().T)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "mamba2"}, "model_type is 'mamba2'"),
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
        open_checkpoint(folder)


def test_a_single_file_does_not_tell_the_options(tmp_path):
    """Its epsilon is in the config.json: the file alone is refused."""
    folder = fla_directory(tmp_path / "model", fla_tensors(rwkv7()))
    with pytest.raises(ConversionError, match="name the directory that holds both"):
        open_checkpoint(folder / "model.safetensors")


def test_bad_fla_tensors_are_named(tmp_path):
    tensors = fla_tensors(rwkv7())
    changes = {
        "model.layers.1.attn.k_k": None,
        "model.layers.2.attn.w_lora.lora.0.weight": np.ones((128, 5), np.float32),
        "model.layers.0.attn.rotary": np.ones(3, np.float32),
    }
    with pytest.raises(ConversionError) as caught:
        open_checkpoint(fla_directory(tmp_path / "a", edit(tensors, changes)))
    for part in ("missing (1): model.layers.1.attn.k_k", "extra (1): model.layers.0.attn.rotary",
                 "model.layers.2.attn.w_lora.lora.0.weight has shape (128, 5)"):  # fmt: skip
        assert part in str(caught.value)
    fused = edit(tensors, {"model.layers.0.attn.x_x": np.ones((5, 128), np.float32)})
    with pytest.raises(ConversionError, match=r"x_x has shape \(5, 128\)"):
        open_checkpoint(fla_directory(tmp_path / "b", fused))
    small = fla_tensors(official_tensors(attention_blocks=0, prefix=""))
    options = TINY_CONFIG | {"hidden_size": D, "head_dim": K}
    with pytest.raises(ConversionError, match="head_dim 16, .* epsilon 0.00016"):
        open_checkpoint(fla_directory(tmp_path / "c", small, options))
