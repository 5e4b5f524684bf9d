"""How ReLA is trained and measured, by train.py or by transformers' Trainer.

    metrics = StreamingMetrics(evaluate.load("ME/gres"))  # with boxes: (gres, evaluate.load("ME/grec"), processor)
    collator = RelaCollator(processor)  # to train an instance branch: RelaCollator(processor, instances=True)
    arguments = TrainingArguments(OUT, remove_unused_columns=False, label_names=["labels"], batch_eval_metrics=True)
    trainer = Trainer(
        model, arguments, collator, train_dataset, eval_dataset, processing_class=processor,
        compute_metrics=metrics, preprocess_logits_for_metrics=metrics.reduce,
    )

Published: AdamW at 1e-5 with decay 0.05, norms and embeddings undecayed (the original train_net.py).
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

import torch
from transformers import AutoTokenizer, BertTokenizer, EvalPrediction, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import ModelOutput

from .configuration_rela import RelaConfig
from .image_processing_rela import RelaImageProcessor
from .modeling_rela import RelaModel, RelaOutput
from .pretrained_rela import load_backbone, load_text_encoder
from .processing_rela import RelaProcessor


def new_model(
    fields: dict[str, object],
    sentences: Callable[[], Iterable[str]],
    tokenizer: str | None = None,
    backbone: str | None = None,
    image_size: int = 480,
) -> tuple[RelaModel, RelaProcessor]:
    """A model to train from the start, and its processor.

    Args:
        fields: of `RelaConfig`.
        sentences: gives the training sentences, from which a tokenizer is made when none is named.
        tokenizer: BERT folder or Hub id, for the tokenizer and the text weights.
        backbone: file, folder or Hub id with pretrained weights of the vision trunk.
        image_size: side in pixels of the square that images are squashed to.

    Raises:
        ValueError: a field that `RelaConfig` does not have, or a value it refuses.
    """
    words = AutoTokenizer.from_pretrained(tokenizer) if tokenizer else word_tokenizer(sentences())
    if not tokenizer:
        fields = {**fields, "text_config": {**fields.get("text_config", {}), "vocab_size": len(words)}}
    refuse_unknown(fields, RelaConfig)
    model = RelaModel(RelaConfig(**fields))
    if tokenizer:
        load_text_encoder(model, tokenizer)
    if backbone:
        load_backbone(model, backbone)
    image_processor = RelaImageProcessor(size={"height": image_size, "width": image_size})
    return model, RelaProcessor(image_processor, words)


def refuse_unknown(fields: dict[str, object], config_class: type) -> None:
    """Raises ValueError for a field that the configuration does not have."""
    if unknown := sorted(set(fields) - set(config_class.__dataclass_fields__)):
        raise ValueError(f"model: {unknown[0]!r} is not a field of {config_class.__name__}")


def word_tokenizer(sentences: Iterable[str], max_words: int = 4000) -> PreTrainedTokenizerBase:
    """A BERT tokenizer of the most frequent words, with single characters for all others.

    (The WordPiece trainer of `tokenizers` gives another vocabulary at every run.)
    """
    rules = BertTokenizer().backend_tokenizer
    words = Counter()
    for sentence in sentences:
        pieces = rules.pre_tokenizer.pre_tokenize_str(rules.normalizer.normalize_str(sentence))
        words.update(word for word, _ in pieces)
    characters = sorted(set("".join(words)))
    frequent = sorted((word for word in words if len(word) > 1), key=lambda word: (-words[word], word))[:max_words]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *characters, *("##" + character for character in characters), *frequent]
    return BertTokenizer(vocab={piece: index for index, piece in enumerate(pieces)})


def parameter_groups(
    model: torch.nn.Module, learning_rate: float, weight_decay: float, tower_rates: dict[str, float] | None = None
) -> list[dict[str, object]]:
    """As the original train_net.py: norms, embeddings and position tables without decay, BERT's norms with it.

    Args:
        model: parameters that do not require gradients are left out.
        learning_rate: peak of every group's rate, its "lr".
        weight_decay: of all other parameters.
        tower_rates: other peaks for parameters whose names begin so; each makes groups of its own.
    """
    rates = {"": learning_rate, **(tower_rates or {})}
    members: dict[tuple[str, bool], list[torch.nn.Parameter]] = {}
    for path, module in model.named_modules():
        norm = isinstance(module, torch.nn.LayerNorm | torch.nn.GroupNorm) and not path.startswith("text_encoder")
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                kept = norm or isinstance(module, torch.nn.Embedding) or name == "relative_position_bias_table"
                tower = max((prefix for prefix in rates if f"{path}.{name}".startswith(prefix)), key=len)
                members.setdefault((tower, kept), []).append(parameter)
    return [
        {"params": parameters, "lr": rates[tower], "weight_decay": 0.0 if kept else weight_decay}
        for (tower, kept), parameters in sorted(members.items(), key=lambda item: item[0])
    ]


def rate_factor(
    schedule: str, step: int, num_steps: int, warmup_steps: int = 0, decay_steps: Sequence[int] = (), restart: int = 0
) -> float:
    """What the peak learning rate is multiplied with at `step`: a pure function, so that nothing has to be saved.

    Args:
        schedule: "constant", "cosine" to 0, "step" (x 0.1 at each of `decay_steps`), or "linear_with_warmup", as
            MDETR's text encoder learns: up during a hundredth of all steps, then down to 0.
        num_steps: of the whole training.
        warmup_steps: of a linear rise from 0, but for "linear_with_warmup".
        decay_steps: see `schedule`.
        restart: step at which the rise is repeated.
    """
    if schedule == "linear_with_warmup":
        rise = round(0.01 * num_steps)
        return step / rise if step < rise else max(0.0, (num_steps - step) / max(1, num_steps - rise))
    since = step - restart if step >= restart else step
    factor = min(1.0, (since + 1) / max(1, warmup_steps))
    if schedule == "cosine":
        return factor * 0.5 * (1 + math.cos(math.pi * step / num_steps))
    if schedule == "step":
        return factor * 0.1 ** sum(step >= decay for decay in decay_steps)
    return factor


class StreamingMetrics:
    """Scores for Trainer with `batch_eval_metrics=True`: a few numbers per sentence, never masks, are kept.

    Args:
        gres: the GRES metric as `evaluate.load` gives it; None for a model that answers with boxes alone.
        grec: the GREC metric, for a model that gives boxes; its scores are named "grec/F1_score" and so on.
        processor: the model's, with `grec`: it puts boxes into pixels.
    """

    output_class: ClassVar[type[ModelOutput]] = RelaOutput
    output_names: ClassVar[tuple[str, ...]] = ("pred_masks", "no_target_logits", "pred_boxes", "pred_scores")

    def __init__(
        self, gres: object | None = None, grec: object | None = None, processor: ProcessorMixin | None = None
    ) -> None:
        self.metrics = {name: metric for name, metric in (("gres", gres), ("grec", grec)) if metric is not None}
        self.processor = processor
        self.restart()

    def restart(self) -> None:
        """Forget all sentences."""
        self.accumulators = {name: metric.accumulator() for name, metric in self.metrics.items()}

    @torch.no_grad()
    def reduce(self, outputs: tuple[torch.Tensor, ...], labels: dict[str, torch.Tensor]) -> torch.Tensor:
        """What is kept of a batch, on its own device, to be gathered: Trainer's `preprocess_logits_for_metrics`.

        Args:
            outputs: as the model gives them to Trainer.
            labels: of the collator; masks are compared at the size of its "masks", boxes in pixels of the originals.

        Returns:
            (B, n) float64. Of masks four numbers: pixels of prediction AND truth, of either, of the prediction, and
            the no-target probability. Of boxes five each: x0, y0, x1, y1, score, -1 where there is none.
        """
        outputs = self.output_class(**dict(zip(self.output_names, outputs)))
        parts = []
        if "gres" in self.metrics:
            masks, truth = outputs.pred_masks.float(), labels["masks"] > 0.5
            margin = masks[:, 1:] - masks[:, :1]
            found = torch.nn.functional.interpolate(margin, truth.shape[-2:], mode="bilinear")[:, 0] > 0
            parts += [(found & truth).sum((1, 2)), (found | truth).sum((1, 2)), found.sum((1, 2))]
            parts += [outputs.no_target_logits.float().softmax(-1)[:, 1]]
        if "grec" in self.metrics:
            answers = self.processor.post_process_grec(outputs, threshold=0.0, target_sizes=labels["sizes"])
            packed = outputs.pred_boxes.new_full((*outputs.pred_boxes.shape[:2], 5), -1.0, dtype=torch.float64)
            for row, answer in zip(packed, answers, strict=True):
                row[: len(answer["scores"])] = torch.cat([answer["boxes"], answer["scores"][:, None]], dim=1)
            parts += packed.flatten(1).unbind(1)
        return torch.stack([part.double() for part in parts], dim=1)

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Take in a batch; after the last one give the scores of all and start afresh."""
        kept = torch.as_tensor(prediction.predictions)
        labels = {name: torch.as_tensor(value) for name, value in prediction.label_ids.items()}
        if "gres" in self.metrics:
            self._add_masks(kept[:, :4], labels)
        if "grec" in self.metrics:
            boxes = kept[:, 4 if "gres" in self.metrics else 0 :].unflatten(1, (-1, 5))
            self._add_boxes(boxes.float(), labels)
        if not compute_result:
            return {}
        scores = {name: accumulator.compute() for name, accumulator in self.accumulators.items()}
        self.restart()
        return flat(scores)

    def _add_masks(self, counts: torch.Tensor, labels: dict[str, torch.Tensor]) -> None:
        self.accumulators["gres"].add_counts(
            intersection=counts[:, 0].long().tolist(),
            union=counts[:, 1].long().tolist(),
            predicted=counts[:, 2].long().tolist(),
            pixels=[labels["masks"][0].numel()] * len(counts),
            no_target_score=counts[:, 3].tolist(),
            no_target=labels["no_target"].tolist(),
            sent_id=labels["sent_id"].tolist(),
        )

    def _add_boxes(self, boxes: torch.Tensor, labels: dict[str, torch.Tensor]) -> None:
        found = [row[row[:, 4] >= 0] for row in boxes]
        truths = [row[row[:, 2] >= 0].numpy() for row in labels["target_boxes"]]
        sent_ids = labels["sent_id"].tolist()
        self.accumulators["grec"].add_batch(
            predictions=[{"boxes": row[:, :4].numpy(), "scores": row[:, 4].numpy()} for row in found],
            references=[{"boxes": truth, "sent_id": i} for truth, i in zip(truths, sent_ids, strict=True)],
        )


def flat(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    """One level of names: those of GRES as they are, those of GREC after "grec/"."""
    grec = {f"grec/{name}": value for name, value in scores.get("grec", {}).items()}
    return {**scores.get("gres", {}), **grec}
