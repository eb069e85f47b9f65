"""Configs that compare mixers: equal parameters, and the shapes of published hybrids."""

import json
import subprocess
import sys

import jax
import pytest

from configs.twins_4k import VARIANTS
from rwkvx_jax.config import hybrids, transformers
from rwkvx_jax.experiment_files import load_config
from rwkvx_jax.model import abstract_model, get_params


def test_twins_have_as_many_parameters():
    """Every mixer, with attention and without, beside the RWKV-7 hybrid."""
    configs = {name: load_config(f"twins_4k:{name}") for name in VARIANTS}
    assert len(configs) == 19 and load_config("twins_4k").model.mixer == "rwkv7"
    expected = load_config("twins_4k").model.num_parameters
    for name, config in configs.items():
        assert abs(config.model.num_parameters / expected - 1) < 0.02, name
    alone = configs["kda-alone"]
    assert (alone.model.num_blocks, alone.model.num_attention_blocks) == (4, 0)
    assert {stage.trainable for stage in alone.stages} == {"all"}
    for name, attention in (("transformer", "full"), ("transformer-sparse", "sparse")):
        model, stages = configs[name].model, configs[name].stages
        assert (model.num_blocks, model.num_attention_blocks, model.attention) == (0, 4, attention)
        assert model.backbone == "llama" and model.rope_theta and not model.key_conv
        assert all(stage.expanded and stage.trainable == "all" for stage in stages)
    assert configs["kda"].stages == load_config("recall_64k:small").stages


@pytest.mark.parametrize(
    "like, mixer, ratio",
    [
        (hybrids.jamba_like, "mamba2", 7),
        (hybrids.minimax_like, "lightning", 7),
        (hybrids.qwen3next_like, "gated_deltanet", 3),
        (hybrids.kimi_like, "kda", 3),
        (hybrids.zamba_like, "mamba2", 6),
    ],
)
def test_shapes_of_published_hybrids(like, mixer, ratio):
    config = like(groups=2, width=64, head_size=16)
    assert (config.mixer, config.blocks_per_group, config.attention) == (mixer, ratio, "full")
    params = get_params(abstract_model(config))
    assert sum(x.size for x in jax.tree.leaves(params)) == config.num_parameters


@pytest.mark.parametrize(
    ("config", "parameters"),
    [(transformers.llama32_3b(), 3_212_749_824), (transformers.qwen25_3b(), 3_085_938_688)],
)
def test_published_transformers_have_their_parameters(config, parameters):
    leaves = jax.tree.leaves(get_params(abstract_model(config)))
    assert config.num_parameters == sum(x.size for x in leaves) == parameters


def test_the_table_of_twins(tmp_path):
    """Seeds share a row, and what was not measured is a dash."""
    model = {"label": "m", "parameters": "0"}
    for name, correct, loss in (("kda", 1.0, 1.5), ("kda@1", 0.0, 1.7), ("kda-alone", 0.0, 2.0)):
        for kind, trials in (
            ("pairs", [{"length": 16384, "trial": t, "correct": correct} for t in range(2)]),
            ("loss", [{"trial": 0, "loss": loss}, {"trial": 1, "loss": loss + 0.2}]),
        ):
            (tmp_path / name / kind).mkdir(parents=True)
            header = {"format": 2, "task": kind, "settings": {}, "key": ["trial"]}
            lines = [header | {"identity": ["parameters"], "models": [model]}]
            lines += [trial | {"model": "m"} for trial in trials]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (tmp_path / name / kind / "trials.jsonl").write_text(text)
    speed = {"rows": [{"variant": "kda", "tokens_per_second": 4000.0, "decode_ms": 1.234}]}
    (tmp_path / "speed.json").write_text(json.dumps(speed))
    command = [sys.executable, "tools/twins_table.py", tmp_path, "--speed", tmp_path / "speed.json"]
    command += ["--output", tmp_path / "figure.png"]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert table[2:] == [
        "| KDA + sparse attention | 2 | – | 50 (15–85) | 1.700 (1.600, 1.800) | – | – | 4,000 "
        "| 1.23 |",
        "| KDA alone | 1 | – | 0 (0–66) | 2.100 | – | – | – | – |",
        str(tmp_path / "figure.png"),
    ]
    (tmp_path / "mamba3").mkdir()
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2 and "['mamba3']" in refused.stderr


def test_losses_of_two_models_in_pairs(tmp_path):
    """tools/paired_loss.py: the difference of pieces that both have read, and its error."""
    path = tmp_path / "long_loss.jsonl"
    model = {"model": {}, "parameters": "x", "compute_dtype": "float32", "tokenizer": "byte"}
    header = {
        "format": 2,
        "task": "long-loss",
        "key": ["file", "start"],
        "identity": list(model),
        "settings": {},
        "plan": {},
        "models": [{"label": name} | model for name in "ab"],
    }
    trials = [
        {"model": name, "file": "f", "start": i, "loss": 1.0 + i + more, "edges": [0, 4, 9]}
        | {"losses": [1.0 + i, 2.0 + i + 2 * more]}
        for name in "ab"
        for i, more in enumerate([0.1, 0.3] if name == "b" else [0.0, 0.0])
    ]
    trials.append(trials[0] | {"start": 7, "loss": 50.0})  # b has not read it
    path.write_text("".join(json.dumps(line) + "\n" for line in [header, *trials]))
    command = [sys.executable, "tools/paired_loss.py", str(path)]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "| all | 1.5000 | 1.7000 | 0.2000 ± 0.1960 |" in table
    assert "| 4 to 9 | 2.5000 | 2.9000 | 0.4000 ± 0.3920 |" in table
    assert "| 0 to 4 | 1.5000 | 1.5000 | 0.0000 ± 0.0000 |" in table
