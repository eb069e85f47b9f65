"""The TPU kernels compiled for TPUs that are not here: schedule, traffic and compile time.

Needs the TPU compiler (libtpu), no TPU. The counts are the compiler's static schedule.
"""

import functools
import math
import re
import time

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels import routing
from pallas_kernels.delta_rule_tpu import generalized_delta_rule
from rwkvx_jax.config import Config, LongCEConfig, MeshConfig, ModelConfig, RunConfig, Stage
from rwkvx_jax.model import abstract_model, create_model, get_params, with_params
from rwkvx_jax.ops.block_sparse import sparse_attention
from rwkvx_jax.ops.full_attention import full_attention
from rwkvx_jax.ops.recurrence import wkv7
from rwkvx_jax.ops.selection import Selector
from rwkvx_jax.perf import hlo, static_costs, topology, work
from rwkvx_jax.perf.kernel_costs import read_costs
from rwkvx_jax.perf.static_cases import BLOCK_SPARSE, Case, all_cases
from rwkvx_jax.sharding import batch_sharding, make_mesh
from rwkvx_jax.training.step import param_shardings, stage_program

pytestmark = [
    pytest.mark.optimized,
    pytest.mark.skipif(
        not topology.is_available(), reason="libtpu is not installed: pip install 'jax[tpu]'"
    ),
]

# Bundles per token and head pair. v5p has no bar of its own; its table guards it.
BARS = {
    "wkv7_forward": {"v5e": 10, "v6e": 8.5},
    "wkv7_backward": {"v5e": 20, "v6e": 17},
}
FAST = {Case(kernel, "v5e", 768, 4096) for kernel in BARS}
FAST.add(Case("block_sparse_past_forward", "v5e", 768, 131072, 2048, 3))


@pytest.mark.thorough
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[] if case in FAST else pytest.mark.slow)
        for case in all_cases()
    ],
)
def test_schedule(case):
    result = static_costs.measure(case)
    expected = read_costs()[case.name]
    remedy = f"{case.name}: if intended, run `make static-costs`"
    assert result["body"] == pytest.approx(expected["body"], rel=0.05), remedy
    assert result["steps"] == expected["steps"], remedy
    assert result["traffic"] <= 1.3
    assert result["compile_seconds"] < 60
    bar = BARS.get(case.kernel, {}).get(case.chip)
    assert bar is None or result["bundles_per_unit"] <= bar


# K, V, scalar decays, with a and b, bound of the decays
DELTA_RULES = {
    "Gated DeltaNet": (128, 128, True, True, None),
    "KDA": (128, 128, False, True, -5.0),
    "Mamba-2": (128, 64, True, False, None),
    "64": (64, 64, True, True, None),
    "256": (256, 256, False, True, -5.0),
    "32": (32, 32, True, True, None),
    "96 x 160": (96, 160, False, True, -5.0),
    "no bound": (64, 64, False, True, None),
}


@pytest.mark.parametrize(
    "chip, rule, dtype",
    [
        pytest.param(
            *(chip, rule, dtype),
            marks=pytest.mark.thorough if (chip, rule) == ("v5e", "Mamba-2") else pytest.mark.slow,
        )
        for chip in ("v5e", "v5p", "v6e")
        for rule in DELTA_RULES
        for dtype in ("bfloat16", "float32")
    ],
)
def test_the_delta_rule_compiles(chip, rule, dtype):
    """The gradient, and so both kernels, of 16 packs of heads (the last one not always full): as
    much in a grid step as there may be."""
    key, value, scalar, delta, bound = DELTA_RULES[rule]
    mesh = topology.topology_mesh(topology.smallest(chip), {"device": 1})
    everywhere = PartitionSpec()

    def struct(channels, dtype=dtype):
        shape = 1, 500, {32: 63, 64: 31, 160: 63}.get(value, 16), channels
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, everywhere))

    tokens = [struct(key), struct(1 if scalar else key, "float32"), struct(key), struct(value)]
    tokens += [struct(key)] * 2 * delta

    def total(*tokens):
        y, end = generalized_delta_rule(*tokens, decay_bound=bound)
        return y.astype(jnp.float32).sum() + end.sum()

    gradients = jax.grad(total, argnums=tuple(range(len(tokens))))
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(
            gradients, in_specs=everywhere, out_specs=everywhere, check_vma=False
        )
        text = jax.jit(mapped).lower(*tokens).compile().as_text()
    for direction in ("forward", "backward"):
        assert re.search(rf"%\w*_{direction}[\w.]* = .*custom-call\(.*tpu_custom_call", text)


