"""transformers' Trainer in several processes: the README's lines give the loss that one process gives."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from transformers import Trainer

import grefcoco
from modeling.loss_rela import category_loss, referring_loss
from modeling.loss_vlt import mask_loss
from modeling.modeling_mdetr import MdetrModel
from modeling.modeling_rela import RelaModel
from modeling.processing_rela import RelaCollator
from modeling.region_decoder_rela import RegionOutput
from tests import tiny_mdetr
from tests.processes import start_group
from tests.tiny_rela import BETTER_LOSS, INSTANCES, expression_rows, tiny_config, tiny_processor
from tests.tiny_training import ROOT

GLOBAL_BATCH, STEPS = 8, 3


@pytest.fixture(scope="module")
def dataset(scenes_dataset):
    return scenes_dataset


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The folder of a model with the published loss, a mean weighted by class."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    RelaModel(tiny_config(**INSTANCES, class_weights=[0.5, 2.0])).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


def readme_code(dataset: Path, saved: Path, out: Path, streaming: bool, dispatch: bool) -> str:
    """The README's lines for Trainer, at a few small steps without evaluation."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    (code,) = [block for block in blocks if "Trainer(" in block]
    code = code.split("scores = ")[0]
    changes = {
        "data/easy": str(dataset),
        "runs/demo/checkpoint": str(saved),
        "runs/tuned": str(out),
        "./evaluate": str(ROOT / "evaluate"),
        "max_steps=100": f"max_steps={STEPS}, use_cpu=True, logging_steps=1, save_strategy='no'",
        "per_device_train_batch_size=16": f"per_device_train_batch_size={GLOBAL_BATCH // processes}",
        'eval_strategy="steps", eval_steps=50, ': "",
        'split="train", ': f'split="train", streaming={streaming}, ',
    }
    changes |= {'"dispatch_batches": False': '"dispatch_batches": True'} if dispatch else {}
    for old, new in changes.items():
        assert old in code, old
        code = code.replace(old, new)
    return code


def fit(dataset: Path, saved: Path, out: Path, streaming: bool, dispatch: bool) -> None:
    """Run the README's lines; write the sentences and the loss of each step of this process."""
    steps, original = [], Trainer.compute_loss

    def compute_loss(self: Trainer, model: torch.nn.Module, inputs: dict, *args: object, **kwargs: object) -> object:
        loss = original(self, model, inputs, *args, **kwargs)
        steps.append((inputs["labels"]["sent_id"].tolist(), loss.item()))
        return loss

    Trainer.compute_loss = compute_loss
    exec(readme_code(dataset, saved, out, streaming, dispatch), {})
    (out / f"{os.environ.get('RANK', 0)}.json").write_text(json.dumps(steps))


def run(processes: int, out: Path, *arguments: object) -> list[tuple[list[int], float]]:
    """The sentences and the mean loss of the processes at each step."""
    out.mkdir()
    for process in start_group(processes, fit, *arguments[:2], out, *arguments[2:]):
        done = process.wait()
        assert done.returncode == 0, done.stderr
    ranks = [json.loads((out / f"{rank}.json").read_text()) for rank in range(processes)]
    assert all(len(steps) == STEPS for steps in ranks)
    return [([i for ids, _ in step for i in ids], sum(loss for _, loss in step) / processes) for step in zip(*ranks)]


def loss_of(dataset: Path, saved: Path, sent_ids: list[int]) -> float:
    """The loss of these sentences in one process, each with its own image."""
    columns = tiny_processor().columns(training=True, config=RelaModel.from_pretrained(saved).config)
    rows = grefcoco.load(str(dataset), split="train", columns=columns)
    places = {sent_id: place for place, sent_id in enumerate(rows.with_format(None)["sent_id"])}
    model = RelaModel.from_pretrained(saved)
    collator = tiny_processor().collator(model.config, training=True)
    return model.train()(**collator([rows[places[sent_id]] for sent_id in sent_ids])).loss.item()


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True], ids=["index", "stream"])
def test_a_global_batch_has_the_same_loss_in_1_2_and_4_processes(dataset, saved, tmp_path, streaming):
    runs = [run(number, tmp_path / str(number), dataset, saved, streaming, False) for number in (1, 2, 4)]
    for steps in runs:
        sent_ids, loss = steps[0]
        assert len(set(sent_ids)) == GLOBAL_BATCH, "every process trains on sentences of its own"
        assert loss == pytest.approx(loss_of(dataset, saved, sent_ids), rel=1e-5)
    if not streaming:  # a stream is divided among the processes by files
        for one, other in zip(runs[0] * 2, [*runs[1], *runs[2]]):
            assert sorted(one[0]) == sorted(other[0]) and one[1] == pytest.approx(other[1], rel=1e-4)


