"""Count what models of other projects save when an image is computed once: `python -m benchmarks.peers [FAMILY ...]`.

The networks have the sizes of their base checkpoints, by the defaults of transformers' configurations, and run once
for one image and one sentence. Where a network can, it runs on the meta device, which computes nothing and still
counts. A language model counts with a request and an answer of 50 tokens together. The last column is for the 13.9
sentences that gRefCOCO has of an image: all of the network for each of them, against its image part once.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from scoring.peers import FAMILIES

SENTENCES = 13.9
SWIN = {"model_type": "swin", "embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7}
SWIN |= {"image_size": 640, "out_indices": [2, 3, 4]}
SIGLIP = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "patch_size": 14}
SIGLIP |= {"num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 224, "vision_use_head": False}
GEMMA = {"model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18}
GEMMA |= {"num_attention_heads": 8, "num_key_value_heads": 1, "vocab_size": 257_216}
# family: class, fields of its configuration, image (height, width), tokens, other inputs
NETWORKS = {
    "clipseg": (
        "CLIPSegForImageSegmentation",
        {"vision_config": {"image_size": 352, "patch_size": 16}},
        (352, 352),
        10,
    ),
    "owlvit": ("OwlViTForObjectDetection", {}, (768, 768), 16),
    "owlv2": ("Owlv2ForObjectDetection", {"vision_config": {"image_size": 960, "patch_size": 16}}, (960, 960), 16),
    "grounding-dino": ("GroundingDinoForObjectDetection", {}, (800, 1066), 10),
    "omdet-turbo": (
        "OmDetTurboForObjectDetection",
        {"backbone_config": SWIN, "apply_layernorm_after_vision_backbone": False},
        (640, 640),
        77,
    ),
    "florence2": ("Florence2ForConditionalGeneration", {"image_token_id": 5}, (768, 768), 600),
    "kosmos-2": ("Kosmos2ForConditionalGeneration", {"text_config": {"layerdrop": 0.0}}, (224, 224), 114),
    "paligemma": (
        "PaliGemmaForConditionalGeneration",
        {"vision_config": SIGLIP, "text_config": GEMMA, "projection_dim": 2048, "hidden_size": 2048},
        (224, 224),
        306,
    ),
}
ON_CPU = ("grounding-dino", "omdet-turbo")  # they read values on the way


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("families", nargs="*", default=list(NETWORKS))
    print("| family | GFLOP | of which the image alone | ratio |\n|---|---|---|---|")
    for family in parser.parse_args().families:
        with torch.device("cpu" if family in ON_CPU else "meta"), torch.no_grad(), values_are_true():
            whole, image = count(family)
        ratio = SENTENCES * whole / (image + SENTENCES * (whole - image))
        print(f"| {family} | {whole / 1e9:.0f} | {image / 1e9:.0f} | {ratio:.2f} |", flush=True)


def count(family: str) -> tuple[int, int]:
    """Floating-point operations of the whole network and of its image part."""
    name, fields, size, tokens = NETWORKS[family]
    cls: type[PreTrainedModel] = getattr(transformers, name)
    model = cls(cls.config_class(**fields)).eval().requires_grad_(False)
    text = {"input_ids": torch.zeros(1, tokens, dtype=torch.long)}
    text["attention_mask"] = torch.ones_like(text["input_ids"])
    if family == "omdet-turbo":
        text = {f"{part}_{key}": value for part in ("classes", "tasks") for key, value in text.items()}
        text["classes_structure"] = torch.ones(1, dtype=torch.long)
    extra = {
        "florence2": {"decoder_input_ids": torch.zeros(1, 50, dtype=torch.long)},
        "kosmos-2": {"image_embeds_position_mask": torch.zeros(1, tokens, dtype=torch.bool)},
        "paligemma": {"token_type_ids": torch.zeros(1, tokens, dtype=torch.long)},
    }
    vision = "vision_model" if family == "kosmos-2" else FAMILIES[family].vision
    with FlopCounterMode(display=False) as counter:
        model(pixel_values=torch.zeros(1, 3, *size), **text, **extra.get(family, {}))
    (image,) = (counts for name, counts in counter.get_flop_counts().items() if name == f"{cls.__name__}.{vision}")
    return counter.get_total_flops(), sum(image.values())


@contextmanager
def values_are_true() -> Iterator[None]:
    """Let tensors on the meta device, which have no values, pass the checks of the models on their inputs."""
    item = torch.Tensor.item
    torch.Tensor.item = lambda tensor: True if tensor.is_meta else item(tensor)
    truth = torch.Tensor.__bool__
    torch.Tensor.__bool__ = lambda tensor: True if tensor.is_meta else truth(tensor)
    try:
        yield
    finally:
        torch.Tensor.item, torch.Tensor.__bool__ = item, truth


if __name__ == "__main__":
    main()
