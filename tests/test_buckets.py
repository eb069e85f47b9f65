"""Buckets of a real server: paths, files, and runs that outlive its absence."""

import dataclasses
import http.server
import json
import os
import signal
import threading
import time
import urllib.parse

import jax
import pytest

from rwkvx_jax import records
from rwkvx_jax.checkpoint import load_checkpoint, read_workdir
from rwkvx_jax.config import ConfigError, MeshConfig
from rwkvx_jax.convert.__main__ import main as convert
from rwkvx_jax.convert.own import write_own_safetensors
from rwkvx_jax.digest import flat
from rwkvx_jax.evals.models import check_output
from rwkvx_jax.evals.plots import new_figure
from rwkvx_jax.evals.plots import save as save_figure
from rwkvx_jax.model import get_params
from rwkvx_jax.records import RecordFile
from rwkvx_jax.storage import (
    append,
    files_below,
    local_copy,
    make_folder,
    new_file,
    size,
    work_path,
    write_whole,
)
from rwkvx_jax.training import saver, trace
from rwkvx_jax.training.loop import TrainingStopped, fit
from rwkvx_jax.training.under_way import StepWatch
from tests.gcs_server import GcsServer, bucket_environment
from tests.model_cases import random_params
from tests.test_hosts import STEPS, Job
from tests.training.training_cases import CURRICULUM, MODEL, RUN, STAGES, same_bits

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = GcsServer(tmp_path_factory.mktemp("gcs"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in bucket_environment(server.url).items():
            patch.setenv(name, value)
        server.start()
        yield server
        server.stop()


@pytest.fixture
def folder(server, request):
    """A place of the bucket for one test."""
    return work_path(f"gs://bkt/{request.node.originalname}")


# ------------------------------------------------------------------------------------------- files


def test_files_in_a_bucket(folder, tmp_path):
    make_folder(folder)
    write_whole(folder / "a.txt", b"one\n")
    append(folder / "a.txt", "two\n")
    append(folder / "below" / "b.txt", "new\n")
    assert (folder / "a.txt").read_text() == "one\ntwo\n" and size(folder / "a.txt") == 8
    assert files_below(folder, ".txt") == [folder / "a.txt", folder / "below" / "b.txt"]
    with pytest.raises(ZeroDivisionError), new_file(folder / "half") as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert not (folder / "half").exists()
    with local_copy(folder) as copy:
        assert [path.name for path in copy.iterdir()] == ["a.txt"]
        assert str(copy).endswith(f"bkt/{folder.name}")
    assert not copy.exists()
    with local_copy(tmp_path) as copy:
        assert copy == tmp_path


def test_a_model_goes_through_a_bucket(folder, tmp_path, capfd):
    """Our file there, an official one made of it there, and that one read from there."""
    params = random_params(MODEL)
    write_own_safetensors(str(folder / "model.safetensors"), MODEL, "byte", dict(flat(params)))
    loaded = load_checkpoint(str(folder / "model.safetensors"))
    assert loaded.tokenizer == "byte" and same_bits(get_params(loaded.model), params)
    convert([str(folder / "model.safetensors"), str(folder / "model.pth")])
    with local_copy(folder / "model.safetensors") as copy:
        convert([str(copy), str(tmp_path / "model.pth")])
    assert (folder / "model.pth").read_bytes() == (tmp_path / "model.pth").read_bytes()
    read = load_checkpoint(folder / "model.pth"), load_checkpoint(tmp_path / "model.pth")
    assert same_bits(*(get_params(loaded.model) for loaded in read))
    with pytest.raises(SystemExit):
        convert([str(folder / "none.pth"), str(tmp_path / "c.safetensors")])
    assert f"{folder}/none.pth" in capfd.readouterr().err
    with pytest.raises(ConfigError, match="no checkpoint at gs://bkt/.*/none"):
        load_checkpoint(folder / "none")


def test_results_of_evaluations(folder):
    check_output(folder)
    first, second = RecordFile(folder / "x.jsonl"), RecordFile(folder / "x.jsonl")
    for i, file in enumerate((first, second, first)):
        with file.locked():
            file.new()
            file.append([{"trial": i}])
    first.path.write_bytes(first.path.read_bytes() + b'{"tri')
    assert second.new() == [{"trial": 2}] and first.path.read_bytes().count(b"\n") == 3
    assert records.read(first.path) == [{"trial": i} for i in range(3)]
    save_figure(new_figure(1, 1, "title"), folder / "figure.png")
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="gs://absent/x: there is no such bucket"):
        check_output(work_path("gs://absent/x"))


# -------------------------------------------------------------------------------------------- runs


@pytest.fixture
def config(tmp_path):
    """One stage of 12 steps on one device, a checkpoint after every 3."""
    run = dataclasses.replace(RUN, eval_batches=0, storage_patience=120.0)
    data = dataclasses.replace(CURRICULUM.data, cache_dir=str(tmp_path / "tokens"))
    stages = (dataclasses.replace(STAGES[0], steps=12),)
    mesh = MeshConfig(data=8)
    return dataclasses.replace(CURRICULUM, run=run, data=data, stages=stages, mesh=mesh)


class _Refusing(http.server.BaseHTTPRequestHandler):
    """A bucket that this account may not use."""

    def do_GET(self):
        body = json.dumps({"error": {"code": 403, "message": "no storage.objects.create"}})
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, *_):
        pass


