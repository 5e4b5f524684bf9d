"""The model families that train.py makes and measures. A new family is an entry here and its files in modeling/."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType

from transformers import AutoModel, AutoProcessor, PreTrainedConfig, PreTrainedModel, ProcessorMixin

import modeling  # noqa: F401 (registers the families with the auto classes)
from modeling import training_mdetr, training_rela, training_vlt
from training.config import TrainConfig


@dataclass(frozen=True)
class Family:
    """What is not in the model's own classes.

    Attributes:
        name: in model cards.
        task: the Hub's name of what the model does, its `pipeline_tag`.
        training: module with `new_model(fields, sentences, tokenizer, backbone, image_size)` and
            `parameter_groups(model, learning_rate, weight_decay, tower_rates)`.
    """

    name: str
    task: str
    training: ModuleType


FAMILIES = {  # by model_type
    "rela": Family("ReLA", "image-segmentation", training_rela),
    "mdetr": Family("MDETR", "object-detection", training_mdetr),
    "vlt": Family("VLT", "image-segmentation", training_vlt),
}


def load_checkpoint(checkpoint: str, trust_remote_code: bool = False) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Model and processor of a folder or a Hub id, by the classes of this project.

    Args:
        trust_remote_code: run the checkpoint's own Python files for what this project has no class, as a tokenizer.

    Raises:
        ValueError: a model of another project, or one whose weights are not whole.
    """
    if (model_type := model_type_of(checkpoint)) not in FAMILIES:
        raise ValueError(
            f"{checkpoint} is a {model_type} model, not one of {', '.join(FAMILIES)}: "
            "measure it with `python -m scoring predict` and `python -m scoring score`"
        )
    model, loaded = AutoModel.from_pretrained(
        checkpoint, trust_remote_code=trust_remote_code, output_loading_info=True
    )
    if missing := sorted(loaded["missing_keys"]):  # from_pretrained makes up random ones
        raise ValueError(f"{checkpoint} lacks {len(missing)} weights, {missing[0]} first: it is damaged or older")
    return model, AutoProcessor.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)


def model_type_of(checkpoint: str) -> str:
    """The `model_type` in the config.json of a folder or a Hub id; runs no code of it."""
    return PreTrainedConfig.get_config_dict(checkpoint)[0].get("model_type", "unknown")


def new_model(
    config: TrainConfig, sentences: Callable[[], Iterable[str]], categories: Iterable[int]
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Model and processor to train from the start, from the recipe's `model` fields.

    Args:
        sentences: gives the sentences of the training split, from which a tokenizer may be made.
        categories: category ids to supervise; none where the recipe does not ask for it.

    Raises:
        ValueError: a family, a field or a value that does not exist.
    """
    fields = dict(config.model)
    model_type = fields.pop("model_type", "rela")
    if model_type not in FAMILIES:
        raise ValueError(f"model: model_type is {model_type!r}; choose one of {', '.join(FAMILIES)}")
    if categories := list(categories):
        fields = {"num_categories": len(categories), **fields}
    family = FAMILIES[model_type].training
    return family.new_model(fields, sentences, config.tokenizer, config.backbone, config.image_size)
