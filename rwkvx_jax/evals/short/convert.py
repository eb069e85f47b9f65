"""Makes the files of `eval.py short --data-dir` of other layouts; the command is `__main__.py`."""

from __future__ import annotations

import bz2
import csv
import io
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from rwkvx_jax.config import ConfigError
from rwkvx_jax.evals.short.data import read_records
from rwkvx_jax.records import Record, as_text, parse
from rwkvx_jax.storage import WorkPath, new_file

# A sentence that goes on in lower case where ActivityNet's second part begins.
_SECOND_PART = re.compile(r"(?<=[.!?]) (?=[a-z][^.!?]*$)")


@dataclass(frozen=True)
class Options:
    """Makes the files of `eval.py short --data-dir` of other layouts."""

    output: Annotated[WorkPath, tyro.conf.Positional]
    """Folder of the new files."""
    icl: Path | None = None
    """Folder of MosaicML ICL files: those of lambada_openai, piqa, arc_easy, arc_challenge and
    winogrande (.jsonl) that are there."""
    hellaswag: Path | None = None
    """HellaSwag as text, six lines a task; .bz2 or plain."""
    mmlu: Path | None = None
    """Folder of MMLU's CSV files: test/SUBJECT_test.csv and dev/SUBJECT_dev.csv."""


def convert(options: Options) -> dict[str, int]:
    """Writes what the sources hold; returns the number of records of each task.

    Raises:
      ConfigError: no source, a source without any known file, or a malformed line.
    """
    if options.icl is None and options.hellaswag is None and options.mmlu is None:
        raise ConfigError("name a source: --icl DIR, --hellaswag FILE or --mmlu DIR")
    written = {}
    if options.icl is not None:
        found = {
            t: options.icl / f"{t}.jsonl" for t in _ICL if (options.icl / f"{t}.jsonl").is_file()
        }
        if not found:
            raise ConfigError(f"--icl {options.icl} holds none of {', '.join(_ICL)} (.jsonl)")
        for task, path in found.items():
            written[task] = _write(options.output, task, _icl_records(path, _ICL[task]))
    if options.hellaswag is not None:
        records = hellaswag_records(options.hellaswag)
        written["hellaswag"] = _write(options.output, "hellaswag", records)
    if options.mmlu is not None:
        splits = {name: mmlu_records(options.mmlu, name) for name in ("test", "dev")}
        _write(options.output, "mmlu", splits["dev"], "mmlu_dev")
        written["mmlu"] = _write(options.output, "mmlu", splits["test"])
    return written


def _icl_records(path: Path, make: Callable[[Record], Record]) -> list[Record]:
    records = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            record = parse(line, f"{path}, line {number}")
            try:
                records.append(make(record))
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise ConfigError(
                    f"{path}, line {number}: no MosaicML ICL record ({error!r})"
                ) from error
    return records


def _question(record: Record) -> str:
    return record["query"].removeprefix("Question: ").rstrip("\n")


def _lambada(record: Record) -> Record:
    return {"text": f"{record['context']} {record['continuation']}"}


def _piqa(record: Record) -> Record:
    first, second = record["choices"]
    return {
        "goal": _question(record),
        "sol1": first,
        "sol2": second,
        "label": int(record["gold"]),
    }


def _arc(record: Record) -> Record:
    labels = [chr(ord("A") + i) for i in range(len(record["choices"]))]
    return {
        "question": _question(record),
        "choices": {"text": record["choices"], "label": labels},
        "answerKey": labels[record["gold"]],
    }


def _winogrande(record: Record) -> Record:
    """The options are what differs at the end of the two contexts, from a word's beginning on."""
    first, second = record["context_options"]
    common = os.path.commonprefix([first, second])
    start = common.rfind(" ") + 1
    return {
        "sentence": f"{first[:start]}_ {record['continuation']}",
        "option1": first[start:],
        "option2": second[start:],
        "answer": str(int(record["gold"]) + 1),
    }


_ICL: dict[str, Callable[[Record], Record]] = {
    "lambada_openai": _lambada,
    "piqa": _piqa,
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "winogrande": _winogrande,
}


def hellaswag_records(path: Path) -> list[Record]:
    """Records of the text layout: "label: context", number of the right ending, four endings.

    The layout joins the two parts of a context. They are parted again where a last sentence begins
    in lower case, which is how ActivityNet's second parts begin; WikiHow's are one part.

    Raises:
      ConfigError: no such file, a number of lines that six does not divide, or a malformed task
        (with file and line).
    """
    if not path.is_file():
        raise ConfigError(f"--hellaswag {path}: no such file")
    try:
        data = bz2.decompress(path.read_bytes()) if path.suffix == ".bz2" else path.read_bytes()
        lines = data.decode("utf-8-sig").removesuffix("\n").split("\n")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is no text, or a damaged .bz2 ({error})") from error
    if len(lines) % 6:
        raise ConfigError(f"{path} has {len(lines)} lines: expected six for each task")
    records = []
    for start in range(0, len(lines), 6):
        head, label, *endings = lines[start : start + 6]
        activity, separator, context = head.partition(": ")
        if not separator or label.strip() not in ("0", "1", "2", "3"):
            raise ConfigError(
                f'{path}, line {start + 1}: expected "label: context" and a number from 0 to 3 '
                "below it"
            )
        parts = _SECOND_PART.split(context.strip(), maxsplit=1)
        records.append(
            {
                "activity_label": activity,
                "ctx_a": parts[0],
                "ctx_b": parts[1] if len(parts) > 1 else "",
                "endings": endings,
                "label": int(label),
            }
        )
    return records


def mmlu_records(folder: Path, split: str) -> list[Record]:
    """Records of the CSV layout: a question, four choices and a letter a row, a file a subject.

    Raises:
      ConfigError: no such files, or a malformed row (with file and line).
    """
    files = sorted((folder / split).glob(f"*_{split}.csv"))
    if not files:
        raise ConfigError(f"--mmlu {folder}: no file {split}/SUBJECT_{split}.csv there")
    records = []
    for file in files:
        subject = file.name.removesuffix(f"_{split}.csv")
        try:
            rows = csv.reader(io.StringIO(file.read_text("utf-8-sig"), newline=""), strict=True)
            for row in rows:
                if len(row) != 6 or row[5] not in tuple("ABCD"):
                    raise ValueError("expected a question, four choices, and a letter from A to D")
                question, *choices, letter = row
                answer = "ABCD".index(letter)
                record = {"question": question, "subject": subject, "choices": choices}
                records.append(record | {"answer": answer})
        except (ValueError, csv.Error) as error:  # UnicodeDecodeError is a ValueError
            line = "" if isinstance(error, UnicodeError) else f", line {rows.line_num}"
            raise ConfigError(f"{file}{line}: no row of MMLU ({error})") from error
    return records


def _write(folder: Path, task: str, records: list[Record], name: str = "") -> int:
    """Writes a file in one step, and reads it back through its checks."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name or task}.jsonl"
    with new_file(path) as file:
        file.writelines(f"{as_text(record)}\n".encode() for record in records)
        file.flush()
        read_records(Path(file.name), task)
    return len(records)
