"""Files made to exhaust memory or time, and mutated headers: refused, or read as written."""

import gc
import json
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvx_jax.config import ConfigError
from rwkvx_jax.convert.files import open_tensors
from rwkvx_jax.convert.load import open_checkpoint
from rwkvx_jax.convert.official import official_to_params
from rwkvx_jax.convert.own import write_own_safetensors
from rwkvx_jax.convert.pth import open_pth, write_pth
from rwkvx_jax.convert.safetensors_file import open_safetensors, write_safetensors
from rwkvx_jax.convert.tensors import ConversionError
from tests.convert.convert_checkpoints import (
    assert_identical,
    fla_directory,
    fla_tensors,
    official_tensors,
    read_all,
    rwkv7,
)
from tests.convert.test_pth import archive, glob, one, piece, storage, view

SECONDS, LEAST_MEMORY = 2.0, 64 << 20
TENSORS = official_tensors()
DATA = np.arange(12, dtype=np.float32)


def pack_safetensors(path, header, data=b""):
    """A safetensors file with the given header: an object, or its bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def named(path, *extra):
    """An official safetensors file with a vector under each further name."""
    write_safetensors(path, TENSORS | {name: np.ones(3, np.float32) for name in extra})
    return path


def ours(path, **changes):
    """One of our files with fields of its configuration changed, and without hashes."""
    config, params, info = official_to_params(TENSORS)
    write_own_safetensors(path, config, "", params, info)
    tensors, metadata = open_safetensors(path)
    fields = json.loads(metadata["model_config"]) | changes
    return rewritten(path, read_all(tensors), metadata | {"model_config": json.dumps(fields)})


def rewritten(path, tensors, metadata):
    """A file with the metadata as it is, without hashes, as other programs write it."""
    safetensors.numpy.save_file(tensors, path, metadata)
    return path


def fla(path, name):
    tensors = fla_tensors(rwkv7()) | {name: np.ones(3, np.float32)}
    return fla_directory(path.with_suffix(""), tensors)


def index(path, shard):
    path = path.with_name("model.safetensors.index.json")
    path.write_text(json.dumps({"weight_map": {"x": path.name if shard == "itself" else shard}}))
    return path


def pickled(path, body, entries=None):
    return archive(path.with_suffix(".pth"), body, entries)


def deflated(path, name, kind=zipfile.ZIP_DEFLATED):
    path = pickled(path, one(view((12,), (1,))), {"0": DATA.tobytes()} if name != "data/0" else {})
    entries = {"byteorder": b"little", "data/0": DATA.tobytes()}
    with (
        zipfile.ZipFile(path, "a", kind, compresslevel=1) as file,
        file.open(f"model/{name}", "w") as entry,
    ):
        entry.write(entries.get(name, b""))
        for _ in range(100 if kind == zipfile.ZIP_DEFLATED else 1):
            entry.write(bytes(1 << 20))
    return path


def bomb_pickle(path):
    path = path.with_suffix(".pth")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        file.writestr("model/data.pkl", b"\x80\x02" + b"N" * (100 << 20))
    return path


def patched(path, offset, value):
    """A torch file with bytes of its first entry's record in the central directory replaced."""
    path = pickled(path, one(view((12,), (1,))), {"0": DATA.tobytes()})
    raw = bytearray(path.read_bytes())
    place = raw.index(b"PK\x01\x02") + offset
    raw[place : place + len(value)] = value
    path.write_bytes(raw)
    return path


def long_directory(path, size=64 << 20):
    """A zip archive that is all list of entries."""
    path = path.with_suffix(".pth")
    record = struct.pack("<4s6H3L5H2L", b"PK\x01\x02", *[0] * 16)
    directory = record * (size // len(record))
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, len(directory), 0, 0)
    path.write_bytes(directory + end)
    return path


def doubled(times=60):
    """Opcodes of a nested tuple whose size doubles each time, although it takes few bytes."""
    return b")q\x00" + b"h\x00\x86q\x00" * times


def shared(path, tensors=2000):
    """Many tensors that all are the same megabyte."""
    first = piece("0") + view((1 << 18,), (1,), size=1 << 18) + b"q\x01"
    others = b"".join(piece(str(i))[:-2] + b"h\x01" for i in range(1, tensors))
    return pickled(path, b"}(" + first + others + b"u", {"0": bytes(1 << 20)})


