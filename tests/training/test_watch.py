"""What an operator sees of a run: clock, TensorBoard, and the end of a process that hangs."""

import os
import struct
import subprocess
import sys
from collections import Counter

import jax
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from pallas_kernels.chips import peak_flops
from rwkvx_jax.config import ConfigError, RunConfig
from rwkvx_jax.training import timing
from rwkvx_jax.training.metrics import MetricsWriter
from rwkvx_jax.training.timing import RunClock
from rwkvx_jax.training.watchdog import STATUS, step_timeout
from tests.helpers import ROOT

# ------------------------------------------------------------------------------------------- clock


@pytest.fixture
def now(monkeypatch):
    """A clock that stands still until it is set."""
    seconds = [1000.0]
    monkeypatch.setattr(timing.time, "time", lambda: seconds[0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: seconds[0])
    return seconds


def test_lines_tell_of_the_steps_since_the_last_one(now):
    clock = RunClock(None, peak=1e12)
    clock.start_stage(tokens=100, flops=2e11)
    clock.step(12.0, compiling=10.0, kept=True)
    first = clock.line()
    assert (first["step_seconds"], first["compile_seconds"]) == (12.0, 10.0)
    for seconds in (0.5, 0.5, 0.5, 2.5):
        with clock.spending("data_wait"):
            now[0] += 0.1
        clock.step(seconds, compiling=0.0, kept=seconds < 1)  # the last one was skipped
    with clock.spending("checkpoint"):
        now[0] += 3.0
    now[0] = 1010.0
    line = clock.line()
    assert line["step_seconds"] == 2.5 and line["step_seconds_p50"] == 0.5
    assert line["step_seconds_p90"] == pytest.approx(1.9)
    assert line["step_seconds_p99"] == pytest.approx(2.44)
    assert line["tokens_per_second"] == 100.0  # 400 tokens in 4 seconds
    assert line["mfu"] == pytest.approx(0.2)  # 4 x 2e11 products in 4 seconds, of 1e12 a second
    assert line["data_wait_seconds"] == pytest.approx(0.4)
    assert line["checkpoint_seconds"] == pytest.approx(3.0)
    assert line["productive_seconds"] == pytest.approx(3.5)  # 2 + 3 x 0.5
    assert (line["wall_seconds"], line["goodput"]) == (10.0, pytest.approx(0.35))
    assert "step_seconds" not in clock.line() and "mfu" not in RunClock(None, None).line()


def test_goodput_counts_restarts_and_the_steps_made_again(now, tmp_path):
    """Killed after step 3 of which 2 were saved; started again 30 seconds later."""

    def start(step):
        writer = MetricsWriter(tmp_path, active=True)
        writer.open(step)
        clock = RunClock(writer.before, None)
        if writer.before is None:
            writer.write_timing(step, clock.totals())
        clock.start_stage(1, 1.0)
        return writer, clock

    def make(writer, clock, step):
        now[0] += 5.0
        clock.step(5.0, compiling=0.0, kept=True)
        writer.write_timing(step, clock.line())

    writer, clock = start(0)
    now[0] += 7.0  # compiling; then killed before anything was saved
    writer.close()
    writer, clock = start(0)
    for step in (1, 2, 3):
        make(writer, clock, step)
    writer.close()
    now[0] += 30.0
    writer, clock = start(2)
    make(writer, clock, 3)
    totals = clock.totals()
    writer.close()
    assert totals["wall_seconds"] == 7 + 15 + 30 + 5
    assert totals["productive_seconds"] == 15
    assert totals["goodput"] == pytest.approx(15 / 57)
    assert clock.summary() == "0:00:57 h since the run began, 26% of it in steps (goodput)"


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("cpu", None),
    ],
)
def test_peaks_of_chips(kind, peak):
    assert peak_flops(kind) == peak


# ------------------------------------------------------------------------------------- TensorBoard


def events(folder):
    """All events of a folder in TensorBoard's order, without those that later starts replace."""
    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4
            if event.session_log.status == SessionLog.START:
                found = [e for e in found if e.step < event.step]
            found.append(event)
    return [(v.tag, e.step, v) for e in found for v in e.summary.value]


