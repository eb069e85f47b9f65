"""A model of ours as lm-evaluation-harness takes one; imported only where lm_eval is installed.

Loglikelihoods are computed in batches of at most eight shapes, texts and generations through the
decode cache. Every answer is written to a file as soon as it is there, so that an interrupted
evaluation goes on. As in the RWKV-X repository every request is read behind a line break.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from rwkvx_jax.config import ConfigError
from rwkvx_jax.evals.batching import (
    Answers,
    Call,
    Packed,
    common_sizes,
    group_rows,
    pack,
    plan_calls,
)
from rwkvx_jax.evals.common import Subject
from rwkvx_jax.evals.reader import GreedyReader, affordable_batch
from rwkvx_jax.evals.scoring import TextScorer, read_lanes, score_places
from rwkvx_jax.model import abstract_model, with_params

# Tokens read at once. On a CPU activations should stay in cache: more of them were slower.
_BATCH_TOKENS = {"cpu": 512}
_DEFAULT_BATCH_TOKENS = 8192
_PIECE = 32  # tokens of a text that a step reads
_DEFAULT_ANSWER = 256  # tokens of a generation whose task sets no limit


class AnswerFile:
    """Answers by request, one json line each, appended as they come."""

    def __init__(self, path: Path):
        """Reads what is there; a last line cut off by a kill is dropped.

        Raises:
          ConfigError: a malformed line elsewhere (with its number).
        """
        self._path, self._answers = path, {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            return
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with path.open("r+b") as file:
                file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                key, answer = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{path}, line {number}: {error}; remove the file") from error
            self._answers[key] = answer

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Any:
        return self._answers[key]

    def add(self, answers: dict[str, Any]) -> None:
        """Keeps answers, on disk too."""
        self._answers |= answers
        with self._path.open("a") as file:
            file.writelines(json.dumps([key, value]) + "\n" for key, value in answers.items())
            file.flush()


def request_key(kind: str, *parts: Any) -> str:
    """Name of a request: a hash of all that it says."""
    return hashlib.blake2b(json.dumps([kind, *parts]).encode(), digest_size=12).hexdigest()


class HarnessModel(TemplateLM):
    """One subject.

    Attributes:
      requests: how many requests have been computed (not found in the file).
      compilations: shapes compiled for loglikelihoods.
    """

    def __init__(
        self,
        subject: Subject,
        answers: AnswerFile,
        *,
        piece: int,
        batch: int | None = None,
        start: Callable[[str, int], Callable[[int], None]] = lambda what, total: lambda n: None,
    ):
        """
        Args:
          subject: the model.
          answers: of this very model.
          piece: tokens of a long text read at once.
          batch: rows of a batch; None: as many as read 8192 tokens, on a CPU 2048.
          start: (what, tokens in all) -> a function that is told of tokens as they are read.
        """
        super().__init__()
        self._subject, self._answers, self._piece = subject, answers, piece
        self._height, self._start = batch, start
        self._tokens = _BATCH_TOKENS.get(jax.default_backend(), _DEFAULT_BATCH_TOKENS)
        self._line_break = [int(token) for token in subject.tokenizer.encode("\n")]
        self._model = abstract_model(subject.config, subject.run)
        self._params = jax.device_put(subject.params)
        self._score = jax.jit(self._score_call, static_argnames="rows")
        self.requests = 0

    def use(self, answers: AnswerFile) -> None:
        """Keeps answers in another file from now on."""
        self._answers = answers

    @property
    def compilations(self) -> int:
        return self._score._cache_size()

    @property
    def eot_token_id(self) -> int:
        return self._subject.tokenizer.end_of_document

    @property
    def prefix_token_id(self) -> int:
        """Read in place of an empty context."""
        return self._line_break[-1]

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        return self._subject.tokenizer.encode(string).tolist()

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Logarithm of each continuation's probability, and whether it is the greedy one."""
        keys = [request_key("loglikelihood", *texts) for texts, _, _ in requests]
        pending = {}
        for key, (texts, context, continuation) in zip(keys, requests, strict=True):
            if key not in self._answers:
                continuation = continuation or self.tok_encode(texts[1])
                pending[key] = (self._behind_line_break(context), continuation)
        if pending:
            self._compute(pending)
        return [tuple(self._answers[key]) for key in keys]

    def _behind_line_break(self, context: list[int]) -> list[int]:
        return context if context == self._line_break else self._line_break + context

    def _compute(self, pending: dict[str, tuple[list[int], list[int]]]) -> None:
        names = list(pending)
        groups = group_rows(list(pending.values()))
        longest = max(len(row.inputs) for group in groups for row in group.rows)
        lanes = self._height or affordable_batch(self._subject, longest, _PIECE, self._tokens)
        calls = plan_calls(groups, lanes, _PIECE)
        sizes = common_sizes(calls, lanes, _PIECE)
        advance = self._start("loglikelihoods", sum(self._tokens_of(call) for call in calls))
        running: list[tuple[int, Answers, tuple[jax.Array, jax.Array]]] = []
        # While the device reads a call, the next one is packed.
        for call in [*calls, None]:
            if call is not None:
                packed, asked = pack(call, sizes)
                scores = self._score(self._params, packed, rows=longest)
                running.append((self._tokens_of(call), asked, scores))
            if len(running) == 2 or call is None:
                count, asked, scores = running.pop(0)
                answers = _answers(asked, *map(np.asarray, scores))
                self._answers.add({names[number]: answer for number, answer in answers.items()})
                self.requests += len(answers)
                advance(count)

    def _tokens_of(self, call: Call) -> int:
        return sum(len(text) for lane in call for group in lane for text in group.texts())

    def _score_call(self, params, packed: Packed, *, rows: int) -> tuple[jax.Array, jax.Array]:
        """Log-probabilities and greediness of all targets; see `Packed`."""
        model = with_params(self._model, params)
        features = read_lanes(model, packed, rows)
        return score_places(model, features, packed.places, packed.targets, packed.place_count)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Log-probability of whole texts, each read to its end, however long."""
        texts = [request.args[0] for request in requests]
        keys = [request_key("rolling", text) for text in texts]
        pending = {k: t for k, t in zip(keys, texts, strict=True) if k not in self._answers}
        rows = {
            k: np.asarray(self._line_break + self.tok_encode(t), np.int32)
            for k, t in pending.items()
        }
        for key in [k for k, row in rows.items() if len(row) < 2]:
            del rows[key]
            self._answers.add({key: 0.0})
        if rows:
            order = sorted(rows, key=lambda key: len(rows[key]))
            advance = self._start("whole texts", sum(len(row) - 1 for row in rows.values()))
            longest = len(rows[order[-1]]) - 1
            piece = min(self._piece, longest)
            height = min(len(order), self._height or max(1, self._tokens // piece))
            scorer = TextScorer(self._subject, piece=piece, batch=height, longest=longest)
            for i in range(0, len(order), height):
                chosen = order[i : i + height]
                losses = scorer([rows[key] for key in chosen], advance)
                sums = (-float(loss.astype(np.float64).sum()) for loss in losses)
                self._answers.add(dict(zip(chosen, sums, strict=True)))
                self.requests += len(chosen)
        return [self._answers[key] for key in keys]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Greedy continuations up to a stop string, a line's number of tokens or the text's end.

        Raises:
          ConfigError: a task that wants random sampling.
        """
        keys = [request_key("generate", *request.args) for request in requests]
        groups: dict[tuple, dict[str, np.ndarray]] = {}
        for key, request in zip(keys, requests, strict=True):
            if key not in self._answers:
                context, options = request.args
                row = self._behind_line_break(self.tok_encode(context))
                groups.setdefault(_stopping(options), {})[key] = np.asarray(row, np.int32)
        total = sum(len(row) for group in groups.values() for row in group.values())
        advance = self._start("generations", total)
        for (count, *stops), group in groups.items():
            self._generate(group, count, stops, advance)
        return [self._answers[key] for key in keys]

    def _generate(self, rows: dict[str, np.ndarray], count: int, stops: list[str], advance) -> None:
        order = sorted(rows, key=lambda key: len(rows[key]))
        longest = len(rows[order[-1]])
        piece = min(self._piece, longest)
        height = min(len(order), self._height or max(1, self._tokens // piece))
        reader = GreedyReader(self._subject, piece=piece, batch=height, longest=longest)
        ended = lambda answer: self._cut(answer, stops)[1]
        for i in range(0, len(order), height):
            chosen = order[i : i + height]
            answers = reader([rows[key] for key in chosen], count, advance, ended)
            texts = (self._cut(answer, stops)[0] for answer in answers)
            self._answers.add(dict(zip(chosen, texts, strict=True)))
            self.requests += len(chosen)

    def _cut(self, answer: np.ndarray, stops: Sequence[str]) -> tuple[str, bool]:
        """Text of an answer up to its end or the first stop string, and whether either occurred."""
        ends = np.flatnonzero(answer == self.eot_token_id)
        text = self._subject.tokenizer.decode(answer[: ends[0]] if len(ends) else answer)
        places = [place for stop in stops if (place := text.find(stop)) >= 0]
        return (text[: min(places)] if places else text), bool(len(ends) or places)


def _answers(asked: Answers, logs: np.ndarray, hits: np.ndarray) -> dict[int, tuple[float, bool]]:
    """(logarithm of the probability, whether it is the greedy one) of every continuation."""
    logs = np.add.reduceat(logs.reshape(-1)[asked.indices].astype(np.float64), asked.begins)
    hits = np.logical_and.reduceat(hits.reshape(-1)[asked.indices], asked.begins)
    return dict(zip(asked.requests, zip(logs.tolist(), hits.tolist(), strict=True), strict=True))


def _stopping(options: dict[str, Any]) -> tuple:
    """(most tokens, stop strings...) of a task's generation settings."""
    if options.get("do_sample") and options.get("temperature", 1.0) != 0:
        raise ConfigError(f"a task wants random sampling ({options}): only greedy answers are made")
    until = options.get("until") or []
    until = [until] if isinstance(until, str) else until
    count = options.get("max_gen_toks", options.get("max_new_tokens", _DEFAULT_ANSWER))
    return int(count), *(stop for stop in until if stop)
