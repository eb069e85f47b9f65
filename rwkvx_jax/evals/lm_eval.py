"""lm-evaluation-harness with the model type `rwkvx`: `rwkvx-lm-eval`, or `python -m` this module.

Arguments are those of `lm_eval`: `rwkvx-lm-eval --model rwkvx --model_args checkpoint=runs/x
--tasks piqa`.
"""

import importlib
import sys

from rwkvx_jax.cli import command_line, settle_platform
from rwkvx_jax.evals.short.task import check_installed


def main() -> None:
    settle_platform()
    with command_line("rwkvx-lm-eval", sys.argv[1:]):
        check_installed()
        importlib.import_module("rwkvx_jax.evals.short.registered")
        importlib.import_module("lm_eval.__main__").cli_evaluate()


if __name__ == "__main__":
    main()
