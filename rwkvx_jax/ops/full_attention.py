"""Dense causal attention, the baseline that sparse attention is measured against.

One op, the strongest form we know on each platform: query blocks visiting only the key blocks up to
the causal frontier on CPU (and wherever nothing better fits), JAX's splash-attention kernel on TPU,
cuDNN on GPU. None of them holds a [T, T] array; the quadratic oracle is for tests.
"""

import functools
import numbers
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rwkvx_jax.ops import blocked_attention as blocked
from rwkvx_jax.ops.attention_inputs import (
    NO_FORWARD_MODE,
    Offset,
    check_attention_inputs,
    check_scale,
    check_window,
    rows_of,
    run_attention,
)
from rwkvx_jax.ops.attention_reference import full_attention_reference
from rwkvx_jax.ops.derivatives import reverse_only
from rwkvx_jax.ops.dispatch import Candidate, resolve
from rwkvx_jax.ops.documents import NO_DOCUMENTS, check_segment_ids, first_keys
from rwkvx_jax.ops.heads import map_heads

# Blocks of the splash kernel, lengths below which the whole sequence is one block.
SPLASH_QUERIES = 512
SPLASH_KEYS = 1024
SPLASH_COMPUTE = 512


def full_attention(
    q: Float[Array, "B Tq H K"],
    k: Float[Array, "B Tk G K"],
    v: Float[Array, "B Tk G V"],
    *,
    q_offset: Offset = 0,
    segment_ids: Int[Array, "B Tk"] | None = None,
    window: int | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B Tq H V"]:
    """Causal attention of every query to all keys at or before its position, or to the last ones.

    Args:
      q: [B, Tq, H, K] queries; the first of row b stands at absolute position q_offset[b].
      k: [B, Tk, G, K] keys from position 0, those of the queries included. G divides H, and query
        head h reads key head h // (H / G).
      v: [B, Tk, G, V] values.
      q_offset: int, integer scalar or integer [B] (may be traced). Outputs at positions beyond the
        last key are meaningless but finite.
      segment_ids: numbers of packed documents (`documents`), of the keys and so of the queries at
        their positions: no key of another document is read. None: all tokens are of one.
      window: each query reads so many keys, its own position included (fewer where its text
        begins); the time then grows with Tq * window. None: all.
      scale: factor on q . k, a positive float; default 1 / sqrt(K).
      implementation: "reference" (float32, quadratic memory), "blocked", "splash" (TPU),
        "cudnn" (GPU), or None to choose by platform, shapes and dtype.

    Returns:
      [B, Tq, H, V] in q's dtype, differentiable in q, k, v in reverse mode ("reference" in both).

    Raises:
      ValueError: on shapes or dtypes that do not fit, segment_ids that number no documents, a
        window that is no positive int, a named implementation that cannot run here, or forward-mode
        differentiation of another than "reference".
    """
    check_attention_inputs(q, k, v, q_offset)
    check_window(window)
    scale = check_scale(scale, q.shape[-1])
    if segment_ids is not None:
        check_segment_ids("full_attention", segment_ids, *k.shape[:2])
    cudnn_obstacle = lambda _: _cudnn_obstacle(q, k, v, q_offset, segment_ids)
    candidates = (
        Candidate("splash", ("tpu",), lambda _: _splash_obstacle(q, k, v, q_offset)),
        Candidate("cudnn", ("gpu",), cudnn_obstacle),
        Candidate("blocked"),
        Candidate("reference"),
    )
    chosen = resolve("full_attention", implementation, candidates)
    if chosen != "reference":
        q, k, v = reverse_only(NO_FORWARD_MODE.format("full_attention"), q, k, v)
    run = functools.partial(_IMPLEMENTATIONS[chosen], scale=scale, window=window)
    by_xla = chosen in ("blocked", "reference")
    return run_attention(run, (q, k, v), q_offset, segment_ids=segment_ids, check_vma=by_xla)


def _splash_obstacle(q, k, v, q_offset) -> str | None:
    """Why the splash kernel cannot compute this call, None if it can."""
    if not isinstance(q_offset, numbers.Integral):
        return "q_offset is an array and the splash kernel's mask is static"
    if q.dtype != jnp.bfloat16:
        return f"dtype is {q.dtype} and the splash kernel multiplies in bfloat16"
    if q.shape[-1] % 64 or v.shape[-1] % 64:
        return f"head sizes {q.shape[-1]}, {v.shape[-1]} are not multiples of 64"
    return None


def _cudnn_obstacle(q, k, v, q_offset, segment_ids) -> str | None:
    """Why cuDNN cannot compute this call, None if it can."""
    if segment_ids is not None:
        return NO_DOCUMENTS
    if not isinstance(q_offset, numbers.Integral) or q_offset != 0:
        return f"q_offset is {q_offset} and cuDNN's causal mask starts at position 0"
    if q.shape[1] != k.shape[1]:
        return f"{q.shape[1]} queries and {k.shape[1]} keys: the causal mask needs as many of each"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtype is {q.dtype} and cuDNN takes bfloat16 or float16"
    if q.shape[-1] != v.shape[-1] or q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"head sizes {q.shape[-1]}, {v.shape[-1]} are not one multiple of 8 up to 128"
    return None


def _cudnn_attention(q, k, v, *, scale, q_offset, window):
    del q_offset  # 0, or cuDNN is not chosen
    local = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=True, local_window_size=local, implementation="cudnn"
    )


