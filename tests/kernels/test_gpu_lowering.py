"""The GPU kernels lowered for CUDA without a GPU; compiled, with registers and spills, where jax's
CUDA plugin and NVIDIA's assembler are installed."""

import functools
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels import block_sparse_gpu, wkv7_gpu
from tests.helpers import ROOT

pytestmark = pytest.mark.optimized

TRITON = "__gpu$xla.gpu.triton"


def on_h100():
    """Lowering for a GPU that is not here."""
    device = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), (AxisType.Explicit,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def arguments(head, dtype, struct=jax.ShapeDtypeStruct):
    """Inputs and the cotangents of both results."""
    tokens, state = (1, 512, 4, head), (1, 4, head, head)
    x, log_w = struct(tokens, dtype), struct(tokens, jnp.float32)
    start = struct(state, jnp.float32)
    return [x, log_w, x, x, x, x, start, x, start]


def gradients(*x):
    """Runs both kernels: the forward that keeps residuals, and the backward."""
    return jax.vjp(wkv7_gpu.wkv7, *x[:7])[1](x[7:])


def attention_arguments(head, dtype, struct=jax.ShapeDtypeStruct):
    """q, k, v, a selection and the cotangent of the result."""
    x = struct((1, 1000, 2, head), dtype)
    return [x, x, x, struct((1, 1000, 2, 2), jnp.int32), x]


def attention_gradients(q, k, v, selection, cotangent, chunk_size=128, starts=None):
    """Runs all five kernels of sparse attention."""

    def attend(q, k, v):
        return block_sparse_gpu.block_sparse_attention(
            q, k, v, selection, chunk_size=chunk_size, scale=0.1, starts=starts
        )

    return jax.vjp(attend, q, k, v)[1](cotangent)


@pytest.mark.parametrize("head", [64, 128])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    "function, struct, kernels",
    [(gradients, arguments, 2), (attention_gradients, attention_arguments, 5)],
)
def test_lowers_for_cuda(function, struct, kernels, head, dtype):
    with on_h100():
        traced = jax.jit(function).trace(*struct(head, dtype))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count(TRITON) == kernels


def packed_gradients(*x):
    """The kernels of WKV-7 where documents are packed."""
    *x, fresh = x
    return jax.vjp(functools.partial(wkv7_gpu.wkv7, fresh=fresh), *x[:7])[1](tuple(x[7:]))


def packed_arguments(head, dtype, struct=jax.ShapeDtypeStruct):
    return [*arguments(head, dtype, struct), struct((1, 512), bool)]


def packed_attention_gradients(*x):
    """The kernels of sparse attention where documents are packed."""
    *x, starts = x
    return attention_gradients(*x, starts=starts)


def packed_attention_arguments(head, dtype, struct=jax.ShapeDtypeStruct):
    return [*attention_arguments(head, dtype, struct), struct((1, 1000), jnp.int32)]


@pytest.mark.parametrize(
    "function, struct, kernels",
    [
        (packed_gradients, packed_arguments, 2),
        (packed_attention_gradients, packed_attention_arguments, 5),
    ],
)
def test_packed_documents_lower_for_cuda(function, struct, kernels):
    test_lowers_for_cuda(function, struct, kernels, 64, jnp.bfloat16)


@pytest.mark.slow
def test_many_small_chunks_lower_for_cuda():
    """As many choices as configs/recall_64k.py makes: segments must be smaller for pairs to fit."""
    x = jax.ShapeDtypeStruct((1, 65536, 2, 64), jnp.float32)
    selection = jax.ShapeDtypeStruct((1, 65536, 2, 63), jnp.int32)
    with on_h100():
        function = functools.partial(attention_gradients, chunk_size=32)
        traced = jax.jit(function).trace(x, x, x, selection, x)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count(TRITON) == 5


