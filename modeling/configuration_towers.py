"""Configurations of the towers that transformers brings: any AutoBackbone, any text encoder of AutoModel."""

import copy

from transformers import CONFIG_MAPPING, MODEL_FOR_BACKBONE_MAPPING, PreTrainedConfig

MOST_MAPS = 4  # the maps of a backbone that are used


def text_config(given: dict | PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of a text encoder, or of the text part of a model such as CLIP; BERT's without `model_type`.

    Raises:
        ValueError: for an unknown `model_type`, a model without text encoder, or one that also has a decoder.
    """
    config = _config("text_config", given, "bert").get_text_config()
    if config.is_encoder_decoder:
        raise ValueError(
            f'text_config of model_type "{config.model_type}" has an encoder and a decoder: name an encoder, such as '
            "bert, roberta, modernbert or siglip_text_model"
        )
    if not isinstance(getattr(config, "vocab_size", None), int):
        raise ValueError(
            f'text_config of model_type "{config.model_type}" reads no text: name an encoder, such as bert, roberta, '
            "modernbert or siglip_text_model"
        )
    return config


def backbone_config(given: dict | PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of an AutoBackbone, whose `out_features` are the maps to use.

    A backbone of several resolutions whose `out_features` are the last map alone, which is the default of transformers
    and of published files, gives its last four maps instead. A plain ViT gives its last one, as in ViTDet.

    Raises:
        ValueError: for an unknown `model_type`, a model without feature maps, or more than four `out_features`.
    """
    config = copy.deepcopy(_config("backbone_config", given, None))
    if type(config) not in MODEL_FOR_BACKBONE_MAPPING or not getattr(config, "stage_names", None):
        raise ValueError(
            f'backbone_config of model_type "{config.model_type}" has no feature maps (it is no AutoBackbone of '
            "transformers): name one that has, such as swin, convnextv2, dinov2 or dinov3_vit"
        )
    maps = [name for name in config.stage_names if name != "stem"]
    if config.out_features == maps[-1:] and hasattr(config, "depths"):
        config.out_features = maps[-MOST_MAPS:]
    if len(config.out_features) > MOST_MAPS:
        raise ValueError(f"backbone_config: out_features={config.out_features}: choose {MOST_MAPS} or fewer")
    return config


def _config(name: str, given: dict | PreTrainedConfig, default: str | None) -> PreTrainedConfig:
    """The configuration of `model_type` with the given fields; runs no code but that of transformers."""
    if isinstance(given, PreTrainedConfig):
        return given
    model_type = str(given.get("model_type", default))
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f'{name}: model_type is "{model_type}", which transformers does not have: check its name')
    try:
        return CONFIG_MAPPING[model_type](**given)
    except Exception as error:  # every configuration has its own
        reason = " ".join(str(error).split())
        raise ValueError(f'{name} of model_type "{model_type}" is damaged: {reason}') from error
