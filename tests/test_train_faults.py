"""What can go wrong in training: a run is killed, told to stop, has no disk left, meets numbers like nan."""

import json
import resource
import signal

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

import train
from grefcoco_data import image_rows
from modeling.training_state import aside, broken_seal, put, seal
from tests.processes import fork, start_group
from tests.tiny_training import make_dataset, tiny, train_and_die, train_here


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:  # several files of several groups, as real data has
        for module in (train.grefcoco, image_rows):
            patch.setattr(module, "ROWS_PER_GROUP", 4)
        folder = make_dataset(tmp_path_factory.mktemp("data"))
    files = sorted((folder / "data").glob("train-*.parquet"))
    assert [pq.ParquetFile(file).num_row_groups for file in files] == [2, 2, 2, 2]
    return folder


def weights(out):
    return load_file(out / "checkpoint" / "model.safetensors")


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


KILLED = {
    "workers, augmented, averaged": {
        "dataloader_num_workers": 2,
        "augmentation": {"hard_negatives": 0.3, "flip": 0.5, "colour": 0.2, "scale": 0.2},
        "ema_decay": 0.9,
        "gradient_accumulation_steps": 2,
    },
    "stream with workers": {"streaming": True, "dataloader_num_workers": 2, "augmentation": {"flip": 0.5}},
}
STEPS = {"max_train_steps": 18, "eval_steps": 100, "checkpointing_steps": 7}
SIGNALS = {
    "killed in a step": (signal.SIGKILL, "backward", 10),
    "killed while a checkpoint is written": (signal.SIGKILL, "save_state", 2),
    "told to stop": (signal.SIGTERM, "backward", 12),
}


@pytest.fixture(scope="module", params=KILLED.values(), ids=KILLED)
def whole(request, dataset, tmp_path_factory):
    """The flags of a run that was not killed, and its folder."""
    out = tmp_path_factory.mktemp("whole") / "out"
    done = fork(train_here, *tiny(dataset, out, **STEPS, **request.param))
    assert done.returncode == 0, done.stderr
    return request.param, out


@pytest.mark.slow
@pytest.mark.parametrize(("number", "method", "call"), SIGNALS.values(), ids=SIGNALS)
def test_a_run_that_was_killed_goes_on_bit_for_bit(whole, dataset, tmp_path, number, method, call):
    part, (options, whole) = tmp_path / "part", whole
    flags = tiny(dataset, part, **STEPS, **options)
    calls = call * options.get("gradient_accumulation_steps", 1) if method == "backward" else call
    killed = fork(train_and_die, method, calls, number, *flags)
    assert killed.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143}[number], killed.stderr
    if number == signal.SIGTERM:
        assert "--resume_from_checkpoint latest goes on from there" in killed.stdout
    assert (part / "checkpoints" / "step-00000007").exists() and not (part / "checkpoint").exists()
    done = fork(train_here, *flags, "--resume_from_checkpoint", "latest")
    assert done.returncode == 0, done.stderr
    assert same(weights(whole), weights(part))
    losses = [[row["loss"] for row in json.loads((out / "metrics.json").read_text())["history"] if "loss" in row]
              for out in (whole, part)]  # fmt: skip
    assert len(losses[0]) == len(losses[1]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True], ids=["index", "stream"])
def test_two_processes_killed_go_on_bit_for_bit(dataset, tmp_path, streaming):
    flags = {"per_device_train_batch_size": 4, "max_train_steps": 14, "checkpointing_steps": 6, "eval_steps": 100}
    flags |= {"streaming": streaming, "sentences_per_image": 2}
    whole, part = tmp_path / "whole", tmp_path / "part"
    for process in start_group(2, train_here, *tiny(dataset, whole, **flags)):
        done = process.wait()
        assert done.returncode == 0, done.stderr
    for process in start_group(2, train_and_die, "backward", 9, signal.SIGKILL, *tiny(dataset, part, **flags)):
        assert process.wait().returncode == -9
    assert (part / "checkpoints" / "step-00000006").exists() and not (part / "checkpoint").exists()
    resumed = start_group(2, train_here, *tiny(dataset, part, **flags), "--resume_from_checkpoint", "latest")
    first, second = [process.wait() for process in resumed]
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "| 6/14 [" in first.stderr, "it started at the beginning"
    assert same(weights(whole), weights(part))
    assert json.loads((part / "metrics.json").read_text())["train"]["sentences"] == 14 * 4 * 2


