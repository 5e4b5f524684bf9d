"""Reads the weights of other people's checkpoints without running anything that is in them."""

import collections
import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

_CONTAINERS = ("model", "state_dict")


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by name from a `.safetensors`, a torch file (`.pth`, `.pt`, `.bin`) or a detectron2 `.pkl`.

    Training checkpoints are opened at their "model" or "state_dict".

    Raises:
        ValueError: when the file is missing, damaged, holds more than tensors and plain containers, or no tensors.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: name a .pth, .pkl or .safetensors file")
    try:
        content = _read(path)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read as weights ({reason}): download it again") from error
    for name in _CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    tensors = {
        name: torch.as_tensor(value)
        for name, value in (content.items() if isinstance(content, dict) else ())
        if isinstance(value, torch.Tensor | np.ndarray | np.generic)
    }
    if not tensors:
        raise ValueError(f"{path} holds no named tensors: name a checkpoint of weights")
    return tensors


def _read(path: Path) -> object:
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".pkl" and not zipfile.is_zipfile(path):
        with path.open("rb") as stream:
            return _TensorUnpickler(stream, encoding="latin1").load()
    return torch.load(path, map_location="cpu", weights_only=True)


class _TensorUnpickler(pickle.Unpickler):
    """Admits numpy arrays, torch tensors and ordered dictionaries, nothing else."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return lambda data: torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return torch._utils._rebuild_tensor_v2
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode(encoding)
        if module in _NUMPY and name in _NUMPY[module]:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which weights do not need")


_NUMPY = {
    "numpy": ("ndarray", "dtype"),
    "numpy.core.multiarray": ("_reconstruct", "scalar"),
    "numpy._core.multiarray": ("_reconstruct", "scalar"),
}
