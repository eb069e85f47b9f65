"""Gives hundreds of damaged files and impossible flags to every reader and command line.

    python -m benchmarks.fault_storm [--only KIND] [--seed N] [--list]

Each fault is one command on a damaged copy of good inputs (`faults.py`, `fault_cases.py`), run by
the command's own `main` in one of two worker processes. What may come of it:

- refused: one message, exit status not 0;
- equal: the command succeeds, and its results are those of the undamaged inputs;
- warned: the results differ, and a warning says so;
- quiet: the reader of its output went away, and the command ended without a word.

What may not: SILENT (success, with other results, or where only an error is right), HANG,
TRACEBACK, UNCLEAR (a failure without a message). Exit status 1 if there is any of these.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import io
import json
import logging
import os
import queue
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from benchmarks.fault_cases import all_faults
from benchmarks.faults import ROOT, Fault, make_beds

WORKERS = 2
GOOD = ("refused", "equal", "warned", "quiet")
BAD = ("SILENT", "HANG", "TRACEBACK", "UNCLEAR")
WORKER_BYTES = 8 << 30  # a fault that asks for more is refused its memory, not the machine
START_SECONDS = 120.0  # of a worker, and of a command on good inputs
MESSAGE = re.compile(r"\berror: |For full helptext")  # ours and argparse's, tyro's
WARNING = re.compile(r"warning|not finite|left out|ignor|dropped|damaged", re.I)
DOORS = {
    "train": "train.py", "eval": "eval.py", "generate": "-m rwkvx_jax.generate",
    "convert": "-m rwkvx_jax.convert", "plan": "-m rwkvx_jax.plan", "data": "-m rwkvx_jax.data",
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="faults whose kind or name contains this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="print the faults, and run none")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.worker:
        work(flags.worker, flags.seed)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        beds = Path(folder) / "beds"
        make_beds(beds, lambda door, argv, bed: prepare(door, argv, bed))
        faults = all_faults(beds)
        wanted = [
            i for i, f in enumerate(faults) if (flags.only or "") in f"{f.kind}: {f.door} {f.name}"
        ]
        if flags.list:
            print(
                "\n".join(f"{faults[i].kind}: {faults[i].door}, {faults[i].name}" for i in wanted)
            )
            return 0
        began = time.monotonic()
        outcomes = storm(faults, wanted, beds, flags.seed)
        return report(faults, outcomes, time.monotonic() - began)


def prepare(door: str, argv: list[str], bed: Path) -> None:
    """Runs a command on good inputs."""
    status, printed, error = in_folder(bed, lambda: run_door(door, argv))
    if status or error:
        raise SystemExit(f"the good inputs could not be made: {door} {argv}: {error or printed}")


# ------------------------------------------------------------------------------------------------
# The manager: gives faults to workers, and ends those that hang
# ------------------------------------------------------------------------------------------------


def storm(
    faults: list[Fault], wanted: list[int], beds: Path, seed: int
) -> dict[int, tuple[str, str]]:
    """(outcome, what was said) of every fault."""
    waiting: queue.Queue[int] = queue.Queue()
    for i in wanted:
        waiting.put(i)
    outcomes: dict[int, tuple[str, str]] = {}
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(wanted))

        def serve() -> None:
            worker = None
            with contextlib.suppress(queue.Empty):
                while True:
                    number = waiting.get_nowait()
                    worker = worker or Worker(beds, seed)
                    outcome, said = worker.judge(number, faults[number].seconds)
                    outcomes[number] = outcome, said
                    if outcome in BAD:
                        fault = faults[number]
                        name = f"{fault.kind}: {fault.door}, {fault.name}"
                        print(f"{outcome} {name}: {said}", flush=True)
                    if outcome == "HANG":
                        worker = worker.end()
                    progress.advance(task)
            if worker:
                worker.end()

        threads = [threading.Thread(target=serve) for _ in range(WORKERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return outcomes


class Worker:
    """A process that runs one fault after the other."""

    def __init__(self, beds: Path, seed: int):
        command = [sys.executable, "-m", "benchmarks.fault_storm", "--worker", str(beds)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen([*command, "--seed", str(seed)], cwd=ROOT, **pipes)
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def judge(self, number: int, seconds: float) -> tuple[str, str]:
        self._process.stdin.write(f"{number}\n")
        self._process.stdin.flush()
        try:
            if self._lines.get(timeout=START_SECONDS) is None:  # it has begun
                return "HANG", "the worker died at the good inputs"
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            return "HANG", f"no end after {seconds:.0f} s"
        if line is None:
            return "HANG", f"the process died with status {self._process.wait()}"
        return tuple(json.loads(line))

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def report(faults: list[Fault], outcomes: dict[int, tuple[str, str]], seconds: float) -> int:
    """Prints a table by kind; the exit status."""
    counts: dict[str, collections.Counter] = {}
    for number, (outcome, _) in outcomes.items():
        counts.setdefault(faults[number].kind, collections.Counter())[outcome] += 1
    print("\n| kind | faults | " + " | ".join((*GOOD, *BAD)) + " |")
    print("|---|" + "---|" * (1 + len(GOOD + BAD)))
    total = sum(counts.values(), collections.Counter())
    for kind, found in [*counts.items(), ("all", total)]:
        numbers = " | ".join(str(found[outcome]) for outcome in (*GOOD, *BAD))
        print(f"| {kind} | {found.total()} | {numbers} |")
    print(f"\n{seconds:.0f} s")
    return int(any(total[outcome] for outcome in BAD))


# ------------------------------------------------------------------------------------------------
# The worker
# ------------------------------------------------------------------------------------------------


class Printed(logging.StreamHandler):
    """Writes to what is the standard error output at the moment of writing."""

    @property
    def stream(self):
        return sys.stderr

    @stream.setter
    def stream(self, _):
        pass


def work(beds: Path, seed: int) -> None:
    """Reads numbers of faults, and writes a line when each begins and one with its outcome."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", str(beds / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    resource.setrlimit(resource.RLIMIT_DATA, (WORKER_BYTES, WORKER_BYTES))
    faults, answers = all_faults(beds), os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    logging.basicConfig(handlers=[Printed()], force=True)
    good: dict[tuple, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for number in map(int, sys.stdin):
            fault = faults[number]
            key = (fault.bed, fault.door, fault.undamaged, fault.result)
            if fault.result and key not in good:
                with copy(beds, fault, scratch) as folder:
                    in_folder(
                        folder, lambda fault=fault: run_door(fault.door, list(fault.undamaged))
                    )
                    good[key] = digest(folder, fault)
            with copy(beds, fault, scratch) as folder:
                answers.write("begun\n")
                fault.damage(folder, random.Random(f"{seed} {fault.kind} {fault.name}"))
                outcome = judge(fault, folder, good.get(key, ""))
            answers.write(json.dumps(outcome) + "\n")


@contextlib.contextmanager
def copy(beds: Path, fault: Fault, scratch: str) -> Iterator[Path]:
    folder = Path(scratch) / "copy"
    shutil.copytree(beds / fault.bed, folder, symlinks=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def judge(fault: Fault, folder: Path, good: str) -> tuple[str, str]:
    """Runs a fault: its outcome, and the last line that was said."""
    if fault.stdout:
        return judge_output(fault, folder)
    run = lambda: run_door(fault.door, list(fault.argv))
    with largest_file(fault.largest_file):
        status, printed, error = in_folder(folder, run)
    said = ((printed.strip().splitlines() or [""])[-1] if error is None else error)[:160]
    if error or "Traceback (most recent call last)" in printed:
        return "TRACEBACK", said
    if status:
        return ("refused" if MESSAGE.search(printed) else "UNCLEAR"), said
    if fault.result and digest(folder, fault) == good:
        return "equal", said
    return ("warned" if WARNING.search(printed) and fault.result else "SILENT"), said


def judge_output(fault: Fault, folder: Path) -> tuple[str, str]:
    """The same for a process whose output can't be written."""
    command = [sys.executable, *DOORS[fault.door].split(), *fault.argv]
    if not command[1].startswith("-"):
        command[1] = str(ROOT / command[1])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    full = open("/dev/full", "w") if fault.stdout == "full" else None
    options = {"stdout": full or subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=folder, env=environment, **options) as process:
        if full is None:
            process.stdout.read(1)
            process.stdout.close()
        printed = process.stderr.read()
    said = (printed.strip().splitlines() or [""])[-1][:160]
    if "Traceback" in printed or "Exception ignored" in printed:
        return "TRACEBACK", said
    if full is None:
        quiet = process.returncode in (0, 1, 141) and "rror" not in printed
        return ("quiet" if quiet else "UNCLEAR"), said
    return ("refused" if process.returncode and MESSAGE.search(printed) else "SILENT"), said


def run_door(door: str, argv: list[str]) -> int | None:
    """Calls the `main` of a command line."""
    if door == "read":
        return read_data(argv)
    if door == "train":
        from rwkvx_jax.train import main
    elif door == "eval":
        from rwkvx_jax.eval import main
    elif door == "generate":
        from rwkvx_jax.generate.__main__ import main
    elif door == "convert":
        from rwkvx_jax.convert.__main__ import main
    elif door == "plan":
        from rwkvx_jax.plan import main
    else:
        from rwkvx_jax.data.__main__ import main
    sys.argv = [*DOORS[door].split(), *argv]  # results files hold their command
    return main(argv)


def read_data(argv: list[str]) -> None:
    """Opens training data as a run does, and writes a hash of all of it: KIND PATH [WORKDIR]."""
    import numpy as np

    from rwkvx_jax.cli import command_line
    from rwkvx_jax.config import DataConfig, SourceConfig
    from rwkvx_jax.data.pipeline import open_data

    kind, path, *workdir = argv
    with command_line("read", argv):
        data = DataConfig(path=path, sources=(SourceConfig(kind),))
        opened = open_data(data, workdir=Path(*workdir), vocab_size=257, process_index=0)
        stream = opened.sources[0].stream
        found = hashlib.sha256(np.asarray(stream.read(0, len(stream)), np.int64).tobytes())
        found.update(np.asarray(stream.read_mask(0, len(stream)), np.uint8).tobytes())
        found.update(np.asarray(stream.sizes, np.int64).tobytes())
        Path("digest.txt").write_text(found.hexdigest())


def in_folder(folder: Path, run) -> tuple[int, str, str | None]:
    """(exit status, what was printed, the exception that was no SystemExit) of a call there."""
    before, printed = Path.cwd(), io.StringIO()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            status, error = run(), None
    except SystemExit as stop:
        status, error = stop.code, None
    except BaseException as bug:
        last = (str(bug).splitlines() or [""])[0]
        status, error = 1, f"{type(bug).__name__}: {last}"
    finally:
        os.chdir(before)
    return int(bool(status)), printed.getvalue(), error


def digest(folder: Path, fault: Fault) -> str:
    """A hash of the results of a command."""
    found = hashlib.sha256()
    for name in fault.result:
        if name == "final":
            found.update(final_parameters(folder / "run"))
        else:
            path = folder / name
            found.update(path.read_bytes() if path.is_file() else b"absent")
    return found.hexdigest()


def final_parameters(workdir: Path) -> bytes:
    import numpy as np

    from rwkvx_jax.checkpoint import flat, read_workdir

    leaves = flat(read_workdir(workdir).params)
    return b"".join(np.ascontiguousarray(leaf).tobytes() for _, leaf in leaves)


@contextlib.contextmanager
def largest_file(size: int | None) -> Iterator[None]:
    """Files can't grow beyond so many bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


if __name__ == "__main__":
    sys.exit(main())
