"""Converts short-context sets: `python -m rwkvx_jax.evals --help`."""

import sys

from rwkvx_jax.cli import command_line, parse
from rwkvx_jax.evals.short.convert import Options, convert


def main(argv: list[str], prog: str = "python -m rwkvx_jax.evals") -> None:
    with command_line(prog, argv):
        for task, count in convert(parse(Options, argv, prog)).items():
            print(f"{task}: {count} records")


if __name__ == "__main__":
    main(sys.argv[1:])
