"""The forward pass of sparse attention by Mosaic GPU: interpreted on a CPU with race detection and
NaN in memory nobody wrote, against the reference; lowered for CUDA without a GPU; and compiled for
H100, with registers and spills, where jax's CUDA plugin and NVIDIA's assembler are installed.

The gradients are those of the Triton kernels, from this pass's result and log-sum-exp.
"""

import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels import block_sparse_gpu, block_sparse_mosaic_gpu
from pallas_kernels.block_sparse_gpu import TileConfig
from rwkvx_jax.ops import dispatch
from rwkvx_jax.ops.attention_reference import sparse_attention_reference
from rwkvx_jax.ops.block_sparse import sparse_attention
from tests.helpers import ROOT, assert_close
from tests.kernels.test_block_sparse_kernels import choose_one
from tests.kernels.test_gpu_lowering import compiles_for_h100, on_h100
from tests.ops.attention_cases import compare, random_qkv, random_selection, value_and_gradients

BF16 = jnp.bfloat16
needs_mosaic = pytest.mark.skipif(
    jax.__version_info__[:2] < (0, 12), reason="Mosaic GPU's interpreter came with jax 0.12"
)
SMALL = TileConfig(segment=192)  # several segments of queries


def inputs(length, heads, key_heads, size, keys=None, batch=1, seed=0):
    q, _, _ = random_qkv(seed, batch, length, heads=heads, size=size, dtype=BF16)
    _, k, v = random_qkv(seed + 1, batch, length, keys, heads=key_heads, size=size, dtype=BF16)
    return q, k, v


def interpreted(chunk_size, offset=0, tile=SMALL):
    """(q, k, v, selection) -> out; a race raises."""
    from jax.experimental.pallas import mosaic_gpu

    return lambda q, k, v, selection: block_sparse_mosaic_gpu.block_sparse_attention(
        q,
        k,
        v,
        selection,
        chunk_size=chunk_size,
        scale=q.shape[-1] ** -0.5,
        q_offset=offset,
        tile=tile,
        interpret=mosaic_gpu.InterpretGPUParams(detect_races=True),
    )


def oracle(q, k, v, selection, *, chunk_size, offset):
    return sparse_attention_reference(
        q, k, v, selection, chunk_size=chunk_size, scale=q.shape[-1] ** -0.5, q_offset=offset
    )


def check(qkv, selection, chunk_size, offset=0, gradients=False, tile=SMALL):
    """Values, and gradients if asked for, to the bounds of the other GPU kernels in bfloat16."""
    exact = [x.astype(jnp.float32) for x in qkv]
    reference = functools.partial(oracle, chunk_size=chunk_size, offset=offset)
    attend = interpreted(chunk_size, offset, tile)
    if not gradients:
        actual = jax.jit(attend)(*qkv, selection)
        assert actual.dtype == BF16
        expected = jax.jit(reference)(*exact, selection)
        assert_close(actual.astype(jnp.float32), expected, rel=5e-3)
        return
    actual = value_and_gradients(attend)(*qkv, selection)
    assert all(x.dtype == BF16 for x in actual)
    expected = value_and_gradients(reference)(*exact, selection)
    compare([x.astype(jnp.float32) for x in actual], expected, forward=5e-3, gradient=2e-2)


@needs_mosaic
def test_a_ragged_length():
    check(inputs(141, 1, 1, 64), random_selection(1, 1, 141, 1, 64, 2), 64)


@needs_mosaic
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random", "first chunk", "last chunk", "nobody", "future"])
def test_selections(kind):
    length, slots = 300, 6
    chosen = random_selection(1, 1, length, 2, 64, slots + 1)
    if kind == "first chunk":
        chosen = choose_one(length, 2, slots, 64, 0)
    if kind == "last chunk":
        chosen = choose_one(length, 2, slots, 64, 3)
    if kind == "nobody":
        chosen = jnp.full_like(chosen, -1)
    if kind == "future":  # own and later chunks are no past chunks: ignored
        later = jnp.arange(length, dtype=jnp.int32)[None, :, None] // 64
        chosen = chosen.at[..., -1].set(later + 1).at[..., -2].set(later)
    check(inputs(length, 2, 2, 64), chosen, 64, gradients=kind == "random")


