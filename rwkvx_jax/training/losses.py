"""Losses as weighted sums over tokens.

Every mean is a sum of per-token losses times weights that are known before the forward pass
(`token_weights`), so that gradient accumulation, sharding and masks are exact. Logits exist for
one block of tokens at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rwkvx_jax.config import LongCEConfig, ModelConfig
from rwkvx_jax.model import RWKVX
from rwkvx_jax.sharding import constrain, sequence_parts, whole_sequences


class TokenLosses(NamedTuple):
    """Per-token terms, each [B, T] float32, and what the forward pass says of its selection."""

    cross_entropy: jax.Array
    squared_max: jax.Array  # square of the largest logit (L2Wrap)
    selection: jax.Array | None = None  # [], sum of `Attention.selection_loss`, if it is wanted


def target_mask(mask: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """What each target weighs, [B, T] float32, without those that are of another document.

    Args:
      mask: [B, T] float32, what each target weighs: 1 where it counts, or any share of it.
      segment_ids: [B, T] int32, the document of each input (from 1; 0 is padding), or None: a row
        is one text. The target of a row's last input has no segment: `mask` decides on it.
    """
    if segment_ids is None:
        return mask
    following = jnp.concatenate([segment_ids[:, 1:], segment_ids[:, -1:]], axis=1)
    return jnp.where((segment_ids == following) & (segment_ids > 0), mask, 0.0)


def token_weights(mask: jax.Array, average: str, segment_ids: jax.Array | None = None) -> jax.Array:
    """Weights [B, T] that sum to 1 over the whole batch.

    Args:
      mask: [B, T] float32, of `target_mask`.
      average: "token": all valid tokens alike; "sample": samples alike, each the mean of its own.
      segment_ids: [B, T] int32; with them every document of a row is a sample. None: the row is.
    """
    if average == "token":
        return mask / jnp.maximum(mask.sum(), 1.0)
    if segment_ids is None:
        own = samples = mask.sum(axis=1, keepdims=True)
    else:  # documents are numbered from 1, so a row has at most as many as tokens
        add = lambda ids, row: jnp.zeros(row.size + 1, row.dtype).at[ids].add(row)
        samples = jax.vmap(add)(segment_ids, mask)
        own = jnp.take_along_axis(samples, segment_ids, axis=1)
    return mask / jnp.maximum(own, 1.0) / jnp.maximum((samples > 0).sum(), 1)


def selecting_queries(model: ModelConfig, length: int) -> int:
    """Choices among past chunks that one sequence of `length` tokens makes, over all blocks."""
    return model.choosing_blocks * model.choices * max(0, length - model.chunk_size)


def token_losses(
    model: RWKVX,
    tokens: jax.Array,
    block_tokens: int,
    segment_ids: jax.Array | None = None,
    selection: bool = False,
    skip: int = 0,
) -> TokenLosses:
    """Cross-entropy of predicting tokens[:, skip + 1 :] from all tokens before each.

    Args:
      model: any model of this project.
      tokens: [B, T + 1] int32.
      block_tokens: tokens whose logits exist at once (rounded to whole time steps).
      segment_ids: [B, T] int32, the document of each input, or None: a row is one text.
      selection: whether the loss of the learned selector is wanted as well.
      skip: predictions at the beginning that nobody asks for, less than T: they get no logits.

    Returns:
      Terms [B, T - skip].
    """
    look = lambda attention, h: attention.selection_loss(h, segment_ids) if selection else None
    features, seen = model.observe(tokens[:, :-1], look, segment_ids, choosing=True)
    features, targets = features[:, skip:], tokens[:, skip + 1 :]
    # Parts of a sequence that lie on several devices become rows, so that none has to move.
    shape, parts = targets.shape, sequence_parts(targets.shape[1])
    rows, time = shape[0] * parts, shape[1] // parts
    block = min(time, max(1, block_tokens // rows))
    blocks = -(-time // block)

    def split(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [blocks, rows, block, ...]
        x = x.reshape(rows, time, *x.shape[2:])
        padding = [(0, 0), (0, blocks * block - time)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, padding).reshape(rows, blocks, block, *x.shape[2:]).swapaxes(0, 1)
        if parts == 1:
            return x
        with whole_sequences():
            return constrain(x, None, "batch", *[None] * (x.ndim - 2))

    @jax.checkpoint  # the backward pass makes the logits of a block again
    def one_block(features: jax.Array, targets: jax.Array) -> TokenLosses:
        logits = model.head(features)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return TokenLosses(losses, jnp.square(logits.max(-1)))

    losses = jax.lax.map(lambda xs: one_block(*xs), (split(features), split(targets)))
    join = lambda x: x.swapaxes(0, 1).reshape(rows, -1)[:, :time].reshape(shape)
    found = jax.tree.map(join, losses)
    return found._replace(selection=jnp.sum(seen)) if selection else found


def longce_starts(length: int, config: LongCEConfig) -> list[int]:
    """First tokens of the short-context windows of a sequence of `length` predictions.

    As in RWKV-X's `compute_longce_loss`: the first window starts `window` tokens in, whatever the
    stride.
    """
    return list(range(config.window, length - config.window, config.stride))


def longce_weights(
    # tokens [B, n + 1], and segment ids [B, n] if there are some -> losses [B, n - window]
    short_losses: Callable[..., jax.Array],
    tokens: jax.Array,  # [B, T + 1]
    full_losses: jax.Array,  # [B, T]
    config: LongCEConfig,
    segment_ids: jax.Array | None = None,  # [B, T]
) -> jax.Array:
    """LongCE weights [B, T]: how much worse a token is predicted from a short context.

    For each start s the tokens from s on are run alone, from an empty state and with chunks
    counted from s; the predictions in [s + window, s + window + stride) get the weight
    min(exp(short loss - full loss), cap), all others 1. The last window ends with the sequence,
    however short that makes it. No gradient flows through the weights. `short_losses` leaves out
    the first `window` predictions, and gets the part of `segment_ids` that belongs to its tokens:
    numbers of documents that need not start at 1.
    """
    time = full_losses.shape[1]
    span = config.window + config.stride
    starts = longce_starts(time, config)
    beyond = max(0, starts[-1] + span - time)
    rows = [tokens] if segment_ids is None else [tokens, segment_ids]
    rows = [jnp.pad(row, ((0, 0), (0, beyond))) for row in rows]
    # Devices that share a sequence take windows of it each; the last round may run some twice.
    parallel = sequence_parts(time)
    batch, at_once = len(tokens), parallel * min(config.at_once, -(-len(starts) // parallel))
    rounds = np.resize(starts, (-(-len(starts) // at_once), at_once))

    def windows(starts: jax.Array) -> jax.Array:  # [at_once] -> [B, at_once * stride]
        def parts(row: jax.Array) -> jax.Array:  # [B, T + n] -> [B * at_once, span + n]
            length = row.shape[1] - time - beyond + span
            cut = lambda start: jax.lax.dynamic_slice_in_dim(row, start, length, axis=1)
            together = jax.vmap(cut, out_axes=1)(starts).reshape(batch * at_once, length)
            return constrain(together, "batch", None)

        return short_losses(*map(parts, rows)).reshape(batch, -1)

    with whole_sequences():
        short = jax.lax.map(windows, jnp.asarray(rounds))
    short = short.swapaxes(0, 1).reshape(batch, -1)[:, : len(starts) * config.stride]
    first = starts[0] + config.window
    short = short[:, : time - first]
    weights = jnp.minimum(jnp.exp(short - full_losses[:, first:]), config.cap)
    ones = jnp.ones((tokens.shape[0], first), jnp.float32)
    return jax.lax.stop_gradient(jnp.concatenate([ones, weights], axis=1))
