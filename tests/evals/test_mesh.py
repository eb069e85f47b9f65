"""Evaluations over 8 simulated devices, and over two processes: the same results as on one."""

import json

import pytest

from tests.evals.eval_models import TINY, run_command, write_checkpoint
from tests.helpers import ROOT
import dataclasses

MODEL = dataclasses.replace(TINY, vocab_size=260, num_blocks=1, head_size=8)
PASSKEY = ("passkey", "--lengths", "130,200", "--depths", 3, "--trials", 2, "--piece", 64)
NIAH = ("niah", "--tasks", "single_1", "--lengths", "300", "--depths", 2, "--trials", 3)


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
