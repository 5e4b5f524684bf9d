"""ReLA's training: a new model, and the parameter groups of the optimizer.

Published: AdamW at 1e-5 with decay 0.05, norms and embeddings without decay (the original train_net.py).
"""

from collections.abc import Callable, Iterable

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from .configuration_rela import RelaConfig
from .image_processing_rela import RelaImageProcessor
from .modeling_rela import RelaModel
from .new_models import refuse_unknown, word_tokenizer
from .pretrained_rela import load_backbone, load_text_encoder
from .processing_rela import RelaProcessor
from .towers_rela import FIXED_SIZE

STOCK_BACKBONE = "vision_encoder.trunk.backbone"


def new_model(
    fields: dict[str, object],
    sentences: Callable[[], Iterable[str]],
    tokenizer: str | None = None,
    backbone: str | None = None,
    image_size: int = 480,
) -> tuple[RelaModel, RelaProcessor]:
    """A new model and its processor.

    Args:
        fields: of `RelaConfig`. Their `text_config` and `backbone_config` change single fields of the named towers.
        sentences: returns the training sentences; a tokenizer is made from them where none is named.
        tokenizer: folder or Hub id of a text encoder, for the tokenizer and the text weights.
        backbone: file, folder or Hub id with pretrained weights of the vision trunk; for an "auto" trunk also its
            configuration and the mean and deviation of its pixels.
        image_size: side in pixels of the square that images are squashed to.

    Raises:
        ValueError: a field that `RelaConfig` does not have, or a value it refuses.
    """
    refuse_unknown(fields, RelaConfig)
    words = AutoTokenizer.from_pretrained(tokenizer) if tokenizer else word_tokenizer(sentences())
    text = {**(_fields_of(tokenizer) if tokenizer else {}), **(fields.get("text_config") or {})}
    own_words = {} if tokenizer else {"vocab_size": len(words), "pad_token_id": words.pad_token_id}
    fields = {**fields, "text_config": {**text, **own_words}}
    pixels = {}
    if backbone and fields.get("backbone") == "auto":
        fields["backbone_config"] = {**_fields_of(backbone), **(fields.get("backbone_config") or {})}
        pixels = _pixel_statistics(backbone)
    if (fields.get("backbone_config") or {}).get("model_type") in FIXED_SIZE:
        fields["backbone_config"]["image_size"] = [-(-image_size // 32) * 32] * 2
    model = RelaModel(RelaConfig(**fields))
    if tokenizer:
        load_text_encoder(model, tokenizer)
    if backbone:
        load_backbone(model, backbone)
    image_processor = RelaImageProcessor(size={"height": image_size, "width": image_size}, **pixels)
    return model, RelaProcessor(image_processor, words, **_sentence_rules(words, model.config))


def _fields_of(source: str) -> dict[str, object]:
    """The fields of the configuration of a tower; of a model of images and text, those of its text encoder."""
    return AutoConfig.from_pretrained(source).get_text_config().to_dict()


def _pixel_statistics(source: str) -> dict[str, object]:
    """How a vision tower's own processor scales pixels; nothing where it has no processor."""
    try:
        settings, _ = RelaImageProcessor.get_image_processor_dict(source)
    except OSError:
        return {}
    names = ("image_mean", "image_std", "rescale_factor", "do_rescale", "do_normalize")
    return {name: settings[name] for name in names if settings.get(name) is not None}


def _sentence_rules(tokenizer: PreTrainedTokenizerBase, config: RelaConfig) -> dict[str, object]:
    """Settings of the processor: BERT's are the published ones, other encoders keep the end of a long sentence."""
    rules = {} if config.text_config.model_type == "bert" else {"keep_end_token": True}
    if "attention_mask" not in tokenizer.model_input_names:  # padding is read, so its length is that of pretraining
        rules["max_length"] = min(tokenizer.model_max_length, config.text_config.max_position_embeddings)
    return rules


def parameter_groups(
    model: torch.nn.Module, learning_rate: float, weight_decay: float, tower_rates: dict[str, float] | None = None
) -> list[dict[str, object]]:
    """As the original train_net.py: norms, embeddings and position tables without decay; BERT's norms with it, and the
    level embedding of the pixel decoder, which is a plain parameter there.

    Args:
        model: parameters that require no gradient are skipped. Of an "auto" trunk, no vector is decayed.
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
                undecayed |= path.startswith(STOCK_BACKBONE) and parameter.ndim < 2
                tower = max((prefix for prefix in rates if f"{path}.{name}".startswith(prefix)), key=len)
                members.setdefault((tower, undecayed), []).append(parameter)
    return [
        {"params": parameters, "lr": rates[tower], "weight_decay": 0.0 if undecayed else weight_decay}
        for (tower, undecayed), parameters in sorted(members.items(), key=lambda item: item[0])
    ]
