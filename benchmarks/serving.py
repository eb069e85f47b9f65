"""Requests of mixed length: continuous batching, one after the other, and fixed batches.

    python benchmarks/serving.py
    python benchmarks/serving.py --requests 32 --rows 8 --width 256 --repeats 3

Lengths of prompts and answers are drawn evenly on a logarithmic scale. All ways run in one process,
in turn, after one round for the compilations; times are the shortest of the rounds. A fixed batch
takes the next requests as they come, reads all its prompts in chunks of one length, padded to the
longest, and ends with its longest answer. Every way has to give the same tokens.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import numpy as np

from rwkvx_jax.config import ModelConfig, RunConfig
from rwkvx_jax.generate.chunks import prefill_chunks
from rwkvx_jax.generate.engine import Engine
from rwkvx_jax.generate.requests import Request
from rwkvx_jax.generate.rows import Rows
from rwkvx_jax.generate.sampling import Sampling
from rwkvx_jax.model import RWKVX, create_model

Answers = list[np.ndarray]


def draw_requests(options: argparse.Namespace) -> list[Request]:
    rng = np.random.default_rng(options.seed)
    draw = lambda longest: int(np.exp(rng.uniform(np.log(8), np.log(longest))))
    return [
        Request(rng.integers(1, 256, draw(options.prompt)), draw(options.answer), stop=())
        for _ in range(options.requests)
    ]


def through(engine: Engine) -> Callable[[Sequence[Request]], Answers]:
    """All requests through an engine: continuous batching, or one by one if it has one row."""

    def run(requests: Sequence[Request]) -> Answers:
        found = {answer.number: answer.tokens for answer in engine.answer(requests)}
        return [found[i] for i in range(len(requests))]

    return run


def in_batches(model: RWKVX, batch: int, longest: int, piece: int):
    """As many requests at once as there are rows, the next ones when all have ended."""
    rows = Rows(model, batch, longest, piece, Sampling(), None)

    def run(requests: Sequence[Request]) -> Answers:
        answers: Answers = []
        for first in range(0, len(requests), batch):
            some = requests[first : first + batch]
            rows.restart(np.ones(batch, bool), np.zeros(batch, np.uint32))
            padding = [np.zeros(0, np.int32)] * (batch - len(some))
            for tokens, counts in prefill_chunks([*(r.prompt for r in some), *padding], piece):
                logits, rows.cache, _ = rows.programs.read(
                    rows.params, rows.progress.logits, rows.cache, tokens, counts, None, None
                )
                rows.progress = rows.progress._replace(logits=logits)
            left = np.asarray([r.max_tokens for r in some] + [0] * len(padding))
            steps = []
            for i in range(max(left)):
                steps.append(rows.next_tokens(left > i))
            answers += [np.stack(steps)[: r.max_tokens, row] for row, r in enumerate(some)]
        return answers

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--rows", type=int, default=8, help="texts side by side")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of the longest prompt")
    parser.add_argument("--answer", type=int, default=256, help="tokens of the longest answer")
    parser.add_argument("--piece", type=int, default=256, help="most prompt tokens read at once")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=4, help="recurrent blocks, beside 2")
    parser.add_argument("--repeats", type=int, default=3, help="rounds, beside one of warm-up")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    config = ModelConfig(
        vocab_size=256,
        num_blocks=options.blocks,
        num_attention_blocks=2,
        width=options.width,
        head_size=64,
        chunk_size=64,
        top_k=4,
    )
    model = create_model(config, RunConfig(compute_dtype="float32"))
    requests, longest = draw_requests(options), options.prompt + options.answer
    engine = lambda batch: Engine(model, max_length=longest, batch=batch, piece=options.piece)
    ways = {
        "continuous batching": through(engine(options.rows)),
        "one after the other": through(engine(1)),
        "fixed batches": in_batches(model, options.rows, longest, options.piece),
    }
    report(requests, ways, options.repeats)


def report(requests: Sequence[Request], ways: dict[str, Callable], repeats: int) -> None:
    """Prints a line for each way: seconds, tokens a second, and how they compare."""
    seconds = {name: np.inf for name in ways}
    for turn in range(repeats + 1):
        answers = {}
        for name, run in ways.items():
            begin = time.perf_counter()
            answers[name] = run(requests)
            if turn:
                seconds[name] = min(seconds[name], time.perf_counter() - begin)
    first = answers["continuous batching"]
    for name, found in answers.items():
        other = sum(not np.array_equal(a, b) for a, b in zip(first, found, strict=True))
        if other:
            raise SystemExit(f"{name}: {other} of {len(first)} answers differ")
    read, said = (sum(len(x) for x in xs) for xs in ([r.prompt for r in requests], first))
    print(f"{len(requests)} requests, {read:,} tokens of prompts, {said:,} of answers")
    for name, took in seconds.items():
        print(
            f"{name}: {took:.2f} s, {said / took:,.0f} generated tokens/s; continuous batching is "
            f"{took / seconds['continuous batching']:.2f} times as fast"
        )


if __name__ == "__main__":
    main()
