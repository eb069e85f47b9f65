"""Evaluates checkpoints: `rwkvx eval TASK`, or `python eval.py TASK`.

Run again with the same output directory, it does only what is not finished yet. With --mesh it runs
on several devices; on several hosts the same command runs on each of them, as for training.
"""

import argparse
from collections.abc import Callable
from typing import Any

import tyro

from rwkvx_jax.cli import (
    UsageError,
    add_host_flags,
    command_line,
    join_by_flags,
    settle_platform,
)
from rwkvx_jax.cli_help import nearest
from rwkvx_jax.evals import report
from rwkvx_jax.evals.short import task as short
from rwkvx_jax.evals.tasks import (
    ar_hits,
    copying,
    long_loss,
    long_ppl,
    lookup,
    niah,
    passkey,
    selection,
)
from rwkvx_jax.perf import prefill, speed

TASKS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "passkey": (passkey.PasskeyOptions, passkey.run),
    "niah": (niah.NiahOptions, niah.run),
    "short": (short.ShortOptions, short.run),
    "long-loss": (long_loss.LongLossOptions, long_loss.run),
    "lookup": (lookup.LookupOptions, lookup.run),
    "ar-hits": (ar_hits.ArHitsOptions, ar_hits.run),
    "copy": (copying.CopyOptions, copying.run),
    "longppl": (long_ppl.LongPplOptions, long_ppl.run),
    "report": (report.ReportOptions, report.run),
    "selection": (selection.SelectionOptions, selection.run),
    "prefill": (prefill.PrefillOptions, prefill.run),
    "speed": (speed.SpeedOptions, speed.run),
}


def parse(argv: list[str], prog: str = "eval.py") -> Any:
    """The options of the task that the flags name.

    Raises:
      UsageError: no task has the name.
    """
    if argv and argv[0] not in TASKS and not argv[0].startswith("-"):
        raise UsageError(f"{prog} has no task {argv[0]!r}: {nearest(argv[0], TASKS)}")
    return tyro.extras.subcommand_cli_from_dict(
        {name: options for name, (options, _) in TASKS.items()},
        args=argv,
        prog=prog,
        description=__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def main(argv: list[str], prog: str = "eval.py") -> None:
    settle_platform()
    with command_line(prog, argv):
        hosts = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
        add_host_flags(hosts)
        flags, argv = hosts.parse_known_args(argv)
        options = parse(argv, prog)
        join_by_flags(flags)
        for kind, run in TASKS.values():
            if type(options) is kind:
                run(options)
