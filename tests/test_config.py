"""Configs refuse what can't work, name the value and the remedy, and survive JSON."""

import dataclasses
import json
import re
import runpy
import typing

import jax
import jax.numpy as jnp
import pytest

from rwkvx_jax.cli import accelerator_attached, settle_platform
from rwkvx_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    LongCEConfig,
    LoRAConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    Recurrence,
    RunConfig,
    SourceConfig,
    SparseAttention,
    Stage,
    differences,
    from_dict,
    low_rank_widths,
    to_dict,
)
from rwkvx_jax.experiment_files import experiment_name, load_config
from rwkvx_jax.model import abstract_model, get_params
from rwkvx_jax.ops.block_sparse import sparse_attention
from rwkvx_jax.ops.recurrence import wkv7
from tests.helpers import ROOT

STAGE = Stage("only", 64, 4, 10, 1e-3)
CONFIG = Config(ModelConfig.tiny(), (STAGE,))
TRANSFORMER = ModelConfig(num_blocks=0, num_attention_blocks=3, backbone="llama")


def tuned(model, **lora):
    """A config whose stage trains adapters."""
    stage = dataclasses.replace(STAGE, trainable="lora", lora=LoRAConfig(**lora))
    return Config(model, (stage,))


@pytest.mark.parametrize(
    "make, fragments",
    [
        (lambda: ModelConfig(num_blocks=12, num_attention_blocks=5), ["5", "[1, 2, 3, 4, 6, 12]"]),
        (lambda: ModelConfig(width=100), ["100", "64"]),
        (lambda: ModelConfig(chunk_size=0), ["model.chunk_size is 0", "at least 1"]),
        (lambda: ModelConfig(top_k=0), ["model.top_k is 0", "at least 1"]),
        (lambda: ModelConfig(attention="spars"), ["'spars'", "['sparse', 'full', 'nsa']"]),
        (lambda: ModelConfig(width="64"), ["ModelConfig.width is '64'", "int"]),
        (lambda: ModelConfig(low_rank_override=(1, 2, 3)), ["(1, 2, 3)", "4 values"]),
        (lambda: ModelConfig(key_conv=-1), ["key_conv is -1"]),
        (lambda: ModelConfig(selector="max", selector_blocks=3), ["3", "divide", "2048", "max"]),
        (lambda: ModelConfig(low_rank_override=(1, 2, 3, 0)), ["low_rank_override.g is 0"]),
        (lambda: RunConfig(profile_steps="13:10"), ["13:10", "10:13"]),
        (lambda: RunConfig(bad_step="ignore"), ["'ignore'", "['stop', 'skip']"]),
        (lambda: RunConfig(spike_factor=0.5), ["0.5", "such as 10"]),
        (lambda: RunConfig(max_skipped=-1), ["run.max_skipped is -1"]),
        (lambda: MeshConfig(data=0), ["mesh.data is 0", "-1"]),
        (lambda: MeshConfig(data=-1, fsdp=-1), ["data", "fsdp", "only one"]),
        (lambda: SourceConfig(weight=0.0), ["0.0", "positive"]),
        (lambda: SourceConfig(kind="txt"), ["'txt'", "'jsonl'"]),
        (lambda: DataConfig(sources=()), ["data.sources is empty"]),
        (lambda: DataConfig(sources=[SourceConfig()]), ["write a tuple"]),
        (lambda: DataConfig(held_out=1.0), ["1.0", "0.02"]),
        (lambda: OptimizerConfig(b1=1.0), ["optimizer.b1 is 1.0", "[0, 1)"]),
        (lambda: OptimizerConfig(eps=-1.0), ["optimizer.eps is -1.0"]),
        (lambda: OptimizerConfig(clip_norm=-1.0), ["optimizer.clip_norm is -1.0"]),
        (lambda: LongCEConfig(window=0), ["longce.window is 0"]),
        (lambda: LongCEConfig(at_once=0), ["longce.at_once is 0"]),
        (lambda: dataclasses.replace(STAGE, name=""), ["empty name"]),
        (lambda: dataclasses.replace(STAGE, peak_lr=float("nan")), ["peak_lr is nan", "finite"]),
        (lambda: dataclasses.replace(STAGE, peak_lr=float("inf")), ["peak_lr is inf", "finite"]),
        (lambda: dataclasses.replace(STAGE, peak_lr=0.0), ["peak_lr is 0.0", "positive"]),
        (lambda: dataclasses.replace(STAGE, steps=2**31), ["2147483648", "at most 2147483647"]),
        (lambda: OptimizerConfig(weight_decay=float("inf")), ["weight_decay is inf", "finite"]),
        (lambda: OptimizerConfig(eps=0.0), ["optimizer.eps is 0.0", "1.2e-38"]),
        (lambda: OptimizerConfig(eps=1e-46), ["eps is 1e-46", "1.2e-38"]),
        (lambda: SourceConfig(weight=1e300), ["weight is 1e+300", "3.4e38"]),
        (lambda: SourceConfig(weight=1e-300), ["weight is 1e-300", "1.2e-38"]),
        (
            lambda: DataConfig(sources=(SourceConfig(weight=1e9), SourceConfig())),
            ["1000000000.0", "hardly ever", "leave that source out"],
        ),
        (
            lambda: Config(
                ModelConfig.tiny(),
                (dataclasses.replace(STAGE, source_weights=(0.0, 1e-3, 1e9)),),
                DataConfig(sources=(SourceConfig(),) * 3),
            ),
            ["stage 'only': source_weights", "hardly ever"],
        ),
        (lambda: RunConfig(recurrence="foo"), ["recurrence is 'foo'", "'chunked'"]),
        (lambda: RunConfig(sparse_attention="foo"), ["sparse_attention is 'foo'", "'masked'"]),
        (lambda: dataclasses.replace(STAGE, final_lr=-1.0), ["final_lr is -1.0"]),
        (lambda: dataclasses.replace(STAGE, warmup_steps=11), ["warmup_steps 11", "10 steps"]),
        (lambda: dataclasses.replace(STAGE, accumulation=3), ["accumulation 3", "global_batch 4"]),
        (
            lambda: dataclasses.replace(STAGE, loss="longce"),
            ["window 4000", "64 tokens", "twice the window"],
        ),
        (
            lambda: dataclasses.replace(STAGE, trainable="attention", expanded=False),
            ["expanded=True"],
        ),
        (lambda: LoRAConfig(rank=0), ["lora.rank is 0", "at least 1"]),
        (lambda: LoRAConfig(alpha=0.0), ["lora.alpha is 0.0", "positive"]),
        (lambda: LoRAConfig(targets=()), ["lora.targets is empty"]),
        (lambda: LoRAConfig(targets=("key",)), ["targets is ('key',)", "'time_mix.key'"]),
        (lambda: LoRAConfig(targets=("attention.key",) * 2), ["'attention.key'", "twice"]),
        (
            lambda: tuned(ModelConfig.tiny().without_attention(), targets=("attention.key",)),
            ["'only': lora.targets names ['attention.key']", "no attention blocks", "leave"],
        ),
        (
            lambda: tuned(ModelConfig.tiny(), rank=128),
            ["lora.rank 128", "model.width 128", '"all"'],
        ),
        (
            lambda: Config(ModelConfig.tiny(), (dataclasses.replace(STAGE, trainable="state"),)),
            ["'only'", '"state"', "set model.learned_state"],
        ),
        (
            lambda: dataclasses.replace(
                CONFIG,
                model=dataclasses.replace(CONFIG.model, mixer="rwkv4"),
                mesh=MeshConfig(context=2),
            ),
            ['mixer "rwkv4"', "mesh.context is 2", "set it to 1"],
        ),
        (
            lambda: ModelConfig(mixer="mamba2", attention_init="copy"),
            ['"copy"', '"mamba2"', 'use "zero" or "aligned"'],
        ),
        (
            lambda: dataclasses.replace(
                CONFIG, model=dataclasses.replace(CONFIG.model, learned_state=True)
            ),
            ["model.learned_state", "would begin with zeros", "data.reset_at_documents=False"],
        ),
        (lambda: ModelConfig(num_blocks=-1), ["num_blocks is -1", "0 for a Transformer"]),
        (
            lambda: ModelConfig(num_blocks=0, num_attention_blocks=0),
            ["num_blocks is 0", "at least 1", "num_attention_blocks"],
        ),
        (lambda: ModelConfig(num_blocks=0, mixer="kda"), ["model.mixer", "num_blocks is 0"]),
        (lambda: ModelConfig(num_blocks=0, learned_state=True), ["learned_state", "is 0"]),
        (lambda: ModelConfig(norm_eps=1e-6), ["norm_eps is 1e-06", 'backbone="llama"']),
        (lambda: ModelConfig(backbone="llama", norm_eps=0.0), ["norm_eps is 0.0", "positive"]),
        (lambda: ModelConfig(num_kv_heads=5), ["num_kv_heads is 5", "12 heads", "0 for as many"]),
        (lambda: ModelConfig(num_kv_heads=-1), ["num_kv_heads is -1"]),
        (lambda: ModelConfig(rope_theta=1.0), ["rope_theta is 1.0", "10000"]),
        (lambda: ModelConfig(width=9, head_size=3, rope_theta=1e4), ["head_size 3 is odd"]),
        (
            lambda: ModelConfig(rope_scaling=(8.0, 1.0, 4.0, 8192.0)),
            ["rope_scaling is (8.0, 1.0, 4.0, 8192.0)", "rope_theta is 0"],
        ),
        (
            lambda: ModelConfig(rope_theta=1e4, rope_scaling=(8.0, 4.0, 1.0, 8192.0)),
            ["rope_scaling is (8.0, 4.0, 1.0, 8192.0)", "low_freq_factor < high_freq_factor"],
        ),
        (
            lambda: ModelConfig(num_attention_blocks=0, shared_attention=True),
            ["shared_attention is True", "leave it False"],
        ),
        (
            lambda: ModelConfig(backbone="llama", attention_init="copy"),
            ['"copy"', 'backbone="llama"', 'use "zero"'],
        ),
        (lambda: ModelConfig(num_blocks=0, attention_init="copy"), ['"copy"', "without such"]),
        (
            lambda: ModelConfig(num_kv_heads=3, attention_init="aligned"),
            ["'aligned'", "num_kv_heads is 3", '"zero"'],
        ),
        (lambda: TRANSFORMER.without_attention(), ["Transformer", "nothing without"]),
        (
            lambda: Config(TRANSFORMER, (dataclasses.replace(STAGE, expanded=False),)),
            ["'only': expanded=False", "set expanded=True"],
        ),
        (lambda: tuned(TRANSFORMER), ["'time_mix.receptance'", "no recurrent blocks", "leave"]),
        (
            lambda: tuned(ModelConfig.tiny(), targets=("channel_mix.gate",)),
            ["['channel_mix.gate']", "without a gate"],
        ),
        (lambda: ModelConfig(mixer="kda", learned_state=True), ["'rwkv7', not 'kda'", "False"]),
        (lambda: Config(ModelConfig.tiny(), ()), ["stages is empty"]),
        (lambda: Config(ModelConfig.tiny(), (STAGE, STAGE)), ["['only'] occur twice"]),
        (
            lambda: Config(
                ModelConfig.tiny().without_attention(),
                (dataclasses.replace(STAGE, trainable="attention"),),
            ),
            ["'only'", "num_attention_blocks"],
        ),
        (
            lambda: dataclasses.replace(
                CONFIG, stages=(STAGE, Stage("late", 64, 4, 1, 1e-3, expanded=False))
            ),
            ["never removed"],
        ),
        (
            lambda: dataclasses.replace(
                CONFIG, stages=(dataclasses.replace(STAGE, source_weights=(1.0, 2.0)),)
            ),
            ["2 source_weights for 1 sources"],
        ),
    ],
)
def test_impossible_values_are_named_with_a_remedy(make, fragments):
    with pytest.raises(ConfigError) as error:
        make()
    for fragment in fragments:
        assert fragment in str(error.value)


