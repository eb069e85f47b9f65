"""A Transformer, and a hybrid that shares its attention block, are trained and used like any."""

import dataclasses
import json

import numpy as np
import pytest

from rwkvx_jax.checkpoint import read_workdir
from rwkvx_jax.config import LoRAConfig, Stage
from rwkvx_jax.convert.__main__ import main as convert
from rwkvx_jax.eval import main as evaluate
from rwkvx_jax.generate.__main__ import main as generate
from rwkvx_jax.training.loop import fit
from tests.training.training_cases import CURRICULUM, MODEL, same_bits

TRANSFORMER = dataclasses.replace(
    MODEL,
    num_blocks=0,
    num_attention_blocks=2,
    backbone="llama",
    attention="full",
    num_kv_heads=1,
    qkv_bias=True,
    rope_theta=100.0,
    tied_embeddings=True,
)
MATRICES = ("attention.key", "attention.output", "channel_mix.gate")


def config_of(model, tmp_path, *stages):
    return dataclasses.replace(
        CURRICULUM,
        model=model,
        stages=stages,
        run=dataclasses.replace(
            CURRICULUM.run, remat="block", compilation_cache=str(tmp_path / "programs")
        ),
        mesh=dataclasses.replace(CURRICULUM.mesh, data=8),
    )


@pytest.mark.thorough
def test_a_transformer_from_nothing_to_an_answer(tmp_path, capsys):
    """Trained, tuned by adapters, resumed, converted, continued, evaluated."""
    stages = (
        Stage("all", 24, 8, 8, 1e-2),
        Stage("lora", 24, 8, 2, 1e-2, trainable="lora", lora=LoRAConfig(4, targets=MATRICES)),
    )
    config = config_of(TRANSFORMER, tmp_path, *stages)
    fit(dataclasses.replace(config, stages=stages[:1]), tmp_path / "run")
    before = read_workdir(tmp_path / "run").params
    after = fit(config, tmp_path / "run")
    assert same_bits(before["head"], after["head"])  # adapters moved what they were asked to, alone
    for name in MATRICES:
        module, matrix = name.split(".")
        moved = [run["attention_blocks"][module][matrix] for run in (before, after)]
        assert not np.array_equal(*moved)
    lines = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if "loss" in line]
    assert np.isfinite(losses).all() and losses[7] < 0.8 * losses[0]

    file = str(tmp_path / "ours.safetensors")
    convert([str(tmp_path / "run"), file])
    capsys.readouterr()
    generate(["--checkpoint", file, "--prompt", "The ", "--max-tokens", "4"])
    assert capsys.readouterr().out.startswith("The ")
    passkey = [
        "passkey",
        "--checkpoint",
        file,
        "--lengths",
        "300",
        "--depths",
        "1",
        "--trials",
        "2",
    ]
    with pytest.raises(SystemExit):
        evaluate([*passkey, "--compare-without-attention", "--output", str(tmp_path / "no")])
    assert "no checkpoint here has attention blocks beside others" in capsys.readouterr().err
    evaluate([*passkey, "--output", str(tmp_path / "eval")])
    assert list((tmp_path / "eval").iterdir())


@pytest.mark.thorough
def test_a_shared_block_is_preheated_alone(tmp_path):
    model = dataclasses.replace(
        MODEL, mixer="mamba2", num_attention_blocks=2, shared_attention=True, rope_theta=100.0
    )
    stages = (
        Stage("base", 24, 8, 2, 1e-2, expanded=False),
        Stage("preheat", 24, 8, 3, 1e-2, trainable="attention"),
    )
    config = config_of(model, tmp_path, *stages)
    after = fit(config, tmp_path / "run")
    before = read_workdir(tmp_path / "run", 2).params
    assert same_bits(before["blocks"], after["blocks"])
    output = np.asarray(after["attention_blocks"]["attention"]["output"])
    assert output.shape[0] == 1 and output.any()
