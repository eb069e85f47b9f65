"""The general delta rule for TPU: a chunked recurrence and its gradient as two Pallas kernels.

S_t = S_{t-1} diag(exp(log_w_t)) + (S_{t-1} a_t) b_t^T + v_t k_t^T and y_t = S_t r_t or S_{t-1} r_t,
with one decay a channel or a head and a state of V x K. Without a and b this is linear attention.
Wide, stacked and the words for sizes are those of recurrence_tpu.py. Besides:

* targets: the rows that read, a and r (r alone in linear attention). Each sees the state either up
  to and with its own token's decay and source, or (exclusive, a always) before these.
* sources: the rows that write, b and k (k alone).
* span: for each token of a chunk, those tokens whose decays lie between it and something else.

No decay is ever divided by, but inside blocks of a vector decay with a known bound, and no exponent
is the difference of two sums: spans are summed by products with matrices of zeros and ones, whose
transposes collect the gradient of the decays. So nothing overflows, and nothing cancels.

docs/kernels.md derives the products and records what each choice cost or saved.
"""

import dataclasses
import functools
from collections.abc import Generator, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels.common import F32, LANES, LOG2_E, NT, TN, dot, iota
from pallas_kernels.recurrence_tpu import (
    Carried,
    Item,
    Plan,
    Shape,
    Stages,
    TileConfig,
    crop,
    default_tile,
    interleave,
    inverse,
    pack_state,
    pad,
    rows,
    unpack_state,
)

_NEVER = -1e30  # stands for a log decay of -inf: sums of it are finite, and exp of it is 0 too
_LARGEST_EXPONENT = 40.0  # twice that, and the largest values of a chunk, stay below float32's e^88


def unsupported_reason(
    key_size: int,
    value_size: int,
    dtype: jax.typing.DTypeLike,
    *,
    scalar: bool,
    decay_bound: float | None,
) -> str | None:
    """Why these kernels cannot take such inputs; None if they can.

    Args:
      key_size, value_size: K and V.
      dtype: of r, k, v, a, b.
      scalar: one decay a head and token, not one a channel.
      decay_bound: the least log decay of a channel; None: there is none.
    """
    for name, size in (("key", key_size), ("value", value_size)):
        if size % 32 or not 32 <= size <= 256:
            return f"{name} size {size} is not a multiple of 32 from 32 to 256"
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(F32)):
        return f"dtype {jnp.dtype(dtype)} is not bfloat16 or float32"
    if not scalar and decay_bound is not None and not decay_bound <= 0:
        return f"decay_bound {decay_bound} is not a log decay of at most 0"
    return None


@dataclasses.dataclass(frozen=True)
class _Rule:
    """What is known of a recurrence before it is traced.

    Attributes:
      delta: there are a and b.
      scalar: one decay a head.
      before: r reads the state before its own token.
      block: tokens that share a reference, relative to which their decays may be undone; 1: none.
    """

    delta: bool
    scalar: bool
    before: bool
    block: int

    def name(self, direction: str) -> str:
        """Of a kernel."""
        kind = "delta_rule" if self.delta else "linear_attention"
        return f"{'scalar' if self.scalar else 'vector'}_{kind}_{direction}"

    @property
    def exclusive(self) -> tuple[bool, ...]:
        """Of each target."""
        return (True, self.before) if self.delta else (self.before,)

    @property
    def sides(self) -> tuple[bool, ...]:
        """Values of `exclusive`, each once."""
        return tuple(dict.fromkeys(self.exclusive))

    @property
    def rows(self) -> int:
        """Targets, as many as sources."""
        return len(self.exclusive)


# --------------------------------------------------------------------------------------------
# Spans
# --------------------------------------------------------------------------------------------


