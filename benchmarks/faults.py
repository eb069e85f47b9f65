"""Good inputs of every kind, and the faults that `fault_storm.py` gives to them."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rwkvx_jax.convert.pth import write_pth
from rwkvx_jax.convert.safetensors_file import write_safetensors
from tests.convert.convert_checkpoints import fla_directory, fla_tensors, official_tensors, rwkv7
from tests.evals.eval_models import ROOT, write_checkpoint

Damage = Callable[[Path, random.Random], None]

CONFIG = """
from rwkvx_jax.config import *
def get_config():
    model = ModelConfig(vocab_size=257, num_blocks=2, num_attention_blocks=1, width=16, head_size=8,
                        chunk_size=8, top_k=2, low_rank_override=(4, 4, 4, 4))
    run = RunConfig(compute_dtype="float32", remat="none", recurrence="sequential", log_every=1,
                    eval_batches=0, checkpoint_every=2, compilation_cache="{cache}")
    data = DataConfig(path="text.txt", sources=(SourceConfig("text"),))
    return Config(model=model, stages=(Stage("s", 24, 4, 4, 1e-2),), run=run, data=data)
"""
TEXT = "".join(
    f"Line {i} of the text says that {i * 7919 % 1000} comes next.\n" for i in range(200)
)
TURNS = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]
LINES = "".join(json.dumps(row) + "\n" for row in [{"text": TEXT[:500]}, {"messages": TURNS}] * 4)
PIQA = [
    {"goal": f"Boil {i}", "sol1": "Heat it.", "sol2": "Cool it.", "label": i % 2} for i in range(4)
]
TRAIN = ["--config", "config.py", "--workdir", "run"]
MORE = [*TRAIN, "--stages.0.steps", "6"]
PASSKEY = ["passkey", "--checkpoint", "own.safetensors", "--output", "out", "--lengths", "128"]
PASSKEY += ["--depths", "2", "--trials", "1"]
SHORT = ["short", "--checkpoint", "own.safetensors", "--output", "out", "--data-dir", "short"]
SHORT += ["--tasks", "piqa"]


@dataclass(frozen=True)
class Fault:
    """A command run on a damaged copy of good inputs.

    Attributes:
      kind: row of the table.
      name: what was done to what.
      bed: folder of good inputs.
      door: "train", "eval", "generate", "convert", "plan", "data"; "read": opens training data.
      argv: run in the copy.
      damage: given the copy and a generator of random numbers.
      result: files, or folders, that must be as without the fault if the command succeeds; none:
        it must not succeed.
      seconds: after which it hangs.
      largest_file: bytes that a file may have: a disk that fills up.
      stdout: of a process of its own: "" none, "full" a device that is full, "closed" a reader
        that goes away at once.
      undamaged: run on good inputs for the results to compare with.
    """

    kind: str
    name: str
    bed: str
    door: str
    argv: tuple[str, ...]
    damage: Damage = lambda folder, rng: None
    result: tuple[str, ...] = ()
    seconds: float = 60
    largest_file: int | None = None
    stdout: str = ""
    undamaged: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------------
# Good inputs
# ------------------------------------------------------------------------------------------------


def make_beds(root: Path, run_door: Callable[[str, list[str], Path], None]) -> None:
    """Writes the good inputs, as folders of `root`."""
    for name in ("convert", "run", "data", "eval", "report"):
        (root / name).mkdir(parents=True)
    bed = root / "convert"
    write_pth(bed / "official.pth", official_tensors())
    write_safetensors(bed / "official.safetensors", official_tensors())
    fla_directory(bed / "fla", fla_tensors(rwkv7()))
    write_checkpoint(bed / "own.safetensors")
    (bed / "sharded").mkdir()
    tensors = official_tensors()
    shards = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(shards.values()):
        part = {name: tensors[name] for name in tensors if shards[name] == shard}
        write_safetensors(bed / "sharded" / shard, part)
    index = {"metadata": {}, "weight_map": shards}
    (bed / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))

    bed = root / "run"
    (bed / "config.py").write_text(CONFIG.replace("{cache}", str(root / "programs")))
    (bed / "text.txt").write_text(TEXT)
    run_door("train", TRAIN, bed)

    bed = root / "data"
    (bed / "text.txt").write_text(TEXT)
    (bed / "lines.jsonl").write_text(LINES)
    run_door("data", ["lines.jsonl", "corpus", "--tokenizer", "byte", "--workers", "1"], bed)
    run_door("read", ["text", "text.txt"], bed)

    bed = root / "eval"
    write_checkpoint(bed / "own.safetensors")
    (bed / "short").mkdir()
    (bed / "short" / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PIQA))
    (bed / "text.txt").write_text(TEXT)
    run_door("eval", PASSKEY, bed)
    run_door("eval", SHORT, bed)
    shutil.copytree(ROOT / "results" / "seed0" / "filler_1m", root / "report" / "results")


# ------------------------------------------------------------------------------------------------
# Damages
# ------------------------------------------------------------------------------------------------


def rewrite(name: str, change: Callable[[bytes, random.Random], bytes]) -> Damage:
    """Changes the bytes of a file (of the pattern's first match)."""

    def damage(folder: Path, rng: random.Random) -> None:
        path = found(folder, name)
        path.write_bytes(change(path.read_bytes(), rng))

    return damage


def found(folder: Path, pattern: str) -> Path:
    """The file of a pattern; of several, the last and largest."""
    paths = [path for path in folder.glob(pattern) if path.is_file()]
    return max(paths, key=lambda path: (path.parent, path.stat().st_size))


def flip(data: bytes, rng: random.Random, start: int = 0, end: int | None = None) -> bytes:
    place = rng.randrange(start, min(end or len(data), len(data)))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(1, len(data))]


