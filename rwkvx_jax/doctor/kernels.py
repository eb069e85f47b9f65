"""Every op that a model calls, in the form that is chosen here, against its float32 oracle.

Errors are the largest difference over the largest entry of the oracle, for outputs and for the
gradients of all arrays. The lengths are not round: a ragged last chunk is where kernels go wrong.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import block_sparse_tpu, delta_rule_tpu, wkv7_tpu
from rwkvx_jax.config import ModelConfig
from rwkvx_jax.doctor.findings import Failed, Values
from rwkvx_jax.modules.mixers import MIXERS, LinearMixer
from rwkvx_jax.ops.block_sparse import sparse_attention
from rwkvx_jax.ops.delta_rule import generalized_delta_rule
from rwkvx_jax.ops.dispatch import current_platform
from rwkvx_jax.ops.full_attention import full_attention
from rwkvx_jax.ops.recurrence import wkv7
from rwkvx_jax.ops.selection import select_chunks, selector_of
from rwkvx_jax.ops.selection_reference import select_chunks_reference
from rwkvx_jax.ops.wkv4 import wkv4
from rwkvx_jax.perf.kernel_costs import static_estimate

# Largest error of outputs and of gradients: what the tests demand of float32, and what rounding
# inputs, intermediate products and outputs to bfloat16 leaves.
_TOLERANCE = {"float32": (1e-5, 1e-4), "bfloat16": (2e-2, 6e-2)}
_DIFFERING = 1e-3  # share of queries at near ties of two chunks' scores, which may go either way
_ORACLE_HEADS = 4  # the reference holds [heads, T, T] several times
_REPEATS = 5

Check = tuple[str, Callable[[], tuple[str, Values]]]


@dataclass(frozen=True)
class Case:
    """Sizes of the arrays of one check.

    Attributes:
      model: its mixer, head count, head size, chunk, top-k and selector are used.
      dtype: of the arrays, "float32" or "bfloat16".
      length: tokens compared with the oracle.
      timed: tokens of the timed call; 0 times nothing.
      interpret: run the TPU kernels interpreted instead of what is chosen.
    """

    model: ModelConfig
    dtype: str
    length: int
    timed: int
    interpret: bool = False


def kernel_checks(case: Case) -> Iterator[Check]:
    """(name, check) of every op of the model."""
    form = "interpreted kernel" if case.interpret else current_platform()
    recurrence, check = {"rwkv7": ("wkv7", _check_wkv7), "rwkv4": ("wkv4", _check_wkv4)}.get(
        case.model.mixer, ("generalized_delta_rule", _check_delta_rule)
    )
    if case.model.num_blocks:
        yield f"{recurrence} ({case.dtype}, {form})", functools.partial(check, case)
    if not case.model.num_attention_blocks:
        return
    if case.model.attention != "sparse":  # "nsa" has it in a window
        yield f"full_attention ({case.dtype}, {form})", functools.partial(_check_full, case)
    if case.model.attention == "full":
        return
    if case.model.attention == "sparse":
        yield f"select_chunks ({case.dtype}, {form})", functools.partial(_check_selection, case)
    yield f"sparse_attention ({case.dtype}, {form})", functools.partial(_check_sparse, case)


def _check_wkv7(case: Case) -> tuple[str, Values]:
    kernel = wkv7
    if case.interpret:
        kernel = functools.partial(wkv7_tpu.wkv7, interpret=pltpu.InterpretParams())
    oracle = functools.partial(wkv7, implementation="sequential")
    make = functools.partial(_wkv7_inputs, case)
    return _compare("wkv7", case, kernel, oracle, make)


def _check_wkv4(case: Case) -> tuple[str, Values]:
    run = lambda *arrays, **options: wkv4(*arrays, **options)[0]
    oracle = functools.partial(run, implementation="sequential")
    return _compare("wkv4", case, run, oracle, functools.partial(_wkv4_inputs, case))


def _check_delta_rule(case: Case) -> tuple[str, Values]:
    mixer = MIXERS[case.model.mixer]
    assert issubclass(mixer, LinearMixer)
    rule = {"read": mixer.read, "decay_bound": mixer.decay_bound}

    def form(op: Callable, **options) -> Callable:
        def run(r, log_w, k, v, state, *a_and_b):
            return op(r, log_w, k, v, *a_and_b, state=state, **rule, **options)

        return run

    kernel = form(generalized_delta_rule)
    if case.interpret:
        kernel = form(delta_rule_tpu.generalized_delta_rule, interpret=pltpu.InterpretParams())
    oracle = form(generalized_delta_rule, implementation="sequential")
    make = functools.partial(_delta_rule_inputs, case, mixer.decay_bound)
    return _compare("generalized_delta_rule", case, kernel, oracle, make)


def _check_full(case: Case) -> tuple[str, Values]:
    window = case.model.window_size if case.model.attention == "nsa" else None
    op = functools.partial(full_attention, window=window)
    oracle = functools.partial(op, implementation="reference")
    return _compare("full_attention", case, op, oracle, functools.partial(_qkv, case))


def _check_sparse(case: Case) -> tuple[str, Values]:
    model = case.model
    chunking = {"chunk_size": model.chunk_size, "top_k": model.top_k}

    def make(length: int, seed: int, heads: int | None = _ORACLE_HEADS):
        q, k, v = _qkv(case, length, seed, heads)
        # Chosen once: kernel and oracle must read the same chunks.
        selector = selector_of(model)._replace(together=1)
        asked = jnp.tile(q, selector.query_vectors)
        return q, k, v, select_chunks(asked, k, **chunking, selector=selector)

    def run(implementation: str | None):
        def attend(q, k, v, selection):
            return sparse_attention(
                q, k, v, **chunking, selection=selection, implementation=implementation
            )

        return attend

    kernel = run(None)
    if case.interpret:

        def kernel(q, k, v, selection):
            return block_sparse_tpu.block_sparse_attention(
                q,
                k,
                v,
                selection,
                chunk_size=model.chunk_size,
                scale=q.shape[-1] ** -0.5,
                q_offset=0,
                interpret=pltpu.InterpretParams(),
            )

    return _compare("sparse_attention", case, kernel, run("reference"), make)


def _check_selection(case: Case) -> tuple[str, Values]:
    """Choices equal those of the oracle, but where two chunks score the same to rounding."""
    model = case.model
    chunking = {"chunk_size": model.chunk_size, "top_k": model.top_k}
    selector = selector_of(model)._replace(together=1)  # of the keys here each head has its own

    def make(length: int, seed: int, heads: int | None = _ORACLE_HEADS):
        q, k, _ = _qkv(case, length, seed, heads)
        return jnp.tile(q, selector.query_vectors), k

    q, k = make(case.length, 0)
    chosen = np.asarray(select_chunks(q, k, **chunking, selector=selector))
    expected = np.asarray(select_chunks_reference(q, k, **chunking, selector=selector))
    if ((chosen >= 0).sum(-1) != (expected >= 0).sum(-1)).any():
        raise Failed("another number of chunks is chosen than by the reference")
    differ = (np.sort(chosen, -1) != np.sort(expected, -1)).any(-1)
    share = float(differ.mean())
    if share > _DIFFERING:
        raise Failed(f"{share:.2%} of the queries choose other chunks than the reference")
    values: Values = {"differing_queries": share}
    text = f"{share:.4%} of queries differ from the reference (near ties)"
    if case.timed:
        select = jax.jit(functools.partial(select_chunks, **chunking, selector=selector))
        inputs = make(case.timed, 1, model.num_heads)
        text += _timing("select_chunks", case, select, inputs, values)
    return text, values


def _compare(
    op: str, case: Case, kernel: Callable, oracle: Callable, make: Callable
) -> tuple[str, Values]:
    """Outputs and gradients of `kernel` against `oracle` in float32 on the same inputs."""
    inputs = make(case.length, 0)
    exact = [x.astype(jnp.float32) if _is_float(x) else x for x in inputs]
    outputs = jax.tree.leaves(jax.eval_shape(kernel, *inputs))
    rng = np.random.default_rng(2)
    weights = [jnp.asarray(rng.standard_normal(x.shape), jnp.float32) for x in outputs]
    errors: dict[str, float] = {}
    found, wanted = (
        _value_and_gradients(f, x, weights) for f, x in ((kernel, inputs), (oracle, exact))
    )
    for kind, ours, theirs in zip(("value", "gradient"), found, wanted, strict=True):
        errors[kind] = max(map(_error, ours, theirs))
    limits = dict(zip(("value", "gradient"), _TOLERANCE[case.dtype], strict=True))
    beyond = [
        f"{kind} {errors[kind]:.1e} > {limits[kind]:.0e}"
        for kind in errors
        if not errors[kind] <= limits[kind]
    ]
    if beyond:
        raise Failed(f"differs from the oracle: {', '.join(beyond)}")
    values: Values = {"errors": errors, "tolerances": limits}
    text = f"value {errors['value']:.1e}, gradients {errors['gradient']:.1e} of the oracle"
    if case.timed:
        text += _timing(op, case, jax.jit(kernel), make(case.timed, 1, heads=None), values)
    return text, values


def _timing(op: str, case: Case, function: Callable, inputs, values: Values) -> str:
    """Puts the time of a call, and what the compiler's schedules say of it, into `values`."""
    values["seconds"] = _median_seconds(function, *inputs)
    text = f"; forward {values['seconds'] * 1e3:.2f} ms at {case.timed:,} tokens"
    estimate = static_estimate(op, case.model, case.timed) if case.dtype == "bfloat16" else None
    if estimate is None:
        return text
    values["static_estimate_seconds"] = estimate
    return f"{text} (static estimate {estimate * 1e3:.2f} ms)"