SHAPED = piece(0) + doubled() + b"h\x00" + b"tR"
HOSTILE = {
    "far block": lambda p: named(p, "rwkv.blocks.99999999.att.w0"),
    "far attention block": lambda p: named(p, "moba.99999999.ln1.bias"),
    "block of 5000 digits": lambda p: named(p, f"rwkv.blocks.{'9' * 400}.att.w0"),
    "far layer of fla": lambda p: fla(p, "model.layers.999999999.attn.k_k"),
    "a block a tensor": lambda p: named(p, *(f"rwkv.blocks.{i}.x" for i in range(2000))),
    "our blocks": lambda p: ours(p, num_blocks=10**9),
    "our blocks, no divisor": lambda p: ours(p, num_blocks=10**9, num_attention_blocks=7),
    "our width": lambda p: ours(p, width=1 << 70),
    "our vocabulary": lambda p: ours(p, vocab_size=10**400),
    "our nested configuration": lambda p: rewritten(
        p, {"x": DATA}, {"rwkvx_jax_format": "2", "model_config": "[" * 200000}
    ),
    "index of itself": lambda p: index(p, "itself"),
    "index of nothing": lambda p: index(p, ""),
    "index of null": lambda p: index(p, None),
    "index of a number": lambda p: index(p, 5),
    "index of the folder above": lambda p: index(p, ".."),
    "index of a long name": lambda p: index(p, "x" * 5000 + ".pth"),
    "index of a list": lambda p: index(p, [["x"]]),
    "huge header": lambda p: pack_safetensors(p, b" " * (64 << 20)),
    "header of lists": lambda p: pack_safetensors(p, b'{"x":[' + b"[]," * 300000 + b"[]]}"),
    "deep header": lambda p: pack_safetensors(p, b'{"x":' * 100000),
    "many entries": lambda p: pack_safetensors(
        p, {str(i): {"dtype": "F32", "shape": [], "data_offsets": [0, 0]} for i in range(40000)}
    ),
    "endless shape": lambda p: pack_safetensors(
        p, {"x": {"dtype": "F32", "shape": [0, 1 << 62], "data_offsets": [0, 0]}}
    ),
    "many dimensions": lambda p: pack_safetensors(
        p, {"x": {"dtype": "U8", "shape": [1] * 70, "data_offsets": [0, 1]}}, b"x"
    ),
    "endless shape of a pickle": lambda p: pickled(
        p, one(view((0, 1 << 62), (1, 1))), {"0": DATA.tobytes()}
    ),
    "deflated pickle": bomb_pickle,
    "deflated byteorder": lambda p: deflated(p, "byteorder"),
    "deflated data": lambda p: deflated(p, "data/0"),
    "bzip2 data": lambda p: deflated(p, "data/0", zipfile.ZIP_BZIP2),
    "encrypted": lambda p: patched(p, 8, b"\x01\x00"),
    "unknown compression": lambda p: patched(p, 10, b"\x63\x00"),
    "a terabyte in the directory": lambda p: patched(p, 20, b"\xf0\xff\xff\xff\xf0\xff\xff\xff"),
    "long directory": long_directory,
    "pickle of lists": lambda p: pickled(p, b"]" * (4 << 20)),
    "pickle of long text": lambda p: pickled(p, piece("x" * (30 << 20))),
    "doubled key": lambda p: pickled(p, b"}" + doubled() + b"Ns"),
    "doubled storage": lambda p: pickled(p, doubled() + b"Q"),
    "doubled shape": lambda p: pickled(
        p,
        one(glob("torch._utils", "_rebuild_tensor_v2") + b"(" + storage() + SHAPED),
        {"0": DATA.tobytes()},
    ),
    "doubled value": lambda p: pickled(p, one(doubled())),
    "deep tuple": lambda p: pickled(p, b"}" + b")" + b"\x85" * 50000 + b"Ns"),
    "shared storage": shared,
}


MESSAGES = {
    "far block": "a name is wrong, or most tensors are missing",
    "deflated data": "compressed or encrypted",
    "bzip2 data": "compressed or encrypted",
    "encrypted": "compressed or encrypted",
    "unknown compression": "compressed or encrypted",
    "pickle of lists": "more than 262144 instructions",
    "doubled key": "neither a string nor an integer",
    "doubled storage": "unknown kind of storage",
    "doubled shape": "not whole numbers",
    "doubled value": "'x': tuple",
    "deep tuple": "neither a string nor an integer",
    "shared storage": "share their storage",
    "endless shape": "impossible shape",
    "index of itself": "not plain names",
    "long directory": "list of entries",
}


