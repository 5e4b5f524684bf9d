"""MDETR's fine-tuning: which parameters learn how fast, when, and what is averaged."""

from pathlib import Path

import pytest
import torch

from modeling.modeling_mdetr import MdetrModel
from modeling.training_mdetr import parameter_groups
from tests.tiny_mdetr import tiny_config
from training.schedule import fine_tuning_schedule, weight_average


@pytest.fixture
def model() -> MdetrModel:
    torch.manual_seed(0)
    return MdetrModel(tiny_config())


def test_every_parameter_is_in_one_group(model: MdetrModel) -> None:
    groups = {group["name"]: group for group in parameter_groups(model)}
    assert {name: group["lr"] for name, group in groups.items()} == {
        "joint": 5e-5,
        "backbone": 1e-5,
        "text_encoder": 1e-5,
    }
    grouped = [id(parameter) for group in groups.values() for parameter in group["params"]]
    assert sorted(grouped) == sorted(map(id, model.parameters()))
    assert {*map(id, groups["backbone"]["params"])} == {*map(id, model.backbone.parameters())}
    assert {*map(id, groups["text_encoder"]["params"])} == {*map(id, model.text_encoder.parameters())}


def test_rates_over_the_training(model: MdetrModel) -> None:
    optimizer = torch.optim.AdamW(parameter_groups(model))
    schedule = fine_tuning_schedule(optimizer, num_steps=500, decay_steps=[300])
    rates = []
    for _ in range(501):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    joint, backbone, text = zip(*rates)
    assert joint[:300] == (5e-5,) * 300 and joint[300:] == pytest.approx([5e-6] * 201)
    assert backbone == pytest.approx([rate / 5 for rate in joint])
    assert text[:6] == pytest.approx([0, 0.2e-5, 0.4e-5, 0.6e-5, 0.8e-5, 1e-5])
    assert text[252] == pytest.approx(1e-5 * 248 / 495) and text[500] == 0


def test_average_follows_the_weights_and_saves(model: MdetrModel, tmp_path: Path) -> None:
    average = weight_average(model, decay=0.9)
    weight, expected = model.token_head.weight, model.token_head.weight.detach().clone()
    for _ in range(3):
        with torch.no_grad():
            weight += 1
        average.update_parameters(model)
        expected = 0.9 * expected + 0.1 * weight.detach()
    torch.testing.assert_close(average.module.token_head.weight, expected)
    average.module.save_pretrained(tmp_path)
    torch.testing.assert_close(MdetrModel.from_pretrained(tmp_path).token_head.weight, expected)