def _value_and_gradients(function, inputs, weights):
    """Outputs, and gradients of their weighted sum with respect to all float inputs."""
    places = tuple(i for i, x in enumerate(inputs) if _is_float(x))

    def loss(*inputs):
        outputs = jax.tree.leaves(function(*inputs))
        total = sum(
            jnp.sum(w * y.astype(jnp.float32)) for w, y in zip(weights, outputs, strict=True)
        )
        return total, outputs

    grads, outputs = jax.jit(jax.grad(loss, places, has_aux=True))(*inputs)
    return outputs, grads


def _error(ours: jax.Array, theirs: jax.Array) -> float:
    ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
    if not np.isfinite(ours).all():
        return float("inf")
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30))


def _median_seconds(function: Callable, *inputs) -> float:
    jax.block_until_ready(function(*inputs))  # compiles
    seconds = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        jax.block_until_ready(function(*inputs))
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def _is_float(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _qkv(case: Case, length: int, seed: int, heads: int | None = _ORACLE_HEADS):
    """q, k, v of at most so many heads; None: of all."""
    rng = np.random.default_rng(seed)
    heads = min(case.model.num_heads, heads or case.model.num_heads)
    shape = (1, length, heads, case.model.head_size)
    return tuple(jnp.asarray(rng.standard_normal(shape), case.dtype) for _ in range(3))


def _wkv7_inputs(case: Case, length: int, seed: int, heads: int | None = None):
    """r, log_w, k, v, a, b and a state of all heads, as a model makes them."""
    rng = np.random.default_rng(seed)
    heads, size = heads or case.model.num_heads, case.model.head_size
    r, k, v, key, rate, decay = rng.standard_normal((6, 1, length, heads, size))
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    rate, decay = 1 / (1 + np.exp(-rate)), -np.exp(-0.5) / (1 + np.exp(-decay))
    arrays = (r, decay, 0.5 * k, v, -key, key * rate)
    r, decay, k, v, a, b = (jnp.asarray(x, case.dtype) for x in arrays)
    state = 0.1 * rng.standard_normal((1, heads, size, size))
    # A decay rounded in bfloat16 may leave the range: like a model's, it is float32.
    return r, jnp.asarray(arrays[1], jnp.float32), k, v, a, b, jnp.asarray(state, jnp.float32)


def _delta_rule_inputs(
    case: Case, bound: float | None, length: int, seed: int, heads: int | None = None
):
    """r, log_w, k, v, a state and, of a delta rule, a and b, of all the mixer's heads. Decays are
    from -0.001 down to the bound, to -1 where there is none."""
    rng = np.random.default_rng(seed)
    sizes = case.model.mixer_sizes
    tokens = 1, length, heads or sizes.heads
    r, k, key = rng.standard_normal((3, *tokens, sizes.keys)) * sizes.keys**-0.5
    v, rate = rng.standard_normal((*tokens, sizes.values)), rng.uniform(size=(*tokens, 1))
    decays = (*tokens, 1 if sizes.scalar else sizes.keys)
    log_w = -np.exp(rng.uniform(np.log(1e-3), np.log(-bound if bound else 1.0), decays))
    state = 0.1 * rng.standard_normal((1, tokens[2], sizes.values, sizes.keys))
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    arrays = (r, k, v, -key * np.exp(log_w), key * rate) if sizes.delta else (r, k, v)
    r, k, v, *a_and_b = (jnp.asarray(x, case.dtype) for x in arrays)
    log_w, state = (jnp.asarray(x, jnp.float32) for x in (log_w, state))
    return r, log_w, k, v, state, *a_and_b


def _wkv4_inputs(case: Case, length: int, seed: int, heads: int | None = None):
    """Speeds of the decays, bonuses, keys and values of all channels."""
    rng = np.random.default_rng(seed)
    decay, bonus = rng.uniform(-5, 1, case.model.width), rng.standard_normal(case.model.width)
    k, v = rng.standard_normal((2, 1, length, case.model.width))
    decay, bonus, k = (jnp.asarray(x, jnp.float32) for x in (decay, bonus, k))
    return decay, bonus, k, jnp.asarray(v, case.dtype)
