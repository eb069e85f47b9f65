"""The generalized delta rule: one recurrence that holds RWKV-7 and its neighbours as settings.

    S_t = S_{t-1} diag(exp(log_w_t)) + (S_{t-1} a_t) b_t^T + v_t k_t^T

`generalized_delta_rule` checks its arguments, lets `dispatch` choose an implementation and runs it.
The named recurrences of the field are in `recurrences`; `wkv7` is the instance of RWKV-7, whose
bounded decays allow faster forms. The term "diagonal plus low rank" is that of fla.
"""

import functools
import importlib
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from rwkvx_jax.ops.delta_rule_chunked import chunked, leaf_of
from rwkvx_jax.ops.derivatives import reverse_only
from rwkvx_jax.ops.dispatch import Candidate, current_platform, missing_module, resolve
from rwkvx_jax.ops.documents import as_decays, beginnings, check_segment_ids
from rwkvx_jax.ops.placement import automatic_axes, local, vary_together
from rwkvx_jax.ops.recurrence_checks import check_arrays, check_chunk_size, lowest_decay
from rwkvx_jax.ops.recurrence_sequential import sequential
from rwkvx_jax.ops.segments import CHUNK_SIZE, SEGMENT, Form, Plan

_KERNEL = "pallas_kernels.delta_rule_tpu"
_NO_FORWARD_MODE = (
    "generalized_delta_rule: only implementation='sequential' can be differentiated in forward "
    "mode (jvp, jacfwd, linearize); all others have a reverse mode of their own (grad, vjp)"
)


