"""The planner: estimates against hand computation, plans for TPUs that are not here, advice."""

import dataclasses
import json
import math
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.chips import GIB, TPUS
from rwkvx_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    LongCEConfig,
    LoRAConfig,
    MeshConfig,
    ModelConfig,
    RunConfig,
    Stage,
)
from rwkvx_jax.model import abstract_model, get_params
from rwkvx_jax.ops.block_sparse import sparse_attention
from rwkvx_jax.perf import hlo, topology
from rwkvx_jax.perf import plan_command as cli
from rwkvx_jax.perf.advice import advise
from rwkvx_jax.perf.collectives import Collective
from rwkvx_jax.perf.kernel_costs import KernelCosts, read_costs
from rwkvx_jax.perf.machine import Machine
from rwkvx_jax.perf.planner import Memory, Plan, make_plan
from rwkvx_jax.perf.programs import Program, cache_shardings, read_program, train_program
from rwkvx_jax.perf.roofline import estimate, place_of
from rwkvx_jax.perf.work import Work, read_work
from rwkvx_jax.sharding import make_mesh
from rwkvx_jax.training import model_flops
from rwkvx_jax.training.step import stage_program

pytestmark = pytest.mark.optimized

MODEL = ModelConfig(
    vocab_size=1024, num_blocks=2, num_attention_blocks=0, width=256, head_size=64, chunk_size=128,
    top_k=2,
)  # fmt: skip
STAGE = Stage(
    "long", seq_len=512, global_batch=8, steps=10, peak_lr=1e-3, accumulation=2,
    loss="longce", longce=LongCEConfig(window=128, stride=128),
)  # fmt: skip
FILE = """
from rwkvx_jax.config import *
def get_config():
    return Config(
        model=ModelConfig(vocab_size=1024, num_blocks=2, num_attention_blocks=0, width=256),
        stages=(
            Stage("long", seq_len=512, global_batch=8, steps=10, peak_lr=1e-3, accumulation=2,
                  loss="longce", longce=LongCEConfig(window=128, stride=128)),
        ),
        run=RunConfig(loss_block=1024),
        data=DataConfig(reset_at_documents=False),
    )
"""
needs_compiler = pytest.mark.skipif(
    not topology.is_available(), reason="libtpu is not installed: pip install 'jax[tpu]'"
)


# ------------------------------------------------------------------------------------------------
# Model flops
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"key_conv": 3, "ffn_width": 33}, {"low_rank": "rwkv_lm"}])
def test_parameters_are_counted_without_a_model(changes):
    for config in (ModelConfig.tiny(), ModelConfig.tiny().without_attention()):
        config = dataclasses.replace(config, **changes)
        leaves = jax.tree.leaves(get_params(abstract_model(config)))
        assert config.num_parameters == sum(math.prod(leaf.shape) for leaf in leaves)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_blocks": 4},
        {"num_blocks": 0, "backbone": "llama", "num_kv_heads": 1, "tied_embeddings": True},
    ],
)
def test_matrix_products_are_those_of_the_parameters(changes):
    """Every matrix but the embedding multiplies every token once."""
    config = ModelConfig(vocab_size=96, num_attention_blocks=2, width=128, head_size=64, **changes)
    params = jax.tree_util.tree_leaves_with_path(get_params(abstract_model(config)))
    sizes = {jax.tree_util.keystr(path): leaf.shape for path, leaf in params}
    matrices = sum(
        math.prod(shape)
        for name, shape in sizes.items()
        if len(shape) == 2 + ("blocks" in name) and "embed" not in name and "r_k" not in name
    )
    time = 100
    rest = config.num_blocks * model_flops.recurrence_flops(config)
    rest += config.num_attention_blocks * model_flops.attention_flops(config, time)
    assert model_flops.forward_flops(config, time) == time * (2 * matrices + rest)


