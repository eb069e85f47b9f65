"""Configs that compare mixers: equal parameters, and the shapes of published hybrids."""

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
