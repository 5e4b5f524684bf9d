"""benchmarks/gpu.py runs from its command to its file on a CPU, at tiny sizes."""

import json
import time

import pytest

from benchmarks import gpu


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
