"""Reads pickled weights (detectron2's .pkl) as plain data: no callable named in the file is ever called.

numpy's own `__setstate__` trusts a pickle: its bytes may become pointers. Here arrays are recorded as shape, type and
bytes, checked, and then made with `numpy.frombuffer`.
"""

import io
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

_TYPE = re.compile(r"[<>=|]?(?:b1|[iu][1248]|f[248])")  # booleans and numbers; "O" would be objects
_ARRAY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")


def read_pickle(path: Path) -> object:
    """Content of a pickle file: numbers, texts, containers, numeric arrays and torch tensors.

    Raises:
        pickle.UnpicklingError: for anything else, and for arrays that contradict their bytes.
    """
    content = _ArrayUnpickler(path.read_bytes()).load()
    return _with_arrays(content, {})


def _with_arrays(value: object, dictionaries: dict[int, dict]) -> object:
    """Arrays instead of records, in dictionaries of dictionaries; each of `dictionaries`, by identity, once."""
    if isinstance(value, _Record):
        return value.value
    if isinstance(value, dict) and id(value) not in dictionaries:
        dictionaries[id(value)] = value
        for name in value:
            value[name] = _with_arrays(value[name], dictionaries)
    return value


class _ArrayUnpickler(pickle._Unpickler):
    """Python's own reader: the one in C allocates as much as the file asks for, before it reads."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="latin1")
        self.bytes_left = len(content)  # for arrays: a file cannot hold more
        self.globals = {
            ("numpy", "ndarray"): _Name("numpy.ndarray"),
            ("numpy", "dtype"): _Name("numpy.dtype", lambda *arguments: _Type(*arguments)),
            ("collections", "OrderedDict"): _Name("collections.OrderedDict", lambda: _Dictionary()),
            ("_codecs", "encode"): _Name("_codecs.encode", _encode),
            ("torch.storage", "_load_from_bytes"): _Name("torch.storage._load_from_bytes", _load_storage),
            ("torch._utils", "_rebuild_tensor_v2"): _Name("torch._utils._rebuild_tensor_v2", self._tensor),
        }
        for module in ("builtins", "__builtin__"):  # protocol 2 writes empty bytes as a call
            self.globals[module, "bytes"] = _Name("bytes", lambda: b"")
        for module in _ARRAY_MODULES:
            self.globals[module, "_reconstruct"] = _Name(f"{module}._reconstruct", lambda *_: _Array(self))
            self.globals[module, "scalar"] = _Name(f"{module}.scalar", self._scalar)
        for module in ("numpy.core.numeric", "numpy._core.numeric"):
            self.globals[module, "_frombuffer"] = _Name(f"{module}._frombuffer", self._from_buffer)

    def find_class(self, module: str, name: str) -> "_Name":
        if (module, name) not in self.globals:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which weights do not need")
        return self.globals[module, name]

    def array(self, shape: object, dtype: object, in_columns: object, content: object) -> np.ndarray:
        """An array of a checked shape and type, from a copy of its bytes."""
        if (
            not isinstance(dtype, _Type)
            or not isinstance(content, bytes | bytearray | str)
            or not isinstance(shape, tuple)
        ):
            raise pickle.UnpicklingError("an array is not of plain numbers")
        if len(shape) > 32 or not all(type(side) is int and side >= 0 for side in shape):
            raise pickle.UnpicklingError(f"an array has the shape {shape}")
        content = content.encode("latin1") if isinstance(content, str) else content  # written by Python 2
        numbers = np.dtype(dtype.code)
        self.bytes_left -= len(content)
        if math.prod(shape) * numbers.itemsize != len(content) or self.bytes_left < 0:
            raise pickle.UnpicklingError(f"{len(content)} bytes for an array {shape} of {numbers}")
        flat = np.frombuffer(bytearray(content), numbers)  # a copy: tensors must be writable
        native = flat.astype(numbers.newbyteorder("="), copy=False)
        return native.reshape(shape, order="F" if in_columns else "C")

    def _scalar(self, dtype: object, content: object = b"") -> "_Record":
        return _Record(self.array((), dtype, False, content)[()])

    def _from_buffer(self, content: object, dtype: object, shape: object, order: object) -> "_Record":
        """An array as protocol 5 writes it."""
        return _Record(self.array(shape, dtype, order == "F", content))

    def _tensor(self, storage: object, offset: object, size: object, stride: object, *_: object) -> "_Record":
        numbers = (offset, *size, *stride) if isinstance(size, tuple) and isinstance(stride, tuple) else (None,)
        if not isinstance(storage, _Record) or not all(type(number) is int and number >= 0 for number in numbers):
            raise pickle.UnpicklingError("a tensor is not of plain numbers")
        steps = [(side - 1) * step for side, step in zip(size, stride, strict=True)]
        values, length = math.prod(size), len(storage.value)
        if (values and offset + sum(steps) >= length) or values > length:
            raise pickle.UnpicklingError(f"a tensor {tuple(size)} does not fit its {length} values")
        return _Record(torch.as_strided(storage.value, size, stride, offset))


class _Name:
    """A name in a pickle that stands for a function; nothing can be set on it."""

    __slots__ = ("function", "name")

    def __init__(self, name: str, function: Callable[..., object] | None = None) -> None:
        self.name, self.function = name, function

    def __call__(self, *arguments: object) -> object:
        if self.function is None:
            raise pickle.UnpicklingError(f"it calls {self.name}, which weights do not need")
        try:
            return self.function(*arguments)
        except TypeError as error:
            raise pickle.UnpicklingError(f"it calls {self.name} with arguments that weights do not need") from error

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError(f"it changes {self.name}")


class _Record:
    """A finished array, number, storage or tensor."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("it changes a finished array")


class _Array(_Record):
    """What `_reconstruct` begins and `__setstate__` fills."""

    def __init__(self, reader: _ArrayUnpickler) -> None:
        self.reader = reader
        super().__init__(None)

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) not in (4, 5) or self.value is not None:
            raise pickle.UnpicklingError("an array is not of plain numbers")
        self.value = self.reader.array(*state[-4:])  # Python 2 may leave out the version, the first of five


class _Type:
    """A numeric type of numpy by its code."""

    def __init__(self, code: object = None, *flags: object) -> None:
        if not isinstance(code, str) or not _TYPE.fullmatch(code):
            raise pickle.UnpicklingError(f"an array of the type {str(code)[:20]!r} holds more than numbers")
        self.code = code

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError("an array's type is damaged")
        self.code = state[1] + self.code.lstrip("<>=|")


class _Dictionary(dict):
    """An ordered dictionary; its attributes (torch's `_metadata`) are ignored."""

    def __setstate__(self, state: object) -> None:
        return


def _encode(text: object, encoding: object = None) -> bytes:
    """Bytes as protocol 2 writes them."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("bytes are damaged")
    return text.encode("latin1")


def _load_storage(content: object) -> _Record:
    """A torch storage as a flat tensor."""
    if not isinstance(content, bytes):
        raise pickle.UnpicklingError("a tensor's bytes are damaged")
    storage = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if not isinstance(storage, torch.TypedStorage):
        raise pickle.UnpicklingError("a tensor's bytes are damaged")
    flat = torch.empty(0, dtype=storage.dtype).set_(storage)
    if flat.nbytes > len(content):
        raise pickle.UnpicklingError("a tensor is larger than its bytes")
    return _Record(flat)
