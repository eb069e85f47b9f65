"""What the command lines share: overrides, platform, and how they end.

`command_line` is the one place that decides which errors are printed as one line and which keep
their traceback; every `main` is a block under it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import errno
import importlib.util
import io
import logging
import os
import re
import select
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar

import jax
import tyro

from rwkvx_jax.cli_help import fields_help
from rwkvx_jax.config import Config, ConfigError, UserError
from rwkvx_jax.experiment_files import load_config
from rwkvx_jax.generate.terminal import printable
from rwkvx_jax.hosts import join_hosts

_log = logging.getLogger(__name__)

Options = TypeVar("Options")

_GOOGLE_PCI_VENDOR = "0x1ae0"

_HELP_ALL = "--help-all"

_USAGE, _INTERRUPTED, _PIPE_CLOSED = 2, 130, 141  # exit statuses, as shells have them

# What an operating system's error asks of whoever started the command.
_REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space, or write to another disk",
    errno.EDQUOT: "the quota of this disk is used up: free some space, or write to another disk",
    errno.EFBIG: "the file is larger than allowed here: raise the limit (ulimit -f)",
    errno.EACCES: "no permission: change it (chmod), or choose another path",
    errno.EPERM: "no permission: change it (chmod), or choose another path",
    errno.EROFS: "the file system is read-only: choose another path",
    errno.EISDIR: "this is a directory: name a file",
    errno.ENOTDIR: "a part of this path is a file where a directory must be: choose another path",
    errno.ENOENT: "no such file or directory: check the path",
    errno.EEXIST: "exists already: choose another path, or remove it",
    errno.ENOTEMPTY: "the directory is not empty: choose another path, or empty it",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter one",
    errno.ELOOP: "links lead round in a circle: name the file itself",
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine: close some programs",
    errno.EIO: "the device failed to read or write: check the disk",
    errno.ENOMEM: "not enough memory: ask for less, or use a machine with more",
}


class UsageError(ConfigError):
    """A flag that does not exist; exit status 2, as from the parsers themselves."""


@contextlib.contextmanager
def command_line(prog: str, argv: Sequence[str]) -> Iterator[None]:
    """The body of a `main(argv)`: every error leaves it as one message and an exit status.

    | raised | printed | status |
    |---|---|---|
    | UserError (ConfigError, ConversionError, TrainingStopped) | its message | 1 (UsageError: 2) |
    | OSError of a path, or with a remedy above | path and remedy | 1 |
    | MemoryError, a device out of memory | what was asked for, and a remedy | 1 |
    | KeyboardInterrupt | "interrupted" | 130 |
    | the reader of the output went away | nothing | 141 |
    | anything else: a bug | its traceback, with a note that says so | 1 |

    Args:
      prog: as the user calls it, for the note.
      argv: arguments; those that are no UTF-8 are refused.
    """
    _open_streams()
    try:
        try:
            _check_utf8(argv)
            yield
        finally:
            sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        _end(error, f"{prog} {shlex.join(argv)}")
    except SystemExit as error:  # rich ends so when the reader has gone
        if isinstance(error.__context__, BrokenPipeError):
            raise SystemExit(_PIPE_CLOSED) from error
        raise


def _open_streams() -> None:
    """Standard streams that take any text, where the program was started with them closed too."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif isinstance(stream, io.TextIOWrapper):  # what no terminal of this locale can show
            stream.reconfigure(errors="backslashreplace")


def _check_utf8(argv: Sequence[str]) -> None:
    for number, argument in enumerate(argv, 1):
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"argument {number} is not UTF-8: {os.fsencode(argument)!r}; rename the file, or "
                "set the terminal to UTF-8"
            ) from error


def _end(error: BaseException, command: str) -> NoReturn:
    """Ends the program as `command_line` says."""
    cut_off = _throw_away_unwritable(sys.stdout) | _throw_away_unwritable(sys.stderr)
    if isinstance(error, BrokenPipeError) and cut_off:
        raise SystemExit(_PIPE_CLOSED) from error
    if isinstance(error, KeyboardInterrupt):
        print(f"interrupted{''.join(f': {text}' for text in error.args)}", file=sys.stderr)
        raise SystemExit(_INTERRUPTED) from error
    message = user_message(error, "the output" if cut_off else None)
    if message is None:
        error.add_note(f"This is a bug of rwkvx-jax. Please report it with the command: {command}")
        raise error
    print(f"error: {printable(message)}", file=sys.stderr)
    raise SystemExit(_USAGE if isinstance(error, UsageError) else 1) from error


