"""Experiment files: Python files with a `get_config()`, and variants of one experiment.

An experiment is named by its file, by its file and a variant (`FILE.py:VARIANT`), or, for those in
`configs/`, by name alone (`rwkvx_3b6_stage2:v5p128`). A file with variants lists them in `VARIANTS`
and takes one as the argument of `get_config(variant="")`.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from rwkvx_jax.config import Config, ConfigError, UserError

_HERE = Path(__file__).resolve().parent
_INSTALLED, _CHECKOUT = _HERE / "configs", _HERE.parent / "configs"
_SHIPPED = _INSTALLED if _INSTALLED.is_dir() else _CHECKOUT


def load_config(experiment: str | Path) -> Config:
    """Runs an experiment file and returns what its `get_config()` returns.

    Args:
      experiment: a file, `FILE:VARIANT`, or the name of a file in `configs/` without its suffix,
        with or without a variant.

    Raises:
      ConfigError: no such file or variant, an error in the file, no `get_config` in it, or not a
        Config.
    """
    path, variant = _split(str(experiment))
    path = _find(path)
    with _errors_of_config(path):
        module = _run(path)
        if not callable(getattr(module, "get_config", None)):
            raise ConfigError(f"{path} defines no get_config()")
        if variant is None:
            config = module.get_config()
        else:
            _check_variant(path, variant, getattr(module, "VARIANTS", ()))
            config = module.get_config(variant)
    if not isinstance(config, Config):
        raise ConfigError(f"get_config() of {path} returned {type(config).__name__}, not Config")
    return config


def experiment_name(experiment: str | Path) -> str:
    """A name for directories: `tiny_cpu_large` for `configs/tiny_cpu.py:large`."""
    path, variant = _split(str(experiment))
    return path.stem if variant is None else f"{path.stem}_{variant}"


def _split(experiment: str) -> tuple[Path, str | None]:
    """File or name, and the variant if one is named."""
    name, colon, variant = experiment.rpartition(":")
    if not colon or Path(experiment).is_file():  # a colon may be part of a file's name
        return Path(experiment), None
    return Path(name), variant


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    shipped = {file.stem: file for file in sorted(_SHIPPED.glob("*.py"))}
    if str(path) in shipped:
        return shipped[str(path)]
    choice = f", or one of the shipped configs: {', '.join(shipped)}" if shipped else ""
    raise ConfigError(f"no config file {path}: name a file{choice}")


def _run(path: Path) -> ModuleType:
    """The module of a file, whatever its suffix.

    It is never read from a compiled file, which counts as up to date if the source was changed
    within the same second.
    """
    loader = importlib.machinery.SourceFileLoader(path.stem, str(path))
    spec = importlib.util.spec_from_loader(path.stem, loader)
    assert spec is not None  # it is of this loader
    module = importlib.util.module_from_spec(spec)
    exec(compile(path.read_bytes(), path, "exec", dont_inherit=True), module.__dict__)
    return module


def _check_variant(path: Path, variant: str, variants: tuple[str, ...]) -> None:
    if not variants:
        raise ConfigError(f"{path} has no variants: leave out ':{variant}'")
    if variant not in variants:
        raise ConfigError(f"{path} has no variant '{variant}': choose from {', '.join(variants)}")


@contextlib.contextmanager
def _errors_of_config(path: Path) -> Iterator[None]:
    """Errors of the user's own Python code: with the line where they came from."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else "?")
        kind = type(error).__name__
        raise ConfigError(f"config file {path}, line {line}: {kind}: {error}") from error
