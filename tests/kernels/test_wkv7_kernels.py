"""The WKV-7 kernels for TPU and GPU, interpreted on a CPU, against the sequential oracle.

The oracle runs in float32 on the very inputs the kernel gets (rounded to bfloat16 where those are).
Cases are deliberately unround: an odd number of heads, T around and off multiples of the chunk.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import wkv7_gpu, wkv7_tpu
from pallas_kernels.wkv7_tpu import TileConfig
from rwkvx_jax.ops.recurrence import wkv7_sequential
from tests.helpers import assert_close

NAMES = ("r", "log_w", "k", "v", "a", "b", "state")
# One pack, two chunks a grid step: small to compile, and the state crosses chunks both ways.
SMALL = TileConfig(max_packs=1, max_items=2)
V5P = wkv7_tpu.TILES["v5p"]
KINDS = ("random", "strong", "repeated", "constant")


def make_inputs(kind, dtype, time, heads, size, batch=1, seed=0):
    """Inputs and cotangents. "strong": fastest decay; "repeated": 90 % one key, slow decay;
    "constant": one key, full removal, almost no decay (worst case of the inverse)."""
    rng = np.random.default_rng(seed)

    def draw(scale=1.0):
        return scale * rng.standard_normal((batch, time, heads, size))

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    r, k, v, kk = draw(), draw(0.5), draw(), unit(draw())
    iclr, log_w = 1 / (1 + np.exp(-draw())), -np.exp(-0.5) / (1 + np.exp(-draw(2.0)))
    if kind == "strong":
        log_w = np.full_like(log_w, -np.exp(-0.5))
    if kind == "repeated":
        kk = unit(0.9 * kk[:, :1] + 0.1 * kk)
        iclr, log_w = np.full_like(iclr, 0.95), 0.1 * log_w
    if kind == "constant":
        kk = np.broadcast_to(kk[:, :1], kk.shape)
        iclr, log_w = np.ones_like(iclr), np.full_like(log_w, -1e-4)
    k = k * (1 + 0.5 * (iclr - 1))
    state = 0.1 * rng.standard_normal((batch, heads, size, size))
    inputs = [jnp.asarray(x, dtype) for x in (r, log_w, k, v, -kk, kk * iclr)]
    inputs[1] = jnp.asarray(log_w, jnp.float32)
    cotangents = jnp.asarray(draw(), dtype), jnp.asarray(rng.standard_normal(state.shape), "f4")
    return (*inputs, jnp.asarray(state, jnp.float32)), cotangents


@functools.lru_cache
def with_gradients(tile, interpret):
    """Jitted (inputs, cotangents) -> (y, final state), gradients. tile None: the oracle."""

    def run(inputs, cotangents):
        function = wkv7_sequential
        if tile is not None:
            module = wkv7_gpu if isinstance(tile, wkv7_gpu.TileConfig) else wkv7_tpu
            function = functools.partial(module.wkv7, tile=tile, interpret=interpret)
        outputs, pull = jax.vjp(function, *inputs)
        return outputs, pull(cotangents)

    return jax.jit(run)


def check(kind, dtype, time, heads, size, *, tile=SMALL, interpret=True, batch=1):
    inputs, cotangents = make_inputs(kind, dtype, time, heads, size, batch)
    (y, end), grads = with_gradients(tile, interpret)(inputs, cotangents)
    assert y.dtype == dtype and end.dtype == jnp.float32
    for name, x, grad in zip(NAMES, inputs, grads, strict=True):
        assert grad.dtype == x.dtype, f"gradient of {name}"
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), (inputs, cotangents))
    (y0, end0), grads0 = with_gradients(None, None)(*exact)
    accept = assert_accurate if dtype == jnp.float32 else assert_accurate_on_average
    forward, backward = (1e-5, 1e-4) if dtype == jnp.float32 else (5e-3, 2e-2)
    accept(y, y0, forward, "y")
    accept(end, end0, forward, "final state")
    for name, grad, grad0 in zip(NAMES, grads, grads0, strict=True):
        rel = 2 * backward if name == "log_w" and dtype != jnp.float32 else backward
        accept(grad, grad0, rel, f"gradient of {name}")


def assert_accurate(actual, expected, rel, name):
    assert_close(actual, expected, rel=rel, name=name)


def assert_accurate_on_average(actual, expected, rel, name):
    """Relative root-mean-square error within rel; no single entry beyond twice that.

    bfloat16 errors are noise: the mean is what a bound can hold, the largest of tens of thousands
    of entries lies some deviations out.
    """
    assert_close(actual, expected, rel=2 * rel, name=name)
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    assert error <= rel, f"{name}: relative rms error {error:.3e} > {rel:g}"


@pytest.mark.thorough
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_values_and_gradients(kind):
    check(kind, jnp.bfloat16, 200, 3, 64)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_values_and_gradients(kind):
    check(kind, jnp.float32, 200, 3, 64)


@pytest.mark.parametrize("size", [64, 128])
def test_one_token(size):
    check("random", jnp.float32, 1, 1, size, tile=TileConfig(chunk=16, max_items=1))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("time", [1, 63, 64, 65, 200])
def test_any_length(time, size, dtype):
    check("random", dtype, time, 3 if size == 64 else 2, size, tile=TileConfig(max_items=2))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("chunk", [16, 32, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_other_chunks(chunk, kind, dtype):
    size = max(64, chunk)
    check(kind, dtype, 200, 3, size, tile=TileConfig(chunk=chunk, max_packs=1, max_items=2))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_default_tile_and_batch(kind):
    check(kind, jnp.bfloat16, 200, 5, 64, tile=TileConfig(), batch=2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_head_size_128_bfloat16(kind):
    check(kind, jnp.bfloat16, 200, 2, 128)


@pytest.mark.parametrize("kind", ["random", "constant"])
def test_gpu(kind):
    """Value blocks, whose shares of the other gradients are summed outside the kernel."""
    check(kind, jnp.float32, 40, 3, 64, tile=wkv7_gpu.TileConfig(value_block=32))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("chunk", [16, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_all_kinds(kind, chunk, dtype):
    check(kind, dtype, 200, 3, 64, tile=wkv7_gpu.TileConfig(chunk=chunk))


@pytest.mark.slow
@pytest.mark.parametrize("time", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("size", [64, 128])
def test_gpu_any_length(time, size):
    check("random", jnp.bfloat16, time, 1, size, tile=wkv7_gpu.default_tile(size))


@pytest.mark.parametrize(
    "dtype, time, heads, size, cores",
    [
        (jnp.float32, 40, 1, 64, 1),
        pytest.param(jnp.bfloat16, 200, 3, 64, 1, marks=pytest.mark.slow),
        pytest.param(jnp.float32, 65, 2, 128, 1, marks=pytest.mark.slow),
        pytest.param(jnp.bfloat16, 40, 4, 64, 2, marks=pytest.mark.slow),
    ],
)
def test_tpu_semantics(dtype, time, heads, size, cores):
    """DMA, semaphores, NaN in memory nobody wrote, and no two accesses that race."""
    tile = TileConfig(chunk=16 if time < 64 else 64, max_packs=cores, max_items=2, cores=cores)
    interpret = pltpu.InterpretParams(
        uninitialized_memory="nan", detect_races=True, num_cores_or_threads=cores
    )
    check("random", dtype, time, heads, size, tile=tile, interpret=interpret)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert not interpret_pallas_call.races.races_found


def test_missing_state_is_zeros():
    inputs, _ = make_inputs("random", jnp.float32, 20, 2, 64)
    run = functools.partial(wkv7_tpu.wkv7, tile=TileConfig(chunk=16, max_items=1), interpret=True)
    y, end = run(*inputs[:6])
    y0, end0 = run(*inputs[:6], jnp.zeros_like(inputs[6]))
    assert_close(y, y0, rel=0.0)
    assert_close(end, end0, rel=0.0)


@pytest.mark.thorough
def test_a_split_sequence_continues():
    """Two calls, the state handed over, equal one: the final state is exact off chunk borders."""
    inputs, _ = make_inputs("random", jnp.float32, 40, 2, 64)
    run = functools.partial(wkv7_tpu.wkv7, tile=TileConfig(chunk=16, max_items=1), interpret=True)
    y, end = run(*inputs)
    head, middle = run(*(x[:, :23] for x in inputs[:6]), inputs[6])
    tail, last = run(*(x[:, 23:] for x in inputs[:6]), middle)
    assert_close(jnp.concatenate([head, tail], axis=1), y, rel=1e-5)
    assert_close(last, end, rel=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: {**x, "r": x["r"][..., :32]}, "head size 32|key size 32"),
        (lambda x: {**x, "k": x["k"][:, :3]}, "k has shape"),
        (lambda x: {**x, "v": x["v"].astype(jnp.bfloat16)}, "share a dtype"),
        (lambda x: {**x, "state": x["state"][:, :1]}, "state has shape"),
        (lambda x: {n: v[:, :0] if v.ndim == 4 and n != "state" else v for n, v in x.items()}, "T"),
    ],
)
def test_bad_inputs_are_named(change, message):
    inputs, _ = make_inputs("random", jnp.float32, 5, 2, 64)
    for module in (wkv7_tpu, wkv7_gpu):
        with pytest.raises(ValueError, match=message):
            module.wkv7(**change(dict(zip(NAMES, inputs, strict=True))))


def test_a_chunk_of_128_needs_heads_of_128():
    inputs, _ = make_inputs("random", jnp.float32, 5, 2, 64)
    with pytest.raises(ValueError, match="chunk 128 needs head size 128, got 64"):
        wkv7_tpu.wkv7(*inputs, tile=TileConfig(chunk=128))


@pytest.mark.parametrize(
    "batch, heads, packs",
    [(1, 12, 3), (2, 12, 6), (1, 40, 5), (1, 2, 1), (1, 6, 3), (3, 12, 3), (1, 4, 1)],
)
def test_two_cores_get_as_many_steps_where_packs_can_be_cut_so(batch, heads, packs):
    plan = wkv7_tpu._plan(jax.ShapeDtypeStruct((batch, 128, 64 * heads), "bfloat16"), 64, V5P)
    assert plan.packs == packs
    assert math.prod(plan.grid[:2]) % 2 == 0 or batch * heads // 2 % 2


@pytest.mark.parametrize("field", [{"chunk": 48}, {"max_packs": 0}, {"max_items": 0}, {"cores": 0}])
def test_bad_tiles_are_named(field):
    with pytest.raises(ValueError, match=next(iter(field)).split("_")[0]):
        TileConfig(**field)


@pytest.mark.parametrize("field", [{"chunk": 64}, {"value_block": 48}, {"forward_warps": 3}])
def test_bad_gpu_tiles_are_named(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        wkv7_gpu.TileConfig(**field)
