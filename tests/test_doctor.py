"""The doctor: it passes here, and it says what is wrong where something is."""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from rwkvx_jax.config import ModelConfig
from rwkvx_jax.doctor import kernels, machine
from rwkvx_jax.doctor.__main__ import main
from rwkvx_jax.doctor.findings import Failed, Findings
from rwkvx_jax.doctor.kernels import Case, kernel_checks
from rwkvx_jax.model import create_model
from rwkvx_jax.modules.mixers import MIXERS
from rwkvx_jax.perf import kernel_costs

MODEL = ModelConfig(
    vocab_size=257,
    num_blocks=1,
    num_attention_blocks=1,
    width=32,
    head_size=16,
    chunk_size=16,
    top_k=2,
    low_rank_override=(4, 4, 4, 4),
)


def examine(dtype="float32", model=MODEL, **options):
    findings = Findings(Console(file=io.StringIO()))
    for name, check in kernel_checks(Case(model, dtype, **{"length": 77, "timed": 0} | options)):
        findings.check(name, check)
    return findings


def recurrent(mixer, **sizes):
    """A model of recurrent blocks alone."""
    return dataclasses.replace(MODEL, mixer=mixer, num_attention_blocks=0, **sizes)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_ops_of_a_model_pass(dtype):
    findings = examine(dtype)
    assert len(findings.all) == 3 and findings.failed == []


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mixer", [name for name in MIXERS if name != "rwkv7"])
def test_the_recurrence_of_every_mixer_passes(mixer, dtype):
    (found,) = examine(dtype, recurrent(mixer)).all
    assert found.name.startswith("wkv4" if mixer == "rwkv4" else "generalized_delta_rule")
    assert found.problem == "" and found.values["errors"]["gradient"] > 0


@pytest.mark.parametrize("mixer", [name for name in MIXERS if name not in ("rwkv7", "rwkv4")])
def test_the_recurrence_is_given_what_the_mixer_gives_it(mixer, monkeypatch):
    """What decides on a kernel: K and V, one decay a head or a channel, a and b, reads, a bound."""
    given = []

    def op(
        r,
        log_w,
        k,
        v,
        a=None,
        b=None,
        *,
        state,
        read,
        decay_bound,
        implementation=None,
        segment_ids=None,
    ):
        given.append((r.shape[3], log_w.shape[2:], v.shape[2:], a is None, read, decay_bound))
        zeros = jnp.zeros((len(v), *v.shape[2:], r.shape[3]))
        return v, zeros if state is None else state

    monkeypatch.setattr(kernels, "generalized_delta_rule", op)
    monkeypatch.setattr("rwkvx_jax.modules.mixers.base.generalized_delta_rule", op)
    model = recurrent(mixer)
    examine(model=model)
    jax.eval_shape(create_model(model), jnp.zeros((1, 5), jnp.int32))
    assert len(given) > 2 and len(set(given)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["gated_deltanet", "kda", "mamba2", "rwkv6"])
def test_the_interpreted_kernel_of_a_mixer_passes(mixer):
    model = recurrent(mixer, width=64, head_size=32)
    (found,) = examine("bfloat16", model, interpret=True).all
    assert "interpreted" in found.name and found.problem == ""


@pytest.mark.thorough
def test_a_wrong_op_is_found(monkeypatch):
    right = kernels.sparse_attention

    def wrong(q, k, v, *, implementation=None, **options):
        out = right(q, k, v, implementation=implementation, **options)
        # Right in value, and wrong in the gradient of q alone.
        bad = out + 0.01 * (q - jax.lax.stop_gradient(q))
        return bad if implementation is None else out

    monkeypatch.setattr(kernels, "sparse_attention", wrong)
    (failed,) = examine().failed
    assert failed.name.startswith("sparse_attention") and "gradient" in failed.problem


@pytest.mark.thorough
def test_choices_of_other_chunks_are_found(monkeypatch):
    right = kernels.select_chunks
    monkeypatch.setattr(kernels, "select_chunks", lambda q, k, **options: right(-q, k, **options))
    assert "select_chunks" in examine().failed[0].name


