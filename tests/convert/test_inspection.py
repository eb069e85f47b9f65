"""`python -m rwkvx_jax.convert --inspect`: every kind of checkpoint is told for what it is."""

import numpy as np
import pytest

from rwkvx_jax.config import Config, DataConfig, Stage
from rwkvx_jax.convert.__main__ import main
from rwkvx_jax.convert.layout import param_shapes
from rwkvx_jax.convert.official import official_to_params
from rwkvx_jax.convert.own import Trained, write_own_safetensors
from rwkvx_jax.convert.pth import write_pth
from rwkvx_jax.storage import size
from tests.convert.convert_checkpoints import (
    BF16,
    fla_directory,
    fla_tensors,
    official_tensors,
    random_tensors,
    rwkv7,
    save_run,
)
from tests.hub_server import hub  # noqa: F401


def inspected(capsys, *args):
    """The fields that the command prints."""
    main(["--inspect", *map(str, args)])
    out = capsys.readouterr().out
    return {line[:12].strip(): line[12:].strip() for line in out.splitlines()}


def test_an_official_hybrid(tmp_path, capsys):
    tensors = official_tensors(BF16)
    write_pth(
        file := tmp_path / "x.pth", tensors | {"rwkv.emb.weight": np.ones((11, 32), np.float32)}
    )
    fields = inspected(capsys, file)
    assert fields["form"] == ".pth file, tensors of the official names"
    assert fields["model"] == (
        "RWKV-X: 3 RWKV-7 blocks, 1 attention blocks (one after every 3), width 32, 2 heads of 16, "
        "channel mix 48, vocabulary 11"
    )
    # Block 0 of our stack has the three arrays of a value residual that the file lacks.
    count = sum(tensor.size for tensor in tensors.values()) + 32 * (1 + 7 + 7)
    assert fields["parameters"] == f"{count:,}"
    assert fields["size"] == f"{size(file) / 1e6:,.1f} MB on the disk"
    assert "float32 (1 arrays)" in fields["dtypes"] and "bfloat16 (" in fields["dtypes"]
    assert (fields["tokenizer"], fields["training"]) == ("not known", "not known")
    assert "chunk_size 2048, top_k 3" in fields["config"]
    assert fields["load_model"] == "yes" and fields["eval"].startswith("no: a vocabulary of 11 is")
    assert fields["--init-from"].endswith("expanded=True") and "already" in fields["expansion"]


def test_our_own_file(tmp_path, capsys):
    config, params, _ = official_to_params(official_tensors(vocab=257, attention_blocks=0))
    file = tmp_path / "ours.safetensors"
    write_own_safetensors(file, config, "byte", params, trained=Trained(7, 64))
    fields = inspected(capsys, file)
    assert fields["form"] == ".safetensors file, tensors of our names"
    assert fields["model"].startswith("RWKV-7: 3 RWKV-7 blocks, width 32")
    assert fields["training"] == "step 7, sequences of up to 64 tokens"
    assert (fields["tokenizer"], fields["eval"], fields["generate"]) == ("byte", "yes", "yes")
    assert "expand_checkpoint" in fields["expansion"]
    write_own_safetensors(file, config, "", params)
    assert inspected(capsys, file)["eval"].endswith("NEW.safetensors --tokenizer byte`")
    write_own_safetensors(file, config, "world", params)
    assert inspected(capsys, file)["eval"].startswith("no: the world tokenizer has 65530 ids")


def test_a_directory_and_the_hub(tmp_path, capsys, hub):  # noqa: F811
    folder = fla_directory(tmp_path / "model", fla_tensors(rwkv7()))
    form = "directory with model.safetensors, tensors of flash-linear-attention's names"
    assert inspected(capsys, folder)["form"] == form
    hub.files = {file.name: file.read_bytes() for file in folder.iterdir()}
    fields = inspected(capsys, "hf://org/model")
    assert (fields["form"], fields["checkpoint"]) == (form, "hf://org/model")


def test_a_run(tmp_path, capsys):
    model = official_to_params(official_tensors(vocab=300))[0]
    stages = (Stage("short", 8, 1, 1, 1e-3), Stage("long", 16, 1, 1, 1e-3))
    config = Config(model, stages, data=DataConfig(vocab_file="words.txt", tokenizer="world"))
    run = save_run(tmp_path / "run", config, random_tensors(param_shapes(model)))
    fields = inspected(capsys, run)
    assert fields["form"] == "training run, checkpoint of step 2 (stage long)"
    assert fields["tokenizer"] == "world, with the vocabulary words.txt"
    assert fields["training"] == "step 2, sequences of up to 16 tokens"
    assert fields["eval"] == "yes" and fields["dtypes"].startswith("float32 (")
    assert float(fields["size"].split()[0]) > 0
    for place in ([run, "--step", "1"], [run / "checkpoints" / "1"]):
        assert "step 1 (stage short)" in inspected(capsys, *place)["form"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--inspect", "x.pth", "y.pth"], "--inspect writes nothing: leave out the destination"),
        (["x.pth"], "no destination for x.pth: name the file to write"),
        (["--inspect", "absent.pth"], "no checkpoint at absent.pth"),
        (["--inspect", "{file}", "--step", "1"], "--step 1 chooses among"),
        (["--inspect", "{text}"], "unknown kind of file"),
    ],
)
def test_what_can_not_be_inspected(args, message, tmp_path, capsys):
    write_pth(tmp_path / "x.pth", rwkv7())
    (tmp_path / "x.txt").write_text("")
    args = [a.format(file=tmp_path / "x.pth", text=tmp_path / "x.txt") for a in args]
    with pytest.raises(SystemExit, match="1|2"):
        main(args)
    assert message in " ".join(capsys.readouterr().err.split())
