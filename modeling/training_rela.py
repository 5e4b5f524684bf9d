"""How ReLA is trained and measured, by train.py or by transformers' Trainer.

    collator, metrics = RelaCollator(processor), StreamingMetrics(evaluate.load("ME/gres"))
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

import torch
from transformers import AutoTokenizer, BertTokenizer, EvalPrediction, PreTrainedTokenizerBase

from .configuration_rela import RelaConfig
from .image_processing_rela import RelaImageProcessor
from .modeling_rela import RelaModel
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
    """GRES scores for Trainer with `batch_eval_metrics=True`: a few numbers per sentence, never masks, are kept.

    Args:
        gres: the GRES metric as `evaluate.load` gives it.
    """

    def __init__(self, gres: object) -> None:
        self.accumulator_class = gres.accumulator
        self.accumulator = gres.accumulator()

    @staticmethod
    @torch.no_grad()
    def reduce(outputs: tuple[torch.Tensor, ...], labels: dict[str, torch.Tensor]) -> torch.Tensor:
        """Counts of a batch on its own device, to be gathered: Trainer's `preprocess_logits_for_metrics`.

        Args:
            outputs: `pred_masks` and `no_target_logits` first, as `RelaModel` gives them to Trainer.
            labels: "masks" (B, height, width), at whose size masks are compared.

        Returns:
            (B, 4) float64: pixels of prediction AND truth, of either, of the prediction; the no-target probability.
        """
        masks, truth = outputs[0].float(), labels["masks"] > 0.5
        margin = masks[:, 1:] - masks[:, :1]
        found = torch.nn.functional.interpolate(margin, truth.shape[-2:], mode="bilinear")[:, 0] > 0
        counts = [(found & truth).sum((1, 2)), (found | truth).sum((1, 2)), found.sum((1, 2))]
        return torch.stack([*counts, outputs[1].float().softmax(-1)[:, 1]], dim=1).double()

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Take in a batch; after the last one give the scores of all and start afresh."""
        counts, labels = torch.as_tensor(prediction.predictions), prediction.label_ids
        truth = torch.as_tensor(labels["masks"])
        self.accumulator.add_counts(
            intersection=counts[:, 0].long().tolist(),
            union=counts[:, 1].long().tolist(),
            predicted=counts[:, 2].long().tolist(),
            pixels=[truth[0].numel()] * len(truth),
            no_target_score=counts[:, 3].tolist(),
            no_target=torch.as_tensor(labels["no_target"]).tolist(),
            sent_id=torch.as_tensor(labels["sent_id"]).tolist(),
        )
        if not compute_result:
            return {}
        scores, self.accumulator = self.accumulator.compute(), self.accumulator_class()
        return scores
