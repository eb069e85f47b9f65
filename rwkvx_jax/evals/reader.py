"""Reads prompts in pieces of one length and continues them greedily.

Long prompts never become one huge forward pass: memory is bounded by the cache and one piece. All
prompts share a cache that holds the longest, hence one compilation: reading a piece hardly costs
more in a large cache, while compiling anew costs more than reading many short prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rwkvx_jax.cache import Cache
from rwkvx_jax.config import ModelConfig
from rwkvx_jax.evals.common import Subject
from rwkvx_jax.model import Params, abstract_model, with_params

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
          subject: the model; its parameters move to the device.
          piece: tokens read at once.
          batch: rows; smaller batches are padded with empty rows.
          longest: tokens of the longest prompt to come; a longer one is compiled for anew.
        """
        self._piece, self._batch = piece, batch
        self._pieces = -(-longest // piece)
        self._params = jax.device_put(subject.params)
        self._model = model = abstract_model(subject.config, subject.run)

        @partial(jax.jit, donate_argnums=(2, 3))
        def read(params: Params, tokens, cache: Cache, last, lengths):
            logits, cache = with_params(model, params).prefill(tokens, cache, lengths)
            return jnp.where((lengths > 0)[:, None], logits, last), cache

        # Returns the cache too, so that it is written in place rather than copied.
        @partial(jax.jit, static_argnums=3, donate_argnums=2)
        def decode(params: Params, logits, cache: Cache, count: int):
            bound = with_params(model, params)

            def step(carry, _):
                token, cache = carry
                logits, cache = bound.decode(token, cache)
                token = jnp.argmax(logits, -1).astype(jnp.int32)
                return (token, cache), token

            first = jnp.argmax(logits, -1).astype(jnp.int32)
            (_, cache), rest = jax.lax.scan(step, (first, cache), length=count - 1)
            return jnp.concatenate([first[:, None], rest.T], axis=1), cache

        self._read, self._decode = read, decode

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
        lengths = np.zeros(self._batch, np.int32)
        lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
        pieces = -(-int(lengths.max()) // self._piece)
        tokens = np.zeros((self._batch, pieces * self._piece), np.int32)
        for row, prompt in zip(tokens, prompts, strict=False):
            row[: len(prompt)] = prompt
        self._pieces = max(self._pieces, pieces)
        cache = self._model.init_cache(self._batch, self._pieces * self._piece + count)
        logits = jnp.zeros((self._batch, self._model.config.vocab_size))
        for start in range(0, pieces * self._piece, self._piece):
            part = tokens[:, start : start + self._piece]
            valid = np.clip(lengths - start, 0, self._piece)
            logits, cache = self._read(self._params, part, cache, logits, valid)
            logits.block_until_ready()  # or the host runs ahead and the estimate means nothing
            advance(int(valid.sum()))
        answers, _ = self._decode(self._params, logits, cache, count)
        return np.asarray(answers)[: len(prompts)]


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