def test_a_resumed_run_leaves_no_overlapping_events(tmp_path):
    for start, end, config in ((0, 5, "first"), (3, 4, "second"), (3, 6, "third")):
        writer = MetricsWriter(tmp_path, active=True)
        writer.open(start, config)
        for step in range(start + 1, end + 1):
            values = {"loss": float(start), "tokens_seen": 8 * step}
            writer.write(step, "grow", values, group="train")
            timed = {"step_seconds": 1.0, "step_seconds_p50": 1.0, "goodput": 0.5, "time": 1e9}
            writer.write_timing(step, timed)
        writer.write(end, "grow", {"held_out_loss": 2.0}, group="eval")
        writer.close()
    found = events(tmp_path / "tensorboard")
    assert max(Counter((tag, step) for tag, step, _ in found).values()) == 1
    losses = [(step, v.simple_value) for tag, step, v in found if tag == "train/loss"]
    assert losses == [(1, 0.0), (2, 0.0), (3, 0.0), (4, 3.0), (5, 3.0), (6, 3.0)]
    assert [step for tag, step, _ in found if tag == "eval/held_out_loss"] == [6]
    scalars = {tag for tag, _, v in found if v.HasField("simple_value")}
    assert scalars == {
        "train/loss", "train/tokens_seen", "time/step", "time/step_p50", "perf/goodput",
        "eval/held_out_loss",
    }  # fmt: skip
    texts = [(step, v.tensor.string_val[0]) for tag, step, v in found if "config" in tag]
    assert texts == [(1, b"```\nfirst```"), (4, b"```\nthird```")]


# ---------------------------------------------------------------------------------------- watchdog

HANGING = """
import time
from rwkvx_jax.training.watchdog import Watchdog

def a_step_that_hangs():
    time.sleep(100)

dog = Watchdog(1.0, "grow", "step 1")
with dog.paused():
    time.sleep(1.8)  # compiling
for step in range(2, 5):
    time.sleep(0.4)
    dog.finished(f"step {step}")
print("not flushed", end="")
a_step_that_hangs()
"""


@pytest.mark.thorough
def test_a_step_that_hangs_ends_the_process():
    done = subprocess.run(
        [sys.executable, "-c", HANGING],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == STATUS, done.stderr
    assert "host 0 of 1 (" in done.stderr and "stage grow" in done.stderr
    assert "nothing was finished for 1 s (run.step_timeout) while waiting for step 4" in done.stderr
    assert "in a_step_that_hangs" in done.stderr
    assert done.stdout == "not flushed"


EXPERIMENT = """
import dataclasses, sys, time
sys.path.insert(0, {root!r})
from rwkvx_jax.training.under_way import StepWatch
from tests.training.training_cases import CURRICULUM

def get_config():
    fetch = StepWatch.fetch
    made = []
    def hanging(self, iterator):
        made.append(None)
        if len(made) == 3:
            time.sleep(1000)
        return fetch(self, iterator)
    StepWatch.fetch = hanging
    return dataclasses.replace(CURRICULUM, stages=CURRICULUM.stages[:1])
"""


@pytest.mark.slow
def test_a_run_that_hangs_ends(tmp_path):
    (tmp_path / "experiment.py").write_text(EXPERIMENT.format(root=str(ROOT)))
    command = [sys.executable, ROOT / "train.py", "--config", tmp_path / "experiment.py"]
    command += ["--workdir", tmp_path / "run", "--run.step-timeout", "5"]
    done = subprocess.run(
        list(map(str, command)),
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == STATUS, done.stderr
    assert "stage rwkv7" in done.stderr and "while waiting for step 2" in done.stderr
    assert "in hanging" in done.stderr


def test_the_watchdog_is_on_where_there_are_several_hosts(monkeypatch):
    assert step_timeout(RunConfig()) == 0
    assert step_timeout(RunConfig(step_timeout=60.0)) == 60
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert step_timeout(RunConfig()) == 1800
    assert step_timeout(RunConfig(step_timeout=0.0)) == 0
    with pytest.raises(ConfigError, match="run.step_timeout is -1.0: use a number of seconds"):
        RunConfig(step_timeout=-1.0)
