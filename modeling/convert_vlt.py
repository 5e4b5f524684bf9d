"""Convert a Keras checkpoint of VLT to a folder that transformers loads.

    python -m modeling.convert_vlt best_map.h5 OUT --word-vectors glove.840B.300d.txt

Needs h5py (`pip install grefcoco[vlt]`). Layers are read by name; nothing in the file is executed.
"""

import argparse
import itertools
import sys
from collections.abc import Mapping
from math import isqrt, prod
from pathlib import Path

import numpy as np
import torch
from torch import nn

try:
    import h5py
except ModuleNotFoundError:  # an extra, which `read_h5` alone needs
    h5py = None

from .configuration_vlt import VltConfig
from .modeling_vlt import BatchNorm, VltModel
from .processing_vlt import new_processor
from .tokenization_vlt import VltTokenizer
from .weight_files import count_indices, run_conversion, write_folder

MATRIX = {"kernel": "weight", "bias": "bias"}
NORM = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
LAYER_NORM = {"gamma": "weight", "beta": "bias"}
GRU = {"kernel": "input.weight", "recurrent_kernel": "recurrent.weight", "bias": "input.bias"}
FEED_FORWARD = {"W1": "fc1.weight", "b1": "fc1.bias", "W2": "fc2.weight", "b2": "fc2.bias"}
ATTENTION = {
    f"{kind}{letter}": f"{name}_proj.{leaf}"
    for letter, name in {"q": "q", "k": "k", "v": "v", "o": "out"}.items()
    for kind, leaf in {"W": "weight", "b": "bias"}.items()
}
SUBLAYERS = (
    ("MultiHeadSelfAttention", ".self_attention", ATTENTION),
    ("MultiHeadSelfAttention-Norm", ".self_norm", LAYER_NORM),
    ("MultiHeadQueryAttention", ".cross_attention", ATTENTION),
    ("MultiHeadQueryAttention-Norm", ".cross_norm", LAYER_NORM),
    ("FeedForward", "", FEED_FORWARD),
    ("FeedForward-Norm", ".ffn_norm", LAYER_NORM),
)
DENSE = (  # dense_1 to dense_12
    "text_encoder.gate", "fusion.text", "query_projection", "word_projection", "query_attention.query",
    "query_attention.key", "query_attention.value", "balance.query", "balance.response", "balance.both",
    "balance.score", "pixel_projection",
)  # fmt: skip


def read_h5(path: Path | str) -> dict[str, np.ndarray]:
    """Read the weights of a Keras h5: "layer/weight" -> array, such as "conv2d_1/kernel".

    Raises:
        ValueError: when the file is missing, damaged, no file of weights, or declares more values than it has bytes;
            without h5py.
    """
    if h5py is None:
        raise ValueError("a Keras h5 is read with h5py, which is not installed: pip install h5py")
    path, weights, free = Path(path), {}, 0
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a Keras .h5 file")
    try:
        with h5py.File(path, "r") as file:
            free = path.stat().st_size
            root = _member(file, "model_weights") if "model_weights" in file else file  # of a whole model
            for layer in _names(root, "layer_names", free):
                for name in _names(_member(root, layer), "weight_names", free):
                    data = _member(root, f"{layer}/{name}")
                    free -= data.nbytes
                    if free < 0 or data.external or data.is_virtual or data.dtype.kind != "f":
                        raise ValueError(f"{name}: {data.shape} values of {data.dtype} are not in the file")
                    weights[f"{layer}/{_weight_name(layer, name)}"] = data[()].astype(np.float32)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read as weights of Keras ({reason})") from error
    return weights


