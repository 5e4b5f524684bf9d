"""What can go wrong in training: a run is killed, told to stop, has no disk left, meets numbers like nan."""

import fcntl
import json
import os
import resource
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

import train
from grefcoco_data import building, rows
from grefcoco_data.atomic_files import publish, seal, seal_fault, staging_folder
from modeling import processing_rela
from scoring.answers import Answer
from scoring.pictures import draw_answers
from tests.processes import fork, start_group
from tests.tiny_rela import expression_rows
from tests.tiny_training import make_dataset, tiny, train_and_die, train_here
from training.output_lock import FolderInUse, locked


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:  # several files of several groups, as real data has
        for module in (building, rows):
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
        assert "--resume_from_checkpoint latest continues from there" in killed.stdout
    assert (part / "checkpoints" / "step-00000007").exists() and not (part / "checkpoint").exists()
    done = fork(train_here, *flags, "--resume_from_checkpoint", "latest")
    assert done.returncode == 0, done.stderr
    assert same(weights(whole), weights(part))
    losses = [[row["loss"] for row in json.loads((out / "metrics.json").read_text())["history"] if "loss" in row]
              for out in (whole, part)]  # fmt: skip
    assert len(losses[0]) == 1 and losses[0] == losses[1], "also of the steps before the checkpoint"


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


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_resumed_run_records_the_mean_of_the_steps_since_the_last_record(dataset, tmp_path, processes):
    flags = {"max_train_steps": 10, "checkpointing_steps": 6, "eval_steps": 100, "per_device_train_batch_size": 4}
    histories = []
    for name, calls in (("whole", []), ("part", [(train_and_die, "backward", 8, signal.SIGKILL), ("resumed",)])):
        out = tmp_path / name
        arguments = tiny(dataset, out, **flags)
        if calls:
            for process in start_group(processes, *calls[0], *arguments):
                assert process.wait().returncode == -9
            arguments += ["--resume_from_checkpoint", "latest"]
        for process in start_group(processes, train_here, *arguments):
            done = process.wait()
            assert done.returncode == 0, done.stderr
        histories.append(json.loads((out / "metrics.json").read_text())["history"])
    assert histories[0] == histories[1] and "loss" in histories[0][0]


def hold(folder: str) -> None:
    with locked(Path(folder)):
        os.kill(os.getpid(), signal.SIGKILL)


def test_two_runs_do_not_write_into_one_folder(dataset, tmp_path, capfd):
    flags = tiny(dataset, tmp_path / "out")
    with locked(tmp_path / "out"):
        assert train_here(*flags) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("train.py: ")]
    assert f"process {os.getpid()} on " in line and "choose another --output_dir" in line
    assert [path.name for path in (tmp_path / "out").iterdir()] == []


def test_the_lock_of_a_killed_process_is_ignored(tmp_path):
    assert fork(hold, str(tmp_path)).returncode == -signal.SIGKILL
    assert (tmp_path / "run.lock").exists()
    with locked(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
        with pytest.raises(FolderInUse), locked(tmp_path):
            pass
    assert not (tmp_path / "run.lock").exists()


def test_the_lock_that_only_children_of_a_killed_process_hold_is_ignored(tmp_path):
    ended = fork(hold, str(tmp_path))
    assert ended.returncode == -signal.SIGKILL
    with open(tmp_path / "run.lock", "a") as child:
        fcntl.flock(child, fcntl.LOCK_EX)
        with locked(tmp_path):
            assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()


def test_sentences_that_matplotlib_or_a_font_cannot_read_are_drawn(tmp_path):
    rows = [{**row, "sentence": text} for row, text in zip(expression_rows(), ("$\\frac{$", "a $x$ \ud800", "_^\x00"))]
    answers = [Answer(i, mask=row["mask"], no_target=0.0) for i, row in enumerate(rows)]
    assert draw_answers(rows, answers, 0.5).ndim == 3, "for the tracker"
    draw_answers(rows, answers, 0.5, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_a_second_signal_stops_at_once(dataset, tmp_path, monkeypatch):
    stopped = train.Run(train.parse_config([*tiny(dataset, tmp_path / "out")]))
    restored = []
    monkeypatch.setattr(train.signal, "signal", lambda number, handler: restored.append((number, handler)))
    stopped.stop(signal.SIGINT, None)
    assert stopped.stopping() and restored == [(signal.SIGINT, signal.SIG_DFL)]


def train_on_a_full_disk(*flags: str) -> int:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    return train_here(*flags)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_older_checkpoints_stay(dataset, tmp_path):
    flags = tiny(dataset, tmp_path / "out", checkpointing_steps=3)
    assert train_here(*flags, "--max_train_steps", 4) == 0
    older = tmp_path / "out" / "checkpoints" / "step-00000003"
    done = fork(train_on_a_full_disk, *flags, "--resume_from_checkpoint", "latest")
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert "cannot write" in line and "step-00000006" in line and "free some disk space" in line
    assert "Traceback" not in done.stderr
    assert seal_fault(older) is None
    assert [path.name for path in older.parent.iterdir()] == [older.name]


class Poisoned(processing_rela.RelaCollator):
    """Makes the image of some sentences not finite."""

    bad: frozenset[int] = frozenset()

    def __call__(self, rows):
        batch = self.processor.normalize(super().__call__(rows))  # bytes cannot be not finite
        if self.bad & {row["sent_id"] for row in rows}:
            batch["pixel_values"][0, 0, 0, 0] = float("nan")
        return batch


@pytest.mark.slow
def test_a_batch_that_is_not_finite_is_left_out_counted_and_named(dataset, tmp_path, monkeypatch, caplog):
    rows = train.grefcoco.load(str(dataset), split="train", columns=["sent_id"])
    monkeypatch.setattr(Poisoned, "bad", frozenset({rows[5]["sent_id"]}))
    monkeypatch.setattr(processing_rela, "RelaCollator", Poisoned)
    flags = tiny(dataset, tmp_path / "out", max_train_steps=30, category_warmup_steps=0, eval_steps=100)
    assert train_here(*flags) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    named = [record.getMessage() for record in caplog.records if "is skipped" in record.getMessage()]
    assert metrics["train"]["skipped"] == len(named) >= 1
    assert all(str(rows[5]["sent_id"]) in line for line in named)
    assert all(value.isfinite().all() for value in weights(tmp_path / "out").values())
    assert f"{len(named)} steps were skipped" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.slow
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
        temporary = staging_folder(final)
        (temporary / "sub").mkdir()
        (temporary / "sub" / "file").write_text(text)
        assert seal_fault(temporary).startswith("it is incomplete")
        seal(temporary)
        publish(temporary, final)
        assert (final / "sub" / "file").read_text() == text and seal_fault(final) is None
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (final / "sub" / "file").write_text("Second")
    assert seal_fault(final) == "sub/file is damaged"
