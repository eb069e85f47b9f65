"""The end of `make demo`: three of its questions with their answers, and what to try next.

python -m tools.show_demo runs/demo
"""

import argparse
import sys

from rich.console import Console
from rich.table import Table

from rwkvx_jax.cli import command_line
from rwkvx_jax.config import ConfigError
from rwkvx_jax.evals.grid import Trial
from rwkvx_jax.evals.results import read_contents
from rwkvx_jax.evals.tasks.niah import NiahOptions, question_of
from rwkvx_jax.storage import WorkPath, work_path
from rwkvx_jax.tokenizer import load_tokenizer

TASK = "recall_64"
NEXT = """Next (the commands are in .venv/bin):
  rwkvx generate --checkpoint {run} --prompt "The "
  rwkvx eval passkey --checkpoint {run} --output out            (other tasks: rwkvx eval --help)
  rwkvx train --config recall_64k --data.path 'books/*.txt'     (the same for 65,536 bytes)
  rwkvx plan --config rwkvx_3b6_stage2:v5p128 --topology v5p:4x4x8   (a pod; after make venv)
The figure is {figure}."""


def show(run: WorkPath, console: Console) -> None:
    """Prints a question of the first, middle and last depth at the shortest length.

    Raises:
      ConfigError: the demo's evaluation is not there, or not finished.
    """
    path = run / "eval" / f"niah_{TASK}.jsonl"
    contents = read_contents(path) if path.is_file() else None
    if contents is None or not all(contents.keys(label) for label in contents.models):
        raise ConfigError(f"{path} holds no finished evaluation: run make demo")
    header, tokenizer = contents.headers[-1], load_tokenizer("byte")
    seed = header["settings"]["seed"]
    options = NiahOptions(checkpoint=(run,), output=run / "eval", tasks=(TASK,), seed=seed)
    length, depths = header["plan"]["lengths"][0], header["plan"]["depths"]
    trials = [
        Trial(length, depth, 0) for depth in (depths[0], depths[len(depths) // 2], depths[-1])
    ]
    table = Table("question", "right", *contents.models, title=f"64 numbers in {length:,} bytes")
    answers = {
        label: {trial["depth"]: trial["answer"] for trial in contents.trials(label)
                if (trial["length"], trial["trial"]) == (length, 0)}
        for label in contents.models
    }  # fmt: skip
    for trial in trials:
        question = question_of(options, TASK, None, tokenizer, trial)
        asked = tokenizer.decode(question.prompt).splitlines()[-2]
        row = (answers[label][trial.depth] for label in contents.models)
        table.add_row(asked, *question.answers, *row)
    console.print(table)
    console.print(NEXT.format(run=run, figure=path.with_suffix(".png")), soft_wrap=True)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.show_demo", description=__doc__)
    parser.add_argument("run", help="work directory of the demo")
    with command_line(parser.prog, argv):
        show(work_path(parser.parse_args(argv).run), Console(highlight=False, markup=False))


if __name__ == "__main__":
    main(sys.argv[1:])