@pytest.mark.thorough
@pytest.mark.parametrize("heads, shared", [(12, True), (2, False)])
def test_the_cores_of_a_v5p_share_one_row(heads, shared):
    """Packs of heads are cut so that both have as many steps; the planner reads how many. A single
    pack cannot be cut."""
    mesh = topology.topology_mesh("v5p:2x2x1", {"device": 1})
    x = jax.ShapeDtypeStruct(
        (1, 128, heads, 64), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec())
    )
    with jax.set_mesh(mesh):
        run = jax.shard_map(
            functools.partial(wkv7, implementation="pallas"),
            in_specs=PartitionSpec(),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        text = jax.jit(run).lower(*[x] * 6).compile().as_text()
    works, _ = work.read_work(hlo.parse(text), 1)
    (steps,) = [one.parallel_steps for one in works if one.kernel == "wkv7_forward"]
    assert (steps % 2 == 0) == shared and (shared or steps == 1)


@pytest.mark.thorough
@pytest.mark.parametrize("chip", ["v5e", pytest.param("v5p", marks=pytest.mark.slow)])
def test_packed_documents_compile(chip):
    """Gradients with segment ids."""
    mesh = topology.topology_mesh(topology.smallest(chip), {"device": 1})
    struct = lambda shape, dtype: jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, PartitionSpec())
    )
    x, ids = struct((1, 512, 4, 64), jnp.bfloat16), struct((1, 512), jnp.int32)
    sparse = functools.partial(sparse_attention, chunk_size=64, top_k=3)
    for op, arrays, kernels in (
        (wkv7, 6, ("wkv7_forward", "wkv7_backward")),
        (full_attention, 3, ("splash",)),
        (sparse, 3, BLOCK_SPARSE),
    ):

        def total(ids, *arrays, op=op):
            out = op(*arrays, segment_ids=ids)
            return sum(y.astype(jnp.float32).sum() for y in jax.tree.leaves(out))

        gradients = jax.grad(total, argnums=tuple(range(1, 1 + arrays)))
        with jax.set_mesh(mesh):
            mapped = jax.shard_map(
                gradients, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False
            )
            text = jax.jit(mapped).lower(ids, *[x] * arrays).compile().as_text()
        for kernel in kernels:
            assert re.search(rf"%\w*{kernel}[\w.]* = .*custom-call\(.*tpu_custom_call", text), (
                kernel
            )


def test_topologies():
    assert topology.topology_mesh("v5e:2x2", {"data": 2, "tensor": 2}).shape == {
        "data": 2,
        "tensor": 2,
    }
    assert topology.topology_mesh("v5p:4x4x8").devices.size == 128


@pytest.mark.parametrize(
    "name, message",
    [("v5e", "v5e:2x2"), ("v9:2x2", "v5e:2x2"), ("v5e:3x7", "does not know topology 'v5e:3x7'")],
)
def test_bad_topologies_are_named(name, message):
    with pytest.raises(ValueError, match=message):
        topology.topology_devices(name)


def test_a_mesh_larger_than_the_topology_is_refused():
    with pytest.raises(ValueError, match="need 8 devices; v5e:2x2 has 4"):
        topology.topology_mesh("v5e:2x2", {"data": 8})


