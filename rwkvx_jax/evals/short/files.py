"""lm_eval's own results of a run, in its layout: OUTPUT/MODEL/results_TIME.json and samples.

lm_eval's writer hides what goes wrong, and knows no buckets; the contents are the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from rwkvx_jax.config import ConfigError
from rwkvx_jax.records import Record
from rwkvx_jax.storage import files_below, make_folder, write_whole


def folder_of(output: Path, checkpoint: str) -> Path:
    """Where lm_eval keeps results of a model."""
    from lm_eval.utils import sanitize_model_name

    return output / sanitize_model_name(checkpoint)


def write_results(output: Path, results: Record, general: Any, log_samples: bool) -> None:
    """Writes what `simple_evaluate` returned.

    Args:
      output: folder of all models.
      results: with samples.
      general: lm_eval's GeneralConfigTracker of the run.
      log_samples: whether these are written too, one file a task.
    """
    from lm_eval.utils import hash_string

    general.log_end_time()
    general.model_source = results["config"]["model"] = "rwkvx"
    samples = results["samples"] if log_samples else {}
    hashes = {
        task: hash_string("".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in own))
        for task, own in samples.items()
    }
    shown = {name: value for name, value in results.items() if name != "samples"}
    shown |= {"task_hashes": hashes} | asdict(general)
    folder, time = output / general.model_name_sanitized, datetime.now().isoformat()
    time = time.replace(":", "-")
    make_folder(folder)
    _write(folder / f"results_{time}.json", [_text(shown, indent=2)])
    for task, own in samples.items():
        lines = [f"{_text(_sample(sample))}\n" for sample in own]
        _write(folder / f"samples_{task}_{time}.jsonl", lines)


def check_samples(output: Path, checkpoint: str, tasks: Iterable[str]) -> None:
    """Raises ConfigError where a task has no samples: an earlier run finished it without."""
    names = [file.name for file in files_below(folder_of(output, checkpoint), ".jsonl")]
    lacking = [t for t in tasks if not any(n.startswith(f"samples_{t}_2") for n in names)]
    if lacking:
        raise ConfigError(
            f"--log-samples: an earlier command has finished {', '.join(lacking)} of {checkpoint} "
            "without it; remove "
            f"{output / 'short.jsonl'} and start again (answers are kept, nothing is computed "
            "twice), or use another --output"
        )


def _sample(sample: Record) -> Record:
    """A sample with arguments by name and all answers as text, so that any reader takes it."""
    from lm_eval.utils import sanitize_list

    arguments = {
        f"gen_args_{i}": {f"arg_{j}": value for j, value in enumerate(own)}
        for i, own in enumerate(sample["arguments"])
    }
    texts = {name: sanitize_list(sample[name]) for name in ("resps", "filtered_resps")}
    return sample | texts | {"arguments": arguments, "target": str(sample["target"])}


def _text(value: Any, indent: int | None = None) -> str:
    from lm_eval.utils import handle_non_serializable

    return json.dumps(value, indent=indent, default=handle_non_serializable, ensure_ascii=False)


def _write(path: Path, parts: list[str]) -> None:
    write_whole(path, "".join(parts).encode(errors="backslashreplace"))
