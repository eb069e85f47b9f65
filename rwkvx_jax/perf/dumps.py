"""Compiles for a TPU in a process of its own and gives the compiler's dumps of its schedules.

The compiler reads its dump flags once, before jax is imported; hence the process.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def compiled_apart(module: str, argument: str, limit: float) -> Iterator[tuple[dict, Path]]:
    """Runs `python -m MODULE --child ARGUMENT`, which compiles and prints JSON as its last line.

    Args:
      module: dotted name, importable from the root of the repository.
      argument: what to compile, as the module understands it.
      limit: seconds that this may take.

    Yields:
      What the child printed, and the folder of the compiler's dumps, which then goes.

    Raises:
      RuntimeError: the compilation failed, with the compiler's message.
    """
    with tempfile.TemporaryDirectory(prefix="tpu_dumps_") as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        child = subprocess.run(
            [sys.executable, "-m", module, "--child", argument],
            cwd=_ROOT,
            env={**os.environ, "LIBTPU_INIT_ARGS": flags, "TF_CPP_MIN_LOG_LEVEL": "3"},
            capture_output=True,
            text=True,
            timeout=limit,
        )
        if child.returncode:
            raise RuntimeError(f"{argument} does not compile:\n{child.stderr[-4000:]}")
        yield json.loads(child.stdout.splitlines()[-1]), Path(folder)


def read_dump(folder: Path, kernel: str, suffix: str) -> str:
    """Text of the one dump of a kernel whose file name ends in `suffix`.

    Raises:
      RuntimeError: there is none, or more than one.
    """
    found = read_dumps(folder, kernel, suffix)
    if len(found) != 1:
        raise RuntimeError(
            f"expected one dump of {kernel} ending in {suffix}, found {len(found)} in "
            f"{sorted(x.name for x in folder.iterdir())}"
        )
    return found[0]


def read_dumps(folder: Path, kernel: str, suffix: str) -> list[str]:
    """The same of a kernel that is compiled for several sizes, in the order of the program."""
    name = re.compile(rf"(?<![a-z_]){re.escape(kernel)}[._]*(\d*)-\d+-{re.escape(suffix)}$")
    found = [(match, path) for path in folder.iterdir() if (match := name.search(path.name))]
    return [path.read_text() for match, path in sorted(found, key=lambda x: int(x[0][1] or 0))]