@pytest.mark.thorough
def test_a_model_on_a_mesh_takes_the_kernels():
    """Gradients of a whole model compiled for four chips: each runs the kernels on its own part."""
    mesh = topology.topology_mesh("v5e:2x2", {"data": 2, "fsdp": 1, "tensor": 2, "context": 1})
    config = ModelConfig(
        vocab_size=128, num_blocks=1, num_attention_blocks=0, width=256, head_size=64
    )
    model = abstract_model(config, RunConfig(compute_dtype="bfloat16"))
    params = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        get_params(model),
        param_shardings(model, mesh),
    )
    tokens = jax.ShapeDtypeStruct((4, 256), jnp.int32, sharding=batch_sharding(mesh, 4))

    def loss(params, tokens):
        return with_params(model, params).features(tokens).astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss)).lower(params, tokens).compile().as_text()
    kernels = re.findall(r"%\S+ = .*custom-call\(.*tpu_custom_call", compiled)
    assert len(kernels) >= 2, "forward and backward of the recurrence should be Pallas kernels"
    # The kernels see half of the batch and half of the four heads.
    assert any("[2,256,128]" in kernel or "[2,256,2,64]" in kernel for kernel in kernels)


@pytest.mark.slow
@pytest.mark.parametrize("selector", ["mean", "bounds"])
def test_sparse_attention_on_a_mesh_takes_the_kernels(selector):
    """Gate, routing and attention with their gradients, each chip on its rows and heads."""
    mesh = topology.topology_mesh("v5e:2x2", {"data": 2, "fsdp": 1, "tensor": 2, "context": 1})
    config = ModelConfig(
        vocab_size=128,
        num_blocks=1,
        num_attention_blocks=1,
        width=256,
        head_size=64,
        chunk_size=64,
        selector=selector,
    )
    model = abstract_model(config, RunConfig(compute_dtype="bfloat16"))
    params = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        get_params(model),
        param_shardings(model, mesh),
    )
    tokens = jax.ShapeDtypeStruct((4, 512), jnp.int32, sharding=batch_sharding(mesh, 4))

    def loss(params, tokens):
        return with_params(model, params).features(tokens).astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss)).lower(params, tokens).compile().as_text()
    for name in BLOCK_SPARSE:
        assert re.search(rf"%{name}[\w.]* = .*custom-call\(.*tpu_custom_call", compiled), name


@pytest.mark.slow
def test_routing_compiles_in_a_minute():
    """Keys, sorting, tables and tiles of 131072 queries and two heads, as one program."""
    plan = routing.make_plan(
        queries=131072, segment=32768, rows=256, chunks=64, slots=2, chunk_size=2048, first=0
    )
    mesh = topology.topology_mesh("v5e:2x2", {"device": 1})
    everywhere = NamedSharding(mesh, PartitionSpec())
    selection = jax.ShapeDtypeStruct((1, 131072, 2, 2), jnp.int32, sharding=everywhere)
    own = jax.ShapeDtypeStruct((1, 131072), jnp.int32, sharding=everywhere)

    def route(selection, own):
        found = routing.route(selection, own, plan)
        return found.rows, found.chunk, found.count

    everything = PartitionSpec()
    mapped = jax.shard_map(
        route, mesh=mesh, in_specs=everything, out_specs=everything, check_vma=False
    )
    start = time.process_time()  # not the wall's: other work on the machine must not count
    jax.jit(mapped).lower(selection, own).compile()
    assert time.process_time() - start < 60


@pytest.mark.slow
def test_memory_of_sparse_attention():
    """Temporaries of the whole op and its gradient at 128K, 12 heads: at most 4 times q, k, v."""
    mesh = topology.topology_mesh("v5e:2x2", {"device": 1})
    shape = 1, 131072, 12 * 64  # as projections lay them out
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec()))

    def gradients(q, k, v, cotangent):
        def attend(*qkv):
            qkv = (x.reshape(*x.shape[:2], 12, 64) for x in qkv)
            return sparse_attention(*qkv, chunk_size=2048, top_k=3).reshape(shape)

        return jax.vjp(attend, q, k, v)[1](cotangent)

    everything = PartitionSpec()
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(
            gradients, in_specs=everything, out_specs=everything, check_vma=False
        )
        compiled = jax.jit(mapped).lower(x, x, x, x).compile()
    inputs = 3 * 2 * math.prod(shape)
    assert compiled.memory_analysis().temp_size_in_bytes <= 4 * inputs


