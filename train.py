"""Trains a model through the stages of its config: `python train.py --help`.

Run again with the same workdir, it continues exactly where it stopped.
"""

import argparse
import sys
from pathlib import Path

from rwkvx_jax.checkpoint import load_initial_params
from rwkvx_jax.cli import friendly_errors, parse_with_overrides, settle_platform
from rwkvx_jax.training.loop import TrainingStopped, fit

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "tiny_cpu.py"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__, add_help=False)
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="experiment file")
    parser.add_argument("--workdir", help="where everything is written (default: runs/CONFIG)")
    parser.add_argument(
        "--init-from", help="start from these parameters: a workdir, .safetensors or .pth"
    )
    settle_platform()
    with friendly_errors(TrainingStopped):
        flags, config = parse_with_overrides(parser, argv)
        workdir = Path(flags.workdir or Path("runs") / Path(flags.config).stem)
        params = load_initial_params(flags.init_from, config) if flags.init_from else None
        fit(config, workdir, params)


if __name__ == "__main__":
    main(sys.argv[1:])
