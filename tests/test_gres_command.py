"""`python evaluate/gres` and `python evaluate/grec`: a predictions file and a data set in, scores out."""

import csv
import json
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from tiny_grefcoco import write_genuine

import grefcoco

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    genuine = write_genuine(folder / "genuine")
    grefcoco.build(genuine, genuine / "train2014", folder / "built")
    return folder / "built"


@pytest.fixture
def run(capsys):
    """Run a metric's command in this process; returns exit code, stdout and stderr."""

    def call(metric: str, *arguments: object) -> tuple[int, str, str]:
        spec = spec_from_file_location(f"{metric}_command", ROOT / "evaluate" / metric / "__main__.py")
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        capsys.readouterr()
        return module.main([str(argument) for argument in arguments]), *capsys.readouterr()

    return call


def write(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def perfect_masks(dataset: Path, split: str) -> list[dict]:
    rows = grefcoco.load(dataset, split=split, columns=["sent_id", "mask", "no_target"])
    return [row | {"no_target": 0.9 if row["no_target"] else 0.2} for row in rows]


def test_gres(run, dataset, tmp_path):
    lines = perfect_masks(dataset, "val")
    predictions = write(tmp_path / "val.jsonl", lines[::-1])
    held_out = write(tmp_path / "train.jsonl", perfect_masks(dataset, "train")[:9])
    options = ["--split", "val", "--resolution", 32, "--details", "--bootstrap", 20]
    options += ["--threshold-from", held_out, "--threshold-split", "train"]
    options += ["--curve", tmp_path / "curve.png", "--table", tmp_path / "table.csv"]
    code, out, err = run("gres", predictions, dataset, *options)
    assert code == 0, err
    result = json.loads(out)
    assert (result["gIoU"], result["N_acc"], result["T_acc"]) == (100, 1, 1)
    assert 0.2 < result["threshold"] < 0.9
    assert result["groups"]["num_targets=0"]["samples"] == sum(line["no_target"] > 0.5 for line in lines)
    assert result["intervals"]["gIoU"] == [100, 100]
    with (tmp_path / "table.csv").open() as file:
        assert {row["pixels"] for row in csv.DictReader(file)} == {"1024"}
    assert (tmp_path / "curve.png").exists()


def test_gres_refuses_a_threshold_of_the_split_reported(run, dataset, tmp_path):
    predictions = write(tmp_path / "val.jsonl", perfect_masks(dataset, "val"))
    options = ["--threshold-from", predictions, "--threshold-split", "val", "--table", tmp_path / "table.csv"]
    code, _, err = run("gres", predictions, dataset, "--split", "val", *options)
    assert code == 2 and err.count("\n") == 1
    assert "was chosen on" in err
    assert not (tmp_path / "table.csv").exists()


def test_grec(run, dataset, tmp_path):
    rows = grefcoco.load(dataset, split="testA", columns=["sent_id", "boxes"])
    lines = [
        {"sent_id": row["sent_id"], "scores": [0.9] * len(row["boxes"])}
        | {"boxes": [[x, y, x + width, y + height] for x, y, width, height in row["boxes"]]}
        for row in rows
    ]
    code, out, err = run(
        "grec", write(tmp_path / "a.jsonl", lines), dataset, "--split", "testA", "--ap", "pycocotools"
    )
    assert code == 0, err
    result = json.loads(out)
    assert result["F1_score"] == 1
    assert result["AP"] == pytest.approx(1)


@pytest.mark.parametrize("metric", ["gres", "grec"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda lines: lines[1:], "1 are missing"),
        (lambda lines: [*lines, {**lines[0], "sent_id": -5}], "sentence -5 is not of this split"),
        (lambda lines: [*lines, {"sent_id": 1}], "is no prediction"),
        (lambda lines: [*lines, 7], "is no prediction"),
    ],
)
def test_bad_predictions_are_one_line(run, dataset, tmp_path, metric, spoil, message):
    lines = [line | {"boxes": [], "scores": []} for line in perfect_masks(dataset, "val")]
    code, out, err = run(metric, write(tmp_path / "bad.jsonl", spoil(lines)), dataset, "--split", "val")
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1


def test_the_folder_runs_from_anywhere(dataset, tmp_path):
    command = [sys.executable, ROOT / "evaluate" / "gres", "none.jsonl", dataset, "--split", "val"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("gres: ") and "none.jsonl" in done.stderr and done.stderr.count("\n") == 1
