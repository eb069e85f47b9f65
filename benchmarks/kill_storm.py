"""Kills a training run again and again, and checks that it makes no difference.

    python benchmarks/kill_storm.py

A tiny model goes through three stages (a plain RWKV-7, the preheat of its new attention block, all
of it on longer samples with LongCE and two accumulated parts a batch), 200 steps in all, on a
mixture of text, chats (jsonl), token files (binidx) and passkeys, with a checkpoint every three
steps: once undisturbed, once with a SIGKILL at 20 random moments, each time started again by the
same command. Final parameters and metrics.jsonl have to be the same to the last bit. Exits with
status 1 if they are not.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from rwkvx_jax.checkpoint import flat, read_workdir
from rwkvx_jax.config import (
    Config,
    DataConfig,
    LongCEConfig,
    ModelConfig,
    RunConfig,
    SourceConfig,
    Stage,
)
from rwkvx_jax.data.binidx import write_index

CONFIG = Path(__file__).resolve()
ROOT = CONFIG.parents[1]
CHATS, TOKENS = "chats.jsonl", "tokens"  # in the directory in which train.py is started
POLL_SECONDS = 0.01
STEP_SECONDS = 0.1  # a few steps
START_SECONDS = 15.0  # from the start of the process to its first steps, on a slow machine


def get_config() -> Config:
    """The experiment: this file is also its own config file."""
    return Config(
        model=ModelConfig(
            vocab_size=257,
            num_blocks=2,
            num_attention_blocks=1,
            width=64,
            head_size=16,
            chunk_size=16,
            top_k=2,
        ),
        run=RunConfig(
            compute_dtype="float32", checkpoint_every=3, log_every=1, eval_every=20, eval_batches=1
        ),
        data=DataConfig(
            sources=(
                SourceConfig("text"),
                SourceConfig("jsonl", path=CHATS, samples="document"),
                SourceConfig("binidx", path=TOKENS),
                SourceConfig("passkey"),
            )
        ),
        stages=(
            Stage("rwkv7", 128, 8, 80, 1e-3, expanded=False, warmup_steps=10),
            Stage("preheat", 128, 8, 40, 1e-3, trainable="attention", accumulation=2),
            Stage(
                "grow",
                192,
                4,
                80,
                1e-3,
                schedule="cosine",
                accumulation=2,
                loss="longce",
                longce=LongCEConfig(window=32, stride=16),
            ),
        ),
    )


def write_data(directory: Path) -> None:
    """The files of the sources CHATS and TOKENS."""
    rng = np.random.default_rng(0)
    word = lambda: "".join(rng.choice(list("aeioulnrst"), rng.integers(2, 7)))
    turn = lambda role, words: {"role": role, "content": " ".join(word() for _ in range(words))}
    chats = [{"messages": [turn("user", 3), turn("assistant", 6)]} for _ in range(300)]
    lines = "".join(json.dumps(chat) + "\n" for chat in chats)
    (directory / CHATS).write_text(lines)
    documents = [rng.integers(1, 257, n).astype(np.uint16) for n in rng.integers(50, 300, 60)]
    np.concatenate(documents).tofile(directory / f"{TOKENS}.bin")
    sizes = np.asarray([len(document) for document in documents])
    with (directory / f"{TOKENS}.idx").open("wb") as file:
        write_index(file, sizes, np.dtype(np.uint16))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--directory", type=Path, help="default: a temporary one")
    flags = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory() as temporary:
        directory = (flags.directory or Path(temporary)).absolute()
        undisturbed, stormy = directory / "undisturbed", directory / "stormy"
        directory.mkdir(parents=True, exist_ok=True)
        write_data(directory)
        if train(undisturbed, directory).wait():
            raise SystemExit(f"the undisturbed run failed: see {directory / 'log.txt'}")
        print(f"undisturbed run of {get_config_steps()} steps is done", flush=True)
        storm(stormy, directory, flags.kills, random.Random(flags.seed))
        raise SystemExit(compare(undisturbed, stormy))


def get_config_steps() -> int:
    return sum(stage.steps for stage in get_config().stages)


def train(workdir: Path, directory: Path) -> subprocess.Popen:
    """Starts, or continues, a run; compiled programs are shared, so that restarts are quick."""
    command = [sys.executable, ROOT / "train.py", "--config", CONFIG, "--workdir", workdir]
    command += ["--run.compilation-cache", directory / "cache"]
    with (directory / "log.txt").open("a") as log:
        return subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, cwd=directory)


def storm(workdir: Path, directory: Path, kills: int, rng: random.Random) -> None:
    """Runs to the end through `kills` SIGKILLs.

    Each comes soon after a random step is reported, or, where an earlier life got past that step,
    at some time between the start of the process and its first steps.
    """
    moments = sorted(rng.sample(range(get_config_steps()), kills))
    for number, moment in enumerate(moments, 1):
        started, process = time.monotonic(), train(workdir, directory)
        if steps_done(workdir) >= moment:
            time.sleep(rng.uniform(0, START_SECONDS))
        while steps_done(workdir) < moment:
            if process.poll() is not None:
                raise SystemExit(f"the run ended by itself: see {directory / 'log.txt'}")
            time.sleep(POLL_SECONDS)
        time.sleep(rng.uniform(0, STEP_SECONDS))
        process.send_signal(signal.SIGKILL)
        alive = process.wait() == -signal.SIGKILL
        where = f"{steps_done(workdir)} steps reported, {time.monotonic() - started:.1f} s old"
        print(f"kill {number}: {where}{'' if alive else ' (had ended already)'}", flush=True)
    if train(workdir, directory).wait():
        raise SystemExit(f"the last start failed: see {directory / 'log.txt'}")


def steps_done(workdir: Path) -> int:
    """Last step in metrics.jsonl; a line that is still being written does not count."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    return json.loads(whole[-1])["step"] if whole else 0


def compare(undisturbed: Path, stormy: Path) -> int:
    """Prints what is equal; 0 if everything is."""
    metrics = [(path / "metrics.jsonl").read_bytes() for path in (undisturbed, stormy)]
    params = [dict(flat(read_workdir(path).params)) for path in (undisturbed, stormy)]
    different = [
        name
        for name in params[0].keys() | params[1].keys()
        if np.asarray(params[0][name]).tobytes() != np.asarray(params[1][name]).tobytes()
    ]
    lines = metrics[0].count(b"\n")
    same = metrics[0] == metrics[1]
    print(f"metrics.jsonl ({lines} lines): {'identical' if same else 'DIFFERENT'}")
    total = len(params[0])
    print(f"final parameters ({total} arrays): {total - len(different)} identical {different}")
    return int(not same or bool(different))


if __name__ == "__main__":
    main(sys.argv[1:])
