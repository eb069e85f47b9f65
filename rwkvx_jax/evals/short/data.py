"""The short-context sets as local files: one json object a line, with Hugging Face's field names.

`<data_dir>/<task>.jsonl` for each task, and `mmlu_dev.jsonl` for MMLU's examples. Every record is
checked when it is read. The prompts are in tasks/*.yaml, in lm_eval's own format.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rwkvx_jax.config import ConfigError
from rwkvx_jax.records import Record, parse

TASKS = (
    "lambada_openai",
    "hellaswag",
    "piqa",
    "arc_easy",
    "arc_challenge",
    "winogrande",
    "sciq",
    "mmlu",
)
"""In the order of the paper's table."""

FILES = {name: (f"{name}.jsonl",) for name in TASKS} | {"mmlu": ("mmlu.jsonl", "mmlu_dev.jsonl")}

_FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "lambada_openai": {"text": str},
    "hellaswag": {
        "activity_label": str,
        "ctx_a": str,
        "ctx_b": str,
        "endings": list,
        "label": (int, str),
    },
    "piqa": {"goal": str, "sol1": str, "sol2": str, "label": int},
    "arc_easy": {"question": str, "choices": dict, "answerKey": str},
    "arc_challenge": {"question": str, "choices": dict, "answerKey": str},
    "winogrande": {"sentence": str, "option1": str, "option2": str, "answer": str},
    "sciq": {
        "support": str,
        "question": str,
        "distractor1": str,
        "distractor2": str,
        "distractor3": str,
        "correct_answer": str,
    },
    "mmlu": {"question": str, "subject": str, "choices": list, "answer": int},
}


def check_files(data_dir: Path, tasks: tuple[str, ...]) -> None:
    """Raises ConfigError unless every file of these tasks is there; names all that are not."""
    if not data_dir.is_dir():
        raise ConfigError(f"--data-dir {data_dir} is no directory: {_remedy()}")
    missing = [
        f"{name} ({task}: {', '.join(_FIELDS[task])})"
        for task in tasks
        for name in FILES[task]
        if not (data_dir / name).is_file()
    ]
    if missing:
        raise ConfigError(f"{data_dir} lacks {'; '.join(missing)}: {_remedy()}")


def _remedy() -> str:
    return (
        "each file has one json object a line with these fields; `python -m rwkvx_jax.evals` makes "
        "them of other layouts (docs/evaluation.md)"
    )


def read_records(path: Path, task: str) -> list[Record]:
    """The checked records of a file.

    Raises:
      ConfigError: invalid json, a missing or wrong field (with file and line), or no record at all.
    """
    records = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            record = parse(line, f"{path}, line {number}")
            if problem := _problem(record, task):
                raise ConfigError(f"{path}, line {number}: {problem}")
            records.append(prepare(record, task))
    if not records:
        raise ConfigError(f"{path} is empty: it needs at least one record of {task}")
    return records


def _problem(record: Any, task: str) -> str:
    """Why a record is not one of the task; "" if it is."""
    fields = _FIELDS[task]
    if not isinstance(record, dict):
        return f"expected an object with {', '.join(fields)}"
    for field, kind in fields.items():
        if field not in record:
            return f'no field "{field}"; {task} needs {", ".join(fields)}'
        if not isinstance(record[field], kind) or isinstance(record[field], bool):
            return f'"{field}" is {record[field]!r}: wrong type for {task}'
    return _MORE[task](record) if task in _MORE else ""


def _hellaswag_problem(record: Record) -> str:
    if len(record["endings"]) != 4 or str(record["label"]) not in ("0", "1", "2", "3"):
        return "hellaswag needs 4 endings and a label from 0 to 3"
    return ""


def _arc_problem(record: Record) -> str:
    texts, labels = record["choices"].get("text"), record["choices"].get("label")
    if not texts or not labels or len(texts) != len(labels):
        return '"choices" needs "text" and "label", lists of one length'
    if record["answerKey"] not in labels:
        return f'"answerKey" {record["answerKey"]!r} is none of the labels {labels}'
    return ""


def _winogrande_problem(record: Record) -> str:
    if record["sentence"].count("_") < 1:
        return '"sentence" has no _ for the options'
    if record["answer"] not in ("1", "2"):
        return f'"answer" is {record["answer"]!r}: expected "1" or "2"'
    return ""


def _mmlu_problem(record: Record) -> str:
    if len(record["choices"]) != 4 or not 0 <= record["answer"] < 4:
        return "mmlu needs 4 choices and an answer from 0 to 3"
    return ""


_MORE: dict[str, Callable[[Record], str]] = {
    "hellaswag": _hellaswag_problem,
    "piqa": lambda r: "" if r["label"] in (0, 1) else '"label" must be 0 or 1',
    "arc_easy": _arc_problem,
    "arc_challenge": _arc_problem,
    "winogrande": _winogrande_problem,
    "mmlu": _mmlu_problem,
}


def prepare(record: Record, task: str) -> Record:
    """Adds the fields that two tasks' prompts are made of (lm_eval computes the same in Python)."""
    if task == "hellaswag":
        context = f"{record['ctx_a']} {record['ctx_b'].capitalize()}"
        return record | {
            "label": int(record["label"]),
            "query": clean_hellaswag(f"{record['activity_label']}: {context}"),
            "choices": [clean_hellaswag(ending) for ending in record["endings"]],
        }
    if task == "winogrande":
        before, after = record["sentence"].split("_", 1)
        return record | {
            "correct": int(record["answer"]) - 1,
            "ending": after.strip(),
            "contexts": [before + record["option1"], before + record["option2"]],
        }
    return record


def clean_hellaswag(text: str) -> str:
    """Takes out the marks that WikiHow left in HellaSwag, as lm_eval does."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")
