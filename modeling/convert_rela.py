"""Turns a published ReLA checkpoint into a folder that AutoModel and AutoProcessor load.

    python -m modeling.convert_rela gres_swin_base.pth OUT

The published evaluation never loaded the stored weight of the region gate (that of the region-language attention): the
original predictor's `_load_from_state_dict` does not call its parent, so the weight stayed at its initial value 0, a
gate of sigmoid(0) = 0.5. `--region-gate published`, the default, reproduces the published numbers; `stored` keeps the
value of the file.
"""

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoTokenizer, BertConfig

from .configuration_rela import RelaConfig
from .image_processing_rela import RelaImageProcessor
from .modeling_rela import RelaModel
from .processing_rela import RelaProcessor
from .weight_files import Rules, count_indices, read_weights, rename, run_conversion, split_projections, write_folder

REGION_GATE = "region_decoder.layers.0.language.region_gate"
REGION_GATES = ("published", "stored")
DROPPED = re.compile(
    r".*\.relative_position_index|pixel_(mean|std)|text_encoder\.embeddings\.position_ids|text_encoder\.pooler\..*"
    r"|criterion\..*|.*\.num_batches_tracked"
)

_PREDICTOR, _PIXELS, _TRUNK = r"sem_seg_head\.predictor\.", r"sem_seg_head\.pixel_decoder\.", "vision_encoder.trunk."
_FUSION = {
    "vis_project": "vision",
    "project_mm": "project",
    "image_lang_att.f_query": "query",
    "image_lang_att.f_key": "key",
    "image_lang_att.f_value": "value",
    "image_lang_att.W": "out",
}
_DEFORMABLE = {
    "self_attn.sampling_offsets": "attention.offsets",
    "self_attn.attention_weights": "attention.weights",
    "self_attn.value_proj": "attention.value",
    "self_attn.output_proj": "attention.out",
    "norm1": "attention_norm",
    "linear1": "fc1",
    "linear2": "fc2",
    "norm2": "ffn_norm",
}
_REGION = {
    "RIA_layers.{}.multihead_attn": "cross_attention",
    "RIA_layers.{}.norm": "cross_norm",
    "RLA_vision.{}.self_attn": "self_attention",
    "RLA_vision.{}.norm": "self_norm",
    "transformer_ffn_layers.{}.linear1": "fc1",
    "transformer_ffn_layers.{}.linear2": "fc2",
    "transformer_ffn_layers.{}.norm": "ffn_norm",
}
RULES: Rules = [
    (r"text_encoder\.embeddings\.(word|position|token_type)_embeddings", r"\g<0>"),
    (r"text_encoder\.(embeddings|encoder\.layer\.\d+\.(attention\.)?output)\.LayerNorm", r"\g<0>"),
    (r"text_encoder\.encoder\.layer\.\d+\.attention\.self\.(query|key|value)", r"\g<0>"),
    (r"text_encoder\.encoder\.layer\.\d+\.(attention\.output|intermediate|output)\.dense", r"\g<0>"),
    (r"backbone\.(patch_embed\.(proj|norm))", rf"{_TRUNK}\1"),
    (r"backbone\.(layers\.\d+\.blocks\.\d+\.(norm[12]|attn(\.qkv|\.proj)?|mlp\.fc[12]))", rf"{_TRUNK}\1"),
    (
        r"backbone\.layers\.(\d+)\.downsample\.(norm|reduction)",
        lambda m: f"{_TRUNK}layers.{int(m[1]) + 1}.downsample.{m[2]}",
    ),
    (r"backbone\.layers\.(\d+)\.fusion\.(.+)\.0", lambda m: f"vision_encoder.fusions.{m[1]}.{_FUSION[m[2]]}"),
    (r"backbone\.layers\.(\d+)\.res_gate\.0", r"vision_encoder.gates.\1.inner"),
    (r"backbone\.layers\.(\d+)\.res_gate\.2", r"vision_encoder.gates.\1.outer"),
    (r"backbone\.norm(\d)", r"vision_encoder.norms.\1"),
    (r"backbone\.stem\.conv1", rf"{_TRUNK}conv1.conv"),
    (r"backbone\.stem\.conv1\.norm", rf"{_TRUNK}conv1.norm"),
    (
        r"backbone\.res([2-5])\.(\d+)\.(shortcut|conv[123])",
        lambda m: f"{_TRUNK}layers.{int(m[1]) - 2}.{m[2]}.{m[3]}.conv",
    ),
    (
        r"backbone\.res([2-5])\.(\d+)\.(shortcut|conv[123])\.norm",
        lambda m: f"{_TRUNK}layers.{int(m[1]) - 2}.{m[2]}.{m[3]}.norm",
    ),
    (_PIXELS + r"input_proj\.(\d\.\d)", r"pixel_decoder.laterals.\1"),
    (_PIXELS + r"transformer", "pixel_decoder"),
    (
        _PIXELS + r"transformer\.encoder\.layers\.(\d+)\.(.+)",
        lambda m: f"pixel_decoder.layers.{m[1]}.{_DEFORMABLE[m[2]]}",
    ),
    (_PIXELS + r"adapter_1", "pixel_decoder.fine_lateral.0"),
    (_PIXELS + r"adapter_1\.norm", "pixel_decoder.fine_lateral.1"),
    (_PIXELS + r"layer_1", "pixel_decoder.fine_output.0"),
    (_PIXELS + r"layer_1\.norm", "pixel_decoder.fine_output.1"),
    (_PIXELS + r"mask_features", "pixel_decoder.mask_features"),
    (_PREDICTOR + r"(?:query_feat|static_query)", "region_decoder.query"),
    (_PREDICTOR + r"query_embed", "region_decoder.query_position"),
    (_PREDICTOR + r"level_embed", "region_decoder.level_embed"),
    (_PREDICTOR + r"input_proj\.(\d)", r"region_decoder.projections.\1"),
    (_PREDICTOR + r"lang_proj", "region_decoder.layers.0.language.project"),
    (_PREDICTOR + r"RLA_lang_att\.multihead_attn(\.out_proj)?", r"region_decoder.layers.0.language.attention\1"),
    (_PREDICTOR + r"RLA_lang_att\.norm", "region_decoder.layers.0.language.norm"),
    (
        _PREDICTOR + r"(\w+)\.(\d+)\.(\w+)(\.out_proj)?",
        lambda m: f"region_decoder.layers.{m[2]}.{_REGION[f'{m[1]}.{{}}.{m[3]}']}{m[4] or ''}",
    ),
    (_PREDICTOR + r"decoder_norm", "region_decoder.heads.norm"),
    (_PREDICTOR + r"minimap_embed", "region_decoder.heads.minimap"),
    (_PREDICTOR + r"nt_embed\.layers\.(\d)", lambda m: f"region_decoder.heads.no_target.{2 * int(m[1])}"),
    (_PREDICTOR + r"mask_embed\.layers\.(\d)", lambda m: f"region_decoder.heads.mask_embed.{2 * int(m[1])}"),
]


