"""Whether kernels, devices and disk are right on this machine: `python -m rwkvx_jax.doctor`."""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from dataclasses import dataclass

import jax
from rich.console import Console

from rwkvx_jax.cli import (
    accelerator_attached,
    command_line,
    parse,
    settle_platform,
)
from rwkvx_jax.config import Config, ConfigError, ModelConfig, Stage
from rwkvx_jax.doctor import machine
from rwkvx_jax.doctor.findings import Findings
from rwkvx_jax.doctor.kernels import Case, kernel_checks
from rwkvx_jax.experiment_files import load_config
from rwkvx_jax.hosts import join_hosts
from rwkvx_jax.storage import WorkPath, work_path, write_whole

_TIMED = {"cpu": 1024}  # tokens of a timed call; accelerators are fast enough for more
_DEFAULT_TIMED = 16384


@dataclass(frozen=True, kw_only=True)
class Options:
    """Checks versions, devices, every kernel that a model would use against its oracle,
    collectives, a checkpoint to a work directory and back, and some training steps. Ends in PASS or
    FAIL."""

    config: str = ""
    """Experiment (FILE, FILE:VARIANT, or the name of one in configs/) whose model is checked, and
    whose first stage trains. Default: the kernels of RWKV-X 0.22B (on a CPU and for the steps: a
    tiny model)."""
    workdir: str = ""
    """Where a checkpoint is written and training runs, on a disk or gs://; both are removed again.
    Default: a temporary folder."""
    steps: int = 10
    """Training steps; 0: none."""
    interpret: bool = False
    """Check the TPU kernels interpreted, on any machine; slow."""
    json: WorkPath | None = None
    """Also write everything that was found to this file, to send to somebody."""

    def __post_init__(self):
        if self.steps < 0:
            raise ConfigError(f"--steps is {self.steps}: it must not be negative")


def diagnose(options: Options, config: Config, console: Console) -> Findings:
    """Runs all checks, printing as they end.

    Args:
      options: of the command line.
      config: the experiment whose steps are trained.
      console: where results go.
    """
    findings = Findings(console)
    findings.check("versions", machine.versions)
    findings.check("devices", machine.devices)
    for dtype in ("float32", "bfloat16"):
        for name, check in kernel_checks(_case(options, config.model, dtype)):
            findings.check(name, check)
    findings.check("collectives", machine.collectives)
    with tempfile.TemporaryDirectory() as folder:
        workdir = work_path(options.workdir or folder)
        findings.check("checkpoint", lambda: machine.checkpoint(config, workdir))
        if options.steps:
            findings.check("training", lambda: machine.training(config, workdir, options.steps))
    return findings


def _tiny() -> Config:
    """An experiment that trains anywhere: a row for each device at least."""
    batch = max(8, jax.device_count())
    stage = Stage("doctor", seq_len=256, global_batch=batch, steps=1, peak_lr=1e-3)
    return Config(ModelConfig.tiny(), (stage,))


def _case(options: Options, model: ModelConfig, dtype: str) -> Case:
    platform = jax.default_backend()
    if not options.config and platform != "cpu":
        model = ModelConfig.rwkvx_0b2()
    if options.interpret:  # the smallest sizes for which the kernels exist
        model = dataclasses.replace(
            model,
            width=128,
            head_size=64,
            num_kv_heads=0,
            chunk_size=64,
            top_k=2,
            selector="mean",
            selection_groups=0,
            index_size=0,
        )
        return Case(model, dtype, length=200, timed=0, interpret=True)
    # Beyond what the queries read, so that chunks are chosen; no multiple of anything.
    length = model.chunk_size * (model.top_k + 1) + 77
    return Case(model, dtype, length, _TIMED.get(platform, _DEFAULT_TIMED))


def main(argv: list[str], prog: str = "python -m rwkvx_jax.doctor") -> int:
    """Entry point of the command line; returns the exit status."""
    settle_platform()
    with command_line(prog, argv):
        options = parse(Options, argv, prog)
        join_hosts(None, None, None, detect=accelerator_attached())
        config = load_config(options.config) if options.config else _tiny()
        if jax.process_count() > 1 and not options.workdir:
            raise ConfigError("on several hosts --workdir has to name a place that all of them see")
        first = jax.process_index() == 0
        findings = diagnose(options, config, Console(quiet=not first))
        if options.json is not None and first:
            text = json.dumps(findings.report(), indent=1, allow_nan=False) + "\n"
            write_whole(options.json, text.encode())
        if not findings.failed:
            print(f"PASS: {len(findings.all)} checks")
            return 0
        print(f"FAIL: {len(findings.failed)} of {len(findings.all)} checks:")
        for finding in findings.failed:
            print(f"  {finding.name}: {finding.problem}")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
