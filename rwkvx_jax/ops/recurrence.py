"""The RWKV-7 recurrence: the public op `wkv7`, its float32 oracle, and the map of a segment.

`wkv7` checks its arguments, lets `dispatch` choose an implementation and runs it. All of them
compute the same function in float32 inside; they differ in speed and in what the backward pass
keeps. Mathematics: RWKV-7 "Goose" (arXiv 2503.14456), section 4.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from rwkvx_jax.ops.derivatives import reverse_only
from rwkvx_jax.ops.dispatch import Candidate, current_platform, missing_module, resolve
from rwkvx_jax.ops.documents import beginnings, check_segment_ids
from rwkvx_jax.ops.placement import local, vary_together
from rwkvx_jax.ops.recurrence_checks import check_arrays, check_chunk_size, lowest_decay
from rwkvx_jax.ops.recurrence_chunked import MAX_EXPONENT, wkv7_chunked
from rwkvx_jax.ops.recurrence_sequential import sequential
from rwkvx_jax.ops.segments import CHUNK_SIZE, SEGMENT, Plan

_NO_FORWARD_MODE = (
    "wkv7: only implementation='sequential' can be differentiated in forward mode (jvp, jacfwd, "
    "linearize); all others have a reverse mode of their own (grad, vjp, and hessian over it)"
)

# Each module has `wkv7(r, log_w, k, v, a, b, state, fresh)` and `unsupported_reason(K, V, dtype)`.
_KERNELS = {"tpu": "pallas_kernels.wkv7_tpu", "gpu": "pallas_kernels.wkv7_gpu"}


def wkv7(
    r: Float[Array, "B T H K"],
    log_w: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    a: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    state: Float32[Array, "B H V K"] | None = None,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float32[Array, "B H V K"]]:
    """Runs the RWKV-7 recurrence over a sequence.

    With S_0 = state, for every token t and every head:

        S_t = S_{t-1} diag(exp(log_w_t)) + (S_{t-1} a_t) b_t^T + v_t k_t^T
        y_t = S_t r_t

    Differentiable in all seven arrays, in reverse mode ("sequential" in both modes). Feeding a
    sequence in pieces, each from the final state of the one before, gives the same result as
    feeding it whole.

    Args:
      r: receptance, reads the state; float32, bfloat16 or float16.
      log_w: natural logarithm of the decay, within [-exp(-1/2), 0) in RWKV-7; 0 means no decay.
        float32, or the dtype of r. Lower ones underflow or overflow in forms that solve several
        tokens at once: each sum over half a chunk must be at least -MAX_EXPONENT. This is checked
        where the values are known, outside `jax.jit`; traced ones give NaN.
      k: key, addresses what is written; dtype of r.
      v: value, what is written; dtype of r. V may differ from K.
      a: what is removed, -kk in RWKV-7, where kk is a normalised key; dtype of r.
      b: where it is removed from, kk * iclr in RWKV-7; dtype of r.
      state: state before the first token, rows = value channels; float32. None means zeros.
      segment_ids: numbers of packed documents (`documents`): S_{t-1} is zeros where one begins.
        The start state is of the document of the first token. None: all tokens are of one.
      implementation: "sequential" (oracle: one token at a time), "associative" (chunks, their
        states by an associative scan), "chunked" (chunks, one after the other), "pallas" (TPU and
        GPU kernels), or None for the fastest that can run on the platform of the mesh in force.
      chunk_size: tokens solved at once by "chunked" and "associative": a power of two up to 128;
        1 turns "associative" into a scan over token maps. None chooses by platform.

    Returns:
      y [B, T, H, V] in v's dtype, and the final state [B, H, V, K] in float32.

    Raises:
      ValueError: shapes or dtypes do not agree, chunk_size is not allowed, log_w is positive or too
        low, segment_ids number no documents, or the implementation is unknown, cannot run here or
        lacks a forward mode; the message names the argument and the remedy.

    Example:
      y, state = wkv7(r, log_w, k, v, -kk, kk * iclr)
      y_next, state = wkv7(r2, log_w2, k2, v2, -kk2, kk2 * iclr2, state)
    """
    named = {"r": r, "log_w": log_w, "k": k, "v": v, "a": a, "b": b}
    check_arrays("wkv7", named, state, general=False)
    implementation = resolve("wkv7", implementation, _candidates(r, v))
    if state is None:
        batch, _, heads, width = v.shape
        state = jnp.zeros((batch, heads, width, k.shape[-1]), jnp.float32)
    check_chunk_size("wkv7", chunk_size, implementation)
    run, size = _form(implementation, chunk_size, r)
    _check_decay(log_w, implementation, size)
    arrays: tuple[jax.Array, ...] = (r, log_w, k, v, a, b, state)
    if segment_ids is not None:
        check_segment_ids("wkv7", segment_ids, *r.shape[:2])
        arrays += (beginnings(segment_ids),)
    if implementation != "sequential":
        arrays = reverse_only(_NO_FORWARD_MODE, *arrays)
    return local(
        lambda *arrays: run(*vary_together(*arrays)),
        arrays,
        (("B.H.",) * 6 + ("BH..", "B..."))[: len(arrays)],
        ("B.H.", "BH.."),
        check_vma=implementation != "pallas",
    )


def _form(implementation: str, chunk_size: int | None, r: jax.Array):
    """The function of the seven arrays (of eight where documents are packed) that runs, and how
    many tokens it solves at once by dividing by decays: 0 for none."""
    if implementation == "sequential":
        return wkv7_sequential, 0
    platform, associative = current_platform(), implementation == "associative"
    if implementation == "pallas":
        kernels = importlib.import_module(_KERNELS[platform])
        run = functools.partial(_by_kernel, kernels.wkv7)
        return run, kernels.TileConfig().chunk
    plan = Plan(
        chunk_size=chunk_size or CHUNK_SIZE.get(platform, CHUNK_SIZE["cpu"]),
        segment=None if associative else SEGMENT.get(platform, SEGMENT["cpu"]),
        associative=associative,
        # float32 inputs ask for float32 products, wherever they run; of 16-bit inputs three
        # bfloat16 passes lose nothing that the inputs had.
        precision=jax.lax.Precision.HIGHEST if r.dtype == jnp.float32 else jax.lax.Precision.HIGH,
    )
    return functools.partial(wkv7_chunked, plan=plan), plan.fit(r.shape[1])[0].chunk_size


def _by_kernel(kernel, r, log_w, k, v, a, b, state, fresh=None):
    packed = {} if fresh is None else {"fresh": fresh[..., 0, 0] > 0}
    return kernel(r, log_w, k, v, a, b, state, **packed)


def wkv7_sequential(
    r: Float[Array, "B T H K"],
    log_w: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    a: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    state: Float32[Array, "B H V K"],
    fresh: Float32[Array, "B T 1 1"] | None = None,
) -> tuple[Float[Array, "B T H V"], Float32[Array, "B H V K"]]:
    """The recurrence as it is written, a token at a time in float32: the oracle of all other forms.

    Takes the arrays of `wkv7`, the state included, and where documents begin; returns the same.
    """
    tokens = {"r": r, "log_w": log_w, "k": k, "v": v, "a": a, "b": b}
    return sequential(tokens if fresh is None else tokens | {"fresh": fresh}, state)


def wkv7_affine(
    r: Float[Array, "B T H K"],
    log_w: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    a: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> tuple[
    Float[Array, "B T H V"],
    Float[Array, "B T H K"],
    Float32[Array, "B H K K"],
    Float32[Array, "B H V K"],
]:
    """`wkv7` for a start state that is not known yet, in which it is affine.

    From the state S_0 it would return y_t = y0_t + S_0 z_t and S_T = S_0 M + G. This is what
    devices that hold stretches of one sequence work with: they exchange (M, G), where (M1, G1)
    followed by (M2, G2) is (M1 M2, G1 M2 + G2). Differentiable; arguments as in `wkv7`.

    Returns:
      y0 [B, T, H, V] in v's dtype, z [B, T, H, K] in k's dtype; M [B, H, K, K] and G [B, H, V, K],
      float32.
    """
    # The rows of the state do not mix. So rows that start as the identity and are written nothing
    # end as M and read z, and rows that start as zeros end as G and read y0.
    batch, _, heads, width = k.shape
    identity = jnp.broadcast_to(jnp.eye(width, dtype=jnp.float32), (batch, heads, width, width))
    chosen = resolve("wkv7", implementation, _candidates(r, v))
    run = functools.partial(
        wkv7, segment_ids=segment_ids, implementation=chosen, chunk_size=chunk_size
    )
    if chosen == "pallas":  # kernels take square states only
        y0, g = run(r, log_w, k, v, a, b)
        z, m = run(r, log_w, k, jnp.zeros_like(k), a, b, identity)
        return y0, z, m, g
    # The forms in XLA prepare each chunk once for all rows.
    start = jnp.pad(identity, ((0, 0), (0, 0), (0, v.shape[-1]), (0, 0)))
    both, end = run(r, log_w, k, jnp.concatenate([jnp.zeros_like(k), v], axis=-1), a, b, start)
    return both[..., width:], both[..., :width], end[..., :width, :], end[..., width:, :]


def segment_map(
    log_w: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    a: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> tuple[Float32[Array, "B H K K"], Float32[Array, "B H V K"]]:
    """What a stretch of tokens does to the state: M and G of `wkv7_affine`."""
    unread = jnp.zeros_like(k)
    return wkv7_affine(
        unread, log_w, k, v, a, b,
        segment_ids=segment_ids, implementation=implementation, chunk_size=chunk_size,
    )[2:]  # fmt: skip


def _candidates(r: jax.Array, v: jax.Array) -> tuple[Candidate, ...]:
    """Implementations of `wkv7`, fastest first."""

    def kernel_problem(platform: str) -> str | None:
        module = _KERNELS[platform]
        if (reason := missing_module(module)) is not None:
            return reason
        unsupported = importlib.import_module(module).unsupported_reason
        return unsupported(r.shape[-1], v.shape[-1], r.dtype)

    return (
        Candidate("pallas", tuple(_KERNELS), kernel_problem),
        Candidate("chunked"),
        Candidate("associative"),
        Candidate("sequential"),
    )


def _check_decay(log_w: jax.Array, implementation: str, chunk_size: int) -> None:
    """Raises ValueError where `log_w` is known (not traced) and out of the implementation's range.

    Over half a chunk of C tokens the decays of a channel may add up to -MAX_EXPONENT; no decay may
    be positive. Every log_w of RWKV-7, at least -exp(-1/2), is within it.
    """
    if (lowest := lowest_decay("wkv7", log_w)) is None:
        return
    half = -(-chunk_size // 2)
    if not half or lowest * half >= -MAX_EXPONENT:
        return
    known = np.asarray(log_w, np.float32)
    padding = ((0, 0), (0, -known.shape[1] % half), (0, 0), (0, 0))
    known = np.pad(known, padding)
    total = known.reshape(known.shape[0], -1, half, *known.shape[2:]).sum(2).min()
    if total < -MAX_EXPONENT:
        raise ValueError(
            f"wkv7: log_w goes down to {lowest:g} and sums to {total:g} over {half} tokens; "
            f"{implementation!r} with chunks of {chunk_size} needs sums of at least "
            f"-{MAX_EXPONENT}: use a smaller chunk_size, or implementation='sequential'"
        )
