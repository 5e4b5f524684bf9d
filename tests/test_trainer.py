"""transformers' Trainer with our collator and metrics: the README's lines, and the same scores as train.py's."""

import json
import re
import tracemalloc

import evaluate
import pytest
import torch
from transformers import EvalPrediction, Trainer, TrainingArguments

import grefcoco
from modeling.modeling_mdetr import MdetrModel
from modeling.modeling_rela import RelaModel
from modeling.trainer_metrics import TrainerMetrics
from tests import tiny_mdetr
from tests.tiny_rela import INSTANCES, expression_rows, tiny_config, tiny_processor
from tests.tiny_training import ROOT, tiny, train_here

GRES, GREC = (evaluate.load(str(ROOT / "evaluate" / name)) for name in ("gres", "grec"))


@pytest.fixture(scope="module")
def dataset(scenes_dataset):
    return scenes_dataset


def arguments(out, **changes: object) -> TrainingArguments:
    options = {"remove_unused_columns": False, "label_names": ["labels"], "batch_eval_metrics": True}
    options |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "per_device_eval_batch_size": 8}
    return TrainingArguments(str(out), **options | changes)


def trainer_of(model, out, rows, metrics, **changes: object) -> Trainer:
    return Trainer(
        model, arguments(out, **changes), tiny_processor().collator(), rows, rows,
        compute_metrics=metrics, preprocess_logits_for_metrics=metrics.reduce,
    )  # fmt: skip


@pytest.mark.slow
def test_the_readmes_fine_tuning_and_its_scores_are_train_pys(dataset, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    assert train_here(*tiny(dataset, out, per_device_train_batch_size=8)) == 0
    expected = json.loads((out / "metrics.json").read_text())
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
               if "Trainer(" in block]  # fmt: skip
    assert code.count("\n") <= 25
    code = code.replace("data/easy", str(dataset)).replace("runs/demo", str(out)).replace("runs/tuned", str(tmp_path))
    code = code.replace("./evaluate", str(ROOT / "evaluate")).replace("max_steps=100", "max_steps=2, use_cpu=True")
    untrained = code.replace("trainer.train()\n", "scores = trainer.evaluate()\n")
    found: dict = {}
    exec(untrained, found)
    for name in ("gIoU", "cIoU", "N_acc", "T_acc", "Pr@0.7"):
        assert found["scores"][f"eval_{name}"] == pytest.approx(expected["gres"][name], abs=1e-9)
    assert found["scores"]["eval_grec/F1_score"] == expected["grec"]["F1_score"]
    exec(code, {})
    assert all(0 <= float(score) <= 100 for score in capsys.readouterr().out.splitlines()[-1].split())


@pytest.mark.parametrize("kind", ["rela", "mdetr"])
def test_boxes_score_as_in_train_py(dataset, tmp_path, kind):
    torch.manual_seed(0)
    if kind == "rela":
        model, processor = RelaModel(tiny_config(**INSTANCES)), tiny_processor()
        torch.nn.init.constant_(model.instance_chooser.relevance[-1].bias, 3.0)  # so that boxes pass the threshold
    else:
        model, processor = MdetrModel(tiny_mdetr.tiny_config()), tiny_mdetr.tiny_processor()
    collator, metrics = processor.collator(model.config, training=True), processor.trainer_metrics(GRES, GREC)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    evaluation = ("--eval_only", "--checkpoint", tmp_path / "model", "--dataset", dataset, "--report_to", "none")
    assert train_here(*evaluation, "--output_dir", tmp_path / "out", "--per_device_train_batch_size", 8) == 0
    expected = json.loads((tmp_path / "out" / "metrics.json").read_text())
    rows = grefcoco.load(str(dataset), split="val")
    trainer = Trainer(
        model, arguments(tmp_path), collator, eval_dataset=rows,
        compute_metrics=metrics, preprocess_logits_for_metrics=metrics.reduce,
    )  # fmt: skip
    scores = trainer.evaluate()
    assert {name: scores[f"eval_grec/{name}"] for name in expected["grec"]} == expected["grec"]
    assert expected["grec"]["T_acc"] > 0, "no box passed the threshold: nothing was compared"
    for name in ("gIoU", "N_acc") if kind == "rela" else ():
        assert scores[f"eval_{name}"] == pytest.approx(expected["gres"][name], abs=1e-9)


