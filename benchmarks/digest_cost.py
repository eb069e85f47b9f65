"""What the digests of a checkpoint cost beside writing it.

    python benchmarks/digest_cost.py

Saves parameters and two moments of random numbers and prints the time until everything is on disk,
of the fastest of some saves, and the time to compute the digests of the same arrays, likewise.
"""

import argparse
import tempfile
import time
from pathlib import Path

import jax

from rwkvx_jax.checkpoint_store import Checkpoints
from rwkvx_jax.cli import settle_platform
from rwkvx_jax.digest import summarize

MIB = 2**20
ARRAYS = 12
RECORD = {"config": {}, "stage": 0, "stage_step": 0, "data": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=768, help="of the whole checkpoint")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="on the disk in question; default: /tmp")
    flags = parser.parse_args()
    settle_platform()
    rows = flags.mib * MIB // (3 * ARRAYS * 4 * 1024)
    draw = lambda key: jax.random.normal(jax.random.key(key), (rows, 1024))
    params, mean, square = (
        {f"w{i}": draw(ARRAYS * part + i) for i in range(ARRAYS)} for part in range(3)
    )
    optimizer = {"mean": mean, "square": square}
    saves, digests = [], []
    with tempfile.TemporaryDirectory(dir=flags.directory) as directory:
        with Checkpoints(Path(directory), keep=1) as checkpoints:
            for step in range(1 + flags.saves):  # the first compiles
                start = time.perf_counter()
                checkpoints.save(step, params, optimizer, RECORD)
                checkpoints.wait()
                saves.append(time.perf_counter() - start)
                start = time.perf_counter()
                summarize({"params": params, "optimizer": optimizer})
                digests.append(time.perf_counter() - start)
    save, digest = min(saves[1:]), min(digests[1:])
    device = jax.devices()[0].device_kind
    print(
        f"{flags.mib} MiB on {device}: saved in {save:.3f} s, digests in {digest:.4f} s "
        f"({flags.mib / 1024 / digest:.1f} GiB/s): {digest / save:.1%} of a save"
    )


if __name__ == "__main__":
    main()
