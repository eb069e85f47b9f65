"""The rows of an engine: texts side by side, begun, read and continued one by one.

Where texts differ in length, each is read in its own row while the others wait: what is computed is
what was asked for. Equal ones are read together, and so are all where rows lie on several devices.
On a CPU each layer's weights lie in arrays of their own (`model.unstack`), which a decode step
reads at the speed of memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import jax
import numpy as np

from rwkvx_jax.cache import CachePolicy
from rwkvx_jax.config import ModelConfig
from rwkvx_jax.generate.chunks import chunk_sizes, cut_chunk, next_size
from rwkvx_jax.generate.programs import Held, Programs
from rwkvx_jax.generate.requests import TokenScores
from rwkvx_jax.generate.sampling import Sampling
from rwkvx_jax.model import RWKVX, get_params, unstack
from rwkvx_jax.ops.dispatch import current_platform
from rwkvx_jax.sharding import ways

REPORT_TOKENS = 8192
"""Tokens between two reports of progress, for which the device has to come to rest."""

_NOTHING = np.zeros(0, np.int32)


def _chunk(
    texts: Mapping[int, np.ndarray], places: Sequence[tuple[int, int]], size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The next tokens of texts, each by its row and what was read of it; see `cut_chunk`."""
    return cut_chunk([texts.get(row, _NOTHING)[at : at + size] for row, at in places], size)


