"""The sweep: which variants there are, what is kept of them, and the table."""

import dataclasses
import json
import re

import pytest

from rwkvx_jax.config import Config, ConfigError, MeshConfig, ModelConfig, RunConfig, Stage
from rwkvx_jax.perf import plan_command as cli
from rwkvx_jax.perf import sweep, topology
from rwkvx_jax.perf.sweep import Place, Variant

pytestmark = pytest.mark.optimized

MODEL = ModelConfig(vocab_size=256, num_blocks=2, num_attention_blocks=0, width=128, chunk_size=64)
STAGE = Stage("s", seq_len=256, global_batch=8, steps=10, peak_lr=1e-3)
CONFIG = Config(
    model=MODEL,
    stages=(STAGE,),
    mesh=MeshConfig(data=2, fsdp=2),
    run=RunConfig(loss_block=1024),
)
PLACE = Place("v5e:2x2")
GIB = 2**30
needs_compiler = pytest.mark.skipif(
    not topology.is_available(), reason="libtpu is not installed: pip install 'jax[tpu]'"
)


def mesh(**sizes):
    return tuple({"data": 1, "fsdp": 1, "tensor": 1, "context": 1, **sizes}.items())


def record(seconds, *, fits=True, available=16):
    times = {"seconds": seconds, "utilisation": 0.5, "tokens_per_second": 1e6 / seconds}
    memory = {"available": available * GIB, "headroom": (4 if fits else -2) * GIB}
    return {"fits": fits, "memory": memory, "estimate": times, "floor": times}


@needs_compiler
def test_variants_are_what_mesh_and_batch_allow():
    found = sweep.variants(CONFIG, STAGE, PLACE)
    assert len(set(found)) == len(found)
    assert {v.remat for v in found} == {"none", "block", "save_projections", "offload"}
    assert {v.mesh for v in found} == {
        mesh(data=2, fsdp=2), mesh(fsdp=4), mesh(data=4), mesh(fsdp=2, context=2),
        mesh(data=2, context=2),
    }  # fmt: skip
    # 1, 2 or 4 samples a device at once; four devices that share no sample have 8 / 4 at most.
    assert {v.accumulation for v in found if v.mesh == mesh(data=4)} == {1, 2}
    assert {v.accumulation for v in found if v.mesh == mesh(data=2, context=2)} == {1, 2, 4}
    own = sweep.variants(
        CONFIG, STAGE, PLACE, remat=("none",), meshes=({"data": 4},), accumulations=(2,)
    )
    assert own == [Variant("none", 2, mesh(data=4))]
    with pytest.raises(ConfigError, match="no variant of stage 's' is possible.*3 parts"):
        sweep.variants(CONFIG, STAGE, PLACE, accumulations=(3,))


@needs_compiler
def test_a_sweep_goes_on_where_it_stopped(tmp_path, monkeypatch):
    path, compiled = tmp_path / "sweep.jsonl", []
    seconds = {"block": 4.0, "save_projections": 2.0, "none": 1.0}

    def fake(config, stage, place):
        compiled.append((config.run.remat, stage.accumulation))
        if stage.accumulation == 1 and config.run.remat == "save_projections":
            return {"record": record(1.0, fits=False)}
        return {"record": record(seconds[config.run.remat])}

    monkeypatch.setattr(sweep, "_compile_apart", fake)
    candidates = sweep.variants(CONFIG, STAGE, PLACE, meshes=({"data": 4},), accumulations=(1, 2))
    run = lambda: sweep.sweep(CONFIG, STAGE, PLACE, candidates, path, say=lambda *_: None)
    rows = run()
    # "offload" is not compiled where "block" fits; "none" not where less does not fit already.
    assert compiled == [
        ("block", 1), ("save_projections", 1), ("block", 2), ("save_projections", 2), ("none", 2),
    ]  # fmt: skip
    assert [bool(row.get("skipped")) for row in rows] == [
        False, True, False, True, False, True, False, False,
    ]  # fmt: skip
    assert sweep.fastest(rows)["flags"] == (
        "--run.remat none --stages.0.accumulation 2 --mesh.data 4 --mesh.fsdp 1 --mesh.tensor 1 "
        "--mesh.context 1"
    )
    compiled.clear()
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 5 and json.loads(lines[0])["variant"]["remat"] == "block"
    path.write_text("".join(lines[:-1]) + lines[-1][:50])  # killed while it wrote
    assert run() == rows and compiled == [("none", 2)]
    assert path.read_text() == "".join(lines)
    # Another program leaves other lines.
    other = dataclasses.replace(CONFIG, run=dataclasses.replace(CONFIG.run, loss_block=512))
    compiled.clear()
    sweep.sweep(other, STAGE, PLACE, candidates[:1], path, say=lambda *_: None)
    assert compiled == [("block", 1)]
    path.write_text("{}\n")
    with pytest.raises(ConfigError, match="line 1 is no row of a sweep: delete the line"):
        run()


def test_the_table_is_ordered_by_estimate():
    variant = lambda remat: Variant(remat, 2, mesh(data=2, fsdp=2)).record()
    rows = [
        {"variant": variant("offload"), "flags": "d", "skipped": "block fits"},
        {"variant": variant("block"), "flags": "a", "record": record(2.0)},
        {"variant": variant("none"), "flags": "b", "record": record(1.0, fits=False)},
        {"variant": variant("save_projections"), "flags": "c", "record": record(1.5)},
    ]
    lines = sweep.table(rows, 16).splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == [
        "save_projections", "block", "offload", "none",
    ]  # fmt: skip
    assert "| data 2 x fsdp 2 | 2 | 12.0 of 16.00 | 1.5 | 50.0%, 50.0% | 666,667 |" in lines[0]
    assert "block fits" in lines[2] and "does not fit: 18.0 of 16.00" in lines[3]
    assert sweep.fastest(rows)["flags"] == "c"
    assert sweep.fastest(rows[:1]) is None


def test_sizes_of_a_mesh_are_read():
    assert sweep.mesh_sizes("data=2,context=4") == {"data": 2, "context": 4}
    for text in ("data=0", "rows=2", "data", "data=2;fsdp=2"):
        with pytest.raises(ConfigError, match="write axes and sizes as data=2"):
            sweep.mesh_sizes(text)


@pytest.mark.slow
@needs_compiler
def test_a_sweep_from_the_command_line(tmp_path, capsys):
    (tmp_path / "config.py").write_text(
        f"from rwkvx_jax.config import *\ndef get_config():\n    return {CONFIG!r}\n"
    )
    arguments = ["--config", str(tmp_path / "config.py"), "--topology", PLACE.topology]
    arguments += ["--sweep", str(tmp_path / "s.jsonl"), "--sweep-mesh", "data=4"]
    arguments += ["--sweep-accumulation", "1", "--sweep-remat", "block", "--sweep-remat", "none"]
    assert cli.main(arguments) == 0
    said = capsys.readouterr()
    assert "fastest by the estimate: --run.remat" in said.out
    assert re.search(r"--run.remat none .*: 1 of 2 variants", said.err)
    assert len((tmp_path / "s.jsonl").read_text().splitlines()) == 2
