"""Weight files of strangers: plain numbers are read exactly, anything else is one error, never a crash."""

import collections
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from modeling.weight_files import read_weights

ROOT = Path(__file__).resolve().parents[1]

ARRAYS = {
    "float": np.arange(6, dtype=np.float32).reshape(2, 3),
    "columns": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    "big_endian": np.arange(4, dtype=">f4"),
    "half": np.ones((1, 2, 1), np.float16),
    "bool": np.array([True, False]),
    "empty": np.zeros((0, 3), np.int64),
    "scalar": np.float32(1.5),
    "point": np.array(7, np.int32),
}


class Call:
    """Pickles as a call of `function` with `arguments`, and then a state."""

    def __init__(self, function: object, *arguments: object, state: object = None) -> None:
        self.function, self.arguments, self.state = function, arguments, state

    def __reduce__(self) -> tuple:
        return (self.function, self.arguments, *(() if self.state is None else (self.state,)))


def array(shape: object, dtype: object, content: object, columns: bool = False) -> Call:
    """A pickled numpy array with these parts."""
    function = np.arange(1).__reduce__()[0]
    return Call(function, np.ndarray, (0,), b"b", state=(1, shape, dtype, columns, content))


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_arrays_and_tensors_of_a_pickle_are_read_exactly(protocol: int, tmp_path: Path) -> None:
    tensor = torch.arange(12.0).view(3, 4)
    content = {**ARRAYS, "tensor": tensor, "view": tensor.T[1:]}
    ordered = collections.OrderedDict(content)
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"model": ordered, "__author__": "x"}, protocol=protocol))
    weights = read_weights(tmp_path / "w.pkl")
    assert weights.keys() == content.keys()
    for name, value in ARRAYS.items():
        native = value.astype(value.dtype.newbyteorder("="))
        assert weights[name].dtype == torch.as_tensor(native).dtype and weights[name].shape == value.shape
        assert (weights[name].numpy() == value).all()
    assert (weights["tensor"] == tensor).all() and (weights["view"] == tensor.T[1:]).all()
    weights["float"] += 1  # writable


def test_arrays_of_python_2_are_read(tmp_path: Path) -> None:
    head = b"\x80\x02}q\x00U\x01aq\x01cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    numbers = b"cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNN" + 2 * b"J\xff\xff\xff\xff" + b"K\x00tb"
    state = b"(K\x01K\x02\x85" + numbers + b"\x89"
    (tmp_path / "w.pkl").write_bytes(head + state + b"U\x08" + struct.pack("<2f", 1.5, -2) + b"tbs.")
    assert read_weights(tmp_path / "w.pkl")["a"].tolist() == [1.5, -2]


F4 = np.dtype("f4")
CRAFTED = {
    "object array": lambda: np.array([{}, 1], object),
    "object type, bytes": lambda: array((2,), np.dtype("O"), b"A" * 16),
    "record type": lambda: array((2,), np.dtype([("a", "f4")]), b"A" * 8),
    "too few bytes": lambda: array((1 << 40,), F4, b"A" * 8),
    "negative side": lambda: array((-2,), F4, b"A" * 8),
    "huge sides": lambda: array((1 << 62, 1 << 62), F4, b""),
    "no bytes": lambda: array((2,), F4, [1.0, 2.0]),
    "shape of texts": lambda: array(("2",), F4, b"A" * 8),
    "type is a text": lambda: array((2,), "f4", b"A" * 8),
    "ndarray called": lambda: Call(np.ndarray, (1 << 40,), F4),
    "ndarray of an address": lambda: Call(np.ndarray, (2,), "O", b"A" * 16),
    "dtype of records": lambda: Call(np.dtype, [("a", "O")]),
    "dtype with a state": lambda: Call(np.dtype, "f4", False, True, state=(3, "x", None, None, None, -1, -1, 0)),
    "ordered dictionary of pairs": lambda: Call(collections.OrderedDict, [("a", 1)]),
    "scalar of objects": lambda: Call(np.float32(1).__reduce__()[0], np.dtype("O"), b"A" * 8),
    "function": lambda: Call(print, "text"),
    "state of a dictionary": lambda: Call(collections.OrderedDict, state=(None, {"__class__": dict})),
    "tensor outside its storage": lambda: Call(
        torch._utils._rebuild_tensor_v2, torch.zeros(2).storage(), 0, (1 << 40,), (1,), False, None
    ),
    "tensor before its storage": lambda: Call(
        torch._utils._rebuild_tensor_v2, torch.zeros(2).storage(), -8, (1,), (1,), False, None
    ),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_pickle_is_one_error(name: str, tmp_path: Path) -> None:
    crafted = CRAFTED[name]()
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"model": {"a": crafted}}, protocol=2))
    with pytest.raises(ValueError, match=r"w\.pkl cannot be read as weights \(") as error:
        read_weights(tmp_path / "w.pkl")
    assert "\n" not in str(error.value)


