"""The loop: resumed to the last bit wherever it stopped, and clear about why it stopped."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from etils import epath

from rwkvx_jax.checkpoint import read_workdir
from rwkvx_jax.checkpoint_store import (
    SET_ASIDE,
    Checkpoints,
    DamagedCheckpoint,
    NotWritten,
)
from rwkvx_jax.config import ConfigError, RunConfig, SourceConfig
from rwkvx_jax.records import cut_back
from rwkvx_jax.storage import exclusive, work_path
from rwkvx_jax.training import loop
from rwkvx_jax.training.curriculum import Position, stage_ends
from rwkvx_jax.training.loop import TrainingStopped, fit
from rwkvx_jax.training.metrics import MetricsWriter
from rwkvx_jax.training.trace import Trace
from rwkvx_jax.training.under_way import StepWatch
from tests.buckets import bucket  # noqa: F401
from tests.helpers import ROOT
from tests.model_cases import random_params
from tests.training.training_cases import CURRICULUM, MODEL, STAGES, STEPS, same_bits

TOKENS = {2: 2 * 8 * 24, 5: 5 * 8 * 24, 8: 7 * 8 * 24 + 8 * 40}  # by step


class Crash(Exception):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The curriculum with compiled programs shared between all runs of this file."""
    shared = tmp_path_factory.mktemp("shared")
    run = dataclasses.replace(CURRICULUM.run, compilation_cache=str(shared / "programs"))
    data = dataclasses.replace(CURRICULUM.data, cache_dir=str(shared / "tokens"))
    mesh = dataclasses.replace(CURRICULUM.mesh, data=8)
    return dataclasses.replace(CURRICULUM, run=run, data=data, mesh=mesh)


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    return fit(config, workdir), (workdir / "metrics.jsonl").read_bytes(), workdir


def at_step(monkeypatch, step, act):
    """Calls `act` when the loop has just made step `step`."""
    submit = StepWatch.submit

    def spy(self, position, metrics):
        submit(self, position, metrics)
        if position.total(CURRICULUM) == step:
            act()

    monkeypatch.setattr(StepWatch, "submit", spy)


def crash():
    raise Crash


@pytest.mark.thorough
def test_metrics_of_a_whole_run(undisturbed):
    _, metrics, workdir = undisturbed
    records = [json.loads(line) for line in metrics.splitlines()]
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, STEPS + 1))
    assert [r["stage"] for r in steps] == [s.name for s in STAGES for _ in range(s.steps)]
    held_out = [r["step"] for r in records if "held_out_loss" in r]
    assert held_out == stage_ends(CURRICULUM)
    assert abs(steps[0]["loss"] - np.log(257)) < 0.1
    timing = [json.loads(x) for x in (workdir / "timing.jsonl").read_text().splitlines()]
    assert steps[7]["tokens_seen"] == TOKENS[8]
    assert timing[0]["step"] == 0 and timing[0]["productive_seconds"] == 0
    assert {"step_seconds", "data_wait_seconds", "tokens_per_second"} < set(timing[1])


