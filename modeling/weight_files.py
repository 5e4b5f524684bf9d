"""Reads and renames the weights of foreign checkpoints, without executing code in them."""

import argparse
import collections
import io
import pickle
import re
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, ProcessorMixin

# Pattern of a whole module path -> our module path; the parameter's own name (weight, bias, ...) is kept.
Rules = list[tuple[str, str | Callable[[re.Match], str]]]
_LEAVES = {"weight", "bias", "in_proj_weight", "in_proj_bias", "running_mean", "running_var"}
_LEAVES.add("relative_position_bias_table")
_CONTAINERS = ("model", "state_dict")


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read tensors by name from a `.safetensors`, a torch file (`.pth`, `.pt`, `.bin`) or a detectron2 `.pkl`.

    Of a training checkpoint they are those under "model" or "state_dict"; the prefix of a parallel wrapper is removed.

    Raises:
        ValueError: when the file is missing, damaged, holds more than tensors and plain containers, or no tensors.
    """
    content = read_file(path)
    for name in _CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    tensors = {
        name: torch.as_tensor(value)
        for name, value in (content.items() if isinstance(content, dict) else ())
        if isinstance(value, torch.Tensor | np.ndarray | np.generic)
    }
    if not tensors:
        raise ValueError(f"{path} holds no named tensors: give a checkpoint of weights")
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


def read_file(path: Path) -> object:
    """Read a weight file: tensors, arrays, plain containers and the settings of a command line.

    Raises:
        ValueError: when the file is missing, damaged, or holds anything else.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a .pth, .pkl or .safetensors file")
    try:
        return _read(path)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read as weights ({reason}): download it again") from error


def rename(name: str, rules: Rules) -> str | None:
    """Our name of a parameter by the first rule that matches its module; None when there is none."""
    module, _, leaf = name.rpartition(".")
    for pattern, replacement in rules if leaf in _LEAVES else ():
        match = re.fullmatch(pattern, module)
        if match:
            try:
                return f"{match.expand(replacement) if isinstance(replacement, str) else replacement(match)}.{leaf}"
            except KeyError:  # a part that is not in the rule's table
                return None
    return None


def split_projections(name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """The three parts of a fused `in_proj_weight` or `in_proj_bias` by name; any other parameter alone."""
    module, fused, leaf = name.rpartition(".in_proj_")
    if not fused:
        return {name: value}
    parts = zip("qkv", value.chunk(3), strict=True)
    return {f"{module}.{letter}_proj.{leaf}": part.clone() for letter, part in parts}


def count_indices(names: Mapping[str, object], pattern: str) -> int:
    """Number of different indices, group 1 of `pattern`, at the start of the names."""
    return len({match[1] for name in names if (match := re.match(pattern, name))})


def write_folder(
    folder: Path, model: PreTrainedModel, weights: dict[str, torch.Tensor], processor: ProcessorMixin, card: str
) -> None:
    """Save `model` with `weights`, its processor, their code and a card, atomically.

    Raises:
        ValueError: when the folder is not empty, or the weights are not exactly those of the model.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder: give a new one")
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in weights.items()}
    wrong = sorted(dict(ours.items() ^ theirs.items()))
    if wrong:
        raise ValueError(
            f"{len(wrong)} parameters are missing, unexpected or of another shape, {wrong[0]} first: not a whole "
            f"{type(model).__name__}"
        )
    model.load_state_dict(weights)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as staging:
        whole = Path(staging) / folder.name
        model.eval().save_pretrained(whole)
        processor.save_pretrained(whole)
        (whole / "README.md").write_text(card, encoding="utf-8")
        whole.replace(folder)


def run_conversion(
    parser: argparse.ArgumentParser, convert: Callable[..., PreTrainedModel], arguments: list[str] | None
) -> int:
    """Run a converter's command line; flags are accepted with dashes and with underscores.

    Args:
        parser: its options, `checkpoint` and `folder` among them, are the arguments of `convert`.
        convert: writes the folder and returns the model.
        arguments: of the command line; None for those of the process.

    Returns:
        the exit code: 0, or 2 after one line about what is wrong.
    """
    words = sys.argv[1:] if arguments is None else arguments
    flags = [word.partition("=") if word.startswith("--") else (word, "", "") for word in words]
    options = parser.parse_args(
        [(name.replace("_", "-") if name.startswith("--") else name) + equals + value for name, equals, value in flags]
    )
    try:
        model = convert(**vars(options))
    except (ValueError, OSError) as error:
        line = str(error).splitlines()[0]
        line = line if str(options.checkpoint) in line else f"{options.checkpoint}: {line}"
        print(f"{parser.prog.rpartition('.')[2]}: {line}", file=sys.stderr)
        return 2
    print(f"{options.folder}: {type(model).__name__}, {model.num_parameters() / 1e6:.1f} M parameters")
    return 0


def _read(path: Path) -> object:
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".pkl" and not zipfile.is_zipfile(path):
        with path.open("rb") as stream:
            return _TensorUnpickler(stream, encoding="latin1").load()
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


class _TensorUnpickler(pickle.Unpickler):
    """Admits only numpy arrays, torch tensors and ordered dictionaries."""

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
