"""A VLT small enough to train inside a test, its processor, and the stages of the original network."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from modeling.configuration_vlt import VltConfig
from modeling.modeling_vlt import VltModel, leaky
from modeling.processing_vlt import VltProcessor, new_processor
from modeling.tokenization_vlt import VltTokenizer
from tests.tiny_rela import WORDS

SMALL = {
    "image_size": 64,
    "word_size": 12,
    "max_words": 6,
    "stem_channels": 2,
    "text_size": 16,
    "hidden_size": 32,
    "num_queries": 4,
    "num_attention_heads": 4,
    "dropout": 0.0,
}

# Keras layer -> our module, whether its input ("in", with its position) or its output, and what is applied to that.
STAGES: dict[str, tuple[str, str | int, Callable[[torch.Tensor], torch.Tensor] | None]] = {
    "add_11": ("backbone.stages.2", "out", None),
    "add_19": ("backbone.stages.3", "out", None),
    "leaky_re_lu_58": ("backbone.neck", "out", None),
    "bidirectional_1": ("text_encoder", "out", lambda x: x[0]),
    "dense_1": ("text_encoder.gate", "out", torch.tanh),
    "lambda_1": ("text_encoder.gate", "out", lambda x: x.tanh().softmax(1)),
    "lambda_2": ("text_encoder", "out", lambda x: x[1]),
    "leaky_re_lu_61": ("fusion.text_norm", "out", leaky),
    "leaky_re_lu_62": ("fusion", "out", None),
    "leaky_re_lu_64": ("pyramid.middle_mix", "out", None),
    "leaky_re_lu_66": ("pyramid.fine_mix", "out", None),
    "leaky_re_lu_69": ("pyramid.coarse", "out", None),
    "leaky_re_lu_71": ("pyramid.project", "out", None),
    "lambda_4": ("query_net.layers", 0, None),
    "leaky_re_lu_74": ("query_net.layers", "out", None),
    "conv2d_73": ("query_net", "out", None),
    "dense_3": ("query_attention", 0, None),
    "dense_4": ("query_attention", 1, None),
    "multi_head_attention_1": ("query_attention.attention", "out", None),
    "Fusion-Add": ("query_attention", "out", None),
    "Encoder-Embedding": ("encoder.0", 0, None),
    "Encoder-1-MultiHeadSelfAttention": ("encoder.0.self_attention", "out", None),
    "Encoder-1-MultiHeadSelfAttention-Norm": ("encoder.0.self_norm", "out", None),
    "Encoder-1-FeedForward-Norm": ("encoder.0", "out", None),
    "Encoder-2-FeedForward-Norm": ("encoder.1", "out", None),
    "Decoder-Embedding": ("decoder.0", 0, None),
    "Decoder-1-MultiHeadSelfAttention": ("decoder.0.self_attention", "out", None),
    "Decoder-1-MultiHeadSelfAttention-Norm": ("decoder.0.self_norm", "out", None),
    "Decoder-1-MultiHeadQueryAttention": ("decoder.0.cross_attention", "out", None),
    "Decoder-2-FeedForward-Norm": ("decoder.1", "out", None),
    "balance": ("balance", "out", None),
    "balanced": ("pixel_projection", 0, None),
    "spatial": ("pixel_projection", "out", torch.relu),
    "maps": ("mask_layers.0", 0, None),
    **{f"leaky_re_lu_{75 + i}": (f"mask_layers.{i}", "out", None) for i in range(6)},
    "mask_logits": ("mask_head", "out", None),
}


def tiny_config(**changes: object) -> VltConfig:
    return VltConfig(**{**SMALL, **changes})


def tiny_tokenizer(folder: Path, words: list[str] = WORDS, size: int = SMALL["word_size"]) -> VltTokenizer:
    """A table of GloVe text."""
    vectors = np.random.default_rng(3).standard_normal((len(words), size)).round(3)
    lines = (" ".join([word, *map(str, row)]) for word, row in zip(words, vectors))
    path = folder / "glove.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return VltTokenizer(path)


def tiny_processor(folder: Path, **changes: object) -> VltProcessor:
    return new_processor(tiny_config(**changes), tiny_tokenizer(folder))


@torch.no_grad()
def stages(model: VltModel, pixel_values: torch.Tensor, word_vectors: torch.Tensor) -> dict[str, np.ndarray]:
    """What each stage gives, channels last as in Keras."""
    values, handles = {}, []
    for name, (module, place, function) in STAGES.items():

        def hook(_, inputs, output, name=name, place=place, function=function) -> None:
            value = output if place == "out" else inputs[place]
            value = value if function is None else function(value)
            values[name] = (value.permute(0, 2, 3, 1) if value.ndim == 4 else value).numpy()

        handles.append(model.get_submodule(module).register_forward_hook(hook))
    model(pixel_values, word_vectors)
    for handle in handles:
        handle.remove()
    return values
