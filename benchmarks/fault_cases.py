"""The faults of `fault_storm.py`: every reader and command line, with each way to spoil it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

from benchmarks import faults
from benchmarks.fault_flags import bad_flags
from benchmarks.faults import (
    HEADERS,
    MORE,
    PASSKEY,
    SHORT,
    Damage,
    Fault,
    Faults,
    all_damages,
    changed_header,
    changed_json,
    flip,
    header,
    not_finite,
    rewrite,
)

TO_OURS, TO_PTH = ["out.safetensors"], ["out.pth", "--to", "official"]


def all_faults(beds: Path) -> list[Fault]:
    """Every fault, in an order that depends on the good inputs alone."""
    made = (
        converting(),
        checkpoints(beds),
        token_files(beds),
        texts(),
        stored_results(beds),
        configs(),
        bad_flags(),
        full_disks(),
        streams(),
    )
    return [fault for part in made for fault in part]


def converting() -> Iterator[Fault]:
    pth = Faults("pth", "convert", "convert", ["official.pth", *TO_OURS], ("out.safetensors",))
    for name, damage in all_damages("official.pth"):
        pth.add(name, damage)
    for i in range(12):
        pth.add(f"official.pth flipped again ({i})", rewrite("official.pth", flip))
    yield from pth.all

    for source, argv in (("official", TO_OURS), ("own", TO_PTH)):
        name = f"{source}.safetensors"
        made = Faults("safetensors", "convert", "convert", [name, *argv], (argv[0],))
        for word, damage in all_damages(name, without=("flipped",)):
            made.add(word, damage)
        for word, change in HEADERS.items():
            made.add(f"{name}: {word}", rewrite(name, header(change)))
        yield from made.all
    made = Faults(
        "safetensors", "convert", "convert", ["official.safetensors", *TO_OURS], (TO_OURS[0],)
    )
    in_header = lambda data, rng: flip(data, rng, 0, 8 + int.from_bytes(data[:8], "little"))
    for i in range(8):
        made.add(f"header flipped ({i})", rewrite("official.safetensors", in_header))
    own = Faults("safetensors", "convert", "convert", ["own.safetensors", *TO_PTH], (TO_PTH[0],))
    for word, value in (("null", None), ("text", "{"), ("list", "[]"), ("numbers", '{"a": 1}')):
        spoil = lambda h, value=value: h["__metadata__"].update(
            dict.fromkeys(h["__metadata__"], value)
        )
        own.add(f"metadata are {word}", rewrite("own.safetensors", header(spoil)))
    for old, new in (
        ('num_blocks\\": 2', 'num_blocks\\": 1000000000'),
        ('width\\": 32', 'width\\": -32'),
    ):
        spoil = lambda data, rng, old=old, new=new: renewed(data, old, new)
        own.add(f"metadata say {new}", rewrite("own.safetensors", spoil))
    own.add("NaN", not_finite(math.nan), result=())
    own.add("infinity", not_finite(math.inf), result=())
    yield from made.all + own.all

    index = "sharded/*.index.json"
    made = Faults("shard index", "convert", "convert", ["sharded", *TO_OURS], (TO_OURS[0],))
    for word, damage in all_damages(index, without=("flipped",)):
        made.add(word, damage)
    for shard in (
        "model.safetensors.index.json",
        "",
        None,
        5,
        "..",
        "/etc/passwd",
        "x\n.safetensors",
    ):
        name = lambda v, shard=shard: v["weight_map"].update({next(iter(v["weight_map"])): shard})
        made.add(f"a shard named {shard!r}", changed_json(index, name))
    made.add("a shard removed", faults.removed("sharded/model-1.safetensors"))
    yield from made.all

    made = Faults("Hugging Face directory", "convert", "convert", ["fla", *TO_OURS], (TO_OURS[0],))
    for word, damage in all_damages("fla/config.json", without=("flipped",)):
        made.add(word, damage)
    for key, value in (("num_hidden_layers", 10**9), ("hidden_size", None), ("head_dim", 0),
                       ("hidden_size", -128), ("vocab_size", "11"),
                       ("norm_eps", math.nan)):  # fmt: skip
        change = lambda v, key=key, value=value: v.update({key: value})
        made.add(f"{key} is {value}", changed_json("fla/config.json", change))
    yield from made.all


def renewed(data: bytes, old: str, new: str) -> bytes:
    """A safetensors file with other text in its header."""
    size = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + size].decode().replace(old, new).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def checkpoints(beds: Path) -> Iterator[Fault]:
    params = ("out.safetensors",)
    made = Faults("checkpoint", "run", "convert", ["run", *TO_OURS], params)
    resumed = Faults("resuming", "run", "train", MORE, ("run/metrics.jsonl", "final"), 90)
    newest = max((beds / "run" / "run" / "checkpoints").iterdir(), key=lambda path: int(path.name))
    inside = [path for path in sorted(newest.rglob("*")) if path.is_file()]
    for number, path in enumerate(inside):
        name = str(path.relative_to(beds / "run"))
        damages = list(all_damages(name, without=("an LFS pointer", "filled with 255")))
        for step, faulty in ((3, made), (9, resumed)):  # each file, though not in each way
            for word, damage in damages[number % step :: step] if path.stat().st_size else ():
                faulty.add(word.replace(str(newest.relative_to(beds / "run")), "newest"), damage)
    for word, damage in all_damages("run/config.json", without=("flipped",)):
        made.add(word, damage)
    both = {
        "parameters of an earlier step": faults.earlier_parameters,
        "newest renamed to 9999": faults.renamed_step("9999"),
        "newest renamed to 3": faults.renamed_step("3"),
        "newest renamed to x": faults.renamed_step("x"),
        "an empty checkpoints/99": faults.empty_step,
    }
    for name, damage in both.items():
        made.add(name, damage)
        resumed.add(name, damage)
    metrics = "run/metrics.jsonl"
    garbage = lambda data, rng: data.replace(b"\n", b"\n}garbage\n", 1)
    tail = lambda data, rng: data + bytes(100)
    resumed.add("a line of garbage in metrics.jsonl", rewrite(metrics, garbage), result=("final",))
    resumed.add("NULs after metrics.jsonl", rewrite(metrics, tail))
    resumed.add("half a last line in metrics.jsonl", rewrite(metrics, lambda data, rng: data[:-9]))
    yield from made.all + resumed.all


def token_files(beds: Path) -> Iterator[Fault]:
    cache = beds / "data" / "data-cache"
    made = Faults("token cache", "data", "read", ["text", "text.txt"], ("digest.txt",))
    for path in sorted(path for path in cache.rglob("*") if path.is_file()):
        if path.stat().st_size:
            for word, damage in all_damages(str(path.relative_to(beds / "data"))):
                made.add(word, damage)
    yield from made.all
    made = Faults("binidx", "data", "read", ["binidx", "corpus"], ("digest.txt",))
    for name in ("corpus.bin", "corpus.idx", "corpus.mask"):
        for word, damage in all_damages(name):
            made.add(word, damage)
    yield from made.all


def texts() -> Iterator[Fault]:
    results = tuple(f"out.{end}" for end in ("bin", "idx", "mask"))
    flags = ["out", "--tokenizer", "byte", "--workers", "1"]
    made = Faults("text", "data", "data", ["text.txt", *flags], results)
    changes = {
        "a byte order mark": lambda data: b"\xef\xbb\xbf" + data,
        "UTF-16": lambda data: data.decode().encode("utf-16"),
        "UTF-32": lambda data: data.decode().encode("utf-32"),
        "latin-1": lambda data: data + "é".encode("latin-1"),
        "cut in a character": lambda data: data + "é".encode()[:1],
        "nothing": lambda data: b"",
        "surrogates": lambda data: data + b"\xed\xa0\x80",
        "random bytes": lambda data: os.urandom(4096) + b"\xff",
    }
    for name, change in changes.items():
        made.add(name, rewrite("text.txt", lambda data, rng, change=change: change(data)))
    made.add("removed", faults.removed("text.txt"))
    made.add(
        "a pattern that is a file", beside("text[1].txt", "text1.txt"), ["text[1].txt", *flags]
    )
    made.add("AppleDouble beside it", hidden("._text.txt"), ["folder", *flags])
    made.add("notebook copies beside it", hidden(".ipynb_checkpoints/text.txt"), ["folder", *flags])
    made.add("a folder that holds itself", hidden(None), ["folder", *flags])
    made.add("in upper case", hidden("x.csv", "TEXT.TXT"), ["folder", *flags])
    yield from made.all

    made = Faults("jsonl", "data", "data", ["lines.jsonl", *flags], results)
    turn = {"role": "user", "content": "x"}
    spoilt = ({"role": 5}, {"role": None}, {"content": 5}, {"content": None}, {"role": "x"})
    bad = ["{", "garbage", "5", "null", "[]", '{"text": 5}', "{}", '{"text": "x"} {"text": "y"}']
    bad += ['{"messages": 5}', '{"messages": [5]}', '{"text": "\\ud800"}', "[" * 200_000]
    bad += ['{"a":' * 200_000, *(json.dumps({"messages": [turn | change]}) for change in spoilt)]
    for line in bad:
        append = lambda data, rng, line=line: data + line.encode() + b"\n"
        made.add(f"line {line[:40]}", rewrite("lines.jsonl", append), result=())
    same = {
        "a byte order mark": lambda data, rng: b"\xef\xbb\xbf" + data,
        "blank lines": lambda data, rng: data.replace(b"\n", b"\n\n"),
        "CR LF": lambda data, rng: data.replace(b"\n", b"\r\n"),
        "null fields": lambda data, rng: data.replace(b'"}\n', b'", "messages": null}\n'),
        "no last line break": lambda data, rng: data[:-1],
        "UTF-16": lambda data, rng: data.decode().encode("utf-16"),
        "cut": faults.cut,
        "nothing": lambda data, rng: b"",
    }
    for name, change in same.items():
        must_refuse = name in ("cut", "nothing")
        options = {"result": ()} if must_refuse else {}
        made.add(name, rewrite("lines.jsonl", change), **options)
    yield from made.all

    made = Faults("prompts file", "eval", "generate",
                  ["--checkpoint", "own.safetensors", "--prompts-file", "text.txt"])  # fmt: skip
    for name in ("UTF-16", "latin-1", "nothing", "surrogates", "random bytes"):
        change = lambda data, rng, change=changes[name]: change(data[:100])
        made.add(f"prompts: {name}", rewrite("text.txt", change))
    made.add("prompts removed", faults.removed("text.txt"))
    made.add("prompts are a folder", faults.folder_instead("text.txt"))
    yield from made.all


def beside(name: str, other: str) -> Damage:
    """The text under a name with brackets, and other text under the name it would match."""

    def damage(folder: Path, rng) -> None:
        (folder / "text.txt").rename(folder / name)
        (folder / other).write_text("other text")

    return damage


def hidden(extra: str | None, name: str = "text.txt") -> Damage:
    """The text in a folder, beside a file that is none of it; None: a link to the folder itself."""

    def damage(folder: Path, rng) -> None:
        inner = folder / "folder"
        inner.mkdir()
        (folder / "text.txt").rename(inner / name)
        if extra is None:
            (inner / "self").symlink_to(".")
            return
        (inner / extra).parent.mkdir(exist_ok=True)
        (inner / extra).write_bytes(b"\0\5\x16\7\xff")

    return damage


def stored_results(beds: Path) -> Iterator[Fault]:
    for argv, name, kind in (
        (PASSKEY, "passkey", "results file"),
        (SHORT, "short", "answers file"),
    ):
        made = Faults(kind, "eval", "eval", argv, (f"out/{name}.jsonl",), 90)
        stored = (beds / "eval" / "out").glob(f"{name}*.json*")
        for path in sorted(path for path in stored if path.stat().st_size):  # locks hold nothing
            for word, damage in all_damages(str(path.relative_to(beds / "eval")), ("flipped",)):
                made.add(word, damage)
        yield from made.all
    made = Faults("report", "report", "eval", ["report", "results", "--output", "rep"])
    made.result = ("rep/report.md",)
    for word, damage in all_damages("results/passkey.jsonl", without=("flipped", "twice as long")):
        made.add(word, damage)
    shapes = {
        "a list": lambda v: [v],
        "null": lambda v: 5,
        "no trials": lambda v: v.pop("models") and None,
        "NaN": lambda v: v.update(seed=math.nan),
        "fields of text": lambda v: {key: "x" for key in v},
        "fields of null": lambda v: {key: None for key in v},
    }
    for word, change in shapes.items():
        made.add(f"results are {word}", changed_header("results/passkey.jsonl", change), result=())
    yield from made.all

    model = ["--checkpoint", "own.safetensors"]
    commands = {
        "passkey": ("eval", [*PASSKEY, "--seed", "1"]),
        "short": ("eval", [*SHORT[:4], "new", *SHORT[5:]]),
        "long-loss": ("eval", ["long-loss", *model, "--output", "out", "--text", "text.txt",
        "--length",
                               "512", "--documents", "2"]),
        "selection": ("eval", ["selection", *model, "--output", "out", "--text", "text.txt",
        "--length",
                               "512", "--documents", "1", "--queries", "4"]),
        "generate": ("generate", [*model, "--prompt", "The", "--max-tokens", "4"]),
    }  # fmt: skip
    for task, (door, argv) in commands.items():
        made = Faults("not finite", "eval", door, argv, seconds=90)
        for value in (math.nan, math.inf):
            made.add(f"{task} of a model with {value}", not_finite(value))
        yield from made.all


def configs() -> Iterator[Fault]:
    made = Faults("experiment file", "run", "train", ["--config", "config.py", "--workdir", "new"])
    for word, damage in all_damages("config.py", without=("flipped", "twice as long")):
        made.add(word, damage)
    for old, new in (
        ("width=16", "width=17"), ("width=16", "width=-16"), ("width=16", "width='16'"),
        ("width=16", "width=16.0"), ("width=16", "width=10**30"), ("width=16", "wdth=16"),
        ("width=16", "width=10**15"), ("num_blocks=2", "num_blocks=10**9"), ("1e-2",
        "float('inf')"),
        ("1e-2", "float('nan')"), ("1e-2", "1e-320"), ("1e-2", "-1"), ("24, 4, 4", "24, 4, 0"),
        ("24, 4, 4", "10**12, 4, 4"), ("24, 4, 4", "24, 10**12, 4"), ("24, 4, 4", "24, 4, 10**30"),
        ("def get_config", "def other"), ("return Config", "return str"), ("return Config",
        "return 1 / Config"),
        ('"sequential"', '"foo"'), ('"float32"', '"float64"'), ("text.txt", "absent.txt"),
        ('"text")', '"texts")'),
        ('"text")', '"text", weight=1e-300), SourceConfig("text", weight=1e300)'),
        ("import *", "import nothing"), ("chunk_size=8", "chunk_size=0"), ("top_k=2", "top_k=0"),
    ):  # fmt: skip
        change = lambda data, rng, old=old, new=new: data.replace(old.encode(), new.encode())
        made.add(f"{old} is {new}", rewrite("config.py", change))
    yield from made.all


def full_disks() -> Iterator[Fault]:
    nothing = lambda folder, rng: None
    flags = ["--tokenizer", "byte", "--workers", "1"]
    commands = [
        ("convert", "convert", ["official.pth", "out.safetensors"]),
        ("convert", "convert", ["official.safetensors", "out.pth"]),
        ("data", "data", ["text.txt", "out", *flags]),
        ("data", "read", ["text", "text.txt", "new"]),
        ("run", "train", ["--config", "config.py", "--workdir", "new"]),
        ("run", "train", MORE),
        ("eval", "eval", [*PASSKEY, "--seed", "1"]),
        ("report", "eval", ["report", "results", "--output", "rep"]),
    ]
    for bed, door, argv in commands:
        made = Faults("full disk", bed, door, argv, seconds=90)
        for size in (0, 700):
            made.add(f"{door} {argv[0]}: files of {size} bytes", nothing, largest_file=size)
        yield from made.all
    outputs = [
        ("run", "train", ["--config", "config.py", "--workdir", "text.txt"]),
        ("run", "train", ["--config", "config.py", "--workdir", "text.txt/run"]),
        ("run", "train", [*MORE, "--data.cache-dir", "text.txt"]),
        ("report", "eval", ["report", "results", "--output", "results/passkey.jsonl"]),
        ("data", "read", ["text", "text.txt", "text.txt"]),
    ]
    for bed, door, argv in outputs:
        made = Faults("unwritable", bed, door, argv, seconds=90)
        made.add(f"{door} {' '.join(argv[-2:])}", nothing)
        yield from made.all


def streams() -> Iterator[Fault]:
    generate = ["--checkpoint", "own.safetensors", "--prompt", "The", "--max-tokens", "3000"]
    commands = [
        ("eval", "generate", generate),
        ("run", "train", ["--help"]),
        ("run", "plan", ["--help"]),
        ("report", "eval", ["report", "results", "--output", "rep"]),
    ]
    for bed, door, argv in commands:
        made = Faults("output", bed, door, argv, seconds=120)
        for state in ("full", "closed"):
            made.add(
                f"{door} into an output that is {state}", lambda folder, rng: None, stdout=state
            )
        yield from made.all
