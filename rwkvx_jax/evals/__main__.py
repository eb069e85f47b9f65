"""Converts short-context sets: `python -m rwkvx_jax.evals DST --icl DIR --hellaswag FILE`."""

import tyro

from rwkvx_jax.cli import friendly_errors
from rwkvx_jax.evals.convert_tasks import Options, convert


def main() -> None:
    with friendly_errors():
        for task, count in convert(tyro.cli(Options, prog="python -m rwkvx_jax.evals")).items():
            print(f"{task}: {count} records")


if __name__ == "__main__":
    main()
