"""Learning rates over the steps of a training, and the running average of the weights."""

import math
from collections.abc import Callable, Sequence

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def rate_factor(
    schedule: str, step: int, num_steps: int, warmup_steps: int = 0, decay_steps: Sequence[int] = (), restart: int = 0
) -> float:
    """The factor of the peak learning rate at `step`: a pure function, so that nothing has to be saved.

    Args:
        schedule: "constant", "cosine" to 0, "step" (x 0.1 at each of `decay_steps`), or "linear_with_warmup", the
            schedule of MDETR's text encoder: linear rise during the first 1 % of all steps, then linear fall to 0.
        step: counted from 0.
        num_steps: of the whole training.
        warmup_steps: of a linear rise from 0; "linear_with_warmup" has its own.
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


def fine_tuning_schedule(optimizer: torch.optim.Optimizer, num_steps: int, decay_steps: Sequence[int]) -> LambdaLR:
    """Each parameter group follows its own "schedule", by default "step" with drops at `decay_steps`."""

    def factor(group: dict[str, object]) -> Callable[[int], float]:
        schedule = group.get("schedule", "step")
        return lambda step: rate_factor(schedule, step, num_steps, decay_steps=decay_steps)

    return LambdaLR(optimizer, [factor(group) for group in optimizer.param_groups])


def weight_average(model: torch.nn.Module, decay: float = 0.9998) -> AveragedModel:
    """The running average, starting at the present weights: average = decay * average + (1 - decay) * weights."""
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    average.update_parameters(model)  # the first update copies
    return average
