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
        bound of q . k over the chunk (Quest, arXiv 2406.10774); with `blocks`, the largest of
        those of its parts. With parts of one token it is the largest q . k of the chunk.
      "seer": a query has three vectors, for the smallest, the largest and the mean key (by
        channel); the sum of the three products. `modules/indexer.py` makes these queries
        (SeerAttention, arXiv 2410.13276).
    blocks: parts of a chunk, for "max", "pooled" and "bounds".
    together: neighbouring query heads that share a choice, by the sum of their scores or the
      largest. They read one key head.
    joined: "sum" or "max".
    forced: past chunks that are chosen before all others: the "previous" one, the "first", "both".
    span: chunks of a span, for "bounds": only the chunks of `spans` spans are candidates, those of
      the query's own span and of the best whole ones before it by the bounds of all their keys. 0:
      all chunks are.
    spans: spans whose chunks are candidates.
    """

    kind: Literal["mean", "max", "pooled", "bounds", "seer"] = "mean"
    blocks: int = 1
    together: int = 1
    joined: Literal["sum", "max"] = "sum"
    forced: Literal["none", "previous", "first", "both"] = "none"
    span: int = 0
    spans: int = 8

    @property
    def kept(self) -> tuple[str, ...]:
        """The rows kept of each part: "least" and "most", the largest of -k and of k by channel;
        "sum", that of k."""
        extremes = "least", "most"
        return {"bounds": extremes, "seer": (*extremes, "sum")}.get(self.kind, ("sum",))

    @property
    def keys_per_chunk(self) -> int:
        """Parts of a chunk, of each of which `keys` makes one key."""
        return 1 if self.kind in ("mean", "seer") else self.blocks

    @property
    def rows(self) -> int:
        """Rows kept of each chunk."""
        return self.keys_per_chunk * len(self.kept)

    @property
    def query_vectors(self) -> int:
        """Vectors of the size of a key that a query consists of."""
        return 3 if self.kind == "seer" else 1

    def rows_of(
        self,
        k: Float[Array, "B T H K"],
        chunk_size: int,
        counted: Bool[Array, "B T"] | None = None,
    ) -> Float32[Array, "B NR H K"]:
        """What is kept of keys [B, T, H, K] in chunks: float32 [B, ceil(T / chunk_size) * rows, H,
        K], for each part the rows that `kept` names; a trailing partial chunk as far as it goes.
        Keys that are not `counted` are left out."""
        batch, length, heads, size = k.shape
        parts = -(-length // chunk_size) * self.keys_per_chunk
        each = chunk_size // self.keys_per_chunk
        counts = None if counted is None else counted[..., None, None]
        only = lambda x, empty: x if counts is None else jnp.where(counts, x, empty)

        def sums():
            found = chunk_key_sums(only(k, 0), each)
            return jnp.pad(found, ((0, 0), (0, parts - found.shape[1]), (0, 0), (0, 0)))

        def most(k):
            padding = ((0, 0), (0, parts * each - length), (0, 0), (0, 0))
            k = jnp.pad(only(k, -jnp.inf), padding, constant_values=-jnp.inf)
            return k.reshape(batch, parts, each, heads, size).max(2)

        if self.kept == ("sum",):
            return sums()
        exact = k.astype(jnp.float32)
        rows = {"least": lambda: most(-exact), "most": lambda: most(exact), "sum": sums}
        found = jnp.stack([rows[name]() for name in self.kept], axis=2)
        return found.reshape(batch, -1, heads, size)

    @property
    def is_product(self) -> bool:
        """Whether the score is a product of the query with one vector of the chunk."""
        return self.keys_per_chunk == 1 and self.kind in ("mean", "bounds", "seer")

    def counts(
        self, counted: Bool[Array, "B T"], chunk_size: int
    ) -> Float32[Array, "B keys"] | None:
        """How many keys of each part of complete chunks are counted: [B, N * keys_per_chunk]; None
        where nobody asks ("bounds" of whole chunks)."""
        if self.kind == "bounds" and self.blocks == 1:
            return None
        parts = counted.reshape(counted.shape[0], -1, chunk_size // self.keys_per_chunk)
        return parts.sum(-1, dtype=jnp.float32)

    def keys(
        self,
        rows: Float32[Array, "*any NR K"],
        chunk_size: int,
        counts: Float32[Array, "*some keys"] | None = None,
    ) -> Float32[Array, "*any keys F"]:
        """What queries are multiplied with: float32 [..., N * rows, K] -> [..., N *
        keys_per_chunk, F]. F is K, for "bounds" 2 K: [-smallest, largest], and for "seer" 3 K:
        [smallest, largest, mean]. `counts` says of how many keys the sums are, where not of whole
        parts."""
        whole = chunk_size // self.keys_per_chunk
        number = whole if counts is None else jnp.maximum(counts, 1)[..., None]
        if self.kept == ("sum",):
            return rows / number
        keys = rows.reshape(*rows.shape[:-2], -1, len(self.kept) * rows.shape[-1])
        if self.kind == "seer":
            least, most, sums = jnp.split(keys, 3, axis=-1)
            return jnp.concatenate([-least, most, sums / number], axis=-1)
        return keys if counts is None else jnp.where(counts[..., None] > 0, keys, 0)

    @property
    def sums_queries(self) -> bool:
        """Whether heads that choose together do so by the sum of their queries, as `queries` makes
        it: the sum of their scores where these are products."""
        return self.together == 1 or (self.is_product and self.joined == "sum")

    def queries(self, q: Float[Array, "*any Q"], axis: int) -> Float[Array, "*some F"]:
        """What is multiplied with those keys: [..., Q] -> [..., F]. Heads, along `axis`, that
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
        keys that count in each part, where not all do: in "pooled" each part weighs as much, else
        parts without any are left out."""
        scores = products
        if not self.is_product:
            parts = lambda x: x.reshape(*x.shape[:-1], -1, self.keys_per_chunk)
            products, pooled = parts(products), self.kind == "pooled"
            products = products * key_size**-0.5 if pooled else products
            if weights is not None:
                products += jnp.log(parts(weights if pooled else jnp.sign(weights)))
            scores = jax.nn.logsumexp(products, axis=-1) if pooled else products.max(-1)
        if self.sums_queries:
            return scores
        scores = self._of_heads(scores, 1)
        return scores.sum(2) if self.joined == "sum" else scores.max(2)

    def _of_heads(self, x, axis: int):
        """[..., H, ...] -> [..., S, together, ...]."""
        return x.reshape(*x.shape[:axis], -1, self.together, *x.shape[axis + 1 :])

    def products(self, heads: int, scored_heads: int) -> int:
        """Numbers of the size of a key that scoring one chunk multiplies, for one token: `heads`
        query heads that score `scored_heads` heads of keys."""
        alike = heads // self.together if self.sums_queries else heads
        return max(alike, scored_heads) * self.rows

    @property
    def coarse(self) -> "Selector":
        """How spans are scored: by bounds that no chunk in them exceeds."""
        return self._replace(blocks=1, forced="none", span=0)

    def span_rows(self, rows: Float32[Array, "*any NR K"]) -> Float32[Array, "*any spans K"]:
        """What is kept of each span, from the rows of its chunks (the last span may lack some):
        float32 [..., N * rows, K] -> [..., ceil(N / span) * 2, K]."""
        each, (*outer, count, size) = self.span * self.rows, rows.shape
        missing = [(0, 0)] * len(outer) + [(0, -count % each), (0, 0)]
        rows = jnp.pad(rows, missing, constant_values=-jnp.inf)
        return rows.reshape(*outer, -1, each // 2, 2, size).max(-3).reshape(*outer, -1, size)

    def prefer_forced(
        self,
        scores: Float32[Array, "B S T N"],
        numbers: jax.Array,
        own: jax.Array,
        first: jax.Array,
        unit: int = 1,
    ) -> Float32[Array, "B S T N"]:
        """Scores of chunks, or of spans of `unit` chunks, of these numbers: those of what is forced
        for queries of the own chunks [B, 1, T, 1], whose texts begin in the chunks `first`, are
        infinite."""
        places = {"none": (), "previous": (own - 1,), "first": (first,)}
        places["both"] = places["previous"] + places["first"]
        for chunk in places[self.forced]:
            scores = jnp.where(numbers == chunk // unit, jnp.inf, scores)
        return scores

    def start(self, shape: tuple[int, ...]) -> Float32[Array, "..."]:
        """Rows of chunks without any key, float32 [..., N * rows, K]."""
        if self.kind != "seer":
            return jnp.full(shape, 0.0 if self.kept == ("sum",) else -jnp.inf, jnp.float32)
        one = jnp.array([0.0 if name == "sum" else -jnp.inf for name in self.kept])
        return jnp.broadcast_to(jnp.tile(one, shape[-2] // len(one))[:, None], shape)


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
    if selector.kind not in ("mean", "max", "pooled", "bounds", "seer"):
        raise ValueError(
            f"selector {selector.kind!r} is unknown: choose mean, max, pooled, bounds or seer"
        )
    if selector.blocks < 1 or chunk_size % selector.blocks:
        raise ValueError(
            f"a chunk of {chunk_size} tokens can't be cut into {selector.blocks} equal blocks: "
            "choose a divisor"
        )
    if selector.forced not in ("none", "previous", "first", "both"):
        raise ValueError(
            f"forced={selector.forced!r} of a selector is unknown: choose none, previous, first or "
            "both"
        )
    if selector.span and (selector.kind != "bounds" or selector.span < 2 or selector.spans < 2):
        raise ValueError(
            f"{selector} scores {selector.spans} spans of {selector.span} chunks: both must be at "
            'least 2, and its kind "bounds"; or make span 0'
        )
    if selector.joined not in ("sum", "max"):
        raise ValueError(f"joined={selector.joined!r} of a selector is unknown: choose sum or max")
    if selector.together < 1 or heads % selector.together:
        raise ValueError(
            f"{heads} query heads can't choose together in groups of {selector.together}: choose a "
            "divisor"
        )
    check_groups(heads, key_heads, heads // selector.together)
