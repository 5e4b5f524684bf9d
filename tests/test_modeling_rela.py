"""RelaModel: what must hold whatever the weights, and that it learns."""

import pytest
import torch

from modeling.modeling_rela import RelaModel
from modeling.processing_rela import RelaCollator
from tests.tiny_rela import BETTER_LOSS, RESNET, SWIN, expression_rows, tiny_config, tiny_processor


@pytest.fixture(scope="module")
def batch() -> dict:
    return RelaCollator(tiny_processor(), category_ids=[10, 20])(expression_rows())


def train(model: RelaModel, optimizer: torch.optim.Optimizer, batch: dict, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model.train()(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def is_right(result: dict, mask: torch.Tensor, no_target: torch.Tensor) -> bool:
    union = (result["mask"] | mask).sum()
    return result["no_target"] == no_target and (union == 0 or (result["mask"] & mask).sum() / union > 0.9)


@pytest.mark.parametrize("loss", [{}, BETTER_LOSS], ids=["published", "better"])
def test_overfits_four_sentences_until_masks_are_right(batch: dict, loss: dict) -> None:
    torch.manual_seed(0)
    model = RelaModel(tiny_config(**loss, num_categories=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    truth = batch["labels"]["masks"].bool(), batch["labels"]["no_target"]
    losses: list[float] = []
    while len(losses) < 100:
        losses += train(model, optimizer, batch, 10)
        results = tiny_processor().post_process_referring_segmentation(model.eval()(**batch))
        if losses[-1] < 0.2 * losses[0] and all(map(is_right, results, *truth)):
            break
    assert losses[-1] < 0.2 * losses[0]
    assert len(results) == 4 and all(map(is_right, results, *truth))


@pytest.mark.parametrize("changes", [{}, SWIN, RESNET], ids=["conv", "swin", "resnet"])
def test_every_parameter_learns_and_first_logits_are_small(batch: dict, changes: dict) -> None:
    torch.manual_seed(0)
    model = RelaModel(tiny_config(**changes, num_categories=2)).train()
    output = model(**batch)
    assert output.pred_masks.shape == (4, 2, 16, 16)
    assert output.no_target_logits.shape == (4, 2)
    assert output.minimap_logits.shape == (4, 16, 2)
    assert output.pred_masks.abs().max() < 5
    output.loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_categories_train_the_trunk_without_sentences(batch: dict) -> None:
    torch.manual_seed(0)
    model = RelaModel(tiny_config(num_categories=2))
    output = model(batch["pixel_values"], labels={"categories": batch["labels"]["categories"]})
    output.loss.backward()
    assert model.vision_encoder.trunk.conv1.conv.weight.grad.abs().sum() > 0
    assert model.text_encoder.embeddings.word_embeddings.weight.grad is None


@pytest.mark.parametrize("changes", [{}, SWIN, RESNET], ids=["conv", "swin", "resnet"])
def test_sentences_that_share_an_image_equal_one_by_one(batch: dict, changes: dict) -> None:
    torch.manual_seed(0)
    model = RelaModel(tiny_config(**changes)).eval()
    if changes is SWIN:
        for gate in model.vision_encoder.gates:
            torch.nn.init.normal_(gate.inner.weight)
            torch.nn.init.normal_(gate.outer.weight)
        model.eval()
        assert not model.vision_encoder.gates_closed
    with torch.no_grad():
        together = model(**{**batch, "labels": None})
        for b, image in enumerate(batch["image_index"]):
            alone = model(
                batch["pixel_values"][image][None], batch["input_ids"][b][None], batch["attention_mask"][b][None]
            )
            torch.testing.assert_close(together.pred_masks[b], alone.pred_masks[0], atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(together.no_target_logits[b], alone.no_target_logits[0], atol=2e-5, rtol=1e-4)