def refused(path):
    """The message of the refusal, be it of the tensors by themselves or of the model."""
    with pytest.raises((ConversionError, ConfigError)) as caught:
        if path.is_file():
            read_all(open_tensors(path)[0])
        open_checkpoint(path)
    return str(caught.value)


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused_in_bounded_time_and_memory(kind, tmp_path):
    path = HOSTILE[kind](tmp_path / "x.safetensors")
    size = path.stat().st_size
    gc.freeze()  # a collection looks through what this file made, not what all tests before did
    start = time.thread_time()
    message = refused(path)
    seconds = time.thread_time() - start
    gc.unfreeze()
    tracemalloc.start()  # only now: it makes everything several times slower
    refused(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert MESSAGES.get(kind, "") in message
    assert seconds < SECONDS
    assert peak < max(LEAST_MEMORY, 2 * size), f"{peak / 1e6:.0f} MB"
    assert len(message) < 2000 + 2 * size


def test_a_memo_index_is_only_a_number(tmp_path):
    body = b"}" + piece("x")[:-2] + b"r" + struct.pack("<I", 1 << 28) + view((12,), (1,)) + b"s"
    tracemalloc.start()
    tensors = read_all(open_pth(archive(tmp_path / "x.pth", body, {"0": DATA.tobytes()})))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert_identical(tensors, {"x": DATA})
    assert peak < 1 << 20


def test_names_that_would_reach_the_terminal_are_refused(tmp_path):
    for name in ("a\x1b[2Jb", "x" * 501, "a\nb"):
        write_safetensors(tmp_path / "x.safetensors", {name: DATA})
        write_pth(tmp_path / "x.pth", {name: DATA})
        for path in tmp_path.iterdir():
            with pytest.raises(ConversionError, match="which no checkpoint uses") as caught:
                open_tensors(path)
            assert str(caught.value).isprintable()


def mutations(data):
    """Bytes flipped, cut out, repeated, or the whole truncated."""
    places = st.integers(0, len(data) - 1)
    return st.one_of(
        st.tuples(places, st.integers(1, 255)).map(
            lambda m: data[: m[0]] + bytes([data[m[0]] ^ m[1]]) + data[m[0] + 1 :]
        ),
        places.map(lambda n: data[:n]),
        st.tuples(places, places).map(lambda m: data[: min(m)] + data[max(m) :]),
        st.tuples(places, places).map(lambda m: data[: max(m)] + data[min(m) :]),
    )


SMALL = {"first": DATA.reshape(3, 4), "second": np.ones(3, np.float16), "third": np.int64(7)}
SMALL = {name: np.asarray(value) for name, value in SMALL.items()}
OWN = {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with SMALL as whole.safetensors, whole.pth, and two shards; fills OWN."""
    folder = tmp_path_factory.mktemp("mutated")
    write_safetensors(folder / "whole.safetensors", SMALL, {"who": "we"})
    write_pth(folder / "whole.pth", SMALL)
    write_safetensors(folder / "a.safetensors", {"first": SMALL["first"]})
    write_pth(folder / "b.pth", {n: SMALL[n] for n in ("second", "third")})
    config, params, info = official_to_params(official_tensors(blocks=1, attention_blocks=1))
    write_own_safetensors(folder / "own.safetensors", config, "", params, info)
    tensors, metadata = open_safetensors(folder / "own.safetensors")
    OWN.update(tensors=read_all(tensors), metadata=metadata)
    return folder


@settings(max_examples=100, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_mutated_files_open_as_they_were_or_fail(suffix, data, folder):
    path = folder / f"x{suffix}"
    path.write_bytes(data.draw(mutations((folder / f"whole{suffix}").read_bytes())))
    try:
        tensors, metadata = open_tensors(path)
        found = read_all(tensors)
    except ConversionError:
        return
    assert_identical(found, SMALL)
    assert suffix == ".pth" or metadata["who"] == "we"


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_mutated_indexes_give_the_tensors_that_they_name_or_fail(data, folder):
    shards = {"first": "a.safetensors", "second": "b.pth", "third": "b.pth"}
    whole = json.dumps({"metadata": {}, "weight_map": shards}).encode()
    path = folder / "x.index.json"
    path.write_bytes(data.draw(mutations(whole)))
    try:
        found = read_all(open_tensors(path)[0])
    except ConversionError:
        return
    assert_identical(found, {name: SMALL[name] for name in found})


JSON_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.just(10**400),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(-1, 3), max_size=4),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_mutated_configurations_fit_the_tensors_or_fail(data, folder):
    """Of files without hashes: fields replaced by other values, renamed, or left out."""
    part = data.draw(st.sampled_from(["model_config", "official_info", "trained"]))
    fields = json.loads(OWN["metadata"].get(part, '{"step": 3, "length": 8}'))
    name = data.draw(st.sampled_from(sorted(fields)))
    value = fields.pop(name)
    kind = data.draw(st.sampled_from(["replaced", "renamed", "gone", "whole", "text"]))
    if kind == "replaced":
        fields[name] = data.draw(JSON_VALUES)
    elif kind == "renamed":
        fields[data.draw(st.text(max_size=4))] = value
    text = json.dumps(data.draw(JSON_VALUES) if kind == "whole" else fields)
    if kind == "text":
        text = data.draw(mutations(text.encode())).decode(errors="replace")
    path = folder / "changed.safetensors"
    rewritten(path, OWN["tensors"], OWN["metadata"] | {part: text})
    try:
        own = open_checkpoint(path)
    except (ConversionError, ConfigError):
        return
    assert_identical(read_all(own.params), OWN["tensors"])
    json.dumps([own.tokenizer_name, own.trained])
