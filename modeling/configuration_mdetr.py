"""Configuration of MDETR. The defaults are the published ResNet-101 network of "MDETR: Modulated Detection for
End-to-End Multi-Modal Understanding" (ICCV 2021), the GREC baseline of gRefCOCO."""

from transformers import PreTrainedConfig, RobertaConfig

from .configuration_limits import check_fields


class MdetrConfig(PreTrainedConfig):
    """Configuration of `MdetrModel`. Sizes are channels unless noted; lists of four are for strides 4, 8, 16, 32.

    Raises:
        ValueError: where fields contradict each other; the message names the field, its value and the way out.
    """

    model_type = "mdetr"
    sub_configs = {"text_config": RobertaConfig}
    keys_to_ignore_at_inference = [  # Trainer gathers all other outputs
        "loss_terms", "pred_isfinal", "proj_queries", "proj_tokens", "auxiliary_outputs",
    ]  # fmt: skip

    text_config: dict | PreTrainedConfig | None = None
    """The RoBERTa encoder; None is roberta-base's configuration."""

    custom_pipelines: dict | None = None
    """The code of `pipeline("referring-segmentation")`; filled in."""

    # Vision trunk
    stem_channels: int = 64
    """Channels of the ResNet's first convolution."""
    bottleneck_channels: list[int] | tuple[int, ...] = (64, 128, 256, 512)
    """Inner channels of the blocks of the four stages."""
    stage_channels: list[int] | tuple[int, ...] = (256, 512, 1024, 2048)
    """Channels of the four stages."""
    depths: list[int] | tuple[int, ...] = (3, 4, 23, 3)
    """Blocks in each of the four stages."""
    freeze_stem: bool = True
    """Do not train the first convolution and the first stage; False where nothing was pretrained."""

    # Joint encoder and decoder
    hidden_size: int = 256
    """Channels of image tokens, word tokens and queries."""
    num_attention_heads: int = 8
    """Heads of every attention of encoder and decoder."""
    encoder_layers: int = 6
    """Layers over image and word tokens together."""
    decoder_layers: int = 6
    """Layers of the queries."""
    ffn_size: int = 2048
    """Width of the feed-forward layers."""
    num_queries: int = 100
    """Boxes predicted for each sentence."""
    dropout: float = 0.1
    """Dropout of encoder and decoder, attention weights included."""
    text_dropout: float = 0.1
    """Dropout of the projected words."""

    # Heads
    num_positions: int = 256
    """Classes of the soft-token head: token positions, the last one being "no object"; the processor's too."""
    contrastive_size: int = 64
    """Channels of the space in which queries and words are aligned; 0 builds no such head."""
    predict_final: bool = False
    """Also predict which boxes the sentence is finally about, and not only mentions."""

    # Matcher
    class_cost: float = 1.0
    """Weight of the expected soft-token agreement in the matching cost."""
    box_cost: float = 5.0
    """Weight of the L1 distance of boxes in the matching cost."""
    giou_cost: float = 2.0
    """Weight of the generalised IoU in the matching cost."""

    # Loss
    class_loss_weight: float = 1.0
    """Weight of the soft-token cross entropy."""
    no_object_weight: float = 0.1
    """Weight, inside that cross entropy, of the queries without a target."""
    box_loss_weight: float = 5.0
    """Weight of the L1 distance of matched boxes."""
    giou_loss_weight: float = 2.0
    """Weight of one minus the generalised IoU of matched boxes."""
    align_loss_weight: float = 1.0
    """Weight of the contrastive alignment of queries and words."""
    final_loss_weight: float = 1.0
    """Weight of the `predict_final` head's loss."""
    temperature: float = 0.07
    """Divisor of the similarities in the contrastive alignment."""
    auxiliary_loss: bool = True
    """Predict and supervise after every decoder layer."""

    def __post_init__(self, **kwargs: object) -> None:
        check_fields(self)
        if self.text_config is None:
            self.text_config = RobertaConfig(max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5)
        elif isinstance(self.text_config, dict):
            self.text_config = RobertaConfig(**self.text_config)
        if self.custom_pipelines is None:
            pipeline = {"impl": "pipeline_referring.ReferringPipeline", "pt": ["AutoModel"]}
            self.custom_pipelines = {"referring-segmentation": pipeline}
        for name in ("bottleneck_channels", "stage_channels", "depths"):
            setattr(self, name, list(getattr(self, name)))
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        for name in ("bottleneck_channels", "stage_channels", "depths"):
            if len(getattr(self, name)) != 4:
                raise ValueError(f"{name}={getattr(self, name)} in MdetrConfig: give one number for each of 4 stages")
        if self.hidden_size % self.num_attention_heads or self.hidden_size % 4:
            raise ValueError(
                f"hidden_size={self.hidden_size} in MdetrConfig must be a multiple of 4 (sine positions) and of "
                f"num_attention_heads={self.num_attention_heads}: change one of them"
            )


MdetrConfig.register_for_auto_class()
