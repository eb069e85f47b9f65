"""How a query scores a chunk: what is kept of the chunk's keys, and what is made of it.

The rows that are kept (sums or bounds) serve decoding as well, where the cache keeps them running.
Everything is float32. `selection` chooses by these scores.
Source: RWKV-X (arXiv 2504.21463) for the mean key.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from rwkvx_jax.ops.attention_inputs import check_groups


class Selector(NamedTuple):
    """How a query q scores a chunk.

    kind:
      "mean": q . mean key (the paper's).
      "max": the largest q . mean key over `blocks` equal parts of the chunk.
      "pooled": log-sum-exp of q . mean key / sqrt(K) over the parts, so what the chunk would weigh
        in the softmax if every key were its part's mean.
      "bounds": sum over channels of the larger of q * smallest key and q * largest key, an upper
        bound of q . k over the chunk (Quest, arXiv 2406.10774).
    blocks: parts of a chunk, for "max" and "pooled".
    together: neighbouring query heads that share a choice, by the sum of their scores or the
      largest. They read one key head.
    joined: "sum" or "max".
    """

    kind: Literal["mean", "max", "pooled", "bounds"] = "mean"
    blocks: int = 1
    together: int = 1
    joined: Literal["sum", "max"] = "sum"

    @property
    def rows(self) -> int:
        """Rows kept of each chunk."""
        return {"mean": 1, "bounds": 2}.get(self.kind, self.blocks)

    def rows_of(
        self,
        k: Float[Array, "B T H K"],
        chunk_size: int,
        counted: Bool[Array, "B T"] | None = None,
    ) -> Float32[Array, "B NR H K"]:
        """What is kept of keys [B, T, H, K] in chunks: float32 [B, ceil(T / chunk_size) * rows, H,
        K]. Sums over the parts of each chunk, or for "bounds" the largest of -k and of k; a
        trailing partial chunk as far as it goes. Keys that are not `counted` are left out.
        """
        counts = None if counted is None else counted[..., None, None]
        only = lambda x, empty: x if counts is None else jnp.where(counts, x, empty)
        if self.kind != "bounds":
            k = only(k, 0)
            sums = chunk_key_sums(k, chunk_size // self.rows)
            missing = -(-k.shape[1] // chunk_size) * self.rows - sums.shape[1]
            return jnp.pad(sums, ((0, 0), (0, missing), (0, 0), (0, 0)))
        batch, length, heads, size = k.shape
        chunks = -(-length // chunk_size)
        padding = ((0, 0), (0, chunks * chunk_size - length), (0, 0), (0, 0))
        split = lambda x: jnp.pad(only(x, -jnp.inf), padding, constant_values=-jnp.inf).reshape(
            batch, chunks, chunk_size, heads, size
        )
        k = k.astype(jnp.float32)
        bounds = jnp.stack([split(-k).max(2), split(k).max(2)], axis=2)
        return bounds.reshape(batch, chunks * 2, heads, size)

    @property
    def is_product(self) -> bool:
        """Whether the score is a product of the query with one vector of the chunk."""
        return self.kind in ("mean", "bounds")

    @property
    def keys_per_chunk(self) -> int:
        """Keys that `keys` makes of each chunk."""
        return 1 if self.kind == "bounds" else self.rows

    def counts(
        self, counted: Bool[Array, "B T"], chunk_size: int
    ) -> Float32[Array, "B keys"] | None:
        """How many keys of each part of complete chunks are counted: [B, N * rows]; None where
        nobody asks ("bounds")."""
        if self.kind == "bounds":
            return None
        parts = counted.reshape(counted.shape[0], -1, chunk_size // self.rows)
        return parts.sum(-1, dtype=jnp.float32)

    def keys(
        self,
        rows: Float32[Array, "*any NR K"],
        chunk_size: int,
        counts: Float32[Array, "*some NR"] | None = None,
    ) -> Float32[Array, "*any keys F"]:
        """What queries are multiplied with: float32 [..., N * rows, K] -> [..., N *
        keys_per_chunk, F]. F is K, and for "bounds" 2 K: [-smallest, largest]. `counts` says of how
        many keys the sums are, where not of whole parts."""
        if self.kind != "bounds":
            whole = chunk_size // self.rows
            return rows / (whole if counts is None else jnp.maximum(counts, 1)[..., None])
        return rows.reshape(*rows.shape[:-2], -1, 2 * rows.shape[-1])

    @property
    def sums_queries(self) -> bool:
        """Whether heads that choose together do so by the sum of their queries, as `queries` makes
        it: the sum of their scores where these are products."""
        return self.together == 1 or (self.is_product and self.joined == "sum")

    def queries(self, q: Float[Array, "*any K"], axis: int) -> Float[Array, "*some F"]:
        """What is multiplied with those keys: [..., K] -> [..., F]. Heads, along `axis`, that
        choose together become one where it `sums_queries`, in float32; else the dtype stays."""
        if self.kind == "bounds":
            q = jnp.concatenate([jax.nn.relu(-q), jax.nn.relu(q)], axis=-1)
        if self.together == 1 or not self.sums_queries:
            return q
        return self._of_heads(q.astype(jnp.float32), axis).sum(axis + 1)

    def combine(
        self,
        products: Float32[Array, "B H T keys"],
        key_size: int,
        weights: Float32[Array, "B 1 1 keys"] | None = None,
    ) -> Float32[Array, "B S T N"]:
        """Scores [B, S, T, N] from the products of `queries` with all keys: [B, H, T, N *
        keys_per_chunk], or [B, S, ...] where it `sums_queries`. `weights` are the shares of the
        keys that count in each part, where not all do: in "max" parts without any are left out, in
        "pooled" each part weighs as much."""
        scores = products
        if not self.is_product:
            parts = lambda x: x.reshape(*x.shape[:-1], -1, self.rows)
            products, largest = parts(products), self.kind == "max"
            products = products if largest else products * key_size**-0.5
            if weights is not None:
                products += jnp.log(parts(jnp.sign(weights) if largest else weights))
            scores = products.max(-1) if largest else jax.nn.logsumexp(products, axis=-1)
        if self.sums_queries:
            return scores
        scores = self._of_heads(scores, 1)
        return scores.sum(2) if self.joined == "sum" else scores.max(2)

    def _of_heads(self, x, axis: int):
        """[..., H, ...] -> [..., S, together, ...]."""
        return x.reshape(*x.shape[:axis], -1, self.together, *x.shape[axis + 1 :])

    def start(self, shape: tuple[int, ...]) -> Float32[Array, "..."]:
        """Rows of chunks without any key, float32."""
        return jnp.full(shape, -jnp.inf if self.kind == "bounds" else 0.0, jnp.float32)


MEAN = Selector()
"""The paper's selector."""


def chunk_key_sums(k: Float[Array, "B T H K"], chunk_size: int) -> Float32[Array, "B N H K"]:
    """Sums of the keys of each chunk; a trailing partial chunk is summed as far as it goes.

    Args:
      k: [B, T, H, K], any floating dtype.
      chunk_size: tokens in a chunk.

    Returns:
      float32 [B, ceil(T / chunk_size), H, K].
    """
    batch, length, heads, size = k.shape
    chunks = -(-length // chunk_size)
    k = jnp.pad(k, ((0, 0), (0, chunks * chunk_size - length), (0, 0), (0, 0)))
    return jnp.sum(k.reshape(batch, chunks, chunk_size, heads, size), axis=2, dtype=jnp.float32)


def check_selector(selector: Selector, chunk_size: int, heads: int, key_heads: int) -> None:
    """Raises ValueError on an unknown kind, blocks that do not divide the chunk, or heads that
    can't choose together."""
    if selector.kind not in ("mean", "max", "pooled", "bounds"):
        raise ValueError(
            f"selector {selector.kind!r} is unknown: choose mean, max, pooled or bounds"
        )
    if selector.blocks < 1 or chunk_size % selector.blocks:
        raise ValueError(
            f"a chunk of {chunk_size} tokens can't be cut into {selector.blocks} equal blocks: "
            "choose a divisor"
        )
    if selector.joined not in ("sum", "max"):
        raise ValueError(f"joined={selector.joined!r} of a selector is unknown: choose sum or max")
    if selector.together < 1 or heads % selector.together:
        raise ValueError(
            f"{heads} query heads can't choose together in groups of {selector.together}: choose a "
            "divisor"
        )
    check_groups(heads, key_heads, heads // selector.together)