@pytest.mark.parametrize("op, hint", [("wkv7", Recurrence), ("sparse_attention", SparseAttention)])
def test_implementations_are_those_of_the_ops(op, hint):
    """The config stands below the ops and can't ask them: it has to name all that they offer."""
    x = jnp.zeros((1, 8, 1, 8))
    arguments = {
        "wkv7": (wkv7, (x,) * 6, {}),
        "sparse_attention": (sparse_attention, (x,) * 3, {"chunk_size": 4, "top_k": 2}),
    }
    fn, args, settings = arguments[op]
    with pytest.raises(ValueError) as error:
        fn(*args, implementation="?", **settings)
    offered = set(re.findall(r"'(\w+)'", str(error.value)))
    assert offered == set(typing.get_args(hint))


def test_number_of_parameters_is_that_of_the_model():
    stateful = dataclasses.replace(CONFIG.model, learned_state=True)
    plain = CONFIG.model.without_attention()
    for config in (CONFIG.model, plain, ModelConfig(key_conv=3), stateful):
        leaves = jax.tree.leaves(get_params(abstract_model(config)))
        assert config.num_parameters == sum(leaf.size for leaf in leaves)


def test_json_round_trip():
    assert from_dict(Config, json.loads(json.dumps(to_dict(CONFIG)))) == CONFIG


