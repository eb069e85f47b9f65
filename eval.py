"""Evaluates checkpoints: `python eval.py --help`, `python eval.py passkey --help`.

Run again with the same output directory, it does only what is not finished yet.
"""

import sys
from typing import Any

import tyro

from rwkvx_jax.cli import command_line, settle_platform
from rwkvx_jax.evals import report
from rwkvx_jax.evals.short import task as short
from rwkvx_jax.evals.tasks import long_loss, niah, passkey, selection
from rwkvx_jax.perf import prefill, speed

TASKS = {
    "passkey": (passkey.PasskeyOptions, passkey.run),
    "niah": (niah.NiahOptions, niah.run),
    "short": (short.ShortOptions, short.run),
    "long-loss": (long_loss.LongLossOptions, long_loss.run),
    "report": (report.ReportOptions, report.run),
    "selection": (selection.SelectionOptions, selection.run),
    "prefill": (prefill.PrefillOptions, prefill.run),
    "speed": (speed.SpeedOptions, speed.run),
}


def parse(argv: list[str]) -> Any:
    """The options of the task that the flags name."""
    return tyro.extras.subcommand_cli_from_dict(
        {name: options for name, (options, _) in TASKS.items()},
        args=argv,
        prog="eval.py",
        description=__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def main(argv: list[str]) -> None:
    settle_platform()
    with command_line("eval.py", argv):
        options = parse(argv)
        for kind, run in TASKS.values():
            if type(options) is kind:
                run(options)


if __name__ == "__main__":
    main(sys.argv[1:])
