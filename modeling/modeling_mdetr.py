"""MDETR: boxes for whatever a sentence refers to in an image; the GREC baseline of gRefCOCO.

    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    outputs = model(**processor(images=[image], text=["all red shapes"], return_tensors="pt"))
    processor.post_process_grec(outputs, target_sizes=[(480, 640)])

Source: "MDETR: Modulated Detection for End-to-End Multi-Modal Understanding" (ICCV 2021).
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel, RobertaModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_mdetr import MdetrConfig
from .convolution_rela import FrozenBatchNorm
from .fusion_rela import per_sentence
from .loss_mdetr import Prediction, grounding_loss
from .resnet_mdetr import ResNet
from .transformer_mdetr import DecoderLayer, EncoderLayer, sine_positions


@dataclass
class MdetrOutput(ModelOutput):
    """What `MdetrModel` returns; B sentences.

    Args:
        loss: weighted sum over all layers, where labels were given.
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
    config_class = MdetrConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    # Loaded in half precision, the heads stay in fp32: half a number's digits are pixels of a box.
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
        self.backbone = ResNet(config)
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
            labels: as `loss_mdetr` describes them.

        Raises:
            ValueError: with more sentences than images and no `image_index`.
        """
        if image_index is None and len(input_ids) != len(pixel_values):
            raise ValueError(
                f"{len(input_ids)} sentences in input_ids and {len(pixel_values)} images in pixel_values: pass "
                "image_index, the position of each sentence's image"
            )
        pixels, seen, position = self._read_image(pixel_values, pixel_mask)
        pixels, seen, position = (per_sentence(x, image_index) for x in (pixels, seen, position))
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        words = self.text_encoder(input_ids, attention_mask=attention_mask).last_hidden_state
        words = self.text_dropout(self.text_norm(self.text_projection(words)))
        # Words have no position here: RoBERTa has told them apart.
        memory, position = torch.cat([pixels, words], dim=1), torch.cat([position, torch.zeros_like(words)], dim=1)
        seen = torch.cat([seen, attention_mask.bool()], dim=1)[:, None, None]  # (B, 1, 1, tokens of both kinds)
        for layer in self.encoder:
            memory = layer(memory, position, seen)
        queries = self._decode(memory, position, seen)
        loss, terms = None, None
        with torch.autocast(pixel_values.device.type, enabled=False):
            dtype = self.token_head.weight.dtype
            predictions = [self._predict(query.to(dtype)) for query in queries]
            words = memory[:, pixels.shape[1] :].to(dtype)
            proj_tokens = None if self.align_tokens is None else _unit(self.align_tokens, words)
            if labels is not None:
                loss, terms = grounding_loss(predictions, proj_tokens, labels, self.config)
                terms = {name: term.detach() for name, term in terms.items()}
        auxiliary = tuple(predictions[:-1]) if self.config.auxiliary_loss else None
        return MdetrOutput(
            loss=loss, loss_terms=terms, **predictions[-1], proj_tokens=proj_tokens, auxiliary_outputs=auxiliary
        )

    def _read_image(
        self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens (images, pixels, hidden), which of them are no padding, and their positions."""
        dtype = self.image_projection.weight.dtype
        features = self.backbone(pixel_values.to(dtype))
        if pixel_mask is None:
            pixel_mask = torch.ones_like(pixel_values[:, 0])
        seen = nn.functional.interpolate(pixel_mask[:, None].float(), features.shape[-2:])[:, 0].bool()
        pixels = self.image_projection(features.flatten(2).transpose(1, 2))
        return pixels, seen.flatten(1), sine_positions(seen, self.config.hidden_size).to(dtype)

    def _decode(self, memory: torch.Tensor, position: torch.Tensor, seen: torch.Tensor) -> list[torch.Tensor]:
        """The last layer's queries (B, queries, hidden), or with `auxiliary_loss` those of all, first to last."""
        place = self.query_position.weight
        query = torch.zeros_like(place).expand(len(memory), -1, -1)
        queries = []
        for layer in self.decoder:
            query = layer(query, place, memory, position, seen)
            queries.append(query)
        return [self.decoder_norm(query) for query in (queries if self.config.auxiliary_loss else queries[-1:])]

    def _predict(self, query: torch.Tensor) -> Prediction:
        """(B, queries, hidden) -> what the heads say."""
        prediction = {"logits": self.token_head(query), "pred_boxes": self.box_head(query).sigmoid()}
        if self.final_head is not None:
            prediction["pred_isfinal"] = self.final_head(query)
        if self.align_queries is not None:
            prediction["proj_queries"] = _unit(self.align_queries, query)
        return prediction


def _unit(head: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.normalize(head(x), dim=-1)


MdetrModel.register_for_auto_class("AutoModel")
