"""MdetrModel: what must hold whatever the weights, that it learns, and that transformers treats it as its own."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing import start_processes
from transformers import AutoModel, Trainer, TrainingArguments

from modeling.boxes import assign, cxcywh_to_xyxy, generalized_iou
from modeling.loss_mdetr import match
from modeling.modeling_mdetr import MdetrModel
from modeling.pixel_decoder_rela import sine_positions as unpadded_positions
from modeling.processing_mdetr import MdetrCollator
from modeling.transformer_mdetr import sine_positions
from tests.fresh_process import outputs_elsewhere
from tests.tiny_mdetr import expression_rows, tiny_config, tiny_processor

FROZEN = ("backbone.conv1", "backbone.layers.0")
KEY_BIAS = ("k_proj.bias", "key.bias")


@pytest.fixture(scope="module")
def batch() -> dict:
    return MdetrCollator(tiny_processor())(expression_rows())


@pytest.fixture(scope="module")
def inputs(batch: dict) -> dict:
    return {name: value for name, value in batch.items() if name != "labels"}


def tiny_model(seed: int = 0, **changes: object) -> MdetrModel:
    torch.manual_seed(seed)
    return MdetrModel(tiny_config(**changes)).eval()


def is_right(result: dict, row: dict) -> bool:
    truth = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in row["boxes"]]).reshape(-1, 4)
    if len(result["boxes"]) != len(truth):
        return False
    overlap = generalized_iou(result["boxes"][:, None], truth[None])
    return bool((overlap.amax(0) > 0.5).all()) if len(truth) else overlap.numel() == 0


@pytest.mark.slow
def test_overfits_four_sentences_until_boxes_are_right(batch: dict) -> None:
    model, rows, losses = tiny_model(), expression_rows(), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    while len(losses) < 200:
        optimizer.zero_grad()
        loss = model.train()(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if len(losses) % 20 == 0 and losses[-1] < 0.3 * losses[0]:
            sizes = [(row["height"], row["width"]) for row in rows]
            results = tiny_processor().post_process_referring_detection(model.eval()(**batch), target_sizes=sizes)
            if all(map(is_right, results, rows)):
                break
    assert losses[-1] < 0.3 * losses[0]
    assert len(results) == len(rows) and all(map(is_right, results, rows))


@pytest.mark.parametrize("changes", [{}, {"predict_final": True}, {"auxiliary_loss": False, "contrastive_size": 0}])
def test_every_trained_parameter_learns(batch: dict, changes: dict) -> None:
    model = tiny_model(**changes).train()
    output = model(**batch)
    output.loss.backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None}
    assert idle == {name for name, _ in model.named_parameters() if name.startswith(FROZEN)}
    still = {name for name, p in model.named_parameters() if p.grad is not None and not p.grad.any()}
    # Queries start at zero and have nothing to tell each other yet; one bias for all keys changes no attention.
    assert [name for name in still if not name.startswith("decoder.0.self_") and not name.endswith(KEY_BIAS)] == []
    assert ("loss_isfinal" in output.loss_terms) == ("predict_final" in changes)
    assert ("loss_ce_0" in output.loss_terms) == ("auxiliary_loss" not in changes)


def test_weights_of_all_terms_make_the_loss(batch: dict) -> None:
    output = tiny_model()(**batch)
    weight = {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2, "loss_contrastive_align": 1, "cardinality_error": 0}
    total = sum(weight[name.removesuffix("_0")] * term for name, term in output.loss_terms.items())
    torch.testing.assert_close(output.loss, total)


def test_batch_without_any_target_teaches_no_object_alone(batch: dict) -> None:
    labels = MdetrCollator(tiny_processor())([{**row, "ann_ids": [], "boxes": []} for row in expression_rows()])[
        "labels"
    ]
    assert labels["boxes"].shape == (4, 0, 4)
    model = tiny_model()
    output = model(**{**batch, "labels": labels})
    assert output.loss_terms["loss_bbox"] == output.loss_terms["loss_contrastive_align"] == 0
    expected = -0.1 * output.logits.log_softmax(-1)[..., -1].sum()
    torch.testing.assert_close(output.loss_terms["loss_ce"], expected.detach())
    output.loss.backward()
    assert model.box_head[4].weight.grad.abs().sum() == 0


def test_order_of_targets_and_places_behind_them_change_no_loss(batch: dict) -> None:
    model, labels = tiny_model(), batch["labels"]
    swapped = {name: value.flip(1) if value.ndim > 1 else value for name, value in labels.items()}
    only_two = torch.tensor([0, 0, 1, 0]).bool()
    shuffled = {
        name: torch.where(only_two.view(-1, *[1] * (value.ndim - 1)), swapped[name], value)
        for name, value in labels.items()
    }
    shuffled["boxes"] = torch.cat([shuffled["boxes"], torch.full((4, 3, 4), -100.0)], dim=1)
    shuffled["positive_map"] = torch.cat([shuffled["positive_map"], torch.full((4, 3, 256), -100.0)], dim=1)
    expected = model(**batch).loss_terms
    for name, term in model(**{**batch, "labels": shuffled}).loss_terms.items():
        torch.testing.assert_close(term, expected[name], msg=name)


def test_sentences_that_share_an_image_equal_one_by_one(inputs: dict) -> None:
    model = tiny_model()
    together = model(**inputs)
    for b, image in enumerate(inputs["image_index"]):
        words = int(inputs["attention_mask"][b].sum())
        alone = model(
            inputs["pixel_values"][image][None],
            inputs["input_ids"][b, :words][None],
            inputs["pixel_mask"][image][None],
        )
        for name in ("logits", "pred_boxes", "proj_queries"):
            torch.testing.assert_close(together[name][b], alone[name][0], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"4 sentences.*2 images"):
        model(**{**inputs, "image_index": None})


def test_pixels_on_padding_are_not_looked_at(inputs: dict) -> None:
    """The trunk's receptive field apart: what the encoder gets from the padded part changes no output."""
    model = tiny_model()
    images = {"pixel_values": inputs["pixel_values"][:1], "pixel_mask": inputs["pixel_mask"][:1]}
    assert not images["pixel_mask"].bool().all(), "the first image is the narrower one"
    sentence = {name: inputs[name][:1] for name in ("input_ids", "attention_mask")}
    expected = model(**images, **sentence).logits
    seen = torch.nn.functional.interpolate(images["pixel_mask"][:, None].float(), (3, 5))
    model.backbone.register_forward_hook(lambda module, args, x: x + 9 * (1 - seen))
    torch.testing.assert_close(model(**images, **sentence).logits, expected)


