"""The resolver: platform of the mesh in force, predicates, messages, and what is logged once."""

import logging

import jax
import numpy as np
import pytest

from rwkvx_jax.ops import dispatch
from rwkvx_jax.ops.dispatch import Candidate, current_platform, missing_module, resolve


@pytest.fixture
def platform(monkeypatch):
    """Sets what `current_platform` says, and forgets what has been logged."""
    dispatch._log_choice.cache_clear()
    monkeypatch.setattr(dispatch, "current_platform", lambda: "tpu")

    def set_platform(name):
        monkeypatch.setattr(dispatch, "current_platform", lambda: name)

    yield set_platform
    dispatch._log_choice.cache_clear()


KERNEL = Candidate("kernel", platforms=("tpu",))
PICKY = Candidate("picky", platforms=("tpu", "gpu"), problem=lambda p: f"K is odd on {p}")
PLAIN = Candidate("plain")
ORACLE = Candidate("oracle")


def test_platform_is_the_default_backend_without_a_mesh():
    assert current_platform() == jax.default_backend()


def test_platform_follows_the_mesh_in_force():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        assert current_platform() == "cpu"


@pytest.mark.slow
def test_platform_of_a_tpu_topology_on_this_machine(monkeypatch):
    pytest.importorskip("libtpu")
    for key, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }.items():
        monkeypatch.setenv(key, value)
    from jax.experimental import topologies

    devices = topologies.get_topology_desc("v5e:2x2", "tpu").devices
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.Mesh(np.array(devices), ("data",), axis_types=auto)
    seen = []
    with jax.set_mesh(mesh):
        jax.eval_shape(lambda x: (seen.append(current_platform()), x)[1], np.ones(3))
    assert seen == ["tpu"]


def test_none_takes_the_first_that_can_run(platform):
    assert resolve("op", None, [KERNEL, PLAIN, ORACLE]) == "kernel"
    platform("cpu")
    assert resolve("op", None, [KERNEL, PLAIN, ORACLE]) == "plain"
    platform("gpu")
    assert resolve("op", None, [KERNEL, PICKY, ORACLE]) == "oracle"


def test_a_named_one_that_can_run_is_taken(platform):
    assert resolve("op", "oracle", [KERNEL, PLAIN, ORACLE]) == "oracle"


@pytest.mark.parametrize(
    "name, message",
    [
        ("kernel", "it runs on tpu, and the platform is gpu; use 'plain' or 'oracle'"),
        ("picky", "K is odd on gpu; use 'plain' or 'oracle'"),
        ("typo", "unknown implementation 'typo'; one of 'kernel', 'picky', 'plain', 'oracle'"),
    ],
)
def test_a_named_one_that_cannot_run_says_why_and_what_to_use(platform, name, message):
    platform("gpu")
    with pytest.raises(ValueError, match=f"op: .*{message}"):
        resolve("op", name, [KERNEL, PICKY, PLAIN, ORACLE])


def test_nothing_usable_lists_every_reason(platform):
    with pytest.raises(ValueError, match="no implementation can run on tpu.*K is odd"):
        resolve("op", None, [PICKY])


def test_missing_module_names_the_module():
    assert missing_module("rwkvx_jax.ops.dispatch") is None
    assert "no_such_package.kernel" in missing_module("no_such_package.kernel")
    assert "rwkvx_jax.no_such_kernel" in missing_module("rwkvx_jax.no_such_kernel")


def test_choice_is_logged_once_at_info(platform, caplog):
    platform("cpu")
    with caplog.at_level(logging.INFO, "rwkvx_jax.ops"):
        for _ in range(3):
            resolve("op", None, [KERNEL, PLAIN])
        resolve("other", None, [KERNEL, PLAIN])
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", "op: using 'plain' on cpu"),
        ("INFO", "other: using 'plain' on cpu"),
    ]


def test_fall_back_is_a_warning_once_with_its_reason(platform, caplog):
    with caplog.at_level(logging.INFO, "rwkvx_jax.ops"):
        for _ in range(3):
            resolve("op", None, [PICKY, PLAIN])
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "falling back to 'plain' on tpu: 'picky' cannot run: K is odd on tpu" in record.message
