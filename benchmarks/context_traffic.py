"""What devices that share a sequence send each other, read from the compiled program.

    python benchmarks/context_traffic.py [--lengths 16384 65536] [--topology v5e:2x4]

Compiles forward and backward of a time mix with its channel mix, and of sparse attention by both
ways of reading across devices, for 8 devices along `context`; simulated CPU devices, or the chips
of a TPU topology that need not be there. Counted is what one device sends, each operation once.
"""

import argparse

import jax

from rwkvx_jax.config import MeshConfig
from rwkvx_jax.perf import topology
from rwkvx_jax.perf.context_traffic import attention_traffic, block_traffic
from rwkvx_jax.sharding import make_mesh

PARTS = 8


def _row(name: str, totals: dict[str, int]) -> None:
    detail = ", ".join(f"{kind} {size:,}" for kind, size in sorted(totals.items()))
    print(f"{name:<44}{sum(totals.values()):>14,}   {detail}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384, 65536])
    parser.add_argument("--topology", help="e.g. v5e:2x4; default: simulated CPU devices")
    flags = parser.parse_args()
    topology.on_cpu()
    if flags.topology:
        devices = topology.topology_devices(flags.topology)
    else:
        jax.config.update("jax_num_cpu_devices", PARTS)
        devices = jax.devices()
    mesh = make_mesh(MeshConfig(data=-1, context=PARTS), devices)
    print(f"bytes sent by one of {PARTS} devices, {flags.topology or 'simulated on the CPU'}")
    for length in flags.lengths:
        _row(f"RWKV-7 block, width 256, {length} tokens", block_traffic(mesh, length))
    for length in flags.lengths:
        for heads, way in ((PARTS, "heads traded"), (1, "keys and values collected")):
            totals = attention_traffic(mesh, length, heads)
            per_head = {kind: size // heads for kind, size in totals.items()}
            _row(f"attention, a head, {way}, {length}", per_head)


if __name__ == "__main__":
    main()
