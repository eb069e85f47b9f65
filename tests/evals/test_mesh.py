"""Evaluations over 8 simulated devices, and over two processes: the same results as on one."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rwkvx_jax.config import MeshConfig
from rwkvx_jax.evals import runner
from rwkvx_jax.evals.tasks.passkey import PasskeyOptions
from rwkvx_jax.sharding import mesh_in_force
from tests.evals.eval_models import TINY, run_command, write_checkpoint
from tests.helpers import ROOT

MODEL = dataclasses.replace(TINY, vocab_size=260, num_blocks=1, head_size=8)
PASSKEY = ("passkey", "--lengths", "110,150", "--depths", 2, "--trials", 2, "--piece", 64)
NIAH = ("niah", "--tasks", "single_1", "--lengths", "520", "--depths", 2, "--trials", 3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("mesh") / "m.safetensors", MODEL)


def lines(path):
    """A results file, but for the command."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "command"} for line in found]


@pytest.mark.parametrize(
    "task, name, mesh",
    [
        (PASSKEY, "passkey", ("--mesh.data", 2, "--mesh.tensor", 2, "--mesh.context", 2)),
        pytest.param(NIAH, "niah_single_1", ("--mesh.data", -1), marks=pytest.mark.thorough),
    ],
)
def test_results_over_a_mesh_are_those_of_one_device(
    checkpoint, task, name, mesh, tmp_path, monkeypatch
):
    for output, flags in (("one", ()), ("mesh", mesh)):
        flags = *task, "--checkpoint", checkpoint, "--output", tmp_path / output, *flags
        run_command(monkeypatch, *flags)
    assert lines(tmp_path / "mesh" / f"{name}.jsonl") == lines(tmp_path / "one" / f"{name}.jsonl")


def test_checkpoints_are_read_before_the_mesh_is_in_force(tmp_path, monkeypatch):
    """A work directory is verified on one device, by programs that no mesh may reach."""
    seen = []
    monkeypatch.setattr(runner, "open_models", lambda options: seen.append(mesh_in_force()))
    see = lambda *_: seen.append(dict(mesh_in_force().shape))
    options = PasskeyOptions(
        checkpoint=(Path("model"),), output=tmp_path, mesh=MeshConfig(data=-1, tensor=4)
    )
    runner.run(options, see, lambda *_: seen.append(mesh_in_force()))
    assert seen == [None, {"data": 2, "fsdp": 1, "tensor": 4, "context": 1}, None]


@pytest.mark.slow
def test_two_processes_evaluate_and_the_first_writes(checkpoint, tmp_path, monkeypatch):
    """Each with a disk of its own; run again, they find what process 0 has."""
    flags = *PASSKEY, "--checkpoint", checkpoint
    run_command(monkeypatch, *flags, "--output", tmp_path / "one")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    for limit in (("--limit", 3), ()):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        processes = []
        for number in range(2):
            hosts = "--coordinator", f"localhost:{port}", "--num-processes", 2
            output = "--output", tmp_path / f"host{number}"
            own = *flags, *limit, *output, "--mesh.data", 2, "--mesh.tensor", 4
            command = [sys.executable, ROOT / "eval.py", *own, *hosts, "--process-id", number]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            command = [str(word) for word in command]
            processes.append(subprocess.Popen(command, env=environment, cwd=ROOT, **pipes))
        (out, error), (other_out, other_error) = (p.communicate(timeout=300) for p in processes)
        assert [p.returncode for p in processes] == [0, 0], error + other_error
        assert "passkey.jsonl" in out and "right" not in other_out
    found, expected = (lines(tmp_path / name / "passkey.jsonl") for name in ("host0", "one"))
    trials = [[line for line in some if "format" not in line] for some in (found, expected)]
    assert trials[0] == trials[1]
    assert "3 finished trials found" in out
    assert not list((tmp_path / "host1").glob("*.jsonl"))
