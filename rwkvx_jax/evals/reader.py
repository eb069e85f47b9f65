"""Continues prompts greedily, reporting how far they are read.

Prompts are read in pieces of one length by the generation engine, so that long ones never become
one huge forward pass. All share a cache that holds the longest, hence one compilation: reading a
piece hardly costs more in a large cache, while compiling anew costs more than reading many short
prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np

from rwkvx_jax.config import ModelConfig
from rwkvx_jax.evals.common import Subject
from rwkvx_jax.generate.engine import Engine
from rwkvx_jax.model import abstract_model, with_params

# Memory for the caches and activations of one batch where nobody says how many prompts it has.
_BATCH_BYTES = 2**30
# Tokens that all rows of a batch read at once; more of them keep no device busier.
_STEP_TOKENS = 8192
# Activations of one piece, in widths: the hidden layer of the channel mix and a dozen others.
_ACTIVATION_WIDTHS = 32


class GreedyReader:
    """A function from prompts to their most likely continuations."""

    def __init__(self, subject: Subject, *, piece: int, batch: int, longest: int):
        """
        Args:
          subject: the model; its parameters move to the device with the first prompts.
          piece: tokens read at once.
          batch: rows; smaller batches are padded.
          longest: tokens of the longest prompt to come; a longer one is compiled for anew.
        """
        self._subject, self._piece, self._batch = subject, piece, batch
        self._pieces = -(-longest // piece)
        self._rows = 0
        self._engine: Engine | None = None

    def __call__(
        self, prompts: Sequence[np.ndarray], count: int, advance: Callable[[int], None]
    ) -> np.ndarray:
        """Continues each prompt.

        Args:
          prompts: at most `batch` arrays of int32 tokens, none empty.
          count: tokens of each answer.
          advance: told how many prompt tokens have been read, piece by piece.

        Returns:
          int32 [len(prompts), count].
        """
        longest = max(map(len, prompts))
        self._pieces = max(self._pieces, -(-longest // self._piece))
        engine = self._engine_for(self._pieces * self._piece + count)
        padding = [prompts[0][:1]] * (self._batch - len(prompts))
        first, *further = [
            [prompt[start : start + self._piece] for prompt in [*prompts, *padding]]
            for start in range(0, longest, self._piece)
        ]
        session = engine.start(first)
        advance(sum(map(len, first[: len(prompts)])))
        for texts in further:
            engine.feed(session, texts)
            advance(sum(map(len, texts)))
        answers = [engine.next_tokens(session) for _ in range(count)]
        return np.stack(answers, axis=1)[: len(prompts)]

    def _engine_for(self, rows: int) -> Engine:
        """The engine, made anew where its cache has fewer rows."""
        if rows > self._rows:
            self._engine = None  # frees its parameters before they are copied again
            abstract = abstract_model(self._subject.config, self._subject.run)
            model = with_params(abstract, jax.device_put(self._subject.params))
            self._engine = Engine(model, max_length=rows, batch=self._batch, piece=self._piece)
            self._rows = rows
        return self._engine


def affordable_batch(subject: Subject, length: int, piece: int) -> int:
    """Prompts of this length to read side by side: at least 1, else as many as fit into 8192 tokens
    read at once and into about a gigabyte."""
    config: ModelConfig = subject.config
    model = abstract_model(config, subject.run)
    cache = jax.eval_shape(lambda: model.init_cache(1, length))
    leaves = jax.tree.leaves(cache)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    working = _ACTIVATION_WIDTHS * piece * config.width * model.dtype.itemsize
    return max(1, min(_STEP_TOKENS // piece, _BATCH_BYTES // (held + working)))
