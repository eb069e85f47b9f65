"""Jobs of several processes: real ones, on one machine, with collectives between them."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rwkvx_jax import hosts
from rwkvx_jax.checkpoint import flat, load_model, read_workdir
from rwkvx_jax.config import ConfigError, MeshConfig
from rwkvx_jax.hosts import (
    check_joined,
    first_does,
    global_batch,
    host_rows,
    join_hosts,
    stop_signal,
)
from rwkvx_jax.sharding import batch_sharding, make_mesh
from tests.helpers import ROOT, assert_close
from tests.training.training_cases import same_bits

CONFIG = """
from rwkvx_jax.config import (
    Config, LongCEConfig, MeshConfig, ModelConfig, OptimizerConfig, RunConfig, Stage
)

MODEL = ModelConfig(
    vocab_size=260, num_blocks=2, num_attention_blocks=1, width=32, head_size=8, chunk_size=8,
    top_k=2, low_rank_override=(4, 4, 4, 4),
)

def get_config():
    stages = (
        Stage("rwkv7", 32, 8, 4, 1e-2, expanded=False),
        Stage("grow", 64, 8, 8, 1e-2, loss="longce", longce=LongCEConfig(8, 16)),
    )
    run = RunConfig(
        compute_dtype="float32", remat="none", recurrence="sequential", log_every=1,
        eval_batches=1, checkpoint_every=3,
    )
    # The context axis lies within a process, data and fsdp across.
    mesh = MeshConfig(data=2, fsdp=2, context=2)
    return Config(MODEL, stages, run=run, mesh=mesh, optimizer=OptimizerConfig(eps=1e-3))
