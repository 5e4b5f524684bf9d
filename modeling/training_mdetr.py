"""How MDETR is fine-tuned: three learning rates, two schedules, and a running average of the weights.

    optimizer = torch.optim.AdamW(parameter_groups(model), weight_decay=1e-4)
    schedule = fine_tuning_schedule(optimizer, num_steps, drop_step=3 * steps_per_epoch)
    average = weight_average(model)
    for batch in batches:
        ...; optimizer.step(); schedule.step(); average.update_parameters(model)
    average.module.save_pretrained(OUT)

The published fine-tuning on gRefCOCO runs for 5 epochs of 4 sentences per device and step, clips gradients to 0.1,
drops after 3 epochs and is measured with the average. Source: the original main.py and util/optim.py.
"""

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .modeling_mdetr import MdetrModel

TOWERS = ("backbone", "text_encoder")


def parameter_groups(
    model: MdetrModel, lr: float = 5e-5, backbone_lr: float = 1e-5, text_lr: float = 1e-5
) -> list[dict[str, object]]:
    """The optimizer's groups: encoder, decoder and heads; the ResNet; RoBERTa. Each with its "name" and "lr"."""
    members: dict[str, list[torch.nn.Parameter]] = {"joint": [], "backbone": [], "text_encoder": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tower = name.split(".")[0]
            members[tower if tower in TOWERS else "joint"].append(parameter)
    rates = (lr, backbone_lr, text_lr)
    return [{"name": name, "params": params, "lr": rate} for (name, params), rate in zip(members.items(), rates)]


def fine_tuning_schedule(
    optimizer: torch.optim.Optimizer, num_steps: int, drop_step: int, warmup: float = 0.01
) -> LambdaLR:
    """RoBERTa's rate rises for a fraction `warmup` of all steps, then falls to 0; the others drop every `drop_step`.

    Args:
        optimizer: over `parameter_groups`.
        num_steps: of the whole training.
        drop_step: steps after which, each time, the other rates are divided by 10.
        warmup: fraction of `num_steps`.
    """
    warmup_steps = round(warmup * num_steps)

    def drops(step: int) -> float:
        return 0.1 ** (step // drop_step)

    def rises_and_falls(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        return max(0.0, (num_steps - step) / max(1, num_steps - warmup_steps))

    by_name = {"joint": drops, "backbone": drops, "text_encoder": rises_and_falls}
    return LambdaLR(optimizer, [by_name[group["name"]] for group in optimizer.param_groups])


def weight_average(model: MdetrModel, decay: float = 0.9998) -> AveragedModel:
    """The running average, starting at the weights as they are: average = decay * average + (1 - decay) * weights."""
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    average.update_parameters(model)  # the first update copies
    return average