@pytest.mark.parametrize(
    "mixer, products",
    [
        ("rwkv7", 4 * 64 * 64 * 2),  # 2 heads with keys and values of 64
        ("kda", 4 * 64 * 64 * 2),
        ("rwkv6", 2 * 64 * 64 * 2),
        ("mamba2", 2 * 128 * 64 * 4),  # of 4 heads, keys of 128
        ("rwkv4", 0),
    ],
)
def test_products_of_a_recurrence(mixer, products):
    config = ModelConfig(width=128, head_size=64, num_blocks=2, num_attention_blocks=0, mixer=mixer)
    assert model_flops.recurrence_flops(config) == 2 * products
    matrices = config.mixer_sizes.matrices + 2 * 128 * 512
    assert model_flops.rwkv_block_flops(config) == 2 * (matrices + products)


@pytest.mark.parametrize("time", [100, 700])
def test_visible_keys_are_those_that_attention_reads(time):
    """Counted by attention itself: the gradient reaches exactly the values that were read."""
    config = ModelConfig(width=64, num_blocks=1, num_attention_blocks=1, chunk_size=128, top_k=2)
    q, k = jax.random.normal(jax.random.key(0), (2, 1, time, 1, 8))
    one_hot = np.eye(time, dtype=np.float32)[None, :, None]  # values that name their position
    options = {"chunk_size": 128, "top_k": 2, "implementation": "reference"}
    weights = np.asarray(sparse_attention(q, k, one_hot, **options))[0, :, 0]
    assert model_flops.visible_keys(config, time) == pytest.approx((weights > 0).sum() / time)


RUN_ON = DataConfig(reset_at_documents=False)  # a learned state begins no packed document


def test_what_is_frozen_needs_no_gradient_of_its_own():
    model = ModelConfig(vocab_size=96, num_blocks=4, num_attention_blocks=2, width=128)
    model = dataclasses.replace(model, learned_state=True)
    flops = lambda **changes: model_flops.step_flops(
        Config(model, (stage := Stage("s", 64, 2, 1, 1e-3, **changes),), data=RUN_ON), stage
    )
    trained = model_flops.attention_block_flops(model, 64) * model.num_attention_blocks
    recurrence = model_flops.recurrence_flops(model) * model.num_blocks
    forward = model_flops.forward_flops(model, 64) / 64
    frozen = forward - trained - recurrence
    assert flops() == 2 * 64 * 3 * forward
    assert flops(trainable="attention") == pytest.approx(2 * 64 * (3 * forward - frozen))
    attention = model_flops.attention_flops(model, 64) * model.num_attention_blocks
    matrices = forward - recurrence - attention
    assert flops(trainable="state") == pytest.approx(2 * 64 * (3 * forward - matrices))
    lora = LoRAConfig(rank=8, targets=("channel_mix.key", "attention.output"))
    adapters = 8 * (6 * (128 + 512) + 2 * (128 + 128))  # in both kinds of blocks; in attention
    assert flops(trainable="lora", lora=lora) == pytest.approx(
        2 * 64 * (3 * forward - matrices + 3 * 2 * adapters)
    )


# ------------------------------------------------------------------------------------------------
# Estimates
# ------------------------------------------------------------------------------------------------