@needs_mosaic
@pytest.mark.slow
@pytest.mark.parametrize(
    "length, chunk_size, top_k, size, heads, key_heads",
    [
        (1, 64, 3, 64, 1, 1),
        (203, 32, 5, 64, 2, 1),
        (270, 128, 3, 128, 1, 1),
        (250, 192, 2, 64, 4, 2),
        (130, 64, 1, 64, 1, 1),
    ],
)
def test_lengths_chunks_and_groups(length, chunk_size, top_k, size, heads, key_heads):
    qkv = inputs(length, heads, key_heads, size)
    chosen = random_selection(2, 1, length, key_heads, chunk_size, top_k)
    check(qkv, chosen, chunk_size, gradients=True)


@needs_mosaic
@pytest.mark.slow
@pytest.mark.parametrize("offset, chunk_size", [(233, 64), ([40, 233], 64), ([0, 40], 32)])
def test_an_offset(offset, chunk_size):
    batch = np.size(offset)
    qkv = inputs(100, 1, 1, 64, keys=345, batch=batch)
    chosen = random_selection(8, batch, 100, 1, chunk_size, 4, offset)
    check(qkv, chosen, chunk_size, offset if batch == 1 else jnp.asarray(offset))


@needs_mosaic
@pytest.mark.slow
def test_small_tiles():
    tile = TileConfig(rows=32, keys=16, segment=64)
    qkv, chosen = inputs(140, 1, 1, 64), random_selection(3, 1, 140, 1, 64, 3)
    check(qkv, chosen, 64, tile=tile)


@needs_mosaic
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(size=32), "head size 32"),
        (dict(dtype=jnp.float32), "dtype float32 is not bfloat16"),
        (dict(chunk_size=100), "chunk size 100"),
        (dict(tile=TileConfig(rows=16)), "rows must be 32 or 64 for Mosaic GPU, got 16"),
    ],
)
def test_bad_inputs_are_named(change, message):
    q, k, v = random_qkv(0, 1, 70, size=change.get("size", 64), dtype=change.get("dtype", BF16))
    chosen = jnp.full((1, 70, 2, 2), -1, jnp.int32)
    options = dict(chunk_size=change.get("chunk_size", 64), scale=1.0, tile=change.get("tile"))
    with pytest.raises(ValueError, match=message):
        block_sparse_mosaic_gpu.block_sparse_attention(q, k, v, chosen, **options)


@pytest.mark.gpu
@needs_mosaic
@pytest.mark.parametrize("chunk_size, size", [(32, 64), (128, 64), (128, 128)])
def test_on_this_gpu(chunk_size, size):
    if reason := block_sparse_mosaic_gpu.unsupported_chip():
        pytest.skip(reason)
    qkv, chosen = inputs(1000, 4, 2, size), random_selection(1, 1, 1000, 2, chunk_size, 3)
    actual = value_and_gradients(functools.partial(attend, chunk_size=chunk_size))(*qkv, chosen)
    reference = functools.partial(oracle, chunk_size=chunk_size, offset=0)
    expected = value_and_gradients(reference)(*(x.astype(jnp.float32) for x in qkv), chosen)
    compare([x.astype(jnp.float32) for x in actual], expected, forward=5e-3, gradient=2e-2)


# --------------------------------------------------------------------------------------------
# For a GPU that is not here
# --------------------------------------------------------------------------------------------


def arguments(chunk_size, size, struct=jax.ShapeDtypeStruct):
    """q of four heads, k and v of two, a selection."""
    of = lambda heads: struct((1, 1000, heads, size), BF16)
    return of(4), of(2), of(2), struct((1, 1000, 2, 2), jnp.int32)