@pytest.mark.slow
def test_batches_that_accelerate_dispatches_are_whole_or_refused(dataset, saved, tmp_path):
    (tmp_path / "out").mkdir()
    ended = [process.wait() for process in start_group(2, fit, dataset, saved, tmp_path / "out", True, True)]
    if any(done.returncode for done in ended):
        assert "pass `dispatch_batches=False`" in ended[0].stderr
        assert not list((tmp_path / "out").glob("*.json"))
        return
    ranks = [json.loads((tmp_path / "out" / f"{rank}.json").read_text()) for rank in range(2)]
    sent_ids = ranks[0][0][0] + ranks[1][0][0]
    assert len(set(sent_ids)) == GLOBAL_BATCH
    assert (ranks[0][0][1] + ranks[1][0][1]) / 2 == pytest.approx(loss_of(dataset, saved, sent_ids), rel=1e-5)


def losses_of_a_part(out: Path) -> None:
    """The losses of this process's part of a batch, in a distributed run: parts differ in targets and objects."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    logits = torch.randn(4, 2, 8, 8, dtype=torch.float64)
    minimap, no_target = torch.randn(4, 16, 2, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    masks = (torch.rand(4, 32, 32) > torch.tensor([0.9, 0.2, 0.99, 0.8])[:, None, None]).double()
    categories = torch.randint(-1, 3, (4, 8, 8))
    categories[categories < 0] = -100
    categories[1] = -100
    part = slice(rank * 4 // size, (rank + 1) * 4 // size)
    empty = torch.tensor([False, False, True, True])
    region = RegionOutput(logits[part], minimap[part], no_target[part], None)
    losses = {"category": category_loss(logits.repeat(1, 2, 1, 1)[part], categories[part])}
    losses["vlt"] = mask_loss(logits[part, :1], masks[part, :8, :8], empty[part])
    for soft in (False, True):
        config = tiny_config(class_weights=[0.5, 2.0], soft_minimap=soft)
        losses |= {
            f"{soft} {name}": x for name, x in referring_loss([region], masks[part], empty[part], config)[1].items()
        }
    (out / f"{size}-{rank}.json").write_text(json.dumps({name: loss.item() for name, loss in losses.items()}))


def test_losses_of_two_processes_average_to_those_of_one(tmp_path):
    for process in [*start_group(1, losses_of_a_part, tmp_path), *start_group(2, losses_of_a_part, tmp_path)]:
        done = process.wait()
        assert done.returncode == 0, done.stderr
    one, *two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert len(one) == 8
    for name, loss in one.items():
        assert (two[0][name] + two[1][name]) / 2 == pytest.approx(loss, rel=1e-6), name


@pytest.mark.parametrize("kind", ["rela", "mdetr"])
def test_a_cut_batch_has_the_loss_of_the_whole(kind):
    """Accelerate's slices and joins along the first dimension."""
    torch.manual_seed(0)
    model = RelaModel(tiny_config(**INSTANCES, **BETTER_LOSS, class_weights=[1.0, 1.0]))
    processor = tiny_processor()
    if kind == "mdetr":
        model, processor = MdetrModel(tiny_mdetr.tiny_config()), tiny_mdetr.tiny_processor()
    rows = [{**row, "sent_id": i, "raw": row["sentence"]} for i, row in enumerate(expression_rows())]
    batch = processor.collator(model.config, training=True)(rows)
    assert "image_index" not in batch
    assert {len(x) for x in [*batch.values(), *batch["labels"].values()] if torch.is_tensor(x)} == {4}

    def cut(tensors: dict, part: slice) -> dict:
        return {name: cut(x, part) if isinstance(x, dict) else x[part] for name, x in tensors.items()}

    model.eval()  # no drop-out
    whole, halves = model(**batch), [model(**cut(batch, part)) for part in (slice(0, 2), slice(2, 4))]
    name = "pred_boxes" if kind == "mdetr" else "pred_masks"
    assert torch.allclose(torch.cat([half[name] for half in halves]), whole[name], atol=1e-5)
    if kind == "rela":  # MDETR divides by the number of boxes, which processes share and slices do not
        terms = ("mask", "minimap", "no_target")
        for term in terms:
            mean = sum(half.loss_terms[term] for half in halves) / 2
            assert mean.item() == pytest.approx(whole.loss_terms[term].item(), rel=1e-5)


def test_shared_images_give_the_same_outputs():
    torch.manual_seed(0)
    model = RelaModel(tiny_config(**INSTANCES)).eval()
    rows = [{**row, "sent_id": i} for i, row in enumerate(expression_rows())]
    repeated, shared = tiny_processor().collator()(rows), tiny_processor().collator(share_images=True)(rows)
    assert len(repeated["pixel_values"]) == 4 and len(shared["pixel_values"]) == 2
    with torch.no_grad():
        first, second = model(**repeated), model(**shared)
    assert torch.allclose(first.pred_masks, second.pred_masks, atol=1e-5)
    assert RelaCollator(tiny_processor())(rows)["image_index"].tolist() == [0, 0, 1, 1]


def test_data_parallel_is_refused():
    for model in (RelaModel(tiny_config()), MdetrModel(tiny_mdetr.tiny_config())):
        with pytest.raises(ValueError, match=r"nn\.DataParallel.*accelerate launch"):
            model._replicate_for_data_parallel()(torch.zeros(1, 3, 64, 64), torch.ones(1, 4, dtype=torch.long))
