"""LoRA as the README describes it: PEFT's adapters attach, train by Trainer, are saved, load and merge."""

import re
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments

from modeling.modeling_mdetr import MdetrModel
from modeling.modeling_rela import RelaModel
from tests import tiny_mdetr
from tests.tiny_rela import INSTANCES, SWIN, expression_rows, tiny_config, tiny_processor
from tests.tiny_training import ROOT

peft = pytest.importorskip("peft")
MODELS = {
    "rela": (lambda: RelaModel(tiny_config(**SWIN)), tiny_processor),
    "unified": (lambda: RelaModel(tiny_config(**INSTANCES)), tiny_processor),
    "mdetr": (lambda: MdetrModel(tiny_mdetr.tiny_config()), tiny_mdetr.tiny_processor),
}


def readme_config() -> object:
    """The LoraConfig of the README."""
    (block,) = re.findall(r"```python\n(from peft import.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    (call,) = re.findall(r"LoraConfig\(.*?\]\)", block, flags=re.DOTALL)
    return eval(call, {"LoraConfig": peft.LoraConfig})


def outputs(model: torch.nn.Module, batch: dict) -> list[torch.Tensor]:
    """All tensors of the model's answers."""
    with torch.no_grad():
        answer = model.eval()(**{name: x for name, x in batch.items() if name != "labels"})
    return [x for x in answer.values() if isinstance(x, torch.Tensor)]


def saved_model(kind: str, folder: Path) -> tuple[PreTrainedModel, object]:
    torch.manual_seed(0)
    model, processor = MODELS[kind][0](), MODELS[kind][1]()
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder), processor


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_adapters_train_save_load_and_merge(kind, tmp_path):
    model, processor = saved_model(kind, tmp_path / "base")
    rows = [{**row, "sent_id": i, "raw": row["sentence"]} for i, row in enumerate(expression_rows())]
    collator = processor.collator(model.config, training=True)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    adapted = peft.get_peft_model(model, readme_config())
    attached = {name for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
    assert any("text_encoder" in name for name in attached) and any("q_proj" in name for name in attached)
    trained = {name for name, x in adapted.named_parameters() if x.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    arguments = TrainingArguments(
        tmp_path / "trainer", max_steps=2, per_device_train_batch_size=4, learning_rate=0.05, use_cpu=True,
        remove_unused_columns=False, label_names=["labels"], report_to=[], save_strategy="no",
        accelerator_config={"dispatch_batches": False},
    )  # fmt: skip
    Trainer(adapted, arguments, collator, train_dataset=rows).train()
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items() if name in before)
    batch = collator(rows)
    expected = outputs(adapted, batch)
    adapted.save_pretrained(tmp_path / "lora")
    base = type(model).from_pretrained(tmp_path / "base")
    changes = [(x - y).abs().max().item() for x, y in zip(expected, outputs(base, batch), strict=True)]
    assert max(changes) > 1e-3, "the adapters have learnt something"
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "lora")
    for x, y in zip(outputs(loaded, batch), expected, strict=True):
        assert torch.equal(x, y)
    merged = loaded.merge_and_unload()
    assert type(merged) is type(model)
    merged.save_pretrained(tmp_path / "merged")
    for x, y in zip(outputs(type(model).from_pretrained(tmp_path / "merged"), batch), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)
