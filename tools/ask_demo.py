"""Asks a model of `make demo` three questions: `python -m tools.ask_demo runs/demo`.

One text holds 64 names with a number each. The model reads it and is asked for three of them, with
its attention blocks and without.
"""

import argparse
import sys

import numpy as np
from rich.console import Console
from rich.table import Table

from rwkvx_jax.checkpoint import load_checkpoint
from rwkvx_jax.cli import command_line, settle_platform
from rwkvx_jax.evals.models import as_model
from rwkvx_jax.evals.readers import GreedyReader
from rwkvx_jax.storage import work_path
from rwkvx_jax.tasks.recall import recall_prompt

PAIRS, LENGTH, DEPTHS, SEED = 64, 2048, (0.1, 0.5, 0.9), 7
ANSWER_TOKENS, PREFILL_CHUNK = 8, 256
NEXT = """Next:
  tensorboard --logdir {run}                                  # the curves
  rwkvx generate --checkpoint {run} --prompt "The "           # it reads bytes, and writes a little
  rwkvx eval passkey --checkpoint {run} --output out          # more evaluations: rwkvx eval --help
  rwkvx train --config recall_64k --data.path 'books/*.txt'   # the same in large: 65,536 bytes
  rwkvx plan --config rwkvx_3b6_stage2:v5p128 --topology v5p:4x4x8   # and on a pod
`rwkvx` is in .venv/bin."""


def questions(tokenizer) -> tuple[list[np.ndarray], list[int]]:
    """Prompts that ask for three numbers of one document, and the numbers."""
    made = [
        recall_prompt(tokenizer, LENGTH, PAIRS, depth, np.random.default_rng(SEED))
        for depth in DEPTHS
    ]
    return [prompt for prompt, _ in made], [number for _, number in made]


def ask(run: str, console: Console) -> None:
    path = work_path(run)
    model = as_model(load_checkpoint(path), path, path.name)
    prompts, numbers = questions(model.tokenizer)
    table = Table(
        "question", "right", "RWKV-X", "attention off", title=f"{PAIRS} numbers in {LENGTH:,} bytes"
    )
    columns = []
    for asked in (model, model.without_attention()):
        read = GreedyReader(
            asked, prefill_chunk=PREFILL_CHUNK, batch=len(prompts), longest=LENGTH + ANSWER_TOKENS
        )
        answers = read(prompts, ANSWER_TOKENS, lambda count: None)
        texts = (asked.tokenizer.decode(answer) for answer in answers)
        columns.append([text.strip().split("\n")[0] for text in texts])
    for prompt, number, *answers in zip(prompts, numbers, *columns, strict=True):
        question = model.tokenizer.decode(prompt).split("\n")[-2]
        table.add_row(question, str(number), *answers)
    console.print(table)
    console.print(NEXT.format(run=run), highlight=False)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.ask_demo", description=__doc__)
    parser.add_argument("run", help="work directory of the demo")
    settle_platform()
    with command_line(parser.prog, argv):
        ask(parser.parse_args(argv).run, Console())


if __name__ == "__main__":
    main(sys.argv[1:])