def test_whatever_a_check_raises_is_a_finding():
    findings = Findings(Console(file=io.StringIO()))
    findings.check("first", lambda: 1 / 0)
    findings.check("second", lambda: ("fine", {"x": float("nan")}))
    assert [f.problem for f in findings.all] == ["ZeroDivisionError: division by zero", ""]
    report = json.loads(json.dumps(findings.report(), allow_nan=False))
    assert not report["passed"] and "1 / 0" in report["checks"][0]["values"]["traceback"]


def test_collectives_over_all_devices_are_exact():
    assert jax.device_count() == 8
    text, values = machine.collectives()
    assert set(values) == {"sum", "gather", "shift", "exchange"} and text.startswith("exact")


def test_wrong_numbers_of_a_collective_are_found(monkeypatch):
    monkeypatch.setattr(jax.lax, "psum", lambda x, axis: x)
    with pytest.raises(Failed, match="sum over 8 devices"):
        machine.collectives()


@pytest.mark.slow
def test_the_command_passes_leaves_nothing_behind_and_writes_json(tmp_path, capsys, monkeypatch):
    from rwkvx_jax.doctor import __main__ as door

    monkeypatch.setattr(door, "_case", lambda options, model, dtype: Case(MODEL, dtype, 77, 40))
    report = tmp_path / "found.json"
    workdir = tmp_path / "work"
    assert main(["--steps", "2", "--workdir", str(workdir), "--json", str(report)]) == 0
    assert "PASS" in capsys.readouterr().out
    found = json.loads(report.read_text())
    checks = {check["name"]: check["values"] for check in found["checks"]}
    assert found["passed"] and checks["training"]["tokens_per_second"] > 0
    assert list(workdir.iterdir()) == []


def test_a_failed_check_is_the_exit_status(capsys, monkeypatch):
    def broken():
        raise Failed("no route to device 3")

    monkeypatch.setattr(machine, "collectives", broken)
    monkeypatch.setattr("rwkvx_jax.doctor.__main__.kernel_checks", lambda case: [])
    assert main(["--steps", "0"]) == 1
    assert "collectives: no route to device 3" in capsys.readouterr().out


def test_static_estimates_grow_with_the_length_and_are_of_known_shapes(monkeypatch):
    model = ModelConfig.rwkvx_0b2()
    assert kernel_costs.static_estimate("wkv7", model, 4096) is None  # no TPU here
    monkeypatch.setattr(kernel_costs, "current_chip", lambda: "v5e")
    for op, growth in (("wkv7", 2), ("select_chunks", 4), ("sparse_attention", 2)):
        one, two = (kernel_costs.static_estimate(op, model, n) for n in (65536, 131072))
        assert two == pytest.approx(growth * one, rel=0.02)
    assert kernel_costs.static_estimate("sparse_attention", MODEL, 4096) is None
    wide = dataclasses.replace(model, head_size=128)  # the table's heads have 64
    assert kernel_costs.static_estimate("wkv7", wide, 4096) is None


@pytest.mark.parametrize(
    "mixer, head, kernel",
    [
        ("gated_deltanet", 128, "scalar_delta_rule"),
        ("kda", 128, "vector_delta_rule"),
        ("mamba2", 64, "scalar_linear_attention"),
        ("gated_deltanet", 64, None),
        ("rwkv6", 128, None),
        ("lightning", 128, None),
    ],
)
def test_static_estimates_of_the_delta_rule_are_of_known_heads(monkeypatch, mixer, head, kernel):
    monkeypatch.setattr(kernel_costs, "current_chip", lambda: "v6e")
    model = ModelConfig(num_blocks=2, num_attention_blocks=0, width=1024, head_size=head)
    model = dataclasses.replace(model, mixer=mixer)
    found = kernel_costs.static_estimate("generalized_delta_rule", model, 8192)
    if kernel is None:
        assert found is None
        return
    case = kernel_costs.read_costs()[f"{kernel}_forward/v6e/D2048/T4096"]
    channels = 2048 if mixer == "mamba2" else 1024  # Mamba-2's values are twice as wide
    assert found == pytest.approx(case["estimated_seconds"] * channels / 2048 * 2)


@pytest.mark.tpu
def test_the_kernels_of_the_default_models_are_right_on_this_tpu():
    assert main([]) == 0


@pytest.mark.gpu
def test_the_kernels_of_the_default_models_are_right_on_this_gpu():
    assert main([]) == 0
