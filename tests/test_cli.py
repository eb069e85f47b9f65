"""How command lines end: one message and a status for what users can mend, a traceback for bugs."""

import contextlib
import dataclasses
import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from rwkvx_jax import cli
from rwkvx_jax.config import ConfigError
from rwkvx_jax.convert.__main__ import main as convert
from rwkvx_jax.convert.tensors import ConversionError
from rwkvx_jax.eval import parse as parse_eval
from rwkvx_jax.experiment_files import load_config
from rwkvx_jax.storage import new_file
from rwkvx_jax.training.loop import TrainingStopped
from tests.evals.eval_models import write_checkpoint
from tests.helpers import ROOT

SECONDS = 120  # for a command that would hang


def end(capsys, error, argv=()):
    """Exit status, and what is printed to the standard error, of a command that raises."""
    with pytest.raises(SystemExit) as stopped, cli.command_line("prog", argv):
        raise error
    return stopped.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    "error, status, message",
    [
        (ConfigError("width is 3"), 1, "error: width is 3\n"),
        (ConversionError("no tensor x"), 1, "error: no tensor x\n"),
        (TrainingStopped("loss"), 1, "error: loss\n"),
        (cli.UsageError("no flag --x"), 2, "error: no flag --x\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "error: the disk is full: free"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "a/b"), 1, "error: a/b: the quota of this"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), 1, "error: a: no permission"),
        (OSError(errno.EROFS, "Read-only", b"a\xff", None, "c"), 1, "error: a\\udcff -> c: the"),
        (OSError(errno.EXDEV, "Invalid cross-device link", "a"), 1, "a: Invalid cross-device"),
        (MemoryError("Unable to allocate 7.28 TiB"), 1, "out of memory: Unable to allocate 7.28"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nx"),
            1,
            "out of memory: Out of memory allocating 9 bytes.; ask for less",
        ),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (ConfigError("\x1b[31mred\x07\nnext"), 1, "error: \\x1b[31mred\\x07\nnext\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_what_a_user_can_mend_is_one_message(capsys, error, status, message):
    found, printed = end(capsys, error)
    assert found == status and message in printed and "Traceback" not in printed


@pytest.mark.parametrize(
    "error",
    [
        ValueError("of numpy"),
        OSError(errno.EBADF, "Bad file descriptor"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),  # of a worker: our own output is open
        jax.errors.JaxRuntimeError("INTERNAL: a message that says RESOURCE_EXHAUSTED: too"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_bugs_keep_their_traceback_and_say_so(error):
    with pytest.raises(type(error)) as raised, cli.command_line("prog", ["--text", "a b"]):
        raise error
    (note,) = raised.value.__notes__
    assert "is a bug of rwkvx-jax" in note and note.endswith("command: prog --text 'a b'")


def test_arguments_that_are_no_text_are_refused(capsys):
    with (
        pytest.raises(SystemExit) as stopped,
        cli.command_line("prog", ["a", os.fsdecode(b"\xff")]),
    ):
        raise AssertionError("not reached")
    assert (
        stopped.value.code == 2 and "argument 2 is not UTF-8: b'\\xff'" in capsys.readouterr().err
    )


# ------------------------------------------------------------------------------------------------
# Overrides and experiment files
# ------------------------------------------------------------------------------------------------


def train_flags(capsys, *argv):
    parser = cli.argparse.ArgumentParser(prog="train.py", add_help=False)
    parser.add_argument("--config", default=ROOT / "configs" / "tiny_cpu.py")
    parser.add_argument("--workdir")
    with pytest.raises(SystemExit) as stopped, cli.command_line("train.py", argv):
        cli.parse_with_overrides(parser, argv)
    return stopped.value.code, capsys.readouterr()


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--stages.9.steps", "the config has 4 stages: 0 (rwkv7), 1 (preheat), 2 (grow-256)"),
        ("--data.sources.4.weight=1", "the config has 4 data.sources: 0 (text), 1 (pairs)"),
        ("--stages.x.steps", "the config has 4 stages"),
        ("--optimizer.wd", "choose from policy, b1, b2, eps, weight-decay, clip-norm"),
        ("--optimizer.weigt-decay", "did you mean --optimizer.weight-decay?"),
        ("--stages.0.peak_rl", "did you mean --stages.0.peak-lr?"),
        ("--workdri", "did you mean --workdir?"),
        ("--zzz", "--help lists all flags"),
    ],
)
def test_an_unknown_flag_is_told_what_there_is(capsys, flag, message):
    status, printed = train_flags(capsys, flag, "3")
    assert status == 2 and message in printed.err, printed.err


@pytest.mark.parametrize("value", ["9" * 25, "9" * 5000, "-" + "9" * 25, "1e3", "x"])
def test_integers_that_no_machine_holds_are_refused(capsys, value):
    status, printed = train_flags(capsys, f"--stages.0.steps={value}")
    assert status in (1, 2) and "Traceback" not in printed.err and "steps" in printed.err


def test_flags_may_be_written_with_underscores_and_booleans_negated():
    parser = cli.argparse.ArgumentParser(prog="train.py", add_help=False)
    parser.add_argument("--config", default=ROOT / "configs" / "tiny_cpu.py")
    flags = ["--optimizer.weight_decay=0.5", "--stages.0.no-expanded", "--data.seed", "3"]
    config = cli.parse_with_overrides(parser, flags)[1]
    assert config.optimizer.weight_decay == 0.5 and config.data.seed == 3


def test_the_help_has_every_field_once_with_its_values_and_fits_two_screens(capsys):
    config = load_config("tiny_cpu")
    _, printed = train_flags(capsys, "--help")
    lines = printed.out.splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 120
    shown = [
        line.split()[0] for line in lines if line.startswith("  --") and "." in line.split()[0]
    ]
    spelled = (f"--{name.replace('_', '-')}" for name, _ in cli._fields(config))
    expected = [re.sub(r"\.\d+\.", ".N.", name) for name in spelled]
    assert sorted(shown) == sorted(set(expected))
    (line,) = (line for line in lines if "--stages.N.seq-len" in line)
    assert ", ".join(str(stage.seq_len) for stage in config.stages) in line
    assert line.endswith("Tokens per sample")


@pytest.mark.parametrize(
    "words", [["0.5,0.25,0.25,0"], ["0.5", "0.25", "0.25", "0"], ["0.5, 0.25, 0.25, 0"]]
)
def test_lists_are_written_with_commas_or_blanks(words):
    parser = cli.argparse.ArgumentParser(prog="train.py", add_help=False)
    parser.add_argument("--config", default="tiny_cpu")
    flags = ["--stages.0.source-weights", *words, "--data.seed", "3"]
    config = cli.parse_with_overrides(parser, flags)[1]
    assert config.stages[0].source_weights == (0.5, 0.25, 0.25, 0) and config.data.seed == 3


def test_commas_of_a_command_are_its_own():
    parser = cli.argparse.ArgumentParser(prog="train.py", add_help=False)
    parser.add_argument("--config", default="tiny_cpu")
    lines = ["passkey --lengths 256,512", "lookup --trials 2"]
    config = cli.parse_with_overrides(parser, ["--run.eval-tasks", *lines])[1]
    assert config.run.eval_tasks == tuple(lines)


@pytest.mark.parametrize("lengths", [["256,512"], ["256", "512"], ["256", "512,1024"]])
def test_lists_of_tasks_are_written_with_commas_or_blanks(lengths):
    flags = ["niah", "--checkpoint", "x", "--output", "out", "--tasks", "single_1,recall_64"]
    options = parse_eval([*flags, "--lengths", *lengths])
    assert options.tasks == ("single_1", "recall_64") and options.lengths[:2] == (256, 512)
    with pytest.raises(ConfigError, match="no task 'recal_64': did you mean recall_64"):
        dataclasses.replace(options, tasks=("recal_64",))


def test_an_unknown_task_gets_the_nearest():
    with pytest.raises(cli.UsageError, match="no task 'passky': did you mean passkey"):
        parse_eval(["passky"])


def test_help_needs_no_other_flag(capsys):
    status, printed = train_flags(capsys, "--help")
    assert status == 0 and "--stages.N.peak-lr" in printed.out
    status, printed = train_flags(capsys, "--help-all")
    assert status == 0 and "--stages.3.peak-lr" in printed.out
    parser = cli.argparse.ArgumentParser(prog="plan", add_help=False)
    parser.add_argument("--config", required=True)
    for argv in (["-h"], ["--config", "--help"]):
        with pytest.raises(SystemExit) as stopped, cli.command_line("plan", argv):
            cli.parse_with_overrides(parser, argv)
        assert stopped.value.code == 0
        assert "With --config FILE" in capsys.readouterr().out


@pytest.mark.parametrize(
    "code, message",
    [
        ("x = 1", "defines no get_config()"),
        ("get_config = 3", "defines no get_config()"),
        ("def get_config(): return 3", "returned int, not Config"),
        ("import no_such_module", "line 1: ModuleNotFoundError: No module named"),
        ("\ndef get_config(:", "line 2: SyntaxError"),
        ("def get_config():\n\n    return 1 / 0", "line 3: ZeroDivisionError"),
        (b"\xff\xfe", "line"),
        (b"\x00", "line"),
    ],
)
def test_errors_in_an_experiment_file_name_its_line(tmp_path, code, message):
    path = tmp_path / "mine.txt"  # any suffix
    path.write_bytes(code if isinstance(code, bytes) else code.encode())
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    assert message in str(raised.value) and str(path) in str(raised.value)


# ------------------------------------------------------------------------------------------------
# The real doors, as processes
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model") / "tiny.safetensors")


def start(*command, **options):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, text=True, **options
    )


@pytest.mark.thorough
def test_a_reader_that_goes_away_ends_a_command_quietly(checkpoint):
    command = ("-m", "rwkvx_jax.generate", "--checkpoint", checkpoint, "--prompt", "The")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = start(*command, "--max-tokens", "3000", **pipes)
    assert process.stdout.read(1) == "T"
    process.stdout.close()
    assert process.wait(SECONDS) == 141
    assert "Error" not in (printed := process.stderr.read()), printed


def test_an_interrupted_command_says_so():
    code = (
        "import time; from rwkvx_jax.cli import command_line\n"
        "with command_line('prog', []): print('begun', flush=True); time.sleep(100)"
    )
    process = start("-c", code, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=SECONDS)
    assert process.returncode == 130 and printed == "interrupted\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_output_to_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        process = start("eval.py", "--help", stdout=full, stderr=subprocess.PIPE)
        _, printed = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert "the disk is full: free some space" in printed and printed.count("\n") == 1


@contextlib.contextmanager
def largest_file(size):
    """Files of this process can't grow beyond so many bytes: a disk that is full."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_can_not_be_written_is_named(checkpoint, tmp_path, capsys):
    big = tmp_path / "big"
    with pytest.raises(SystemExit, match="1"), cli.command_line("prog", []):
        with largest_file(1000), new_file(big) as file:
            file.write(bytes(100_000))
    assert f"error: {big}: the file is larger than allowed here" in capsys.readouterr().err
    for destination, limit, message in (
        (tmp_path / "new.safetensors", 1000, "File too large"),
        (tmp_path / "nowhere" / "new.safetensors", 10**9, "nowhere"),
        (checkpoint / "new.safetensors", 10**9, "tiny.safetensors"),
    ):
        with pytest.raises(SystemExit, match="1"), largest_file(limit):
            convert([str(checkpoint), str(destination)])
        printed = capsys.readouterr().err
        assert printed.count("error: ") == 1 and message in printed, printed
        assert list(tmp_path.iterdir()) == []
