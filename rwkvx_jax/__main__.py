"""The command `rwkvx`, or `python -m rwkvx_jax`: one name for every command line of the package."""

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

import rwkvx_jax
from rwkvx_jax.cli_help import nearest


class Command(NamedTuple):
    """A command line: `main(argv, prog)` of a module, which is imported only when it is called."""

    module: str
    summary: str


COMMANDS = {
    "train": Command("rwkvx_jax.train", "train a model through the stages of its config"),
    "eval": Command("rwkvx_jax.eval", "evaluate checkpoints; `rwkvx eval --help` lists the tasks"),
    "generate": Command("rwkvx_jax.generate.__main__", "continue a text, or chat"),
    "convert": Command("rwkvx_jax.convert.__main__", "convert checkpoints to and from other forms"),
    "expand": Command(
        "rwkvx_jax.expand_checkpoint", "give a pretrained RWKV-7 zero-initialised attention blocks"
    ),
    "plan": Command("rwkvx_jax.plan", "predict memory and time of a TPU that is not here"),
    "data": Command("rwkvx_jax.data.__main__", "tokenize texts into a token cache"),
    "doctor": Command("rwkvx_jax.doctor.__main__", "check kernels and training on this machine"),
    "completion": Command("rwkvx_jax.completion", "print a completion script for bash"),
}


def main(argv: Sequence[str] | None = None) -> int | None:
    """Runs one command; returns its exit status, None for success.

    Args:
      argv: the command and its arguments; None: those of the process.
    """
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name in ("-V", "--version"):
        print(f"rwkvx-jax {rwkvx_jax.__version__}")
        return 0
    if name not in COMMANDS:
        print(f"error: rwkvx has no command {name!r}: {nearest(name, COMMANDS)}", file=sys.stderr)
        return 2
    return importlib.import_module(COMMANDS[name].module).main(rest, f"rwkvx {name}")


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = (f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items())
    return "\n".join(
        (
            "usage: rwkvx COMMAND ...",
            "",
            "RWKV-X in JAX: RWKV-7 with top-k chunk sparse attention.",
            "",
            *lines,
            "",
            "rwkvx COMMAND --help lists the flags of a command; rwkvx --version the version.",
        )
    )


if __name__ == "__main__":
    sys.exit(main())
