"""MDETR: boxes of what a sentence refers to in an image; the GREC baseline of gRefCOCO.

    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    outputs = model(**processor(images=[image], text=["all red shapes"], return_tensors="pt"))
    processor.post_process_referring_detection(outputs, target_sizes=[(480, 640)])

Source: "MDETR: Modulated Detection for End-to-End Multi-Modal Understanding" (ICCV 2021).
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel, RobertaModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from .attention import text_mask
from .configuration_mdetr import MdetrConfig
from .image_index import check_image_index, per_sentence, refuse_data_parallel
from .loss_mdetr import LayerOutput, grounding_loss
from .pipeline_referring import ReferringPipeline  # noqa: F401 (registers the task and is saved with the model)
from .resnet import FrozenBatchNorm, ResNet
from .transformer_mdetr import DecoderLayer, EncoderLayer, sine_positions


@dataclass
class MdetrOutput(ModelOutput):
    """Outputs of `MdetrModel` for B sentences.

    Args:
        loss: weighted sum over all layers, where labels of the loss were given.
        loss_terms: detached unweighted terms, named as in `loss_mdetr.grounding_loss`.
        logits: (B, queries, positions) soft-token logits; the last position is "no object".
        pred_boxes: (B, queries, 4) cxcywh relative to the image as given, 0..1.
        pred_isfinal: (B, queries, 1) logits, where the model has that head.
        proj_queries: (B, queries, contrastive channels) of length 1, where the model aligns queries and words.
        proj_tokens: (B, tokens, contrastive channels) of length 1, likewise.
        auxiliary_outputs: "logits", "pred_boxes", "pred_isfinal" and "proj_queries" of the decoder layers before the
            last, first to last.
    """

    loss: torch.Tensor | None = None
    loss_terms: dict[str, torch.Tensor] | None = None
    logits: torch.Tensor | None = None
    pred_boxes: torch.Tensor | None = None
    pred_isfinal: torch.Tensor | None = None
    proj_queries: torch.Tensor | None = None
    proj_tokens: torch.Tensor | None = None
    auxiliary_outputs: tuple[dict[str, torch.Tensor], ...] | None = None


class MdetrPreTrainedModel(PreTrainedModel):
    """Initialisation, and what transformers needs to know of the network."""

    config_class = MdetrConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    # Loaded in half precision, the heads stay in fp32: rounding to half precision moves a box by pixels.
    _keep_in_fp32_modules_strict = ("token_head", "box_head", "final_head", "align_queries", "align_tokens")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        elif isinstance(module, nn.LayerNorm | FrozenBatchNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            if isinstance(module, FrozenBatchNorm):
                init.zeros_(module.running_mean)
                init.ones_(module.running_var)


class MdetrModel(MdetrPreTrainedModel):
    """The whole network: RoBERTa, a ResNet, an encoder over pixels and words together, a decoder of box queries."""

    def __init__(self, config: MdetrConfig) -> None:
        super().__init__(config)
        size = config.hidden_size
        self.text_encoder = RobertaModel(config.text_config, add_pooling_layer=False)
        self.text_projection = nn.Linear(config.text_config.hidden_size, size)
        self.text_norm = nn.LayerNorm(size, eps=1e-12)
        self.text_dropout = nn.Dropout(config.text_dropout)
        self.backbone = Backbone(config)
        self.image_projection = nn.Linear(config.stage_channels[-1], size)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.query_position = nn.Embedding(config.num_queries, size)
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.decoder_norm = nn.LayerNorm(size)
        self.token_head = nn.Linear(size, config.num_positions)
        self.box_head = nn.Sequential(
            nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size), nn.ReLU(), nn.Linear(size, 4)
        )
        self.final_head = nn.Linear(size, 1) if config.predict_final else None
        self.align_queries = nn.Linear(size, config.contrastive_size) if config.contrastive_size else None
        self.align_tokens = nn.Linear(size, config.contrastive_size) if config.contrastive_size else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_encoder.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        labels: dict[str, torch.Tensor] | None = None,
    ) -> MdetrOutput:
        """Boxes for B sentences about a number of images.

        Args:
            pixel_values: (images, 3, height, width), normalised; padding is 0, right and below.
            input_ids: (B, tokens).
            pixel_mask: (images, height, width), 1 on the image and 0 on padding; None when nothing is padding.
            attention_mask: (B, tokens), 1 for words and 0 for padding; None when nothing is padding.
            image_index: (B,) which image each sentence is about; None when sentence b is about image b. The trunk runs
                once per image.
            labels: as `loss_mdetr` describes them; without "boxes", those of measuring alone, there is no loss.

        Raises:
            ValueError: for sentences and images that are not one to one without an `image_index`; for labels with
                another number of positions.
        """
        refuse_data_parallel(self)
        check_image_index(input_ids.shape[0], pixel_values.shape[0], image_index)
        image = self._encode_image(pixel_values, pixel_mask)
        pixels, mask, position = (per_sentence(x, image_index) for x in image)
        text_dtype = next(self.text_encoder.parameters()).dtype
        words = self.text_encoder(input_ids, attention_mask=text_mask(attention_mask, text_dtype)).last_hidden_state
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        words = self.text_dropout(self.text_norm(self.text_projection(words)))
        # Positions of words are 0: RoBERTa has encoded their order.
        memory, position = torch.cat([pixels, words], dim=1), torch.cat([position, torch.zeros_like(words)], dim=1)
        mask = torch.cat([mask, attention_mask.bool()], dim=1)[:, None, None]  # (B, 1, 1, pixels + words)
        for layer in self.encoder:
            memory = layer(memory, position, mask)
        queries = self._decode(memory, position, mask)
        loss, terms = None, None
        with torch.autocast(pixel_values.device.type, enabled=False):
            dtype = self.token_head.weight.dtype
            outputs = [self._heads(query.to(dtype)) for query in queries]
            words = memory[:, pixels.shape[1] :].to(dtype)
            proj_tokens = None if self.align_tokens is None else _unit(self.align_tokens, words)
            if labels is not None and "boxes" in labels:
                loss, terms = grounding_loss(outputs, proj_tokens, labels, self.config)
                terms = {name: term.detach() for name, term in terms.items()}
        auxiliary = tuple(outputs[:-1]) if self.config.auxiliary_loss else None
        return MdetrOutput(
            loss=loss, loss_terms=terms, **outputs[-1], proj_tokens=proj_tokens, auxiliary_outputs=auxiliary
        )

    def _encode_image(
        self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens (images, pixels, hidden), their padding mask (False on padding), and their positions."""
        dtype = self.image_projection.weight.dtype
        features = self.backbone(pixel_values.to(dtype))
        if pixel_mask is None:
            pixel_mask = torch.ones_like(pixel_values[:, 0])
        mask = nn.functional.interpolate(pixel_mask[:, None].float(), features.shape[-2:])[:, 0].bool()
        pixels = self.image_projection(features.flatten(2).transpose(1, 2))
        return pixels, mask.flatten(1), sine_positions(mask, self.config.hidden_size).to(dtype)

    def _decode(self, memory: torch.Tensor, position: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        """The last layer's queries (B, queries, hidden), or with `auxiliary_loss` those of all, first to last."""
        query_position = self.query_position.weight
        query = torch.zeros_like(query_position).expand(len(memory), -1, -1)
        queries = []
        for layer in self.decoder:
            query = layer(query, query_position, memory, position, mask)
            queries.append(query)
        return [self.decoder_norm(query) for query in (queries if self.config.auxiliary_loss else queries[-1:])]

    def _heads(self, query: torch.Tensor) -> LayerOutput:
        """(B, queries, hidden) -> the outputs of the heads."""
        output = {"logits": self.token_head(query), "pred_boxes": self.box_head(query).sigmoid()}
        if self.final_head is not None:
            output["pred_isfinal"] = self.final_head(query)
        if self.align_queries is not None:
            output["proj_queries"] = _unit(self.align_queries, query)
        return output


class Backbone(ResNet):
    """A ResNet that gives the stride-32 feature map; with `freeze_stem`, stem and first stage are not trained."""

    def __init__(self, config: MdetrConfig) -> None:
        super().__init__(config.stem_channels, config.bottleneck_channels, config.stage_channels, config.depths)
        self.freeze_stem = config.freeze_stem

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(images, 3, height, width) -> (images, channels, height / 32, width / 32), both rounded up."""
        # not by `requires_grad` alone, which `from_pretrained` does not restore
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_stem):
            x = self.layers[0](self.stem(pixel_values))
        for layer in self.layers[1:]:
            x = layer(x)
        return x.permute(0, 3, 1, 2)

    def train(self, mode: bool = True) -> "Backbone":
        """As the parent; DistributedDataParallel must not wait for gradients of what is not trained."""
        if self.freeze_stem:
            for module in (self.conv1, self.layers[0]):
                module.requires_grad_(False)
        return super().train(mode)


def _unit(head: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Projections of length 1."""
    return nn.functional.normalize(head(x), dim=-1)


MdetrModel.register_for_auto_class("AutoModel")
