"""The instance branch: what must hold whatever the weights, and that it learns boxes."""

import copy
import itertools
from pathlib import Path

import pytest
import torch

from modeling import loss_instances_rela
from modeling.boxes import cxcywh_to_xyxy, generalized_iou
from modeling.instances_rela import Choice, ObjectFinder, Objects, outside
from modeling.loss_instances_rela import centre_map, instance_loss, match
from modeling.modeling_rela import RelaModel
from modeling.processing_rela import RelaCollator, decode_mask
from modeling.region_decoder_rela import RegionOutput
from tests.fresh_process import outputs_elsewhere
from tests.tiny_rela import BETTER_LOSS, INSTANCES, RESNET, SWIN, expression_rows, tiny_config, tiny_processor

BACKBONES = pytest.mark.parametrize("changes", [{}, SWIN, RESNET], ids=["conv", "swin", "resnet"])
REGION_OUTPUTS = ("pred_masks", "no_target_logits", "minimap_logits")
INSTANCE_OUTPUTS = ("pred_boxes", "pred_scores", "relevance_logits", "instance_masks", "count_logits")


@pytest.fixture(scope="module")
def batch() -> dict:
    return RelaCollator(tiny_processor(), instances=True)(expression_rows())


@pytest.fixture(scope="module")
def inputs(batch: dict) -> dict:
    return {name: value for name, value in batch.items() if name != "labels"}


def tiny_model(seed: int = 0, **changes: object) -> RelaModel:
    torch.manual_seed(seed)
    return RelaModel(tiny_config(**{**INSTANCES, **changes}))


def given_any(relevance: torch.Tensor) -> torch.Tensor:
    """Bayes' rule in double precision: what each object's probability becomes once it is known that one is meant."""
    chances = relevance.double().sigmoid()
    return (chances / (1 - (1 - chances).prod(1, keepdim=True))).to(relevance.dtype)


@BACKBONES
def test_outputs_have_the_documented_shapes(inputs: dict, changes: dict) -> None:
    output = tiny_model(**changes)(**inputs)
    shapes = [(4, 6, 4), (4, 6), (4, 6), (4, 6, 16, 16), (4, 6)]
    assert [tuple(output[name].shape) for name in INSTANCE_OUTPUTS] == shapes
    assert ((output.pred_boxes > 0) & (output.pred_boxes < 1)).all()
    verdict = output.no_target_logits.softmax(-1)[:, 1:]
    torch.testing.assert_close(output.pred_scores, given_any(output.relevance_logits) * (1 - verdict))


@BACKBONES
def test_a_branch_added_to_a_saved_model_changes_none_of_its_outputs(
    inputs: dict, changes: dict, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    plain = RelaModel(tiny_config(**changes)).eval()
    plain.save_pretrained(tmp_path)
    model, report = RelaModel.from_pretrained(tmp_path, **INSTANCES, output_loading_info=True)
    fresh = {name.split(".")[0] for name in report["missing_keys"]}
    assert fresh == {"object_finder", "instance_chooser"} and not report["unexpected_keys"]
    with torch.no_grad():
        expected, found = plain(**inputs), model.eval()(**inputs)
    for name in REGION_OUTPUTS:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6, msg=name)
    assert "pred_boxes" not in expected and all(value.isfinite().all() for value in found.values())
    # new weights start as those of a new model do
    assert model.object_finder.centre.bias.item() == -4 and model.instance_chooser.region_weight.item() == 1
    assert not model.object_finder.box[-1].weight.any()


def test_regions_never_see_the_instances(inputs: dict) -> None:
    model = tiny_model().eval()
    with torch.no_grad():
        before = model(**inputs)
        for module in (model.object_finder, model.instance_chooser):
            for parameter in module.parameters():
                parameter.normal_()
        after = model(**inputs)
    for name in REGION_OUTPUTS:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0, msg=name)
    assert not torch.allclose(after.relevance_logits, before.relevance_logits)


