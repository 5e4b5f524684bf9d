"""Configuration of ReLA. The defaults are the published Swin-B network of "GRES: Generalized Referring Expression
Segmentation" (CVPR 2023); all departures from it are options that are off by default."""

import math

from transformers import AutoConfig, BertConfig, PreTrainedConfig

from .configuration_limits import check_fields
from .configuration_towers import backbone_config, text_config


class RelaConfig(PreTrainedConfig):
    """Configuration of `RelaModel`. Sizes are channels unless noted; lists of four are for strides 4, 8, 16, 32.

    Raises:
        ValueError: where two fields contradict each other; the message names the field, its value and the way out.
    """

    model_type = "rela"
    sub_configs = {"text_config": AutoConfig, "backbone_config": AutoConfig}
    keys_to_ignore_at_inference = [  # Trainer gathers all other outputs
        "loss_terms", "minimap_logits", "category_logits", "relevance_logits", "instance_masks", "count_logits",
    ]  # fmt: skip

    text_config: dict | PreTrainedConfig | None = None
    """Any text encoder of AutoModel by its `model_type`, BERT where there is none; None is bert-base-uncased's."""

    custom_pipelines: dict | None = None
    """The code of `pipeline("referring-segmentation")`; filled in."""

    # Vision trunk
    backbone: str = "swin"
    """Vision trunk: "swin", "resnet" (bottleneck blocks, frozen batch norm), "conv" (small, group norm), or "auto":
    any AutoBackbone of transformers, by `backbone_config`."""
    backbone_config: dict | PreTrainedConfig | None = None
    """Configuration of the "auto" trunk by its `model_type`. Its `out_features` are up to four maps; where they are
    the last map alone, a trunk of several resolutions gives its last four."""
    stage_channels: list[int] | tuple[int, ...] = (128, 256, 512, 1024)
    """Channels of the four stages; for "auto" filled in when the model is built."""
    depths: list[int] | tuple[int, ...] = (2, 2, 18, 2)
    """Blocks in each of the four stages."""
    stem_channels: int = 64
    """Channels of the first convolution of "resnet" and "conv"; half of `stage_channels[0]` is usual for "conv"."""
    bottleneck_channels: int = 64
    """Inner channels of the resnet's first stage; doubled at each stage."""
    window_heads: list[int] | tuple[int, ...] = (4, 8, 16, 32)
    """Attention heads in each Swin stage."""
    window_size: int = 12
    """Side of a Swin attention window, in patches."""
    mlp_ratio: float = 4.0
    """Width of a Swin block's MLP over the block's channels."""
    drop_path_rate: float = 0.3
    """Stochastic depth of the last Swin block; grows linearly from 0 at the first."""

    # Language in the vision trunk
    language_fusion: bool = True
    """Fuse the sentence into the stage outputs; the published ResNet-50 variant does not."""
    language_gate: str = "published"
    """How a fused stage output is added to the trunk. "published": by a gate with both weights zero, which never opens
    because both gradients are zero; "open": only the gate's last weight starts at zero; "none": it is not added."""

    # Pixel decoder
    pixel_decoder_size: int = 256
    """Channels of the pixel decoder."""
    pixel_decoder_layers: int = 6
    """Deformable encoder layers over strides 8, 16 and 32; 0 leaves a plain feature pyramid."""
    pixel_decoder_ffn_size: int = 1024
    """Width of the pixel decoder's feed-forward layers."""
    pixel_decoder_points: int = 4
    """Points sampled per head and level by deformable attention."""
    norm_groups: int = 32
    """Groups of every group norm."""
    mask_size: int = 256
    """Channels of the mask features."""

    # Region decoder
    hidden_size: int = 256
    """Channels of the region queries."""
    num_attention_heads: int = 8
    """Heads of the pixel decoder and of the region decoder."""
    num_queries: int = 100
    """Regions, a square number: the minimap has sqrt(num_queries) cells a side."""
    decoder_layers: int = 9
    """Region decoder layers, cycling through strides 32, 16 and 8."""
    decoder_ffn_size: int = 2048
    """Width of the region decoder's feed-forward layers."""
    region_language_weight: float = 0.1
    """Factor of the region-language attention before it is added to the queries."""
    region_language_mask: bool = False
    """Mask padding tokens in the region-language attention; the published model does not."""

    # Loss
    mask_loss: str = "ce"
    """"ce": two-class cross entropy with `class_weights`; "bce_dice": binary cross entropy plus dice on the margin."""
    class_weights: list[float] | tuple[float, ...] = (0.9, 1.1)
    """Weights of background and target in every cross entropy."""
    mask_loss_weight: float = 1.0
    """Weight of the mask loss."""
    minimap_loss_weight: float = 0.1
    """Weight of the minimap loss."""
    no_target_loss_weight: float = 0.1
    """Weight of the no-target loss."""
    loss_scale: float = 5.0
    """Factor of the whole sum."""
    soft_minimap: bool = False
    """The minimap's target is each cell's covered fraction; published: 1 where the centre is fully covered, else 0."""
    auxiliary_loss: bool = False
    """Supervise every region decoder layer; published: the last one only."""

    # Category supervision
    num_categories: int = 0
    """Categories of a per-pixel head on the trunk's strides 4 and 8; 0 builds no head."""
    category_loss_weight: float = 1.0
    """Weight of the category loss, inside `loss_scale`."""

    # Instance branch
    num_instance_queries: int = 0
    """Objects that the instance branch detects in an image; 0 builds no branch."""
    instance_layers: int = 3
    """Layers in which the detected objects attend to each other, to the words and to the regions."""
    max_count: int = 5
    """Last class of the counting head; it means this many targets or more."""
    centre_loss_weight: float = 1.0
    """Weight of the loss of the map of object centres, like all below inside `loss_scale`."""
    box_loss_weight: float = 5.0
    """Weight of the boxes' L1 distance, in loss and matching."""
    giou_loss_weight: float = 2.0
    """Weight of the boxes' generalised IoU, in loss and matching."""
    instance_mask_loss_weight: float = 1.0
    """Weight of the instance masks' cross entropy and dice, in loss and (dice alone) matching."""
    relevance_loss_weight: float = 1.0
    """Weight of each layer's relevance loss; of the relevance's error in matching."""
    merge_instances: bool = False
    """Add the instances to the answers: to `pred_masks` the mask logits of the chosen objects (those whose probability
    of being relevant, given that any object is, exceeds 0.5), to `no_target_logits` the logit that no object is
    relevant. The losses use regions and instances separately."""
    count_loss_weight: float = 0.0
    """Weight of the counting loss; 0 builds no counting head."""

    def __post_init__(self, **kwargs: object) -> None:
        check_fields(self)
        self.text_config = BertConfig() if self.text_config is None else text_config(self.text_config)
        if self.backbone_config is not None:
            self.backbone_config = backbone_config(self.backbone_config)
        if self.custom_pipelines is None:
            pipeline = {"impl": "pipeline_referring.ReferringPipeline", "pt": ["AutoModel"]}
            self.custom_pipelines = {"referring-segmentation": pipeline}
        for name in ("stage_channels", "depths", "window_heads", "class_weights"):
            setattr(self, name, list(getattr(self, name)))
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} in RelaConfig: choose one of {', '.join(allowed)}")
        if (self.backbone == "auto") != (self.backbone_config is not None):
            raise ValueError(
                f"backbone={self.backbone!r} in RelaConfig {'without' if self.backbone == 'auto' else 'with'} a "
                'backbone_config: give backbone="auto" and a backbone_config with its model_type, or neither'
            )
        if self.backbone == "auto" and self.language_fusion and self.language_gate == "open":
            raise ValueError(
                'language_gate="open" in RelaConfig adds the sentence to the trunk, which a backbone of transformers '
                'cannot read: set language_gate="none"'
            )
        if math.isqrt(self.num_queries) ** 2 != self.num_queries:
            raise ValueError(f"num_queries={self.num_queries} in RelaConfig is not a square: try 36, 64 or 100")
        for name in ("hidden_size", "pixel_decoder_size"):
            if getattr(self, name) % self.num_attention_heads or getattr(self, name) % 4:
                raise ValueError(
                    f"{name}={getattr(self, name)} in RelaConfig must be a multiple of 4 (sine positions) and of "
                    f"num_attention_heads={self.num_attention_heads}: change one of them"
                )
        if self.pixel_decoder_size % self.norm_groups:
            raise ValueError(
                f"pixel_decoder_size={self.pixel_decoder_size} in RelaConfig is not a multiple of "
                f"norm_groups={self.norm_groups}: change one of them"
            )
        if self.num_categories and self.language_fusion and self.language_gate == "open":
            raise ValueError(
                'language_gate="open" in RelaConfig adds the sentence to the trunk, but num_categories='
                f'{self.num_categories} needs language-free features: set language_gate="published" or "none"'
            )


_CHOICES = {
    "backbone": ("swin", "resnet", "conv", "auto"),
    "language_gate": ("published", "open", "none"),
    "mask_loss": ("ce", "bce_dice"),
}

RelaConfig.register_for_auto_class()
