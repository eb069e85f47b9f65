"""Recipes that start from a pretrained RWKV-7, run at tiny size: all stages, all variants."""

import dataclasses
import json
import string
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from rwkvx_jax.checkpoint import flat, load_checkpoint
from rwkvx_jax.config import INITIAL_STATE, LongCEConfig
from rwkvx_jax.convert.files import write_tensors
from rwkvx_jax.convert.official import open_official
from rwkvx_jax.convert.tensors import as_lazy
from rwkvx_jax.experiment_files import load_config
from rwkvx_jax.model import get_params
from rwkvx_jax.training.loop import fit
from tests.convert.convert_checkpoints import official_tensors
from tests.helpers import ROOT
from tests.training.training_cases import same_bits

VOCAB = 257


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A made-up RWKV-7 over bytes in an official file, and what shapes say of it."""
    tensors = official_tensors(attention_blocks=0, prefix="", vocab=VOCAB, blocks=4)
    tensors = {name: 0.3 * tensor for name, tensor in tensors.items()}
    path = tmp_path_factory.mktemp("official") / "rwkv7.pth"
    write_tensors(path, as_lazy(tensors))
    return path, open_official(tensors)[0]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


def tiny(name, pretrained, shared, data_path):
    """A shipped config with the shapes of the made-up model, byte tokens, and fast settings."""
    config = load_config(ROOT / "configs" / name)
    shapes = {"vocab_size", "num_blocks", "width", "head_size", "ffn_width", "low_rank_override"}
    model = dataclasses.replace(
        config.model, **{field: getattr(pretrained[1], field) for field in shapes}
    )
    run = dataclasses.replace(
        config.run, compute_dtype="float32", remat="none", recurrence="sequential", log_every=1,
        eval_batches=1, compilation_cache=str(shared / "programs"),
    )  # fmt: skip
    data = dataclasses.replace(
        config.data, tokenizer="byte", path=str(data_path), cache_dir=str(shared / "tokens")
    )
    mesh = dataclasses.replace(config.mesh, data=8)
    return dataclasses.replace(config, model=model, run=run, data=data, mesh=mesh)


@pytest.fixture(scope="module")
def chats(shared):
    """60 conversations: asked for a letter, the assistant says the next one."""
    lines = []
    for number in range(60):
        first, second = (string.ascii_lowercase[(number + step) % 26] for step in (0, 1))
        said = [{"role": "user", "content": first}, {"role": "assistant", "content": second}]
        lines.append(json.dumps({"messages": said}))
    path = shared / "chats.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def losses(workdir, name):
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [record[name] for record in records if name in record]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["", ":lora", ":state"])
def test_chat_fine_tuning_learns_the_answers(variant, pretrained, shared, chats, tmp_path):
    config = tiny(f"sft_chat.py{variant}", pretrained, shared, chats)
    (stage,) = config.stages
    stage = dataclasses.replace(stage, seq_len=48, global_batch=8, steps=6, warmup_steps=0)
    rate = {"": 1e-3, ":lora": 1e-2, ":state": 1e-1}[variant]  # of a tiny model
    stage = dataclasses.replace(stage, peak_lr=rate, schedule="constant", accumulation=2)
    run = dataclasses.replace(config.run, eval_every=1)
    config = dataclasses.replace(config, stages=(stage,), run=run)
    fit(config, tmp_path, init_from=pretrained[0])
    held_out = losses(tmp_path, "held_out_loss")  # of the same conversations every time
    assert len(held_out) == 6 and held_out[-1] < held_out[0], held_out
    base = dict(flat(get_params(load_checkpoint(pretrained[0]).model)))
    params = dict(flat(get_params(load_checkpoint(tmp_path).model)))
    changed = {n for n, p in params.items() if not same_bits(p, base.get(n, jnp.zeros(p.shape)))}
    if variant == ":lora":
        assert changed == {name for name in base if stage.lora.adapts(name)}
    elif variant == ":state":
        assert changed == {INITIAL_STATE}
    else:
        assert len(changed) > 0.9 * len(base)


@pytest.mark.slow
def test_an_official_rwkv7_is_expanded_through_all_stages(pretrained, shared, tmp_path):
    text = shared / "books.txt"
    text.write_text("".join(f"Line {i}: {i * i}.\n" for i in range(2000)))
    config = tiny("expand_pretrained.py", pretrained, shared, text)
    model = dataclasses.replace(config.model, chunk_size=32)
    stages = tuple(
        dataclasses.replace(
            stage, seq_len=max(16, stage.seq_len // 64), global_batch=8, steps=2, warmup_steps=0,
            accumulation=min(2, stage.accumulation), longce=LongCEConfig(window=62, stride=62),
        )
        for stage in config.stages
    )  # fmt: skip
    config = dataclasses.replace(config, model=model, stages=stages)
    fit(config, tmp_path, init_from=pretrained[0])
    assert np.isfinite(losses(tmp_path, "loss")).all()
    assert len(losses(tmp_path, "held_out_loss")) == len(stages) == 4
    plain = dict(flat(get_params(load_checkpoint(pretrained[0]).model)))
    preheated = load_checkpoint(tmp_path / "checkpoints" / "2").model
    for name, value in flat(get_params(preheated)):
        if name in plain:
            assert same_bits(value, plain[name]), name
    final = load_checkpoint(tmp_path)
    assert final.model.config.num_attention_blocks == 4 and final.trained_length == 512


def test_documents_are_cut_from_books(tmp_path):
    """Nothing but a short rest is lost, and the lengths are those asked for."""
    sentences = [f"“Part {i}” goes on for {'very ' * (i % 7)}long.\n" for i in range(900)]
    (tmp_path / "book.txt").write_text("".join(sentences), encoding="utf-8")
    outputs = tmp_path / "documents.jsonl", tmp_path / "documents"
    for output in outputs:
        command = [sys.executable, "tools/cut_documents.py", tmp_path / "*.txt", "--output", output]
        subprocess.run(command, check=True, capture_output=True)
    lines = [json.loads(line)["text"] for line in outputs[0].read_text().splitlines()]
    files = [path.read_text(encoding="utf-8") for path in sorted(outputs[1].iterdir())]
    assert lines == files and len(lines) > 20
    assert all(200 <= len(text.encode()) + 1 and len(text.encode()) <= 2000 for text in lines)
    whole = "".join(sentences)
    assert all(text in whole for text in lines)
    assert len(whole) - sum(map(len, lines)) < 2000 + 2 * len(lines)
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2 and "exists" in again.stderr


def test_documents_recipe_differs_in_resets_alone():
    apart, carried = load_config("documents_4k"), load_config("documents_4k:carried")
    assert apart.data.reset_at_documents and not carried.data.reset_at_documents
    same = dataclasses.replace(apart.data, reset_at_documents=False)
    assert dataclasses.replace(apart, data=same) == carried