@dataclass
class Speed:
    """Tokens and seconds of what an engine did, compilation included where it happened."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    tokens: int = 0
    seconds: float = 0.0

    def since(self, before: Speed) -> Speed:
        """What was done after an earlier moment."""
        pairs = zip(astuple(self), astuple(before), strict=True)
        return Speed(*(now - then for now, then in pairs))

    def __str__(self) -> str:
        rate = lambda count, seconds: f"{count / seconds if seconds else 0.0:.1f} tokens/s"
        return (
            f"prompt {self.prompt_tokens} tokens, {rate(self.prompt_tokens, self.prompt_seconds)}; "
            f"generated {self.tokens} tokens, {rate(self.tokens, self.seconds)}"
        )


class Rows:
    """Texts in progress.

    Attributes:
      params: the parameters, as `programs` take them.
      programs: what is run on the device.
      cache: the state after all tokens read.
      progress: what comes next.
      lengths: int64 [B], tokens of each text.
      together: rows are never read one by one.
      speed: what was done so far.
    """

    def __init__(
        self,
        model: RWKVX,
        batch: int,
        max_length: int,
        piece: int,
        sampling: Sampling,
        policy: CachePolicy | None,
    ):
        """
        Args:
          model: its parameters are copied on a CPU (layer by layer); they lie where the mesh in
            force wants them, which has to be in force at every later call as well.
          batch: B.
          max_length: rows of the cache for each text.
          piece: most prompt tokens of a row read at once; a policy or a model without attention
            blocks reads more than `max_length`.
          sampling: how tokens are chosen.
          policy: compresses the cache.
        """
        layered = unstack(model) if current_platform() == "cpu" else model
        self.params, abstract = get_params(layered), jax.eval_shape(lambda: layered)
        self.programs = Programs(abstract, batch, max_length, sampling, policy)
        self.together = batch == 1 or ways("batch") > 1
        self._batch, self._sizes = batch, chunk_sizes(piece)
        self.speed = Speed()
        self._set_empty()

    def _set_empty(self) -> None:
        self.cache = self.programs.empty(self._batch)
        self.progress = self.programs.begin(np.zeros(self._batch, np.uint32))
        self.lengths = np.zeros(self._batch, np.int64)

    def broken(self, held: Held | None = None) -> bool:
        """Whether arrays of the rows, or of what is held, are lost: a call failed that had been
        given them, or that was to compute them."""
        try:
            jax.block_until_ready((self.cache, self.progress, held))
        except RuntimeError:  # deleted, or an error on the device
            return True
        return False

    def renew(self) -> None:
        """Makes all arrays anew, which have read nothing; first lets go of the old ones."""
        for array in jax.tree.leaves((self.cache, self.progress)):
            array.delete()
        self._set_empty()

    def restart(
        self,
        rows: np.ndarray,
        seeds: np.ndarray,
        held: Held | None = None,
        length: int = 0,
        *,
        wipe: bool = False,
    ) -> None:
        """Ends some texts, and begins others in their place.

        Args:
          rows: bool [B], which are to end; the others stay as they are.
          seeds: uint32 [B], of the new ones.
          held: where the new ones begin, with penalties of nothing. Without a policy their rows
            have its keys and values already (see `copy`). None: nothing has been read.
          length: tokens of what is held.
          wipe: also overwrites the keys and values that the ended texts leave behind, where their
            logits were not finite: out of reach, they would still spoil sums.
        """
        self.cache, self.progress = self.programs.restart(
            self.cache, self.progress, held, rows, seeds, wipe=wipe
        )
        self.lengths = np.where(rows, length, self.lengths)

    def copy(self, source: int, row: int) -> None:
        """Gives a row the keys and values of another one."""
        self.cache = self.programs.copy(self.cache, np.int32(source), np.int32(row))

    def keep(self, row: int) -> Held:
        """Where a text is now."""
        return self.programs.keep(self.cache, self.progress.logits, np.int32(row))

    def with_pages(self, held: Held, row: int) -> Held:
        """What is held, with the keys and values, which a row has."""
        pages = self.cache.pages
        rows = held.state.rows or (pages.keys[:, row : row + 1], pages.values[:, row : row + 1])
        return held._replace(state=held.state._replace(rows=rows))

    def place(self, held: Held) -> Held:
        """Gives keys and values to all rows; what is left of what is held."""
        if self.cache.policy is not None or held.state.rows is None:
            return jax.device_put(held)
        self.cache = self.programs.place(self.cache, *held.state.rows)
        return jax.device_put(held._replace(state=held.state._replace(rows=None)))

    @property
    def config(self) -> ModelConfig:
        """The model."""
        return self.programs.abstract.config

    def read(
        self, texts: Mapping[int, np.ndarray], advance: Callable[[int], None] = lambda count: None
    ) -> None:
        """Reads further tokens of some rows.

        Args:
          texts: int32 tokens, by row; the other rows stay as they are.
          advance: told how many tokens have been read, as they are.
        """
        self._read(texts, None, advance)

    def score(
        self, texts: Mapping[int, np.ndarray], advance: Callable[[int], None] = lambda count: None
    ) -> dict[int, TokenScores]:
        """Reads all but the last token of texts in some rows, as `read` does; nothing can be
        generated behind them.

        Returns:
          The scores of predicting all but the first.
        """
        targets = {row: text[1:] for row, text in texts.items()}
        found = self._read({row: text[:-1] for row, text in texts.items()}, targets, advance)
        parts: dict[int, list[TokenScores]] = {row: [] for row in texts}
        for chunk, counts in found:
            losses, hits = jax.device_get(chunk)
            for i, (row, count) in enumerate(counts.items()):
                if row in parts:  # a chunk of all rows has those that read nothing, too
                    parts[row].append(TokenScores(losses[i, :count], hits[i, :count]))
        join = lambda own: TokenScores(*map(np.concatenate, zip(*own, strict=True)))
        return {row: join(own) for row, own in parts.items()}

    def _read(
        self,
        texts: Mapping[int, np.ndarray],
        targets: Mapping[int, np.ndarray] | None,
        advance: Callable[[int], None],
    ) -> list[tuple[Any, dict[int, int]]]:
        """Of each chunk the scores on the device, and how many count of each of its rows."""
        begin, unreported, found = time.perf_counter(), 0, []
        done = dict.fromkeys(texts, 0)
        ahead = lambda: {row: len(t) - done[row] for row, t in texts.items() if len(t) > done[row]}
        while left := ahead():
            rows, size = self._next_chunk(left)
            places = [(row, done.get(row, 0)) for row in rows]
            tokens, counts = _chunk(texts, places, size)
            wanted = None if targets is None else _chunk(targets, places, size)[0]
            one = None if self.together or len(rows) > 1 else np.int32(rows[0])
            logits, self.cache, scores = self.programs.read(
                self.params, self.progress.logits, self.cache, tokens, counts, one, wanted
            )
            self.progress = self.progress._replace(logits=logits)
            counted = {row: int(count) for row, count in zip(rows, counts, strict=True)}
            found.append((scores, counted))
            for row in left.keys() & counted.keys():
                done[row] += counted[row]
            unreported += int(counts.sum())
            if unreported >= REPORT_TOKENS:
                logits.block_until_ready()
                advance(unreported)
                unreported = 0
        self.progress.logits.block_until_ready()
        advance(unreported)
        for row, count in done.items():
            self.lengths[row] += count
            self.speed.prompt_tokens += count
        self.speed.prompt_seconds += time.perf_counter() - begin
        return found

    def _next_chunk(self, left: Mapping[int, int]) -> tuple[list[int], int]:
        """The rows that read next, and the length of their chunk."""
        sizes = {row: next_size(count, self._sizes) for row, count in left.items()}
        alike = len(sizes) == self._batch and len(set(sizes.values())) == 1
        if self.together or alike:
            return list(range(self._batch)), max(sizes.values())
        row = min(sizes)
        return [row], sizes[row]

    def not_finite(self) -> np.ndarray:
        """Texts whose next logits are not finite, bool [B], ended ones too."""
        return ~np.asarray(self.programs.finite(self.progress.logits))

    def next_tokens(self, active: np.ndarray) -> np.ndarray:
        """Chooses the next token of each text and reads it.

        Args:
          active: bool [B], the texts that go on; the others stay as they are. Each has room left.

        Returns:
          int32 [B]: tokens; ENDED (-1) for texts that are not active, NOT_FINITE (-2) for those
          whose logits are NaN or infinite (nothing good comes of them any more).
        """
        begin = time.perf_counter()
        token, self.progress, self.cache = self.programs.step(
            self.params, self.progress, self.cache, active
        )
        token = np.asarray(token)
        self.lengths += token >= 0
        self.speed.tokens += int((token >= 0).sum())
        self.speed.seconds += time.perf_counter() - begin
        return token
