"""ReLA: segments what a sentence refers to in an image, one object, several or none.

    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    outputs = model(**processor(images=[image], text=["all red shapes"], return_tensors="pt"))
    processor.post_process_referring_segmentation(outputs, target_sizes=[(480, 640)])

Source: "GRES: Generalized Referring Expression Segmentation" (CVPR 2023).
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from .attention import text_mask
from .configuration_rela import RelaConfig
from .fusion_rela import LanguageGate, full_precision
from .image_index import check_image_index, per_sentence, refuse_data_parallel
from .instances_rela import Choice, InstanceChooser, ObjectFinder, Objects
from .loss_instances_rela import instance_loss
from .loss_rela import category_loss, referring_loss
from .pipeline_referring import ReferringPipeline  # noqa: F401 (registers the task and is saved with the model)
from .pixel_decoder_rela import DeformableAttention, PixelDecoder
from .region_decoder_rela import Heads, RegionDecoder, RegionLanguage, RegionOutput
from .resnet import FrozenBatchNorm
from .swin_rela import WindowAttention, relative_position_index
from .towers_rela import text_encoder
from .vision_rela import CategoryHead, VisionEncoder

MAX_LOGIT = 12.0  # two logits are clamped to +-MAX_LOGIT before they are added
MIN_RELEVANCE = -80.0  # logit whose exp is still a normal number in fp32


@dataclass
class RelaOutput(ModelOutput):
    """Outputs of `RelaModel` for B sentences; class 1 of every pair is the target (of `no_target_logits`: no target).

    Args:
        loss: weighted sum, where labels were given.
        loss_terms: detached unweighted terms: "mask", "minimap", "no_target", "category", and the instance branch's
            "centre", "box", "giou", "instance_mask", "relevance", "count".
        pred_masks: (B, 2, height / 4, width / 4) logits; with `merge_instances` those of the chosen objects added.
        no_target_logits: (B, 2); with `merge_instances` the logit added that none of the objects is relevant.
        minimap_logits: (B, regions, 2).
        category_logits: (images, categories + 1, height / 4, width / 4), where the model has a category head.
        pred_boxes: (B, queries, 4) cxcywh relative to the processed image, 0..1; like the four below where the model
            has an instance branch.
        pred_scores: (B, queries), the probability that the sentence refers to the object: its relevance, given that
            any object is relevant, times (1 - no-target score).
        relevance_logits: (B, queries), each object's own, before the no-target score.
        instance_masks: (B, queries, height / 4, width / 4) logits of each object's own mask.
        count_logits: (B, max_count + 1), number of targets, the last one "or more"; with a counting head.
        text_hidden_state: (B, tokens, text channels).
        vision_hidden_states: backbone features at strides 4, 8, 16, 32, (B, channels, height, width); one per image
            instead of per sentence where the backbone ignores language.
        pixel_hidden_states: pixel decoder memory at strides 32, 16, 8, likewise.
        mask_features: (B, mask channels, height / 4, width / 4), likewise.

    The last four only with `output_hidden_states=True`. A model with an instance branch gives no answers (`pred_masks`
    to `count_logits`) in training mode with labels, where nothing reads them.
    """

    loss: torch.Tensor | None = None
    loss_terms: dict[str, torch.Tensor] | None = None
    pred_masks: torch.Tensor | None = None
    no_target_logits: torch.Tensor | None = None
    minimap_logits: torch.Tensor | None = None
    category_logits: torch.Tensor | None = None
    pred_boxes: torch.Tensor | None = None
    pred_scores: torch.Tensor | None = None
    relevance_logits: torch.Tensor | None = None
    instance_masks: torch.Tensor | None = None
    count_logits: torch.Tensor | None = None
    text_hidden_state: torch.Tensor | None = None
    vision_hidden_states: tuple[torch.Tensor, ...] | None = None
    pixel_hidden_states: tuple[torch.Tensor, ...] | None = None
    mask_features: torch.Tensor | None = None


class RelaPreTrainedModel(PreTrainedModel):
    """Initialisation, and what transformers needs to know of the network."""

    config_class = RelaConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    # Loaded in half precision, these stay in fp32: rounding errors in words, sampling points and mask products are
    # enlarged on the way to the mask, and these modules are a small part of the computation.
    _keep_in_fp32_modules_strict = ("text_encoder", "pixel_decoder", "heads", "object_finder", "instance_chooser")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            if isinstance(module, nn.Linear):
                init.xavier_uniform_(module.weight)
            else:
                init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        elif isinstance(module, nn.LayerNorm | nn.GroupNorm | FrozenBatchNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            if isinstance(module, FrozenBatchNorm):
                init.zeros_(module.running_mean)
                init.ones_(module.running_var)
        elif isinstance(module, WindowAttention):
            init.trunc_normal_(module.relative_position_bias_table, std=0.02)
            init.copy_(module.relative_position_index, relative_position_index(module.window))
        elif isinstance(module, RegionLanguage):
            init.zeros_(module.region_gate)
        elif isinstance(module, InstanceChooser):
            init.ones_(module.region_weight)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Initialise as transformers does, then the modules it skips in custom code: those without own parameters."""
        super().initialize_weights()
        for module in self.modules():
            if isinstance(module, LanguageGate):
                module.reset(published=self.config.language_gate == "published")
            elif isinstance(module, DeformableAttention | Heads | ObjectFinder):
                module.reset()


