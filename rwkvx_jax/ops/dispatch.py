"""One resolver for all public ops: which implementation runs is decided here, before tracing.

The decision depends on platform, shapes and dtypes alone, never on catching a compiler's exception,
so that it is the same on every host and can be tested without the hardware. The platform is that of
the mesh in force: code lowered for a TPU topology on a machine without one takes the TPU path.
What was chosen is logged once, as INFO; a fall back to a slower path is a WARNING with its reason.

An op lists its implementations as `Candidate`s, fastest first; a new kernel is one more entry.
"""

import dataclasses
import functools
import importlib.util
import logging
from collections.abc import Callable, Sequence

import jax

logger = logging.getLogger("rwkvx_jax.ops")

_PLATFORM_NAMES = {"cuda": "gpu", "rocm": "gpu"}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An implementation and the conditions under which it can run.

    Attributes:
      name: what users pass as `implementation=`.
      platforms: platforms it exists for; None means all.
      problem: called with the platform; returns why it cannot run for these shapes and dtypes (a
        clause such as "the key size 48 is not a multiple of 64"), or None when it can.
    """

    name: str
    platforms: tuple[str, ...] | None = None
    problem: Callable[[str], str | None] = lambda platform: None

    def obstacle(self, platform: str) -> str | None:
        """Why this candidate cannot run on `platform`, or None when it can."""
        if self.platforms is not None and platform not in self.platforms:
            return f"it runs on {' and '.join(self.platforms)}, and the platform is {platform}"
        return self.problem(platform)


def current_platform() -> str:
    """Returns "cpu", "gpu" or "tpu": that of the mesh in force, else of the default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    return _PLATFORM_NAMES.get(platform, platform)


def missing_module(module: str) -> str | None:
    """The clause for `Candidate.problem` when the kernel's module is not installed, else None."""
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is absent
        found = False
    return None if found else f"the module {module} is not part of this installation"


def resolve(op: str, implementation: str | None, candidates: Sequence[Candidate]) -> str:
    """Returns the name of the candidate that is to run.

    Args:
      op: name of the op, for messages.
      implementation: the name asked for, or None for the first candidate that can run.
      candidates: implementations of the op, fastest first.

    Raises:
      ValueError: the name is unknown, or that implementation cannot run here; the message says why
        and which ones can.
    """
    platform = current_platform()
    obstacles = {c.name: c.obstacle(platform) for c in candidates}
    usable = [name for name, obstacle in obstacles.items() if obstacle is None]
    if implementation is not None:
        if implementation not in obstacles:
            names = ", ".join(map(repr, obstacles))
            raise ValueError(f"{op}: unknown implementation {implementation!r}; one of {names}")
        if obstacles[implementation] is not None:
            raise ValueError(
                f"{op}: implementation {implementation!r} cannot run here: "
                f"{obstacles[implementation]}; use {_either(usable)}"
            )
        _log_choice(op, implementation, platform, "")
        return implementation
    if not usable:
        raise ValueError(f"{op}: no implementation can run on {platform}: {obstacles}")
    # A candidate meant for this platform that was passed over is a fall back; one that does not
    # exist for the platform is not.
    reasons = [
        f"{c.name!r} cannot run: {obstacles[c.name]}"
        for c in candidates[: [c.name for c in candidates].index(usable[0])]
        if c.platforms is None or platform in c.platforms
    ]
    _log_choice(op, usable[0], platform, "; ".join(reasons))
    return usable[0]


def _either(names: Sequence[str]) -> str:
    return " or ".join(map(repr, names)) if names else "another platform"


def forget_choices() -> None:
    """Has every choice logged anew, for programs that report what each of several models chose."""
    _log_choice.cache_clear()


@functools.cache
def _log_choice(op: str, choice: str, platform: str, fall_back: str) -> None:
    """Logs a choice the first time it is made (the cache is what makes it once)."""
    if fall_back:
        logger.warning("%s: falling back to %r on %s: %s", op, choice, platform, fall_back)
    else:
        logger.info("%s: using %r on %s", op, choice, platform)
