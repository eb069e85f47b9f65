"""Tasks of eval.py during training: what they say is what eval.py says of the checkpoint."""

import dataclasses
import json
import os
import signal

import pytest
from tensorboardX.proto.event_pb2 import Event

from rwkvx_jax import eval as eval_door
from rwkvx_jax.checkpoint import read_workdir
from rwkvx_jax.config import ConfigError, Stage
from rwkvx_jax.eval_tasks import EvalTasks
from rwkvx_jax.model import abstract_model
from rwkvx_jax.tokenizer import load_tokenizer
from rwkvx_jax.training.evaluate import Trained
from rwkvx_jax.training.loop import TrainingStopped, fit
from tests.evals.eval_models import TINY, random_params
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
    assert found[0].keys() == {"step", "stage", "eval_tasks", "passkey", "passkey_2"}
    assert found[0]["eval_tasks"] == 2
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


class Stub:
    """Tasks that give the step, after what is done at some of them."""

    def __init__(self, acts):
        self.acts, self.asked = acts, []

    def go_back(self, step):
        self.asked = [asked for asked in self.asked if asked <= step]

    def __call__(self, trained):
        self.asked.append(trained.step)
        self.acts.pop(trained.step, lambda: None)()
        trained.check()
        return {"stub": float(trained.step)}


def fail():
    raise ConfigError("the task fails")


def scalars(folder, tag):
    """Steps of a scalar in all TensorBoard files."""
    steps = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:  # length, its checksum, an event, its checksum
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            steps += [event.step for value in event.summary.value if value.tag == tag]
            data = data[16 + size :]
    return steps


@pytest.mark.thorough
def test_a_step_is_saved_before_its_tasks_which_are_finished_later(tmp_path):
    """An error at step 1, and a signal at step 2, the last one."""
    config = with_tasks("stub")
    run = dataclasses.replace(
        config.run, checkpoint_every=100, compilation_cache=str(tmp_path / "programs")
    )
    config = dataclasses.replace(config, stages=(Stage("all", 24, 8, 2, 1e-2),), run=run)
    whole, cut = Stub({}), Stub({1: fail, 2: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    fit(config, tmp_path / "whole", tasks=whole)
    with pytest.raises(ConfigError, match="the task fails"):
        fit(config, tmp_path / "cut", tasks=cut)
    assert read_workdir(tmp_path / "cut").step == 1
    with pytest.raises(TrainingStopped, match="SIGTERM after step 2; it is saved"):
        fit(config, tmp_path / "cut", tasks=cut)
    assert read_workdir(tmp_path / "cut").step == 2
    for _ in range(2):  # the second time everything is done
        fit(config, tmp_path / "cut", tasks=cut)
    assert (whole.asked, cut.asked) == ([1, 2], [1, 1, 2, 2])
    lines = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "cut")]
    assert lines[0] == lines[1] and lines[0].count(b'"stub"') == 2
    assert scalars(tmp_path / "cut/tensorboard", "eval/stub") == [1, 2]
    assert not scalars(tmp_path / "cut/tensorboard", "eval/eval_tasks")


@pytest.mark.thorough
def test_a_task_goes_on_where_it_was_ended(tmp_path):
    model = abstract_model(TINY, CURRICULUM.run)
    parts = model, random_params(TINY), load_tokenizer("byte"), 3, None
    tasks, questions = EvalTasks([PASSKEY + " --batch 1"], tmp_path), iter(range(99))

    def check():
        if next(questions) == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        tasks(Trained(*parts, check))
    path = tmp_path / "evals/step-3/passkey/passkey.jsonl"
    assert len(trials(path)[1]) == 2
    begun = path.read_bytes()
    assert tasks(Trained(*parts, lambda: None)).keys() == {"passkey"}
    assert path.read_bytes().startswith(begun) and len(trials(path)[1]) == 4
