"""Backbones and text encoders of transformers, small enough to build inside a test."""

from modeling.configuration_rela import RelaConfig
from tests.tiny_rela import SMALL, WORDS

STAGES = {"depths": [1, 1, 1, 1]}
PLAIN = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BACKBONES = {
    "swin": {"embed_dim": 8, "num_heads": [1, 2, 2, 2], "window_size": 4, **STAGES},
    "swinv2": {"embed_dim": 8, "num_heads": [1, 2, 2, 2], "window_size": 4, **STAGES},
    "convnext": {"hidden_sizes": [8, 12, 16, 24], **STAGES},
    "convnextv2": {"hidden_sizes": [8, 12, 16, 24], **STAGES},
    "hiera": {"embed_dim": 8, "num_heads": [1, 1, 1, 1], "image_size": [128, 128], **STAGES},
    "pvt_v2": {"hidden_sizes": [8, 12, 16, 24], "num_attention_heads": [1, 1, 2, 2], **STAGES},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 12, 16, 24], **STAGES},
    "dinov2": {"mlp_ratio": 2, "patch_size": 14, "image_size": 56, **PLAIN},
    "dinov3_vit": {"intermediate_size": 32, **PLAIN},
}
VISION = {"intermediate_size": 32, "image_size": 32, "patch_size": 16, **PLAIN}  # of CLIP and SigLIP
WORD_IDS = {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
TEXT = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32, **WORD_IDS}
ENCODERS = {
    "bert": TEXT,
    "roberta": {"max_position_embeddings": 34, **TEXT},
    "distilbert": {
        "n_layers": 1,
        "n_heads": 2,
        "dim": 16,
        "hidden_dim": 32,
        "max_position_embeddings": 32,
        **WORD_IDS,
    },
    "modernbert": {"cls_token_id": 2, "sep_token_id": 3, **TEXT},
    "clip_text_model": {"max_position_embeddings": 32, **TEXT},
    "siglip_text_model": {"max_position_embeddings": 20, "projection_size": 16, **TEXT},
}


def towers(backbone: str | None = None, encoder: str | None = None, **changes: object) -> RelaConfig:
    """The small ReLA with one or both towers of transformers."""
    fields = {**SMALL, **changes}
    if backbone is not None:
        fields |= {"backbone": "auto", "backbone_config": {"model_type": backbone, **BACKBONES[backbone]}}
    if encoder is not None:
        fields["text_config"] = {"model_type": encoder, **ENCODERS[encoder]}
    return RelaConfig(**fields)
