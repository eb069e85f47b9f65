"""Step directories: what is kept, what damage is found, and what is said of it."""

import gc
import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rwkvx_jax import checkpoint_store
from rwkvx_jax.checkpoint_store import (
    CHECKPOINTS,
    SET_ASIDE,
    CheckpointFailed,
    Checkpoints,
    DamagedCheckpoint,
)
from rwkvx_jax.config import ConfigError
from rwkvx_jax.digest import flat, seal, summarize, unseal
from rwkvx_jax.training.step import Guard
from tests.training.training_cases import same_bits

RECORD = {"config": {"x": [1, 2.5]}, "stage": 0, "stage_step": 2, "data": {}}
STEPS = (1, 2, 4)


def small(value):
    return {"a": np.full((3, 2), value, np.float32)}


def params(step):
    rng = np.random.default_rng(step)
    return {
        "embed": rng.standard_normal((64, 32)).astype(np.float32),
        "blocks": {"w": rng.standard_normal((2, 8, 3)).astype(np.float32)},
    }


def optimizer(step):
    adam = optax.ScaleByAdamState(jnp.int32(step), params(10 + step), params(20 + step))
    return {"moments": (optax.EmptyState(), adam), "guard": Guard.start()}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run with checkpoints of all STEPS."""
    workdir = tmp_path_factory.mktemp("run")
    with Checkpoints(workdir, keep=len(STEPS)) as checkpoints:
        for step in STEPS:
            checkpoints.save(step, params(step), optimizer(step), RECORD)
        checkpoints.wait()
    return workdir


@pytest.fixture
def run(whole_run, tmp_path):
    shutil.copytree(whole_run, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def no_wait(monkeypatch):
    monkeypatch.setattr(checkpoint_store, "_SETTLE_SECONDS", 0.05)


# ----------------------------------------------------------------------------------------- digests


def test_a_digest_does_not_depend_on_where_an_array_lies():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((16, 8, 3)).astype(np.float32)
    (expected,) = summarize({"x": x}).values()
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    for spec in ((), ("a",), ("a", "b"), (("a", "b"),), (None, "b")):
        spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
        assert summarize({"x": spread}) == {"x": expected}, spec


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "int8", "bool"])
def test_any_changed_element_changes_the_digest(dtype):
    x = np.random.default_rng(1).integers(0, 2, (3, 5)).astype(jnp.dtype(dtype))
    digests = {summarize({"x": x})["x"].digest}
    for index in np.ndindex(x.shape):
        other = x.copy()
        other[index] = 1 - other[index].astype(np.int32)
        digests.add(summarize({"x": other})["x"].digest)
    digests.add(summarize({"x": x[::-1]})["x"].digest)
    assert len(digests) == 1 + x.size + 1


def test_single_bits_and_signs_count():
    x = np.zeros((4, 4), np.float32)
    words = x.view(np.uint32)
    digests = {summarize({"x": x})["x"].digest}
    for bit in range(32):
        words[1, 2] = np.uint32(1) << bit
        digests.add(summarize({"x": x})["x"].digest)
    words[...] = 0
    words[0, :2] = np.uint32(1) << 31  # two signs at once
    digests.add(summarize({"x": x})["x"].digest)
    assert len(digests) == 34


def test_values_that_are_not_finite_are_counted():
    x = np.asarray([1, np.nan, np.inf, -np.inf, 0], np.float32)
    found = summarize({"a": (x, x.astype(jnp.bfloat16)), "n": np.int32(3)})
    assert {name: s.not_finite for name, s in found.items()} == {"a.0": 3, "a.1": 3, "n": 0}


def test_names_are_those_of_the_stored_tree():
    """Orbax stores named tuples as dictionaries."""
    names = [name for name, _ in flat(optimizer(1))]
    assert "moments.1.mu.blocks.w" in names and "guard.skipped" in names


def test_a_seal_breaks_with_any_change():
    sealed = json.loads(json.dumps(seal(RECORD, {"step": 3})))
    assert unseal(sealed) == (RECORD, {"step": 3})
    assert unseal(RECORD) == (RECORD, None)
    sealed = json.loads(json.dumps(seal(RECORD, {"step": 3})))
    sealed["stage_step"] = 3
    with pytest.raises(ValueError, match="not what was saved"):
        unseal(sealed)
    for other in ([], {"seal": 3}, {"seal": {}}):
        with pytest.raises(ValueError):
            unseal(other)


# ----------------------------------------------------------------------------------------- writing


def test_newest_and_stage_ends_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2, keep_steps=[3]) as checkpoints:
        assert checkpoints.latest() is None
        for step in range(1, 7):
            checkpoints.save(step, small(step), small(-step), RECORD)
            checkpoints.save(step, small(99), small(99), RECORD)  # there already: not replaced
        checkpoints.wait()
        assert checkpoints.latest() == 6
    with Checkpoints(tmp_path, keep=2, keep_steps=[3]) as checkpoints:
        assert sorted(int(p.name) for p in (tmp_path / CHECKPOINTS).iterdir()) == [3, 5, 6]
        assert same_bits(checkpoints.restore(5, small(0), small(0)), (small(5), small(-5)))
        assert checkpoints.progress(3) == RECORD


def test_a_half_checkpoint_is_never_the_latest(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, small(1), small(1), RECORD)
        checkpoints.wait()
    half = tmp_path / CHECKPOINTS / "2.orbax-checkpoint-tmp" / "params"
    half.mkdir(parents=True)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest() == 1
        checkpoints.save(2, small(2), small(2), RECORD)
        checkpoints.wait()
        assert checkpoints.latest() == 2


def test_failed_writes_are_named(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, small(1), small(1), RECORD)
        checkpoints.wait()

        def full():
            raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(checkpoints._manager, "wait_until_finished", full)
            with pytest.raises(CheckpointFailed, match="no checkpoint could be.*No space left"):
                checkpoints.wait()
        assert checkpoints.latest() == 1


def test_what_is_not_finite_is_never_saved(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        with pytest.raises(CheckpointFailed, match="step 1 .*params has 6 values .*, in a$"):
            checkpoints.save(1, small(np.inf), small(1), RECORD)
        with pytest.raises(CheckpointFailed, match="optimizer has 6 values"):
            checkpoints.save(1, small(1), small(np.nan), RECORD)
        assert checkpoints.steps() == []


# ------------------------------------------------------------------------------------------ damage


def edit_progress(change):
    def damage(steps):
        path = steps / "4" / "progress" / "metadata"
        values = json.loads(path.read_text())
        path.write_text(json.dumps(change(values) or values))

    return damage


def flip(item):
    """Changes a byte of the largest file of an item."""

    def damage(steps):
        files = [f for f in (steps / "4" / item).rglob("*") if f.is_file() and f.parent.name == "d"]
        path = max(files, key=lambda f: f.stat().st_size)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    return damage


def overwrite(name, data):
    return lambda steps: (steps / "4" / name).write_bytes(data)


def halve(name):
    def damage(steps):
        path = steps / "4" / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return damage


def remove(*names):
    return lambda steps: [shutil.rmtree(steps / "4" / name) for name in names]


def swap_items(item):
    def damage(steps):
        shutil.rmtree(steps / "4" / item)
        shutil.copytree(steps / "2" / item, steps / "4" / item)

    return damage


def empty_files(steps):
    for path in (steps / "4" / "params" / "d").iterdir():
        path.write_bytes(b"")


DAMAGES = {
    "a flipped byte": (flip("params"), "params: "),
    "a flipped byte of the optimizer": (flip("optimizer"), "optimizer: "),
    "parameters of another step": (swap_items("params"), "params: 2 arrays are not what was saved"),
    "another optimizer": (swap_items("optimizer"), "optimizer: 5 arrays are not what"),
    "another record": (swap_items("progress"), "named 4, but it was saved as step 2"),
    "renamed": (lambda steps: (steps / "4").rename(steps / "99"), "named 99, but .* as step 4"),
    "empty step": (lambda steps: (steps / "99").mkdir(), "progress"),
    "no params": (remove("params"), 'params: .*"params" was not found'),
    "no optimizer": (remove("optimizer"), "optimizer: "),
    "no progress": (remove("progress"), "progress: "),
    "nothing left": (remove("params", "optimizer", "progress"), "progress: "),
    "emptied folder": (remove("params/d", "params/ocdbt.process_0"), "params: "),
    "emptied files": (empty_files, "params: "),
    "no manifest": (lambda steps: (steps / "4/params/manifest.ocdbt").unlink(), "params: "),
    "garbage manifest": (overwrite("params/manifest.ocdbt", b"garbage"), "params: "),
    "half the metadata": (halve("params/_METADATA"), "params: "),
    "empty progress": (overwrite("progress/metadata", b"{}"), "progress: it is no record"),
    "garbage progress": (overwrite("progress/metadata", b"\0garbage"), "progress: "),
    "half the progress": (halve("progress/metadata"), "progress: JSONDecodeError"),
    "progress of another kind": (overwrite("progress/metadata", b"[3]"), "progress: "),
    "another position": (edit_progress(lambda r: r.update(stage_step=1)), "by its SHA-256"),
    "another digest": (
        edit_progress(lambda r: r["seal"]["digests"]["params"].update(embed="0" * 16)),
        "by its SHA-256",
    ),
}


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_one_message(run, capfd, caplog, kind):
    damage, message = DAMAGES[kind]
    damage(run / CHECKPOINTS)
    before = sorted(p.name for p in (run / CHECKPOINTS).iterdir())
    capfd.readouterr()
    with Checkpoints(run, keep=len(STEPS)) as checkpoints:
        newest = checkpoints.choose(None)

        def resume():
            checkpoints.progress(newest)
            return checkpoints.restore(newest, params(0), optimizer(0))

        with pytest.raises(DamagedCheckpoint, match=f"checkpoint {newest} in .*{message}") as error:
            resume()
    gc.collect()
    intact = 4 if kind == "empty step" else 2
    assert f"newest intact one is of step {intact}: " in str(error.value)
    assert f"--resume-step {intact}" in str(error.value)
    assert "\n" not in str(error.value).split(". Nothing was changed.\n")[0]
    assert sorted(p.name for p in (run / CHECKPOINTS).iterdir()) == before
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", ""), "the message has to be alone"
    assert not caplog.records


def test_several_damaged_ones_and_none_intact(run):
    for step in ("4", "2"):
        shutil.rmtree(run / CHECKPOINTS / step / "optimizer")
    with Checkpoints(run, keep=3) as checkpoints:
        with pytest.raises(DamagedCheckpoint, match="newest intact one is of step 1"):
            checkpoints.restore(4, params(0), optimizer(0))
        assert same_bits(checkpoints.restore_params(4, params(0)), params(4))
        shutil.rmtree(run / CHECKPOINTS / "1" / "progress")
        with pytest.raises(DamagedCheckpoint, match="No older one is intact: train anew"):
            checkpoints.restore(4, params(0), optimizer(0))


def test_later_ones_are_set_aside_and_their_steps_saved_again(run):
    shutil.rmtree(run / CHECKPOINTS / "4" / "optimizer")
    with Checkpoints(run, keep=3) as checkpoints:
        with pytest.raises(ConfigError, match=r"of step 3; it has those of \[1, 2, 4\]"):
            checkpoints.choose(3)
        assert checkpoints.set_aside(after=checkpoints.choose(2)) == [run / SET_ASIDE / "4"]
        assert checkpoints.latest() == 2
        checkpoints.save(4, params(7), optimizer(7), RECORD)
        checkpoints.wait()
        assert same_bits(checkpoints.restore(4, params(0), optimizer(0))[0], params(7))
        assert checkpoints.set_aside(after=2) == [run / SET_ASIDE / "4.1"]
    assert sorted(p.name for p in (run / SET_ASIDE).iterdir()) == ["4", "4.1"]
    assert (run / SET_ASIDE / "4" / "params").is_dir()


def test_the_older_form_loads_with_one_warning(run, caplog):
    edit_progress(lambda record: [record.pop("seal"), None][1])(run / CHECKPOINTS)
    with caplog.at_level(logging.WARNING), Checkpoints(run) as checkpoints:
        assert checkpoints.progress(4) == RECORD
        assert same_bits(checkpoints.restore_params(4, params(0)), params(4))
    (warning,) = (r.getMessage() for r in caplog.records if r.name.startswith("rwkvx_jax"))
    assert "older version, without digests" in warning


def test_a_renamed_step_is_missed_with_a_warning(run, caplog):
    (run / CHECKPOINTS / "4").rename(run / CHECKPOINTS / "four")
    with Checkpoints(run) as checkpoints:
        assert checkpoints.choose(None) == 2
    assert "['four'] left out" in caplog.text


def test_a_reader_leaves_half_checkpoints_to_their_writer(run):
    """A training may be writing one while another program reads a damaged step."""
    half = run / CHECKPOINTS / "7.orbax-checkpoint-tmp-1"
    half.mkdir()
    (run / CHECKPOINTS / "4" / "progress" / "metadata").write_text("{}")
    with Checkpoints(run) as checkpoints, pytest.raises(DamagedCheckpoint):
        checkpoints.progress(4)
    assert half.is_dir()
