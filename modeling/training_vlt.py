"""VLT's training: a new model, and the parameter groups of the optimizer.

Published: Adam at 1e-3 with epsilon 1e-7 and without decay besides the loss's l2, 50 epochs of one random sentence a
reference, batches of 128, rates x 0.1 after epochs 39, 44 and 49; DarkNet starts from YOLOv3's weights and all but its
last two convolutions are frozen. Keras 2.3 corrects Adam's bias for one step more than was taken, so that its first
step is 0.744 of the learning rate; torch's AdamW, used here, does not.
"""

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from .configuration_vlt import VltConfig
from .convert_vlt import as_torch, parameter_names, read_h5
from .modeling_vlt import VltModel
from .new_models import refuse_unknown
from .processing_vlt import VltProcessor, new_processor
from .tokenization_vlt import TABLE, VltTokenizer, write_table

KERAS_EPSILON = 1e-7


def new_model(
    fields: dict[str, object],
    sentences: Callable[[], Iterable[str]],
    tokenizer: str | None = None,
    backbone: str | None = None,
    image_size: int = 416,
) -> tuple[VltModel, VltProcessor]:
    """A new model and its processor.

    Args:
        fields: of `VltConfig`.
        sentences: returns the training sentences; without `tokenizer` their words get random vectors.
        tokenizer: file of word vectors, GloVe text or safetensors; it decides `word_size`.
        backbone: Keras h5 of YOLOv3, from which DarkNet's layers are read by name.
        image_size: side in pixels of the letterboxed images.

    Raises:
        ValueError: a field that `VltConfig` does not have, a value it refuses, or a file that does not fit.
    """
    fields = {"image_size": image_size, **fields}
    refuse_unknown(fields, VltConfig)
    words = VltTokenizer(tokenizer) if tokenizer else random_words(sentences(), VltConfig(**fields).word_size)
    model = VltModel(VltConfig(**{**fields, "word_size": words.vectors.shape[1]}))
    if backbone:
        load_backbone(model, backbone)
    return model, new_processor(model.config, words)


def random_words(sentences: Iterable[str], size: int) -> VltTokenizer:
    """A table with a random vector for each part of a word in the sentences; equal sentences give equal tables."""
    split = VltTokenizer()
    words = sorted({part for sentence in sentences for part in split.tokenize(sentence)})
    vectors = np.random.default_rng(0).standard_normal((len(words), size), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        write_table(Path(folder, TABLE), words, vectors / np.sqrt(size))
        return VltTokenizer(Path(folder, TABLE))


def load_backbone(model: VltModel, path: str) -> None:
    """Read DarkNet and its neck from a Keras h5, by layer name.

    Raises:
        ValueError: when the file cannot be read, or a layer is missing or of another shape.
    """
    weights, state_dict = read_h5(path), model.state_dict()
    for theirs, ours in parameter_names(model).items():
        if ours.startswith("backbone."):
            value = as_torch(weights[theirs]) if theirs in weights else torch.empty(0)
            if value.shape != state_dict[ours].shape:
                raise ValueError(f"{path}: {theirs!r} is missing or does not fit: give a Keras h5 of YOLOv3")
            state_dict[ours].copy_(value)


def parameter_groups(
    model: torch.nn.Module,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    tower_rates: dict[str, float] | None = None,
) -> list[dict[str, object]]:
    """The optimizer's groups, with the epsilon of Keras' Adam.

    Args:
        model: parameters that require no gradient are skipped.
        learning_rate: peak rate.
        weight_decay: published: 0.
        tower_rates: other peaks for parameters whose names begin so.
    """
    members: dict[float, list[torch.nn.Parameter]] = {}  # by rate
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rates = [rate for start, rate in (tower_rates or {}).items() if name.startswith(start)]
            members.setdefault(rates[0] if rates else learning_rate, []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": weight_decay, "eps": KERAS_EPSILON}
        for rate, parameters in members.items()
    ]
