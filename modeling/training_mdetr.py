"""How MDETR is fine-tuned: three learning rates, two schedules, and a running average of the weights.

    optimizer = torch.optim.AdamW(parameter_groups(model))
    schedule = fine_tuning_schedule(optimizer, num_steps, decay_steps=[3 * steps_per_epoch])
    average = weight_average(model)
    for batch in batches:
        ...; optimizer.step(); schedule.step(); average.update_parameters(model)
    average.module.save_pretrained(OUT)

The published fine-tuning on gRefCOCO runs for 5 epochs of 4 sentences per device and step, clips gradients to 0.1,
drops after 3 epochs and is measured with the average. Source: the original main.py and util/optim.py.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import AutoTokenizer

from .configuration_mdetr import MdetrConfig
from .image_processing_mdetr import MdetrImageProcessor
from .modeling_mdetr import MdetrModel, MdetrOutput
from .processing_mdetr import MdetrProcessor
from .training_rela import StreamingMetrics as RelaStreamingMetrics
from .training_rela import rate_factor, refuse_unknown, word_tokenizer

TOWER_RATES = {"backbone": 1e-5, "text_encoder": 1e-5}


def new_model(
    fields: dict[str, object],
    sentences: Callable[[], Iterable[str]],
    tokenizer: str | None = None,
    backbone: str | None = None,
    image_size: int = 800,
) -> tuple[MdetrModel, MdetrProcessor]:
    """A model to train from the start, and its processor.

    Args:
        fields: of `MdetrConfig`.
        sentences: gives the training sentences, from which a tokenizer is made when none is named.
        tokenizer: RoBERTa folder or Hub id, for the tokenizer and the text weights.
        backbone: refused: the published training starts from a whole MDETR checkpoint.
        image_size: shorter side of the images in pixels; the longer one is at most 5/3 of it.

    Raises:
        ValueError: a field that `MdetrConfig` does not have, or a value it refuses.
    """
    if backbone:
        raise ValueError(f"backbone is {backbone!r}: MDETR starts from a whole checkpoint (--checkpoint)")
    words = AutoTokenizer.from_pretrained(tokenizer) if tokenizer else word_tokenizer(sentences())
    if not tokenizer:
        text = {"vocab_size": len(words), "pad_token_id": words.pad_token_id, "type_vocab_size": 1}
        fields = {**fields, "text_config": {**text, **fields.get("text_config", {})}}
    refuse_unknown(fields, MdetrConfig)
    model = MdetrModel(MdetrConfig(**fields))
    if tokenizer:
        model.text_encoder = type(model.text_encoder).from_pretrained(tokenizer, add_pooling_layer=False)
    size = {"shortest_edge": image_size, "longest_edge": round(image_size * 1333 / 800)}
    return model, MdetrProcessor(MdetrImageProcessor(size=size), words)


def parameter_groups(
    model: MdetrModel,
    learning_rate: float = 5e-5,
    weight_decay: float = 1e-4,
    tower_rates: dict[str, float] | None = None,
) -> list[dict[str, object]]:
    """The optimizer's groups: encoder, decoder and heads; the ResNet; RoBERTa, which has a schedule of its own.

    Args:
        model: parameters that do not require gradients are left out.
        learning_rate: peak rate of encoder, decoder and heads.
        weight_decay: of every parameter.
        tower_rates: peak rates of "backbone" and "text_encoder"; by default 1e-5 each.
    """
    rates = {"joint": learning_rate, **TOWER_RATES, **(tower_rates or {})}
    members: dict[str, list[torch.nn.Parameter]] = {name: [] for name in rates}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tower = name.split(".")[0]
            members[tower if tower in members else "joint"].append(parameter)
    groups = [
        {"name": name, "params": parameters, "lr": rates[name], "weight_decay": weight_decay}
        for name, parameters in members.items()
    ]
    groups[list(members).index("text_encoder")]["schedule"] = "linear_with_warmup"
    return groups


def fine_tuning_schedule(optimizer: torch.optim.Optimizer, num_steps: int, decay_steps: Sequence[int]) -> LambdaLR:
    """RoBERTa's rate rises for a hundredth of all steps, then falls to 0; the others drop at each of `decay_steps`."""

    def factor(group: dict[str, object]) -> Callable[[int], float]:
        schedule = group.get("schedule", "step")
        return lambda step: rate_factor(schedule, step, num_steps, decay_steps=decay_steps)

    return LambdaLR(optimizer, [factor(group) for group in optimizer.param_groups])


def weight_average(model: torch.nn.Module, decay: float = 0.9998) -> AveragedModel:
    """The running average, starting at the weights as they are: average = decay * average + (1 - decay) * weights."""
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    average.update_parameters(model)  # the first update copies
    return average


class StreamingMetrics(RelaStreamingMetrics):
    """GREC scores for Trainer: `StreamingMetrics(grec=evaluate.load("ME/grec"), processor=processor)`."""

    output_class: ClassVar[type[MdetrOutput]] = MdetrOutput
    output_names: ClassVar[tuple[str, ...]] = ("logits", "pred_boxes")
