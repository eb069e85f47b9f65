"""Flags of the TPU compiler, by generation: what `run.xla_flags` sets before JAX starts the TPU.

libtpu reads its flags once, when it is loaded, from LIBTPU_INIT_ARGS, and ends the process at one
that it does not know. So flags are first tried in a child process, which needs no TPU, and those of
the table that the installed libtpu refuses are left out. Nothing here imports JAX.

The flags are those that MaxText publishes for dense models (benchmarks/xla_flags_library.py and the
model configs beside it, read in 2026); which generation gets which group is partly our choice, that
of v5e above all. Nothing has run with them; docs/pods.md has what they do to a compiled program.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import MutableMapping, Sequence
from pathlib import Path

from rwkvx_jax.config import ConfigError

_log = logging.getLogger(__name__)

VARIABLE = "LIBTPU_INIT_ARGS"

# Gathers of parameters (fsdp) run piece by piece inside the products that stand beside them.
_GATHERS = (
    "--xla_enable_async_all_gather=true",
    "--xla_tpu_enable_async_collective_fusion=true",
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
    # ... over several of them, where one is too short to hide a gather.
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
    # ... on the core that computes, which otherwise waits.
    "--xla_tpu_overlap_compute_collective_tc=true",
)
# Sums of gradients over `data` (between slices above all) overlap with the backward pass, of
# tensors of any sizes.
_DATA_PARALLEL = (
    "--xla_tpu_enable_data_parallel_all_reduce_opt=true",
    "--xla_tpu_data_parallel_opt_different_sized_ops=true",
)
# Sums of which each device keeps a part (gradients under fsdp) become reduce-scatters, in a layout
# that needs no copy before.
_SCATTERS = (
    "--xla_tpu_use_minor_sharding_for_major_trivial_input=true",
    "--xla_tpu_relayout_group_size_threshold_for_reduce_scatter=1",
    "--xla_tpu_assign_all_reduce_scatter_layout=true",
)
# Fusions may use 96 of the 128 MiB of VMEM: larger tiles, fewer passes over HBM. MaxText's figure
# for dense models on v6e. Pallas kernels bring their own limit.
_VMEM = ("--xla_tpu_scoped_vmem_limit_kib=98304",)

FLAGS: dict[str, tuple[str, ...]] = {
    "v5e": _GATHERS + _DATA_PARALLEL,
    "v5p": _GATHERS + _DATA_PARALLEL + _SCATTERS,
    "v6e": _GATHERS + _DATA_PARALLEL + _SCATTERS + _VMEM,
}
"""Flags of "auto"; generations that are not here get none."""

_FLAG = re.compile(r"--[A-Za-z0-9_]+=\S+")
_UNKNOWN = re.compile(r"Unknown command line flag '(\w+)'")
_ILLEGAL = re.compile(r"Illegal value '.*' specified for flag '(\w+)'")
_TIME_LIMIT = 120  # seconds that a child may take to load libtpu
# The child asks libtpu for a description of TPUs, which loads it and takes no chip.
_CHILD = """
import jax
jax.config.update("jax_platforms", "cpu")
from jax.experimental import topologies
topologies.get_topology_desc("v5e:2x2", "tpu")
"""
# libtpu asks the machine it runs on who it is; on a machine without TPUs these answers stop it
# from querying a metadata server. The accelerator type does not limit the topologies on offer.
# Its lock file keeps two programs off one TPU; compilers running side by side share nothing.
LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

# PCI device ids of Google's chips, as jax._src.hardware_utils lists them.
_PCI_VENDOR = "0x1ae0"
_PCI_DEVICES = {"0x005e": "v4", "0x0062": "v5p", "0x0063": "v5e", "0x006f": "v6e"}
_ACCELERATORS = {"v4": "v4", "v5litepod": "v5e", "v5lite": "v5e", "v5p": "v5p", "v6e": "v6e"}


def apply_xla_flags(
    flags: str,
    generation: str | None = None,
    environment: MutableMapping[str, str] = os.environ,
) -> tuple[str, ...]:
    """Sets the TPU compiler's flags in the environment. To be called before JAX starts a backend.

    Args:
      flags: "none", "auto" (the table's, without those that the installed libtpu refuses), or
        flags as LIBTPU_INIT_ARGS takes them: "--name=value --name=value".
      generation: of the TPU, such as "v5e"; None: that of the TPU in this machine.
      environment: whose LIBTPU_INIT_ARGS is extended. A flag that stands there already stays as it
        is.

    Returns:
      The flags that were added; "auto" adds none where there is no TPU that it knows.

    Raises:
      ConfigError: `flags` is not of that form, or names one that the installed libtpu refuses.
    """
    if flags == "none":
        return ()
    if flags != "auto" and (bad := [f for f in flags.split() if not _FLAG.fullmatch(f)]):
        raise ConfigError(
            f'run.xla_flags has {bad}: write "auto", "none" or flags such as "--name=value"'
        )
    generation = generation or attached_generation(environment)
    if generation is None and flags == "auto":
        return ()
    given = environment.get(VARIABLE, "")
    wanted = FLAGS.get(generation, ()) if flags == "auto" else tuple(flags.split())
    wanted = tuple(flag for flag in wanted if _name(flag) not in map(_name, given.split()))
    refused = refused_flags(wanted)
    if refused and flags != "auto":
        raise ConfigError(
            f"run.xla_flags: the installed libtpu refuses {', '.join(refused)}; leave them out, or "
            'use "auto"'
        )
    kept = tuple(flag for flag in wanted if flag not in refused)
    if kept:
        environment[VARIABLE] = " ".join([*kept, given]).strip()
    if refused:
        _log.warning("this libtpu does not take %s: left out", ", ".join(refused))
    return kept


def refused_flags(flags: Sequence[str]) -> tuple[str, ...]:
    """Those of the flags that the installed libtpu does not know, or whose value it refuses.

    Raises:
      ConfigError: libtpu can't be loaded, for another reason.
    """
    refused: list[str] = []
    while tried := [flag for flag in flags if flag not in refused]:
        environment = {**os.environ, **LIBTPU_ENVIRONMENT, VARIABLE: " ".join(tried)}
        try:
            child = subprocess.run(
                [sys.executable, "-c", _CHILD],
                env=environment,
                capture_output=True,
                text=True,
                timeout=_TIME_LIMIT,
            )
        except subprocess.TimeoutExpired as error:
            raise ConfigError(
                f"run.xla_flags: libtpu was not loaded within {_TIME_LIMIT} s to check flags; "
                '"none" checks nothing'
            ) from error
        if child.returncode == 0:
            break
        names = {*_UNKNOWN.findall(child.stderr), *_ILLEGAL.findall(child.stderr)}
        found = [flag for flag in tried if _name(flag) in names]
        if not found:
            raise ConfigError(
                f'run.xla_flags: libtpu can\'t be loaded to check flags ("none" checks nothing):\n'
                f"{child.stderr[-1000:]}"
            )
        refused += found
    return tuple(refused)


def attached_generation(
    environment: MutableMapping[str, str] = os.environ, root: Path = Path("/")
) -> str | None:
    """Generation of the TPU in this machine, by its PCI devices or TPU_ACCELERATOR_TYPE; None: no
    TPU, or one that is not known here."""
    for vendor in root.glob("sys/bus/pci/devices/*/vendor"):
        if vendor.read_text().strip() == _PCI_VENDOR:
            known = _PCI_DEVICES.get(vendor.with_name("device").read_text().strip())
            if known:
                return known
    kind = environment.get("TPU_ACCELERATOR_TYPE", "").split("-")[0]
    return _ACCELERATORS.get(kind)


def _name(flag: str) -> str:
    return flag.lstrip("-").partition("=")[0]
