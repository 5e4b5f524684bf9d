"""Models of other projects, tiny and random, saved as folders that the auto classes load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertTokenizerFast,
    CLIPImageProcessorPil,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    CLIPTokenizer,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessorPil,
    GroundingDinoProcessor,
    Kosmos2Config,
    Kosmos2ForConditionalGeneration,
    Kosmos2Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
    OmDetTurboConfig,
    OmDetTurboForObjectDetection,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessorPil,
    Owlv2Processor,
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTImageProcessorPil,
    OwlViTProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    Sam3Config,
    Sam3Model,
    SamConfig,
    SamImageProcessorPil,
    SamModel,
    SamProcessor,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'<>/_ "
SWIN = {"model_type": "swin", "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4}
SWIN |= {"out_indices": [2, 3, 4], "image_size": 64}
CHAT = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}\n{% endfor %}"
)
BLOCK = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
GROUNDING = {
    "backbone_config": SWIN,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_queries": 20,
    "num_feature_levels": 4,
    "max_text_len": 64,
}


def save(folder: Path, family: str) -> Path:
    """Save a tiny model of a family (a key of `MAKERS`) and its processor."""
    torch.manual_seed(1)
    model, *parts = MAKERS[family]()  # parts: its processor, or image processor and tokenizer
    if family in ("florence2", "kosmos-2", "paligemma"):
        for weight in model.parameters():  # answers that depend on image and sentence
            torch.nn.init.normal_(weight, std=1.0)
    for part in (model, *parts):
        part.save_pretrained(folder)
    return folder


def bert_tokenizer() -> BertTokenizerFast:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS[:-1], *(f"##{letter}" for letter in LETTERS[:-1])]
    return BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})


def clip_tokenizer(length: int) -> CLIPTokenizer:
    letters = [*LETTERS[:-1], *(f"{letter}</w>" for letter in LETTERS[:-1]), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], pad_token="<|endoftext|>", model_max_length=length)


def byte_tokenizer(special: list[str], **options: object) -> PreTrainedTokenizerFast:
    """A token for each byte, and special tokens."""
    alphabet = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **options)
    fast.add_tokens(special, special_tokens=True)
    return fast


def text_config(tokenizer: CLIPTokenizer, length: int) -> dict:
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return BLOCK | ends | {"vocab_size": len(tokenizer), "max_position_embeddings": length, "pad_token_id": 0}


def grounding(config: type, model: type) -> tuple:
    tokenizer = bert_tokenizer()
    text = BLOCK | {"model_type": "bert", "vocab_size": len(tokenizer)}
    image_processor = GroundingDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 100})
    return model(config(**GROUNDING, text_config=text)), GroundingDinoProcessor(image_processor, tokenizer)


def owl(config: type, model: type, image_processor: object, processor: type) -> tuple:
    tokenizer = clip_tokenizer(16)
    vision = BLOCK | {"image_size": 64, "patch_size": 16}
    settings = config(text_config=text_config(tokenizer, 16), vision_config=vision, projection_dim=32)
    return model(settings), processor(image_processor=image_processor, tokenizer=tokenizer)


def omdet_turbo() -> tuple:
    tokenizer = clip_tokenizer(77)
    config = OmDetTurboConfig(
        backbone_config=SWIN | {"out_indices": [2, 3, 4]},
        text_config=text_config(tokenizer, 77) | {"model_type": "clip_text_model", "hidden_size": 48},
        image_size=64,
        apply_layernorm_after_vision_backbone=False,
        text_projection_in_dim=48,
        text_projection_out_dim=48,
        task_encoder_hidden_dim=32,
        class_embed_dim=48,
        num_queries=30,
        encoder_hidden_dim=32,
        vision_features_channels=[32, 32, 32],
        encoder_in_channels=[32, 64, 128],
        encoder_attention_heads=2,
        encoder_dim_feedforward=32,
        decoder_hidden_dim=32,
        decoder_num_heads=2,
        decoder_num_layers=1,
        decoder_dim_feedforward=32,
    )
    image_processor = GroundingDinoImageProcessorPil(size={"height": 64, "width": 64}, do_pad=False)
    return OmDetTurboForObjectDetection(config), image_processor, tokenizer


def clipseg() -> tuple:
    tokenizer = clip_tokenizer(77)
    vision = BLOCK | {"image_size": 32, "patch_size": 8, "num_hidden_layers": 3}
    config = CLIPSegConfig(
        text_config=text_config(tokenizer, 77),
        vision_config=vision,
        projection_dim=32,
        extract_layers=[0, 1, 2],
        reduce_dim=16,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
    )
    image_processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    return CLIPSegForImageSegmentation(config), CLIPSegProcessor(image_processor, tokenizer)


def sam3() -> tuple:
    """SAM 3 with an image processor that does without torchvision."""
    tokenizer = clip_tokenizer(32)
    backbone = {"model_type": "sam3_vit_model", "image_size": 56, "patch_size": 14, "window_size": 2}
    backbone |= {"num_hidden_layers": 2, "global_attn_indexes": [1], "pretrain_image_size": 28}
    vision = {"backbone_config": BLOCK | backbone, "fpn_hidden_size": 32}
    vision |= {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}
    layers = {"hidden_size": 32, "num_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = Sam3Config(
        vision_config=vision,
        text_config=text_config(tokenizer, 32) | {"model_type": "clip_text_model", "projection_dim": 32},
        geometry_encoder_config=layers,
        detr_encoder_config=layers,
        detr_decoder_config=layers | {"num_queries": 10},
        mask_decoder_config={"hidden_size": 32, "num_attention_heads": 2},
    )
    return Sam3Model(config), ViTImageProcessorPil(size={"height": 56, "width": 56}), tokenizer


def florence2() -> tuple:
    places = [f"<loc_{i}>" for i in range(1000)]
    tokenizer = byte_tokenizer(places, extra_special_tokens={"image_token": "<image>"})
    vision = {"depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1]}
    vision |= {"patch_prenorm": [False, True], "embed_dim": [16, 32], "num_heads": [2, 2], "num_groups": [2, 2]}
    vision |= {"window_size": 4, "projection_dim": 32, "drop_path_rate": 0.0}
    text = {"model_type": "bart", "d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
    text |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    text |= ids(tokenizer) | {"decoder_start_token_id": tokenizer.eos_token_id, "forced_eos_token_id": None}
    config = Florence2Config(vision_config=vision, text_config=text, image_token_id=tokenizer.image_token_id)
    image_processor = CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False)
    image_processor.image_seq_length = 17
    return Florence2ForConditionalGeneration(config), Florence2Processor(image_processor, tokenizer)


def kosmos2() -> tuple:
    tokenizer = byte_tokenizer(
        ["<grounding>", "<phrase>", "</phrase>", "<object>", "</object>", "<image>", "</image>"]
    )
    processor = Kosmos2Processor(
        CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False), tokenizer
    )
    text = {"embed_dim": 32, "layers": 1, "ffn_dim": 32, "attention_heads": 2, "dropout": 0.0} | ids(tokenizer)
    vision = BLOCK | {"image_size": 32, "patch_size": 8}
    config = Kosmos2Config(text_config=text, vision_config=vision, latent_query_num=64)
    return Kosmos2ForConditionalGeneration(config), processor


def paligemma() -> tuple:
    tokenizer = byte_tokenizer([])
    image_processor = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    image_processor.image_seq_length = 16
    processor = PaliGemmaProcessor(image_processor, tokenizer)
    text = BLOCK | ids(tokenizer) | {"model_type": "gemma", "num_key_value_heads": 1, "head_dim": 16}
    vision = BLOCK | {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8, "vision_use_head": False}
    config = PaliGemmaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.image_token_id,
        projection_dim=32,
        hidden_size=32,
    )
    return PaliGemmaForConditionalGeneration(config), processor


def llava() -> tuple:
    """For TRL: a chat model whose processor needs no torchvision and takes text alone."""
    tokenizer = byte_tokenizer([], extra_special_tokens={"image_token": "<image>"})
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )
    vision = BLOCK | {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8, "num_hidden_layers": 2}
    text = BLOCK | ids(tokenizer) | {"model_type": "llama", "num_key_value_heads": 2}
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=tokenizer.image_token_id)
    return LlavaForConditionalGeneration(config), processor


def ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {"vocab_size": len(tokenizer), **{name: getattr(tokenizer, name) for name in names}}


def sam() -> tuple:
    vision = {
        "hidden_size": 32,
        "output_channels": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 64,
    }
    vision |= {"patch_size": 16, "mlp_dim": 32, "global_attn_indexes": [0], "window_size": 2, "num_pos_feats": 16}
    decoder = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "mlp_dim": 32,
        "iou_head_hidden_dim": 32,
    }
    prompts = {"hidden_size": 32, "image_size": 64, "patch_size": 16, "mask_input_channels": 4}
    config = SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)
    sizes = {"size": {"longest_edge": 64}, "pad_size": {"height": 64, "width": 64}}
    sizes |= {"mask_size": {"longest_edge": 16}, "mask_pad_size": {"height": 16, "width": 16}}
    return SamModel(config), SamProcessor(SamImageProcessorPil(**sizes))


MAKERS: dict[str, Callable[[], tuple]] = {
    "grounding-dino": lambda: grounding(GroundingDinoConfig, GroundingDinoForObjectDetection),
    "mm-grounding-dino": lambda: grounding(MMGroundingDinoConfig, MMGroundingDinoForObjectDetection),
    "owlvit": lambda: owl(
        OwlViTConfig,
        OwlViTForObjectDetection,
        OwlViTImageProcessorPil(size={"height": 64, "width": 64}, crop_size={"height": 64, "width": 64}),
        OwlViTProcessor,
    ),
    "owlv2": lambda: owl(  # resizing needs scipy, so images have a side of 64
        Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessorPil(do_resize=False), Owlv2Processor
    ),
    "omdet-turbo": omdet_turbo,
    "clipseg": clipseg,
    "sam3": sam3,
    "florence2": florence2,
    "kosmos-2": kosmos2,
    "paligemma": paligemma,
    "sam": sam,
    "llava": llava,
}