def convert_state_dict(state_dict: Mapping[str, torch.Tensor], region_gate: str = "stored") -> dict[str, torch.Tensor]:
    """Rename original parameters to those of `RelaModel`; 1 x 1 convolutions become linear, fused projections split.

    Args:
        state_dict: the original's, in its checkpoint under "model".
        region_gate: "stored" keeps the weight of the region gate, "published" sets it to 0.

    Raises:
        ValueError: for a key that is neither used nor known to be dropped (`DROPPED`); for another `region_gate`.
    """
    if region_gate not in REGION_GATES:
        raise ValueError(f"region_gate={region_gate!r}: choose one of {', '.join(REGION_GATES)}")
    converted = {}
    for name, value in state_dict.items():
        if DROPPED.fullmatch(name):
            continue
        ours, value = _rename(name), torch.as_tensor(value)
        if ours == REGION_GATE:
            value = value.reshape(1)
        elif ".fusions." in ours or ".projections." in ours:
            value = value.reshape(value.shape[:2]) if value.ndim > 2 else value
        converted.update(split_projections(ours, value))
    if region_gate == "published":
        converted[REGION_GATE] = torch.zeros(1)
    return converted


def _rename(name: str) -> str:
    if name == "sem_seg_head.predictor.lang_weight":
        return REGION_GATE
    if name == "sem_seg_head.pixel_decoder.transformer.level_embed":
        return "pixel_decoder.level_embed.weight"
    ours = rename(name, RULES)
    if ours is None:
        raise ValueError(
            f"unknown key {name!r} in the checkpoint: not a ReLA parameter. Only the original's own checkpoints are "
            "converted; backbone-only weights are loaded for training instead"
        )
    return ours