@pytest.mark.parametrize(
    "change, fragment",
    [
        (lambda d: d["model"].update(widht=3), "unknown key ['widht']"),
        (lambda d: d.pop("model"), "missing key ['model']"),
        (lambda d: d.update(stages=3), "write a tuple"),
        (lambda d: d.update(model=3), "config.model is 3"),
        (lambda d: d["model"].update(init="xavier"), "'xavier'"),
    ],
)
def test_bad_json_is_refused(change, fragment):
    values = to_dict(CONFIG)
    change(values)
    with pytest.raises(ConfigError) as error:
        from_dict(Config, values)
    assert fragment in str(error.value)


def test_differences_name_fields_and_both_values():
    other = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, top_k=9))
    assert differences(CONFIG, other) == ["model.top_k: 4 -> 9"]
    assert differences(CONFIG, CONFIG) == []


@pytest.mark.parametrize(
    "width, rwkvx, rwkv_lm",
    [
        (128, (32, 32, 32, 32), (32, 32, 32, 64)),
        (256, (32, 32, 32, 64), (32, 32, 32, 64)),
        (512, (32, 32, 32, 96), (64, 64, 32, 128)),
        (768, (64, 64, 32, 128), (64, 64, 32, 128)),
        (1024, (64, 64, 32, 160), (64, 64, 64, 160)),
        (2048, (96, 96, 64, 256), (128, 128, 64, 224)),
        (2560, (96, 96, 64, 320), (128, 128, 96, 256)),
    ],
)
def test_low_rank_widths_are_those_of_the_released_models(width, rwkvx, rwkv_lm):
    assert low_rank_widths(width, "rwkvx") == rwkvx
    assert low_rank_widths(width, "rwkv_lm") == rwkv_lm


