"""Trains a model through the stages of its config: `python train.py --help`."""

import sys

from rwkvx_jax.train import main

if __name__ == "__main__":
    main(sys.argv[1:])