class RelaModel(RelaPreTrainedModel):
    """The whole network: a text encoder, a vision trunk with language fusion, a pixel decoder, a region decoder; a
    category head and an instance branch where the configuration has them."""

    def __init__(self, config: RelaConfig) -> None:
        super().__init__(config)
        self.text_encoder = text_encoder(config.text_config)
        self.vision_encoder = VisionEncoder(config)
        self.pixel_decoder = PixelDecoder(config)
        self.region_decoder = RegionDecoder(config)
        self.category_head = CategoryHead(config) if config.num_categories else None
        self.object_finder = ObjectFinder(config) if config.num_instance_queries else None
        self.instance_chooser = InstanceChooser(config) if config.num_instance_queries else None
        self.post_init()
        self.vision_encoder.check_gates()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_encoder.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        labels: dict[str, torch.Tensor] | None = None,
        output_hidden_states: bool = False,
    ) -> RelaOutput:
        """Masks and no-target logits for B sentences about a number of images.

        Args:
            pixel_values: (images, 3, height, width), normalised.
            input_ids: (B, tokens); None trains the vision trunk alone on the categories.
            attention_mask: (B, tokens), 1 for words and 0 for padding; None when nothing is padding.
            image_index: (B,) which image each sentence is about; None when sentence b is about image b. The work that
                depends on the image alone is done once per image.
            labels: "masks" (B, height, width) merged target; "no_target" (B,) bool; optional "categories" (images,
                height, width) category index of each pixel, 0 for none and -100 to ignore; optional, for the instance
                branch, those described in loss_instances_rela.py.
            output_hidden_states: also return the text, backbone and pixel decoder features.

        Raises:
            ValueError: without both sentences and categories; for sentences and images that are not one to one without
                an `image_index`; with categories in the labels and no category head.
        """
        refuse_data_parallel(self)
        if input_ids is None:
            return self._vision_only(pixel_values, labels)
        check_image_index(input_ids.shape[0], pixel_values.shape[0], image_index)
        # BERT takes its mask ready made; other encoders make their own, such as those with local attention
        is_bert = self.config.text_config.model_type == "bert"
        mask = text_mask(attention_mask, _dtype(self.text_encoder)) if is_bert else attention_mask
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        text = self.text_encoder(input_ids, attention_mask=mask).last_hidden_state
        dtype = _dtype(self.vision_encoder)
        features, stages = self.vision_encoder(pixel_values.to(dtype), text.to(dtype), attention_mask, image_index)
        with torch.autocast(pixel_values.device.type, enabled=False):
            mask_features, levels = self.pixel_decoder([x.to(_dtype(self.pixel_decoder)) for x in features])
        if not self.config.language_fusion:
            mask_features, *levels = (per_sentence(x, image_index) for x in (mask_features, *levels))
        dtype, every_layer = _dtype(self.region_decoder), self.config.auxiliary_loss and labels is not None
        levels, text = [x.to(dtype) for x in levels], text.to(dtype)
        regions = self.region_decoder(levels, mask_features, text, attention_mask, every_layer)
        category_logits = self._categories(stages)
        objects, choice = None, None
        if self.object_finder is not None:
            objects = self._objects(pixel_values, stages)
            with torch.autocast(pixel_values.device.type, enabled=False):
                words = text.to(_dtype(self.instance_chooser))
                choice = self.instance_chooser(objects, regions[-1], mask_features, words, attention_mask, image_index)
        loss, terms = None, None
        learns_objects = self.training and objects is not None and labels is not None
        if labels is not None:
            loss, terms = referring_loss(regions, labels["masks"], labels["no_target"], self.config)
            if "categories" in labels:
                terms["category"] = self._category_loss(category_logits, labels["categories"])
                loss = loss + self.config.category_loss_weight * terms["category"]
            if objects is not None and "object_boxes" in labels:
                instance, instance_terms = instance_loss(objects, choice, labels, image_index, self.config)
                loss, terms = loss + instance, terms | instance_terms
            loss, terms = loss * self.config.loss_scale, {name: term.detach() for name, term in terms.items()}
        return RelaOutput(
            loss=loss,
            loss_terms=terms,
            **({} if learns_objects else self._answers(regions[-1], objects, choice, image_index)),
            minimap_logits=regions[-1].minimap,
            category_logits=category_logits,
            text_hidden_state=text if output_hidden_states else None,
            vision_hidden_states=tuple(features) if output_hidden_states else None,
            pixel_hidden_states=tuple(levels) if output_hidden_states else None,
            mask_features=mask_features if output_hidden_states else None,
        )

    def _vision_only(self, pixel_values: torch.Tensor, labels: dict[str, torch.Tensor] | None) -> RelaOutput:
        """Train the vision trunk, and the object finder where there is one, without sentences."""
        labels = labels or {}
        has_boxes = self.object_finder is not None and "object_boxes" in labels
        if "categories" not in labels and not has_boxes:
            raise ValueError(
                'input_ids is None: pass sentences, or labels["categories"] (or with an instance branch '
                'labels["object_boxes"]) to train the vision trunk alone'
            )
        stages = self.vision_encoder.stages(pixel_values.to(_dtype(self.vision_encoder)))
        logits, loss, terms = self._categories(stages), pixel_values.new_zeros(()), {}
        if "categories" in labels:
            terms["category"] = self._category_loss(logits, labels["categories"])
            loss = loss + self.config.category_loss_weight * terms["category"]
        if has_boxes:
            objects = self._objects(pixel_values, stages)
            instance, instance_terms = instance_loss(objects, None, labels, None, self.config)
            loss, terms = loss + instance, terms | instance_terms
        terms = {name: term.detach() for name, term in terms.items()}
        return RelaOutput(loss=loss * self.config.loss_scale, loss_terms=terms, category_logits=logits)

    def _objects(self, pixel_values: torch.Tensor, stages: list[torch.Tensor] | None) -> Objects:
        """The objects of the images. Where gates are open, the trunk runs once more, without language."""
        if stages is None:
            stages = self.vision_encoder.stages(pixel_values.to(_dtype(self.vision_encoder)))
        with torch.autocast(pixel_values.device.type, enabled=False):
            return self.object_finder([x.to(_dtype(self.object_finder)) for x in stages])

    def _answers(
        self, regions: RegionOutput, objects: Objects | None, choice: Choice | None, image_index: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Masks, no-target logits, and the outputs of the instance branch, by their names in `RelaOutput`."""
        if objects is None:
            return {"pred_masks": regions.masks, "no_target_logits": regions.no_target}
        relevance, masks = full_precision(choice.relevance[-1]), per_sentence(objects.masks, image_index)
        merged, no_target = regions.masks, regions.no_target
        # log-probabilities that no object is relevant and that any is; then each object's probability given any
        relevance = relevance.clamp(min=MIN_RELEVANCE)
        none = nn.functional.logsigmoid(-relevance).sum(1, keepdim=True)
        some = (-none.expm1()).log()
        given_any = (nn.functional.logsigmoid(relevance) - some).exp()
        if self.config.merge_instances:
            chosen = masks.masked_fill(given_any[..., None, None] <= 0.5, -MAX_LOGIT).amax(1)
            merged, no_target = _sum(_margin(merged), chosen), _sum(_margin(no_target), (none - some)[:, 0])
        return {
            "pred_masks": merged,
            "no_target_logits": no_target,
            "pred_boxes": per_sentence(objects.boxes, image_index),
            "pred_scores": given_any * (1 - full_precision(no_target).softmax(-1)[:, 1:]),
            "relevance_logits": choice.relevance[-1],
            "instance_masks": masks,
            "count_logits": choice.counts,
        }

    def _categories(self, stages: list[torch.Tensor] | None) -> torch.Tensor | None:
        return None if self.category_head is None or stages is None else self.category_head(stages)

    def _category_loss(self, logits: torch.Tensor | None, categories: torch.Tensor) -> torch.Tensor:
        if logits is None:
            raise ValueError(
                'labels["categories"] given to a model without language-free category features '
                f"(num_categories={self.config.num_categories}, gates "
                f"{'closed' if self.vision_encoder.gates_closed else 'open'}): set num_categories or omit categories"
            )
        return category_loss(logits, categories)


def _margin(pair: torch.Tensor) -> torch.Tensor:
    """Logits of two classes (B, 2, ...) -> the logit of the second, (B, ...)."""
    return full_precision(pair[:, 1] - pair[:, 0])


def _sum(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The sum of two binary logits (B, ...), each clamped, as logits of two classes (B, 2, ...)."""
    total = first.clamp(-MAX_LOGIT, MAX_LOGIT) + second.clamp(-MAX_LOGIT, MAX_LOGIT)
    return torch.stack([-total / 2, total / 2], dim=1)


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


RelaModel.register_for_auto_class("AutoModel")