def test_positions_without_padding_are_the_usual_ones_and_ignore_it() -> None:
    torch.testing.assert_close(sine_positions(torch.ones(1, 5, 7).bool(), 16)[0], unpadded_positions(5, 7, 16, None))
    seen = torch.zeros(1, 6, 9).bool()
    seen[:, :5, :7] = True
    padded = sine_positions(seen, 16)[0].unflatten(0, (6, 9))[:5, :7]
    torch.testing.assert_close(padded.flatten(0, 1), unpadded_positions(5, 7, 16, None))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_assignment_is_the_cheapest(rows: int, columns: int, seed: int) -> None:
    cost = np.random.default_rng(seed).normal(size=(rows, columns)).round(1)  # with ties
    ours = cost[assign(cost)].sum()
    short, long = (cost, columns) if rows <= columns else (cost.T, rows)
    choices = itertools.permutations(range(long), len(short))
    assert ours == pytest.approx(min(short[np.arange(len(short)), choice].sum() for choice in map(list, choices)))
    row, column = assign(cost)
    assert (np.diff(row) > 0).all() and len(set(column.tolist())) == len(row) == min(rows, columns)


def test_generalised_iou_of_known_boxes() -> None:
    unit, right = torch.tensor([0.0, 0, 1, 1]), torch.tensor([2.0, 0, 3, 1])
    assert generalized_iou(unit, unit) == 1
    assert generalized_iou(unit, right) == pytest.approx(-1 / 3)
    assert generalized_iou(unit, torch.tensor([0, 0, 1, 0.5])) == pytest.approx(0.5)
    assert cxcywh_to_xyxy(torch.tensor([0.5, 0.5, 1, 0.5])).tolist() == [0, 0.25, 1, 0.75]


def test_diverged_model_has_a_loss_that_is_not_finite(batch: dict) -> None:
    model = tiny_model()
    output = model(**batch)
    expected = match([output], batch["labels"], tiny_config())[0]
    unmatched = next(query for query in range(6) if query not in expected.query[expected.sample == 2])
    boxes = output.pred_boxes.detach().clone()
    boxes[2, unmatched] = torch.nan
    with_nan = match([{**output, "pred_boxes": boxes}], batch["labels"], tiny_config())[0]
    assert all(torch.equal(*pair) for pair in zip(with_nan, expected)), "what is not finite is matched last"
    torch.nn.init.constant_(model.box_head[4].bias, torch.nan)
    assert not model(**batch).loss.isfinite(), "train.py skips such a step"


