"""Tasks of eval.py during training: what they say is what eval.py says of the checkpoint."""

import dataclasses
import json

import pytest

from rwkvx_jax import eval as eval_door
from rwkvx_jax.config import ConfigError, Stage
from rwkvx_jax.eval_tasks import EvalTasks
from rwkvx_jax.training.loop import fit
from tests.training.training_cases import CURRICULUM

PASSKEY = "passkey --lengths 200,256 --depths 2 --trials 1 --piece 64"
STAGES = (Stage("all", 24, 8, 1, 1e-2),)


def with_tasks(*lines):
    run = dataclasses.replace(CURRICULUM.run, eval_tasks=lines, eval_every=1)
    return dataclasses.replace(CURRICULUM, stages=STAGES, run=run)


def trials(path):
    """Header and trials of a results file."""
    header, *found = map(json.loads, path.read_text().splitlines())
    return header, [{k: v for k, v in trial.items() if k != "model"} for trial in found]


@pytest.mark.thorough
def test_they_are_those_of_the_checkpoint(tmp_path):
    workdir = tmp_path / "run"
    config = with_tasks(PASSKEY, PASSKEY.replace("2 --trials", "1 --trials"))
    later = workdir / "evals" / "step-7"
    later.mkdir(parents=True)  # of a run that went further, which starts again
    fit(config, workdir, tasks=EvalTasks(config.run.eval_tasks, workdir))
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    found = [line for line in lines if "passkey" in line]
    assert [line["step"] for line in found] == [1] and not later.exists()
    assert {"held_out_loss", "passkey", "passkey_2"} <= found[0].keys()
    assert (workdir / "evals/step-1/passkey_2/passkey.png").exists()
    own = ["--checkpoint", str(workdir), "--output", str(tmp_path / "out")]
    eval_door.main([*PASSKEY.split(), *own])
    header, expected = trials(tmp_path / "out/passkey.jsonl")
    during, answers = trials(workdir / "evals/step-1/passkey/passkey.jsonl")
    assert answers == expected and len(answers) == 4
    for field in ("parameters", "model", "step", "trained_length", "vocabulary"):
        assert during["models"][0][field] == header["models"][0][field]


@pytest.mark.parametrize(
    "line, message",
    [
        ("passky --lengths 8", "did you mean passkey"),
        ("passkey --lenths 8", "lenths"),
        ("passkey --depths 0", "--depths is 0"),
        ("", "no task is named"),
        ("passkey 'x", "No closing quotation"),
        ("speed", "asks nothing of the parameters under training"),
        ("passkey --top-k 3", "leave out --checkpoint, --output, --mesh, --chunk-size"),
        ("passkey --checkpoint there", "leave out --checkpoint"),
        ("passkey --output there", "leave out --checkpoint, --output"),
    ],
)
def test_wrong_lines_are_refused_before_training(line, message, tmp_path):
    with pytest.raises(ConfigError, match="run.eval_tasks") as refused:
        EvalTasks([PASSKEY, line], tmp_path)
    assert message in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_fit_does_not_forget_them(tmp_path):
    with pytest.raises(ConfigError, match="call fit with tasks="):
        fit(with_tasks(PASSKEY), tmp_path)