def test_bytes_that_arrays_share_are_not_multiplied(tmp_path: Path) -> None:
    content = bytes(1 << 16)
    arrays = {f"a{i}": array((1 << 14,), F4, content) for i in range(1000)}
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(arrays, protocol=4))
    with pytest.raises(ValueError, match="65536 bytes for an array"):
        read_weights(tmp_path / "w.pkl")


def test_a_place_far_outside_the_memo_allocates_nothing(tmp_path: Path) -> None:
    (tmp_path / "w.pkl").write_bytes(b"\x80\x02}r" + struct.pack("<I", 0xFFFFFFFF) + b".")
    with pytest.raises(ValueError, match="no named tensors"):
        read_weights(tmp_path / "w.pkl")


def test_torch_files_of_more_than_plain_tensors_are_one_error(tmp_path: Path) -> None:
    torch.save({"a": torch.eye(3).to_sparse()}, tmp_path / "sparse.pth")
    torch.save({"a": torch.zeros(3, device="meta")}, tmp_path / "meta.pth")
    torch.save({"a": torch.zeros(1 << 16)}, tmp_path / "whole.pth")
    with zipfile.ZipFile(tmp_path / "whole.pth") as whole:
        with zipfile.ZipFile(tmp_path / "compressed.pth", "w", zipfile.ZIP_DEFLATED) as compressed:
            for part in whole.infolist():
                compressed.writestr(part.filename, whole.read(part))
    for name in ("sparse.pth", "meta.pth", "compressed.pth"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as weights"):
            read_weights(tmp_path / name)


READ_ALL = """
import sys
from pathlib import Path
from modeling.weight_files import read_weights
for path in sorted(Path(sys.argv[1]).iterdir()):
    print(path.name, flush=True)
    try:
        for value in read_weights(path).values():
            value.double().sum()
    except ValueError as error:
        assert "\\n" not in str(error), path
"""


def damage(content: np.ndarray, number: int, random: np.random.Generator) -> bytes:
    """The bytes of a file, cut short (every eighth) or with up to 16 random ones."""
    damaged = content[: random.integers(1, len(content))] if number % 8 == 0 else content.copy()
    places = random.integers(0, len(damaged), 1 << (number % 5))
    if number % 8:
        damaged[places] = random.integers(0, 256, len(places))
    return damaged.tobytes()


@pytest.mark.slow
def test_two_hundred_damaged_files_end_in_errors_and_never_in_a_signal(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weights = {name: torch.tensor(value.astype("f4").tolist()) for name, value in ARRAYS.items()}
    writers: dict[str, Callable[[Path], object]] = {
        "arrays.pkl": lambda path: path.write_bytes(pickle.dumps(ARRAYS, protocol=2)),
        "tensors.pkl": lambda path: path.write_bytes(pickle.dumps(weights)),
        "zip.pth": lambda path: torch.save(weights, path),
        "legacy.pth": lambda path: torch.save(weights, path, _use_new_zipfile_serialization=False),
        "w.safetensors": lambda path: save_file(weights, path),
    }
    (tmp_path / "damaged").mkdir()
    for name, write in writers.items():
        write(tmp_path / name)
        content = np.frombuffer((tmp_path / name).read_bytes(), np.uint8)
        for i in range(40):
            (tmp_path / "damaged" / f"{i}-{name}").write_bytes(damage(content, i, random))
    command = [sys.executable, "-W", "ignore", "-c", READ_ALL, tmp_path / "damaged"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-80:] + done.stderr
    assert len(done.stdout.splitlines()) == 200


READ_KERAS = READ_ALL.replace("modeling.weight_files import read_weights", "modeling.convert_vlt import read_h5")
READ_KERAS = READ_KERAS.replace("read_weights(path).values():", "read_h5(path).values():").replace(".double()", "")


@pytest.mark.slow
def test_two_hundred_damaged_keras_files_end_in_errors_and_never_in_a_signal(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    random = np.random.default_rng(0)
    (tmp_path / "damaged").mkdir()
    for storage in ({}, {"chunks": True, "compression": "gzip"}):
        with h5py.File(tmp_path / "whole.h5", "w") as file:
            layers = [f"conv2d_{number}" for number in range(6)]
            file.attrs["layer_names"] = np.array(layers, dtype="S")
            for layer in layers:
                group = file.create_group(layer)
                group.attrs["weight_names"] = np.array([f"{layer}/kernel:0"], dtype="S")
                values = random.standard_normal((3, 3, 4, 4)).astype("f4")
                group.create_dataset(f"{layer}/kernel:0", data=values, **storage)
        content = np.frombuffer((tmp_path / "whole.h5").read_bytes(), np.uint8)
        for i in range(100):
            (tmp_path / "damaged" / f"{i}-{len(storage)}.h5").write_bytes(damage(content, i, random))
    command = [sys.executable, "-W", "ignore", "-c", READ_KERAS, tmp_path / "damaged"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-80:] + done.stderr
    assert len(done.stdout.splitlines()) == 200
