"""Torch files without torch: round trips, views, and files that are damaged or hostile."""

import io
import pickle
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvx_jax.convert.pth import open_pth, write_pth
from rwkvx_jax.convert.tensors import ConversionError, LazyTensor
from tests.convert.convert_checkpoints import BF16, assert_identical, read_all
from tests.helpers import shared_path

REFERENCE_FILES = (
    "tiny_rwkvx.pth",
    "tiny_rwkv7.pth",
    "rwkv7_reverse_weights/260123_reverse_L2_only_rwkv7.pth",
)


def piece(value):
    """Opcodes of a plain value, without protocol mark and stop."""
    return pickle.dumps(value, protocol=2)[2:-1]


def glob(module, name):
    return b"c" + f"{module}\n{name}\n".encode()


def storage(kind="FloatStorage", key="0", size=12):
    values = piece(key) + piece("cuda:0") + piece(size)
    return b"(" + piece("storage") + glob("torch", kind) + values + b"tQ"


def view(shape, strides, offset=0, **of_storage):
    """Opcodes of one tensor, as torch writes it."""
    place = piece(offset) + piece(shape) + piece(strides) + piece(False)
    hooks = glob("collections", "OrderedDict") + b")R"
    return (
        glob("torch._utils", "_rebuild_tensor_v2")
        + b"("
        + storage(**of_storage)
        + place
        + hooks
        + b"tR"
    )


