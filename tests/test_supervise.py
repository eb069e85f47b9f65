"""The script that starts a training command again."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tools.supervise import Patience, Supervisor, newest_step

# A stand-in for train.py: run i makes a checkpoint if i < made, and succeeds in run `last`.
COMMAND = """
import pathlib, sys
workdir, made, last = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
with (workdir / "runs").open("a") as file:
    file.write("x")
run = len((workdir / "runs").read_text()) - 1
if run < made:
    (workdir / "checkpoints" / str(run)).mkdir(parents=True)
sys.exit(0 if run == last else 3)
"""


def supervise(workdir, made, last, failures=2):
    command = [sys.executable, "-c", COMMAND, str(workdir), str(made), str(last)]
    status = Supervisor(command, str(workdir), Patience(failures, delay=0.0)).run()
    return status, len((workdir / "runs").read_text())


def test_a_command_that_makes_progress_is_started_until_it_succeeds(tmp_path):
    assert supervise(tmp_path, made=4, last=4) == (0, 5)


def test_failures_without_a_new_checkpoint_end_it(tmp_path):
    assert supervise(tmp_path, made=1, last=9) == (3, 3)


def test_pauses_grow_and_end_somewhere():
    patience = Patience(delay=10.0, longest=60.0)
    assert [patience.pause(failed) for failed in range(6)] == [10, 10, 20, 40, 60, 60]


def test_the_newest_step_skips_what_is_no_checkpoint(tmp_path):
    assert newest_step(str(tmp_path)) == -1
    for name in ("8", "12", "100.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_step(str(tmp_path)) == 12


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_command_and_is_no_failure(tmp_path, kind):
    child = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        f"pathlib.Path({str(tmp_path / 'up')!r}).touch()\n"
        "time.sleep(600)"
    )
    line = [sys.executable, "-m", "tools.supervise", "--workdir", str(tmp_path), "--"]
    process = subprocess.Popen([*line, sys.executable, "-c", child], stderr=subprocess.PIPE)
    end = time.monotonic() + 60
    while not (tmp_path / "up").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    os.kill(process.pid, kind)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 7 and b"again" not in said