CONTENT = {
    "flipped": flip,
    "cut": cut,
    "emptied": lambda data, rng: b"",
    "zeroed": lambda data, rng: bytes(len(data)),
    "filled with 255": lambda data, rng: b"\xff" * len(data),
    "random": lambda data, rng: rng.randbytes(len(data)),
    "twice as long": lambda data, rng: data + data,
    "an LFS pointer": lambda data, rng: (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"
    ),
}


def removed(name: str) -> Damage:
    return lambda folder, rng: found(folder, name).unlink()


def folder_instead(name: str) -> Damage:
    def damage(folder: Path, rng: random.Random) -> None:
        path = found(folder, name)
        path.unlink()
        path.mkdir()

    return damage


def all_damages(name: str, without: tuple[str, ...] = ()) -> Iterator[tuple[str, Damage]]:
    """Every way to damage a file."""
    for word, change in CONTENT.items():
        if word not in without:
            yield f"{name} {word}", rewrite(name, change)
    yield f"{name} removed", removed(name)
    yield f"{name} is a folder", folder_instead(name)


def changed_json(name: str, change: Callable[[dict], object]) -> Damage:
    def rewritten(data: bytes, rng: random.Random) -> bytes:
        value = json.loads(data)
        changed = change(value)
        return json.dumps(value if changed is None else changed).encode()

    return rewrite(name, rewritten)


def changed_header(name: str, change: Callable[[dict], object]) -> Damage:
    """Changes the first line of a file of records."""

    def rewritten(data: bytes, rng: random.Random) -> bytes:
        first, rest = data.split(b"\n", 1)
        value = json.loads(first)
        changed = change(value)
        return json.dumps(value if changed is None else changed).encode() + b"\n" + rest

    return rewrite(name, rewritten)


def header(change: Callable[[dict], object]) -> Callable[[bytes, random.Random], bytes]:
    """Changes the JSON header of a safetensors file."""

    def rewritten(data: bytes, rng: random.Random) -> bytes:
        (size,) = struct.unpack("<Q", data[:8])
        value = json.loads(data[8 : 8 + size])
        change(value)
        text = json.dumps(value).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size :]

    return rewritten


def tensor(value: dict) -> dict:
    """Header entry of some tensor."""
    return value[next(name for name in value if name.endswith("head.weight"))]


HEADERS: dict[str, Callable[[dict], object]] = {
    "a tensor is missing": lambda h: h.pop(next(n for n in h if "value" in n)),
    "a tensor is renamed": lambda h: h.update({"x": h.pop(next(n for n in h if "key" in n))}),
    "a block too far": lambda h: h.update({"blocks.99999999.att.w0": tensor(h)}),
    "a layer too far": lambda h: h.update({"model.layers.999999999.attn.x_r": tensor(h)}),
    "integers": lambda h: tensor(h).update(dtype="I32"),
    "unknown dtype": lambda h: tensor(h).update(dtype="F7"),
    "huge shape": lambda h: tensor(h).update(shape=[2**62, 4]),
    "no shape": lambda h: tensor(h).update(shape=None),
    "negative shape": lambda h: tensor(h).update(shape=[-1, -1]),
    "overlapping": lambda h: tensor(h).update(data_offsets=[0, 64]),
    "backwards": lambda h: tensor(h).update(data_offsets=[64, 0]),
    "offsets of text": lambda h: tensor(h).update(data_offsets=["0", "64"]),
    "no entry": lambda h: h.update(x=None),
    "a prefix on some": lambda h: h.update({"module.x": tensor(h)}),
}


def not_finite(value: float) -> Damage:
    """Sets a number of the head of our safetensors, which lies last in the file."""

    def change(data: bytes, rng: random.Random) -> bytes:
        (size,) = struct.unpack("<Q", data[:8])
        begin = 8 + size + tensor(json.loads(data[8 : 8 + size]))["data_offsets"][0]
        return data[:begin] + np.float32(value).tobytes() + data[begin + 4 :]

    return rewrite("own.safetensors", change)


def earlier_parameters(folder: Path, rng: random.Random) -> None:
    """The parameters of an earlier checkpoint in a later one."""
    first, last = sorted((folder / "run" / "checkpoints").iterdir(), key=lambda p: int(p.name))[-2:]
    shutil.rmtree(last / "params")
    shutil.copytree(first / "params", last / "params")


def renamed_step(name: str) -> Damage:
    return lambda folder, rng: max((folder / "run" / "checkpoints").iterdir()).rename(
        folder / "run" / "checkpoints" / name
    )


def empty_step(folder: Path, rng: random.Random) -> None:
    (folder / "run" / "checkpoints" / "99").mkdir()


@dataclass
class Faults:
    """Collects faults of one kind, bed and command."""

    kind: str
    bed: str
    door: str
    argv: list[str]
    result: tuple[str, ...] = ()
    seconds: float = 60
    all: list[Fault] = field(default_factory=list)

    def add(self, name: str, damage: Damage, argv: list[str] | None = None, **options) -> None:
        given = {"result": self.result, "seconds": self.seconds, "undamaged": tuple(self.argv)}
        given |= options
        argv = tuple(self.argv if argv is None else argv)
        self.all.append(Fault(self.kind, name, self.bed, self.door, argv, damage, **given))
