"""What a training run computes and leaves: the same by any road to a global batch; a best model, pictures, a card."""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from scoring import pictures
from scoring.model_card import model_card
from tests.hub_server import Hub
from tests.processes import start_group
from tests.sizes import LARGE
from tests.tiny_training import ROOT, run, tiny, train_here
from training.families import FAMILIES

MDETR = {
    "model_type": "mdetr",
    "stem_channels": 16,  # sixteens: with fewer, and two threads, oneDNN was seen to corrupt memory on AVX-512
    "bottleneck_channels": [16, 16, 16, 16],
    "stage_channels": [16, 16, 16, 16],
    "depths": [1, 1, 1, 1],
    "hidden_size": 16,
    "num_attention_heads": 2,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "ffn_size": 16,
    "num_queries": 5,
    "text_config": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 64,
    },
}


@pytest.fixture(scope="module")
def dataset(scenes_dataset):
    return scenes_dataset


def weights(out: Path, name: str = "checkpoint") -> dict[str, torch.Tensor]:
    return load_file(out / name / "model.safetensors")


def close(first: dict, second: dict, tolerance: float = 2e-5) -> bool:
    return all(torch.allclose(first[name], second[name], rtol=1e-3, atol=tolerance) for name in first)


def plain(dataset: Path, out: Path, **flags: object) -> list[str]:
    """Arguments of a run without drop-out whose loss is a mean over sentences."""
    (path,) = tiny(dataset, out, category_warmup_steps=0, category_supervision=False, max_train_steps=6, **flags)
    recipe = yaml.safe_load(Path(path).read_text())
    recipe["model"] |= {"class_weights": [1.0, 1.0], "num_instance_queries": 0, "merge_instances": False}
    recipe["model"]["text_config"]["hidden_dropout_prob"] = 0.0
    Path(path).write_text(yaml.safe_dump(recipe))
    return [path]


@pytest.fixture(scope="module")
def one(dataset, tmp_path_factory):
    """A run of one process with whole batches."""
    out = tmp_path_factory.mktemp("runs") / "one"
    assert train_here(*plain(dataset, out)) == 0
    return out


def loss(out: Path) -> float:
    return json.loads((out / "metrics.json").read_text())["history"][0]["loss"]


@pytest.mark.slow
def test_accumulated_batches_are_one_batch(one, dataset, tmp_path):
    out = tmp_path / "accumulated"
    assert train_here(*plain(dataset, out, per_device_train_batch_size=2, gradient_accumulation_steps=4)) == 0
    assert loss(out) == pytest.approx(loss(one), rel=1e-5)
    assert close(weights(one), weights(out))


@pytest.mark.slow
def test_two_processes_are_one(one, dataset, tmp_path):
    out = tmp_path / "two"
    flags = plain(dataset, out, per_device_train_batch_size=4)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py"]
    done = run(*torchrun, *flags)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["train"]["sentences"] == 6 * 4 * 2, "the processes did not find each other"
    assert loss(out) == pytest.approx(loss(one), rel=1e-5)
    assert close(weights(one), weights(out))


def train_sharded(*flags: object) -> int:
    """Run train.py with FSDP on CPUs: Accelerate keeps it to accelerators, torch does not."""
    init = AcceleratorState.__init__

    def sharded(self: AcceleratorState, *args: object, **kwargs: object) -> None:
        init(self, *args, **kwargs)
        self.fsdp_plugin = kwargs.get("fsdp_plugin") or self.fsdp_plugin
        self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = sharded
    return train_here(*flags)


def train_together(function: Callable[..., int], *flags: object, **variables: str) -> list[CompletedProcess]:
    return [process.wait() for process in start_group(2, function, *flags, **variables)]