def test_merged_masks_add_the_chosen_objects_to_the_regions(inputs: dict) -> None:
    model = tiny_model(**INSTANCES)
    plain = model(**inputs)
    model.config.merge_instances = True
    merged = model(**inputs)
    relevance, margin = plain.relevance_logits, plain.pred_masks[:, 1] - plain.pred_masks[:, 0]
    chosen = given_any(relevance) > 0.5
    for b in range(len(margin)):
        own = plain.instance_masks[b][chosen[b]]
        best = own.amax(0).clamp(-12, 12) if len(own) else torch.full_like(margin[b], -12)
        found = merged.pred_masks[b, 1] - merged.pred_masks[b, 0]
        torch.testing.assert_close(found, margin[b].clamp(-12, 12) + best)
    assert torch.equal(merged.pred_boxes, plain.pred_boxes) and chosen.any() and not chosen.all()
    verdict = merged.no_target_logits[:, 1] - merged.no_target_logits[:, 0]
    region = plain.no_target_logits[:, 1] - plain.no_target_logits[:, 0]
    nothing = (1 - relevance.double().sigmoid()).prod(1)
    torch.testing.assert_close(verdict, region + (nothing / (1 - nothing)).log().to(region.dtype))
    torch.testing.assert_close(merged.pred_scores, given_any(relevance) * (1 - verdict.sigmoid())[:, None])


def test_where_something_is_meant_the_likeliest_object_is_answered() -> None:
    """Masks, boxes and verdict agree: no object is sure by itself, and still one is meant."""
    regions = RegionOutput(
        torch.zeros(3, 2, 4, 4), torch.zeros(3, 4, 2), torch.tensor([[9.0, -9.0], [20.0, -20.0], [9.0, -9.0]]), None
    )
    objects = Objects(
        None, torch.full((3, 2, 4), 0.5), torch.tensor([[[[5.0]], [[-5.0]]]] * 3).expand(-1, -1, 4, 4), None
    )
    relevance = torch.tensor([[-1.0, -6.0], [-8.0, -300.0], [30.0, 40.0]])
    model = tiny_model(merge_instances=True)
    found = model._answers(regions, objects, Choice([relevance], None), None)
    assert found["pred_scores"].isfinite().all() and (found["pred_scores"] <= 1).all()
    for b in (0, 1):
        assert found["pred_scores"][b, 0] > 0.9 and found["pred_scores"][b, 1] < 0.1
        assert found["pred_masks"][b, 1].min() > 0
    assert found["pred_scores"][2].min() > 0.99 and found["no_target_logits"].isfinite().all()


def test_objects_are_found_without_reading_but_chosen_by_reading(inputs: dict) -> None:
    model = tiny_model().eval()
    with torch.no_grad():
        one = model(**inputs)
        other = model(**{**inputs, "input_ids": inputs["input_ids"].flip(0)})
    torch.testing.assert_close(one.pred_boxes, other.pred_boxes, rtol=0, atol=0)
    torch.testing.assert_close(one.instance_masks, other.instance_masks, rtol=0, atol=0)
    assert not torch.allclose(one.relevance_logits, other.relevance_logits)


def test_open_gates_run_the_trunk_once_more_for_the_objects(inputs: dict) -> None:
    model = tiny_model(**{**SWIN, "language_gate": "open"}).eval()
    for gate in model.vision_encoder.gates:
        torch.nn.init.normal_(gate.outer.weight)
    model.eval()
    with torch.no_grad():
        output, other = model(**inputs), model(**{**inputs, "input_ids": inputs["input_ids"].flip(0)})
    torch.testing.assert_close(output.pred_boxes, other.pred_boxes, rtol=0, atol=0)


@BACKBONES
def test_sentences_that_share_an_image_equal_one_by_one(inputs: dict, changes: dict) -> None:
    model = tiny_model(**changes).eval()
    with torch.no_grad():
        together = model(**inputs)
        for b, image in enumerate(inputs["image_index"]):
            words = inputs["input_ids"][b][None], inputs["attention_mask"][b][None]
            alone = model(inputs["pixel_values"][image][None], *words)
            for name in INSTANCE_OUTPUTS:
                torch.testing.assert_close(alone[name][0], together[name][b], atol=2e-5, rtol=1e-4, msg=name)


def test_padding_of_the_sentence_changes_nothing(inputs: dict) -> None:
    model = tiny_model(region_language_mask=True).eval()
    other = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 7)
    with torch.no_grad():
        expected, found = model(**inputs), model(**{**inputs, "input_ids": other})
    torch.testing.assert_close(found.relevance_logits, expected.relevance_logits)


