"""What was stored is what is read: every way in which a token file can be another one."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from rwkvx_jax.config import ConfigError, DataConfig, SourceConfig
from rwkvx_jax.data import hashes, stored
from rwkvx_jax.data.hashes import check_hashes, hash_files
from rwkvx_jax.data.pipeline import open_data
from tests.data.token_files import write_binidx

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]


@pytest.fixture
def small_samples(monkeypatch):
    """8 samples of 16 bytes, so that files of 1 kB are sampled."""
    monkeypatch.setattr(hashes, "_SAMPLES", 8)
    monkeypatch.setattr(hashes, "_SAMPLE_BYTES", 16)


@pytest.fixture
def chats(tmp_path):
    """A corpus with masks in a cache; -> opens it, with changes of the config."""
    path = tmp_path / "chats.jsonl"
    path.write_text((json.dumps({"messages": CHAT}) + "\n") * 100)
    config = DataConfig(sources=(SourceConfig("jsonl", path=str(path)),))
    return opener(config, tmp_path)


@pytest.fixture
def foreign(tmp_path):
    """A binidx source of others; -> opens it, with changes of the config."""
    write_binidx(tmp_path / "x", [np.arange(1, 256)] * 10)
    return opener(DataConfig(sources=(SourceConfig("binidx", path=str(tmp_path / "x")),)), tmp_path)


def opener(config, workdir):
    def opened(**changes):
        changed = dataclasses.replace(config, **changes)
        return open_data(changed, workdir=workdir, vocab_size=65536, process_index=0)

    return opened


def cache_file(tmp_path, extension):
    (path,) = (tmp_path / "data-cache").glob(f"*.{extension}")
    return path


DAMAGE = {
    "zeroed": lambda b: bytes(len(b)),
    "filled": lambda b: b"\xff" * len(b),
    "a third replaced": lambda b: b[: len(b) // 3] + b"\1" * (len(b) - len(b) // 3),
    "one bit": lambda b: b[:-3] + bytes([b[-3] ^ 1]) + b[-2:],
    "cut": lambda b: b[:-2],
    "longer": lambda b: b + bytes(2),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("extension", ["bin", "mask", "idx"])
def test_a_damaged_cache_is_refused(kind, extension, chats, tmp_path):
    first = chats()
    path = cache_file(tmp_path, extension)
    path.write_bytes(DAMAGE[kind](path.read_bytes()))
    with pytest.raises(ConfigError, match=rf"{path.name}|{path.stem}.bin"):
        chats()
    if kind == "one bit" and extension != "idx":
        with pytest.raises(ConfigError, match="its hash is another .* remove .*\\* and the"):
            chats()
    for file in path.parent.glob(f"{path.stem}.*"):
        file.unlink()
    assert chats().fingerprint == first.fingerprint


def test_a_mask_that_went_and_one_that_came(chats, foreign, tmp_path):
    chats()
    path = cache_file(tmp_path, "mask")
    path.unlink()
    with pytest.raises(ConfigError, match=f"{path.name} appeared or went since it was stored"):
        chats()
    foreign()
    (tmp_path / "x.mask").write_bytes(bytes(2550))
    with pytest.raises(ConfigError, match="x.mask appeared or went since it was stored"):
        foreign()


def test_a_cache_without_hashes_is_made_again(chats, tmp_path):
    first = chats()
    path = cache_file(tmp_path, "bin")
    good = path.read_bytes()
    cache_file(tmp_path, "hash").unlink()
    path.write_bytes(bytes(len(good)))
    assert chats().fingerprint == first.fingerprint and path.read_bytes() == good
    record = cache_file(tmp_path, "hash")
    record.write_bytes(b"{")
    with pytest.raises(ConfigError, match=f"{record.name} is no hash file .* remove it"):
        chats()


def test_full_checks_find_what_samples_miss(chats, foreign, tmp_path, small_samples):
    """A byte between two samples."""
    for opened, path in ((chats, None), (foreign, tmp_path / "x.bin")):
        opened(verify="full")
        path = path or cache_file(tmp_path, "bin")
        good = path.read_bytes()
        places = [start for start, _ in hashes._places(len(good))]
        assert len(places) == 8 and places[0] == 0 and places[-1] == len(good) - 16
        wrong = places[3] + 16
        path.write_bytes(good[:wrong] + bytes([good[wrong] ^ 1]) + good[wrong + 1 :])
        opened()
        with pytest.raises(ConfigError, match=f"{path.name} does not hold what was stored"):
            opened(verify="full")
        path.write_bytes(good)
        opened(verify="full")


@pytest.mark.parametrize("begin", [0, 300, 700, 871])
def test_samples_find_every_long_stretch(begin, tmp_path, small_samples):
    path, rng = tmp_path / "x", np.random.default_rng(0)
    data = rng.bytes(1000)
    path.write_bytes(data)
    before = hash_files({"bin": path}, full=False)
    stretch = 1000 // 7 + 1
    path.write_bytes(data[:begin] + bytes(stretch)[: 1000 - begin] + data[begin + stretch :])
    assert hash_files({"bin": path}, full=False) != before


def test_first_use_of_foreign_files_is_recorded(foreign, tmp_path):
    first = foreign()
    record = cache_file(tmp_path, "hash")
    assert set(json.loads(record.read_text())["files"]) == {"bin", "idx"}
    assert foreign().fingerprint == first.fingerprint
    write_binidx(tmp_path / "x", [np.arange(1, 256)[::-1]] * 10)
    with pytest.raises(ConfigError, match=rf"x.bin does not .* remove .*{record.name} if the"):
        foreign()
    record.unlink()
    assert foreign().fingerprint != first.fingerprint


def test_files_of_the_command_line_carry_their_hashes(tmp_path, chats):
    chats()
    for extension in ("bin", "idx", "mask", "hash"):
        shutil.copy(cache_file(tmp_path, extension), tmp_path / f"moved.{extension}")
    source = SourceConfig("binidx", path=str(tmp_path / "moved"))
    opened = opener(DataConfig(sources=(source,)), tmp_path / "elsewhere")
    opened()
    assert not (tmp_path / "elsewhere").exists()  # no record of a first use
    (tmp_path / "moved.mask").write_bytes(bytes((tmp_path / "moved.mask").stat().st_size))
    with pytest.raises(ConfigError, match="moved.mask does not .* restore it, or tokenize"):
        opened()


def test_a_reader_does_not_write_records(foreign, tmp_path):
    check_hashes(tmp_path / "x", tmp_path / "r.hash", full=False, write=False, remedy="")
    assert not (tmp_path / "r.hash").exists()


def test_hashes_appear_before_the_index(chats, monkeypatch):
    """Whoever sees the index finds them."""

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stored, "write_hashes", stop)
        chats()
    assert chats().sources[0].stream.masked
