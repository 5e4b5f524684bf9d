"""train.py: recipes and their errors, the sampler, a run from scenes to report, resuming."""

import json
import re
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

import train
from benchmarks.ablation import RECIPE, ROWS
from modeling.configuration_rela import RelaConfig
from modeling.new_models import refuse_unknown, word_tokenizer
from modeling.training_rela import parameter_groups
from tests.processes import fork, start_group
from tests.tiny_training import ROOT, tiny, train_and_die, train_here
from training.sampling import SentenceBatchSampler
from training.schedule import rate_factor

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def dataset(scenes_dataset):
    return scenes_dataset


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_name_only_what_exists(path):
    config = train.parse_config([str(path), "--dataset", "x"])
    fields = dict(config.model)
    config_class = type(AutoConfig.for_model(fields.pop("model_type", "rela")))
    if fields.get("backbone") == "auto":  # its configuration comes with the weights that --backbone names
        assert config.backbone
        fields["backbone_config"] = {"model_type": "dinov3_vit"}
    refuse_unknown(fields, config_class)
    config_class(**fields)


def test_the_ablation_changes_only_what_exists():
    recipe = train.parse_config([str(RECIPE), "--dataset", "x"])
    for fields, flags in ROWS.values():
        refuse_unknown(fields, RelaConfig)
        RelaConfig(**{**recipe.model, **fields})
        train.parse_config([str(RECIPE), "--dataset", "x", *(f"--{name}={json.dumps(flags[name])}" for name in flags)])