def user_message(error: BaseException, place: str | None = None) -> str | None:
    """What to tell the user of an error that is theirs to mend; None for a bug.

    Args:
      error: any exception.
      place: what an OSError without a file name is about, if known.
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return _os_message(error, place)
    remedy = "ask for less at once (batch, length, model), or use a machine with more memory"
    if isinstance(error, MemoryError):
        return f"out of memory: {str(error) or 'the program ran out of it'}; {remedy}"
    # The status code of XLA's errors is the first word of their text, and nowhere else.
    if isinstance(error, jax.errors.JaxRuntimeError):
        status, _, rest = str(error).partition(":")
        if status == "RESOURCE_EXHAUSTED":
            return f"out of memory: {rest.strip().splitlines()[0]}; {remedy}"
    return None


def _os_message(error: OSError, place: str | None) -> str | None:
    names = [name for name in (error.filename, error.filename2) if name is not None]
    place = " -> ".join(os.fsdecode(name) for name in names if not isinstance(name, int)) or place
    remedy = _REMEDIES.get(error.errno)
    if error.errno is None and error.args:  # of a bucket, or raised by hand: the text says it all
        return str(error)
    if place is None:
        return remedy
    return f"{place}: {remedy or error.strerror or error}"


def _throw_away_unwritable(stream: TextIO) -> bool:
    """Whether a stream can't be written any more (its reader is gone, its disk full).

    What it still holds then goes nowhere, so that the interpreter's own flush at exit has nothing
    to complain of.
    """
    try:
        stream.flush()
        if not _reader_is_gone(stream):
            return False
    except OSError:
        pass
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())
    return True


def _reader_is_gone(stream: TextIO) -> bool:
    try:
        number = stream.fileno()
    except io.UnsupportedOperation:  # no file of the operating system
        return False
    poll = select.poll()
    poll.register(number, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def settle_platform() -> None:
    """Keeps JAX off an absent TPU; to be called before anything is computed.

    With libtpu installed (it also serves to compile for TPUs elsewhere) JAX first tries to start a
    TPU, which on other machines costs seconds and prints errors that mean nothing. Does nothing
    where the user chose a platform, or where there is an accelerator.
    """
    chosen = jax.config.jax_platforms
    if chosen or importlib.util.find_spec("libtpu") is None or accelerator_attached():
        return
    _log.info("libtpu is installed, but no accelerator is attached: running on the CPU")
    jax.config.update("jax_platforms", "cpu")


def accelerator_attached(root: Path = Path("/")) -> bool:
    """Whether this machine has device files or PCI devices of a TPU or GPU."""
    patterns = ("dev/accel*", "dev/vfio/[0-9]*", "dev/nvidia*", "dev/kfd", "dev/dxg")
    if any(True for pattern in patterns for _ in root.glob(pattern)):
        return True
    vendors = root.glob("sys/bus/pci/devices/*/vendor")
    return any(vendor.read_text().strip() == _GOOGLE_PCI_VENDOR for vendor in vendors)


def add_host_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `hosts.join_hosts`, for hosts that find each other through no environment."""
    group = parser.add_argument_group("several hosts (a TPU pod needs none of these)")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--num-processes", type=int, help="processes of the job")
    group.add_argument("--process-id", type=int, help="number of this process, from 0")
    group.add_argument(
        "--heartbeat-timeout",
        type=int,
        metavar="SECONDS",
        help="silence after which a host counts as dead, which ends the job (default: 100)",
    )


def join_by_flags(flags: argparse.Namespace) -> None:
    """`hosts.join_hosts`, as the flags of `add_host_flags` say."""
    join_hosts(
        flags.coordinator,
        flags.num_processes,
        flags.process_id,
        detect=accelerator_attached(),
        heartbeat_timeout=flags.heartbeat_timeout,
    )


def parse_with_overrides(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, Config]:
    """Parses the flags of `parser` (which has --config) and reads the rest as overrides.

    Overrides are dotted fields of Config: `--optimizer.weight-decay 0.1 --stages.1.steps 50`.

    Raises:
      ConfigError: see `experiment_files.load_config`, and a value that can't work.
      UsageError: a field that the config does not have.
    """
    if {"-h", "--help", _HELP_ALL} & set(argv):
        _help(parser, argv)
    flags, overrides = parser.parse_known_args(argv)
    config = load_config(flags.config)
    known = [name for action in parser._actions for name in action.option_strings]
    _check_overrides(overrides, config, known)
    overrides = _split_lists(overrides, config)
    return flags, tyro.cli(Config, default=config, args=overrides, prog=parser.prog)