def generalized_delta_rule(
    r: Float[Array, "B T H K"],
    log_w: Float[Array, "B T _ _"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T HV V"],
    a: Float[Array, "B T _ K"] | None = None,
    b: Float[Array, "B T _ K"] | None = None,
    state: Float32[Array, "B HV V K"] | None = None,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    read: Literal["after", "before"] = "after",
    decay_bound: float | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T HV V"], Float32[Array, "B HV V K"]]:
    """Runs the recurrence over a sequence, for any decays.

    With S_0 = state, for every token t and every head:

        S_t = S_{t-1} diag(exp(log_w_t)) + (S_{t-1} a_t) b_t^T + v_t k_t^T
        y_t = S_t r_t        (read="after")        y_t = S_{t-1} r_t        (read="before")

    Differentiable in all arrays, in reverse mode ("sequential" in both modes). Values and gradients
    are finite for every log_w of at most 0; a reset, log_w = -inf, has the gradient 0. Feeding a
    sequence in pieces, each from the final state of the one before, gives the same result.

    Args:
      r: reads the state (q, C); float32, bfloat16 or float16.
      log_w: natural logarithm of the decay, from -inf to 0: [B, T, H, K], or [B, T, H, 1] for one a
        head, which is faster. H or HV heads. float32, or the dtype of r.
      k: addresses what is written (B of Mamba-2); dtype of r.
      v: what is written; dtype of r. HV may be a multiple of H: head j of v then uses head
        j // (HV / H) of r and k.
      a: what is removed, [B, T, H or HV, K]; dtype of r. None with b None: linear attention.
      b: where it is removed from, as a.
      state: state before the first token, rows = value channels; float32. None means zeros.
      segment_ids: numbers of packed documents (`documents`): S_{t-1} is zeros where one begins.
        The start state is of the document of the first token. None: all tokens are of one.
      read: whether y_t sees token t's own update.
      decay_bound: a promise that every log_w is at least this, such as -5.0; decays of channels are
        then cheaper. Checked where values are known, outside `jax.jit`.
      implementation: "sequential" (oracle: one token at a time), "associative" (chunks, their
        states by an associative scan), "chunked" (chunks, one after the other), "pallas" (TPU
        kernel), or None for the fastest that can run on the platform of the mesh in force.
      chunk_size: tokens solved at once by "chunked" and "associative": a power of two up to 128.
        None chooses by platform.

    Returns:
      y [B, T, HV, V] in v's dtype, and the final state [B, HV, V, K] in float32.

    Raises:
      ValueError: shapes, heads or dtypes do not agree, only one of a and b is given, log_w is
        positive or below decay_bound, segment_ids number no documents, chunk_size is not allowed,
        or the implementation is unknown, cannot run here or lacks a forward mode; the message names
        the argument and the remedy.
    """
    arrays = {"r": r, "log_w": log_w, "k": k, "v": v}
    if (a is None) != (b is None):
        given, missing = ("b", "a") if a is None else ("a", "b")
        raise ValueError(
            f"generalized_delta_rule: {given} is given and {missing} is not: pass both, or neither "
            "for linear attention"
        )
    if a is not None and b is not None:
        arrays |= {"a": a, "b": b}
    check_arrays("generalized_delta_rule", arrays, state, general=True)
    if read not in ("after", "before"):
        raise ValueError(f"generalized_delta_rule: read must be 'after' or 'before', got {read!r}")
    _check_decay(log_w, decay_bound)
    candidates = _candidates(r, v, log_w, decay_bound, segment_ids)
    chosen = resolve("generalized_delta_rule", implementation, candidates)
    check_chunk_size("generalized_delta_rule", chunk_size, chosen)
    if state is None:
        batch, _, heads, width = v.shape
        state = jnp.zeros((batch, heads, width, k.shape[-1]), jnp.float32)
    run = _form(chosen, chunk_size, r.dtype, read, decay_bound)
    if segment_ids is not None:
        check_segment_ids("generalized_delta_rule", segment_ids, *r.shape[:2])
        arrays["fresh"] = beginnings(segment_ids)
    if chosen != "sequential":
        *values, state = reverse_only(_NO_FORWARD_MODE, *arrays.values(), state)
        arrays = dict(zip(arrays, values, strict=True))

    heads = v.shape[2]
    # One head for all can stay whole on every device; several for several have to be beside theirs.
    arrays = {
        name: x if x.shape[2] in (1, heads) else jnp.repeat(x, heads // x.shape[2], 2)
        for name, x in arrays.items()
    }

    def heads_together(*arrays_and_state):
        *values, state = vary_together(*arrays_and_state)
        local_heads = state.shape[1]
        tokens = {
            # Where documents begin is the same for all heads, and stays one.
            name: x if x.shape[2] > 1 or name == "fresh" else jnp.repeat(x, local_heads, 2)
            for name, x in zip(arrays, values, strict=True)
        }
        return run(tokens, state)

    return local(
        heads_together,
        (*arrays.values(), state),
        tuple("B.H." if x.shape[2] == heads else "B..." for x in arrays.values()) + ("BH..",),
        ("B.H.", "BH.."),
        check_vma=chosen != "pallas",
    )


def affine(
    r: Float[Array, "B T H K"],
    log_w: Float[Array, "B T _ _"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T HV V"],
    a: Float[Array, "B T _ K"] | None = None,
    b: Float[Array, "B T _ K"] | None = None,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    read: Literal["after", "before"] = "after",
    decay_bound: float | None = None,
    implementation: str | None = None,
) -> tuple[
    Float[Array, "B T HV V"],
    Float[Array, "B T HV K"],
    Float32[Array, "B HV K K"],
    Float32[Array, "B HV V K"],
]:
    """`generalized_delta_rule` for a start state that is not known yet, in which it is affine.

    As `recurrence.wkv7_affine`: from S_0 it would return y_t = y0_t + S_0 z_t and S_T = S_0 M + G.
    Its states have V + K rows, which the TPU kernel takes up to 256 of.

    Returns:
      y0 [B, T, HV, V], z [B, T, HV, K] in v's dtype; M [B, HV, K, K] and G [B, HV, V, K], float32.
    """
    run = functools.partial(
        generalized_delta_rule, r, log_w, k,
        a=a, b=b, segment_ids=segment_ids, read=read, decay_bound=decay_bound,
        implementation=implementation,
    )  # fmt: skip
    (batch, time, heads, width), keys = v.shape, k.shape[-1]
    # The rows of the state do not mix: rows that start as the identity and are written nothing end
    # as M and read z. They are prepared once, together with the others.
    identity = jnp.broadcast_to(jnp.eye(keys, dtype=jnp.float32), (batch, heads, keys, keys))
    start = jnp.pad(identity, ((0, 0), (0, 0), (0, width), (0, 0)))
    unwritten = jnp.zeros((batch, time, heads, keys), v.dtype)
    both, end = run(v=jnp.concatenate([unwritten, v], axis=-1), state=start)
    return both[..., keys:], both[..., :keys], end[..., :keys, :], end[..., keys:, :]


def _form(implementation, chunk_size, dtype, read, decay_bound):
    """The function of (tokens by name, state) that runs."""
    if implementation == "sequential":
        return functools.partial(sequential, reads_before=read == "before")
    if implementation == "pallas":
        kernel = importlib.import_module(_KERNEL).generalized_delta_rule

        def by_kernel(tokens, state):
            bound = None if "fresh" in tokens else decay_bound  # a document begins with a reset
            tokens = as_decays(tokens, reads_before=read == "before")
            return kernel(**tokens, state=state, read=read, decay_bound=bound)

        return by_kernel
    platform = current_platform()
    associative = implementation == "associative"
    plan = Plan(
        chunk_size=chunk_size or CHUNK_SIZE.get(platform, CHUNK_SIZE["cpu"]),
        segment=None if associative else SEGMENT.get(platform, SEGMENT["cpu"]),
        associative=associative,
        precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.HIGH,
    )
    # On Auto axes every look at the decays of a segment would be a message between devices.
    form = Form(read == "before", leaf_of(decay_bound), looks=not automatic_axes())
    return functools.partial(chunked, plan=plan, form=form)


def _candidates(r, v, log_w, decay_bound, segment_ids) -> tuple[Candidate, ...]:
    """Implementations, fastest first."""

    def kernel_problem(platform: str) -> str | None:
        bound = decay_bound if segment_ids is None else None
        return missing_module(_KERNEL) or importlib.import_module(_KERNEL).unsupported_reason(
            r.shape[-1],
            v.shape[-1],
            r.dtype,
            scalar=log_w.shape[-1] == 1,
            decay_bound=bound,
        )

    return (
        Candidate("pallas", ("tpu",), kernel_problem),
        Candidate("chunked"),
        Candidate("associative"),
        Candidate("sequential"),
    )


def _check_decay(log_w: jax.Array, decay_bound: float | None) -> None:
    """Raises ValueError where `log_w` is known and positive, not a number, or below the bound."""
    op = "generalized_delta_rule"
    if decay_bound is not None and not -np.inf < decay_bound <= 0:
        raise ValueError(f"{op}: decay_bound must be finite and at most 0, got {decay_bound}")
    lowest = lowest_decay(op, log_w)
    if lowest is not None and decay_bound is not None and lowest < decay_bound:
        raise ValueError(
            f"{op}: log_w goes down to {lowest:g}, below decay_bound {decay_bound:g}: pass a lower "
            "bound, or None"
        )
