"""Flags of the TPU compiler: which are set, where, and that the installed libtpu takes them."""

import subprocess

import pytest

from rwkvx_jax import xla_flags
from rwkvx_jax.config import ConfigError
from rwkvx_jax.perf import topology
from rwkvx_jax.xla_flags import FLAGS, VARIABLE, apply_xla_flags, attached_generation, refused_flags

needs_compiler = pytest.mark.skipif(
    not topology.is_available(), reason="libtpu is not installed: pip install 'jax[tpu]'"
)


@needs_compiler
def test_the_installed_libtpu_takes_the_table_and_names_what_it_does_not_know():
    every = tuple(sorted({flag for flags in FLAGS.values() for flag in flags}))
    assert refused_flags(every) == ()
    wrong = "--xla_tpu_no_such_flag=true", "--xla_tpu_overlap_compute_collective_tc=perhaps"
    assert refused_flags((*wrong, every[0])) == wrong


@pytest.fixture
def refusing(monkeypatch):
    """Replaces the child: libtpu knows every flag but one."""
    tried = []

    def child(command, env, **_):
        tried.append(env[VARIABLE].split())
        text = "ERROR: Unknown command line flag 'xla_enable_async_all_gather'"
        known = "--xla_enable_async_all_gather=true" not in tried[-1]
        return subprocess.CompletedProcess(command, 0 if known else 1, "", "" if known else text)

    monkeypatch.setattr(xla_flags.subprocess, "run", child)
    return tried


def test_auto_leaves_out_what_this_libtpu_refuses(refusing):
    environment = {VARIABLE: "--xla_tpu_scoped_vmem_limit_kib=65536 --mine=1"}
    kept = apply_xla_flags("auto", "v6e", environment)
    # What the user set stays; what libtpu refuses is left out.
    assert set(FLAGS["v6e"]) - set(kept) == {
        "--xla_enable_async_all_gather=true", "--xla_tpu_scoped_vmem_limit_kib=98304",
    }  # fmt: skip
    assert environment[VARIABLE].split() == [
        *kept, "--xla_tpu_scoped_vmem_limit_kib=65536", "--mine=1",
    ]  # fmt: skip
    assert len(refusing) == 2
    # A second call, as by a program that starts another in this environment, adds nothing.
    assert apply_xla_flags("auto", "v6e", environment) == ()


def test_flags_of_ones_own_are_checked(refusing):
    environment = {}
    assert apply_xla_flags("--a=1 --b=x", "v5e", environment) == ("--a=1", "--b=x")
    assert environment == {VARIABLE: "--a=1 --b=x"}
    with pytest.raises(ConfigError, match="refuses --xla_enable_async_all_gather=true"):
        apply_xla_flags("--xla_enable_async_all_gather=true", "v5e", {})
    for text in ("fast", "--a", "--a=1 b=2"):
        with pytest.raises(ConfigError, match='write "auto", "none" or flags'):
            apply_xla_flags(text, None, {})


def test_nothing_is_set_without_a_tpu_or_a_wish(refusing, tmp_path):
    environment = {}
    assert apply_xla_flags("none", "v5e", environment) == ()
    assert apply_xla_flags("auto", "v4", environment) == ()  # none are published for it
    assert not environment and not refusing
    assert attached_generation({}, tmp_path) is None


def test_the_generation_is_read_from_the_machine(tmp_path):
    device = tmp_path / "sys/bus/pci/devices/0000:00:05.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text("0x1ae0\n")
    (device / "device").write_text("0x0063\n")
    assert attached_generation({}, tmp_path) == "v5e"
    assert attached_generation({"TPU_ACCELERATOR_TYPE": "v5p-256"}, tmp_path) == "v5e"
    (device / "device").write_text("0x0001\n")
    assert attached_generation({"TPU_ACCELERATOR_TYPE": "v6e-8"}, tmp_path) == "v6e"
    assert attached_generation({"TPU_ACCELERATOR_TYPE": "v5litepod-8"}, tmp_path) == "v5e"


def test_a_libtpu_that_cannot_be_loaded_is_an_error(monkeypatch):
    broken = lambda command, **_: subprocess.CompletedProcess(command, 1, "", "no such library")
    monkeypatch.setattr(xla_flags.subprocess, "run", broken)
    with pytest.raises(ConfigError, match='"none" checks nothing.*\n.*no such library'):
        refused_flags(("--a=1",))
