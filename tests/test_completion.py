"""`rwkvx completion bash`, as bash itself uses the script."""

import subprocess

import pytest

from rwkvx_jax.__main__ import COMMANDS
from rwkvx_jax.completion import main
from rwkvx_jax.convert.__main__ import Options
from rwkvx_jax.eval import TASKS

COMPLETE = """
source "$0"
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_rwkvx
echo "${COMPREPLY[*]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("completion") / "rwkvx.bash"
    with pytest.MonkeyPatch.context() as patch, path.open("w") as file:
        patch.setenv("COLUMNS", "80")
        patch.setattr("sys.stdout", file)
        main(["bash"])
    return path


@pytest.fixture
def complete(script):
    """What Tab offers behind the given words, the last of which is unfinished."""

    def offered(*words):
        command = ["bash", "--norc", "-c", COMPLETE, script, "rwkvx", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()

    return offered


def test_commands_and_tasks(complete):
    assert complete("") == [*COMMANDS]
    assert complete("co") == ["convert", "completion"]
    assert complete("eval", "") == [*TASKS]
    assert complete("convert", "") == []  # bash offers files


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in ("eval", "completion")])
def test_every_command_has_flags(command, complete):
    flags = complete(command, "x", "--")
    assert len(flags) > 3 and len(set(flags)) == len(flags)


def test_flags_are_those_of_the_parsers(complete):
    fields = {f"--{name.replace('_', '-')}" for name in Options.__dataclass_fields__}
    assert set(complete("convert", "--")) == fields - {"--src", "--dst"} | {"--help"}
    assert complete("eval", "niah", "--sel") == ["--selector"]
    assert complete("train", "--config", "x", "--stages.0.pe") == ["--stages.0.peak-lr"]
    assert "--data.sources.0.weight" in complete("train", "--data.s")
