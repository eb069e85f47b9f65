"""Evaluates checkpoints: `python eval.py --help`, `python eval.py passkey --help`."""

import sys

from rwkvx_jax.eval import main

if __name__ == "__main__":
    main(sys.argv[1:])