def test_buckets_that_cannot_be_used_are_errors_before_any_work(config, server):
    with pytest.raises(ConfigError, match="gs://absent/run can't be wri.*there is no such bucket"):
        fit(config, work_path("gs://absent/run"))
    server.stop()
    port = urllib.parse.urlsplit(server.url).port
    try:
        with http.server.ThreadingHTTPServer(("127.0.0.1", port), _Refusing) as refusing:
            threading.Thread(target=refusing.serve_forever, daemon=True).start()
            with pytest.raises(ConfigError, match="can't be written.*Forbidden.*objects.create"):
                fit(config, work_path("gs://bkt/refused"))
            refusing.shutdown()
    finally:
        server.start()


@pytest.mark.slow
def test_a_trace_is_copied_into_the_bucket(folder):
    recorder = trace.Trace(dataclasses.replace(RUN, profile_steps="0:1"), folder)
    recorder.before(0)
    recorder.after(0, jax.jit(lambda x: x + 1)(jax.numpy.zeros(3)))
    assert [path.suffixes for path in files_below(folder, ".xplane.pb")] == [[".xplane", ".pb"]]


def at_steps(monkeypatch, act):
    """Calls `act(step)` whenever a step has been made."""
    submit = StepWatch.submit

    def spy(self, position, metrics):
        submit(self, position, metrics)
        act(position.stage_step)

    monkeypatch.setattr(StepWatch, "submit", spy)


def wait_for_checkpoint(folder, step):
    """What is under way when a bucket goes away, tensorstore tries to write for very long."""
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints" / str(step) / "commit_success.txt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_an_outage_and_a_crash_leave_no_trace(config, server, folder, tmp_path, monkeypatch):
    expected = fit(config, tmp_path / "disk")
    monkeypatch.setattr(saver, "_STALL", 0.2)

    def disturb(step):
        if step == 5:
            server.stop()
            threading.Timer(30.0, server.start).start()
        time.sleep(0.5 if step > 3 else 0)
        if step == 11:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_steps(patch, disturb)
        fit(config, folder)
    while server.url and not _answers(server):
        time.sleep(0.1)
    assert same_bits(fit(config, folder), expected)
    assert (folder / "metrics.jsonl").read_bytes() == (
        tmp_path / "disk" / "metrics.jsonl"
    ).read_bytes()


def _answers(server):
    return server._process is not None and server._process.poll() is None


@pytest.mark.slow
def test_an_outage_without_end_is_one_error(config, server, folder, monkeypatch):
    steps = []

    def disturb(step):
        steps.append(step)
        time.sleep(1.0 if step > 5 else 0)
        if step == 5:
            wait_for_checkpoint(folder, 3)
            server.stop()

    monkeypatch.setattr(saver, "_STALL", 0.2)
    stages = (dataclasses.replace(STAGES[0], steps=400),)
    run = dataclasses.replace(config.run, storage_patience=1.0)
    at_steps(monkeypatch, disturb)
    try:
        with pytest.raises(
            TrainingStopped, match="(?s)failed for .*storage_patience is 1.*of step 3"
        ):
            fit(dataclasses.replace(config, stages=stages, run=run), folder)
    finally:
        server.start()
    assert 9 < steps[-1] < 400, "training went on meanwhile"


@pytest.mark.slow
def test_two_processes_killed_and_continued(server, folder, tmp_path):
    """Their checkpoints in a bucket, the same as those on a disk."""
    cache = ("--data.cache-dir", str(tmp_path / "tokens"))
    disk = Job(tmp_path, tmp_path / "disk", 2, *cache)
    assert [code for code, _, _ in disk.end()] == [0, 0]
    job = Job(tmp_path, folder, 2, *cache)
    while not (folder / "checkpoints" / "3" / "commit_success.txt").exists():
        assert all(process.poll() is None for process in job.processes), job.end()
        time.sleep(0.1)
    for process in job.processes:
        process.send_signal(signal.SIGKILL)
    job.end()
    (code, out, error), _ = Job(tmp_path, folder, 2, *cache).end()
    assert code == 0 and "continuing after step" in out, error
    assert same_bits(
        read_workdir(folder, STEPS).params, read_workdir(tmp_path / "disk", STEPS).params
    )
    assert json.loads((folder / "config.json").read_text())
    assert os.environ["STORAGE_EMULATOR_HOST"] == server.url
