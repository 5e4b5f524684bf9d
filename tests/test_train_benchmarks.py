"""The programs of benchmarks/ that train: gpu.py at tiny sizes on a CPU, the table of readers.py."""

import json
import time
from pathlib import Path

import pytest

from benchmarks import gpu, readers
from train import parse_config


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    gpu.main(["--out", str(out)])
    return json.loads(out.read_text())


@pytest.mark.slow
def test_every_row_has_its_numbers(result):
    assert result["not_reached"] == [] and result["device"] == "cpu"
    assert len(result["rows"]) == len(gpu.cases())
    for row in result["rows"]:
        assert "error" not in row, row
        assert row["sentences_per_s"] > 0 and row["gflop"] > 0 and row["fraction_of_bf16_rate"] > 0
    rows = [row for row in result["rows"] if row["precision"] == "fp32" and not row["compiled"]]
    work = {(row["model"], row["work"]): row["gflop"] for row in rows}
    assert all(2 < work[name, "step"] / work[name, "forward"] < 4 for name in gpu.MODELS)
    (compiled,) = [row for row in result["rows"] if row["compiled"]]
    graphs = compiled["graphs_after_other_numbers_of_images"]
    assert graphs[-1] == graphs[-2], "no batch compiles again"


@pytest.mark.slow
def test_the_sections_are_filled(result):
    parts = result["parts"]
    expected = {"vision_encoder.trunk", "vision_encoder.fusions", "pixel_decoder", "region_decoder"}
    assert expected <= {*parts["forward_parts"]}
    assert "optimizer" in parts["forward_parts"] and parts["backward_nodes"] and parts["kernels"]
    cores = result["deformable_core"]
    assert {row["candidate"] for row in cores} == {"embedding_bag", "grid_sample"}
    assert all(row["forward_and_backward_ms"] > row["forward_ms"] > 0 for row in cores)
    assert set(result["synchronisations"]) == {f"{name} {work}" for name in gpu.MODELS for work in ("step", "forward")}


@pytest.mark.slow
def test_a_row_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "cases", lambda: [gpu.Case("unified", "fp32", "step", 2, 2)])
    monkeypatch.setattr(gpu, "row", lambda case, rate: time.sleep(60))
    monkeypatch.setattr(gpu, "LAST_ROW", 0.5)
    gpu.main(["--out", str(tmp_path / "gpu.json"), "--minutes", "0.01"])
    (row,) = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert row["error"] == "no time is left"


def test_rows_that_no_time_is_left_for_are_listed(tmp_path):
    gpu.main(["--out", str(tmp_path / "gpu.json"), "--minutes", "-1"])
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert len(result["not_reached"]) == len(gpu.cases()) + 3 and result["rows"] == []


def test_readers_are_compared_on_both_splits(tmp_path, monkeypatch, capsys):
    def write_scores(out: Path, flags: list[object], dataset: str) -> None:
        if "--eval_only" not in flags:
            config = parse_config([*map(str, flags), "--dataset", dataset])
            assert config.max_train_steps == 9 and config.seed in (0, 1)
            assert (config.tokenizer is None) == (config.frozen == []) == ("text_config" in config.model)
        gIoU = (20 if out.parent.name.startswith("small") else 40) + (1 if out.name == "testB" else 5)
        out.mkdir(parents=True)
        (out / "metrics.json").write_text(
            json.dumps({"gres": {"gIoU": gIoU, "cIoU": 1, "N_acc": 1, "T_acc": 1}, "grec": {"F1_score": 1}})
        )

    monkeypatch.setattr(readers, "train", write_scores)
    arguments = ["data", str(tmp_path), "--reader", "a/reader", "--steps", "9", "--seeds", "0", "1"]
    monkeypatch.setattr("sys.argv", ["readers", *arguments])
    readers.main()
    table = [line.split("|")[2].split()[0] for line in capsys.readouterr().out.splitlines()[2:]]
    assert table == ["25.00", "21.00", "45.00", "41.00"]
