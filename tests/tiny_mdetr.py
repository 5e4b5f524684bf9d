"""An MDETR small enough to train inside a test, its processor, and a few painted scenes."""

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from modeling.configuration_mdetr import MdetrConfig
from modeling.image_processing_mdetr import MdetrImageProcessor
from modeling.processing_mdetr import MdetrProcessor
from tests.tiny_rela import COLOURS

WORDS = [
    "<s>",
    "<pad>",
    "</s>",
    "<unk>",
    "the",
    "red",
    "blue",
    "green",
    "square",
    "squares",
    "all",
    "on",
    "left",
    "and",
]

SMALL = {
    "stem_channels": 8,
    "bottleneck_channels": [8, 8, 12, 16],
    "stage_channels": [32, 32, 48, 64],
    "depths": [1, 1, 2, 1],
    "hidden_size": 32,
    "num_attention_heads": 4,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "ffn_size": 64,
    "num_queries": 6,
    "contrastive_size": 16,
    "dropout": 0.0,
    "text_dropout": 0.0,
    "text_config": {
        "vocab_size": len(WORDS),
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 40,
        "type_vocab_size": 1,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
}


def tiny_config(**changes: object) -> MdetrConfig:
    return MdetrConfig(**{**SMALL, **changes})


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """One token per word, framed as RoBERTa frames sentences; the first four words are its special tokens."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def tiny_processor(size: dict[str, int] | None = None, words: list[str] = WORDS, **changes: object) -> MdetrProcessor:
    size = size or {"shortest_edge": 96, "longest_edge": 160}
    return MdetrProcessor(MdetrImageProcessor(size=size), word_tokenizer(words), **changes)


def expression_rows() -> list[dict]:
    """Two images of different shapes, two sentences each, of one target, none, two, one; rows as of `grefcoco`."""
    scenes = {0: (64, 64, [("red", (4, 8)), ("blue", (36, 30))]), 1: (96, 64, [("red", (6, 34)), ("red", (60, 4))])}
    sentences = [(0, "the blue square", [1]), (0, "the green square", []), (1, "all red squares", [0, 1])]
    sentences.append((1, "the square on the left", [0]))
    return [expression_row(image_id, *scenes[image_id], text, targets) for image_id, text, targets in sentences]


def expression_row(
    image_id: int,
    width: int,
    height: int,
    squares: list[tuple[str, tuple[int, int]]],
    text: str,
    targets: list[int],
) -> dict:
    pixels = np.full((height, width, 3), 120, dtype=np.uint8)
    for colour, (x, y) in squares:
        pixels[y : y + 24, x : x + 24] = COLOURS[colour]
    return {
        "image": Image.fromarray(pixels),
        "image_id": image_id,
        "width": width,
        "height": height,
        "sentence": text,
        "no_target": not targets,
        "ann_ids": targets,
        "boxes": [[*squares[i][1], 24, 24] for i in targets],
    }
