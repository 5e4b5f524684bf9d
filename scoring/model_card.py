"""The Hub card of a trained model: how to use it, what it scores and what it was trained on."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, HfApi, ModelCardData

from scoring import report
from training.families import Family

SEGMENTS = """\
```python
from transformers import pipeline

segment = pipeline("referring-segmentation", "{place}", trust_remote_code=True){comment}
for answer in segment("picture.jpg", text=["the two people on the left", "the red bus"]):
    print(answer["sentence"], "none" if answer["no_target"] else int(answer["mask"].sum()))
```
"""
DETECTS = """\
```python
from transformers import pipeline

detect = pipeline("referring-segmentation", "{place}", trust_remote_code=True){comment}
for answer in detect("picture.jpg", text=["the two people on the left", "the red bus"]):
    print(answer["sentence"], "none" if answer["no_target"] else answer["boxes"].tolist())
```
"""
IN_FOLDER = "  # run in this folder"
PRIVATE = ("dataset", "output_dir", "resume_from_checkpoint", "checkpoint")  # folders of the machine it ran on
SHOWN = {
    "gres": ("gIoU", "cIoU", "N_acc", "T_acc", "Pr@0.7", "Pr@0.8", "Pr@0.9"),
    "grec": ("F1_score", "N_acc", "T_acc"),
}
SAMPLES = "https://huggingface.co/datasets/mishig/sample_images/resolve/main"  # pictures of the Hub's own widgets
WIDGET = [
    {"src": f"{SAMPLES}/{picture}.jpg", "text": sentence, "example_title": title}
    for picture, sentence, title in (
        ("football-match", "all the players", "Several objects"),
        ("airport", "the airplane on the left", "One object"),
        ("savanna", "the red bus", "None"),
    )
]
TASKS = {"gres": "image-segmentation", "grec": "object-detection"}


def model_card(
    repository: str,
    family: Family,
    config: dict[str, object],
    summary: dict[str, dict],
    num_sentences: int,
) -> str:
    """README.md of a model repository, with the scores in the Hub's model-index form.

    Args:
        repository: Hub id, or a name where the model has none yet.
        config: of the run, by flag.
        summary: what metrics.json holds; without scores before the end of the training.
        num_sentences: that were measured.
    """
    dataset, revision = str(config["dataset"]), data_revision(str(config["dataset"]))
    on_hub = not Path(dataset).is_dir()
    data_name = dataset if on_hub else Path(dataset).name
    results = [
        EvalResult(
            task_type=TASKS[task],
            dataset_type=data_name,
            dataset_name=data_name,
            dataset_split=config["split"],
            dataset_revision=revision,
            metric_type=metric,
            metric_name=f"{task.upper()} {metric}",
            metric_value=round(summary[task][metric], 4),
        )
        for task, metrics in SHOWN.items()
        if task in summary
        for metric in metrics
    ]
    data = ModelCardData(
        library_name="transformers",
        license="other",
        license_name="apache-2.0-code-trained-on-licensed-data",
        license_link="#licence",
        base_model=_base_models(config),
        pipeline_tag=family.task,
        tags=["referring-expression", "gRefCOCO", *(task.upper() for task in SHOWN if task in summary)],
        datasets=[dataset] if on_hub else None,
        model_name=repository.rpartition("/")[2],
        eval_results=results or None,
        widget=WIDGET,
    )
    usage = SEGMENTS if family.task == "image-segmentation" else DETECTS
    public = {key: value for key, value in config.items() if key not in PRIVATE and value not in (None, {}, [], False)}
    recipe = yaml.safe_dump(public)
    parts = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {repository.rpartition('/')[2]}\n",
        f"{family.name}, trained on generalised referring expressions: a sentence may refer to one object in a "
        "picture, to several, or to none.\n",
        usage.format(place=repository if "/" in repository else ".", comment="" if "/" in repository else IN_FOLDER),
        *([report.results(summary, str(config["split"]), num_sentences)] if results else []),
        f"Trained on `{data_name}`, revision `{revision}`, with this recipe:\n\n```yaml\n{recipe}```\n",
        "## Licence\n",
        "The code is Apache-2.0. The annotations of gRefCOCO are CC BY-NC-SA 4.0 and COCO's images have their own "
        "licences: both bind what was trained on them.\n",
    ]
    return "\n".join(parts)


def _base_models(config: dict[str, object]) -> str | list[str] | None:
    """Hub ids of what the training started from: a checkpoint, or the weights of the vision and text encoders."""
    sources = [config["checkpoint"]] if config.get("checkpoint") else [config.get("backbone"), config.get("tokenizer")]
    ids = [source for source in sources if isinstance(source, str) and _is_hub_id(source)]
    return ids[0] if len(ids) == 1 else ids or None


def _is_hub_id(source: str) -> bool:
    """Whether the name of a model is a Hub id, and no file or folder."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source)) and not Path(source).exists()


def data_revision(dataset: str) -> str:
    """What identifies the data: the commit of a Hub data set, or the hash of a built folder's report."""
    folder = Path(dataset)
    if not folder.is_dir():
        return HfApi().dataset_info(dataset).sha
    shards = json.loads((folder / "build.json").read_text(encoding="utf-8"))["shards"]
    return hashlib.sha256(json.dumps(shards).encode()).hexdigest()[:16]