def test_flags_win_over_the_recipe():
    config = train.parse_config([str(ROOT / "recipes/unified.yaml"), "--dataset", "x", "--learning_rate", "0.5"])
    assert config.learning_rate == 0.5
    typed = train.parse_config(["--dataset", "x", "--augmentation", '{"flip": 0.5}', "--model", '{"depths": [1]}'])
    assert typed.augmentation == {"flip": 0.5} and typed.model == {"depths": [1]}
    with pytest.raises(ValueError, match="augmentation is 'flip', which is not JSON"):
        train.parse_config(["--dataset", "x", "--augmentation", "flip"])
    assert config.image_size == 128


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unknown key 'learning_rat'; did you mean learning_rate?"),
        ("- 1", "a recipe is a mapping"),
        ("a: [", "cannot read this recipe"),
        ("dataset: x\nlr_scheduler_type: linear", "lr_scheduler_type is 'linear'; it must be one of constant"),
        ("dataset: x\nmodel: {depth: 3}", "'depth' is not a field of RelaConfig"),
        ("max_train_steps: 0\ndataset: x", "max_train_steps is 0; it must be at least 1"),
        ("seed: 1", "name a built folder or a Hub id with --dataset"),
        ("dataset: x\neval_only: true", "name it with --checkpoint"),
        ("dataset: x\nmodel: {model_type: detr}", "model_type is 'detr'; choose one of rela, mdetr"),
        ("dataset: x\nmodel: {model_type: mdetr, depth: 3}", "'depth' is not a field of MdetrConfig"),
        ("dataset: x\naugmentation: {flips: 1}", "'flips' is none of hard_negatives, flip, colour, scale"),
        ("dataset: x\naugmentation: {flip: 2}", "flip is 2; it must be a number from 0 to 1"),
        ("dataset: x\naugmentation: flip", "augmentation is 'flip'; it must be a mapping"),
        ("dataset: x\nreport_to: mlflow", "report_to is 'mlflow'; it must be one of tensorboard, wandb, none"),
        ("dataset: x\nema_decay: 1.5", "ema_decay is 1.5; it must be at least 0 and less than 1"),
        ("dataset: x\nsplit: test", "test"),
    ],
)
def test_a_bad_recipe_is_one_clear_line(text, message, tmp_path, dataset, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(text.replace("dataset: x", f"dataset: {dataset}"))
    with pytest.raises(SystemExit) as stop:
        train.main([str(path), "--output_dir", str(tmp_path / "out")])
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: ")]
    assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr("training.config.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"report_to is 'wandb', which is not installed: `pip install wandb`"):
        train.parse_config(["--dataset", "x", "--report_to", "wandb"])
    assert train.parse_config(["--dataset", "x", "--report_to", "none"]).report_to == "none"


def test_flags_are_not_abbreviated_and_the_help_names_the_recipe(capsys):
    for flags in (["--learning-rat", "3"], ["--learning_rat=3"], ["--max_train", "9"]):
        with pytest.raises(ValueError, match=r"unknown flag --(learning.rat|max_train); did you mean"):
            train.parse_config(["--dataset", "x", *flags])
    with pytest.raises(ValueError, match=r"recipe.yaml: the recipe must be the first argument"):
        train.parse_config(["--dataset", "x", "recipe.yaml"])
    with pytest.raises(SystemExit):
        train.parse_config(["--help"])
    page = capsys.readouterr().out
    assert "train.py [recipe.yaml] [--flag value ...]" in page and "YAML file of flags" in page


def test_a_name_that_does_not_exist_is_asked_for_once(monkeypatch):
    requests = []

    def fail(self, name, timeout):
        requests.append((name, timeout))
        raise ConnectionError("no network")

    monkeypatch.setattr("training.config.HfApi.dataset_info", fail)
    with pytest.raises(ValueError, match=r"data/nope: there is no such folder, and the Hub does not give it \(no net"):
        train.Run(train.parse_config(["--dataset", "data/nope"]))
    assert requests == [("data/nope", 10)]


def test_a_missing_data_set_is_one_clear_line(tmp_path, capfd):
    flags = ["--dataset", tmp_path / "nowhere", "--output_dir", tmp_path / "o"]
    assert train_here(ROOT / "recipes/unified.yaml", *flags) == 2
    errors = capfd.readouterr().err
    assert "nowhere" in errors and "Traceback" not in errors


def test_an_epoch_holds_each_sentence_once_in_groups_of_one_image():
    image_ids = np.repeat(np.arange(12), 6)
    batches = iter(SentenceBatchSampler(image_ids, 12, 3, seed=1, rank=0, world_size=1))
    epochs = [[next(batches) for _ in range(6)] for _ in range(2)]
    for number, epoch in enumerate(epochs):
        assert sorted(key for batch in epoch for key in batch) == [(number, index) for index in range(72)]
        assert all(len({image_ids[index] for _, index in batch}) <= 4 for batch in epoch)


def test_processes_share_the_global_batch_and_a_start_is_a_step():
    image_ids = np.repeat(np.arange(10), 4)
    whole = iter(SentenceBatchSampler(image_ids, 8, 2, seed=3, rank=0, world_size=1))
    halves = [SentenceBatchSampler(image_ids, 4, 2, seed=3, rank=rank, world_size=2) for rank in (0, 1)]
    started = SentenceBatchSampler(image_ids, 8, 2, seed=3, rank=0, world_size=1, start=7)
    parts = [iter(half) for half in halves]
    seen = [next(whole) for _ in range(9)]
    assert seen == [next(parts[0]) + next(parts[1]) for _ in range(9)]
    assert [next(iter(started))] == seen[7:8]


def test_word_tokenizer_knows_frequent_words_and_spells_the_others():
    tokenizer = word_tokenizer(["The red circle.", "the red star", "a redd star"], max_words=3)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("the red, circle zed")["input_ids"])
    assert tokens == ["[CLS]", "the", "red", "[UNK]", "c", "##i", "##r", "##c", "##l", "##e", "[UNK]", "[SEP]"]
    assert tokenizer.pad_token_id == 0
    again = word_tokenizer(["a redd star", "the red star", "The red circle."], max_words=3)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_learning_rates():
    rates = [rate_factor("cosine", step, 100, warmup_steps=10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(rates[9], rel=0.03) and rates[-1] < 1e-3
    again = [rate_factor("constant", step, 100, warmup_steps=4, restart=50) for step in (0, 3, 49, 50, 53)]
    assert again == [0.25, 1, 1, 0.25, 1]
    assert [rate_factor("step", s, 9, decay_steps=[5, 8]) for s in (4, 5, 8)] == pytest.approx([1.0, 0.1, 0.01])


def test_norms_embeddings_and_tables_are_not_decayed_but_berts_norms_are():
    model = torch.nn.ModuleDict({"fc": torch.nn.Linear(2, 2), "norm": torch.nn.LayerNorm(2)})
    model["token"], model["text_encoder"] = torch.nn.Embedding(3, 2), torch.nn.LayerNorm(2)
    model["fc"].relative_position_bias_table = torch.nn.Parameter(torch.zeros(2, 2))
    decayed, kept = parameter_groups(model, 1.0, 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0)
    expected = [model["fc"].weight, model["fc"].bias, *model["text_encoder"].parameters()]
    assert {*map(id, decayed["params"])} == {*map(id, expected)}
    assert len(kept["params"]) == 4


def test_towers_have_rates_of_their_own():
    model = torch.nn.ModuleDict({"fc": torch.nn.Linear(2, 2), "tower": torch.nn.Linear(2, 2)})
    groups = parameter_groups(model, 1.0, 0.1, {"tower": 0.5})
    assert {group["lr"]: len(group["params"]) for group in groups} == {1.0: 2, 0.5: 2}


@pytest.fixture(scope="module")
def finished(finished_run):
    return finished_run


def test_a_run_leaves_report_pictures_metrics_and_model(finished, dataset, tmp_path):
    out = finished
    metrics = json.loads((out / "metrics.json").read_text())
    assert {"gIoU", "cIoU", "N_acc", "T_acc", "Pr@0.7"} <= set(metrics["gres"])
    assert metrics["train"]["steps"] == 8 and metrics["train"]["sentences"] == 64
    assert 0 < metrics["baselines"]["every object"]["gIoU"] < 100
    page = (out / "report.md").read_text()
    assert f"| **this model** | {metrics['gres']['gIoU']:.2f} |" in page and "| always empty |" in page
    for name in ("predictions.png", "learning_curve.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert {"config.json", "model.safetensors", "modeling_rela.py"} <= {p.name for p in (out / "checkpoint").iterdir()}
    again = ["--checkpoint", out / "checkpoint", "--dataset", dataset, "--per_device_train_batch_size", 8]
    assert train_here("--eval_only", *again, "--output_dir", tmp_path / "again", "--split", "val") == 0
    repeated = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert repeated["gres"] == metrics["gres"]


def test_the_ten_lines_of_the_readme(finished, dataset, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    code = blocks[0].replace("data/easy", str(dataset)).replace("runs/demo", str(finished))
    assert code.count("\n") <= 14 and "from_pretrained" in code
    exec(code, {})
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 3 and all(
        re.search(r": (none|\d+ pixels, boxes: \d+) \(none with probability [01]\.\d\d\)$", s) for s in lines
    )


@pytest.mark.slow
def test_resumed_equals_uninterrupted_bit_for_bit(finished, dataset, tmp_path):
    flags = tiny(dataset, tmp_path / "part", eval_steps=3, checkpointing_steps=5)
    assert fork(train_and_die, "backward", 7, signal.SIGKILL, *flags).returncode == -9
    assert not (tmp_path / "part" / "checkpoint").exists()
    resumed = fork(train_here, *flags, "--resume_from_checkpoint", "latest")
    assert resumed.returncode == 0, resumed.stderr
    first, second = (load_file(out / "checkpoint" / "model.safetensors") for out in (finished, tmp_path / "part"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_a_damaged_checkpoint_falls_back_to_the_one_before(dataset, tmp_path, capfd, caplog):
    flags = tiny(dataset, tmp_path / "out", checkpointing_steps=3)
    assert train_here(*flags) == 0
    newest = tmp_path / "out" / "checkpoints" / "step-00000006"
    weights = newest / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert train_here(*flags, "--resume_from_checkpoint", newest) == 2
    assert "model.safetensors is damaged; choose another" in capfd.readouterr().err
    assert train_here(*flags, "--resume_from_checkpoint", "latest") == 0
    assert "model.safetensors is damaged; trying the one before" in caplog.text


@pytest.mark.slow
def test_two_processes_train_together_and_measure_as_one_does(dataset, tmp_path):
    flags = tiny(dataset, tmp_path / "two", per_device_train_batch_size=4)
    for process in start_group(2, train_here, *flags):
        done = process.wait()
        assert done.returncode == 0, done.stderr
    together = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert together["train"]["sentences"] == 8 * 4 * 2, "the processes did not find each other"
    again = ["--checkpoint", tmp_path / "two" / "checkpoint", "--dataset", dataset, "--per_device_train_batch_size", 4]
    assert train_here("--eval_only", *again, "--output_dir", tmp_path / "one") == 0
    assert json.loads((tmp_path / "one" / "metrics.json").read_text())["gres"] == together["gres"]