@pytest.mark.slow
def test_sharded_weights_are_whole_ones(dataset, tmp_path):
    flags = {"per_device_train_batch_size": 4, "max_train_steps": 6, "checkpointing_steps": 4}
    for done in train_together(train_here, *tiny(dataset, tmp_path / "whole", **flags)):
        assert done.returncode == 0, done.stderr
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}
    fsdp |= {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    parts = tiny(dataset, tmp_path / "parts", **flags)
    for done in train_together(train_sharded, *parts, **fsdp):
        assert done.returncode == 0, done.stderr
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert found.keys() == expected.keys() and close(expected, found)
    checkpoint = tmp_path / "parts" / "checkpoints" / "step-00000004"
    assert (checkpoint / "pytorch_model_fsdp.bin").exists(), "nothing was sharded"
    for done in train_together(train_sharded, *parts, "--resume_from_checkpoint", "latest", **fsdp):
        assert done.returncode == 0, done.stderr
    assert all(torch.equal(found[name], value) for name, value in weights(tmp_path / "parts").items())
    for done in train_together(train_sharded, *parts, "--ema_decay", "0.9", **fsdp):
        assert done.returncode == 2 and "train.py: ema_decay is 0.9, and with FSDP" in done.stderr


@pytest.mark.slow
def test_checkpointed_activations_are_the_same(one, dataset, tmp_path):
    assert train_here(*plain(dataset, tmp_path / "out"), "--gradient_checkpointing") == 0
    assert close(weights(one), weights(tmp_path / "out"))


@pytest.mark.slow
def test_a_compiled_run_is_the_same(one, dataset, tmp_path, monkeypatch):
    """The graph and its gradients as torch.compile makes them; with LARGE also the C++ code, minutes of g++."""
    backends, compile_module = [], torch.nn.Module.compile

    def compile_graph(module: torch.nn.Module) -> None:
        backends.append("inductor" if LARGE else "aot_eager")
        compile_module(module, backend=backends[-1])

    monkeypatch.setattr(torch.nn.Module, "compile", compile_graph)
    assert train_here(*plain(dataset, tmp_path / "out"), "--torch_compile") == 0
    assert len(backends) == 1, "nothing was compiled"
    assert close(weights(one), weights(tmp_path / "out"), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16"])
def test_half_precision_trains(one, dataset, tmp_path, precision):
    assert train_here(*plain(dataset, tmp_path / "out"), "--mixed_precision", precision) == 0
    assert loss(tmp_path / "out") == pytest.approx(loss(one), rel=0.05)


@pytest.mark.slow
def test_the_running_average_is_what_is_measured_and_saved(one, dataset, tmp_path):
    out = tmp_path / "out"
    assert train_here(*plain(dataset, out, ema_decay=0.999)) == 0
    start = train.Run(train.parse_config(plain(dataset, tmp_path / "start")))
    first = {name: value.clone() for name, value in start.model.state_dict().items()}
    moved = [(weights(one)[name] - first[name]).norm() for name in first if first[name].is_floating_point()]
    averaged = [(weights(out)[name] - first[name]).norm() for name in first if first[name].is_floating_point()]
    assert 0 < sum(averaged) < 0.02 * sum(moved)


@pytest.mark.slow
def test_frozen_parameters_stay(dataset, tmp_path):
    out = tmp_path / "out"
    assert train_here(*plain(dataset, out, frozen=["text_encoder."])) == 0
    start = train.Run(train.parse_config(plain(dataset, tmp_path / "start")))
    same = {name: torch.equal(value, weights(out)[name]) for name, value in start.model.state_dict().items()}
    assert all(same[name] for name in same if name.startswith("text_encoder."))
    assert not any(same[name] for name in same if name.startswith("region_decoder.layers.0.fc1"))


@pytest.fixture(scope="module")
def finished(finished_run):
    return finished_run


def test_the_best_model_is_kept(finished):
    history = json.loads((finished / "metrics.json").read_text())["history"]
    scores = [row["gIoU"] for row in history if "gIoU" in row]
    assert len(scores) == 3
    assert {"config.json", "model.safetensors", "modeling_rela.py"} <= {p.name for p in (finished / "best").iterdir()}


def test_the_tracker_shows_scores_and_predictions(finished):
    scalars, images = set(), set()
    for path in finished.rglob("events.out*"):
        tags = EventAccumulator(str(path)).Reload().Tags()
        scalars |= set(tags["scalars"])
        images |= set(tags["images"])
    assert {"loss", "learning_rate", "gIoU", "N_acc"} <= scalars and images == {"predictions"}


def test_pictures_show_predictions_and_extremes(finished):
    for name in ("predictions.png", "best_and_worst.png", "learning_curve.png", "calibration.png"):
        with Image.open(finished / name) as picture:
            assert (
                min(picture.size) > 300 and len(set(picture.convert("L").resize((64, 64)).get_flattened_data())) > 30
            )


def test_all_files_of_the_model_have_one_mode(finished):
    assert len({path.stat().st_mode & 0o777 for path in (finished / "checkpoint").iterdir() if path.is_file()}) == 1


def test_the_card_holds_the_scores_the_recipe_and_the_data(finished, dataset):
    card = ModelCard.load(finished / "checkpoint" / "README.md")
    metrics = json.loads((finished / "metrics.json").read_text())
    results = {result.metric_type: result for result in card.data.eval_results}
    assert results["gIoU"].metric_value == round(metrics["gres"]["gIoU"], 4) and results["gIoU"].dataset_split == "val"
    assert len(results["gIoU"].dataset_revision) == 16 and results["gIoU"].dataset_name == dataset.name
    assert card.data.library_name == "transformers" and "max_train_steps: 8" in card.text
    assert f"| **this model** | {metrics['gres']['gIoU']:.2f} |" in card.text


def test_the_report_says_how_sure_it_is_and_what_made_it(finished):
    page, metrics = (finished / "report.md").read_text(), json.loads((finished / "metrics.json").read_text())
    low, high = metrics["intervals"]["gres"]["gIoU"]
    assert low <= metrics["gres"]["gIoU"] <= high
    assert f"| 95 % interval | {low:.2f} to {high:.2f} |" in page and "bootstrap over images" in page
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", page)
    assert {"best_and_worst.png", "calibration.png", "learning_curve.png"} <= set(pictures)
    assert all((finished / name).is_file() for name in pictures)
    rejected = metrics["breakdown"]["num_targets=0"]["rejected"]
    assert f"{1 - rejected:.0f} of 1 were not answered “none”" in page
    assert ("no_target_failures.png" in pictures) == (rejected < 1)
    for name in ("torch", "transformers", "datasets", "numpy"):
        assert f"| {name} | {version(name)} |" in page
    assert f"| CPU cores | {len(os.sched_getaffinity(0))} |" in page


def test_the_learning_curve_marks_the_category_warm_up(tmp_path, monkeypatch):
    history = [{"step": 50, "loss": 2.0}, {"step": 100, "loss": 1.0, "gIoU": 20.0}, {"step": 200, "gIoU": 40.0}]
    figures = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path, dpi: figures.append(figure))
    pictures.draw_learning_curve(history, tmp_path / "x.png", warmup_steps=70, split="testA")
    for axes, label in zip(figures[0].axes, (None, "gIoU")):
        (band,) = [patch for patch in axes.patches if patch.get_label() == "category warm-up"]
        assert band.get_x() == 0 and band.get_width() == 70 and 200 <= axes.get_xlim()[1] < 210
        assert label is None or axes.lines[0].get_label() == label
    assert [len(line.get_xdata()) for line in figures[0].axes[0].lines] == [1, 1], "the two losses are joined"
    assert "testA" in figures[0].axes[1].get_title()


def test_the_cards_example_runs_as_typed(finished, dataset, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(finished / "checkpoint", tmp_path / "model")
    picture = next((dataset.parent / "scenes" / "train2014").iterdir())
    Image.open(picture).convert("RGB").save(folder / "picture.jpg")
    (block,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    exec(block, {})
    assert len(capsys.readouterr().out.splitlines()) == 2
    widget = ModelCard.load(folder / "README.md").data.widget
    assert all(entry.keys() == {"src", "text", "example_title"} for entry in widget)


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ({"backbone": "microsoft/swin-base", "tokenizer": "google-bert/bert-base"}, 2),
        ({"backbone": "microsoft/swin-base", "checkpoint": "me/rela-1.5"}, "me/rela-1.5"),
        ({"backbone": "weights/yolo.npz", "tokenizer": None}, None),
        ({"checkpoint": "runs/demo"}, None),
    ],
)
def test_the_card_names_what_the_training_started_from(sources, expected, dataset, tmp_path, monkeypatch):
    for name in ("weights/yolo.npz", "runs/demo"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    config = {"dataset": str(dataset), "split": "val", **sources}
    card = ModelCard(model_card("me/model", FAMILIES["rela"], config, {}, 0))
    found = card.data.base_model
    assert (len(found) if isinstance(found, list) else found) == expected


def test_every_flag_has_a_help_text_and_a_user():
    code = "".join((ROOT / name).read_text() for name in ("train.py", "training/families.py"))
    for flag in dataclasses.fields(train.TrainConfig):
        assert len(flag.metadata["help"]) > 10
        assert f"config.{flag.name}" in code, flag.name


@pytest.fixture(scope="module")
def mdetr(dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "mdetr"
    flags = tiny(dataset, out, model=MDETR, category_warmup_steps=0, category_supervision=False, eval_steps=4)
    assert train_here(*flags, "--ema_decay", 0.5, "--metric_for_best_model", "grec/F1_score") == 0
    return out


def test_mdetr_trains_and_is_measured_by_its_boxes(mdetr):
    metrics = json.loads((mdetr / "metrics.json").read_text())
    assert set(metrics["grec"]) == {"F1_score", "T_acc", "N_acc", "always_empty/F1_score"} and "gres" not in metrics
    assert np.isfinite([row["loss"] for row in metrics["history"] if "loss" in row]).all()
    page = (mdetr / "report.md").read_text()
    assert "## GREC, split val, 36 sentences" in page and "GRES" not in page
    card = ModelCard.load(mdetr / "checkpoint" / "README.md")
    assert card.data.pipeline_tag == "object-detection"


def test_mdetr_is_measured_again_the_same(mdetr, dataset, tmp_path):
    flags = ["--eval_only", "--checkpoint", mdetr / "checkpoint", "--dataset", dataset, "--report_to", "none"]
    assert train_here(*flags, "--per_device_train_batch_size", 8, "--output_dir", tmp_path / "again") == 0
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert again["grec"] == json.loads((mdetr / "metrics.json").read_text())["grec"]


@pytest.mark.slow
def test_the_readmes_life_from_nothing_to_a_shared_model(dataset, tmp_path):
    """Build and push the data, train from the Hub and push the model, measure it from the Hub, use it elsewhere."""
    author, user = tmp_path / "author", tmp_path / "user"
    author.mkdir()
    user.mkdir()
    with Hub(tmp_path / "hub", {"hf_me": "me"}) as hub:

        def shell(script: str, *flags: object) -> None:
            done = hub.python(author, ROOT / script, *flags, token="hf_me")
            assert done.returncode == 0, done.stderr

        scenes = dataset.parent / "scenes"
        build = ["--annotations", scenes, "--images", scenes / "train2014", "--out", tmp_path / "built"]
        shell("grefcoco.py", "build", *build, "--push-to-hub", "me/grefcoco")
        flags = tiny("me/grefcoco", tmp_path / "out", checkpointing_steps=4, category_warmup_steps=0)
        flags += ["--push_to_hub", "--hub_model_id", "me/rela", "--hub_strategy", "checkpoint"]
        shell("train.py", *flags)
        files = hub.repository("model", "me/rela").files("main")
        assert {"README.md", "model.safetensors", "modeling_rela.py"} <= set(files)
        card = ModelCard.load(tmp_path / "out" / "checkpoint" / "README.md")
        assert card.data.datasets == ["me/grefcoco"] and len(card.data.eval_results[0].dataset_revision) >= 32
        measure = ["--eval_only", "--checkpoint", "me/rela", "--dataset", "me/grefcoco", "--split", "testA"]
        shell("train.py", *measure, "--report_to", "none", "--output_dir", tmp_path / "testA")
        assert "split testA" in (tmp_path / "testA" / "report.md").read_text()
        (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
        code = code.replace("picture.jpg", str(next((scenes / "train2014").iterdir())))
        used = hub.python(user, "-c", code, token=None)
        assert used.returncode == 0 and len(used.stdout.splitlines()) == 2, used.stderr
        refused = hub.python(author, ROOT / "train.py", *flags, token="hf_nobody")
        assert refused.returncode == 2 and "Traceback" not in refused.stderr