def convert_state_dict(weights: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The state dict of `VltModel`.

    Args:
        weights: as `read_h5` gives them.

    Raises:
        ValueError: for a weight that is missing, unknown or of another shape.
    """
    with torch.device("meta"):
        model = VltModel(infer_config(weights, num_attention_heads=1))
    shapes, names = {name: value.shape for name, value in model.state_dict().items()}, parameter_names(model)
    for wrong, reason in ((set(weights) - set(names), "unknown"), (set(names) - set(weights), "missing")):
        if wrong:
            raise ValueError(f"{len(wrong)} weights are {reason}, {min(wrong)!r} first: not a whole VLT")
    converted = {ours: as_torch(weights[theirs]) for theirs, ours in names.items()}
    for theirs, ours in names.items():
        if converted[ours].shape != shapes[ours]:
            raise ValueError(f"{theirs!r} has shape {weights[theirs].shape}, which does not fit the other weights")
    return converted


def infer_config(weights: Mapping[str, np.ndarray], num_attention_heads: int = 8, max_words: int = 15) -> VltConfig:
    """The configuration of a checkpoint, from names and shapes.

    Args:
        weights: as `read_h5` gives them.
        num_attention_heads: no shape depends on it.
        max_words: of a sentence; no shape depends on it.

    Raises:
        ValueError: when the weights are not those of a VLT.
    """
    try:
        pixels, hidden_size = weights["dense_3/kernel"].shape
        word_size, text_size = weights["bidirectional_1/forward/kernel"].shape[0], weights["dense_1/bias"].shape[0]
        stem, queries = (weights[f"{name}/kernel"].shape[-1] for name in ("conv2d_1", "conv2d_73"))
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"no usable {error} among the weights: not the weights of a whole VLT") from error
    layers = {kind: count_indices(weights, rf"{kind}-(\d+)-FeedForward/") for kind in ("Encoder", "Decoder")}
    return VltConfig(
        image_size=16 * isqrt(pixels),
        word_size=word_size,
        max_words=max_words,
        stem_channels=stem,
        text_size=text_size,
        hidden_size=hidden_size,
        num_queries=queries,
        num_attention_heads=num_attention_heads,
        encoder_layers=layers["Encoder"],
        decoder_layers=layers["Decoder"],
    )


def parameter_names(model: VltModel) -> dict[str, str]:
    """Names of all weights, theirs -> ours. Keras numbers layers as they are created, and so are our modules."""
    convolutions, norms, layers = itertools.count(1), itertools.count(1), []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            layers.append((f"conv2d_{next(convolutions)}", name, MATRIX))
        elif isinstance(module, BatchNorm):
            layers.append((f"batch_normalization_{next(norms)}", name, NORM))
    layers += [(f"dense_{i}", name, MATRIX) for i, name in enumerate(DENSE, 1)]
    layers += [(f"bidirectional_1/{way}", f"text_encoder.{way}_gru", GRU) for way in ("forward", "backward")]
    layers.append(("multi_head_attention_1", "query_attention.attention", ATTENTION))
    for kind, stack in (("Encoder", model.encoder), ("Decoder", model.decoder)):
        for i in range(len(stack)):
            layers += [
                (f"{kind}-{i + 1}-{theirs}", f"{kind.lower()}.{i}{ours}", leaves) for theirs, ours, leaves in SUBLAYERS
            ]
    names = {f"{theirs}/{w}": f"{ours}.{leaf}" for theirs, ours, leaves in layers for w, leaf in leaves.items()}
    state_dict = model.state_dict()
    return {theirs: ours for theirs, ours in names.items() if ours in state_dict}


def as_torch(weight: np.ndarray) -> torch.Tensor:
    """Kernels (height, width, in, out) and matrices (in, out) to torch's order; vectors stay."""
    order = (3, 2, 0, 1) if weight.ndim == 4 else range(weight.ndim)[::-1]
    return torch.from_numpy(np.ascontiguousarray(weight.transpose(order)))


def _names(group: object, attribute: str, limit: int) -> list[str]:
    """A list of names among a group's attributes, of at most `limit` bytes."""
    stored = group.attrs.get_id(attribute)
    if prod(stored.shape) * stored.dtype.itemsize > limit:
        raise ValueError(f"the attribute {attribute!r} is larger than the file")
    return [name.decode() if isinstance(name, bytes) else str(name) for name in group.attrs[attribute]]


def _member(group: object, path: str) -> object:
    """What is in a group under a path, without following links to other places or files."""
    for name in path.split("/"):
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise ValueError(f"{path!r} is missing or a link")
        group = group[name]
    return group


def _weight_name(layer: str, name: str) -> str:
    """ "conv2d_1/kernel:0" -> "kernel"; in a bidirectional layer the direction comes first: "forward/kernel"."""
    *scopes, leaf = name.removesuffix(":0").split("/")
    direction = [scope.split("_")[0] for scope in scopes if scope.startswith(("forward_", "backward_"))]
    return "/".join([*direction, leaf.removeprefix(f"{layer}_")])


CARD = """---
library_name: transformers
pipeline_tag: image-segmentation
tags: [referring-image-segmentation, RefCOCO]
---

# VLT, converted from {source}

Segments what a sentence refers to in an image. Network and weights: "Vision-Language Transformer and Query Generation
for Referring Segmentation" (ICCV 2021). It always answers with a mask: it cannot say that nothing is meant
(`no_target_score` is 0 everywhere), and it has no boxes.

```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
outputs = model(**processor(images=[image], text=["the red shape on the left"]))
processor.post_process_referring_segmentation(outputs, target_sizes=[(image.height, image.width)])
```
"""


def convert(
    checkpoint: Path, folder: Path, word_vectors: Path | None, num_attention_heads: int, max_words: int
) -> VltModel:
    """Write `folder` with model, processor, their code and a card; nothing is written unless all weights convert.

    Raises:
        ValueError: for a file that cannot be read or is no VLT checkpoint, or a folder that is not empty.
    """
    weights = read_h5(checkpoint)
    model = VltModel(infer_config(weights, num_attention_heads, max_words))
    processor = new_processor(model.config, VltTokenizer(word_vectors))
    write_folder(folder, model, convert_state_dict(weights), processor, CARD.format(source=checkpoint.name))
    return model


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="modeling.convert_vlt", description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoint", type=Path, help="the original's .h5")
    parser.add_argument("folder", type=Path, help="where to write the converted model")
    parser.add_argument(
        "--word-vectors", type=Path, help="GloVe text or safetensors; without it the saved processor cannot read text"
    )
    parser.add_argument("--num-attention-heads", type=int, default=8, help="heads of every attention")
    parser.add_argument("--max-words", type=int, default=15, help="words of a sentence; 20 for RefCOCOg's model")
    return run_conversion(parser, convert, arguments)


if __name__ == "__main__":
    sys.exit(main())
