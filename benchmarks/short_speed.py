"""How fast `eval.py short` answers, beside reading each request by itself, on real sets.

    python benchmarks/short_speed.py DATA_DIR [--limit 200] [--tasks piqa ...] [--tokenizer byte]

An untrained model of `ModelConfig.tiny()`. Both sides in one process, in turn, each with its shapes
compiled; the fastest of three rounds. "One by one" is a forward pass a request, padded to one of
eight sizes, with logits only where its continuation is predicted.
"""

import argparse
import dataclasses
import logging
import os
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from lm_eval.api.instance import Instance

from rwkvx_jax.config import ModelConfig, RunConfig
from rwkvx_jax.evals.models import EvalModel
from rwkvx_jax.evals.short.answers import AnswerFile
from rwkvx_jax.evals.short.harness import HarnessModel
from rwkvx_jax.evals.short.task import ShortOptions, load_tasks
from rwkvx_jax.generate.scoring import score_places
from rwkvx_jax.model import abstract_model, create_model, get_params, with_params
from rwkvx_jax.tokenizer import load_tokenizer

ROUNDS = 3


def one_by_one(tested: EvalModel, requests: list[tuple[list[int], list[int]]]):
    """A function that answers all requests, each by a forward pass of its own."""
    model, params = abstract_model(tested.config, tested.run), jax.device_put(tested.params)
    lengths = [len(context) + len(continuation) - 1 for context, continuation in requests]
    classes = np.unique(np.ceil(np.quantile(lengths, np.linspace(0.125, 1, 8)))).astype(int)
    most = max(len(continuation) for _, continuation in requests)

    @jax.jit
    def score(params, tokens, places, targets, count):
        bound = with_params(model, params)
        return score_places(bound, bound.features(tokens)[0], places, targets, count)

    def run() -> list[float]:
        answers = []
        for (context, continuation), length in zip(requests, lengths, strict=True):
            tokens = np.zeros((1, classes[np.searchsorted(classes, length)]), np.int32)
            tokens[0, :length] = [*context, *continuation[:-1]]
            count = len(continuation)
            places, targets = np.zeros(most, np.int32), np.zeros((most, 1), np.int32)
            places[:count] = np.arange(length - count, length)
            targets[:count, 0] = continuation
            logs, _ = score(params, tokens, places, targets, np.int32(count))
            answers.append(float(np.asarray(logs, np.float64)[:count].sum()))
        return answers

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--limit", type=int, default=200, help="documents of each task")
    tasks = ("lambada_openai", "piqa", "arc_easy", "arc_challenge", "winogrande", "hellaswag")
    parser.add_argument("--tasks", nargs="+", default=tasks)
    parser.add_argument("--tokenizer", default="byte")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    os.environ["TQDM_DISABLE"] = "1"
    tokenizer = load_tokenizer(args.tokenizer)
    config = dataclasses.replace(ModelConfig.tiny(), vocab_size=tokenizer.vocab_size)
    run = RunConfig(compute_dtype="float32")
    params = jax.device_get(get_params(create_model(config, run)))
    tested = EvalModel("tiny", config, run, params, tokenizer, "", None, None)
    options = ShortOptions(
        checkpoint=(Path("-"),), output=Path("-"), data_dir=args.data_dir, tasks=tuple(args.tasks)
    )
    found = {}
    for name, task in load_tasks(options).tasks.items():
        task.build_all_requests(limit=args.limit, rank=0, world_size=1)
        found[name] = [instance.args for instance in task.instances]
    if len(found) > 1:
        found["all"] = [request for own in found.values() for request in own]
    with tempfile.TemporaryDirectory() as folder:
        for name, texts in found.items():
            compare(tested, name, texts, Path(folder) / name)


def compare(tested: EvalModel, name: str, texts: list[tuple[str, str]], folder: Path) -> None:
    """Prints a line: seconds and requests a second of both ways, and how far they differ."""
    encode = tested.tokenizer.encode
    requests = []
    for context, continuation in texts:
        head = encode("\n" + context).tolist()
        requests.append((head, encode("\n" + context + continuation).tolist()[len(head) :]))
    instances = [Instance("loglikelihood", {}, text, i) for i, text in enumerate(texts)]
    answers = AnswerFile(folder / "warm")
    model = HarnessModel(tested, answers, prefill_chunk=2048)
    alone = one_by_one(tested, requests)
    expected, found = alone(), [value for value, _ in model.loglikelihood(instances)]
    seconds = [np.inf, np.inf]
    for i in range(ROUNDS):
        model.use(AnswerFile(folder / str(i)))
        for side, answer in enumerate((alone, lambda: model.loglikelihood(instances))):
            begin = time.perf_counter()
            answer()
            seconds[side] = min(seconds[side], time.perf_counter() - begin)
    print(
        f"{name}: {len(requests)} requests, {sum(len(a) + len(b) - 1 for a, b in requests)} tokens;"
        f" one by one {seconds[0]:.2f} s, eval.py short {seconds[1]:.2f} s "
        f"({model.compilations} shapes): {seconds[0] / seconds[1]:.2f} times as fast; largest "
        f"difference {np.abs(np.subtract(expected, found)).max():.1e}",
        flush=True,
    )


if __name__ == "__main__":
    main()