def _help(parser: argparse.ArgumentParser, argv: Sequence[str]) -> NoReturn:
    """The flags; and, where a config is known, its fields: a line each, or with --help-all all
    that is known of them. Needs no other flag."""
    parser.print_help()
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", nargs="?", default=parser.get_default("config"))
    experiment = finder.parse_known_args(argv)[0].config
    if experiment is None:
        print("\nWith --config FILE, --help also lists the fields that can be overridden.")
        raise SystemExit(0)
    config = load_config(experiment)
    if _HELP_ALL not in argv:
        print(f"\n{fields_help(config, experiment)}")
        raise SystemExit(0)
    print(f"\nOverrides, with the values of {experiment}:\n")
    tyro.cli(Config, default=config, args=["--help"], prog=parser.prog)


def _check_overrides(overrides: Sequence[str], config: Config, flags: Sequence[str]) -> None:
    """Raises UsageError for a flag that is no field of the config; it names the nearest one."""
    fields = dict(_fields(config))
    spelled = [f"--{name.replace('_', '-')}" for name in fields]
    for argument in overrides:
        flag = argument.partition("=")[0]
        name = flag[2:].replace("-", "_")
        positive = re.sub(r"(^|\.)no_", r"\1", name)
        if not flag.startswith("--") or name in fields or isinstance(fields.get(positive), bool):
            continue
        for items, title in _lists(config):
            index = name.removeprefix(f"{title}.").partition(".")[0]
            if name.startswith(f"{title}.") and index not in map(str, range(len(items))):
                names = (getattr(item, "name", None) or item.kind for item in items)
                listed = ", ".join(f"{i} ({name})" for i, name in enumerate(names))
                raise UsageError(f"no flag {flag}: the config has {len(items)} {title}: {listed}")
        raise UsageError(f"no flag {flag}: {_nearest(flag, [*spelled, *flags])}")


def _split_lists(overrides: Sequence[str], config: Config) -> list[str]:
    """Lists written `a,b`, as the parser takes them: word by word. Not those of commands, whose
    commas are their own."""
    fields, words, in_list = dict(_fields(config)), [], False
    for argument in overrides:
        if argument.startswith("--"):
            flag, equals, value = argument.partition("=")
            name = flag[2:].replace("-", "_")
            in_list = isinstance(fields.get(name), tuple) and name != "run.eval_tasks"
            words += [flag, *value.split(",")] if in_list and equals else [argument]
        else:
            words += argument.split(",") if in_list else [argument]
    return words


def _nearest(flag: str, flags: Sequence[str]) -> str:
    """What flag was probably meant; where none is like it, what its owner has."""
    owner, dot, name = flag.rpartition(".")
    names = [other.rpartition(".")[2] for other in flags if other.startswith(owner + dot)]
    if dot and names:
        near = difflib.get_close_matches(name, names, n=1)
        return f"did you mean {owner}.{near[0]}?" if near else f"choose from {', '.join(names)}"
    near = difflib.get_close_matches(flag, flags, n=1)
    return f"did you mean {near[0]}?" if near else "--help lists all flags"


def _lists(config: Config) -> tuple[tuple[Sequence[Any], str], ...]:
    """The lists in a config, whose items have numbers in flags."""
    return (config.stages, "stages"), (config.data.sources, "data.sources")


def _fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of all fields that a flag can set."""
    if dataclasses.is_dataclass(config):
        items = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    elif isinstance(config, tuple) and config and dataclasses.is_dataclass(config[0]):
        items = dict(enumerate(config))
    else:
        yield prefix.rstrip("."), config
        return
    for name, value in items.items():
        yield from _fields(value, f"{prefix}{name}.")


def parse(
    options: type[Options], argv: Sequence[str], prog: str, description: str | None = None
) -> Options:
    """Reads the flags of a dataclass; the parser ends the program where they are not its own.

    Raises:
      ConfigError: from the dataclass, for a value that can't work.
    """
    return tyro.cli(
        options,
        args=argv,
        prog=prog,
        description=description,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
