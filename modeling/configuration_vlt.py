"""The configuration of VLT. The defaults are the published network of "Vision-Language Transformer and Query
Generation for Referring Segmentation" (ICCV 2021)."""

from transformers import PreTrainedConfig

from .configuration_limits import check_fields


class VltConfig(PreTrainedConfig):
    """Configuration of `VltModel`. Sizes are channels unless said otherwise.

    Raises:
        ValueError: where fields contradict each other; the message names the field, its value and the way out.
    """

    model_type = "vlt"
    keys_to_ignore_at_inference = ["loss_terms"]  # by Trainer, which gathers the others

    custom_pipelines: dict | None = None
    """The pipeline that `transformers.pipeline` finds in this repository."""

    # Inputs
    image_size: int = 416
    """Side of the square image in pixels, a multiple of 32. A linear layer over all pixels fixes it."""
    word_size: int = 300
    """Channels of a word vector."""
    max_words: int = 15
    """Words of a sentence that the processor passes on; 20 for the published model of RefCOCOg."""

    # Towers
    stem_channels: int = 32
    """Channels of DarkNet-53's first convolution; each of its five stages doubles them. The features of image and
    sentence together have 32 times as many."""
    text_size: int = 1024
    """Channels of the bidirectional GRU."""

    # Transformer and masks
    hidden_size: int = 256
    """Channels of pixels, words and queries in the transformer, of its feed-forward layers, and of the mask layers."""
    num_queries: int = 16
    """Queries that are generated for each sentence."""
    num_attention_heads: int = 8
    """Heads of every attention."""
    encoder_layers: int = 2
    """Layers over the pixels."""
    decoder_layers: int = 2
    """Layers of the queries."""
    dropout: float = 0.1
    """Dropout of the word vectors, of the weights of the words, and of the transformer's sublayers."""

    # Loss
    l2_weight: float = 5e-4
    """Weight of the squares of all convolution kernels."""

    def __post_init__(self, **kwargs: object) -> None:
        check_fields(self)
        if self.custom_pipelines is None:
            pipeline = {"impl": "pipeline_referring.ReferringPipeline", "pt": ["AutoModel"]}
            self.custom_pipelines = {"referring-segmentation": pipeline}
        super().__post_init__(**kwargs)
        if self.image_size < 32 or self.image_size % 32:
            raise ValueError(f"image_size={self.image_size} in VltConfig: choose a multiple of 32")
        if self.hidden_size % self.num_attention_heads or self.hidden_size % 2:
            raise ValueError(
                f"hidden_size={self.hidden_size} in VltConfig must be even and a multiple of num_attention_heads="
                f"{self.num_attention_heads}: change one of them"
            )


VltConfig.register_for_auto_class()
