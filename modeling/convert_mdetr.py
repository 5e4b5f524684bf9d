"""Turns a published MDETR checkpoint into a folder that AutoModel and AutoProcessor load.

    python -m modeling.convert_mdetr checkpoint.pth OUT

A training checkpoint holds the weights twice, as trained ("model") and averaged over the training ("model_ema"). The
published evaluation uses the averaged weights, and so does this command where they are present.
"""

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoTokenizer, RobertaConfig

from .configuration_mdetr import MdetrConfig
from .image_processing_mdetr import MdetrImageProcessor
from .modeling_mdetr import MdetrModel
from .processing_mdetr import MdetrProcessor
from .weight_files import Rules, count_indices, read_file, rename, run_conversion, split_projections, write_folder

# Not used in GREC: RoBERTa's pooler and position ids, batch norm's counter, and the question-answering heads.
DROPPED = re.compile(
    r"transformer\.text_encoder\.(pooler\..*|embeddings\.position_ids)|.*\.num_batches_tracked"
    r"|(qa_embed|answer_(\w+_)?head)\..*"
)

_BODY, _TRUNK = r"backbone\.0\.body\.", "backbone.layers."
_ENCODER = {
    "self_attn": "attention",
    "self_attn.out_proj": "attention.out_proj",
    "norm1": "attention_norm",
    "linear1": "feed_forward.fc1",
    "linear2": "feed_forward.fc2",
    "norm2": "ffn_norm",
}
_DECODER = {
    "self_attn": "self_attention",
    "self_attn.out_proj": "self_attention.out_proj",
    "norm1": "self_norm",
    "cross_attn_image": "cross_attention",
    "cross_attn_image.out_proj": "cross_attention.out_proj",
    "norm3": "cross_norm",
    "linear1": "feed_forward.fc1",
    "linear2": "feed_forward.fc2",
    "norm4": "ffn_norm",
}
RULES: Rules = [
    (r"transformer\.(text_encoder\..*)", r"\1"),
    (r"transformer\.resizer\.fc", "text_projection"),
    (r"transformer\.resizer\.layer_norm", "text_norm"),
    (r"transformer\.encoder\.layers\.(\d+)\.(.+)", lambda m: f"encoder.{m[1]}.{_ENCODER[m[2]]}"),
    (r"transformer\.decoder\.layers\.(\d+)\.(.+)", lambda m: f"decoder.{m[1]}.{_DECODER[m[2]]}"),
    (r"transformer\.decoder\.norm", "decoder_norm"),
    (r"class_embed", "token_head"),
    (r"bbox_embed\.layers\.(\d)", lambda m: f"box_head.{2 * int(m[1])}"),
    (r"isfinal_embed", "final_head"),
    (r"query_embed", "query_position"),
    (r"input_proj", "image_projection"),
    (r"contrastive_align_projection_image", "align_queries"),
    (r"contrastive_align_projection_text", "align_tokens"),
    (_BODY + r"conv1", "backbone.conv1.conv"),
    (_BODY + r"bn1", "backbone.conv1.norm"),
    (_BODY + r"layer(\d)\.(\d+)\.conv(\d)", lambda m: f"{_TRUNK}{int(m[1]) - 1}.{m[2]}.conv{m[3]}.conv"),
    (_BODY + r"layer(\d)\.(\d+)\.bn(\d)", lambda m: f"{_TRUNK}{int(m[1]) - 1}.{m[2]}.conv{m[3]}.norm"),
    (_BODY + r"layer(\d)\.(\d+)\.downsample\.0", lambda m: f"{_TRUNK}{int(m[1]) - 1}.{m[2]}.shortcut.conv"),
    (_BODY + r"layer(\d)\.(\d+)\.downsample\.1", lambda m: f"{_TRUNK}{int(m[1]) - 1}.{m[2]}.shortcut.norm"),
]


