"""Continues prompts greedily, reporting how far they are read.

Prompts are read in pieces of one length by the generation engine, so that long ones never become
one huge forward pass. All share a cache that holds the longest, hence one compilation: reading a
piece hardly costs more in a large cache, while compiling anew costs more than reading many short
prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from rwkvx_jax.cache import CachePolicy
from rwkvx_jax.config import ConfigError, ModelConfig
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

    def __init__(
        self,
        subject: Subject,
        *,
        piece: int,
        batch: int,
        longest: int,
        policy: CachePolicy | None = None,
    ):
        """
        Args:
          subject: the model; its parameters move to the device with the first prompts.
          piece: tokens read at once.
          batch: rows; smaller batches are padded.
          longest: tokens of the longest prompt to come; a longer one is compiled for anew.
          policy: compression of the cache; None keeps every key and value.
        """
        self._subject, self._piece, self._batch, self._policy = subject, piece, batch, policy
        self._pieces = -(-longest // piece)
        self._rows = 0
        self._engine: Engine | None = None

    def __call__(
        self,
        prompts: Sequence[np.ndarray],
        count: int,
        advance: Callable[[int], None],
        ended: Callable[[np.ndarray], bool] = lambda answer: False,
    ) -> np.ndarray:
        """Continues each prompt.

        Args:
          prompts: at most `batch` arrays of int32 tokens, none empty.
          count: tokens of each answer.
          advance: told how many prompt tokens have been read, piece by piece.
          ended: whether an answer so far, int32 [n], needs no further token; once all do, the rest
            is filled with token 0.

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
        answers = np.zeros((len(prompts), count), np.int32)
        open_rows = set(range(len(prompts)))
        for i in range(count):
            answers[:, i] = engine.next_tokens(session)[: len(prompts)]
            open_rows -= {row for row in open_rows if ended(answers[row, : i + 1])}
            if not open_rows:
                break
        return answers

    def _engine_for(self, rows: int) -> Engine:
        """The engine, made anew where its cache has fewer rows."""
        if rows > self._rows:
            self._engine = None  # frees its parameters before they are copied again
            abstract = abstract_model(self._subject.config, self._subject.run)
            model = with_params(abstract, jax.device_put(self._subject.params))
            self._engine = Engine(
                model, max_length=rows, batch=self._batch, piece=self._piece, policy=self._policy
            )
            self._rows = rows
        return self._engine


def affordable_batch(
    subject: Subject, length: int, piece: int, policy: CachePolicy | None = None
) -> int:
    """Prompts of this length to read side by side: at least 1, else as many as fit into 8192 tokens
    read at once and into about a gigabyte."""
    return max(
        1, min(_STEP_TOKENS // piece, _BATCH_BYTES // _prompt_bytes(subject, length, piece, policy))
    )


def check_memory(
    subject: Subject, length: int, piece: int, policy: CachePolicy | None, free: int | None
) -> None:
    """Refuses prompts of which not even one fits into the memory that is left.

    Raises:
      ConfigError: says how much is needed.
    """
    needed = _prompt_bytes(subject, length, piece, policy)
    if free is not None and needed > free:
        raise ConfigError(
            f"{subject.label}: a prompt of {length:,} tokens needs {needed / 1e9:.1f} GB of cache "
            f"and activations, and {free / 1e9:.1f} GB are free: leave out the longest lengths, or "
            "bound the cache with --policy TRIGGER,KEEP,WINDOW"
        )


def _prompt_bytes(subject: Subject, length: int, piece: int, policy: CachePolicy | None) -> int:
    """Memory of one prompt: its cache, and the activations of a piece."""
    config: ModelConfig = subject.config
    model = abstract_model(config, subject.run)
    leaves = jax.tree.leaves(jax.eval_shape(lambda: model.init_cache(1, length, policy=policy)))
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    return held + _ACTIVATION_WIDTHS * piece * config.width * model.dtype.itemsize


def memory_left(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes that the first device (on a CPU: the machine) still has; None where nobody tells."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    if jax.default_backend() == "cpu" and meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return None
