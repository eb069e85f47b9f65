"""Trains a model through the stages of its config: `rwkvx train`, or `python train.py`.

Run again with the same workdir, it continues exactly where it stopped. On several hosts the same
command runs on each of them; see docs/pods.md.
"""

import argparse
from pathlib import Path

from rwkvx_jax.cli import (
    add_host_flags,
    command_line,
    join_by_flags,
    parse_with_overrides,
    settle_platform,
)
from rwkvx_jax.experiment_files import experiment_name
from rwkvx_jax.storage import work_path
from rwkvx_jax.training.loop import fit
from rwkvx_jax.xla_flags import apply_xla_flags


def make_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, add_help=False)
    parser.add_argument(
        "--config",
        default="tiny_cpu",
        help="experiment: FILE, FILE:VARIANT, or the name of one in configs/",
    )
    parser.add_argument(
        "--workdir", help="where everything is written, on a disk or gs:// (default: runs/CONFIG)"
    )
    parser.add_argument(
        "--init-from", help="start from these parameters: a workdir, .safetensors or .pth"
    )
    parser.add_argument(
        "--resume-step",
        type=int,
        help="continue from the checkpoint of this step; later ones are moved aside",
    )
    add_host_flags(parser)
    return parser


def main(argv: list[str], prog: str = "train.py") -> None:
    settle_platform()
    with command_line(prog, argv):
        flags, config = parse_with_overrides(make_parser(prog), argv)
        if xla_flags := apply_xla_flags(config.run.xla_flags):
            print(f"flags of the TPU compiler: {' '.join(xla_flags)}", flush=True)
        join_by_flags(flags)
        workdir = work_path(flags.workdir or Path("runs") / experiment_name(flags.config))
        tasks = None
        if config.run.eval_tasks:
            from rwkvx_jax.eval_tasks import EvalTasks  # all of evals, which few runs need

            tasks = EvalTasks(config.run.eval_tasks, workdir)
        starting = {"init_from": flags.init_from, "resume_step": flags.resume_step}
        fit(config, workdir, **starting, tasks=tasks)
