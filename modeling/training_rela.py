"""ReLA's training: a new model, and the parameter groups of the optimizer.

Published: AdamW at 1e-5 with decay 0.05, norms and embeddings without decay (the original train_net.py).
"""

from collections.abc import Callable, Iterable

import torch
from transformers import AutoTokenizer

from .configuration_rela import RelaConfig
from .image_processing_rela import RelaImageProcessor
from .modeling_rela import RelaModel
from .new_models import refuse_unknown, word_tokenizer
from .pretrained_rela import load_backbone, load_text_encoder
from .processing_rela import RelaProcessor


def new_model(
    fields: dict[str, object],
    sentences: Callable[[], Iterable[str]],
    tokenizer: str | None = None,
    backbone: str | None = None,
    image_size: int = 480,
) -> tuple[RelaModel, RelaProcessor]:
    """A new model and its processor.

    Args:
        fields: of `RelaConfig`.
        sentences: returns the training sentences; a tokenizer is made from them where none is named.
        tokenizer: BERT folder or Hub id, for the tokenizer and the text weights.
        backbone: file, folder or Hub id with pretrained weights of the vision trunk.
        image_size: side in pixels of the square that images are squashed to.

    Raises:
        ValueError: a field that `RelaConfig` does not have, or a value it refuses.
    """
    words = AutoTokenizer.from_pretrained(tokenizer) if tokenizer else word_tokenizer(sentences())
    if not tokenizer:
        fields = {**fields, "text_config": {**fields.get("text_config", {}), "vocab_size": len(words)}}
    refuse_unknown(fields, RelaConfig)
    model = RelaModel(RelaConfig(**fields))
    if tokenizer:
        load_text_encoder(model, tokenizer)
    if backbone:
        load_backbone(model, backbone)
    image_processor = RelaImageProcessor(size={"height": image_size, "width": image_size})
    return model, RelaProcessor(image_processor, words)


def parameter_groups(
    model: torch.nn.Module, learning_rate: float, weight_decay: float, tower_rates: dict[str, float] | None = None
) -> list[dict[str, object]]:
    """As the original train_net.py: norms, embeddings and position tables without decay; BERT's norms with it, and the
    level embedding of the pixel decoder, which is a plain parameter there.

    Args:
        model: parameters that require no gradient are skipped.
        learning_rate: peak of every group's rate, its "lr".
        weight_decay: of all other parameters.
        tower_rates: other peaks for parameters whose names begin so; each makes groups of its own.
    """
    rates = {"": learning_rate, **(tower_rates or {})}
    members: dict[tuple[str, bool], list[torch.nn.Parameter]] = {}
    for path, module in model.named_modules():
        norm = isinstance(module, torch.nn.LayerNorm | torch.nn.GroupNorm) and not path.startswith("text_encoder")
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                embedding = isinstance(module, torch.nn.Embedding) and path != "pixel_decoder.level_embed"
                undecayed = norm or embedding or name == "relative_position_bias_table"
                tower = max((prefix for prefix in rates if f"{path}.{name}".startswith(prefix)), key=len)
                members.setdefault((tower, undecayed), []).append(parameter)
    return [
        {"params": parameters, "lr": rates[tower], "weight_decay": 0.0 if undecayed else weight_decay}
        for (tower, undecayed), parameters in sorted(members.items(), key=lambda item: item[0])
    ]
