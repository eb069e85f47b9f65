"""WKV-7 for NVIDIA GPUs: the chunked recurrence and its gradient, through Pallas' Triton backend.

Same contract and mathematics as wkv7_tpu.py, laid out for a GPU: one program a sequence, head and
block of value channels (which do not depend on one another) walks the chunks with its state in
registers; chunks are small (16 or 32 tokens), so that everything of a chunk stays in registers
too. The forward keeps the state before every chunk; the backward
walks the chunks in reverse and recomputes the rest from it.

The backend is deprecated from jax 0.11 on, but still what runs on Ampere and Hopper alike; it is
imported where a kernel is built.

Sizes: a chunk is C tokens, solved at once; a block of values is the value channels of a program.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import common
from pallas_kernels.common import F32, NT, TN, dot, iota, triton


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """How a program works.

    Attributes:
      chunk: tokens solved at once, C: 16 or 32. Smaller needs fewer registers; larger keeps fewer
        states for the backward (one float32 [V, K] a chunk and head).
      value_block: value channels a program, a power of two from 16.
      forward_warps, backward_warps: warps a program.
    """

    chunk: int = 16
    value_block: int = 64
    forward_warps: int = 4
    backward_warps: int = 8

    def __post_init__(self):
        if self.chunk not in (16, 32):
            raise ValueError(f"chunk must be 16 or 32, got {self.chunk}")
        if self.value_block not in (16, 32, 64, 128):
            raise ValueError(f"value_block must be 16, 32, 64 or 128, got {self.value_block}")
        for name in ("forward_warps", "backward_warps"):
            if getattr(self, name) not in (1, 2, 4, 8, 16):
                raise ValueError(f"{name} must be 1, 2, 4, 8 or 16, got {getattr(self, name)}")


def default_tile(head_size: int) -> TileConfig:
    """The largest tile that does not spill registers on an H100, for bfloat16 inputs."""
    return TileConfig() if head_size <= 64 else TileConfig(value_block=16)


def unsupported_reason(head_size: int, value_size: int, dtype: jax.typing.DTypeLike) -> str | None:
    """Why these kernels cannot take such inputs; None if they can."""
    return common.unsupported_reason(head_size, value_size, dtype) or common.missing_triton()


def _inverse(ab: jax.Array, dtype) -> jax.Array:
    """(I - ab)^-1 of a strictly lower ab [C, C] by exact merging of ever larger blocks."""
    size = ab.shape[0]
    row, column = iota(ab.shape, 0), iota(ab.shape, 1)
    x = jnp.where(row == column, 1.0, 0.0)
    block = 1
    while block < size:
        merged = (row // (2 * block) == column // (2 * block)) & (row // block != column // block)
        corner = jnp.where(merged, ab, 0.0)
        if block == 1:
            x = x + corner
        else:
            half = dot(x.astype(dtype), corner.astype(dtype))
            x = x + dot(half.astype(dtype), x.astype(dtype))
        block *= 2
    return x.astype(dtype)


@dataclasses.dataclass(frozen=True)
class _Documents:
    """Which packed document each token of a chunk is of, as numbers that never decrease."""

    tokens: jax.Array  # [C]
    before: jax.Array  # of the token before the chunk
    last: jax.Array  # of the chunk's last token

    @classmethod
    def load(cls, ref, rows, chunk: int) -> "_Documents":
        before = jnp.where(rows.start > 0, ref[jnp.maximum(rows.start, 1) - 1], 0)
        return cls(ref[rows], before, ref[rows.start + chunk - 1])

    def same(self) -> jax.Array:
        return self.tokens[:, None] == self.tokens[None, :]

    def later(self) -> jax.Array:
        """Ones for the tokens of the own document from each token on, float32 [C, C]."""
        size = self.tokens.shape[0]
        row, column = iota((size, size), 0), iota((size, size), 1)
        return jnp.where(self.same() & (column >= row), 1.0, 0.0)


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """Operands of a chunk, their decays taken relative to the middle row; scales as [C, K]."""

    a: jax.Array
    r: jax.Array
    b: jax.Array
    k: jax.Array
    v: jax.Array
    a_scale: jax.Array
    r_scale: jax.Array
    inverse_scale: jax.Array  # of b and k
    to_middle: jax.Array  # [1, K] decay from the chunk's start to its middle
    to_end: jax.Array  # [1, K] from its middle to its end
    documents: _Documents | None  # None: all tokens are of one

    @classmethod
    def load(cls, refs, rows, dtype, documents: _Documents | None) -> "_Chunk":
        r, log_w, k, v, a, b = (ref[rows, :] for ref in refs)
        inclusive = jnp.cumsum(log_w, axis=0)
        first_half = iota(log_w.shape, 0) < log_w.shape[0] // 2
        middle = jnp.sum(jnp.where(first_half, log_w, 0.0), axis=0, keepdims=True)
        last = jnp.sum(log_w, axis=0, keepdims=True)
        a_scale, r_scale = jnp.exp(inclusive - log_w - middle), jnp.exp(inclusive - middle)
        inverse_scale = jnp.exp(middle - inclusive)

        def scaled(x, scale):
            return (x.astype(F32) * scale).astype(dtype)

        return cls(
            a=scaled(a, a_scale),
            r=scaled(r, r_scale),
            b=scaled(b, inverse_scale),
            k=scaled(k, inverse_scale),
            v=v.astype(dtype),
            a_scale=a_scale,
            r_scale=r_scale,
            inverse_scale=inverse_scale,
            to_middle=jnp.exp(middle),
            to_end=jnp.exp(last - middle),
            documents=documents,
        )

    def scores(self, targets: jax.Array, sources: jax.Array, *, strict: bool) -> jax.Array:
        """[C, C] products with later sources dropped; a select, as those can be huge."""
        product = dot(targets, sources, NT)
        row, column = iota(product.shape, 0), iota(product.shape, 1)
        keep = row > column if strict else row >= column
        if self.documents is not None:
            keep &= self.documents.same()
        return jnp.where(keep, product, 0.0)

    def reading(self, x: jax.Array) -> jax.Array:
        """x [C, n] without rows of tokens that do not read the state before the chunk."""
        if self.documents is None:
            return x
        return jnp.where((self.documents.tokens == self.documents.before)[:, None], x, 0)

    def writing(self, x: jax.Array) -> jax.Array:
        """x [C, n] without rows of tokens that do not reach the state after the chunk."""
        if self.documents is None:
            return x
        return jnp.where((self.documents.tokens == self.documents.last)[:, None], x, 0)

    def crossing(self, state: jax.Array) -> jax.Array:
        """What of the state before the chunk is left after it: all or nothing."""
        if self.documents is None:
            return state
        return jnp.where(self.documents.before == self.documents.last, state, 0)

    def removed(self, state: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """u (what each removal key reads) [C, V], the inverse and ak [C, C], for the state scaled
        to the middle, [V, K]."""
        dtype = self.v.dtype
        inverse = _inverse(self.scores(self.a, self.b, strict=True), dtype)
        ak = self.scores(self.a, self.k, strict=True).astype(dtype)
        z = self.reading(dot(self.a, state, NT)) + dot(ak, self.v)
        return dot(inverse, z.astype(dtype)).astype(dtype), inverse, ak


def _forward_kernel(
    r_ref, w_ref, k_ref, v_ref, a_ref, b_ref,  # [T, K]; v: [T, V], V being the program's block
    start_ref,  # [V, K]
    *others,  # if packed: documents [T]; y [T, V]; end [V, K]; if residuals: states [N, V, K]
    chunk: int,
    dtype,
    packed: int,  # arrays of documents: 1 or 0
):  # fmt: skip
    documents_ref, (y_ref, end_ref, *states_ref) = others[:packed], others[packed:]
    refs = (r_ref, w_ref, k_ref, v_ref, a_ref, b_ref)

    def step(c, state):
        rows = pl.ds(c * chunk, chunk)
        if states_ref:
            states_ref[0][c] = state
        documents = _Documents.load(documents_ref[0], rows, chunk) if packed else None
        x = _Chunk.load(refs, rows, dtype, documents)
        state = state * x.to_middle
        operand = state.astype(dtype)
        u, _, _ = x.removed(operand)
        rb = x.scores(x.r, x.b, strict=False).astype(dtype)
        rk = x.scores(x.r, x.k, strict=False).astype(dtype)
        y = x.reading(dot(x.r, operand, NT)) + dot(rb, u) + dot(rk, x.v)
        y_ref[rows, :] = y.astype(y_ref.dtype)
        state = x.crossing(state) + dot(u, x.writing(x.b), TN) + dot(x.v, x.writing(x.k), TN)
        return state * x.to_end

    end_ref[...] = lax.fori_loop(0, r_ref.shape[0] // chunk, step, start_ref[...])


def _backward_kernel(
    r_ref, w_ref, k_ref, v_ref, a_ref, b_ref,  # [T, K]; v: [T, V], V being the program's block
    states_ref,  # [N, V, K]
    end_ref,  # [V, K]
    dy_ref,  # [T, V]
    dend_ref,  # [V, K]
    *others,  # if packed: documents [T]; gradients as the inputs, this block's share; and of the
    # first state, [V, K]
    chunk: int,
    dtype,
    packed: int,
):  # fmt: skip
    documents_ref, others = others[:packed], others[packed:]
    dr_ref, dw_ref, dk_ref, dv_ref, da_ref, db_ref, dstart_ref = others
    refs = (r_ref, w_ref, k_ref, v_ref, a_ref, b_ref)
    chunks = r_ref.shape[0] // chunk

    def step(i, carry):
        dstate, dlast = carry  # gradient of the state after the chunk; of its total log decay
        c = chunks - 1 - i
        rows = pl.ds(c * chunk, chunk)
        documents = _Documents.load(documents_ref[0], rows, chunk) if packed else None
        x = _Chunk.load(refs, rows, dtype, documents)
        before = states_ref[c]
        state = (before * x.to_middle).astype(dtype)
        u, inverse, ak = x.removed(state)
        dy = dy_ref[rows, :].astype(dtype)
        dstate = dstate * x.to_end
        dend = dstate.astype(dtype)

        rb = x.scores(x.r, x.b, strict=False).astype(dtype)
        du = dot(rb, dy, TN) + x.writing(dot(x.b, dend, NT))
        dz = dot(inverse, du.astype(dtype), TN).astype(dtype)
        rk = x.scores(x.r, x.k, strict=False).astype(dtype)
        dv = dot(rk, dy, TN) + x.writing(dot(x.k, dend, NT)) + dot(ak, dz, TN)
        dv_ref[rows, :] = dv.astype(dv_ref.dtype)

        dab = x.scores(dz, u, strict=True).astype(dtype)
        dak = x.scores(dz, x.v, strict=True).astype(dtype)
        drb = x.scores(dy, u, strict=False).astype(dtype)
        drk = x.scores(dy, x.v, strict=False).astype(dtype)
        da = (dot(dab, x.b) + dot(dak, x.k) + x.reading(dot(dz, state))) * x.a_scale
        dr = (dot(drb, x.b) + dot(drk, x.k) + x.reading(dot(dy, state))) * x.r_scale
        db = dot(dab, x.a, TN) + dot(drb, x.r, TN) + x.writing(dot(u, dend))
        dk = dot(dak, x.a, TN) + dot(drk, x.r, TN) + x.writing(dot(x.v, dend))
        db, dk = db * x.inverse_scale, dk * x.inverse_scale

        a_da = a_ref[rows, :].astype(F32) * da
        dlog = r_ref[rows, :].astype(F32) * dr + a_da
        dlog -= b_ref[rows, :].astype(F32) * db + k_ref[rows, :].astype(F32) * dk
        # Sum from each row to the chunk's end; a's decay excludes its own row.
        if packed:
            after = dot(documents.later(), dlog)
            dlast = x.writing(jnp.broadcast_to(dlast, dlog.shape))
        else:
            after = jnp.sum(dlog, axis=0, keepdims=True) - jnp.cumsum(dlog, axis=0) + dlog
        dw_ref[rows, :] = after - a_da + dlast
        for ref, value in ((dr_ref, dr), (dk_ref, dk), (da_ref, da), (db_ref, db)):
            ref[rows, :] = value.astype(ref.dtype)

        dstate = x.crossing(dstate) + dot(dz, x.reading(x.a), TN) + dot(dy, x.reading(x.r), TN)
        dstate = dstate * x.to_middle
        return dstate, jnp.sum(dstate * before, axis=0, keepdims=True)

    dend = dend_ref[...]
    dlast = jnp.sum(dend * end_ref[...], axis=0, keepdims=True)
    dstart_ref[...], _ = lax.fori_loop(0, chunks, step, (dend, dlast))


def _specs(shape: tuple[int, ...], tile: TileConfig) -> dict[str, pl.BlockSpec]:
    """Blocks of arrays for the grid (B, H, blocks of V)."""
    _, time, _, head = shape
    block = min(tile.value_block, head)
    states = (None, time // tile.chunk, None, block, head)
    return {
        "keys": pl.BlockSpec((None, time, None, head), lambda i, j, n: (i, 0, j, 0)),
        "values": pl.BlockSpec((None, time, None, block), lambda i, j, n: (i, 0, j, n)),
        "documents": pl.BlockSpec((None, time), lambda i, j, n: (i, 0)),
        "state": pl.BlockSpec((None, None, block, head), lambda i, j, n: (i, j, n, 0)),
        "states": pl.BlockSpec(states, lambda i, j, n: (i, 0, j, n, 0)),
        "shares": pl.BlockSpec((None, None, time, None, head), lambda i, j, n: (n, i, 0, j, 0)),
    }


def _grid(shape: tuple[int, ...], tile: TileConfig) -> tuple[int, int, int]:
    batch, _, heads, head = shape
    return batch, heads, head // min(tile.value_block, head)


def _token_specs(specs: dict[str, pl.BlockSpec]) -> list[pl.BlockSpec]:
    return [specs["values"] if name == "v" else specs["keys"] for name in "rwkvab"]


def _cost(shape, square: int, mixed: int, chunk: int, arrays) -> pl.CostEstimate:
    """Useful work: `square` products C x C x K and `mixed` ones C x K x V a chunk and head."""
    batch, time, heads, head = shape
    return pl.CostEstimate(
        flops=2 * batch * heads * time * head * (square * chunk + mixed * head),
        transcendentals=3 * batch * time * heads * head,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
    )


def _forward_call(tokens, start, documents, *, tile, residuals, interpret):
    r = tokens[0]
    batch, time, heads, head = r.shape
    specs = _specs(r.shape, tile)
    out_specs = [specs["values"], specs["state"]]
    out_shape = [
        jax.ShapeDtypeStruct(r.shape, r.dtype),
        jax.ShapeDtypeStruct(start.shape, F32),
    ]
    if residuals:
        states = (batch, time // tile.chunk, heads, head, head)
        out_specs.append(specs["states"])
        out_shape.append(jax.ShapeDtypeStruct(states, F32))
    return pl.pallas_call(
        functools.partial(_forward_kernel, chunk=tile.chunk, dtype=r.dtype, packed=len(documents)),
        grid=_grid(r.shape, tile),
        in_specs=[*_token_specs(specs), specs["state"], *[specs["documents"]] * len(documents)],
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=triton().CompilerParams(num_warps=tile.forward_warps, num_stages=1),
        cost_estimate=_cost(r.shape, 9, 4, tile.chunk, [*tokens, start, *out_shape]),
        interpret=interpret,
        name="wkv7_forward",
    )(*tokens, start, *documents)


def _backward_call(tokens, states, end, dy, dend, documents, *, tile, interpret):
    r = tokens[0]
    grid = _grid(r.shape, tile)
    specs = _specs(r.shape, tile)
    # Gradients of what all value blocks share leave the kernel as one float32 share a block.
    out_specs, out_shape = [], []
    for name, x in zip("rwkvab", tokens, strict=True):
        dtype = F32 if name == "w" or (grid[2] > 1 and name != "v") else x.dtype
        shape = x.shape if name == "v" else (grid[2], *x.shape)
        out_specs.append(specs["values"] if name == "v" else specs["shares"])
        out_shape.append(jax.ShapeDtypeStruct(shape, dtype))
    inputs = (*tokens, states, end, dy, dend)
    *shares, dstart = pl.pallas_call(
        functools.partial(_backward_kernel, chunk=tile.chunk, dtype=r.dtype, packed=len(documents)),
        grid=grid,
        in_specs=[
            *_token_specs(specs),
            specs["states"],
            specs["state"],
            specs["values"],
            specs["state"],
            *[specs["documents"]] * len(documents),
        ],
        out_specs=[*out_specs, specs["state"]],
        out_shape=[*out_shape, jax.ShapeDtypeStruct(end.shape, F32)],
        compiler_params=triton().CompilerParams(num_warps=tile.backward_warps, num_stages=1),
        cost_estimate=_cost(r.shape, 22, 9, tile.chunk, [*inputs, *out_shape]),
        interpret=interpret,
        name="wkv7_backward",
    )(*inputs, *documents)
    grads = [
        x if name == "v" else jnp.sum(x, axis=0).astype(F32 if name == "w" else r.dtype)
        for name, x in zip("rwkvab", shares, strict=True)
    ]
    return (*grads, dstart)


def _pad(x: jax.Array, chunk: int) -> jax.Array:
    """Whole chunks; zeros change no state."""
    more = -x.shape[1] % chunk
    return jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) if more else x


def _documents(fresh: jax.Array | None, chunk: int) -> list[jax.Array]:
    """Numbers of the documents, int32 [B, T'] of whole chunks, as a list of one; nothing without
    `fresh`, [B, T] bool, which says where they begin."""
    if fresh is None:
        return []
    fresh = jnp.pad(fresh, ((0, 0), (0, -fresh.shape[1] % chunk)))
    return [jnp.cumsum(fresh, axis=1, dtype=jnp.int32)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9))
def _wkv7(r, log_w, k, v, a, b, state, fresh, tile, interpret):
    tokens = tuple(_pad(x, tile.chunk) for x in (r, log_w, k, v, a, b))
    documents = _documents(fresh, tile.chunk)
    y, end = _forward_call(
        tokens, state, documents, tile=tile, residuals=False, interpret=interpret
    )
    return y[:, : r.shape[1]], end


def _wkv7_forward(r, log_w, k, v, a, b, state, fresh, tile, interpret):
    inputs = (r, log_w, k, v, a, b)
    tokens = tuple(_pad(x, tile.chunk) for x in inputs)
    documents = _documents(fresh, tile.chunk)
    y, end, states = _forward_call(
        tokens, state, documents, tile=tile, residuals=True, interpret=interpret
    )
    return (y[:, : r.shape[1]], end), (inputs, fresh, states, end)


def _wkv7_backward(tile, interpret, residuals, cotangents):
    inputs, fresh, states, end = residuals
    dy, dend = cotangents
    tokens = tuple(_pad(x, tile.chunk) for x in inputs)
    *grads, dstart = _backward_call(
        *(tokens, states, end, _pad(dy, tile.chunk), dend, _documents(fresh, tile.chunk)),
        tile=tile,
        interpret=interpret,
    )
    return (*(g[:, : dy.shape[1]] for g in grads), dstart, None)


_wkv7.defvjp(_wkv7_forward, _wkv7_backward)


def wkv7(
    r: jax.Array,  # [B, T, H, K]
    log_w: jax.Array,  # [B, T, H, K]
    k: jax.Array,  # [B, T, H, K]
    v: jax.Array,  # [B, T, H, V], V = K
    a: jax.Array,  # [B, T, H, K]
    b: jax.Array,  # [B, T, H, K]
    state: jax.Array | None = None,  # [B, H, V, K]
    *,
    fresh: jax.Array | None = None,  # [B, T]
    tile: TileConfig | None = None,
    interpret=False,
) -> tuple[jax.Array, jax.Array]:
    """The WKV-7 recurrence on an NVIDIA GPU, differentiable in every array.

    Arguments, results and errors are those of `pallas_kernels.wkv7_tpu.wkv7`.
    """
    _check(r, log_w, k, v, a, b, state, fresh)
    if state is None:
        batch, _, heads, head = r.shape
        state = jnp.zeros((batch, heads, head, head), F32)
    tile = default_tile(r.shape[-1]) if tile is None else tile
    return _wkv7(r, log_w.astype(F32), k, v, a, b, state.astype(F32), fresh, tile, interpret)


def _check(r, log_w, k, v, a, b, state, fresh) -> None:
    if r.ndim != 4 or r.shape[1] < 1:
        raise ValueError(f"r must be [B, T, H, K] with T at least 1, got shape {r.shape}")
    batch, _, heads, head = r.shape
    reason = unsupported_reason(head, v.shape[-1], r.dtype)
    if reason:
        raise ValueError(f"wkv7 on GPU: {reason}")
    for name, x in {"log_w": log_w, "k": k, "v": v, "a": a, "b": b}.items():
        if x.shape != r.shape:
            raise ValueError(f"{name} has shape {x.shape}, r has {r.shape}")
        if name != "log_w" and x.dtype != r.dtype:
            raise ValueError(f"{name} is {x.dtype}, r is {r.dtype}; they must share a dtype")
    if state is not None and state.shape != (batch, heads, head, head):
        raise ValueError(f"state has shape {state.shape}, not [B, H, V, K] for r of {r.shape}")
    if fresh is not None and fresh.shape != r.shape[:2]:
        raise ValueError(f"fresh has shape {fresh.shape}, not [B, T] for r of {r.shape}")