@pytest.mark.slow
@pytest.mark.parametrize(
    "chip, length, size, chunk_size, top_k, dtype",
    [
        (chip, 65536, 64, 32, 64, dtype)
        for chip in ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
        for dtype in (jnp.bfloat16, jnp.float32)
    ]
    + [
        ("v5e:2x2", 262144, 64, 32, 64, jnp.bfloat16),
        ("v5p:2x2x1", 1 << 20, 64, 512, 16, jnp.bfloat16),
        ("v5p:2x2x1", 1 << 20, 128, 2048, 32, jnp.bfloat16),
    ],
)
def test_long_tables(chip, length, size, chunk_size, top_k, dtype):
    """The sizes of configs/recall_64k.py, 4 million pairs a head, sorted in parts that fit VMEM;
    and tables that fill scalar memory more than once."""
    mesh = topology.topology_mesh(chip, {"device": 1})
    everywhere = NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((1, length, 128 // size, size), dtype, sharding=everywhere)
    settings = {"chunk_size": chunk_size, "top_k": top_k, "implementation": "pallas"}
    settings["selector"] = Selector("bounds" if chunk_size == 32 else "mean")

    def total(*qkv):
        return sparse_attention(*qkv, **settings).astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(x, x, x).compile().as_text()
    packed = dtype == jnp.bfloat16 and size == 64
    absent = set() if packed else {"block_sparse_start"}
    for name in set(BLOCK_SPARSE) - absent:
        assert re.search(rf"%[\w.]*{name}[\w.]* = .*custom-call\(.*tpu_custom_call", compiled), name


@pytest.mark.slow
def test_a_train_step_over_parts_of_sequences():
    """The whole step with LongCE, and the making of its parameters, for eight chips."""
    stage = Stage("long", 4096, 4, 1, 1e-4, loss="longce", longce=LongCEConfig(256, 768))
    model = ModelConfig(
        vocab_size=512, num_blocks=2, num_attention_blocks=1, width=256, head_size=64,
        chunk_size=256,
    )  # fmt: skip
    sizes = {"data": 1, "fsdp": 2, "tensor": 2, "context": 2}
    config = Config(model, (stage,), mesh=MeshConfig(**sizes))
    mesh = make_mesh(config.mesh, topology.topology_devices("v5e:2x4"))
    program = stage_program(config, stage, mesh)
    cut = batch_sharding(mesh, 4)
    tokens = jax.ShapeDtypeStruct((4, 4097), jnp.int32, sharding=cut)
    mask = jax.ShapeDtypeStruct((4, 4096), jnp.float32, sharding=cut)
    batch = {"tokens": tokens, "mask": mask}
    with jax.set_mesh(mesh):
        step = program.train_step.lower(program.abstract_state(), batch).compile()
        make = lambda: get_params(create_model(model))
        jax.jit(make, out_shardings=param_shardings(abstract_model(model), mesh)).lower().compile()
    text = step.as_text()
    kernels = re.findall(r"%\S+ = .*custom-call\(.*tpu_custom_call", text)
    # A device has half of the rows, heads and tokens; windows it has whole, half of each pair.
    assert any("2048" in kernel for kernel in kernels) and any(
        "1024" in kernel for kernel in kernels
    )
    sizes = {
        int(size)
        for shape in re.findall(r"= (.*?) all-gather(?:-start)?\(", text)
        for dims in re.findall(r"\[([\d,]+)\]", shape)
        for size in dims.split(",")
    }
    assert 4096 not in sizes, "a sequence is gathered"
