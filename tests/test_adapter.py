"""Adapters in files of their own: what is in them, and the one model that takes them."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from rwkvx_jax.config import ADAPTERS, INITIAL_STATE, Config, DataConfig, LoRAConfig, Stage
from rwkvx_jax.convert.__main__ import main
from rwkvx_jax.convert.layout import param_shapes
from rwkvx_jax.convert.own import open_own_safetensors, write_own_safetensors
from rwkvx_jax.digest import flat
from rwkvx_jax.lora import stage_params
from rwkvx_jax.model import abstract_model
from tests.convert.convert_checkpoints import BF16, assert_identical, random_tensors, save_run
from tests.training.training_cases import MODEL

LORA = LoRAConfig(rank=3, alpha=5.0, targets=("time_mix.key", "channel_mix.value"))
ADAPTED = ("attention_blocks.channel_mix.value", "blocks.channel_mix.value", "blocks.time_mix.key")
STATEFUL = dataclasses.replace(MODEL, learned_state=True)


def write_case(kind, folder):
    """A base file as a stage starts from it, and a run of one stage that has tuned it."""
    model = STATEFUL if kind == "state" else MODEL
    stage = Stage("tune", 24, 8, 1, 1e-2, trainable=kind, lora=LORA)
    config = Config(model, (stage,), data=DataConfig(reset_at_documents=False))
    shapes = {n: p.shape for n, p in flat(stage_params(abstract_model(model), stage)[0])}
    # Of bfloat16 values, as pretrained files have them; training holds them in float32.
    params = {n: p.astype(np.float32) for n, p in random_tensors(shapes, BF16).items()}
    base = {n: p.astype(BF16) for n, p in params.items() if n in param_shapes(MODEL)}
    write_own_safetensors(folder / "base.safetensors", MODEL, "byte", base)
    return save_run(folder / "run", config, params)


def convert(*args):
    main(list(map(str, args)))


def refused(capsys, *args):
    with pytest.raises(SystemExit, match="[12]"):
        convert(*args)
    return " ".join(capsys.readouterr().err.split())


def content(path):
    with safetensors.safe_open(path, "numpy") as file:
        return file.metadata()


@pytest.fixture
def case(tmp_path, monkeypatch):
    """Writes a case; everything lies in the current folder."""
    monkeypatch.chdir(tmp_path)
    return lambda kind: write_case(kind, tmp_path)


@pytest.mark.parametrize("kind", ["lora", "state"])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_the_base_with_its_adapter_is_the_converted_run(kind, suffix, case):
    case(kind)
    convert("run", f"run.{suffix}")
    convert("run", "adapter.safetensors", "--adapter")
    convert("base.safetensors", f"merged.{suffix}", "--merge", "adapter.safetensors")
    if suffix == "pth":
        convert("run.pth", "run.safetensors")
        convert("merged.pth", "merged.safetensors")
    load = safetensors.numpy.load_file
    assert_identical(load("merged.safetensors"), load("run.safetensors"))
    merged, run = map(open_own_safetensors, ("merged.safetensors", "run.safetensors"))
    assert merged._replace(params={}) == run._replace(params={})


@pytest.mark.parametrize("kind", ["lora", "state"])
def test_the_file_holds_nothing_but_what_was_tuned(kind, case, capsys):
    case(kind)
    convert("run", "adapter.safetensors", "--adapter")
    names = {f"{ADAPTERS}.{name}.{part}" for name in ADAPTED for part in "ab"}
    found = safetensors.numpy.load_file("adapter.safetensors")
    assert found.keys() == ({INITIAL_STATE} if kind == "state" else names)
    metadata = content("adapter.safetensors")
    assert json.loads(metadata["trained"]) == {"step": 1, "length": 24}
    stored = json.loads(metadata["adapter"])["lora"]
    expected = {"rank": 3, "alpha": 5.0, "targets": list(LORA.targets)}
    assert stored == (None if kind == "state" else expected)
    message = refused(capsys, "adapter.safetensors", "new.safetensors")
    assert "adapter.safetensors is an adapter, which is no model by itself" in message


@pytest.mark.parametrize("kind", ["lora", "state"])
def test_another_base_is_refused(kind, case, capsys):
    case(kind)
    convert("run", "adapter.safetensors", "--adapter")
    base = open_own_safetensors("base.safetensors")
    params = {name: param.read() for name, param in base.params.items()}
    params["blocks.ln1.scale"][1, 3] += 0.25
    write_own_safetensors("other.safetensors", base.config, "byte", params)
    wide = dataclasses.replace(MODEL, ffn_width=24)
    write_own_safetensors("wide.safetensors", wide, "byte", random_tensors(param_shapes(wide)))
    merge = ("new.safetensors", "--merge", "adapter.safetensors")
    message = "other.safetensors is not the adapter's base (by the hash of its parameters)"
    assert message in refused(capsys, "other.safetensors", *merge)
    message = "wide.safetensors has another shape than the adapter's base: the parameters"
    assert message in refused(capsys, "wide.safetensors", *merge)


def test_an_official_base_has_no_value_residual_in_block_0(case):
    case("lora")
    convert("run", "adapter.safetensors", "--adapter")
    convert("base.safetensors", "base.pth")
    convert("base.pth", "merged.pth", "--merge", "adapter.safetensors")
    convert("run", "run.pth")
    convert("run.pth", "run.safetensors")
    convert("merged.pth", "merged.safetensors")
    load = safetensors.numpy.load_file
    assert_identical(load("merged.safetensors"), load("run.safetensors"))


def test_what_has_no_adapter_is_refused(case, capsys):
    case("all")
    message = refused(capsys, "run", "adapter.safetensors", "--adapter")
    assert "step 1 belongs to stage 'tune', which trains parameters of the model itself" in message
    message = refused(capsys, "base.safetensors", "adapter.safetensors", "--adapter")
    assert "base.safetensors is no training run" in message
    message = refused(capsys, "base.safetensors", "x.safetensors", "--merge", "base.safetensors")
    assert "base.safetensors is no adapter" in message
    for flags, expected in [
        (["run", "x.pth", "--adapter"], "x.pth: an adapter is written as a .safetensors file"),
        (["run", "x", "--adapter", "--to", "hub"], "--adapter goes with none of"),
        (["run", "--inspect", "--merge", "x.safetensors"], "leave out --inspect"),
    ]:
        assert expected in refused(capsys, *flags)


def test_damaged_adapters_are_refused(case, capsys):
    case("lora")
    convert("run", "adapter.safetensors", "--adapter")
    tensors = safetensors.numpy.load_file("adapter.safetensors")
    metadata = {n: t for n, t in content("adapter.safetensors").items() if "sha256" not in n}
    values = json.loads(metadata["adapter"])
    for changed, message in [
        ("{", "JSON can't be read"),
        ("[]", "damaged.safetensors is no adapter"),
        (json.dumps(values | {"lora": {"rank": 0}}), "rank is 0"),
        (json.dumps(values | {"lora": values["lora"] | {"rank": 4}}), "has shape"),
        (json.dumps(values | {"lora": None}), "extra"),
    ]:
        changed = metadata | {"adapter": changed}
        safetensors.numpy.save_file(tensors, "damaged.safetensors", changed)
        merge = ("base.safetensors", "x.safetensors", "--merge", "damaged.safetensors")
        assert message in refused(capsys, *merge)