class _Span(NamedTuple):
    """For each token t of a chunk, tokens whose log decays are added up.

    kind:
      "start": from the chunk's start up to t, to reach it from the state before the chunk.
      "end": after t, to reach the state after the chunk.
      "halves": between t and the middle of its 2 `size` tokens: for t in the second half from the
        middle up to t, in the first after t up to the middle.
      "signed": the same, the first half with a minus: the decays relative to the middle.
    exclusive: "up to t" is without t itself, and "after t" with it.
    size: tokens in a half.
    """

    kind: Literal["start", "end", "halves", "signed"]
    exclusive: bool = False
    size: int = 0

    def matrix(self, chunk: int) -> np.ndarray:
        """[C, C]: rows t, columns summands."""
        t, j = np.arange(chunk)[:, None], np.arange(chunk)[None, :]
        up_to = j < t if self.exclusive else j <= t
        if self.kind == "start":
            return np.where(up_to, 1.0, 0.0)
        if self.kind == "end":
            return np.where(j > t, 1.0, 0.0)
        second = t // self.size % 2 == 1
        inside = (t // self.size == j // self.size) & (second == up_to)
        first = -1.0 if self.kind == "signed" else 1.0
        return np.where(inside, np.where(second, 1.0, first), 0.0)


_END = _Span("end")


class _Level(NamedTuple):
    """Pairs of a target and a source whose decay is factored at one point between them.

    For signed False: pairs from both halves of the same 2 `size` tokens; the source decays to the
    middle, the target from there, so that both factors are at most 1. For signed True: pairs inside
    2 `size` tokens, whose decays are known to be bounded: the source's are undone up to the middle.
    Size 0: pairs of a token with itself, between which there is no decay.
    """

    size: int
    signed: bool

    def span(self, exclusive: bool) -> _Span:
        return _Span("signed" if self.signed else "halves", exclusive, self.size)


def _levels(rule: _Rule, chunk: int) -> list[_Level]:
    """For vector decays: every pair of a chunk, the widest apart first."""
    sizes = [rule.block << i for i in range((chunk // rule.block).bit_length() - 1)]
    return [_Level(size, False) for size in reversed(sizes)] + [_Level(rule.block // 2, True)]


def _spans(rule: _Rule, chunk: int) -> list[_Span]:
    """All that a kernel sums over."""
    spans = [*_start_spans(rule), _END]
    if not rule.scalar:
        sides = {False, *rule.exclusive}  # the sources' side is never exclusive
        levels = [level for level in _levels(rule, chunk) if level.size]
        spans += [level.span(side) for level in levels for side in sorted(sides)]
    return spans


def _start_spans(rule: _Rule) -> list[_Span]:
    """The first of `_spans`. With the steps up to a source left out: what lies between a pair."""
    return [_Span("start", side) for side in rule.sides]


class _Matrix(NamedTuple):
    """Spans as operands: `sums` [S C, terms C] and `adjoint` [C, terms S C]."""

    sums: np.ndarray
    adjoint: np.ndarray

    @classmethod
    def of(cls, spans: Sequence[_Span], shape: Shape) -> "_Matrix":
        terms = 1 if shape.dtype == F32 else 2
        matrix = np.concatenate([span.matrix(shape.chunk) for span in spans]).astype(shape.dtype)
        return cls(np.tile(matrix, (1, terms)), np.tile(matrix.T, (1, terms)))


def _sums(shape: Shape, matrix: jax.Array, x: jax.Array) -> list[jax.Array]:
    """Sums of float32 [C, lanes] over the spans of a matrix, each [C, lanes]."""
    sums = dot(matrix, rows(*shape.terms(x)))
    return [sums[i : i + shape.chunk] for i in range(0, sums.shape[0], shape.chunk)]


def _adjoint(shape: Shape, matrix: jax.Array, sums: Sequence[jax.Array]) -> jax.Array:
    """The gradient of x in `_sums` from those of its results."""
    return dot(matrix, rows(*shape.terms(rows(*sums))))


# --------------------------------------------------------------------------------------------
# Inside a kernel: decays between pairs of tokens
# --------------------------------------------------------------------------------------------


def _times(shape: Shape, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Token of the target and of the source of each entry of [targets C, sources heads C]."""
    return iota(x.shape, 0) % shape.chunk, iota(x.shape, 1) % shape.chunk


def _causal(rule: _Rule, shape: Shape, x: jax.Array) -> jax.Array:
    """Keeps the pairs whose target sees the source. A select: what it discards can be huge."""
    target, source = _times(shape, x)
    if not rule.before:  # the last target's own source is seen too
        target = jnp.where(iota(x.shape, 0) >= (rule.rows - 1) * shape.chunk, target + 1, target)
    return jnp.where(source < target, x, jnp.zeros_like(x))


def _stacked(shape: Shape, sources: Sequence[jax.Array]) -> jax.Array:
    """[sources heads C, heads K], an operand."""
    return rows(*(shape.stack(x.astype(shape.dtype)) for x in sources))


def _cut(shape: Shape, x: jax.Array) -> list[jax.Array]:
    """[targets C, lanes] by target."""
    return [x[i : i + shape.chunk] for i in range(0, x.shape[0], shape.chunk)]


def _cut_stacked(shape: Shape, x: jax.Array) -> list[jax.Array]:
    """[sources heads C, heads K] by source, wide."""
    return [shape.unstack(x[i : i + shape.wide]) for i in range(0, x.shape[0], shape.wide)]


class _Gradients:
    """Gradients of an item's targets, sources and sums of log decays, added up."""

    def __init__(self):
        self.targets: list[jax.Array] = []
        self.sources: list[jax.Array] = []
        self.sums: dict[_Span, jax.Array] = {}

    def add_sum(self, span: _Span, x: jax.Array) -> None:
        self.sums[span] = self.sums[span] + x if span in self.sums else x


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """What an item has read: float32, wide."""

    rule: _Rule
    shape: Shape
    targets: list[jax.Array]
    sources: list[jax.Array]


class _ScalarPairs:
    """Scores of pairs with one decay a head: a factor between any two tokens, [C, C] a head."""

    def __init__(self, chunk: _Chunk, steps: list[jax.Array], sums_ref):
        """steps: [C, 1] log2 decays of each head."""
        self.chunk = chunk
        rule, shape = chunk.rule, chunk.shape
        lanes = rule.rows * shape.wide
        head = iota((shape.chunk, lanes), 1) // shape.chunk % shape.heads
        steps = self.after_source(_by_lane(steps, head))
        matrix = sums_ref[: len(rule.sides) * shape.chunk]
        between = dict(zip(rule.sides, _sums(shape, matrix, steps), strict=True))
        factor = {side: jnp.exp2(x) for side, x in between.items()}
        self.factor = _causal(rule, shape, rows(*(factor[side] for side in rule.exclusive)))

    def after_source(self, x: jax.Array) -> jax.Array:
        """Keeps entries [C, sources heads C] of tokens after the source."""
        token, source = _times(self.chunk.shape, x)
        return jnp.where(token > source, x, 0.0)

    def scores(self) -> Generator[None, None, jax.Array]:
        shape = self.chunk.shape
        self.left = rows(*(x.astype(shape.dtype) for x in self.chunk.targets))
        self.right = _stacked(shape, self.chunk.sources)
        yield
        self.result = dot(self.left, self.right, NT) * self.factor
        return self.result

    def gradients(self, d_scores: jax.Array, into: _Gradients) -> Generator:
        shape = self.chunk.shape
        self.d_between = dict.fromkeys(self.chunk.rule.sides, 0.0)
        for side, x in zip(
            self.chunk.rule.exclusive, _cut(shape, d_scores * self.result), strict=True
        ):
            self.d_between[side] = self.d_between[side] + x
        d = (d_scores * self.factor).astype(shape.dtype)
        yield
        for i, x in enumerate(_cut(shape, dot(d, self.right))):
            into.targets[i] = into.targets[i] + x
        yield
        for i, x in enumerate(_cut_stacked(shape, dot(d, self.left, TN))):
            into.sources[i] = into.sources[i] + x

    def d_steps(self, adjoint_ref) -> list[jax.Array]:
        """Gradient of each head's log decays by way of the pairs, [C, 1]."""
        shape = self.chunk.shape
        d = _adjoint(shape, adjoint_ref[...], list(self.d_between.values()))
        d = self.after_source(d)
        return _head_sums(d, iota(d.shape, 1) // shape.chunk % shape.heads, shape.heads)


def _by_lane(columns: list[jax.Array], head: jax.Array) -> jax.Array:
    """The column [C, 1] of each lane's head."""
    x = jnp.broadcast_to(columns[0], head.shape)
    for i, column in enumerate(columns[1:], 1):
        x = jnp.where(head == i, jnp.broadcast_to(column, head.shape), x)
    return x


def _head_sums(x: jax.Array, head: jax.Array, heads: int) -> list[jax.Array]:
    """Sums over the lanes of each head, [C, 1]."""
    if heads == 1:
        return [jnp.sum(x, axis=1, keepdims=True)]
    return [jnp.sum(jnp.where(head == i, x, 0.0), axis=1, keepdims=True) for i in range(heads)]


class _VectorPairs:
    """Scores of pairs with a decay a channel, by levels (see `_Level`).

    Where halves are whole registers, only the second halves of the targets take part in a product
    (as its rows), and only the first halves of the sources are scaled; elsewhere the factors of the
    others are zero.
    """

    def __init__(self, chunk: _Chunk, sums: dict[_Span, jax.Array]):
        self.chunk = chunk
        self.sums = sums
        self.levels = _levels(chunk.rule, chunk.shape.chunk)

    def is_cut(self, level: _Level) -> bool:
        whole = 8 if self.chunk.shape.dtype == F32 else 16
        return not level.signed and level.size % whole == 0

    def half(self, level: _Level, x: jax.Array, *, second: bool) -> jax.Array:
        """Of rows [.. C, lanes] those in one half of each 2 `size`; all if the level is not cut."""
        if not self.is_cut(level):
            return x
        size = level.size
        return rows(*(x[i : i + size] for i in range(size * second, x.shape[0], 2 * size)))

    def whole(self, level: _Level, x: jax.Array, *, second: bool) -> jax.Array:
        """Undoes `half`, with zeros in the other half."""
        if not self.is_cut(level):
            return x
        parts = [x[i : i + level.size] for i in range(0, x.shape[0], level.size)]
        zeros = jnp.zeros_like(parts[0])
        pairs = [(zeros, part) if second else (part, zeros) for part in parts]
        return rows(*(x for pair in pairs for x in pair))

    def factors(self, level: _Level) -> tuple[list[jax.Array] | None, jax.Array | None]:
        """Of the halves of each target and of the sources; None for 1."""
        if not level.size:
            return None, None
        sides = set(self.chunk.rule.exclusive)
        targets = {
            side: jnp.exp2(self.half(level, self.sums[level.span(side)], second=True))
            for side in sides
        }
        source = self.half(level, self.sums[level.span(False)], second=False)
        source = jnp.exp2(-source if level.signed else source)
        if not level.signed and not self.is_cut(level):
            second = iota(source.shape, 0) // level.size % 2 == 1
            source = jnp.where(second, 0.0, source)
            targets = {side: jnp.where(second, x, 0.0) for side, x in targets.items()}
        return [targets[side] for side in self.chunk.rule.exclusive], source

    def scaled(self, level: _Level) -> tuple[list[jax.Array], list[jax.Array]]:
        """Halves of targets and sources as operands, wide."""
        dtype = self.chunk.shape.dtype
        targets = [self.half(level, x, second=True) for x in self.chunk.targets]
        sources = [self.half(level, x, second=False) for x in self.chunk.sources]
        on_targets, on_sources = self.factors(level)
        if on_targets is not None:
            targets = [x * factor for x, factor in zip(targets, on_targets, strict=True)]
            sources = [x * on_sources for x in sources]
        return [x.astype(dtype) for x in targets], [x.astype(dtype) for x in sources]

    def right(self, level: _Level, sources: list[jax.Array]) -> jax.Array:
        whole = [self.whole(level, x, second=False) for x in sources]
        return _stacked(self.chunk.shape, whole)

    def inside(self, level: _Level, x: jax.Array, other: jax.Array) -> jax.Array:
        """x at the pairs inside the level's 2 `size` tokens, the other elsewhere."""
        size = max(1, 2 * level.size)
        if size == self.chunk.shape.chunk:
            return x
        target, source = _times(self.chunk.shape, x)
        return jnp.where(target // size == source // size, x, other)

    def scores(self) -> Generator[None, None, jax.Array]:
        self.pairs = {}
        scores = None
        for level in self.levels:
            targets, sources = self.pairs[level] = self.scaled(level)
            left, right = rows(*targets), self.right(level, sources)
            yield
            product = self.whole(level, dot(left, right, NT), second=True)
            other = jnp.zeros_like(product) if scores is None else scores
            scores = self.inside(level, product, other)
        return _causal(self.chunk.rule, self.chunk.shape, scores)

    def gradients(self, d_scores: jax.Array, into: _Gradients) -> Generator:
        shape, exclusive = self.chunk.shape, self.chunk.rule.exclusive
        for level in self.levels:
            targets, sources = self.pairs[level]
            d = self.inside(level, d_scores, jnp.zeros_like(d_scores))
            d = self.half(level, d, second=True).astype(shape.dtype)
            on_targets, on_sources = self.factors(level)
            yield
            d_targets = dot(d, self.right(level, sources))
            size = targets[0].shape[0]
            d_targets = [d_targets[i : i + size] for i in range(0, d_targets.shape[0], size)]
            yield
            d_sources = _cut_stacked(shape, dot(d, rows(*targets), TN))
            d_sources = [self.half(level, x, second=False) for x in d_sources]
            if on_targets is not None:
                # With the operands as they were rounded, pairs without a decay cancel exactly.
                for x, dx, side in zip(targets, d_targets, exclusive, strict=True):
                    x_dx = self.whole(level, x.astype(F32) * dx, second=True)
                    into.add_sum(level.span(side), x_dx)
                for x, dx in zip(sources, d_sources, strict=True):
                    x_dx = self.whole(level, x.astype(F32) * dx, second=False)
                    into.add_sum(level.span(False), -x_dx if level.signed else x_dx)
                d_targets = [x * factor for x, factor in zip(d_targets, on_targets, strict=True)]
                d_sources = [x * on_sources for x in d_sources]
            for i, (d_target, d_source) in enumerate(zip(d_targets, d_sources, strict=True)):
                into.targets[i] = into.targets[i] + self.whole(level, d_target, second=True)
                into.sources[i] = into.sources[i] + self.whole(level, d_source, second=False)


# --------------------------------------------------------------------------------------------
# Kernels
# --------------------------------------------------------------------------------------------


class _Tokens(NamedTuple):
    """Blocks of the recurrence's arguments, or of their gradients: [1, J C, G lanes], the scalar
    decays' [1, 1, J C, G heads]; a and b None in linear attention."""

    r: jax.Array
    w: jax.Array
    k: jax.Array
    v: jax.Array
    a: jax.Array | None = None
    b: jax.Array | None = None

    @property
    def targets(self) -> list:
        return [self.r] if self.a is None else [self.a, self.r]

    @property
    def sources(self) -> list:
        return [self.k] if self.b is None else [self.b, self.k]


@dataclasses.dataclass(frozen=True)
class _Decays:
    """The decays of an item: between its tokens, and from and to the chunk's borders."""

    steps: list[jax.Array] | None  # [C, 1] log2 decay of each head, if scalar
    sums: dict[_Span, jax.Array]  # [C, heads K]
    read: list[jax.Array]  # of each target, [C, heads K]: from the chunk's start
    write: jax.Array  # [C, heads K]: to the chunk's end
    keep: jax.Array  # [1, heads K]: from start to end

    @classmethod
    def of(cls, rule: _Rule, item: Item, w_ref, sums_ref) -> "_Decays":
        shape, steps = item.shape, None
        if rule.scalar:
            log_w = _log2(w_ref[0, 0, item.tokens, :])
            first = item.pack * shape.heads
            steps = [log_w[:, i : i + 1] for i in range(first, first + shape.heads)]
            log_w = _by_lane(steps, iota((shape.chunk, shape.keys), 1) // shape.key)
        else:
            log_w = _log2(item.get_f32(w_ref))
        spans = _spans(rule, shape.chunk)
        sums = dict(zip(spans, _sums(shape, sums_ref[...], log_w), strict=True))
        start = sums[_Span("start", rule.before)]
        total = start[-1:] + log_w[-1:] if rule.before else start[-1:]
        return cls(
            steps,
            sums,
            [jnp.exp2(sums[_Span("start", exclusive)]) for exclusive in rule.exclusive],
            jnp.exp2(sums[_END]),
            jnp.exp2(total),
        )

    def pairs(self, chunk: _Chunk, sums_ref) -> "_ScalarPairs | _VectorPairs":
        if chunk.rule.scalar:
            return _ScalarPairs(chunk, self.steps, sums_ref)
        return _VectorPairs(chunk, self.sums)

    def reads(self, chunk: _Chunk) -> jax.Array:
        """The targets as they meet the state before the chunk: an operand [targets C, heads K]."""
        scaled = [x * factor for x, factor in zip(chunk.targets, self.read, strict=True)]
        return rows(*scaled).astype(chunk.shape.dtype)

    def writes(self, chunk: _Chunk) -> jax.Array:
        """The sources as they reach the state after the chunk: an operand [sources C, heads K]."""
        return rows(*(x * self.write for x in chunk.sources)).astype(chunk.shape.dtype)


def _log2(log_w: jax.Array) -> jax.Array:
    return jnp.maximum(log_w, _NEVER) * LOG2_E


def _read_chunk(rule: _Rule, item: Item, tokens: _Tokens) -> _Chunk:
    targets = [item.get_f32(ref) for ref in tokens.targets]
    sources = [item.get_f32(ref) for ref in tokens.sources]
    return _Chunk(rule, item.shape, targets, sources)


def _from_values(rule: _Rule, shape: Shape, scores: jax.Array, v: jax.Array) -> jax.Array:
    """What targets read of the values written in their chunk, [targets C, heads V]."""
    stacked = shape.stack(v)
    if not rule.delta:
        return dot(scores, stacked)
    if shape.wide % LANES == 0:
        return dot(scores[:, shape.wide :], stacked)
    return dot(scores, rows(jnp.zeros_like(stacked), stacked))  # rather than moving lanes


def _forward_kernel(*refs, rule: _Rule, shape: Shape, packs: int, chunks: int, residuals: bool):
    """References, in this order:

    tokens: r, log_w, k, v (, a, b); start: [1, G, V, heads K] state before the first token;
    sums: the matrix of `_spans`; y [1, J C, G heads V]; end: as start, after the last token;
    if residuals, states: [1, J, G, V, heads K] before each chunk, and with a and b the inverse
    [1, J, G, C, wide] and u [1, J C, G heads V]; scratch: the state carried over the grid's last
    axis, [G, V, heads K].
    """
    inputs = 6 if rule.delta else 4
    tokens = _Tokens(*refs[:inputs])
    start_ref, sums_ref, y_ref, end_ref = refs[inputs : inputs + 4]
    states_ref, inverse_ref, u_ref = (*refs[inputs + 4 : -1], None, None, None)[:3]
    state_ref = refs[-1]
    step = pl.program_id(2)
    carried = {Carried(pack, -1) for pack in range(packs)}

    @pl.when(step == 0)
    def _():
        state_ref[...] = start_ref[0]

    def solve(item: Item) -> Stages:
        size, dtype, pack = shape.chunk, shape.dtype, item.pack
        chunk = _read_chunk(rule, item, tokens)
        decays = _Decays.of(rule, item, tokens.w, sums_ref)
        yield
        pairs = decays.pairs(chunk, sums_ref)
        yield
        scores = yield from pairs.scores()
        reads, writes = decays.reads(chunk), decays.writes(chunk)
        low, v = scores.astype(dtype), item.get_operand(tokens.v)
        yield
        results = _from_values(rule, shape, low, v)
        if rule.delta:
            x = yield from inverse(shape, scores[:size, : shape.wide])
            if residuals:
                inverse_ref[0, item.chunk, pack] = x
        yield Carried(pack, item.chunk - 1)
        state = state_ref[pack]
        if residuals:
            states_ref[0, item.chunk, pack] = state
        results = results + dot(reads, shape.stack(state.astype(dtype)), NT)
        written = v
        if rule.delta:
            z_stack = shape.stack(results[:size].astype(dtype))
            yield
            u = dot(x, z_stack).astype(dtype)
            if residuals:
                item.put(u_ref, u)
            written = rows(u, v)
        yield
        state_ref[pack] = state * decays.keep + shape.unstack(dot(written, writes, TN))
        carried.add(Carried(pack, item.chunk))
        y = results[-size:]
        if rule.delta:
            y = y + dot(low[size:, : shape.wide], shape.stack(u))
        item.put(y_ref, y)

    items = (Item(pack, chunk, shape, packs) for chunk in range(chunks) for pack in range(packs))
    interleave(map(solve, items), carried)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        end_ref[0] = state_ref[...]


def _backward_kernel(*refs, rule: _Rule, shape: Shape, packs: int, chunks: int):
    """References, in this order:

    tokens: as in the forward; states, and with a and b inverse and u: its residuals; dy; dend;
    the matrix of `_spans`, its adjoint, and if scalar that of `_start_spans`;
    gradients of the tokens; dstart; scratch: the gradient of the state after a step.
    """
    refs = list(refs)
    inputs = 6 if rule.delta else 4
    take = lambda count: [refs.pop(0) for _ in range(count)]
    tokens = _Tokens(*take(inputs))
    states_ref, *saved = take(3 if rule.delta else 1)
    inverse_ref, u_ref = saved if rule.delta else (None, None)
    dy_ref, dend_ref, sums_ref, adjoint_ref = take(4)
    (pairs_adjoint_ref,) = take(1) if rule.scalar else (None,)
    gradients = _Tokens(*take(inputs))
    dstart_ref, dstate_ref = refs
    step = pl.program_id(2)
    carried: set[Carried] = set()

    @pl.when(step == 0)
    def _():
        dstate_ref[...] = dend_ref[0]

    def solve(item: Item) -> Stages:
        size, dtype, pack, index = shape.chunk, shape.dtype, item.pack, item.chunk
        chunk = _read_chunk(rule, item, tokens)
        decays = _Decays.of(rule, item, tokens.w, sums_ref)
        yield
        pairs = decays.pairs(chunk, sums_ref)
        yield
        scores = yield from pairs.scores()
        low = scores.astype(dtype)
        reads, writes = decays.reads(chunk), decays.writes(chunk)
        written, dy = [item.get_operand(tokens.v)], item.get_operand(dy_ref)
        yield
        if rule.delta:
            written.insert(0, item.get(u_ref))
            du = shape.unstack(dot(low[size:, : shape.wide], dy, TN))
        if index < chunks - 1:  # the gradient of the state comes from the chunk after this one
            yield Carried(pack, index + 1)
        dstate = dstate_ref[pack]
        dstate_stack = shape.stack(dstate.astype(dtype))
        yield
        d_written = dot(writes, dstate_stack, NT)
        d_results = dy
        if rule.delta:
            du = (du + d_written[:size]).astype(dtype)
            yield
            dz = shape.unstack(dot(inverse_ref[0, index, pack], du, TN)).astype(dtype)
            d_results = rows(dz, dy)
        yield
        before = states_ref[0, index, pack]
        d_keep = jnp.sum(dstate * before, axis=0, keepdims=True) * decays.keep
        dstate_ref[pack] = dstate * decays.keep + shape.unstack(dot(d_results, reads, TN))
        carried.add(Carried(pack, index))
        yield
        dv = _cut_stacked(shape, dot(low, d_results, TN))[-1]
        item.put(gradients.v, dv + d_written[-size:])
        yield
        d_scores = dot(d_results, rows(*map(shape.stack, written)), NT)
        d_scores = _causal(rule, shape, d_scores)
        yield
        into = _Gradients()
        d_reads = _cut(shape, dot(d_results, shape.stack(before.astype(dtype))))
        into.targets = [x * factor for x, factor in zip(d_reads, decays.read, strict=True)]
        for x, dx, exclusive in zip(chunk.targets, into.targets, rule.exclusive, strict=True):
            into.add_sum(_Span("start", exclusive), x * dx)
        yield
        into.sources = [x * decays.write for x in _cut(shape, dot(rows(*written), dstate_stack))]
        for x, dx in zip(chunk.sources, into.sources, strict=True):
            into.add_sum(_END, x * dx)
        yield from pairs.gradients(d_scores, into)
        for ref, dx in zip(gradients.targets, into.targets, strict=True):
            item.put(ref, dx)
        for ref, dx in zip(gradients.sources, into.sources, strict=True):
            item.put(ref, dx)
        yield
        spans = _spans(rule, size)
        dw = d_keep + _adjoint(shape, adjoint_ref[...], [into.sums[span] for span in spans])
        if rule.scalar:
            yield
            _put_scalars(item, gradients.w, dw, pairs.d_steps(pairs_adjoint_ref))
        else:
            item.put(gradients.w, dw)

    last_first = reversed(range(chunks))
    items = (Item(pack, chunk, shape, packs) for chunk in last_first for pack in range(packs))
    interleave(map(solve, items), carried)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        dstart_ref[0] = dstate_ref[...]


def _put_scalars(item: Item, ref, wide: jax.Array, columns: list[jax.Array]) -> None:
    """Adds up the lanes of each head, and what is given a head, into the head's lane of a block."""
    shape = item.shape
    sums = _head_sums(wide, iota(wide.shape, 1) // shape.key, shape.heads)
    window = 0, 0, item.tokens
    block = ref[window]
    lane = iota(block.shape, 1) - item.pack * shape.heads
    for i, (x, y) in enumerate(zip(sums, columns, strict=True)):
        block = jnp.where(lane == i, jnp.broadcast_to(x + y, block.shape), block)
    ref[window] = block


# --------------------------------------------------------------------------------------------
# Calls
# --------------------------------------------------------------------------------------------


def _heads_of_a_pack(key: int, value: int) -> int:
    """The fewest heads whose keys and values fill whole registers of 128 lanes."""
    return next(n for n in (1, 2, 4) if not n * key % LANES and not n * value % LANES)


class _Call(NamedTuple):
    """A kernel call before its arrays are known: the rule, the tile, and how to run it."""

    rule: _Rule
    shape: Shape
    tile: TileConfig
    interpret: object

    def plan(self, batch: int, time: int, heads: int) -> Plan:
        """Of T tokens and H heads, both to be padded."""
        size, each = self.shape.chunk, self.shape.heads
        return Plan(batch, -(-time // size) * size, -(-heads // each), self.shape, self.tile)


def _matrix_specs(matrices: Sequence[np.ndarray]) -> list[pl.BlockSpec]:
    return [pl.BlockSpec(x.shape, lambda i, j, c: (0, 0)) for x in matrices]


def _token_layouts(call: _Call, plan: Plan, *, reverse: bool) -> tuple[list, list]:
    """Specs, and shapes that await a dtype, of r, log_w, k, v (, a, b)."""
    specs, shapes = plan.specs(reverse=reverse), plan.shapes()
    names = ["keys", "keys", "keys", "values"] + ["keys"] * 2 * call.rule.delta
    layouts = [specs[name] for name in names], [shapes[name] for name in names]
    if call.rule.scalar:
        (batch, steps, last), heads = plan.grid, plan.packs * plan.shape.heads
        time = (lambda c: last - 1 - c) if reverse else (lambda c: c)
        block = (1, 1, plan.chunks * plan.shape.chunk, heads)
        layouts[0][1] = pl.BlockSpec(block, lambda i, j, c: (i, j, time(c), 0))
        layouts[1][1] = functools.partial(jax.ShapeDtypeStruct, (batch, steps, plan.time, heads))
    return layouts


def _flops(call: _Call, square: int, mixed: int) -> int:
    """Of `square` products C x C x (K + V) / 2 and `mixed` ones C x K x V."""
    shape = call.shape
    squares = square * shape.chunk * (shape.key + shape.value) // 2
    return 2 * shape.chunk * (squares + mixed * shape.key * shape.value)


def _forward_call(call: _Call, plan: Plan, tokens, start, *, residuals: bool):
    """tokens: r, log_w, k, v (, a, b) as in `_token_layouts`; start [B, P, V, heads K]."""
    rule, shape = call.rule, call.shape
    specs, shapes = plan.specs(reverse=False), plan.shapes()
    token_specs, _ = _token_layouts(call, plan, reverse=False)
    matrices = [_Matrix.of(_spans(rule, shape.chunk), shape).sums]
    out_specs = [specs["values"], specs["state"]]
    out_shape = [shapes["values"](shape.dtype), shapes["state"]]
    if residuals:
        saved = ["states", "inverse", "values"] if rule.delta else ["states"]
        out_specs += [specs[name] for name in saved]
        out_shape += [
            shapes[name](shape.dtype) if name == "values" else shapes[name] for name in saved
        ]
    kernel = functools.partial(
        _forward_kernel,
        rule=rule,
        shape=shape,
        packs=plan.packs,
        chunks=plan.chunks,
        residuals=residuals,
    )
    inputs = [*tokens, start, *matrices]
    flops = _flops(call, 9, 4) if rule.delta else _flops(call, 2, 2)
    return pl.pallas_call(
        kernel,
        grid=plan.grid,
        in_specs=[*token_specs, specs["state"], *_matrix_specs(matrices)],
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=[plan.scratch()],
        **plan.options(),
        cost_estimate=plan.cost(flops, 3, [*inputs, *out_shape]),
        interpret=call.interpret,
        name=rule.name("forward"),
    )(*inputs)


def _backward_call(call: _Call, plan: Plan, tokens, saved, dy, dend):
    """saved: (states, inverse, u) of the forward call, (states,) in linear attention."""
    rule, shape = call.rule, call.shape
    specs, shapes = plan.specs(reverse=True), plan.shapes()
    token_specs, token_shapes = _token_layouts(call, plan, reverse=True)
    matrices = [*_Matrix.of(_spans(rule, shape.chunk), shape)]
    if rule.scalar:
        matrices.append(_Matrix.of(_start_spans(rule), shape).adjoint)
    out_shape = [x(F32 if i == 1 else shape.dtype) for i, x in enumerate(token_shapes)]
    out_shape.append(shapes["state"])
    saved_specs = [specs[name] for name in ("states", "inverse", "values")[: len(saved)]]
    kernel = functools.partial(
        _backward_kernel, rule=rule, shape=shape, packs=plan.packs, chunks=plan.chunks
    )
    inputs = [*tokens, *saved, dy, dend, *matrices]
    flops = _flops(call, 17, 8) if rule.delta else _flops(call, 5, 4)
    return pl.pallas_call(
        kernel,
        grid=plan.grid,
        in_specs=[
            *token_specs,
            *saved_specs,
            specs["values"],
            specs["state"],
            *_matrix_specs(matrices),
        ],
        out_specs=[*token_specs, specs["state"]],
        out_shape=out_shape,
        scratch_shapes=[plan.scratch()],
        **plan.options(),
        cost_estimate=plan.cost(flops, 3, [*inputs, *out_shape]),
        interpret=call.interpret,
        name=rule.name("backward"),
    )(*inputs)


def _plan_of(call: _Call, r: jax.Array) -> Plan:
    return call.plan(*r.shape[:3])


def _pad_scalars(plan: Plan, x: jax.Array) -> jax.Array:
    """[B, T, H, 1] -> [B, S, T', H' / S], S the steps of the grid along the heads."""
    x = pad(x, plan.shape.chunk, plan.shape.heads)
    return x.reshape(*x.shape[:2], plan.grid[1], -1).swapaxes(1, 2)


def _crop_scalars(plan: Plan, x: jax.Array, like: tuple[int, ...]) -> jax.Array:
    """Undoes `_pad_scalars` of an array of shape `like`."""
    return crop(x.swapaxes(1, 2).reshape(plan.batch, plan.time, -1), like)


def _pad_tokens(call: _Call, plan: Plan, tokens: _Tokens) -> list[jax.Array]:
    size, each = call.shape.chunk, call.shape.heads
    padded = [pad(x, size, each) for x in tokens if x is not None]
    if call.rule.scalar:
        padded[1] = _pad_scalars(plan, tokens.w)
    return padded


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _delta_rule(tokens: _Tokens, state: jax.Array, call: _Call):
    return _run_forward(tokens, state, call, residuals=False)[0]


def _run_forward(tokens, state, call, *, residuals):
    plan, each, heads = _plan_of(call, tokens.r), call.shape.heads, tokens.r.shape[2]
    y, end, *saved = _forward_call(
        call, plan, _pad_tokens(call, plan, tokens), pack_state(state, each), residuals=residuals
    )
    return (crop(y, tokens.v.shape), unpack_state(end, heads, each)), (tokens, saved)


def _delta_rule_forward(tokens, state, call):
    return _run_forward(tokens, state, call, residuals=True)


def _delta_rule_backward(call, residuals, cotangents):
    tokens, saved = residuals
    dy, dend = cotangents
    plan, size, each = _plan_of(call, tokens.r), call.shape.chunk, call.shape.heads
    *grads, dstart = _backward_call(
        call,
        plan,
        _pad_tokens(call, plan, tokens),
        saved,
        pad(dy, size, each),
        pack_state(dend, each),
    )
    shapes = [x.shape for x in tokens if x is not None]
    cropped = [
        _crop_scalars(plan, g, like) if i == 1 and call.rule.scalar else crop(g, like)
        for i, (g, like) in enumerate(zip(grads, shapes, strict=True))
    ]
    return _Tokens(*cropped), unpack_state(dstart, tokens.r.shape[2], each)


_delta_rule.defvjp(_delta_rule_forward, _delta_rule_backward)


def _check(tokens: _Tokens, state, read: str, decay_bound: float | None) -> None:
    r, v = tokens.r, tokens.v
    if r.ndim != 4:
        raise ValueError(f"r must be [B, T, H, K], got shape {r.shape}")
    if (tokens.a is None) != (tokens.b is None):
        raise ValueError("a and b must both be given, or both be None")
    if read not in ("after", "before"):
        raise ValueError(f"read must be 'after' or 'before', got {read!r}")
    batch, time, heads, key = r.shape
    if time < 1:
        raise ValueError("delta rule on TPU: T must be at least 1")
    reason = unsupported_reason(
        key, v.shape[-1], r.dtype, scalar=_is_scalar(tokens), decay_bound=decay_bound
    )
    if reason:
        raise ValueError(f"delta rule on TPU: {reason}")
    given = {"k": tokens.k, "a": tokens.a, "b": tokens.b}
    for name, x in given.items():
        if x is not None and x.shape != r.shape:
            raise ValueError(f"{name} has shape {x.shape}, r has {r.shape}")
    if v.shape[:3] != r.shape[:3]:
        raise ValueError(f"v has shape {v.shape}, r has {r.shape}")
    if tokens.w.shape not in (r.shape, (*r.shape[:3], 1)):
        raise ValueError(f"log_w has shape {tokens.w.shape}, r has {r.shape}")
    if state is not None and state.shape != (batch, heads, v.shape[-1], key):
        raise ValueError(f"state has shape {state.shape}, not [B, H, V, K] for r of {r.shape}")
    found = {name: str(x.dtype) for name, x in given.items() if x is not None}
    found |= {"r": str(r.dtype), "v": str(v.dtype)}
    if len(set(found.values())) > 1:
        raise ValueError(f"delta rule on TPU: r, k, v, a, b must share a dtype, got {found}")


def _is_scalar(tokens: _Tokens) -> bool:
    return tokens.w.shape[-1] == 1


def _block(decay_bound: float | None, chunk: int) -> int:
    """Tokens whose decays may be undone relative to their middle; 1 where they have no bound."""
    block = 1
    if decay_bound is not None:
        while block < chunk and block * -decay_bound <= _LARGEST_EXPONENT:
            block *= 2
    return block


def _tile_of(tile: TileConfig, tokens: _Tokens, decay_bound: float | None) -> TileConfig:
    """A device's tile with as many packs and items as these kernels take: twice as many in linear
    attention, whose chains are shorter; half as many in float32, and again where decays a channel
    have no bound, as more would not fit the memory."""
    packs = (8 if tokens.a is not None else 16) * 2 // tokens.r.dtype.itemsize
    if not _is_scalar(tokens) and decay_bound is None:
        packs //= 2
    return dataclasses.replace(tile, max_packs=packs, max_items=2 * packs)


def _make_call(tokens, *, before, decay_bound, tile, interpret) -> _Call:
    key, value = tokens.r.shape[-1], tokens.v.shape[-1]
    heads, delta = _heads_of_a_pack(key, value), tokens.a is not None
    chunk = min(tile.chunk, LANES // heads) if delta else tile.chunk
    scalar = _is_scalar(tokens)
    rule = _Rule(delta, scalar, before, 1 if scalar else _block(decay_bound, chunk))
    shape = Shape(chunk, key, value, heads, jnp.dtype(tokens.r.dtype))
    return _Call(rule, shape, tile, interpret)


def generalized_delta_rule(
    r: jax.Array,  # [B, T, H, K]
    log_w: jax.Array,  # [B, T, H, K] or [B, T, H, 1]
    k: jax.Array,  # [B, T, H, K]
    v: jax.Array,  # [B, T, H, V]
    a: jax.Array | None = None,  # [B, T, H, K]
    b: jax.Array | None = None,  # [B, T, H, K]
    state: jax.Array | None = None,  # [B, H, V, K]
    *,
    read: Literal["after", "before"] = "after",
    decay_bound: float | None = None,
    tile: TileConfig | None = None,
    interpret=False,
) -> tuple[jax.Array, jax.Array]:
    """The general delta rule on a TPU, differentiable in every array.

    S_t = S_{t-1} diag(exp(log_w_t)) + (S_{t-1} a_t) b_t^T + v_t k_t^T and y_t = S_t r_t, or
    S_{t-1} r_t where `read` is "before".

    Args:
      r, k, v, a, b: bfloat16 or float32, all of one dtype. It decides the products' precision:
        one bfloat16 pass or full float32; state, exponents and sums are float32 either way.
        Without a and b: linear attention.
      log_w: log decay of each channel, or of each head, at most 0; read as float32. -inf forgets
        all that was written before, and has no gradient.
      state: state before the first token, rows are values; zeros if None.
      read: whether y_t sees what token t writes.
      decay_bound: every log_w is at least this; of decays a channel only. A bound saves work: down
        to -5 about half of the products between pairs. Decays below it can overflow.
      tile: see `TileConfig`; its chunk is cut where more than two heads share lanes; default: that
        of the device.
      interpret: True or `pltpu.InterpretParams` to run on a CPU, for tests.

    Returns:
      y [B, T, H, V] in v's dtype, and the final state [B, H, V, K] in float32.

    Raises:
      ValueError: unsupported sizes or dtype, or arguments that disagree.
    """
    tokens = _Tokens(r, log_w.astype(F32), k, v, a, b)
    _check(tokens, state, read, decay_bound)
    call = _make_call(
        tokens,
        before=read == "before",
        decay_bound=decay_bound,
        tile=_tile_of(default_tile(), tokens, decay_bound) if tile is None else tile,
        interpret=interpret,
    )
    if state is None:
        state = jnp.zeros((r.shape[0], r.shape[2], v.shape[-1], r.shape[-1]), F32)
    return _delta_rule(tokens, state.astype(F32), call)