def archive(path, body, entries=None, root="model"):
    """A zip with the given pickle (protocol 2 and stop are added) and storages."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{root}/data.pkl", b"\x80\x02" + body + b".")
        for key, data in (entries or {}).items():
            file.writestr(f"{root}/data/{key}", data)
    return path


def one(tensor):
    """Opcodes of {"x": tensor}."""
    return b"}" + piece("x") + tensor + b"s"


@pytest.mark.parametrize("name", REFERENCE_FILES)
def test_reference_files_survive_a_round_trip(name, tmp_path):
    tensors = read_all(open_pth(shared_path("reference", "parity", name)))
    write_pth(tmp_path / "copy.pth", tensors)
    assert_identical(read_all(open_pth(tmp_path / "copy.pth")), tensors)


def test_reverse_weights_have_the_known_values():
    folder = ("reference", "parity", "rwkv7_reverse_weights")
    tensors = read_all(open_pth(shared_path(*folder, "260123_reverse_L2_only_rwkv7.pth")))
    with np.load(shared_path(*folder, "params_f32.npz")) as expected:
        assert_identical(tensors, dict(expected))


@pytest.mark.parametrize(
    "dtype",
    ["float32", BF16, "float16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"],
)
def test_dtypes_and_shapes_round_trip(dtype, tmp_path):
    rng = np.random.default_rng(0)
    shapes = {
        "scalar": (),
        "vector": (5,),
        "empty": (0, 3),
        "cube": (2, 3, 4),
        "Ünïcode": (1, 1, 7),
    }
    tensors = {n: (100 * rng.normal(size=s)).astype(dtype) for n, s in shapes.items()}
    write_pth(tmp_path / "x.pth", tensors)
    opened = open_pth(tmp_path / "x.pth")
    assert list(opened) == list(tensors)
    assert_identical(read_all(opened), tensors)
    assert np.array_equal(opened["cube"].read(1), tensors["cube"][1])


def test_storages_are_aligned_for_memory_mapping(tmp_path):
    write_pth(tmp_path / "x.pth", {f"tensor{i}": np.ones(i + 1, np.float32) for i in range(20)})
    raw = (tmp_path / "x.pth").read_bytes()
    with zipfile.ZipFile(io.BytesIO(raw)) as file:
        for entry in file.infolist():
            if "/data/" in entry.filename:
                header = raw[entry.header_offset :]
                start = entry.header_offset + 30 + int.from_bytes(header[26:28], "little")
                assert (start + int.from_bytes(header[28:30], "little")) % 64 == 0, entry.filename


def test_views_share_one_storage(tmp_path):
    data = np.arange(12, dtype=np.float32)
    items = {
        "whole": (view((3, 4), (4, 1)), data.reshape(3, 4)),
        "transposed": (view((4, 3), (1, 4)), data.reshape(3, 4).T),
        "offset": (view((2, 2), (4, 1), offset=5), data.reshape(3, 4)[1:, 1:3]),
        "every other": (view((6,), (2,)), data[::2]),
        "last": (view((), (), offset=11), data[11]),
    }
    body = b"}(" + b"".join(piece(n) + opcodes for n, (opcodes, _) in items.items()) + b"u"
    opened = open_pth(archive(tmp_path / "x.pth", body, {"0": data.tobytes()}))
    for name, (_, expected) in items.items():
        array = opened[name].read()
        assert array.shape == opened[name].shape == expected.shape
        assert array.flags["C_CONTIGUOUS"]
        assert np.array_equal(array, expected), name
        if expected.ndim:
            assert np.array_equal(opened[name].read(1), expected[1]), name


def test_parameters_and_module_metadata_are_understood(tmp_path):
    hooks = glob("collections", "OrderedDict") + b")R"
    tensor = view((12,), (1,))
    parameter = (
        glob("torch._utils", "_rebuild_parameter") + b"(" + tensor + piece(True) + hooks + b"tR"
    )
    metadata = piece({"_metadata": {"version": 1}}) + b"b"
    body = glob("collections", "OrderedDict") + b")R" + piece("x") + parameter + b"s" + metadata
    data = np.arange(12, dtype=np.float32)
    opened = open_pth(archive(tmp_path / "x.pth", body, {"0": data.tobytes()}))
    assert np.array_equal(opened["x"].read(), data)


def hostile(module, name, argument, form):
    """Opcodes of `module.name(argument)` in one of the forms that a pickle knows."""
    return {
        "reduce": glob(module, name) + b"(" + piece(argument) + b"tR",
        "instance": b"(" + piece(argument) + b"i" + f"{module}\n{name}\n".encode(),
        "object": b"(" + glob(module, name) + piece(argument) + b"o",
        "stack_global": piece(module) + piece(name) + b"\x93(" + piece(argument) + b"tR",
        "newobj": glob(module, name) + b"(" + piece(argument) + b"t\x81",
    }[form]


@pytest.mark.parametrize(
    ("module", "name"),
    [("os", "mkdir"), ("os", "system"), ("builtins", "eval"), ("torch", "load"),
     ("torch._utils", "_rebuild_tensor_v3"), ("collections", "namedtuple"),
     ("torch", "FloatTensor")],
)  # fmt: skip
@pytest.mark.parametrize("form", ["reduce", "instance", "object", "stack_global", "newobj"])
def test_hostile_pickles_execute_nothing(module, name, form, tmp_path):
    marker = tmp_path / "executed"
    path = archive(tmp_path / "x.pth", one(hostile(module, name, str(marker), form)))
    with pytest.raises(ConversionError, match=rf"{module}\.{name}.*nothing was executed"):
        open_pth(path)
    assert not marker.exists()


@pytest.mark.parametrize("form", ["reduce", "instance", "object", "stack_global"])
def test_the_hostile_pickles_are_real(form, tmp_path):
    """The standard unpickler does run them."""
    marker = tmp_path / "executed"
    pickle.loads(b"\x80\x02" + one(hostile("os", "mkdir", str(marker), form)) + b".")
    assert marker.exists()


@pytest.mark.parametrize(
    "target",
    [glob("torch._utils", "_rebuild_tensor_v2"), glob("torch", "FloatStorage"),
     glob("collections", "OrderedDict")],
)  # fmt: skip
@pytest.mark.parametrize("state", [{"__call__": 1}, (None, {"_function": 1, "_dtype": 1})])
def test_pickles_cannot_alter_what_they_are_given(target, state, tmp_path):
    path = archive(tmp_path / "x.pth", one(target + piece(state) + b"b"))
    with pytest.raises(ConversionError, match="may not modify"):
        open_pth(path)


DATA = np.arange(12, dtype=np.float32).tobytes()


@pytest.mark.parametrize(
    ("body", "entries", "message"),
    [
        (one(view((3, 4), (4, 1))), {}, "data/0' is missing"),
        (one(view((3, 4), (4, 1))), {"0": DATA[:-4]}, "has 44 bytes.*need 48"),
        (one(view((3, 4), (4, 1), kind="HalfStorage")), {"0": DATA}, "has 48 bytes.*need 24"),
        (one(view((3, 5), (5, 1))), {"0": DATA}, "repeats its storage"),
        (one(view((3, 4), (4, 1), offset=1)), {"0": DATA}, "does not fit"),
        (one(view((3, 2), (6, 1))), {"0": DATA}, "does not fit"),
        (one(view((1000, 12), (0, 1))), {"0": DATA}, "repeats its storage"),
        (one(view((3, -4), (4, 1))), {"0": DATA}, "of shape"),
        (one(view((3, 4), (4,))), {"0": DATA}, "of shape"),
        (one(view((3, 4), (-4, 1), offset=8)), {"0": DATA}, "of shape"),
        (one(view((3, 4), (4, 1), offset=-1)), {"0": DATA}, "offset"),
        (one(view((12,), (1,), size=-12)), {"0": DATA}, "-12 elements"),
        (one(b"(" + piece("module") + b"tQ"), {}, "unknown kind of storage"),
        (one(piece(3)), {}, "'x': int"),
        (one(b"}" + piece("y") + view((12,), (1,)) + b"s"), {"0": DATA}, "'x': dict"),
        (view((12,), (1,)), {"0": DATA}, "not a dict of tensors"),
        (piece([1]), {}, "holds a list"),
        (b"}" + piece(1) + view((12,), (1,)) + b"s", {"0": DATA}, "more than tensors"),
        (b"}(" + piece("x") + b"uuu", {}, "pickle cannot be read"),
        (b"", {}, "pickle cannot be read"),
    ],
)  # fmt: skip
def test_contradictions_are_named(body, entries, message, tmp_path):
    path = archive(tmp_path / "x.pth", body, entries)
    with pytest.raises(ConversionError, match=message) as caught:
        open_pth(path)
    assert str(path) in str(caught.value)


def test_damaged_data_is_noticed_when_read(tmp_path):
    path = tmp_path / "x.pth"
    write_pth(path, {"x": np.arange(100, dtype=np.float32)})
    raw = bytearray(path.read_bytes())
    raw[raw.index(np.arange(100, dtype=np.float32).tobytes()) + 17] ^= 1
    path.write_bytes(raw)
    tensor = open_pth(path)["x"]
    with pytest.raises(ConversionError, match="CRC-32.*truncated or damaged"):
        tensor.read()


def test_truncated_files_are_refused(tmp_path):
    write_pth(tmp_path / "x.pth", {"x": np.ones((10, 10), np.float32), "y": np.ones(3, BF16)})
    raw = (tmp_path / "x.pth").read_bytes()
    cut = tmp_path / "cut.pth"
    for length in [*range(0, len(raw), 41), len(raw) - 1]:
        cut.write_bytes(raw[:length])
        with pytest.raises(ConversionError, match="truncated|no torch checkpoint"):
            open_pth(cut)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.", "before version 1.6"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"hello", "not a zip archive"),
        (b"", "not a zip archive"),
    ],
)
def test_other_files_are_explained(content, message, tmp_path):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(ConversionError, match=message):
        open_pth(tmp_path / "x.pth")


def test_other_archives_are_explained(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as file:
        file.writestr("readme", "hello")
    with pytest.raises(ConversionError, match="no data.pkl"):
        open_pth(tmp_path / "x.pth")
    with pytest.raises(ConversionError, match="No such file"):
        open_pth(tmp_path / "absent.pth")
    archive(tmp_path / "big.pth", b"}")
    with zipfile.ZipFile(tmp_path / "big.pth", "a") as file:
        file.writestr("model/byteorder", "big")
    with pytest.raises(ConversionError, match="big-endian"):
        open_pth(tmp_path / "big.pth")


@settings(max_examples=150, deadline=None)
@given(position=st.floats(0, 1, exclude_max=True), value=st.integers(1, 255))
def test_a_flipped_byte_never_escapes(position, value, tmp_path_factory):
    """Whatever byte of the description changes: a clear error or sane tensors, nothing else."""
    body = (
        b"}(" + piece("x") + view((3, 4), (4, 1)) + piece("y") + view((4,), (1,), offset=3) + b"u"
    )
    changed = bytearray(body)
    changed[int(position * len(body))] ^= value
    path = archive(tmp_path_factory.mktemp("fuzz") / "x.pth", bytes(changed), {"0": DATA})
    try:
        tensors = open_pth(path)
    except ConversionError:
        return
    for tensor in tensors.values():
        assert tensor.read().size <= 12


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(b"what was there before")

    def fail(row):
        raise ConversionError("unreadable")

    lazy = {
        "good": np.ones(1000, np.float32),
        "bad": LazyTensor("bad", (3,), np.dtype(np.float32), fail),
    }
    with pytest.raises(ConversionError, match="unreadable"):
        write_pth(path, lazy)
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]
    assert path.read_bytes() == b"what was there before"


def test_unwritable_destinations_and_dtypes_are_named(tmp_path):
    ones = {"x": np.ones(3, np.float32)}
    with pytest.raises(ConversionError, match="does not exist"):
        write_pth(tmp_path / "absent" / "x.pth", ones)
    with pytest.raises(ConversionError, match="is a directory"):
        write_pth(tmp_path, ones)
    with pytest.raises(ConversionError, match="x is complex64"):
        write_pth(tmp_path / "x.pth", {"x": np.ones(3, np.complex64)})
    wrong = LazyTensor("x", (4,), np.dtype(np.float32), lambda row: np.ones(3, np.float32))
    with pytest.raises(ConversionError, match="12 bytes instead of 16"):
        write_pth(tmp_path / "x.pth", {"x": wrong})
    assert not list(tmp_path.iterdir())