WITHOUT_TRITON = """
import sys
sys.modules["jax.experimental.pallas.triton"] = None  # importing it now fails
import jax
jax.config.update("jax_platforms", "cpu")
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
import rwkvx_jax
from pallas_kernels import block_sparse_gpu, wkv7_gpu
from rwkvx_jax.model import create_model
from tests.model_cases import FLOAT32, TINY

tokens = jnp.arange(20, dtype=jnp.int32)[None]
logits = jax.jit(lambda model, tokens: model(tokens))(create_model(TINY, FLOAT32), tokens)
assert jnp.isfinite(logits).all()

x = jax.ShapeDtypeStruct((1, 64, 2, 64), jnp.bfloat16)
device = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
mesh = AbstractMesh((1,), ("x",), (AxisType.Explicit,), abstract_device=device)
def sparse(implementation):
    settings = {"chunk_size": 32, "top_k": 2, "implementation": implementation}
    return jax.eval_shape(lambda *x: rwkvx_jax.sparse_attention(*x, **settings), x, x, x)
def recurrence(implementation):
    op = lambda *x: rwkvx_jax.wkv7(*x, implementation=implementation)
    return jax.eval_shape(op, *[x] * 6)
with jax.sharding.use_abstract_mesh(mesh):
    for op in (sparse, recurrence):
        op(None)  # another form, with a warning
        try:
            op("pallas")
        except ValueError as error:
            print(error)
"""


@pytest.mark.slow
def test_without_triton_all_but_the_gpu_kernels_works():
    """JAX has announced to remove it: a process in which it cannot be imported."""
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    errors = result.stdout.splitlines()
    assert len(errors) == 2
    for error, op in zip(errors, ("sparse_attention", "wkv7"), strict=True):
        assert error.startswith(f"{op}: implementation 'pallas' cannot run here: jax ")
        assert "has no jax.experimental.pallas.triton" in error and "install a jax" in error
        assert "use '" in error  # what can run
    for op in ("sparse_attention", "wkv7"):
        assert f"{op}: falling back to" in result.stderr


def assembler():
    """NVIDIA's `ptxas` that XLA takes, where it is installed: of the wheel nvidia-cuda-nvcc, else
    of the path. An older one cannot read the PTX that XLA writes for it."""
    package = find_spec("nvidia")
    wheels = (
        [Path(x, "cu13/bin/ptxas") for x in package.submodule_search_locations] if package else []
    )
    return next((str(x) for x in wheels if x.exists()), shutil.which("ptxas"))


def compiles_for_h100(test):
    """Marks a test that compiles in a process of its own."""
    for missing, what in (
        (not find_spec("jax_cuda13_plugin"), "jax's CUDA plugin"),
        (not assembler(), "ptxas, of the CUDA toolkit"),
    ):
        test = pytest.mark.skipif(missing, reason=f"needs {what}")(test)
    return pytest.mark.slow(test)


COMPILE = """
import sys
import jax
from jax.sharding import NamedSharding, PartitionSpec
from rwkvx_jax.perf import topology
from tests.kernels import test_gpu_lowering as cases
topology.on_cpu()
mesh = topology.topology_mesh("h100")
everywhere = NamedSharding(mesh, PartitionSpec())
def struct(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)
prefix = sys.argv[2]
arguments = getattr(cases, prefix + "arguments")(int(sys.argv[1]), "bfloat16", struct)
with jax.set_mesh(mesh):
    jax.jit(getattr(cases, prefix + "gradients")).lower(*arguments).compile()
"""


@compiles_for_h100
@pytest.mark.parametrize("head", [64, 128])
@pytest.mark.parametrize(
    "prefix, names",
    [
        (prefix + op, names)
        for prefix in ("", "packed_")
        for op, names in (
            ("", ("wkv7_forward", "wkv7_backward")),
            (
                "attention_",
                tuple(
                    f"block_sparse_{x}"
                    for x in ("past_forward", "own_forward", "past_dq", "own_dq", "dkv")
                ),
            ),
        )
    ],
)
def test_h100_does_not_spill(prefix, names, head, tmp_path):
    # Newer jax writes PTX only if asked; asked for everything, it took 12 times as long.
    flags = f"--xla_dump_to={tmp_path} --xla_dump_emitter_re=ptx"
    subprocess.run(
        [sys.executable, "-c", COMPILE, str(head), prefix],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags},
        check=True,
        timeout=600,
    )
    report = ""
    for ptx in (
        x for x in tmp_path.glob("*.ptx") if re.search(r"entry (wkv7|block)", x.read_text())
    ):
        command = [assembler(), "-v", "-arch=sm_90a", str(ptx), "-o", os.devnull]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        report += result.stderr
    found = r"entry function '((?:wkv7|block)_\w+)'.*?(\d+) bytes spill stores"
    kernels = re.findall(found, report, re.S)
    assert {name for name, _ in kernels} == set(names)
    for name, spilled in kernels:
        assert int(spilled) == 0, f"{name} at head size {head} spills {spilled} bytes:\n{report}"
