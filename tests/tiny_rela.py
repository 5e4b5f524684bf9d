"""A ReLA small enough to train inside a test, its processor, and a few painted scenes."""

import numpy as np
from PIL import Image
from transformers import BertTokenizerFast

from modeling.configuration_rela import RelaConfig
from modeling.image_processing_rela import RelaImageProcessor
from modeling.processing_rela import RelaProcessor, encode_mask

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "red", "blue", "green", "square"]
WORDS += ["left", "right", "all", "squares", "and", "of", "on"]
COLOURS = {"red": (220, 40, 40), "blue": (40, 60, 220), "green": (40, 200, 60)}

SMALL = {
    "backbone": "conv",
    "stage_channels": [16, 24, 32, 48],
    "depths": [1, 1, 1, 1],
    "stem_channels": 8,
    "language_gate": "none",
    "pixel_decoder_size": 32,
    "pixel_decoder_layers": 0,
    "pixel_decoder_ffn_size": 32,
    "norm_groups": 8,
    "mask_size": 32,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_queries": 16,
    "decoder_layers": 3,
    "decoder_ffn_size": 64,
    "text_config": {
        "vocab_size": len(WORDS),
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 32,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
}
SWIN = {
    "backbone": "swin",
    "window_size": 4,
    "window_heads": [1, 2, 4, 4],
    "pixel_decoder_layers": 1,
    "drop_path_rate": 0.0,
    "language_gate": "published",
}
RESNET = {"backbone": "resnet", "bottleneck_channels": 4, "language_fusion": False, "pixel_decoder_layers": 1}
INSTANCES = {"num_instance_queries": 6, "instance_layers": 2, "count_loss_weight": 0.1}
BETTER_LOSS = {"mask_loss": "bce_dice", "soft_minimap": True, "auxiliary_loss": True, "no_target_loss_weight": 1.0}


def tiny_config(**changes: object) -> RelaConfig:
    return RelaConfig(**{**SMALL, **changes})


def tiny_processor(size: dict[str, int] | None = None, **changes: object) -> RelaProcessor:
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(WORDS)})
    return RelaProcessor(RelaImageProcessor(size=size or {"height": 64, "width": 64}), tokenizer, **changes)


def expression_rows() -> list[dict]:
    """Two images, two sentences each: one target, two targets, none, one; rows as `grefcoco.load` gives them."""
    squares = {
        0: [("red", (4, 8)), ("blue", (36, 30))],
        1: [("red", (6, 34)), ("red", (40, 4))],
    }
    sentences = [(0, "the blue square", [1]), (0, "the green square", []), (1, "all red squares", [0, 1])]
    sentences.append((1, "the square on the left", [0]))
    return [expression_row(image_id, squares[image_id], text, targets) for image_id, text, targets in sentences]


def expression_row(image_id: int, squares: list[tuple[str, tuple[int, int]]], text: str, targets: list[int]) -> dict:
    pixels = np.full((64, 64, 3), 120, dtype=np.uint8)
    masks = []
    for colour, (x, y) in squares:
        pixels[y : y + 20, x : x + 20] = COLOURS[colour]
        masks.append(np.zeros((64, 64), dtype=bool))
        masks[-1][y : y + 20, x : x + 20] = True
    objects = [
        {
            "ann_id": 100 * image_id + i,
            "category_id": 10 * i + 10,
            "bbox": [float(x), float(y), 20.0, 20.0],
            "area": 400.0,
            "iscrowd": 0,
            "segmentation": encode_mask(mask),
        }
        for i, (mask, (_, (x, y))) in enumerate(zip(masks, squares, strict=True))
    ]
    merged = np.logical_or.reduce([masks[i] for i in targets]) if targets else np.zeros((64, 64), dtype=bool)
    return {
        "image": Image.fromarray(pixels),
        "image_id": image_id,
        "width": 64,
        "height": 64,
        "sentence": text,
        "no_target": not targets,
        "ann_ids": [objects[i]["ann_id"] for i in targets],
        "boxes": [objects[i]["bbox"] for i in targets],
        "masks": [objects[i]["segmentation"] for i in targets],
        "mask": encode_mask(merged),
        "objects": objects,
    }