def infer_config(
    state_dict: Mapping[str, torch.Tensor], num_attention_heads: int = 8, text_num_attention_heads: int = 12
) -> RelaConfig:
    """The configuration of an original state dict, read from names and shapes.

    Args:
        state_dict: the original's, in its checkpoint under "model".
        num_attention_heads: of the pixel and region decoders; no shape depends on it.
        text_num_attention_heads: of BERT; likewise.

    Raises:
        ValueError: when the state dict is not that of a Swin or ResNet ReLA.
    """
    shapes = {name: tuple(value.shape) for name, value in state_dict.items()}
    try:
        return _infer(shapes, num_attention_heads, text_num_attention_heads)
    except KeyError as error:
        raise ValueError(f"no {error} among the keys: not a whole ReLA with a Swin or a bottleneck ResNet") from error


def _infer(
    shapes: Mapping[str, tuple[int, ...]], num_attention_heads: int, text_num_attention_heads: int
) -> RelaConfig:
    pixels, predictor = "sem_seg_head.pixel_decoder.", "sem_seg_head.predictor."
    layer = f"{pixels}transformer.encoder.layers.0."
    mask_size, pixel_decoder_size = shapes[f"{pixels}mask_features.weight"][:2]
    num_queries, hidden_size = shapes[f"{predictor}query_embed.weight"]
    return RelaConfig(
        **_infer_backbone(shapes),
        text_config=_infer_text(shapes, text_num_attention_heads),
        num_attention_heads=num_attention_heads,
        pixel_decoder_size=pixel_decoder_size,
        pixel_decoder_layers=count_indices(shapes, rf"{_PIXELS}transformer\.encoder\.layers\.(\d+)\."),
        pixel_decoder_ffn_size=shapes[f"{layer}linear1.weight"][0],
        pixel_decoder_points=shapes[f"{layer}self_attn.attention_weights.weight"][0] // (3 * num_attention_heads),
        mask_size=mask_size,
        hidden_size=hidden_size,
        num_queries=num_queries,
        decoder_layers=count_indices(shapes, rf"{_PREDICTOR}RIA_layers\.(\d+)\."),
        decoder_ffn_size=shapes[f"{predictor}transformer_ffn_layers.0.linear1.weight"][0],
    )


def _infer_backbone(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, object]:
    if "backbone.patch_embed.proj.weight" in shapes:
        tables = [shapes[f"backbone.layers.{i}.blocks.0.attn.relative_position_bias_table"] for i in range(4)]
        channels = [shapes[f"backbone.norm{i}.weight"][0] for i in range(4)]
        return {
            "backbone": "swin",
            "stage_channels": channels,
            "depths": [count_indices(shapes, rf"backbone\.layers\.{i}\.blocks\.(\d+)\.") for i in range(4)],
            "window_heads": [table[1] for table in tables],
            "window_size": (round(tables[0][0] ** 0.5) + 1) // 2,
            "mlp_ratio": shapes["backbone.layers.0.blocks.0.mlp.fc1.weight"][0] / channels[0],
        }
    return {
        "backbone": "resnet",
        "stage_channels": [shapes[f"backbone.res{i}.0.conv3.weight"][0] for i in range(2, 6)],
        "depths": [count_indices(shapes, rf"backbone\.res{i}\.(\d+)\.") for i in range(2, 6)],
        "stem_channels": shapes["backbone.stem.conv1.weight"][0],
        "bottleneck_channels": shapes["backbone.res2.0.conv1.weight"][0],
        "language_fusion": False,
    }


