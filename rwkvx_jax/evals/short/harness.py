"""A model of ours as lm-evaluation-harness takes one; imported only where lm_eval is installed.

Loglikelihoods are computed in batches of at most eight shapes, texts and generations through the
decode cache. Every answer is written to a file as soon as it is there, so that an interrupted
evaluation goes on. As in the RWKV-X repository every request is read behind a line break.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from rwkvx_jax.config import ConfigError
from rwkvx_jax.data.chat import TEMPLATE_TEXT, TURN_END, chat_text
from rwkvx_jax.evals.models import EvalModel
from rwkvx_jax.evals.readers import GreedyReader, TextScorer, affordable_batch
from rwkvx_jax.evals.short.answers import Answers, Refused, request_key
from rwkvx_jax.evals.short.batching import (
    Asked,
    Call,
    Packed,
    common_sizes,
    group_rows,
    pack,
    plan_calls,
)
from rwkvx_jax.generate.scoring import score_places
from rwkvx_jax.model import RWKVX, with_params
from rwkvx_jax.sharding import even_rows, whole
from rwkvx_jax.snapshots import choose, rewind, snapshot

# Tokens read at once. On a CPU activations should stay in cache: more of them were slower.
_BATCH_TOKENS = {"cpu": 512}
_DEFAULT_BATCH_TOKENS = 8192
_STEP_TOKENS = 32  # tokens of a text that a step reads
_DEFAULT_ANSWER = 256  # tokens of a generation whose task sets no limit
_ASKED = "Assistant: "  # how a chat ends that asks for an answer


class HarnessModel(TemplateLM):
    """One model under test.

    Attributes:
      requests: how many requests have been computed (not found in the file).
      compilations: shapes compiled for loglikelihoods.
    """

    def __init__(
        self,
        model: EvalModel,
        answers: Answers,
        *,
        prefill_chunk: int,
        batch: int | None = None,
        start: Callable[[str, int], Callable[[int], None]] = lambda what, total: lambda n: None,
    ):
        """
        Args:
          model: that answers.
          answers: of this very model.
          prefill_chunk: tokens of a long text read at once.
          batch: rows of a batch; None: as many as read 8192 tokens, on a CPU 2048.
          start: (what, tokens in all) -> a function that is told of tokens as they are read.
        """
        super().__init__()
        self._tested, self._answers, self._chunk = model, answers, prefill_chunk
        self._height, self._start = batch, start
        self._tokens = _BATCH_TOKENS.get(jax.default_backend(), _DEFAULT_BATCH_TOKENS)
        self._line_break = [int(token) for token in model.tokenizer.encode("\n")]
        self._model, self._params = model.abstract, model.placed()
        self._score = jax.jit(self._score_call, static_argnames="rows")
        self.requests = 0

    def use(self, answers: Answers) -> None:
        """Keeps answers in another file from now on."""
        self._answers = answers

    @property
    def compilations(self) -> int:
        return self._score._cache_size()

    @property
    def eot_token_id(self) -> int:
        return self._tested.tokenizer.end_of_document

    @property
    def prefix_token_id(self) -> int:
        """Read in place of an empty context."""
        return self._line_break[-1]

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        return self._tested.tokenizer.encode(string).tolist()

    @property
    def tokenizer_name(self) -> str:
        """Tells lm_eval's caches of prompts apart."""
        return self._tested.tokenizer.name

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The one that there is.

        Raises:
          ConfigError: another one is asked for by its name.
        """
        if isinstance(chat_template, str):
            raise ConfigError(
                f"there is no chat template {chat_template!r}: give --apply_chat_template no name"
            )
        return TEMPLATE_TEXT

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as data/chat.py writes it. The blank behind a last `Assistant:` belongs to
        the answer: lm_eval moves it there for loglikelihoods, `generate_until` leaves it out.

        Raises:
          ConfigError: turns that the template has no form for.
        """
        try:
            text = chat_text(chat_history, ask=add_generation_prompt)
        except ValueError as error:
            raise ConfigError(f"the chat template can't say a prompt: {error}") from error
        return f"{text} " if add_generation_prompt else text

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Logarithm of each continuation's probability, and whether it is the greedy one.

        Raises:
          ConfigError: an empty continuation, or logits that are not finite; all others are kept.
        """
        keys = [request_key("loglikelihood", *texts) for texts, _, _ in requests]
        pending, asked, refused = {}, {}, Refused(self._tested.label)
        for key, (texts, context, continuation) in zip(keys, requests, strict=True):
            if key in self._answers or key in asked:
                continue
            asked[key] = texts
            if continuation := continuation or self.tok_encode(texts[1]):
                pending[key] = (self._behind_line_break(context), continuation)
            else:
                refused.add(texts, "the continuation is empty: give it some text")
        for key in self._compute(pending) if pending else ():
            refused.add_not_finite(asked[key])
        refused.tell()
        return [tuple(self._answers[key]) for key in keys]

    def _behind_line_break(self, context: list[int]) -> list[int]:
        return context if context == self._line_break else self._line_break + context

    def _compute(self, pending: dict[str, tuple[list[int], list[int]]]) -> list[str]:
        """Answers requests; those whose scores are not finite."""
        names = list(pending)
        groups = group_rows(list(pending.values()))
        longest = max(len(row.inputs) for group in groups for row in group.rows)
        lanes = self._height or affordable_batch(self._tested, longest, _STEP_TOKENS, self._tokens)
        lanes = even_rows(min(lanes, len(groups)))
        calls = plan_calls(groups, lanes, _STEP_TOKENS)
        sizes = common_sizes(calls, lanes, _STEP_TOKENS)
        advance = self._start("loglikelihoods", sum(self._tokens_of(call) for call in calls))
        running: list[tuple[int, Asked, tuple[jax.Array, jax.Array]]] = []
        failed: list[str] = []
        # While the device reads a call, the next one is packed.
        for call in [*calls, None]:
            if call is not None:
                packed, asked = pack(call, sizes)
                scores = self._score(self._params, packed, rows=longest)
                running.append((self._tokens_of(call), asked, scores))
            if len(running) == 2 or call is None:
                count, asked, scores = running.pop(0)
                answers = _answers(asked, *map(np.asarray, scores))
                failed += self._answers.add({names[i]: answer for i, answer in answers.items()})
                self.requests += len(answers)
                advance(count)
        return failed

    def _tokens_of(self, call: Call) -> int:
        return sum(len(text) for lane in call for group in lane for text in group.texts())

    def _score_call(self, params, packed: Packed, *, rows: int) -> tuple[jax.Array, jax.Array]:
        """Log-probabilities and greediness of all targets; see `Packed`."""
        model = with_params(self._model, params)
        features = _read_lanes(model, packed, rows)
        asked = packed.places, packed.targets, packed.place_count
        return whole(score_places(model, features, *asked))

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Log-probability of whole texts, each read to its end, however long.

        Raises:
          ConfigError: logits that are not finite; all other texts are kept.
        """
        refused = Refused(self._tested.label)
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
            chunk = min(self._chunk, longest)
            height = min(len(order), self._height or max(1, self._tokens // chunk))
            scorer = TextScorer(self._tested, prefill_chunk=chunk, batch=height, longest=longest)
            for i in range(0, len(order), height):
                chosen = order[i : i + height]
                scores = scorer([rows[key] for key in chosen], advance)
                sums = (-float(own.losses.astype(np.float64).sum()) for own in scores)
                for key in self._answers.add(dict(zip(chosen, sums, strict=True))):
                    refused.add_not_finite((pending[key],))
                self.requests += len(chosen)
        refused.tell()
        return [self._answers[key] for key in keys]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Greedy continuations up to a stop string, a line's number of tokens or the text's end.

        Raises:
          ConfigError: a request for random sampling, or one whose settings mean nothing, or logits
            that are not finite; all others are kept.
        """
        keys = [request_key("generate", *request.args) for request in requests]
        asked = {key: request.args for key, request in zip(keys, requests, strict=True)}
        refused, groups = Refused(self._tested.label), {}
        for key, (context, options) in asked.items():
            if key not in self._answers:
                try:
                    stopping = _stopping(options)
                except ConfigError as error:
                    refused.add(asked[key], str(error))
                    continue
                prompt = context
                if context.endswith(_ASKED):  # an answer in a chat ends with its turn
                    prompt, stopping = context.removesuffix(" "), (*stopping, TURN_END)
                row = self._behind_line_break(self.tok_encode(prompt))
                groups.setdefault(stopping, {})[key] = np.asarray(row, np.int32)
        total = sum(len(row) for group in groups.values() for row in group.values())
        advance = self._start("generations", total)
        for (count, *stops), group in groups.items():
            try:
                failed = self._generate(group, count, stops, advance)
            except ConfigError as error:  # they do not fit into the memory
                for key in group:
                    refused.add(asked[key], str(error))
                continue
            for key in failed:
                refused.add_not_finite(asked[key])
        refused.tell()
        texts = zip(keys, requests, strict=True)
        return [
            self._answers[key].lstrip(" ") if r.args[0].endswith(_ASKED) else self._answers[key]
            for key, r in texts
        ]

    def _generate(
        self, rows: dict[str, np.ndarray], count: int, stops: list[str], advance
    ) -> list[str]:
        """Answers requests of the same settings; those whose logits are not finite."""
        order = sorted(rows, key=lambda key: -len(rows[key]))
        longest = len(rows[order[0]])
        chunk = min(self._chunk, longest)
        height = min(len(order), self._height or max(1, self._tokens // chunk))
        reader = GreedyReader(self._tested, prefill_chunk=chunk, batch=height, longest=longest)
        ended, failed = lambda answer: self._cut(answer, stops)[1], []
        prompts = [rows[key] for key in order]
        for number, answer in reader.answer_all(prompts, count, advance, ended):
            text = self._cut(answer, stops)[0] if (answer >= 0).all() else math.nan
            failed += self._answers.add({order[number]: text})
            self.requests += 1
        return failed

    def _cut(self, answer: np.ndarray, stops: Sequence[str]) -> tuple[str, bool]:
        """Text of an answer up to its end or the first stop string, and whether either occurred."""
        ends = np.flatnonzero(answer == self.eot_token_id)
        text = self._tested.tokenizer.decode(answer[: ends[0]] if len(ends) else answer)
        places = [place for stop in stops if (place := text.find(stop)) >= 0]
        return (text[: min(places)] if places else text), bool(len(ends) or places)


def _read_lanes(model: RWKVX, packed: Packed, rows: int) -> jax.Array:
    """Features of all tokens of a call, flattened [steps * lanes * width, D].

    Args:
      model: the model.
      packed: the call.
      rows: tokens of the longest text.
    """
    lanes = packed.tokens.shape[1]
    cache = model.init_cache(lanes, rows)
    nothing = snapshot(cache)

    def step(i, carry):
        cache, kept, features = carry
        now = choose(packed.back[i], kept, snapshot(cache))
        cache = rewind(cache, choose(packed.fresh[i], nothing, now))
        new, cache = model.read(packed.tokens[i], cache, packed.lengths[i])
        kept = choose(packed.keep[i], snapshot(cache), kept)
        return cache, kept, jax.lax.dynamic_update_index_in_dim(features, new, i, 0)

    features = jnp.zeros((*packed.tokens.shape, model.config.width), model.dtype)
    carry = (cache, nothing, features)
    _, _, features = jax.lax.fori_loop(0, packed.step_count, step, carry)
    return features.reshape(-1, model.config.width)


def _answers(asked: Asked, logs: np.ndarray, hits: np.ndarray) -> dict[int, tuple[float, bool]]:
    """(logarithm of the probability, whether it is the greedy one) of every continuation."""
    logs = np.add.reduceat(logs.reshape(-1)[asked.indices].astype(np.float64), asked.begins)
    hits = np.logical_and.reduceat(hits.reshape(-1)[asked.indices], asked.begins)
    return dict(zip(asked.requests, zip(logs.tolist(), hits.tolist(), strict=True), strict=True))


def _stopping(options: dict[str, Any]) -> tuple:
    """(most tokens, stop strings...) of a task's generation settings; None counts as not given.

    Raises:
      ConfigError: random sampling, or settings of other types.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if given.get("do_sample") and given.get("temperature", 1.0) != 0:
        raise ConfigError("it wants random sampling, and only greedy answers are made")
    until = given.get("until", [])
    until = [until] if isinstance(until, str) else until
    count = given.get("max_gen_toks", given.get("max_new_tokens", _DEFAULT_ANSWER))
    if not isinstance(until, list | tuple) or not all(isinstance(stop, str) for stop in until):
        raise ConfigError(f"until is {until!r}: it must be a string or a list of strings")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ConfigError(f"max_gen_toks is {count!r}: it must be a number of tokens, at least 1")
    return count, *(stop for stop in until if stop)