def test_a_second_signal_stops_at_once(dataset, tmp_path, monkeypatch):
    stopped = train.Run(train.parse_config([*tiny(dataset, tmp_path / "out")]))
    restored = []
    monkeypatch.setattr(train.signal, "signal", lambda number, handler: restored.append((number, handler)))
    stopped.stop(signal.SIGINT, None)
    assert stopped.stopping() and restored == [(signal.SIGINT, signal.SIG_DFL)]


def train_on_a_full_disk(*flags: str) -> int:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    return train_here(*flags)


def test_a_full_disk_is_one_line_and_older_checkpoints_stay(dataset, tmp_path):
    flags = tiny(dataset, tmp_path / "out", checkpointing_steps=3)
    assert train_here(*flags, "--max_train_steps", 4) == 0
    older = tmp_path / "out" / "checkpoints" / "step-00000003"
    done = fork(train_on_a_full_disk, *flags, "--resume_from_checkpoint", "latest")
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert "cannot write" in line and "step-00000006" in line and "make room" in line
    assert "Traceback" not in done.stderr
    assert broken_seal(older) is None
    assert not (older.parent / ".writing").exists()


class Poisoned(train.RelaCollator):
    """Makes the image of some sentences not finite."""

    bad: frozenset[int] = frozenset()

    def __call__(self, rows):
        batch = super().__call__(rows)
        if self.bad & {row["sent_id"] for row in rows}:
            batch["pixel_values"][0, 0, 0, 0] = float("nan")
        return batch


def test_a_batch_that_is_not_finite_is_left_out_counted_and_named(dataset, tmp_path, monkeypatch, caplog):
    rows = train.grefcoco.load(str(dataset), split="train", columns=["sent_id"])
    monkeypatch.setattr(Poisoned, "bad", frozenset({rows[5]["sent_id"]}))
    monkeypatch.setattr(train, "RelaCollator", Poisoned)
    flags = tiny(dataset, tmp_path / "out", max_train_steps=30, category_warmup_steps=0, eval_steps=100)
    assert train_here(*flags) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    named = [record.getMessage() for record in caplog.records if "is left out" in record.getMessage()]
    assert metrics["train"]["skipped"] == len(named) >= 1
    assert all(str(rows[5]["sent_id"]) in line for line in named)
    assert all(value.isfinite().all() for value in weights(tmp_path / "out").values())
    assert f"{len(named)} steps were left out" in (tmp_path / "out" / "report.md").read_text()


def test_a_diverged_run_stops_with_one_line(dataset, tmp_path, capsys):
    flags = tiny(dataset, tmp_path / "out", max_train_steps=60, learning_rate=1e30, eval_steps=100)
    assert train_here(*flags, "--lr_warmup_steps", 0) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: ")]
    assert len(lines) == 1 and "no finite gradient in 20 steps" in lines[0] and "lower --learning_rate" in lines[0]
    assert not (tmp_path / "out" / "checkpoint").exists()


def test_a_metric_that_is_not_measured_is_one_line(dataset, tmp_path, capsys):
    flags = tiny(dataset, tmp_path / "out", eval_steps=2, category_warmup_steps=0)
    assert train_here(*flags, "--metric_for_best_model", "mAP") == 2
    assert "metric_for_best_model is 'mAP'; what is measured is gIoU" in capsys.readouterr().err


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    final = tmp_path / "model"
    for text in ("first", "second"):
        temporary = aside(final)
        (temporary / "sub").mkdir()
        (temporary / "sub" / "file").write_text(text)
        assert broken_seal(temporary).startswith("it is incomplete")
        seal(temporary)
        put(temporary, final)
        assert (final / "sub" / "file").read_text() == text and broken_seal(final) is None
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (final / "sub" / "file").write_text("Second")
    assert broken_seal(final) == "sub/file is damaged"
