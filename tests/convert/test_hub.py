"""hf:// addresses against a server on this machine."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rwkvx_jax import checkpoint, storage
from rwkvx_jax.config import Config, Stage
from rwkvx_jax.convert.__main__ import main
from rwkvx_jax.convert.hub import Address, fetch, hub_address
from rwkvx_jax.convert.load import open_checkpoint
from rwkvx_jax.convert.official import open_official
from rwkvx_jax.convert.own import open_own_safetensors
from rwkvx_jax.convert.tensors import ConversionError
from rwkvx_jax.storage import work_path
from rwkvx_jax.training.initial import load_initial_params
from tests.convert.convert_checkpoints import assert_identical, read_all, rwkv7
from tests.convert.test_directory import OFFICIAL_CONFIG, directory
from tests.helpers import ROOT
from tests.hub_server import COMMIT, HubServer, hub  # noqa: F401
from tests.training.training_cases import one_device_mesh

REPO = "hf://org/model"


@pytest.fixture
def model(hub, tmp_path):  # noqa: F811
    """The server with an RWKV-7 under official names in it, and the model's tensors."""
    folder = directory(tmp_path / "model", tensors := rwkv7())
    hub.files |= {file.name: file.read_bytes() for file in folder.iterdir()}
    hub.files["README.md"] = b"# A model\n"
    return tensors


def cached():
    """Names of the files in the cache."""
    cache = Path(pytest.importorskip("huggingface_hub.constants").HF_HUB_CACHE)
    return sorted(file.name for file in (cache / "models--org--model/snapshots").glob("*/*"))


def test_a_repository_is_read_like_its_directory(hub, model):  # noqa: F811
    for address in (REPO, f"{REPO}@v1", f"{REPO}@{COMMIT}"):
        own = open_checkpoint(fetch(address))
        assert_identical(read_all(own.params), read_all(open_official(model)[1]))
    assert cached() == ["config.json", "model.safetensors"]


def test_a_named_file_is_read_alone(hub, model):  # noqa: F811
    hub.files |= {"old/a.pth": b"other", "b.pth": b"other"}
    assert fetch(f"{REPO}/old/a.pth").read_bytes() == b"other"
    assert fetch(f"{REPO}/model.safetensors").name == "model.safetensors"
    assert cached() == ["model.safetensors", "old"]


def test_shards_come_with_their_index(hub, model, tmp_path):  # noqa: F811
    weight_map = {name: "model-1.safetensors" for name in model}
    hub.files["model-1.safetensors"] = hub.files.pop("model.safetensors")
    index = json.dumps({"weight_map": weight_map}).encode()
    hub.files["model.safetensors.index.json"] = index
    for address in (REPO, f"{REPO}/model.safetensors.index.json"):
        params = open_checkpoint(fetch(address)).params
        assert_identical(read_all(params), read_all(open_official(model)[1]))


def test_a_shard_that_is_not_there_is_named(hub):  # noqa: F811
    index = {"weight_map": {"x": "model-2.safetensors"}}
    hub.files["model.safetensors.index.json"] = json.dumps(index).encode()
    with pytest.raises(ConversionError, match="the repository has no file model-2.safetensors"):
        fetch(REPO)


def test_every_reader_takes_an_address(hub, model, tmp_path):  # noqa: F811
    ours = tmp_path / "ours.safetensors"
    main([REPO, str(ours), "--chunk-size", "32"])
    assert_identical(read_all(open_own_safetensors(ours).params), read_all(open_official(model)[1]))
    loaded = checkpoint.load_checkpoint(REPO)
    assert (loaded.model.config.width, loaded.config) == (128, None)
    stage = Stage("base", 8, 1, 1, 1e-3, expanded=False)
    params = load_initial_params(REPO, Config(loaded.model.config, (stage,)), one_device_mesh())
    assert np.array_equal(params["embed"], model["emb.weight"])


def test_a_broken_transfer_is_resumed(hub, model, monkeypatch):  # noqa: F811
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 512)
    hub.cut["model.safetensors"] = 1000
    assert read_all(open_checkpoint(fetch(REPO)).params)
    assert hub.ranges == ["bytes=512-"]


def test_a_transfer_that_breaks_off_for_good_is_one_line(hub, model, monkeypatch):  # noqa: F811
    fetch(f"{REPO}/config.json")
    hub.broken.add("model.safetensors")
    with pytest.raises(ConversionError, match="model.safetensors can't be fetched: ") as caught:
        fetch(REPO)
    assert "\n" not in str(caught.value)
    hub.broken.clear()
    assert read_all(open_checkpoint(fetch(REPO)).params)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_another_content_than_its_hash_is_refused(name, hub, model):  # noqa: F811
    hub.damaged.add(name)
    with pytest.raises(ConversionError, match=f"{name} is damaged: .* another hash .* remove"):
        fetch(REPO)


