"""`rwkvx completion bash`: prints a script that completes commands, tasks and flags.

Flags are read from the help of every command. The scripts that tyro makes (with
`--tyro-print-completion`) do not serve here: each is for the one parser of a program, and `train`
and `plan` have parsers of their own.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import tyro

from rwkvx_jax.__main__ import COMMANDS
from rwkvx_jax.__main__ import main as rwkvx
from rwkvx_jax.cli import command_line, parse, settle_platform
from rwkvx_jax.eval import TASKS

_FLAG = re.compile(r"^[│ ]*(?:-\w, )?(--\w[\w.-]*)", re.MULTILINE)

_SCRIPT = """\
# bash completion of rwkvx, by `rwkvx completion bash`
_rwkvx() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} words=""
  if [[ $COMP_CWORD == 1 ]]; then
    words="{commands}"
  elif [[ $COMP_CWORD == 2 && ${{COMP_WORDS[1]}} == eval && $word != -* ]]; then
    words="{tasks}"
  elif [[ $word == -* ]]; then
    case "${{COMP_WORDS[*]:1}} " in
{cases}
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _rwkvx rwkvx
"""


@dataclass(frozen=True)
class Options:
    """Prints a script that completes the commands, tasks and flags of rwkvx."""

    shell: tyro.conf.Positional[Literal["bash"]]
    """Shell that reads the script."""


def flags(command: Sequence[str]) -> list[str]:
    """The flags that the help of a command lists; of numbered items (stages), those of the first.

    Args:
      command: its name, and that of a task.
    """
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        with contextlib.suppress(SystemExit):
            rwkvx([*command, "--help"])
    return [flag.replace(".N.", ".0.") for flag in _FLAG.findall(shown.getvalue())]


def script() -> str:
    """The completion script for bash."""
    listed = [["eval", task] for task in TASKS]
    listed += [[name] for name in COMMANDS if name != "completion"]
    cases = (f'      "{" ".join(c)} "*) words="{" ".join(flags(c))}" ;;' for c in listed)
    return _SCRIPT.format(
        commands=" ".join(COMMANDS), tasks=" ".join(TASKS), cases="\n".join(cases)
    )


def main(argv: list[str], prog: str = "python -m rwkvx_jax.completion") -> None:
    settle_platform()
    with command_line(prog, argv):
        parse(Options, argv, prog)
        os.environ["COLUMNS"] = "200"  # of the help, so that no flag is broken over lines
        print(script(), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