"""
STEPS = 12
pytestmark = pytest.mark.filterwarnings("ignore")


class Job:
    """`train.py` as `count` processes with 8 / count simulated devices each."""

    def __init__(self, tmp_path: Path, workdir: Path, count: int, *overrides: str):
        (tmp_path / "config.py").write_text(CONFIG)
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(8 // count), "PYTHONPATH": str(ROOT)
        }  # fmt: skip
        command = [sys.executable, str(ROOT / "train.py"), "--config", str(tmp_path / "config.py")]
        self.workdir, self.processes = workdir, []
        for number in range(count):
            hosts = ["--coordinator", f"localhost:{port}", "--num-processes", str(count)]
            hosts += ["--process-id", str(number), "--heartbeat-timeout", "30"]
            self.processes.append(
                subprocess.Popen(
                    [
                        *command,
                        "--workdir",
                        str(workdir),
                        *(hosts if count > 1 else []),
                        *overrides,
                    ],
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )

    def wait_for_step(self, step: int) -> None:
        while not self.metrics() or self.metrics()[-1]["step"] < step:
            assert all(process.poll() is None for process in self.processes), self.end()
            time.sleep(0.05)

    def end(self, seconds: float = 300) -> list[tuple[int, str, str]]:
        """(return code, stdout, stderr) of each process."""
        outputs = [process.communicate(timeout=seconds) for process in self.processes]
        gloo = re.compile(r"^\[Gloo\].*\n", re.MULTILINE)  # which talks on every process
        return [
            (process.returncode, gloo.sub("", out), error)
            for process, (out, error) in zip(self.processes, outputs, strict=True)
        ]

    def metrics(self) -> list[dict]:
        path = self.workdir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    job = Job(folder, folder / "run", 2)
    return job, job.end()


def final(workdir: Path):
    return read_workdir(workdir, STEPS).params


@pytest.mark.slow
def test_two_processes_train_and_only_the_first_prints(undisturbed):
    job, ((code, out, error), (other_code, other_out, _)) = undisturbed
    assert (code, other_code) == (0, 0), error
    assert "8 cpu device(s) of 2 hosts" in out
    assert other_out == ""
    losses = [record["loss"] for record in job.metrics() if "loss" in record]
    assert len(losses) == STEPS and losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_process_ends_the_others_and_the_job_continues(undisturbed, tmp_path, victim):
    expected, _ = undisturbed
    job = Job(tmp_path, tmp_path / "run", 2)
    job.wait_for_step(8)
    job.processes[victim].send_signal(signal.SIGKILL)
    begin = time.monotonic()
    code, _, error = job.end(60)[1 - victim]
    assert time.monotonic() - begin < 60
    assert code != 0 and error
    if victim == 1:
        shutil.copytree(tmp_path / "run", tmp_path / "alone")

    job = Job(tmp_path, tmp_path / "run", 2)
    (code, out, error), _ = job.end()
    assert code == 0, error
    assert "continuing after step" in out
    assert same_bits(final(job.workdir), final(expected.workdir))
    assert job.metrics() == expected.metrics()
    if victim == 0:
        return

    # As one process, which has another mesh as well: the same samples, rounded otherwise.
    job = Job(tmp_path, tmp_path / "alone", 1, "--mesh.data", "4", "--mesh.fsdp", "1")
    ((code, out, error),) = job.end()
    assert code == 0, error
    assert "continuing after step" in out
    for found, wanted in zip(job.metrics(), expected.metrics(), strict=True):
        for name in found.keys() & {"loss", "objective", "held_out_loss"}:
            assert_close(found[name], wanted[name], rel=1e-5, name=f"{name} {found['step']}")
    for (name, x), (_, y) in zip(
        flat(final(job.workdir)), flat(final(expected.workdir)), strict=True
    ):
        assert_close(x, y, rel=1e-4, name=name)


@pytest.mark.slow
def test_a_notice_to_one_process_stops_all_after_the_same_step(undisturbed, tmp_path):
    expected, _ = undisturbed
    job = Job(tmp_path, tmp_path / "run", 2)
    job.wait_for_step(4)
    late = Job(tmp_path, tmp_path / "run", 2)  # in the same workdir: ends before it touches it
    (code, _, error), (other_code, _, other_error) = late.end(120)
    assert (code, other_code) == (1, 1)
    assert "another training runs in" in error and "message of process 0 says" in other_error
    job.processes[1].send_signal(signal.SIGINT)  # passed on as SIGTERM
    (code, _, error), (other_code, _, _) = job.end(120)
    assert (code, other_code) == (1, 1)
    assert "stopped by SIGTERM after step" in error
    saved = read_workdir(job.workdir).step
    assert f"after step {saved};" in error
    (code, _, error), _ = Job(tmp_path, tmp_path / "run", 2).end()
    assert code == 0, error
    assert same_bits(final(job.workdir), final(expected.workdir))


@pytest.mark.slow
def test_a_run_of_two_processes_is_read_by_one(undisturbed):
    """One device of another process: nothing is known of the eight that wrote it."""
    workdir = undisturbed[0].workdir
    code = "import sys, rwkvx_jax as r; print(r.load_model(sys.argv[1]).head.weight.sum())"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, str(workdir)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert_close(float(done.stdout), np.sum(load_model(workdir).head.weight[...]), rel=1e-3)


@pytest.mark.slow
def test_two_processes_start_from_a_run(undisturbed, tmp_path):
    """From its RWKV-7, each reading its parts; with the blocks that one process makes of it."""
    source = undisturbed[0].workdir / "checkpoints" / "4"
    changes = ["--init-from", str(source), "--model.attention-init", "copy"]
    changes += ["--stages.0.expanded", "--stages.0.steps", "1", "--stages.1.steps", "1"]
    losses = []
    for count in (2, 1):
        job = Job(tmp_path, tmp_path / str(count), count, *changes)
        (code, _, error), *_ = job.end()
        assert code == 0, error
        losses.append([record["loss"] for record in job.metrics() if "loss" in record])
    assert_close(*losses, rel=1e-5)


# ----------------------------------------------------------------------------- within one process


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("localhost:1", 2, None), "--process-id missing: give all of"),
        ((None, 2, 0), "--coordinator missing"),
        (("localhost:1", 2, 2), "--process-id is 2: it must be one of 0 to 1"),
        (("localhost", 2, 0), "--coordinator is 'localhost': write HOST:PORT"),
    ],
)
def test_bad_host_flags(arguments, message):
    with pytest.raises(ConfigError, match=message):
        join_hosts(*arguments, detect=False)


def test_the_heartbeat_is_jaxs_own_or_the_given_one(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **given: calls.append(given))
    join_hosts("localhost:1", 2, 0, detect=False)
    join_hosts("localhost:1", 2, 0, detect=False, heartbeat_timeout=300)
    assert [call.get("heartbeat_timeout_seconds") for call in calls] == [None, 300]
    with pytest.raises(ConfigError, match="--heartbeat-timeout is 0: use at least 1 second"):
        join_hosts("localhost:1", 2, 0, detect=False, heartbeat_timeout=0)


def test_hosts_that_were_never_connected(monkeypatch):
    check_joined()
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(ConfigError, match="one of 4 hosts, which were not connected"):
        check_joined()
    with pytest.raises(ConfigError, match="6 samples can't be shared out by 4 hosts: .* by 8"):
        batch_sharding(make_mesh(MeshConfig()), 6)


class _OneHost:
    """A sharding of which this host holds the devices `mine`."""

    def __init__(self, sharding, mine):
        self.sharding, self.mine = sharding, mine

    def addressable_devices_indices_map(self, shape):
        indices = self.sharding.devices_indices_map(shape)
        return {device: index for device, index in indices.items() if device.id in self.mine}


@pytest.mark.parametrize(
    "sizes, mine, rows",
    [
        ({"data": 8}, (0, 1, 2, 3), [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"data": 8}, (0, 1, 4, 5), [0, 1, 2, 3, 8, 9, 10, 11]),
        ({"data": 2, "context": 4}, (4, 5), [8, 9, 10, 11, 12, 13, 14, 15]),
        ({"data": 1, "context": 8}, (4, 5, 6, 7), list(range(16))),
    ],
    ids=str,
)
def test_each_host_reads_the_rows_of_its_devices(sizes, mine, rows):
    sharding = batch_sharding(make_mesh(MeshConfig(**sizes)), 16)
    assert host_rows(_OneHost(sharding, mine), 16) == rows


def test_global_batches_put_every_row_in_its_place():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, context=2))
    batch = {"tokens": np.arange(8 * 5).reshape(8, 5), "mask": np.ones((8, 4), np.float32)}
    sharding = batch_sharding(mesh, 8)
    found = global_batch(sharding, batch, 8)
    assert found["tokens"].sharding == NamedSharding(mesh, P(("data", "fsdp"), None))
    for name, wanted in batch.items():
        np.testing.assert_array_equal(found[name], wanted)
        assert found[name].dtype == wanted.dtype or name == "tokens"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_of_a_single_process(number):
    before = signal.getsignal(number)
    with stop_signal() as stopping:
        assert not stopping()
        os.kill(os.getpid(), number)
        assert stopping() == stopping() == number.name
        for other in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # ends at once
            assert signal.getsignal(other) == signal.SIG_DFL
    assert signal.getsignal(number) == before


def test_a_signal_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signal() as stopping:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stopping()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_only_the_first_process_does(monkeypatch):
    done = []
    first_does(lambda: done.append(1), "it can't be done")
    assert done == [1]

    def fail():
        raise OSError("disk full")

    with pytest.raises(ConfigError, match="it can't be done: disk full"):
        first_does(fail, "it can't be done")
    # As process 1 of 2, which hears from process 0 that it failed.
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "_told", lambda _: b"[true, null]")
    with pytest.raises(ConfigError, match="it can't be done: the message of process 0 says why"):
        first_does(lambda: done.append(2), "it can't be done")
    assert done == [1]
