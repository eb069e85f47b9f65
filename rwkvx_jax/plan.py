"""Plans training and generation on TPUs that are not here: `python -m rwkvx_jax.plan --help`."""

import sys

from rwkvx_jax.perf.plan_command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
