"""A whole run on packed documents."""

import dataclasses
import json
import re
import shutil

import pytest

from rwkvx_jax.config import DataConfig, MeshConfig, SourceConfig
from rwkvx_jax.training.loop import fit
from tests.training.training_cases import CURRICULUM, STAGES, same_bits


@pytest.mark.thorough
def test_training_on_packed_documents(tmp_path, capfd):
    """Padding is reported, held-out losses are computed, and a restart changes nothing."""
    lines = [json.dumps({"text": "packed " * (1 + i % 5)}) + "\n" for i in range(200)]
    (tmp_path / "t.jsonl").write_text("".join(lines))
    source = SourceConfig("jsonl", path=str(tmp_path / "t.jsonl"), samples="packed")
    stages = (dataclasses.replace(STAGES[0], seq_len=48, loss_average="sample"),)
    data = DataConfig(sources=(source,), held_out=0.1, align_documents=8)
    mesh = MeshConfig(data=8)
    packed = dataclasses.replace(CURRICULUM, data=data, stages=stages, mesh=mesh)
    whole = fit(packed, tmp_path / "whole")
    out = capfd.readouterr().out
    assert re.search(r"t.jsonl: \d+ documents, .* windows of 48 tokens, [\d.]+ % padding", out)
    records = [json.loads(x) for x in (tmp_path / "whole" / "metrics.jsonl").open()]
    assert all(0 < r["padding"] < 0.6 for r in records if "loss" in r)
    assert [r["held_out_loss"] > 0 for r in records if "held_out_loss" in r] == [True]
    last = tmp_path / "whole" / "checkpoints" / "4"
    assert last.exists()
    shutil.rmtree(last)  # continues after step 3
    assert same_bits(fit(packed, tmp_path / "whole"), whole)
