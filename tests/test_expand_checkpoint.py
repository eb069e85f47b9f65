"""`python -m rwkvx_jax.expand_checkpoint`: a file of an RWKV-7 becomes one of a hybrid."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from rwkvx_jax.checkpoint import load_model, nested
from rwkvx_jax.config import Config, Stage
from rwkvx_jax.convert.layout import param_shapes
from rwkvx_jax.convert.own import open_own_safetensors
from rwkvx_jax.convert.pth import write_pth
from rwkvx_jax.convert.tensors import DTYPES
from rwkvx_jax.digest import flat
from rwkvx_jax.expand_checkpoint import main
from rwkvx_jax.training.expand import expand
from tests.convert.convert_checkpoints import (
    BF16,
    official_tensors,
    random_tensors,
    read_all,
    save_run,
)


@pytest.fixture
def base(tmp_path):
    """An official RWKV-7 of two blocks, as a file."""
    file = tmp_path / "base.pth"
    write_pth(file, official_tensors(prefix="", attention_blocks=0, blocks=2, vocab=257))
    return file


FLAGS = ["--chunk-size", "8", "--top-k", "2"]


@pytest.mark.parametrize("init", ["zero", "aligned"])
def test_the_hybrid_computes_what_the_base_computes(init, base, tmp_path):
    hybrid = tmp_path / "hybrid.safetensors"
    more = ["--attention-init", init, "--key-conv", "2", "--selector", "max", "--init-seed", "3"]
    main([str(base), str(hybrid), "--blocks", "2", *FLAGS, *more, "--selector-blocks", "4"])
    tokens = jnp.arange(40)[None] % 257
    model = load_model(hybrid)
    config = model.config
    assert (config.num_attention_blocks, config.chunk_size, config.top_k) == (2, 8, 2)
    assert (config.attention_init, config.key_conv, config.init_seed) == (init, 2, 3)
    assert (config.selector, config.selector_blocks) == ("max", 4)
    assert np.array_equal(model(tokens), load_model(base)(tokens))
    assert open_own_safetensors(hybrid).tokenizer_name == "byte"


@pytest.mark.parametrize("init", ["zero", "copy"])
def test_its_blocks_are_those_of_training(init, base, tmp_path):
    hybrid = tmp_path / "hybrid.safetensors"
    main([str(base), str(hybrid), "--blocks", "1", *FLAGS, "--attention-init", init])
    own = open_own_safetensors(hybrid)
    params = nested(read_all(own.params))
    del params["attention_blocks"]
    expected = dict(flat(expand(params, own.config)))
    assert expected.keys() == own.params.keys()
    for name, param in own.params.items():
        assert np.array_equal(param.read(), expected[name]), name


def test_new_blocks_have_the_dtype_of_the_source(tmp_path):
    base, hybrid = tmp_path / "base.pth", tmp_path / "hybrid.safetensors"
    write_pth(base, official_tensors(BF16, prefix="", attention_blocks=0, blocks=2))
    for flags, dtype in ([], "bfloat16"), (["--dtype", "float32"], "float32"):
        main([str(base), str(hybrid), "--blocks", "1", *flags])
        params = open_own_safetensors(hybrid).params
        assert {param.dtype for param in params.values()} == {DTYPES[dtype]}


@pytest.mark.slow
def test_a_step_of_a_run_is_expanded_with_its_settings(base, tmp_path):
    model = dataclasses.replace(load_model(base).config, chunk_size=16, top_k=5)
    params = random_tensors(param_shapes(model))
    stages = [Stage(name, 8, 1, 1, 1e-3, expanded=False) for name in ("a", "b")]
    run = save_run(tmp_path / "run", Config(model, tuple(stages)), params)
    hybrid = tmp_path / "hybrid.safetensors"
    main([str(run), str(hybrid), "--blocks", "1", "--top-k", "2", "--step", "1"])
    own = open_own_safetensors(hybrid)
    assert (own.config.chunk_size, own.config.top_k) == (16, 2)
    assert np.array_equal(own.params["embed"].read(), params["embed"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--blocks", "0"], "--blocks is 0: name at least one attention block"),
        (["--blocks", "3"], "num_attention_blocks 3 does not divide model.num_blocks 2"),
        (["--blocks", "1", "--top-k", "0"], "model.top_k is 0: it must be at least 1"),
        (["--blocks", "1", "--step", "4"], "--step 4 chooses among the checkpoints"),
    ],
)
def test_what_can_not_be_expanded_leaves_no_file(flags, message, base, tmp_path, capsys):
    hybrid = tmp_path / "hybrid.safetensors"
    with pytest.raises(SystemExit, match="1"):
        main([str(base), str(hybrid), *flags])
    assert message in capsys.readouterr().err and not hybrid.exists()


def test_hybrids_other_files_and_damage_are_refused(base, tmp_path, capsys):
    hybrid = tmp_path / "hybrid.safetensors"
    write_pth(tmp_path / "x.pth", official_tensors())
    tensors = official_tensors(prefix="", attention_blocks=0)
    tensors["ln_out.bias"] = tensors["ln_out.bias"] * np.nan
    write_pth(tmp_path / "nan.pth", tensors)
    for src, dst, message in [
        ("x.pth", hybrid, "already has 1 attention blocks: name an RWKV-7"),
        ("base.pth", tmp_path / "y.pth", "written as a .safetensors file of ours"),
        ("nan.pth", hybrid, "NaN or infinite, in 1 tensors: ln_out.bias (32). Nothing was written"),
    ]:
        with pytest.raises(SystemExit, match="1"):
            main([str(tmp_path / src), str(dst), "--blocks", "1"])
        assert message in capsys.readouterr().err and not dst.exists()
