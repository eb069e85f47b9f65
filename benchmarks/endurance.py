"""Many requests of mixed length through one engine: none lost, none mixed up, memory flat.

    python -m benchmarks.endurance --requests 10000

A tiny model, sampled with penalties, four rows, a held prefix, prompts from one token to a full
cache, stop tokens, limits, cancellations, and texts that are scored. Each answer has to be what its
request gets alone; after the first requests, the number and bytes of live arrays must not grow.
Prints what was done. Exits with status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator

import jax
import numpy as np

from rwkvx_jax.generate.requests import Answer, Request
from tests.generate.engine_cases import LONGEST, make_engine

PREFIX, DIFFERENT = (3, 1, 4, 1, 5, 9, 2), 100
_WARM = 0.1  # share of the requests after which memory must not grow


def different_requests() -> list[Request]:
    """Those of which all others are repetitions."""
    rng = np.random.default_rng(0)
    requests = []
    for number in range(DIFFERENT):
        prompt = rng.integers(1, 40, rng.integers(2, LONGEST - len(PREFIX) + 1)).tolist()
        stop = tuple(map(int, rng.integers(0, 40, rng.integers(0, 3))))
        request = Request(prompt, int(rng.integers(0, 20)), stop, seed=number)
        scored = dataclasses.replace(request, max_tokens=0, score=True)
        requests.append(scored if number % 10 == 0 else request)
    return requests


def cancelled(number: int, count: int) -> bool:
    """Whether a request is given up after so many tokens."""
    return number % 7 == 0 and count == 3


def alone(requests: list[Request]) -> list[Answer]:
    """What each gets from an engine of one row that reads prefix and prompt itself."""
    engine, found = make_engine(1), []
    for request in requests:
        if request.score:
            engine.hold(PREFIX)  # scores are those behind it
            found += engine.answer([request])
            continue
        engine.hold(())
        found += engine.answer([dataclasses.replace(request, prompt=[*PREFIX, *request.prompt])])
    return found


def same(number: int, answer: Answer, expected: Answer) -> bool:
    """Whether an answer is that of the request alone, as far as it was let."""
    if answer.problem or expected.problem:
        return answer.problem == expected.problem
    if expected.scores is not None:
        pairs = zip(answer.scores, expected.scores, strict=True)
        return all(np.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in pairs)
    tokens = expected.tokens[: 3 if number % 7 == 0 else None]
    return np.array_equal(answer.tokens, tokens)


def live() -> tuple[int, int]:
    """Number and bytes of all arrays of this process."""
    arrays = jax.live_arrays()
    return len(arrays), sum(array.nbytes for array in arrays)


@dataclasses.dataclass
class Endured:
    """What became of the requests."""

    answered: int
    lost: int
    wrong: int
    arrays: set[tuple[int, int]]  # numbers and bytes seen after the warm-up
    seconds: float

    @property
    def well(self) -> bool:
        return not self.lost and not self.wrong and len(self.arrays) == 1


def endure(count: int) -> Endured:
    """Sends so many requests through an engine of four rows."""
    different = different_requests()
    expected, engine = alone(different), make_engine(4)
    engine.hold(PREFIX)

    def requests() -> Iterator[Request]:
        for number in range(count):
            yield different[number % DIFFERENT]

    seen, wrong, arrays = np.zeros(count, int), 0, set()
    begin = time.perf_counter()
    ended = lambda number, tokens: cancelled(number, len(tokens))
    for done, answer in enumerate(engine.answer(requests(), ended=ended)):
        seen[answer.number] += 1
        wrong += not same(answer.number, answer, expected[answer.number % DIFFERENT])
        if done >= _WARM * count and done % 50 == 0:
            arrays.add(live())
    seconds = time.perf_counter() - begin
    return Endured(int(seen.sum()), int((seen != 1).sum()), wrong, arrays, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    options = parser.parse_args()
    if options.requests < 1:
        parser.error(f"--requests is {options.requests}: it must be at least 1")
    found = endure(options.requests)
    print(
        f"{found.answered:,} answers to {options.requests:,} requests in {found.seconds:.1f} s: "
        f"{found.lost} lost or doubled, {found.wrong} not as alone; live arrays and their bytes "
        f"after the warm-up: {sorted(found.arrays)}"
    )
    sys.exit(not found.well)


if __name__ == "__main__":
    main()