def convert_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename original parameters to those of `MdetrModel`; fused attention projections are split.

    Args:
        state_dict: the original's, in its checkpoint under "model" or "model_ema".

    Raises:
        ValueError: for a key that is neither used nor known to be dropped (`DROPPED`).
    """
    converted = {}
    for name, value in state_dict.items():
        if DROPPED.fullmatch(name):
            continue
        ours, value = rename(name, RULES), torch.as_tensor(value)
        if ours is None:
            raise ValueError(
                f"unknown key {name!r} in the checkpoint: not a parameter of MDETR for detection. Checkpoints with "
                "masks, a CLS token or pre-norm layers are not converted"
            )
        value = value.flatten(1) if ours == "image_projection.weight" else value
        converted.update(split_projections(ours, value))
    return converted


def infer_config(
    state_dict: Mapping[str, torch.Tensor], num_attention_heads: int = 8, text_num_attention_heads: int = 12
) -> MdetrConfig:
    """The configuration of an original state dict, read from names and shapes.

    Args:
        state_dict: the original's, in its checkpoint under "model" or "model_ema".
        num_attention_heads: of encoder and decoder; no shape depends on it.
        text_num_attention_heads: of RoBERTa; likewise.

    Raises:
        ValueError: when the state dict is not of an MDETR with a bottleneck ResNet.
    """
    shapes = {name: tuple(value.shape) for name, value in state_dict.items()}
    try:
        return MdetrConfig(
            **_infer_backbone(shapes),
            **_infer_transformer(shapes),
            num_attention_heads=num_attention_heads,
            text_config=_infer_text(shapes, text_num_attention_heads),
        )
    except KeyError as error:
        raise ValueError(f"no {error} among the keys: not a whole MDETR with a bottleneck ResNet") from error


def _infer_backbone(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, object]:
    layer = "backbone.0.body.layer"
    return {
        "stem_channels": shapes["backbone.0.body.conv1.weight"][0],
        "bottleneck_channels": [shapes[f"{layer}{i}.0.conv1.weight"][0] for i in range(1, 5)],
        "stage_channels": [shapes[f"{layer}{i}.0.conv3.weight"][0] for i in range(1, 5)],
        "depths": [count_indices(shapes, rf"{_BODY}layer{i}\.(\d+)\.") for i in range(1, 5)],
    }


def _infer_transformer(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, object]:
    num_queries, hidden_size = shapes["query_embed.weight"]
    return {
        "hidden_size": hidden_size,
        "encoder_layers": count_indices(shapes, r"transformer\.encoder\.layers\.(\d+)\."),
        "decoder_layers": count_indices(shapes, r"transformer\.decoder\.layers\.(\d+)\."),
        "ffn_size": shapes["transformer.decoder.layers.0.linear1.weight"][0],
        "num_queries": num_queries,
        "num_positions": shapes["class_embed.weight"][0],
        "contrastive_size": shapes.get("contrastive_align_projection_image.weight", (0,))[0],
        "predict_final": "isfinal_embed.weight" in shapes,
    }


def _infer_text(shapes: Mapping[str, tuple[int, ...]], heads: int) -> RobertaConfig:
    text = "transformer.text_encoder."
    vocab_size, hidden_size = shapes[f"{text}embeddings.word_embeddings.weight"]
    return RobertaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=count_indices(shapes, r"transformer\.text_encoder\.encoder\.layer\.(\d+)\."),
        num_attention_heads=heads,
        intermediate_size=shapes[f"{text}encoder.layer.0.intermediate.dense.weight"][0],
        max_position_embeddings=shapes[f"{text}embeddings.position_embeddings.weight"][0],
        type_vocab_size=shapes[f"{text}embeddings.token_type_embeddings.weight"][0],
        layer_norm_eps=1e-5,
    )


CARD = """---
library_name: transformers
pipeline_tag: object-detection
tags: [referring-expression-comprehension, GREC, gRefCOCO]
---

# MDETR, converted from {source}

Boxes of what a sentence refers to in an image: one object, several, or none. Network and weights ("{weights}" of the
file): "MDETR: Modulated Detection for End-to-End Multi-Modal Understanding" (ICCV 2021).

```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
outputs = model(**processor(images=[image], text=["the two people on the left"]))
result = processor.post_process_referring_detection(outputs, target_sizes=[(image.height, image.width)])[0]
```
"""


def read_checkpoint(path: Path, weights: str | None = None) -> tuple[dict[str, torch.Tensor], str]:
    """The state dict of a training checkpoint, and its name; no code in the file is executed.

    Args:
        path: a torch file.
        weights: "model" or "model_ema"; None is "model_ema" where present, else "model".

    Raises:
        ValueError: when the file is missing, damaged, holds more than weights and settings, or no `weights`.
    """
    content = read_file(path)
    names = [
        name for name in ("model_ema", "model") if isinstance(content, dict) and isinstance(content.get(name), dict)
    ]
    chosen = weights or (names or ["model"])[0]
    if chosen not in names:
        raise ValueError(f"{path} holds no {chosen!r}: {f'use --weights {names[0]}' if names else 'not a checkpoint'}")
    return content[chosen], chosen


def convert(
    checkpoint: Path,
    folder: Path,
    weights: str | None,
    tokenizer: str,
    num_attention_heads: int,
    text_num_attention_heads: int,
) -> MdetrModel:
    """Write `folder` with model, processor, their code and a card; nothing is written unless all weights convert.

    Raises:
        ValueError: for a file that cannot be read or is no MDETR checkpoint, or a folder that is not empty.
        OSError: when the tokenizer cannot be loaded.
    """
    state_dict, chosen = read_checkpoint(checkpoint, weights)
    converted = convert_state_dict(state_dict)
    model = MdetrModel(infer_config(state_dict, num_attention_heads, text_num_attention_heads))
    words, num_positions = AutoTokenizer.from_pretrained(tokenizer), model.config.num_positions
    processor = MdetrProcessor(MdetrImageProcessor(), words, num_positions=num_positions)
    write_folder(folder, model, converted, processor, CARD.format(source=checkpoint.name, weights=chosen))
    return model


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="modeling.convert_mdetr", description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoint", type=Path, help="the original's .pth")
    parser.add_argument("folder", type=Path, help="where to write the converted model")
    parser.add_argument(
        "--weights", choices=("model", "model_ema"), help="as trained or averaged; averaged where present by default"
    )
    parser.add_argument(
        "--tokenizer", default="FacebookAI/roberta-base", help="Hub id or folder of RoBERTa's tokenizer"
    )
    parser.add_argument("--num-attention-heads", type=int, default=8, help="heads of encoder and decoder")
    parser.add_argument("--text-num-attention-heads", type=int, default=12, help="heads of RoBERTa")
    return run_conversion(parser, convert, arguments)


if __name__ == "__main__":
    sys.exit(main())
