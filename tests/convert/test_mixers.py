"""Models of other mixers: files of ours hold them, the original's layouts do not."""

import dataclasses
import json

import numpy as np
import pytest

from rwkvx_jax import load_model
from rwkvx_jax.config import Config, ConfigError, ModelConfig, Stage
from rwkvx_jax.convert.__main__ import main
from rwkvx_jax.convert.layout import param_shapes
from rwkvx_jax.convert.load import open_checkpoint
from rwkvx_jax.convert.own import Trained, open_own_safetensors, write_own_safetensors
from rwkvx_jax.convert.tensors import ConversionError
from rwkvx_jax.expand_checkpoint import main as expand_checkpoint
from rwkvx_jax.model import get_params
from rwkvx_jax.training.initial import load_initial_params
from tests.convert.convert_checkpoints import assert_identical, random_tensors, read_all
from tests.training.training_cases import one_device_mesh

CONFIG = ModelConfig(
    vocab_size=257, num_blocks=2, num_attention_blocks=0, width=32, head_size=16, mixer="mamba2"
)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.safetensors"
    params = random_tensors(param_shapes(CONFIG))
    write_own_safetensors(path, CONFIG, "byte", params, trained=Trained(9, 64))
    return path


def test_files_and_directories_of_ours(source, tmp_path, capsys):
    own = open_own_safetensors(source)
    assert own.config == CONFIG and "blocks.time_mix.conv" in own.params
    params = read_all(own.params)
    model = load_model(source)
    gate = get_params(model)["blocks"]["time_mix"]["gate"]
    np.testing.assert_array_equal(gate, params["blocks.time_mix.gate"])
    main([str(source), str(tmp_path / "hub"), "--to", "hub"])
    assert "- rwkv\n- mamba2\n" in (tmp_path / "hub/README.md").read_text()
    options = json.loads((tmp_path / "hub/config.json").read_text())
    assert options["model_type"] == "rwkvx" and "decay_low_rank_dim" not in options
    exported = open_checkpoint(tmp_path / "hub")
    assert exported.layout == "ours" and exported.config == CONFIG
    assert_identical(read_all(exported.params), params)
    main(["--inspect", str(source)])
    assert "2 Mamba-2 blocks" in capsys.readouterr().out
    del params["blocks.time_mix.conv"]
    with pytest.raises(ConversionError, match=r"missing \(1\): blocks.time_mix.conv"):
        write_own_safetensors(tmp_path / "less.safetensors", CONFIG, "byte", params)


@pytest.mark.parametrize("name, flags", [("a.pth", ()), ("a.safetensors", ("--to", "official"))])
def test_there_is_no_official_form(source, name, flags, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(source), str(tmp_path / name), *flags])
    message = " ".join(capsys.readouterr().err.split())
    assert "mixer='mamba2' has no official form" in message and "--to ours" in message
    assert not (tmp_path / name).exists()


def test_expansion(source, tmp_path, capsys):
    hybrid = tmp_path / "hybrid.safetensors"
    expand_checkpoint([str(source), str(hybrid), "--blocks", "1"])
    assert "2 Mamba-2 blocks" in capsys.readouterr().err
    tokens = np.arange(40, dtype=np.int32)[None]
    np.testing.assert_array_equal(load_model(source)(tokens), load_model(hybrid)(tokens))
    with pytest.raises(SystemExit):
        expand_checkpoint([str(source), str(hybrid), "--blocks", "1", "--attention-init", "copy"])
    assert 'other shapes with the mixer "mamba2"' in " ".join(capsys.readouterr().err.split())


def test_training_starts_from_no_other_mixer(source):
    stage = Stage("only", 64, 4, 10, 1e-3, expanded=False)
    load_initial_params(source, Config(CONFIG, (stage,)), one_device_mesh())
    other = dataclasses.replace(CONFIG, mixer="kda")
    with pytest.raises(ConfigError, match="model.mixer: mamba2 there, kda in the config"):
        load_initial_params(source, Config(other, (stage,)), one_device_mesh())