@pytest.mark.thorough
def test_crashes_leave_no_trace(config, undisturbed, tmp_path, monkeypatch):
    """Before the first checkpoint, just after a stage switch, and in the last stage."""
    params, metrics, _ = undisturbed
    for step in (2, 5, 10):
        with monkeypatch.context() as patch, pytest.raises(Crash):
            at_step(patch, step, crash)
            fit(config, tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "sta')  # a line that the kill cut off
    final = fit(config, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics
    assert same_bits(final, params)
    assert same_bits(read_workdir(tmp_path).params, params)


@pytest.mark.thorough
def test_signals_save_and_the_same_command_continues(
    config, undisturbed, tmp_path, monkeypatch, capfd
):
    params, metrics, _ = undisturbed
    for step, number in ((2, signal.SIGINT), (5, signal.SIGTERM), (8, signal.SIGHUP)):
        with monkeypatch.context() as patch:
            at_step(patch, step, lambda number=number: os.kill(os.getpid(), number))
            message = f"{number.name} after step {step}; it is saved: the same command continues"
            with pytest.raises(TrainingStopped, match=message):
                fit(config, tmp_path)
        assert read_workdir(tmp_path).step == step
        out = capfd.readouterr().out
        assert f"\n{step} of {STEPS} steps done, {TOKENS[step]:,} tokens; 0:0" in out
        assert f"(goodput); the last checkpoint is of step {step} in {tmp_path}\n" in out
        assert out.count("unknown chip 'cpu': model-flops utilisation (mfu) is not reported") == 1
    assert same_bits(fit(config, tmp_path), params)
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.slow
def test_a_run_through_the_paths_of_buckets(config, undisturbed, tmp_path, monkeypatch):
    """Crashed and resumed, over files that are only ever written whole."""
    params, metrics, _ = undisturbed
    workdir = epath.Path(tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(Crash):
        at_step(patch, 8, crash)
        fit(config, workdir)
    assert same_bits(fit(config, workdir), params)
    assert (workdir / "metrics.jsonl").read_bytes() == metrics
    assert not (workdir / "tensorboard").exists()


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_good_checkpoint(config, undisturbed, tmp_path, monkeypatch):
    save = Checkpoints.save

    def full(self, step, *arguments):
        if step > 4:
            raise NotWritten("no checkpoint could be written: No space left on device")
        save(self, step, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", full)
        with pytest.raises(TrainingStopped, match="(?s)No space left.*is of step 4.*same command"):
            fit(with_run(config, storage_patience=0.0), tmp_path)
    assert same_bits(fit(config, tmp_path), undisturbed[0])


@pytest.mark.thorough
def test_a_damaged_checkpoint_changes_nothing_until_a_step_is_named(config, undisturbed, tmp_path):
    params, metrics, workdir = undisturbed
    shutil.copytree(workdir, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / str(STEPS)
    shutil.rmtree(newest / "optimizer")
    (tmp_path / "run" / "config.json").write_text("as it was")
    with pytest.raises(DamagedCheckpoint, match=f"(?s)checkpoint {STEPS} .*--resume-step 9 "):
        fit(config, tmp_path / "run")
    assert (tmp_path / "run" / "config.json").read_text() == "as it was"
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics and newest.exists()
    with pytest.raises(ConfigError, match="no checkpoint of step 10; it has those of"):
        fit(config, tmp_path / "run", resume_step=10)
    assert same_bits(fit(config, tmp_path / "run", resume_step=9), params)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics
    assert [p.name for p in (tmp_path / "run" / SET_ASIDE).iterdir()] == [str(STEPS)]
    assert read_workdir(tmp_path / "run").step == STEPS


def with_run(config, **changes):
    return dataclasses.replace(config, run=dataclasses.replace(config.run, **changes))


def test_losses_that_are_not_finite_stop_or_are_skipped(config, tmp_path):
    poisoned = random_params(MODEL.without_attention())
    poisoned["embed"] = np.full_like(poisoned["embed"], np.nan)
    with pytest.raises(TrainingStopped, match="not finite: loss nan.* at step 1 .*no checkpoint"):
        fit(config, tmp_path / "stop", poisoned)
    skipping = with_run(config, bad_step="skip", max_skipped=2)
    with pytest.raises(TrainingStopped, match="at step 3 .*more than 2 in a row"):
        fit(skipping, tmp_path / "skip", poisoned)
    lines = (tmp_path / "skip" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=pytest.fail) for line in lines]  # no NaN in JSON
    assert [(r["skipped"], r["loss"]) for r in records] == [(1, None), (2, None)]


@pytest.mark.thorough
def test_what_a_resume_refuses_and_leaves_alone(config, undisturbed):
    _, metrics, workdir = undisturbed
    stored = (workdir / "config.json").read_bytes()
    other = dataclasses.replace(config, model=dataclasses.replace(MODEL, top_k=3))
    with pytest.raises(ConfigError, match="model.top_k: 2 -> 3"):
        fit(other, workdir)
    assert (workdir / "config.json").read_bytes() == stored
    assert (workdir / "metrics.jsonl").read_bytes() == metrics
    longer = STAGES[:2] + (dataclasses.replace(STAGES[2], steps=2),)
    with pytest.raises(ConfigError, match="4 steps are done already"):
        fit(dataclasses.replace(config, stages=longer), workdir)


def test_bad_surroundings_are_errors_before_any_work(config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file/run can't be written .*--workdir"):
        fit(config, tmp_path / "file" / "run")
    (tmp_path / "occupied" / "config.json").mkdir(parents=True)
    with pytest.raises(ConfigError, match="occupied can't be written.*config.json"):
        fit(config, tmp_path / "occupied")
    assert not list((tmp_path / "occupied").glob("*.tmp"))
    for sizes in ({"num_blocks": 10**9}, {"vocab_size": 10**13}):
        huge = dataclasses.replace(config, model=dataclasses.replace(MODEL, **sizes))
        with pytest.raises(ConfigError, match=r"'rwkv7' needs at least [\d,.]+ GiB .* device\(s\)"):
            fit(huge, tmp_path / "huge")
    assert not (tmp_path / "huge").exists()
    long = dataclasses.replace(
        config, stages=(dataclasses.replace(STAGES[2], seq_len=10_000_000, expanded=True),)
    )
    with pytest.raises(ConfigError, match="grow.*10000000"):
        fit(long, tmp_path / "long")
    assert not (tmp_path / "long" / "checkpoints").exists()
    missing = dataclasses.replace(config.data, path=str(tmp_path / "nothing.txt"))
    with pytest.raises(ConfigError, match="nothing.txt does not exist"):
        fit(dataclasses.replace(config, data=missing), tmp_path / "missing")
    mesh = dataclasses.replace(config.mesh, data=3)
    with pytest.raises(ConfigError, match="3 devices, but there are 8"):
        fit(dataclasses.replace(config, mesh=mesh), tmp_path / "mesh")


def test_a_workdir_has_one_owner(config, tmp_path):
    with exclusive(tmp_path / loop.LOCK_FILE):
        with pytest.raises(ConfigError, match="another training runs in .*--workdir"):
            fit(config, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [loop.LOCK_FILE]


def masked_source(tmp_path, texts):
    """A config whose samples are chats, learned are the answers."""
    path = tmp_path / "chat.jsonl"
    turns = [
        [{"role": "user", "content": "x" * before}, {"role": "assistant", "content": "yes"}]
        for before in texts
    ]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    return SourceConfig("jsonl", path=str(path), samples="document")


@pytest.mark.thorough
def test_nothing_to_learn_is_no_loss_of_0(config, tmp_path, capfd):
    """Answers beyond the end of the samples: of all documents, and of most of them."""
    data = dataclasses.replace(config.data, sources=(masked_source(tmp_path, [50] * 40),))
    everywhere = dataclasses.replace(config, data=data, stages=STAGES[:1])
    with pytest.raises(ConfigError, match="'rwkv7': .*in 39 of 39 documents no token counts"):
        fit(everywhere, tmp_path / "nowhere")
    source = masked_source(tmp_path, [2] + [50] * 7)
    data = dataclasses.replace(config.data, sources=(source,), held_out=0.0)
    stages = (dataclasses.replace(STAGES[0], global_batch=8, steps=3),)
    sometimes = with_run(dataclasses.replace(config, data=data, stages=stages), eval_batches=0)
    fit(sometimes, tmp_path / "sometimes")
    lines = (tmp_path / "sometimes" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["without_target"] for line in lines] == [7, 7, 7]
    out = capfd.readouterr().out
    assert "7 of the 8 samples of step 1 have no target" in out
    assert "21 samples of stage rwkv7 had no target" in out


def test_metrics_in_a_bucket(bucket):  # noqa: F811
    """A file that can't be appended to holds the same lines, and goes on after a resume."""
    workdir = work_path("gs://bucket/run")
    writer = MetricsWriter(workdir, active=True)
    writer.open(0)
    for step in (1, 2, 3):
        writer.write(step, "grow", {"loss": 1.0 / step}, group="train")
    assert not (workdir / "metrics.jsonl").exists()
    writer.upload()
    writer.write(4, "grow", {"loss": 0.1}, group="train")
    writer = MetricsWriter(workdir, active=True)  # as after a kill
    writer.open(2)
    writer.write(3, "grow", {"loss": 0.5}, group="train")
    writer.close()
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [1.0, 0.5, 0.5]
    with pytest.raises(ConfigError, match="gs://bucket/run.* on a local disk"):
        fit(CURRICULUM, workdir)


LINES = [b'{"step": %d, "loss": 1.0}\n' % i for i in (1, 2, 2, 3, 4, 5)]


def test_metrics_are_cut_back_to_a_step(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(LINES[:4]) + b'{"step": 4, "lo')  # cut off by a kill
    cut_back(path, 2)
    assert path.read_bytes() == b"".join(LINES[:3])
    cut_back(tmp_path / "absent.jsonl", 3)
    assert not caplog.records and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "broken, kept, said",
    [
        ([*LINES[:2], b"garbage\n", *LINES[4:]], [0, 1, 4], ["line 3", "between 2 and 4"]),
        ([*LINES[:4], b'{"step": 4, "lo\n', LINES[5]], [0, 1, 2, 3], ["line 5", "between 3 and 5"]),
        ([*LINES[:4], b"\0\0\0\0\0"], [0, 1, 2, 3], ["line 5", "between 3 and 5"]),
        ([*LINES[:4], b"\0\0" + LINES[4]], [0, 1, 2, 3], ["line 5", "between 3 and 5"]),
        ([*LINES[:4], b'{"step": 4, "lo'], [0, 1, 2, 3], ["line 5", "between 3 and 5"]),
        ([b"\xff\n", *LINES[:2]], [0, 1], ["line 1", "between 0 and 1"]),
    ],
    ids=["garbage", "half a line", "NUL tail", "NULs before", "half the last", "not UTF-8"],
)
def test_lines_that_are_lost_are_told(tmp_path, caplog, broken, kept, said):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(broken))
    cut_back(path, 4)
    assert path.read_bytes() == b"".join(LINES[i] for i in kept)
    assert (tmp_path / "metrics.jsonl.damaged-1").read_bytes() == b"".join(broken)
    (message,) = (record.getMessage() for record in caplog.records)
    for fragment in (*said, "metrics.jsonl.damaged-1"):
        assert fragment in message


def test_positions_along_the_stages():
    assert stage_ends(CURRICULUM) == [4, 7, 11]
    assert Position(2, 1).total(CURRICULUM) == 8


def test_trace_of_a_few_steps(tmp_path):
    trace = Trace(RunConfig(profile_steps="1:3"), tmp_path)
    add = jax.jit(lambda x: x + 1)
    x = jax.numpy.zeros(3)
    for step in range(4):
        trace.before(step)
        x = add(x)
        trace.after(step, x)
    assert len(list(tmp_path.glob("tensorboard/plugins/profile/*/*.xplane.pb"))) == 1


EXPERIMENT = """
import sys
sys.path.insert(0, {root!r})
from tests.training.training_cases import CURRICULUM
def get_config():
    return CURRICULUM
"""


@pytest.mark.slow
def test_real_kills_leave_no_trace(tmp_path):
    (tmp_path / "experiment.py").write_text(EXPERIMENT.format(root=str(ROOT)))

    def start(workdir):
        command = [sys.executable, ROOT / "train.py", "--config", tmp_path / "experiment.py"]
        command += ["--workdir", workdir, "--run.compilation-cache", tmp_path / "programs"]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        with (tmp_path / "log.txt").open("a") as log:
            return subprocess.Popen(
                list(map(str, command)), stdout=log, stderr=log, env=environment
            )

    assert start(tmp_path / "whole").wait() == 0, (tmp_path / "log.txt").read_text()
    metrics = tmp_path / "killed" / "metrics.jsonl"
    for lines in (2, 7):
        process = start(tmp_path / "killed")
        while not metrics.exists() or metrics.read_text().count("\n") < lines:
            assert process.poll() is None, (tmp_path / "log.txt").read_text()
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert start(tmp_path / "killed").wait() == 0
    assert metrics.read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert same_bits(*(read_workdir(tmp_path / name).params for name in ("whole", "killed")))


@pytest.mark.thorough
def test_the_command_line_reports_errors_in_one_line(tmp_path):
    command = [sys.executable, ROOT / "train.py", "--workdir", tmp_path, "--model.top-k", "0"]
    environment = {**os.environ, "JAX_PLATFORMS": ""}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode != 0
    assert "model.top_k is 0" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr and "libtpu" not in done.stderr
