"""Models, processors and metrics by way of a Hub: the repository alone is enough, far from this one."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.hub_server import Hub
from tests.tiny_rela import expression_rows

ROOT = Path(__file__).resolve().parents[1]
TRANSFORMERS = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
PUSH = """
import json, torch
from PIL import Image
from modeling.modeling_rela import RelaModel
from tests.tiny_rela import tiny_config, tiny_processor
torch.manual_seed(0)
model, processor = RelaModel(tiny_config()).eval(), tiny_processor()
model.push_to_hub("me/rela")
processor.push_to_hub("me/rela")
with torch.no_grad():
    outputs = model(**processor(images=Image.open("picture.png"), text=["the red square", "all squares"]))
answers = processor.post_process_referring_segmentation(outputs, target_sizes=[(64, 64)] * 2, return_rle=True)
print(json.dumps(answers))
"""
USE = """
import json, sys, torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline
revision, size = sys.argv[1], [(64, 64)] * 2
image, sentences = Image.open("picture.png"), ["the red square", "all squares"]
model = AutoModel.from_pretrained("me/rela", trust_remote_code=True, revision=revision)
processor = AutoProcessor.from_pretrained("me/rela", trust_remote_code=True, revision=revision)
with torch.no_grad():
    outputs = model(**processor(images=image, text=sentences))
answers = processor.post_process_referring_segmentation(outputs, target_sizes=size, return_rle=True)
segment = pipeline("referring-segmentation", "me/rela", trust_remote_code=True, revision=revision)
for known, answer in zip(answers, segment(image, text=sentences, return_rle=True), strict=True):
    assert all(answer[name] == value for name, value in known.items())
assert not {"modeling", "grefcoco"} & set(sys.modules), "something came from where it was made"
print(json.dumps(answers))
"""
TRAINER = """
from transformers import Trainer, TrainingArguments
from modeling.modeling_rela import RelaModel
from modeling.processing_rela import RelaCollator
from tests.tiny_rela import expression_rows, tiny_config, tiny_processor
arguments = TrainingArguments(
    "out", max_steps=1, use_cpu=True, report_to=[], remove_unused_columns=False, label_names=["labels"],
    hub_model_id="me/rela", disable_tqdm=True, save_strategy="no",
)
trainer = Trainer(
    RelaModel(tiny_config()), arguments, data_collator=RelaCollator(tiny_processor()),
    train_dataset=expression_rows(), processing_class=tiny_processor(),
)
trainer.train()
trainer.push_to_hub()
"""
SPACES = """
import sys
from huggingface_hub import HfApi
for name in ("gres", "grec"):
    HfApi().create_repo(f"me/{name}", repo_type="space", space_sdk="gradio")
    HfApi().upload_folder(
        repo_id=f"me/{name}", repo_type="space", folder_path=f"{sys.argv[1]}/{name}", ignore_patterns="__pycache__/*"
    )
"""
SCORE = """
import json, evaluate
mask = {"size": [2, 2], "counts": "13"}
gres = evaluate.load("me/gres")
scores = gres.compute(predictions=[{"mask": mask, "no_target": 0.1}], references=[{"mask": mask, "no_target": False}])
grec, box = evaluate.load("me/grec"), [1.0, 1.0, 5.0, 5.0]
scores |= grec.compute(predictions=[{"boxes": [box], "scores": [0.9]}], references=[{"boxes": [box]}])
print(json.dumps(scores))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub(tmp_path / "hub", {"hf_me": "me"}) as hub:
        yield hub


@pytest.fixture
def homes(tmp_path: Path) -> tuple[Path, Path]:
    """The author's folder and the user's, a picture in each."""
    picture: Image.Image = expression_rows()[0]["image"]
    for name in ("author", "user"):
        (tmp_path / name).mkdir()
        picture.save(tmp_path / name / "picture.png")
    return tmp_path / "author", tmp_path / "user"


@pytest.mark.slow
def test_model_repository_is_enough(hub: Hub, homes: tuple[Path, Path]) -> None:
    author, user = homes
    pushed = hub.python(author, "-c", PUSH, token="hf_me", **TRANSFORMERS)
    assert pushed.returncode == 0, pushed.stderr
    there = hub.repository("model", "me/rela").files("main")
    assert {"model.safetensors", "modeling_rela.py", "pipeline_referring.py", "processing_rela.py"} <= set(there)
    assert not [name for name in there if name.endswith((".bin", ".pt", ".pkl"))], "safetensors only"
    used = hub.python(user, "-c", USE, "main", token=None, OMP_NUM_THREADS="1")
    assert used.returncode == 0, used.stderr
    assert json.loads(used.stdout) == json.loads(pushed.stdout)
    missing = hub.python(user, "-c", USE, "v7", token=None, OMP_NUM_THREADS="1")
    assert missing.returncode == 1 and "v7" in missing.stderr.splitlines()[-1]


@pytest.mark.slow
def test_model_push_cut_in_the_middle_completes_when_run_again(hub: Hub, homes: tuple[Path, Path]) -> None:
    author, user = homes
    hub.fail("POST", "/models/me/rela/commit/", after=1000)
    assert hub.python(author, "-c", PUSH, token="hf_me", **TRANSFORMERS).returncode == 1
    assert hub.repository("model", "me/rela").files("main") == {}
    hub.requests.clear()
    pushed = hub.python(author, "-c", PUSH, token="hf_me", **TRANSFORMERS)
    assert pushed.returncode == 0 and "PUT" not in {method for method, _ in hub.requests}, pushed.stderr
    assert hub.python(user, "-c", USE, "main", token=None, OMP_NUM_THREADS="1").stdout == pushed.stdout


@pytest.mark.slow
def test_trainer_pushes_all_that_is_needed(hub: Hub, homes: tuple[Path, Path]) -> None:
    author, user = homes
    pushed = hub.python(author, "-c", TRAINER, token="hf_me", **TRANSFORMERS)
    assert pushed.returncode == 0, pushed.stderr
    used = hub.python(user, "-c", USE, "main", token=None, OMP_NUM_THREADS="1")
    assert used.returncode == 0, used.stderr


@pytest.mark.slow
def test_metrics_load_from_their_spaces(hub: Hub, tmp_path: Path) -> None:
    pushed = hub.python(tmp_path / "author", "-c", SPACES, ROOT / "evaluate", token="hf_me")
    assert pushed.returncode == 0, pushed.stderr
    used = hub.python(tmp_path / "user", "-c", SCORE, token=None)
    assert used.returncode == 0, used.stderr
    scores = json.loads(used.stdout.splitlines()[-1])
    assert scores["gIoU"] == 100 and scores["F1_score"] == 1
