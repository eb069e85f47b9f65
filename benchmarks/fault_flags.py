"""Flags that no command line can take: every one must be refused, quickly."""

from __future__ import annotations

import os
from collections.abc import Iterator

from benchmarks.faults import PASSKEY, SHORT, Fault, Faults

NEW = ["--config", "config.py", "--workdir", "new"]


def bad_flags() -> Iterator[Fault]:
    model = ["--checkpoint", "own.safetensors"]
    passkey, prompt = [*PASSKEY, "--seed", "1"], [*model, "--prompt", "The"]
    plan = ["--config", "config.py", "--topology", "v5e:2x2"]
    lists = {
        ("run", "train"): [
            [*NEW, *flags.split()] for flags in (
                "--stages.9.steps 3", "--optimizer.wd 1", "--nothing", "--stages.0.steps x",
                "--stages.0.steps -5", "--stages.0.steps 0", f"--data.seed {2**70}",
                "--model.num-blocks 999999999", "--model.vocab-size 9999999999999",
                "--stages.0.peak-lr inf", "--optimizer.weight-decay inf", "--optimizer.eps 0",
                "--optimizer.eps 1e-46", "--run.recurrence foo", "--run.sparse-attention foo",
                "--stages.0.seq-len 99999999999", "--stages.0.global-batch 99999999999",
                "--data.sources.0.weight nan", "--init-from nowhere", "--init-from config.py",
                "--mesh.data 7", "--num-processes 3", "--config", "--config nowhere.py",
                "--run.profile-steps 5", "--stages.0.source-weights -1",
            )
        ],
        ("eval", "eval"): [
            [*passkey, "--lengths", "-5"], [*passkey, "--lengths", "1e12"],
            [*passkey, "--lengths", "x"],
            [*passkey, "--lengths", "999999999999"], [*passkey, "--trials", "999999999"],
            [*passkey, "--trials", "-1"], [*passkey, "--depths", "0"],
            [*passkey, "--seed", str(2**70)],
            [*passkey, "--seed", "-1"], [*passkey, "--batch", "0"], [*passkey, "--batch",
            "999999999999"],
            [*passkey, "--piece", "0"], [*passkey, "--chunk-size", "0"], [*passkey, "--top-k",
            "-2"],
            [*passkey, "--selector", "x"], [*passkey, "--checkpoint", "nowhere"],
            [*passkey, "--bad"],
            [*passkey, "--output", "text.txt"], [*passkey, "--output", "text.txt/out"],
            ["nothing"], [],
            [*SHORT, "--tasks", "nothing"], [*SHORT, "--data-dir", "nowhere"],
            ["report", "nowhere", "--output", "rep"], ["report", "own.safetensors", "--output",
            "rep"],
            ["speed", "--output", "out", "--contexts", "0"], ["speed", "--output", "out",
            "--contexts",
             "99999999999999"], ["long-loss", *model, "--output", "out", "--text", "nowhere"],
        ],
        ("eval", "generate"): [
            [*prompt, "--seed", str(2**70)], [*prompt, "--max-tokens", "999999999999"],
            [*prompt, "--max-tokens", "0"], [*prompt, "--temperature", "inf", "--top-k", "3"],
            [*prompt, "--temperature", "nan"], [*prompt, "--top-p", "7"], [*prompt, "--top-p",
            "nan"],
            [*prompt, "--top-k", "-1"], [*prompt, "--stop", "99999"], [*prompt, "--cache-policy",
            "1", "2",
            "3"], [*prompt, "--max-length", "3"], [*prompt, "--presence-penalty", "inf"],
            [*model], [*model, "--prompt", ""], ["--prompt", "x"], [*prompt, "--tokenizer", "x"],
            ["--checkpoint", "nowhere", "--prompt", "x"],
            [*model, "--prompt", os.fsdecode(b"\xff")],
            ["--checkpoint", "text.txt", "--prompt", "x"], [*prompt, "--vocab-file", "nowhere"],
        ],
        ("convert", "convert"): [
            [], ["official.pth"], ["nowhere.pth", "out.pth"], ["official.pth", "out.txt"],
            ["official.pth", "out.safetensors", "--step", "3"], ["official.pth", "out.safetensors",
             "--chunk-size", "0"], ["official.pth", "out.safetensors", "--top-k", "-1"],
            ["official.pth", "sharded"], ["official.pth", "own.safetensors/x.safetensors"],
            ["official.pth", "out.safetensors", "--chunk-size", str(2**70)],
            ["official.pth", os.fsdecode(b"\xff.safetensors")],
        ],
        ("run", "plan"): [
            [], [*plan, "--topology", "v5e"], [*plan, "--topology", "v9:2x2"],
            [*plan, "--slices", "0"],
            [*plan, "--slices", "999999999"], [*plan, "--topology", "v5p:9999x9999x9999"],
            [*plan, "--programs", "x"], [*plan, "--stage", "x"], [*plan, "--model.num-blocks",
            "9" * 9],
            [*plan, "--stages.0.seq-len", "9" * 12], [*plan, "--programs", "decode", "--length",
            "9" * 18],
            [*plan, "--programs", "decode", "--batch", "-1"], [*plan, "--stages.7.steps", "1"],
        ],
        ("data", "data"): [
            [], ["text.txt"], ["nowhere.txt", "out"], ["text.txt", "corpus"], ["text.txt",
            "text.txt/out"],
            ["text.txt", "out", "--workers", "-3"], ["text.txt", "out", "--workers", "99999999"],
            ["text.txt", "out", "--tokenizer", "x"], ["text.txt", "out", "--kind", "jsonl"],
            ["text.txt", "out", "--vocab-file", "nowhere"], ["*.none", "out"],
        ],
    }  # fmt: skip
    for (bed, door), commands in lists.items():
        made = Faults("flags", bed, door, [])
        for argv in commands:
            added = argv[len(NEW) :] if door == "train" else argv
            words = added[-2:] if added[:1] in (passkey[:1], plan[:1], model[:1]) else added
            name = " ".join(words).encode("ascii", "backslashreplace").decode()
            made.add(f"{door} {name}", lambda folder, rng: None, argv)
        yield from made.all
