"""GRES and GREC scores from model outputs, for transformers' Trainer or any other loop.

metrics = processor.trainer_metrics(evaluate.load("ME/gres"), evaluate.load("ME/grec"))
arguments = TrainingArguments(OUT, remove_unused_columns=False, label_names=["labels"], batch_eval_metrics=True)
trainer = Trainer(
    model, arguments, processor.collator(model.config, training=True), train_dataset, eval_dataset,
    processing_class=processor, compute_metrics=metrics, preprocess_logits_for_metrics=metrics.reduce,
)
"""

from collections.abc import Iterable, Mapping

import torch
from transformers import EvalPrediction, ProcessorMixin

MASK_COUNTS = 4  # columns of `reduce` for a mask
BOX_COUNTS = 5  # columns of `reduce` for a box
NO_BOX = -1.0


class TrainerMetrics:
    """Scores for Trainer with `batch_eval_metrics=True`; it stores a few numbers per sentence, never masks.

    Args:
        processor: of the model, a `ReferringProcessor`.
        gres: the GRES metric as `evaluate.load` gives it; used where the model gives masks.
        grec: the GREC metric; used where the model gives boxes. Its scores are named "grec/F1_score" and so on.
    """

    def __init__(self, processor: ProcessorMixin, gres: object | None = None, grec: object | None = None) -> None:
        self.processor = processor
        self.metrics = {name: metric for name, metric in (("gres", gres), ("grec", grec)) if metric is not None}
        self.restart()

    def restart(self) -> None:
        """Drop all sentences."""
        self.accumulators = {name: metric.accumulator() for name, metric in self.metrics.items()}

    @torch.no_grad()
    def reduce(
        self, outputs: Mapping[str, torch.Tensor] | tuple[torch.Tensor, ...], labels: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """The numbers of a batch of B sentences, on its own device: Trainer's `preprocess_logits_for_metrics`.

        Args:
            outputs: of the model, or the tuple that Trainer makes of them.
            labels: of the collator; masks are compared at the size of its "masks", boxes in pixels of the originals.

        Returns:
            (B, n) float64. Of masks four numbers: pixels of prediction AND truth, of either, of the prediction, and
            the no-target score. Then of boxes five each: x0, y0, x1, y1, score, -1 where there is none.
        """
        if isinstance(outputs, tuple):
            outputs = dict(zip(self.processor.output_names, outputs))
        parts = [labels["sizes"].new_zeros(len(labels["sizes"]), 0, dtype=torch.float64)]
        if "gres" in self.metrics and "pred_masks" in outputs:
            truth = labels["masks"] > 0.5
            logits = self.processor.mask_logits(outputs)[:, None]
            predicted = torch.nn.functional.interpolate(logits, truth.shape[-2:], mode="bilinear")[:, 0] > 0
            pixels = [part.sum((1, 2)) for part in (predicted & truth, predicted | truth, predicted)]
            scores = self.processor.no_target_scores(outputs)
            parts.append(torch.stack([part.double() for part in (*pixels, scores)], dim=1))
        if "grec" in self.metrics and "pred_boxes" in outputs:
            parts.append(self._pack_boxes(outputs, labels["sizes"]).flatten(1))
        return torch.cat(parts, dim=1)

    def _pack_boxes(self, outputs: Mapping[str, torch.Tensor], sizes: torch.Tensor) -> torch.Tensor:
        """All boxes of each sentence and their scores: (B, queries, 5)."""
        answers = self.processor.post_process_referring_detection(outputs, threshold=0.0, target_sizes=sizes)
        boxes = outputs["pred_boxes"]
        packed = boxes.new_full((*boxes.shape[:2], BOX_COUNTS), NO_BOX, dtype=torch.float64)
        for row, answer in zip(packed, answers, strict=True):
            row[: len(answer["scores"])] = torch.cat([answer["boxes"], answer["scores"][:, None]], dim=1)
        return packed

    def add(self, counts: torch.Tensor, labels: dict[str, torch.Tensor]) -> None:
        """Add a batch: what `reduce` gave, gathered or not, and the collator's labels."""
        counts = counts.cpu()  # one copy from the device
        masks = MASK_COUNTS if "gres" in self.metrics and "masks" in labels else 0
        if masks:
            self._add_masks(counts[:, :masks], labels)
        if counts.shape[1] > masks:
            self._add_boxes(counts[:, masks:].unflatten(1, (-1, BOX_COUNTS)).float(), labels)

    def compute(self, expected: Iterable[int] | None = None) -> dict[str, dict[str, float]]:
        """Scores so far, "gres" and "grec", each where the model gives such answers.

        Args:
            expected: sentence ids; a sentence that is missing raises ValueError.
        """
        return {name: part.compute(expected=expected) for name, part in self.accumulators.items() if len(part)}

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Add a batch; after the last one return the scores of all batches and restart."""
        labels = {name: torch.as_tensor(value) for name, value in prediction.label_ids.items()}
        self.add(torch.as_tensor(prediction.predictions), labels)
        if not compute_result:
            return {}
        scores = self.compute()
        self.restart()
        return flat(scores)

    def _add_masks(self, counts: torch.Tensor, labels: dict[str, torch.Tensor]) -> None:
        columns = ("no_target", "sent_id", "image_id", "num_targets", "num_words")
        self.accumulators["gres"].add_counts(
            intersection=counts[:, 0].long().tolist(),
            union=counts[:, 1].long().tolist(),
            predicted=counts[:, 2].long().tolist(),
            pixels=[labels["masks"][0].numel()] * len(counts),
            no_target_score=counts[:, 3].tolist(),
            **{name: labels[name].tolist() for name in columns},
        )

    def _add_boxes(self, boxes: torch.Tensor, labels: dict[str, torch.Tensor]) -> None:
        predictions = [row[row[:, 4] >= 0].numpy() for row in boxes]
        # Padding is negative; a true box has its right edge in the image.
        targets = [row[row[:, 2] >= 0].numpy() for row in labels["target_boxes"].cpu()]
        ids = zip(labels["sent_id"].tolist(), labels["image_id"].tolist(), strict=True)
        self.accumulators["grec"].add_batch(
            predictions=[{"boxes": row[:, :4], "scores": row[:, 4]} for row in predictions],
            references=[
                {"boxes": target, "sent_id": sent_id, "image_id": image_id}
                for target, (sent_id, image_id) in zip(targets, ids, strict=True)
            ],
        )


def flat(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    """One level of names: those of GRES as they are, those of GREC after "grec/"."""
    grec = {f"grec/{name}": value for name, value in scores.get("grec", {}).items()}
    return {**scores.get("gres", {}), **grec}