def permuted(labels: dict, order: list[int]) -> dict:
    changed = {name: labels[name][:, order] for name in ("object_boxes", "object_masks", "targets")}
    return {**labels, **changed}


def test_the_order_of_the_objects_changes_no_loss(batch: dict) -> None:
    model = tiny_model().eval()
    loss = model(**batch).loss
    torch.testing.assert_close(model(**{**batch, "labels": permuted(batch["labels"], [1, 0])}).loss, loss)
    wrong = {**batch["labels"], "targets": batch["labels"]["targets"].flip(1)}
    assert not torch.allclose(model(**{**batch, "labels": wrong}).loss, loss), "other targets must cost something else"


def test_padded_objects_change_no_loss(batch: dict) -> None:
    model, labels = tiny_model().eval(), dict(batch["labels"])
    for name, pad in {"object_boxes": (0, 0, 0, 3), "object_masks": (0, 0, 0, 0, 0, 3), "targets": (0, 3)}.items():
        labels[name] = torch.nn.functional.pad(labels[name], pad)
    torch.testing.assert_close(model(**{**batch, "labels": labels}).loss, model(**batch).loss)


def test_images_without_objects_and_sentences_without_targets(batch: dict) -> None:
    model, labels = tiny_model(), dict(batch["labels"])
    labels["num_objects"] = torch.zeros_like(labels["num_objects"])
    for name in ("object_boxes", "object_masks", "targets"):
        labels[name] = torch.zeros_like(labels[name])
    output = model(**{**batch, "labels": labels})
    assert output.loss_terms["box"] == 0 and output.loss_terms["relevance"] > 0
    output.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_matching_costs_equal_a_plain_rewriting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images, three queries, two objects, three sentences: every term of the cost, written as loops."""
    torch.manual_seed(0)
    config = tiny_config(**INSTANCES)
    objects = Objects(
        torch.zeros(2, 4, 4), torch.rand(2, 3, 4) * 0.4 + 0.2, torch.randn(2, 3, 4, 4), torch.zeros(2, 3, 8)
    )
    choice = Choice([torch.randn(3, 3)], None)
    labels = {"object_boxes": torch.rand(2, 2, 4) * 0.4 + 0.2, "object_masks": torch.rand(2, 2, 4, 4) > 0.5}
    labels |= {"num_objects": torch.tensor([2, 1]), "targets": torch.tensor([[1, 0], [1, 1], [0, 1]]) > 0}
    image_index = torch.tensor([0, 0, 1])
    monkeypatch.setattr(loss_instances_rela, "match_costs", lambda costs, numbers: costs)
    costs = match(objects, choice, labels, image_index, config)
    for image, query, place in itertools.product(range(2), range(3), range(2)):
        box, truth_box = objects.boxes[image, query], labels["object_boxes"][image, place]
        mask, truth = objects.masks[image, query].sigmoid(), labels["object_masks"][image, place].float()
        dice = 1 - (2 * (mask * truth).sum() + 1) / (mask.sum() + truth.sum() + 1)
        giou = generalized_iou(cxcywh_to_xyxy(box), cxcywh_to_xyxy(truth_box))
        sentences = [b for b in range(3) if image_index[b] == image]
        errors = [
            abs(choice.relevance[0][b, query].sigmoid() - labels["targets"][b, place].float()) for b in sentences
        ]
        expected = config.box_loss_weight * (box - truth_box).abs().sum() - config.giou_loss_weight * giou
        expected += config.instance_mask_loss_weight * dice
        expected += config.relevance_loss_weight * sum(errors) / len(errors)
        torch.testing.assert_close(costs[image, query, place], expected)


def test_more_objects_than_queries(batch: dict) -> None:
    model = tiny_model(num_instance_queries=1)
    output = model(**batch)
    output.loss.backward()
    assert model.eval()(**batch).pred_boxes.shape == (4, 1, 4) and output.loss.isfinite()


@BACKBONES
def test_every_parameter_learns(batch: dict, changes: dict) -> None:
    model = tiny_model(**changes, loss_scale=1.0).train()
    output = model(**batch)
    terms = {"centre", "box", "giou", "instance_mask", "relevance", "count"}
    assert terms <= output.loss_terms.keys() and output.loss < 30
    output.loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    silent = {name for name, p in model.named_parameters() if p.grad is not None and not p.grad.any()}
    # the boxes' last layer starts at zero and hides what lies before it for one step
    assert {name for name in silent if name.startswith(("object_finder", "instance_chooser"))} <= {
        "object_finder.box.0.weight",
        "object_finder.box.0.bias",
    }


def test_vision_alone_learns_to_find_objects(batch: dict) -> None:
    model = tiny_model(num_categories=0)
    labels = {name: value for name, value in batch["labels"].items() if "object" in name}
    output = model(batch["pixel_values"], labels=labels)
    output.loss.backward()
    assert model.vision_encoder.trunk.conv1.conv.weight.grad.abs().sum() > 0
    assert model.instance_chooser.word_projection.weight.grad is None
    with pytest.raises(ValueError, match="input_ids is None"):
        RelaModel(tiny_config())(batch["pixel_values"], labels=labels)


def test_labels_without_objects_train_the_regions_alone(batch: dict) -> None:
    model, plain = tiny_model(), {name: batch["labels"][name] for name in ("masks", "no_target")}
    output = model(**{**batch, "labels": plain})
    assert "box" not in output.loss_terms and output.loss < model(**batch).loss


def test_matching_prefers_box_mask_and_relevance(batch: dict) -> None:
    model = tiny_model().eval()
    with torch.no_grad():
        output = model(**batch)
    labels, index = batch["labels"], batch["image_index"]
    objects = model.object_finder(model.vision_encoder.stages(batch["pixel_values"]))
    objects = objects._replace(boxes=objects.boxes.detach().clone(), masks=torch.zeros_like(objects.masks))
    objects.boxes[:, 3], objects.boxes[:, 1] = labels["object_boxes"][:, 0], labels["object_boxes"][:, 1]
    image, query, item = match(objects, None, labels, index, model.config)
    assert image.tolist() == [0, 0, 1, 1] and query.tolist() == [1, 3, 1, 3] and item.tolist() == [1, 0, 1, 0]
    # two queries alike in their boxes: the better mask decides, then the better relevance
    objects.boxes[:, 4] = objects.boxes[:, 3]
    objects.masks[:, 4] = labels["object_masks"][:, 0] * 8.0 - 4
    assert match(objects, None, labels, index, model.config)[1].tolist() == [1, 4, 1, 4]
    objects.masks[:, 3] = objects.masks[:, 4]
    relevance = torch.zeros_like(output.relevance_logits)
    relevance[:, 3] = 8.0 * labels["targets"][:, 0] - 4
    assert match(objects, Choice([relevance], None), labels, index, model.config)[1].tolist() == [1, 3, 1, 3]
    objects.boxes[0, 0, 0], objects.masks[1, 5] = torch.nan, torch.inf
    assert match(objects, Choice([relevance], None), labels, index, model.config)[1].tolist() == [1, 3, 1, 3]
    objects.boxes[:] = torch.nan
    loss, _ = instance_loss(objects, Choice([relevance], None), labels, index, model.config)
    assert not loss.isfinite(), "a model that has diverged is not noticed"


@pytest.mark.slow
def test_exports(inputs: dict) -> None:
    model = tiny_model().eval()
    with torch.no_grad():
        expected = model(**inputs)
        exported = torch.export.export(model, (), kwargs=inputs).module()(**inputs)
    for name in INSTANCE_OUTPUTS:
        torch.testing.assert_close(exported[name], expected[name], atol=1e-5, rtol=1e-4, msg=name)


def test_centre_map_has_one_peak_per_object_and_no_padding() -> None:
    boxes = torch.tensor([[[0.25, 0.5, 0.4, 0.2], [0.8, 0.1, 0.1, 0.1]], [[0.5, 0.5, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]])
    found = centre_map((2, 10, 20), {"object_boxes": boxes, "num_objects": torch.tensor([2, 1])})
    assert (found[0] == 1).nonzero().tolist() == [[1, 16], [5, 5]]
    assert (found[1] == 1).nonzero().tolist() == [[5, 10]] and found[1, 0, 0] < 0.01
    assert found[0, 5, 6] > found[0, 6, 5], "the bell is as wide as its box"


def test_peaks_come_before_their_slopes() -> None:
    finder = ObjectFinder(tiny_config(**{**INSTANCES, "num_instance_queries": 3}))
    centres = torch.full((1, 8, 8), -5.0)
    centres[0, 2, 2], centres[0, 2, 3], centres[0, 6, 6] = 3.0, 2.0, 1.0
    assert finder.peaks(centres)[0, :2].tolist() == [2 * 8 + 2, 6 * 8 + 6]


def test_outside_is_zero_in_the_box_and_grows_by_half_sides() -> None:
    distance = outside(torch.tensor([0.5, 0.5, 0.4, 0.2]), (10, 10))
    assert (distance[4:6, 3:7] == 0).all() and (distance > 0).sum() == 100 - 8
    assert distance[5, 9].item() == pytest.approx(0.45 / 0.2 - 1)


def train(model: RelaModel, optimizer: torch.optim.Optimizer, batch: dict, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def is_right(answer: dict, row: dict) -> bool:
    truth = torch.tensor(row["boxes"]).reshape(-1, 4)
    truth[:, 2:] += truth[:, :2]
    if len(answer["boxes"]) != len(truth) or answer["no_target"] != row["no_target"]:
        return False
    overlap = generalized_iou(answer["boxes"][:, None], truth[None])
    merged = sum(decode_mask(mask) for mask in answer["masks"]) if len(truth) else 0
    mask_accuracy = ((merged > 0) == decode_mask(row["mask"])).mean()
    return sorted((overlap > 0.7).nonzero()[:, 1].tolist()) == list(range(len(truth))) and mask_accuracy > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("listed", [True, False], ids=["every object", "targets alone"])
def test_overfits_four_sentences_until_boxes_are_right(listed: bool) -> None:
    rows = expression_rows() if listed else [{k: v for k, v in r.items() if k != "objects"} for r in expression_rows()]
    batch = RelaCollator(tiny_processor(), instances=True)(rows)
    model = tiny_model(**BETTER_LOSS, loss_scale=1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    right = []
    while len(right) < 13 and right[-3:] != [True] * 3:  # three in a row: one alone may be chance; 260 steps at most
        train(model, optimizer, batch, 20)
        with torch.no_grad():
            outputs = model.eval()(**{**batch, "labels": None})
        answers = tiny_processor().post_process_referring_detection(
            outputs, target_sizes=[(64, 64)] * 4, return_masks=True
        )
        right.append(len(answers) == 4 and all(map(is_right, answers, rows)))
    assert right[-3:] == [True] * 3


def test_saved_and_loaded_outputs_are_equal(inputs: dict, tmp_path: Path) -> None:
    model = tiny_model().eval()
    model.save_pretrained(tmp_path)
    loaded = RelaModel.from_pretrained(tmp_path)
    with torch.no_grad():
        expected, found = model(**inputs), loaded(**inputs)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)


@pytest.mark.slow
def test_remote_code_gives_identical_instances_elsewhere(inputs: dict, tmp_path: Path) -> None:
    model, folder = tiny_model().eval(), tmp_path / "saved"
    model.save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    found = outputs_elsewhere(folder, inputs, tmp_path)
    with torch.no_grad():
        expected = model(**inputs)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_keep_the_branch_in_fp32(inputs: dict, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model().eval()
    model.save_pretrained(tmp_path)
    half = RelaModel.from_pretrained(tmp_path, dtype=dtype)
    for part in (half.object_finder, half.instance_chooser):
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}
    with torch.no_grad():
        rounded = half(**inputs)
        with torch.autocast("cpu", dtype=dtype):
            automatic = model(**inputs)
        everything = copy.deepcopy(model).to(dtype)(**inputs)
    for output in (rounded, automatic, everything):
        assert output.pred_boxes.isfinite().all() and output.pred_scores.isfinite().all()
    assert rounded.pred_boxes.dtype == automatic.pred_boxes.dtype == torch.float32


def test_boxes_of_centre_and_size_have_these_edges() -> None:
    torch.testing.assert_close(cxcywh_to_xyxy(torch.tensor([0.5, 0.5, 0.2, 0.4])), torch.tensor([0.4, 0.3, 0.6, 0.7]))