def test_a_processor_with_other_positions_is_refused_and_one_with_the_same_trains(batch: dict) -> None:
    model = tiny_model(num_positions=64).train()
    with pytest.raises(ValueError, match=r"positive_map has 256 positions.*num_positions=64"):
        model(**batch)
    with pytest.raises(ValueError, match=r"num_positions=256 of the processor.*num_positions=64 of the model"):
        tiny_processor().collator(model.config, training=True)
    output = model(**tiny_processor(num_positions=64).collator(model.config, training=True)(expression_rows()))
    output.loss.backward()
    assert output.logits.shape == (4, 6, 64) and model.token_head.weight.grad.any()


def test_labels_of_measuring_alone_give_no_loss(batch: dict) -> None:
    output = tiny_model()(**tiny_processor().collator()(expression_rows()))
    assert output.loss is None and torch.equal(output.logits, tiny_model()(**batch).logits)


def test_eager_attention_equals_sdpa_and_both_drop_attention_weights(inputs: dict) -> None:
    model = tiny_model()
    assert model.config._attn_implementation == "sdpa"
    expected = model(**inputs)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(**inputs).logits, expected.logits, atol=1e-5, rtol=1e-4)
    model.config.dropout = 0.5  # read by attention alone after construction
    assert torch.equal(model(**inputs).logits, model(**inputs).logits), "not in evaluation"
    for implementation in ("eager", "sdpa"):
        model.train().set_attn_implementation(implementation)
        assert not torch.equal(model(**inputs).logits, model(**inputs).logits)


def loss_of_half(rank: int, folder: str) -> None:
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    batch = torch.load(f"{folder}/batch.pt")
    batch["labels"] = {name: value[2 * rank : 2 * rank + 2] for name, value in batch["labels"].items()}
    half = {name: batch[name][2 * rank : 2 * rank + 2] for name in ("input_ids", "attention_mask", "image_index")}
    torch.save(tiny_model()(**{**batch, **half}).loss.detach(), f"{folder}/loss{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_mean_loss_of_two_processes_is_that_of_one(batch: dict, tmp_path: Path) -> None:
    assert batch["labels"]["num_boxes"].tolist() == [1, 0, 2, 1], "unequal halves"
    torch.save(batch, tmp_path / "batch.pt")
    start_processes(loss_of_half, (str(tmp_path),), nprocs=2, start_method="forkserver")
    halves = torch.stack([torch.load(tmp_path / f"loss{rank}.pt") for rank in (0, 1)])
    torch.testing.assert_close(halves.mean(), tiny_model()(**batch).loss.detach())


def test_gradient_checkpointing_changes_no_gradient(batch: dict) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**batch).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_bfloat16_stays_near_and_keeps_the_heads_in_fp32(inputs: dict, tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        exact = model(**inputs).logits
        half = MdetrModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert half.image_projection.weight.dtype == torch.bfloat16 and half.box_head[4].weight.dtype == torch.float32
        rounded = half(**inputs).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            automatic = model(**inputs).logits
        everything = model.to(torch.bfloat16)(**inputs).logits
    assert rounded.dtype == automatic.dtype == torch.float32
    for logits in (rounded, automatic, everything.float()):
        assert (logits - exact).norm() < 0.1 * exact.norm()


def test_saved_model_is_equal(inputs: dict, tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    again = MdetrModel.from_pretrained(tmp_path)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert again.state_dict().keys() == model.state_dict().keys()


@pytest.mark.slow
def test_saved_model_gives_identical_outputs_in_a_fresh_process_elsewhere(inputs: dict, tmp_path: Path) -> None:
    model, folder = tiny_model(), tmp_path / "saved"
    model.save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    with torch.no_grad():
        expected = model(**inputs)
    found = outputs_elsewhere(folder, inputs, tmp_path)
    for name in ("logits", "pred_boxes", "proj_queries", "proj_tokens"):
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.slow
def test_compiles_without_graph_breaks(inputs: dict) -> None:
    model = tiny_model()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_trainer_fine_tunes_and_evaluates(tmp_path: Path) -> None:
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=20,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=2,
        learning_rate=2e-3,
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    rows = expression_rows()
    trainer = Trainer(
        tiny_model(),
        arguments,
        data_collator=MdetrCollator(tiny_processor()),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tiny_processor(),
        preprocess_logits_for_metrics=lambda outputs, labels: outputs[1:3],
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * before
    trainer.save_model(str(tmp_path / "tuned"))
    assert (tmp_path / "tuned" / "root_noun_mdetr.py").is_file()
    assert AutoModel.from_pretrained(tmp_path / "tuned", trust_remote_code=True)
