"""What the command lines share: experiment files, overrides, platform, errors without traceback."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import tyro

from rwkvx_jax.config import Config, ConfigError

_log = logging.getLogger(__name__)

_GOOGLE_PCI_VENDOR = "0x1ae0"


def settle_platform() -> None:
    """Keeps JAX off an absent TPU; to be called before anything is computed.

    With libtpu installed (it also serves to compile for TPUs elsewhere) JAX first tries to start a
    TPU, which on other machines costs seconds and prints errors that mean nothing. Does nothing
    where the user chose a platform, or where there is an accelerator.
    """
    chosen = jax.config.jax_platforms
    if chosen or importlib.util.find_spec("libtpu") is None or accelerator_attached():
        return
    _log.info("libtpu is installed, but no accelerator is attached: running on the CPU")
    jax.config.update("jax_platforms", "cpu")


def accelerator_attached(root: Path = Path("/")) -> bool:
    """Whether this machine has device files or PCI devices of a TPU or GPU."""
    patterns = ("dev/accel*", "dev/vfio/[0-9]*", "dev/nvidia*", "dev/kfd", "dev/dxg")
    if any(True for pattern in patterns for _ in root.glob(pattern)):
        return True
    vendors = root.glob("sys/bus/pci/devices/*/vendor")
    return any(vendor.read_text().strip() == _GOOGLE_PCI_VENDOR for vendor in vendors)


def add_host_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `hosts.join_hosts`, for hosts that find each other through no environment."""
    group = parser.add_argument_group("several hosts (a TPU pod needs none of these)")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--num-processes", type=int, help="processes of the job")
    group.add_argument("--process-id", type=int, help="number of this process, from 0")
    group.add_argument(
        "--heartbeat-timeout",
        type=int,
        metavar="SECONDS",
        help="silence after which a host counts as dead, which ends the job (default: 100)",
    )


def load_config(path: Path) -> Config:
    """Runs an experiment file and returns what its `get_config()` returns.

    Raises:
      ConfigError: no such file, no `get_config` in it, or not a Config.
    """
    if not path.is_file():
        raise ConfigError(f"no config file {path}: see the configs directory for examples")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{path} defines no get_config()")
    config = module.get_config()
    if not isinstance(config, Config):
        raise ConfigError(f"get_config() of {path} returned {type(config).__name__}, not Config")
    return config


def parse_with_overrides(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, Config]:
    """Parses the flags of `parser` (which has --config) and reads the rest as overrides.

    Overrides are dotted fields of Config: `--optimizer.weight-decay 0.1 --stages.0.steps 5`.
    """
    wants_help = any(flag in argv for flag in ("-h", "--help"))
    flags, overrides = parser.parse_known_args([a for a in argv if a not in ("-h", "--help")])
    config = load_config(Path(flags.config))
    if wants_help:
        parser.print_help()
        print(f"\nOverrides, with the values of {flags.config}:\n")
        overrides = ["--help"]
    return flags, tyro.cli(Config, default=config, args=overrides, prog=parser.prog)


@contextlib.contextmanager
def friendly_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Prints errors of these kinds (and ConfigError) as one message and exits with status 1."""
    try:
        yield
    except (ConfigError, *kinds) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
