"""Models of other mixers are trained, expanded, resumed, continued and evaluated like any."""

import dataclasses
import json

import numpy as np
import pytest

from rwkvx_jax.checkpoint import read_workdir
from rwkvx_jax.config import Stage
from rwkvx_jax.eval import main as evaluate
from rwkvx_jax.generate.__main__ import main as generate
from rwkvx_jax.training.loop import fit
from rwkvx_jax.training.under_way import StepWatch
from tests.training.training_cases import CURRICULUM, MODEL, same_bits

STAGES = (
    Stage("base", 24, 8, 2, 1e-2, expanded=False),
    Stage("preheat", 24, 8, 3, 1e-2, trainable="attention"),
)


class Crash(Exception):
    """Stands for the end of the process."""


@pytest.mark.thorough
@pytest.mark.parametrize("mixer", ["mamba2", "gated_deltanet"])
def test_from_nothing_to_an_evaluation(mixer, tmp_path, monkeypatch, capsys):
    config = dataclasses.replace(
        CURRICULUM,
        model=dataclasses.replace(MODEL, mixer=mixer),
        stages=STAGES,
        run=dataclasses.replace(
            CURRICULUM.run,
            recurrence=None,
            checkpoint_every=1,
            compilation_cache=str(tmp_path / "programs"),
        ),
        mesh=dataclasses.replace(CURRICULUM.mesh, data=8),
    )
    whole = fit(config, tmp_path / "whole")
    base = read_workdir(tmp_path / "whole", 2).params
    assert same_bits(base["blocks"], whole["blocks"])  # the preheat moved attention alone
    assert np.asarray(whole["attention_blocks"]["attention"]["output"]).any()

    # Stopped in the middle of the preheat, the same command continues to the last bit.
    submit = StepWatch.submit

    def crash(self, position, metrics):
        submit(self, position, metrics)
        if position.total(config) == 4:
            raise Crash

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(StepWatch, "submit", crash)
        fit(config, tmp_path / "run")
    assert same_bits(fit(config, tmp_path / "run"), whole)

    losses = [
        json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    assert all(np.isfinite(r["loss"]) for r in losses if "loss" in r)
    capsys.readouterr()
    generate(["--checkpoint", str(tmp_path / "run"), "--prompt", "The ", "--max-tokens", "4"])
    assert capsys.readouterr().out.startswith("The ")
    evaluate(
        ["passkey", "--checkpoint", str(tmp_path / "run"), "--lengths", "300", "--depths", "1",
         "--trials", "2", "--output", str(tmp_path / "eval")]
    )  # fmt: skip
    assert list((tmp_path / "eval").iterdir())