def _infer_text(shapes: Mapping[str, tuple[int, ...]], heads: int) -> BertConfig:
    embeddings = "text_encoder.embeddings."
    vocab_size, hidden_size = shapes[f"{embeddings}word_embeddings.weight"]
    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=count_indices(shapes, r"text_encoder\.encoder\.layer\.(\d+)\."),
        num_attention_heads=heads,
        intermediate_size=shapes["text_encoder.encoder.layer.0.intermediate.dense.weight"][0],
        max_position_embeddings=shapes[f"{embeddings}position_embeddings.weight"][0],
        type_vocab_size=shapes[f"{embeddings}token_type_embeddings.weight"][0],
    )


CARD = """---
library_name: transformers
pipeline_tag: image-segmentation
tags: [referring-segmentation, GRES, gRefCOCO]
---

# ReLA, converted from {source}

Segments what a sentence refers to in an image: one object, several, or none. Network and weights:
"GRES: Generalized Referring Expression Segmentation" (CVPR 2023).

```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
outputs = model(**processor(images=[image], text=["the two people on the left"]))
result = processor.post_process_referring_segmentation(outputs, target_sizes=[(image.height, image.width)])[0]
```

Keys of the file that are not part of the network: {dropped}.

Region gate: {region_gate}. The published evaluation ran with the gate's initial value, sigmoid(0) = 0.5,
because the original code never loads the stored one; `published` reproduces that, `stored` keeps the file's value.
"""


def convert(
    checkpoint: Path,
    folder: Path,
    region_gate: str,
    tokenizer: str,
    image_size: int,
    num_attention_heads: int,
    text_num_attention_heads: int,
) -> RelaModel:
    """Write `folder` with model, processor, their code and a card; nothing is written unless all weights convert.

    Raises:
        ValueError: for a file that cannot be read or is no ReLA checkpoint, or a folder that is not empty.
        OSError: when the tokenizer cannot be loaded.
    """
    state_dict = read_weights(checkpoint)
    weights = convert_state_dict(state_dict, region_gate)
    model = RelaModel(infer_config(state_dict, num_attention_heads, text_num_attention_heads))
    image_processor = RelaImageProcessor(size={"height": image_size, "width": image_size})
    processor = RelaProcessor(image_processor, AutoTokenizer.from_pretrained(tokenizer))
    dropped = ", ".join(name for name in state_dict if DROPPED.fullmatch(name)) or "none"
    card = CARD.format(source=checkpoint.name, region_gate=region_gate, dropped=dropped)
    write_folder(folder, model, weights, processor, card)
    return model


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="modeling.convert_rela", description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoint", type=Path, help="the original's .pth, .pkl or .safetensors")
    parser.add_argument("folder", type=Path, help="where to write the converted model")
    parser.add_argument(
        "--region-gate",
        choices=REGION_GATES,
        default="published",
        help="published: 0, as the published evaluation ran; stored: the file's value",
    )
    parser.add_argument("--tokenizer", default="bert-base-uncased", help="Hub id or folder of BERT's tokenizer")
    parser.add_argument("--image-size", type=int, default=480, help="side of the square the images are squashed to")
    parser.add_argument("--num-attention-heads", type=int, default=8, help="heads of the pixel and region decoders")
    parser.add_argument("--text-num-attention-heads", type=int, default=12, help="heads of BERT")
    return run_conversion(parser, convert, arguments)


if __name__ == "__main__":
    sys.exit(main())