@pytest.mark.parametrize(
    "name, tokens",
    [
        ("minipile_l12d768", 1.4982e9),
        ("rwkvx_0b2_stage1", 1.4982e9),
        ("rwkvx_0b2_stage2", 20e9),
        ("rwkvx_3b6_stage1", 1.5e9),
        ("rwkvx_3b6_stage2", 1e9),
        ("rwkvx_0b2_stage2:v5e256", 20e9),
        ("rwkvx_0b2_stage2:v6e64", 20e9),
        ("rwkvx_3b6_stage1:v5e256", 1.5e9),
        ("rwkvx_3b6_stage1:v6e64", 1.5e9),
        ("rwkvx_3b6_stage2:v5e256", 1e9),
        ("rwkvx_3b6_stage2:v5p128", 1e9),
        ("rwkvx_3b6_stage2:v6e64", 1e9),
    ],
)
def test_recipes_train_the_tokens_of_their_sources(name, tokens):
    (stage,) = load_config(name).stages
    assert abs(stage.tokens / tokens - 1) < 0.03


@pytest.mark.parametrize(
    "text, fragment", [("x = 1", "get_config"), ("def get_config(): 3", "NoneType")]
)
def test_bad_experiment_files_are_refused(tmp_path, text, fragment):
    path = tmp_path / "broken.py"
    with pytest.raises(ConfigError, match="no config file"):
        load_config(path)
    path.write_text(text)
    with pytest.raises(ConfigError, match=fragment):
        load_config(path)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_variant_differs_from_its_experiment(path):
    config = load_config(path)
    assert load_config(path.stem) == config
    for variant in runpy.run_path(str(path)).get("VARIANTS", ()):
        assert load_config(f"{path}:{variant}") == load_config(f"{path.stem}:{variant}") != config


def test_an_unknown_experiment_or_variant_is_told_what_there_is(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from rwkvx_jax.config import *\nget_config = lambda: 3")
    for experiment, fragment in (
        (
            f"{ROOT}/configs/rwkvx_3b6_stage2.py:v9",
            "variant 'v9': choose from v5p128, v5e256, v6e64",
        ),
        ("rwkvx_3b6_stage2:", "variant '': choose from v5p128, v5e256, v6e64"),
        ("tiny:cpu", "no config file tiny: name a file, or one of the shipped configs: books, "),
        (f"{path}:large", "mine.py has no variants: leave out ':large'"),
    ):
        with pytest.raises(ConfigError) as error:
            load_config(experiment)
        assert fragment in str(error.value)


def test_a_file_with_a_colon_in_its_name_is_a_file(tmp_path):
    path = tmp_path / "a:b.py"
    path.write_bytes((ROOT / "configs" / "tiny_cpu.py").read_bytes())
    assert load_config(path) == load_config("tiny_cpu")


def test_experiments_have_names_for_directories():
    assert experiment_name("configs/tiny_cpu.py") == experiment_name("tiny_cpu") == "tiny_cpu"
    assert experiment_name("configs/rwkvx_3b6_stage2.py:v5p128") == "rwkvx_3b6_stage2_v5p128"


def test_accelerators_are_found_by_their_devices(tmp_path):
    assert not accelerator_attached(tmp_path)
    vendor = tmp_path / "sys/bus/pci/devices/0000:00:05.0/vendor"
    vendor.parent.mkdir(parents=True)
    vendor.write_text("0x8086\n")
    assert not accelerator_attached(tmp_path)
    vendor.write_text("0x1ae0\n")
    assert accelerator_attached(tmp_path)
    (tmp_path / "gpu/dev").mkdir(parents=True)
    (tmp_path / "gpu/dev/nvidia0").touch()
    assert accelerator_attached(tmp_path / "gpu")


def test_a_chosen_platform_is_kept(monkeypatch):
    monkeypatch.setattr("rwkvx_jax.cli.accelerator_attached", lambda: pytest.fail("not asked"))
    settle_platform()  # conftest has chosen the CPU