def attend(q, k, v, selection, chunk_size, implementation="mosaic_gpu"):
    options = dict(chunk_size=chunk_size, top_k=3, implementation=implementation)
    return sparse_attention(q, k, v, selection=selection, **options)


@needs_mosaic
@pytest.mark.parametrize("chunk_size, size", [(32, 64), (128, 128)])
def test_lowers_for_cuda(chunk_size, size):
    with on_h100():
        function = functools.partial(attend, chunk_size=chunk_size)
        traced = jax.jit(function).trace(*arguments(chunk_size, size))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(r"custom_call @mosaic_gpu", text)) == 2


def on(kind):
    device = AbstractDevice(kind, num_cores=None, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), (AxisType.Explicit,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


@needs_mosaic
def test_other_gpus_are_named():
    run = lambda: jax.eval_shape(functools.partial(attend, chunk_size=64), *arguments(64, 64))
    with on("NVIDIA A100-SXM4-80GB"), pytest.raises(ValueError, match="Hopper.*found a100; use"):
        run()
    with on("NVIDIA B200"), pytest.raises(ValueError, match="Hopper"):
        run()


@needs_mosaic
def test_gradients_need_triton(monkeypatch):
    monkeypatch.setattr(block_sparse_gpu, "missing_triton", lambda: "no Triton here")
    total = lambda *x: attend(*x, chunk_size=64).sum()
    with on_h100():
        jax.eval_shape(total, *arguments(64, 64))
        with pytest.raises(ValueError, match="the gradient of block_sparse on GPU: no Triton here"):
            jax.eval_shape(jax.grad(total), *arguments(64, 64))


def test_older_versions_are_named(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    with on_h100(), pytest.raises(ValueError, match="is older than 0.12"):
        jax.eval_shape(functools.partial(attend, chunk_size=64), *arguments(64, 64))


@needs_mosaic
def test_is_never_chosen_unasked(caplog):
    """Not even for what Triton's kernels refuse: nobody has run it."""
    dispatch.forget_choices()
    with on_h100(), caplog.at_level("INFO", "rwkvx_jax.ops"):
        jax.eval_shape(
            functools.partial(attend, chunk_size=64, implementation=None), *arguments(64, 64)
        )
    assert "falling back to 'xla' on gpu" in caplog.text and "mosaic_gpu" not in caplog.text


COMPILE = """
import sys
import jax
from jax.sharding import NamedSharding, PartitionSpec
from rwkvx_jax.perf import topology
from tests.kernels import test_block_sparse_mosaic_gpu as cases
topology.on_cpu()
mesh = topology.topology_mesh("h100")
everywhere = NamedSharding(mesh, PartitionSpec())
def struct(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)
chunk_size, size = map(int, sys.argv[1:])
with jax.set_mesh(mesh):
    function = jax.jit(lambda *x: cases.attend(*x, chunk_size=chunk_size))
    function.lower(*cases.arguments(chunk_size, size, struct)).compile()
"""


@needs_mosaic
@compiles_for_h100
@pytest.mark.parametrize("chunk_size, size", [(32, 64), (128, 64), (128, 128)])
def test_h100_does_not_spill(chunk_size, size, tmp_path):
    dump = dict(MOSAIC_GPU_DUMP_PTXAS="1", MOSAIC_GPU_DUMP_TO=str(tmp_path))
    subprocess.run(
        [sys.executable, "-c", COMPILE, str(chunk_size), str(size)],
        cwd=ROOT,
        env={**os.environ, **dump},
        check=True,
        timeout=500,
    )
    reports = {x.name: x.read_text() for x in tmp_path.glob("*.ptxas")}
    for kernel in ("past_forward", "own_forward"):
        (report,) = (text for name, text in reports.items() if kernel in name)
        assert re.search(r"Used \d+ registers", report), report
        assert re.findall(r"(\d+) bytes spill", report) == ["0", "0"], report
        assert "serialized" not in report  # what ptxas says of products that must wait