def _splash_attention(q, k, v, *, scale, q_offset, window=None, starts=None, interpret=False):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, keys, heads = q.shape[1], k.shape[1], q.shape[2]
    rows, cols = _splash_block(length, SPLASH_QUERIES), _splash_block(keys, SPLASH_KEYS)
    compute = min(cols, SPLASH_COMPUTE)
    cols = -(-cols // compute) * compute  # the kernel computes whole parts of a block
    sizes = splash.BlockSizes(
        block_q=rows,
        block_kv=cols,
        block_kv_compute=compute,
        block_q_dkv=rows,
        block_kv_dkv=cols,
        block_kv_dkv_compute=compute,
        use_fused_bwd_kernel=True,
    )
    # Padding keys lie after every real query, where the causal mask hides them. In a window, every
    # padding query needs one, too: one that sees nothing would make gradients NaN.
    q = _pad_time(q * scale, rows)
    missing = 0 if window is None else max(0, q_offset + q.shape[1] - keys)
    k, v = (_pad_time(x, cols, missing) for x in (k, v))
    shape = q.shape[1], k.shape[1]
    if window is None:
        mask = splash.CausalMask(shape, offset=q_offset)
    else:
        mask = splash.LocalMask(shape, (window - 1, 0), q_offset)
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * heads), block_sizes=sizes, interpret=interpret
    )
    arrays = tuple(jnp.moveaxis(x, 2, 1) for x in (q, k, v))
    if starts is None:
        out = jax.vmap(kernel)(*arrays)
    else:  # where a document begins is as good a number for it as any
        edge = lambda x, size: jnp.pad(x, ((0, 0), (0, size - x.shape[1])), mode="edge")
        of_queries = edge(starts[:, q_offset : q_offset + length], q.shape[1])
        ids = splash.SegmentIds(q=of_queries, kv=edge(starts, k.shape[1]))
        out = jax.vmap(kernel)(*arrays, ids)
    return jnp.moveaxis(out, 1, 2)[:, :length].astype(q.dtype)


def _splash_block(length: int, largest: int) -> int:
    """Block length: a multiple of the 128 lanes, no longer than the padded sequence."""
    return min(largest, -(-length // 128) * 128)


def _pad_time(x, multiple, least=0):
    """x with at least so many tokens of zeros behind it, to a multiple."""
    length = x.shape[1] + least
    return jnp.pad(x, ((0, 0), (0, least + -length % multiple), (0, 0), (0, 0)))


def _blocked_attention(q, k, v, *, scale, q_offset, window, starts=None):
    return _blocked(q, k, v, rows_of(q_offset, starts, q.shape[0]), scale, window)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _blocked(q, k, v, rows, scale, window):
    return _blocked_fwd(q, k, v, rows, scale, window)[0]


def _first(starts, offset, q):
    return None if starts is None else first_keys(starts, offset, q.shape[0])


def _blocked_fwd(q, k, v, rows, scale, window):
    def forward(q, k, v, offset, starts=None):
        options = {"scale": scale, "window": window, "first": _first(starts, offset, q)}
        running = blocked.causal_forward(q, k[:, 0], v[:, 0], offset, **options)
        return blocked.softmax_finish(running, scale)

    out, lse = map_heads(forward, (q, k, v), rows)
    out = out.astype(q.dtype)
    return out, (q, k, v, rows, out, lse)


def _blocked_bwd(scale, window, saved, grad):
    q, k, v, rows, out, lse = saved

    def backward(q, k, v, out, lse, grad, offset, starts=None):
        delta = blocked.output_dot(grad, out)
        k, v, first = k[:, 0], v[:, 0], _first(starts, offset, q)
        options = {"scale": scale, "window": window, "first": first}
        dq, dk, dv = blocked.causal_backward(q, k, v, grad, lse, delta, offset, **options)
        return dq, dk[:, None], dv[:, None]

    dq, dk, dv = map_heads(backward, (q, k, v, out, lse, grad), rows)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_blocked.defvjp(_blocked_fwd, _blocked_bwd)


_IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "splash": _splash_attention,
    "cudnn": _cudnn_attention,
    "blocked": _blocked_attention,
    "reference": full_attention_reference,
}