def machine(generation, *shape, slices=1):
    places = [p for _ in range(slices) for p in np.ndindex(*shape)]
    size = math.prod(shape)
    devices = [SimpleNamespace(coords=p, slice_index=i // size) for i, p in enumerate(places)]
    return Machine.of(generation, devices)


def test_collectives_take_the_links_of_their_axes():
    pod, part = machine("v5e", 16, 16), 1_000_000
    ids = np.arange(256).reshape(16, 16)
    seconds = lambda kind, groups: pod.collective_seconds(Collective(kind, part, groups))
    share = 15 / 16 * part
    assert seconds("all-gather", ids) == pytest.approx(share / (2 * 50e9))
    assert seconds("all-reduce", ids) == pytest.approx(2 * share / (2 * 50e9))
    # Both axes serve a group over all chips; an open line has one link; an all-to-all goes far.
    everyone = ids.reshape(1, -1)
    assert seconds("all-gather", everyone) == pytest.approx(255 / 256 * part / (4 * 50e9))
    assert seconds("all-gather", ids[:, :4]) == pytest.approx(0.75 * part / 50e9)
    assert seconds("all-to-all", ids) == pytest.approx(share * 4 / (2 * 50e9))
    # Members two apart share their links with the group between.
    assert seconds("all-gather", ids[:, :8:2]) == pytest.approx(0.75 * part / 50e9 * 7 / 4)
    pairs = np.stack([ids[:, 0], ids[:, 15]], axis=1)  # neighbours around the ring
    assert seconds("collective-permute", pairs) == pytest.approx(part / 50e9)
    pairs = np.stack([ids[:, 0], ids[:, 8]], axis=1)
    assert seconds("collective-permute", pairs) == pytest.approx(8 * part / 50e9)


def test_what_leaves_a_slice_takes_the_data_centres_network():
    two = machine("v5p", 2, 2, 1, slices=2)
    inside = Collective("all-reduce", 100, np.array([[0, 1, 2, 3], [4, 5, 6, 7]]))
    across = Collective("all-reduce", 100, np.array([[0, 4], [1, 5], [2, 6], [3, 7]]))
    assert not two.crosses_slices(inside) and two.crosses_slices(across)
    assert two.collective_seconds(across) == pytest.approx(100 / 6.25e9)
    work = [Work("a", 2.0, collective=inside), Work("b", 1.0, collective=across)]
    found = estimate(work, two, KernelCosts("v5p", {}))
    assert (found.ici_bytes, found.dcn_bytes) == (300, 100)


def test_operations_take_as_long_as_their_slowest_part():
    chip, one = TPUS["v5e"], machine("v5e", 1)
    costs = KernelCosts("v5e", {"k/v5e/small": {"bundles": 1500, "hbm_bytes": 1000},
                                "k/v5e/large": {"bundles": 10**6, "hbm_bytes": 10**6},
                                "k/v5p/small": {"bundles": 1, "hbm_bytes": 1000}})  # fmt: skip
    work = [
        Work("product", 3.0, flops=1e12, passes=1e12, bytes=1.0),
        Work("copy", 2.0, bytes=1e9),
        Work("kernel", 1.0, flops=10.0, passes=10.0, bytes=10.0, kernel="k", kernel_bytes=2000),
        Work("unknown", 1.0, kernel="other", kernel_bytes=10.0),
    ]
    found = estimate(work, one, costs)
    kernel = 2 * 1500 / chip.clock  # of the case nearest in size, for twice its bytes
    assert found.serial == pytest.approx(3e12 / chip.flops + 2e9 / chip.hbm_bandwidth + kernel)
    assert found.seconds == found.serial
    assert found.compute == pytest.approx((3e12 + 10) / chip.flops)
    assert (found.floor, found.bound) == (found.compute, "compute")
    assert found.kernels["k"]["bundles_known"] and not found.kernels["other"]["bundles_known"]


def test_products_fused_with_a_collective_come_on_top():
    part = Collective("all-gather", 8 * 10**9, np.arange(4)[None])
    work = [Work("both", 2.0, flops=1e12, passes=1e12, bytes=1e9, collective=part)]
    found = estimate(work, machine("v5e", 4), KernelCosts("v5e", {}))
    assert found.serial == pytest.approx(2e12 / TPUS["v5e"].flops)
    assert found.network == pytest.approx(2 * 6e9 / 50e9)
    assert found.seconds == found.serial + found.network == sum(found.places.values())


def test_the_table_of_kernels_is_read():
    for kernel in ("wkv7_forward", "wkv7_backward"):
        for chip in ("v5e", "v5p", "v6e"):
            assert KernelCosts(chip, read_costs()).bundles(kernel, 1e8) > 0


def test_kernels_of_another_chunk_size_are_others():
    table = {
        "k/v5e/T9/C128/K16": {"bundles": 7, "hbm_bytes": 100},
        "k/v5e/T9/C2048/K3": {"bundles": 5, "hbm_bytes": 100},
    }
    assert KernelCosts("v5e", table, ("C2048", "K3")).bundles("k", 200) == 10
    assert KernelCosts("v5e", table, ("C2048", "K4")).bundles("k", 200) is None


def test_cores_share_a_kernels_grid_as_it_is():
    """An odd number of parallel steps leaves one idle at the end, a single one throughout."""
    case = {"bundles": 100, "hbm_bytes": 10, "parallel_steps": 4}
    costs = KernelCosts("v5p", {"k/v5p/T": case})
    for steps, bundles in ((4, 100), (None, 100), (1, 200), (3, 400 / 3)):
        assert costs.bundles("k", 10, steps) == pytest.approx(bundles)
    assert KernelCosts("v5e", {"k/v5e/T": case}).bundles("k", 10, 1) == 100


def test_a_call_is_likened_to_a_case_with_such_a_grid():
    """Few heads of a long text and all heads of a short one may have as many bytes."""
    table = {
        "k/v5p/D320": {"bundles": 900, "hbm_bytes": 100, "parallel_steps": 6},
        "k/v5p/D2560": {"bundles": 600, "hbm_bytes": 90, "parallel_steps": 40},
    }
    costs = KernelCosts("v5p", table)
    assert costs.bundles("k", 180, 80) == 1200 and costs.bundles("k", 90, 6) == 810


def test_the_two_devices_of_a_chip_share_it():
    devices = [SimpleNamespace(coords=(i // 2, 0, 0), slice_index=None) for i in range(4)]
    found = Machine.of("v4", devices).chip
    assert found.flops == TPUS["v4"].flops / 2 and found.hbm == 15.25 * GIB
    with pytest.raises(ValueError, match="no peaks are known for tpu7x"):
        Machine.of("tpu7x", devices)


# ------------------------------------------------------------------------------------------------
# Whole runs
# ------------------------------------------------------------------------------------------------


def hand_formula(model: ModelConfig, stage: Stage) -> float:
    """Products of a step as this project computes it on a TPU, attention's own left out.

    Of each block: forward, again in the backward pass (but for the last product, whose result the
    gradient does not need), and twice the forward for the gradients. The recurrence in chunks of 64
    tokens: 13 products of chunk x 64 x 64 forward, twice, and 25 backward. The head: forward, again
    in the backward pass, and twice. LongCE's windows: forward once, logits of `stride` tokens.
    """
    width, hidden, tokens = model.width, model.hidden_width, stage.seq_len * stage.global_batch
    last = 2 * width * hidden
    rwkv = model_flops.rwkv_block_flops(model) - model_flops.recurrence_flops(model)
    attention = 2 * (4 * width**2 + 2 * width * hidden)
    wkv = 2 * width * 64  # one product, a token
    head = 2 * width * model.vocab_size
    blocks, others = model.num_blocks, model.num_attention_blocks
    train = blocks * (4 * rwkv - last + wkv * (2 * 13 + 25)) + others * (4 * attention - last)
    span = stage.longce.window + stage.longce.stride
    forward = blocks * (rwkv + wkv * 13) + others * attention
    forward += head * stage.longce.stride / span
    starts = range(stage.longce.stride, stage.seq_len - stage.longce.window, stage.longce.stride)
    return tokens * (train + 4 * head) + stage.global_batch * span * len(starts) * forward


@pytest.mark.thorough
@needs_compiler
def test_a_plan_from_the_command_line(tmp_path, capsys):
    (tmp_path / "config.py").write_text(FILE)
    arguments = ["--config", str(tmp_path / "config.py"), "--topology", "v5e:2x2", "--json"]
    assert cli.main([*arguments, str(tmp_path / "plan.json"), "--mesh.fsdp", "2"]) == 0
    said = capsys.readouterr()
    for text in (
        "4 devices, mesh data 2 x fsdp 2",
        "8 samples of 512 tokens a step, in 2 parts, longce, trains all",
        "wkv7: using 'pallas' on tpu",
        "kernel wkv7_backward: 4 times, time from scheduled bundles",
        "of 15.75 GiB",
        "all-reduce of",
        "model-flops utilisation",
    ):
        assert text in said.out, text
    assert "compiling train long (1/1)" in said.err
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1, "context": 1}
    (program,) = plan["programs"]
    assert program["fits"] and not program["notes"]
    assert program["flops"] * 4 == pytest.approx(hand_formula(MODEL, STAGE), rel=0.02)
    assert program["kernels"]["wkv7_forward"]["times"] == 2 * 2 * 2 + 2 * 2 * 2
    # Parameters and two moments in float32, spread over fsdp where they are matrices.
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(get_params(abstract_model(MODEL))))
    assert program["memory"]["arguments"] == pytest.approx(3 * 4 * count / 2, rel=0.1)
    assert program["ici_bytes"] > 0 and program["dcn_bytes"] == 0
    assert program["floor"]["seconds"] <= program["estimate"]["seconds"]
    days = STAGE.tokens / program["estimate"]["tokens_per_second"] / 86400
    assert program["estimate"]["days"] == pytest.approx(days)


@pytest.mark.slow
@needs_compiler
def test_a_hybrid_costs_what_the_formula_says():
    model = ModelConfig(
        vocab_size=1024, num_blocks=2, num_attention_blocks=1, width=256, chunk_size=128, top_k=2
    )
    config = Config(model=model, stages=(STAGE,), run=RunConfig(loss_block=1024))
    mesh = make_mesh(MeshConfig(data=4), topology.topology_devices("v5e:2x2"))
    with jax.set_mesh(mesh):
        compiled = train_program(config, STAGE, mesh).lower().compile()
    works, loops = read_work(hlo.parse(compiled.as_text()), mesh.size)
    is_attention = lambda place: place.startswith("ops/") or "block_sparse" in place
    attention = sum(w.times * w.flops for w in works if is_attention(place_of(w.source)))
    found = 4 * (sum(w.times * w.flops for w in works) - attention)
    assert found == pytest.approx(hand_formula(model, STAGE), rel=0.02)
    assert attention > 0
    assert not any(loop.trips.basis == "unknown" for loop in loops)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("piece", [1, 256])
@pytest.mark.parametrize(
    "sizes, batch", [({"data": 4}, 1), ({"data": 2, "tensor": 2}, 4)], ids=["idle", "spread"]
)
def test_reading_on_several_devices(piece, sizes, batch):
    config = Config(model=dataclasses.replace(MODEL, num_attention_blocks=1), stages=(STAGE,))
    mesh = make_mesh(MeshConfig(**sizes), topology.topology_devices("v5e:2x2"))
    plan = make_plan(read_program(config, mesh, batch, length=4096, piece=piece), mesh, "v5e")
    assert plan.fits and plan.devices == 4
    # Pages are read by the devices that hold them; only activations are exchanged.
    assert plan.estimate.ici_bytes < 2 * 2 * 4096 * config.model.width  # of one text's pages


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("piece", [1, 256])
def test_reading_programs(piece):
    config = Config(model=MODEL, stages=(STAGE,))
    mesh = make_mesh(MeshConfig(data=1), topology.topology_devices("v5e:2x2")[:1])
    plan = make_plan(read_program(config, mesh, batch=1, length=512, piece=piece), mesh, "v5e")
    assert plan.fits and plan.program.kind == ("decode" if piece == 1 else "prefill")
    # A decode step reads at least every matrix.
    params = jax.tree.leaves(get_params(abstract_model(MODEL)))
    matrices = sum(4 * math.prod(x.shape) for x in params) - 4 * 1024 * 256
    assert plan.estimate.bytes > 0.9 * matrices


@needs_compiler
def test_devices_of_several_slices():
    devices = topology.topology_devices("v5e:2x2", slices=2)
    assert [device.slice_index for device in devices] == [0] * 4 + [1] * 4
    assert Machine.of("v5e", devices).slices.tolist() == [0] * 4 + [1] * 4


@needs_compiler
def test_the_state_of_a_stage_is_described_under_an_absent_mesh():
    mesh = topology.topology_mesh("v5e:2x2", {"data": 2, "fsdp": 2, "tensor": 1, "context": 1})
    config = Config(model=MODEL, stages=(STAGE,))
    with jax.set_mesh(mesh):
        state = stage_program(config, STAGE, mesh).abstract_state()
    moments = next(s for s in state.opt_state if hasattr(s, "mu"))
    matrix = state.params["blocks"]["time_mix"]["receptance"]
    assert moments.mu["blocks"]["time_mix"]["receptance"].sharding == matrix.sharding
    assert matrix.sharding.spec[1] == "fsdp"


# ------------------------------------------------------------------------------------------------
# Advice and errors
# ------------------------------------------------------------------------------------------------

SIZES = {"data": 1, "fsdp": 4, "tensor": 1, "context": 1}


def refused(stage, *, run=None):
    config = Config(model=MODEL, stages=(stage,), run=run or RunConfig())
    program = Program("train", "s", lambda: None, 1, 1.0, 1, stage)
    plan = Plan(program, 4, 1e12, 1.0, refusal=(20 * GIB, 15.75 * GIB))
    return "\n".join(advise(plan, config, SIZES))


def test_advice_where_a_step_does_not_fit():
    stage = Stage("s", 4096, 32, 1, 1e-3, accumulation=2)
    advice = refused(stage, run=RunConfig(remat="none", loss_block=4_000_000))
    assert 'run.remat is "none"' in advice
    assert "stages.accumulation is 2, which leaves 4 samples a device at once: 4" in advice
    assert "run.loss_block is 4000000: its float32 logits take 3.81 GiB" in advice
    assert "mesh.fsdp is 4: 8" in advice and "mesh.context is 1: 2" in advice
    modest = refused(Stage("s", 4096, 4, 1, 1e-3))
    assert "accumulation" not in modest and "loss_block" not in modest and "remat" not in modest
    assert "mesh.context is 1: 2" in modest


def fitting(stage, *, run=None, network=0.0, arguments=1, sizes=SIZES):
    config = Config(model=MODEL, stages=(stage,), run=run or RunConfig())
    found = estimate([Work("a", 1.0, bytes=1.0)], machine("v5e", 4), KernelCosts("v5e", {}))
    if network:
        part = Collective("all-reduce", 10**12, np.arange(4)[None])
        work = [Work("a", 1.0, bytes=1.0), Work("b", 1.0, collective=part)]
        found = estimate(work, machine("v5e", 4), KernelCosts("v5e", {}))
    memory = Memory(arguments, 0, 0, 0, int(15.75 * GIB))
    program = Program("train", "s", lambda: None, 1, 1.0, 1, stage)
    return "\n".join(advise(Plan(program, 4, 1e12, 1.0, (), memory, found), config, sizes))


def test_advice_where_a_step_wastes_the_machine():
    stage = Stage("s", 4096, 8, 1, 1e-3)
    assert "run.loss_block is 2048, 512 tokens a device" in fitting(
        stage, run=RunConfig(loss_block=2048)
    )
    assert "try 16384" in fitting(stage, run=RunConfig(loss_block=2048))
    assert fitting(stage, run=RunConfig(loss_block=16384)) == ""
    cut = fitting(stage, run=RunConfig(loss_block=16384), sizes={**SIZES, "context": 8})
    assert "512 tokens a device" in cut and "try 131072" in cut
    assert "6 samples at once" in fitting(Stage("s", 4096, 6, 1, 1e-3))
    assert "100% of the estimated step are collectives" in fitting(stage, network=1.0)
    assert "only 0.75 GiB of headroom" in fitting(
        stage, run=RunConfig(loss_block=16384), arguments=15 * GIB
    )


def run_cli(tmp_path, *arguments):
    (tmp_path / "config.py").write_text(FILE)
    return cli.main(["--config", str(tmp_path / "config.py"), *arguments])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--topology", "v5e"], "write GENERATION:SHAPE"),
        (["--topology", "h100"], "write GENERATION:SHAPE"),
        (["--topology", "tpu7x:2x2x1"], "no peaks are known for tpu7x: use one of"),
        (["--topology", "v5e:3x7"], "does not know topology 'v5e:3x7'"),
        (["--topology", "v5e:2x2", "--slices", "0"], "0 slices of v5e:2x2"),
        (["--topology", "v5e:2x2", "--programs", "tran"], r"--programs names \['tran'\]"),
        (["--topology", "v5e:2x2", "--stage", "x"], r"no stage \['x'\] in"),
        (["--topology", "v5e:2x2", "--mesh.data", "3"], "asks for 3 devices, but there are 4"),
        (["--topology", "v5e:2x2", "--mesh.platform", "cpu"], "asks for cpu, but JAX found tpu"),
        (
            ["--topology", "v5e:4x4", "--mesh.data", "1", "--mesh.tensor", "16"],
            "has 4 heads, which mesh.tensor 16 does not divide",
        ),
        (
            [
                "--topology",
                "v5e:2x2",
                "--mesh.data",
                "1",
                "--mesh.context",
                "4",
                "--stages.0.seq-len",
                "510",
            ],
            "seq_len a multiple of mesh.context 4 = 4",
        ),
        (["--topology", "v5e:2x2", "--slices", "99999"], "are 399,996 chips: this plans for at"),
        (
            ["--topology", "v5e:2x2", "--model.num-blocks", "999999998"],
            "all devices together have 63",
        ),
        (["--topology", "v5e:2x2", "--stages.0.seq-len", "999999999999"], "residual stream of 4e"),
        (
            ["--topology", "v5e:2x2", "--programs", "decode", "--batch", "9" * 18],
            "caches of 1e.18 texts of 6.55e.04 rows take at least",
        ),
        (
            ["--topology", "v5e:2x2", "--programs", "prefill", "--piece", "99", "--length", "9"],
            "batch 1, length 9 and piece 99",
        ),
    ],
)
@needs_compiler
def test_what_cannot_be_planned_is_said_before_compiling(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        run_cli(tmp_path, *arguments)
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert re.search(message, error), error


def test_a_missing_compiler_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(topology, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        run_cli(tmp_path, "--topology", "v5e:2x2")
    assert "needs the TPU compiler: pip install 'jax[tpu]'" in capsys.readouterr().err


@needs_compiler
def test_caches_lie_by_texts_and_heads():
    mesh = topology.topology_mesh("v5e:2x2", {"data": 2, "fsdp": 1, "tensor": 2, "context": 1})
    model = abstract_model(dataclasses.replace(MODEL, num_attention_blocks=1))
    cache = jax.eval_shape(lambda: model.init_cache(4, 256))
    found = cache_shardings(cache, mesh)
    batch = ("data", "fsdp")
    assert found.length.spec == P(batch)
    assert found.blocks.time_mix.shift.spec == P(None, batch, None)
    assert found.blocks.time_mix.wkv.spec == P(None, batch, "tensor", None, None)
    assert found.pages.keys.spec == P(None, batch, "tensor", "context", None, None)
    three = cache_shardings(jax.eval_shape(lambda: model.init_cache(3, 256)), mesh)
    assert three.length.spec == P(None)


def test_reading_needs_room():
    with pytest.raises(ConfigError, match="batch 0, length 8 and piece 4"):
        read_program(Config(model=MODEL, stages=(STAGE,)), None, 0, 8, 4)