def test_labels_filled_up_for_other_processes_are_no_boxes():
    processor = tiny_processor()
    metrics, batch = processor.trainer_metrics(GRES, GREC), processor.collator()(expression_rows())
    labels = {**batch.pop("labels"), "sent_id": torch.arange(4)}
    with torch.no_grad():
        outputs = RelaModel(tiny_config(**INSTANCES)).eval()(**batch)
    kept = metrics.reduce(tuple(outputs[name] for name in processor.output_names), labels)
    assert torch.equal(metrics.reduce(outputs, labels), kept), "a tuple as Trainer's, or the model's outputs"
    expected = metrics(EvalPrediction(kept, labels))
    filled = torch.nn.functional.pad(labels["target_boxes"], (0, 0, 0, 3), value=-100)
    assert metrics(EvalPrediction(kept, {**labels, "target_boxes": filled})) == expected
    moved = labels["target_boxes"].clone()
    moved[1, 0] = torch.tensor([0.0, 0.0, 9.0, 9.0])
    assert metrics(EvalPrediction(kept, {**labels, "target_boxes": moved})) != expected, "they are not looked at"


@pytest.mark.slow
def test_trainer_learns_a_batch(tmp_path):
    torch.manual_seed(0)
    model = RelaModel(tiny_config(mask_loss="bce_dice", loss_scale=1.0))
    rows = [{**row, "sent_id": i} for i, row in enumerate(expression_rows())]
    metrics = TrainerMetrics(tiny_processor(), GRES)
    trainer = trainer_of(model, tmp_path, rows, metrics, max_steps=40, learning_rate=3e-3)
    before = trainer.evaluate()["eval_gIoU"]
    trainer.train()
    assert trainer.evaluate()["eval_gIoU"] > before + 20


def test_padding_of_a_sampler_counts_once_and_scores_start_afresh(tmp_path):
    rows = [{**row, "sent_id": i} for i, row in enumerate(expression_rows())]
    metrics = TrainerMetrics(tiny_processor(), GRES)
    trainer = trainer_of(RelaModel(tiny_config()), tmp_path, [*rows, rows[0]], metrics)
    first, again = trainer.evaluate(), trainer.evaluate()
    assert first["eval_gIoU"] == again["eval_gIoU"] and len(metrics.accumulators["gres"]) == 0
    alone = trainer_of(RelaModel.from_pretrained(_saved(trainer.model, tmp_path)), tmp_path, rows, metrics)
    assert alone.evaluate()["eval_gIoU"] == pytest.approx(first["eval_gIoU"])


def _saved(model, folder):
    model.save_pretrained(folder / "saved")
    return folder / "saved"


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_sentences(tmp_path):
    rows = [{**row, "sent_id": i} for i, row in enumerate(expression_rows())]
    peaks = []
    for copies in (4, 64):
        many = [{**rows[i % 4], "sent_id": i} for i in range(4 * copies)]
        trainer = trainer_of(RelaModel(tiny_config()), tmp_path, many, TrainerMetrics(tiny_processor(), GRES))
        tracemalloc.start()
        trainer.evaluate()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 240 * 4096, "less than a 64 x 64 mask more for each sentence"


def test_rows_of_the_data_set_are_what_the_collator_takes(dataset):
    rows = grefcoco.load(str(dataset), split="val")
    labels = tiny_processor().collator()([rows[0], rows[1]])["labels"]
    assert labels["sent_id"].tolist() == [rows[0]["sent_id"], rows[1]["sent_id"]]
