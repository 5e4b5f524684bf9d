"""Every choice of the ReLA model, named. The defaults are the published Swin-B network of "GRES: Generalized Referring
Expression Segmentation" (CVPR 2023); whatever departs from it is an option that is off here."""

import math

from transformers import BertConfig, PreTrainedConfig


class RelaConfig(PreTrainedConfig):
    """Configuration of `RelaModel`. Sizes are channels unless said otherwise; lists of four go by stride 4, 8, 16, 32.

    Raises:
        ValueError: where two fields contradict each other; the message names the field, its value and the way out.
    """

    model_type = "rela"
    sub_configs = {"text_config": BertConfig}
    keys_to_ignore_at_inference = [  # by Trainer, which has to gather the others
        "loss_terms", "minimap_logits", "category_logits", "relevance_logits", "instance_masks", "count_logits",
    ]  # fmt: skip

    text_config: dict | PreTrainedConfig | None = None
    """The BERT encoder; None is bert-base-uncased's configuration."""

    custom_pipelines: dict | None = None
    """Where `pipeline("referring-segmentation")` finds its code; filled in."""

    # Vision trunk
    backbone: str = "swin"
    """Vision trunk: "swin", "resnet" (bottleneck blocks, frozen batch norm) or "conv" (small, group norm)."""
    stage_channels: list[int] | tuple[int, ...] = (128, 256, 512, 1024)
    """Channels of the four stages."""
    depths: list[int] | tuple[int, ...] = (2, 2, 18, 2)
    """Blocks in each of the four stages."""
    stem_channels: int = 64
    """Channels of the resnet's first convolution; half of `stage_channels[0]` is usual for "conv"."""
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
    """How a fused stage output returns to the trunk. "published": by a gate with both weights zero, which never opens
    because both gradients are zero; "open": only the gate's last weight starts at zero; "none": not at all."""

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
    """What the region-language attention is multiplied with before it joins the queries."""
    region_language_mask: bool = False
    """Keep padding tokens out of the region-language attention; the published model lets them in."""

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
    """Teach the minimap each cell's covered fraction; published: 1 where the centre is covered entirely, else 0."""
    auxiliary_loss: bool = False
    """Supervise every region decoder layer; published: the last alone."""

    # Category supervision
    num_categories: int = 0
    """Object categories of a per-pixel head on the trunk's strides 4 and 8; 0 builds no head."""
    category_loss_weight: float = 1.0
    """Weight of the category loss, inside `loss_scale`."""

    # Instance branch
    num_instance_queries: int = 0
    """Objects the instance branch looks for in an image; 0 builds no branch."""
    instance_layers: int = 3
    """Layers in which the found objects look at each other, at the words and at the regions."""
    max_count: int = 5
    """Largest number of targets the counting head tells apart; it means "so many or more"."""
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
    """Let regions and instances answer together: in `pred_masks` the mask logits of the chosen objects (relevant with
    more than even odds, given that any is) are added to the region head's, in `no_target_logits` the logit of "none of
    the objects is relevant" to the region head's verdict. The losses see each by itself."""
    count_loss_weight: float = 0.0
    """Weight of the counting loss; 0 builds no counting head."""

    def __post_init__(self, **kwargs: object) -> None:
        if self.text_config is None:
            self.text_config = BertConfig()
        elif isinstance(self.text_config, dict):
            self.text_config = BertConfig(**self.text_config)
        if self.custom_pipelines is None:
            pipeline = {"impl": "pipeline_rela.ReferringSegmentationPipeline", "pt": ["AutoModel"]}
            self.custom_pipelines = {"referring-segmentation": pipeline}
        for name in ("stage_channels", "depths", "window_heads", "class_weights"):
            setattr(self, name, list(getattr(self, name)))
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} in RelaConfig: choose one of {', '.join(allowed)}")
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
                'language_gate="open" in RelaConfig mixes the sentence into the trunk, where num_categories='
                f'{self.num_categories} wants language-free features: set language_gate="published" or "none"'
            )


_CHOICES = {
    "backbone": ("swin", "resnet", "conv"),
    "language_gate": ("published", "open", "none"),
    "mask_loss": ("ce", "bce_dice"),
}

RelaConfig.register_for_auto_class()
