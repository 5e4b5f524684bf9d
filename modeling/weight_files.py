"""Reads and renames the weights of foreign checkpoints, without executing code in them."""

import argparse
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

from .pickled_arrays import read_pickle

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
        if isinstance(name, str) and isinstance(value, torch.Tensor | np.ndarray | np.generic)
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
        for path in whole.iterdir():
            path.chmod(whole.stat().st_mode & 0o666)  # safetensors writes for the owner alone
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
    is_zip = zipfile.is_zipfile(path)
    if path.suffix == ".pkl" and not is_zip:
        return read_pickle(path)
    if is_zip:
        _check_zip(path)
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, map_location="cpu", weights_only=True)
    _check_tensors(content, path.stat().st_size)
    return content


def _check_zip(path: Path) -> None:
    """Raises ValueError where parts are compressed or larger than the file; torch writes them as they are."""
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise ValueError("its parts are compressed")
    if sum(part.file_size for part in parts) > path.stat().st_size:
        raise ValueError("its parts are larger than the file")


def _check_tensors(content: object, most: int, depth: int = 3) -> None:
    """Raises ValueError for a tensor, `depth` dictionaries deep, that is not numbers in `most` bytes of storage."""
    for name, value in content.items() if isinstance(content, dict) and depth else ():
        _check_tensors(value, most, depth - 1)
        if isinstance(value, torch.Tensor):
            plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
            if not plain or value.is_nested or max(value.untyped_storage().nbytes(), value.nbytes) > most:
                raise ValueError(f"{name} is not a plain tensor within the size of the file")