def test_a_cache_that_was_damaged_later_is_refused(hub, model):  # noqa: F811
    file = fetch(f"{REPO}/model.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.resolve().write_bytes(content)
    with pytest.raises(ConversionError, match="model.safetensors is damaged") as caught:
        fetch(REPO)
    assert f"remove {file.resolve()}" in str(caught.value)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (
            f"{REPO}/absent.pth",
            "repository has no file absent.pth, only README.md, config.json, model",
        ),
        (f"{REPO}@v9", "the repository has no revision 'v9'"),
        (f"{REPO}@refs%2Fpr%2F1", "the repository has no revision 'refs/pr/1'"),
        ("hf://org/other", "has no repository org/other, or it is private: check the name, or log"),
        ("hf://org", r"expected hf://org/name\[@revision\]"),
        ("hf://org/model@", r"expected hf://org/name\[@revision\]"),
        ("hf://org/model/../x", r"expected hf://org/name\[@revision\]"),
        ("hf://datasets/org/model", "only repositories of models"),
    ],
)
def test_a_wrong_address_is_one_line(address, message, hub, model):  # noqa: F811
    with pytest.raises(ConversionError, match=message) as caught:
        fetch(address)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (401, "GatedRepo", "access is restricted: accept the terms at .*/org/model and log in"),
        (403, "GatedRepo", "access is restricted: accept the terms"),
        (403, "", r"refuses access \(403\): log in"),
        (500, "", "is not in the cache, and .* can't be reached or failed .*500"),
    ],
)
def test_no_access_is_one_line(status, code, message, hub, model):  # noqa: F811
    hub.status, hub.code = status, code
    with pytest.raises(ConversionError, match=message) as caught:
        fetch(REPO)
    assert "\n" not in str(caught.value)


def test_files_of_another_commit_than_the_list_are_refused(hub, model):  # noqa: F811
    hub.sent = COMMIT[::-1]
    with pytest.raises(ConversionError, match=f"comes from another commit than {COMMIT}: "):
        fetch(REPO)


def test_several_checkpoints_are_listed(hub):  # noqa: F811
    hub.files = {"a.pth": b"", "b.pth": b"", "README.md": b""}
    with pytest.raises(ConversionError, match=f"{REPO} holds 2 .*: a.pth, b.pth. Name one"):
        fetch(REPO)


def test_without_network_the_cache_is_used_and_said(hub, model, caplog):  # noqa: F811
    with_network = fetch(REPO)
    hub.stop()
    with caplog.at_level(logging.WARNING):
        assert fetch(REPO) == with_network
    assert f"using the copy of {REPO} in the cache (commit {COMMIT})" in caplog.text
    assert fetch(f"{REPO}@{COMMIT}/model.safetensors").parent == with_network
    with pytest.raises(ConversionError, match="the copy in the cache has no file README.md"):
        fetch(f"{REPO}/README.md")
    for absent in ("hf://org/other", f"{REPO}@v1"):
        with pytest.raises(ConversionError, match="is not in the cache, and .* can't be reached"):
            fetch(absent)


def test_a_cache_without_the_model_is_told_from_a_repository_without_one(hub, model):  # noqa: F811
    fetch(f"{REPO}/config.json")
    hub.stop()
    with pytest.raises(ConversionError, match="holds no checkpoint; .*by its copy in the cache"):
        fetch(REPO)


def test_offline_mode_asks_nobody(hub, model, monkeypatch):  # noqa: F811
    fetch(REPO)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.status = 500
    assert open_checkpoint(fetch(REPO)).config.width == 128
    with pytest.raises(ConversionError, match="not in the cache, and HF_HUB_OFFLINE forbids"):
        fetch("hf://org/other")


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        ConversionError, match=r'needs huggingface_hub: pip install "rwkvx-jax\[hub'
    ):
        fetch(REPO)


def test_parts_of_an_address():
    assert hub_address("hf://a/b.c-d") == Address("a/b.c-d", "main", "")
    assert hub_address("hf://a/b@refs%2Fpr%2F2/c/d.pth") == Address("a/b", "refs/pr/2", "c/d.pth")
    assert hub_address(work_path("hf://a/b@v1/c.pth")) == Address("a/b", "v1", "c.pth")
    assert work_path("hf://a/b@v1").resolve().name == "b@v1"  # the label in evaluations


def test_nothing_is_written_to_the_hub(tmp_path, capsys):
    directory(tmp_path / "model", rwkv7())
    for write in (storage.make_folder, lambda path: storage.write_whole(path / "x", b"")):
        with pytest.raises(OSError, match="nothing is written to the Hub here; .*hf upload"):
            write(work_path("hf://org/new"))
    with pytest.raises(SystemExit, match="1"):
        main([str(tmp_path / "model"), "hf://org/new/model.safetensors"])
    assert "nothing is written to the Hub" in capsys.readouterr().err


@pytest.mark.thorough
def test_the_environment_of_the_hub_is_respected(tmp_path):
    """HF_ENDPOINT and HF_HOME lead a command to a server and a cache."""
    pytest.importorskip("huggingface_hub")
    server = HubServer()
    folder = directory(tmp_path / "model", rwkv7(), OFFICIAL_CONFIG)
    server.files |= {file.name: file.read_bytes() for file in folder.iterdir()}
    variables = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "rwkvx_jax.convert", REPO, str(tmp_path / "x.safetensors")]
    environment = os.environ | variables | {"JAX_PLATFORMS": "cpu"}
    for more in ({}, {"HF_HUB_OFFLINE": "1"}):
        subprocess.run(command, check=True, cwd=ROOT, env=environment | more)
    server.stop()
    assert (tmp_path / "home/hub/models--org--model").is_dir()
