"""MDETR's training: a new model, and the parameter groups of the optimizer.

The published fine-tuning on gRefCOCO runs for 5 epochs with 4 sentences per device and step, clips gradients to 0.1,
decays the learning rate after 3 epochs and is measured with the running average of the weights (decay 0.9998). Source:
the original main.py and util/optim.py.
"""

from collections.abc import Callable, Iterable

import torch
from transformers import AutoTokenizer

from .configuration_mdetr import MdetrConfig
from .image_processing_mdetr import MdetrImageProcessor
from .modeling_mdetr import MdetrModel
from .new_models import refuse_unknown, word_tokenizer
from .processing_mdetr import MdetrProcessor

TOWER_RATES = {"backbone": 1e-5, "text_encoder": 1e-5}


def new_model(
    fields: dict[str, object],
    sentences: Callable[[], Iterable[str]],
    tokenizer: str | None = None,
    backbone: str | None = None,
    image_size: int = 800,
) -> tuple[MdetrModel, MdetrProcessor]:
    """A new model and its processor.

    Args:
        fields: of `MdetrConfig`.
        sentences: returns the training sentences; a tokenizer is made from them where none is named.
        tokenizer: RoBERTa folder or Hub id, for the tokenizer and the text weights.
        backbone: must be None: the published training starts from a whole MDETR.
        image_size: shorter side of the images in pixels; the longer one is at most 5/3 of it.

    Raises:
        ValueError: a field that `MdetrConfig` does not have, or a value it refuses.
    """
    if backbone:
        raise ValueError(f"backbone is {backbone!r}: MDETR starts from a whole model (--checkpoint)")
    words = AutoTokenizer.from_pretrained(tokenizer) if tokenizer else word_tokenizer(sentences())
    if not tokenizer:
        text = {"vocab_size": len(words), "pad_token_id": words.pad_token_id, "type_vocab_size": 1}
        fields = {**fields, "text_config": {**text, **fields.get("text_config", {})}}
    refuse_unknown(fields, MdetrConfig)
    model = MdetrModel(MdetrConfig(**fields))
    if tokenizer:
        model.text_encoder = type(model.text_encoder).from_pretrained(tokenizer, add_pooling_layer=False)
    size = {"shortest_edge": image_size, "longest_edge": round(image_size * 1333 / 800)}
    return model, MdetrProcessor(MdetrImageProcessor(size=size), words, num_positions=model.config.num_positions)


def parameter_groups(
    model: MdetrModel,
    learning_rate: float = 5e-5,
    weight_decay: float = 1e-4,
    tower_rates: dict[str, float] | None = None,
) -> list[dict[str, object]]:
    """The optimizer's groups: encoder, decoder and heads; the ResNet; RoBERTa, which has a schedule of its own.

    Args:
        model: parameters that require no gradient are skipped.
        learning_rate: peak rate of encoder, decoder and heads.
        weight_decay: of every parameter.
        tower_rates: peak rates of "backbone" and "text_encoder"; by default 1e-5 each.
    """
    rates = {"joint": learning_rate, **TOWER_RATES, **(tower_rates or {})}
    members: dict[str, list[torch.nn.Parameter]] = {name: [] for name in rates}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tower = name.split(".")[0]
            members[tower if tower in members else "joint"].append(parameter)
    groups = [
        {"name": name, "params": parameters, "lr": rates[name], "weight_decay": weight_decay}
        for name, parameters in members.items()
    ]
    groups[list(members).index("text_encoder")]["schedule"] = "linear_with_warmup"
    return groups
