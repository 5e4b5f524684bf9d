"""The table of several models: rows of scores.json files, always-empty, published results, three kinds of file."""

import csv
import io
import json
from pathlib import Path

import pytest

from scoring.__main__ import main
from scoring.table import PUBLISHED, csv_text, markdown, table_rows

GRES = {"gIoU": 61.5, "cIoU": 60.25, "N_acc": 0.5, "T_acc": 0.9, "always_empty/gIoU": 29.09}
GREC = {"F1_score": 0.3, "N_acc": 0.7, "T_acc": 0.8, "always_empty/F1_score": 0.2909}
GROUPS = {
    f"num_targets={kind}": {"F1_score": 0.1 * i, "gIoU": 10.0 * i} for i, kind in enumerate(("0", "1", "2", "3+"))
}


def write(path: Path, **scores: object) -> Path:
    path.write_text(json.dumps(scores))
    return path


@pytest.fixture
def files(tmp_path) -> list[Path]:
    detector = {"checkpoint": "me/detector", "split": "testB", "answers": "a.jsonl", "seen": "no", "measured": 16_063}
    language = {"checkpoint": "http://x/v1", "model": "me/language", "split": "testB", "answers": "b.jsonl"}
    language["outcomes"] = {"boxes": 60, "none": 20, "unreadable": 20}
    calibrated = GREC | {"F1_score": 0.4, "groups": GROUPS}
    return [
        write(tmp_path / "a.json", grec=calibrated, default={"grec": GREC}, origin=detector),
        write(tmp_path / "b.json", gres=GRES, grec=GREC, origin=language),
    ]


def test_thresholds_are_rows_and_always_empty_stands_beside(files):
    rows = table_rows(files)
    measured = [(row["model"], row["thresholds"], row["F1"]) for row in rows if row.get("thresholds") != "published"]
    assert measured == [
        ("me/detector", "calibrated", 40.0),
        ("me/detector", "default", 30.0),
        ("me/language", "default", 30.0),
        ("always empty", "", 29.09),
    ]
    assert rows[2]["gIoU"] == 61.5 and rows[2]["unreadable"] == 20 and rows[3]["gIoU"] == 29.09
    assert rows[0]["F1, 3+ targets"] == pytest.approx(30) and rows[0]["seen COCO/RefCOCO pictures"] == "no"
    assert rows[2]["seen COCO/RefCOCO pictures"] == "unknown"


def test_published_results_have_sources_and_are_of_the_measured_split(files):
    published = [row for row in table_rows(files) if row["thresholds"] == "published"]
    assert published and all(row["source"] and row["split"] == "testB" for row in published)
    dino = next(row for row in published if row["model"].startswith("Grounding DINO-T"))
    assert (dino["F1"], dino["GREC N_acc"]) == (29.7, 93.5) and "gIoU" not in dino
    sizes = [{len(columns) - len(values) for values in splits.values()} for *_, columns, splits in PUBLISHED]
    assert all(size == {0} for size in sizes)


def test_published_results_stand_beside_whole_splits_only(tmp_path):
    rows = table_rows([write(tmp_path / "a.json", grec=GREC, origin={"answers": "a", "split": "val", "measured": 99})])
    assert [row["model"] for row in rows] == ["a", "always empty"]


def test_mmdetections_val_carries_its_remark(tmp_path):
    rows = table_rows(
        [write(tmp_path / "a.json", grec=GREC, origin={"answers": "a", "split": "val", "measured": 14_229})]
    )
    remarks = [row["source"] for row in rows if "mmdetection" in str(row.get("source"))]
    assert remarks and all("its val has other sentences" in remark for remark in remarks)


def test_the_command_writes_markdown_csv_and_a_picture(files, tmp_path, capsys):
    assert main(["table", *map(str, files), "--out", str(tmp_path / "table")]) == 0
    text = (tmp_path / "table.md").read_text()
    assert text in capsys.readouterr().out and text == markdown(table_rows(files))
    assert "## testB" in text and "| me/language | default | unknown | 20.00 | 61.50 |" in text
    assert "By number of targets:" in text and text.count("always empty") == 1
    lines = list(csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text())))
    assert csv_text(table_rows(files)) == (tmp_path / "table.csv").read_text()
    assert [line["model"] for line in lines][:3] == ["me/detector", "me/detector", "me/language"]
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")


def test_other_files_are_one_line(tmp_path, capsys):
    for content in ("{}", "[]", "no", '{"origin": {"split": "val"}}'):
        (tmp_path / "a.json").write_text(content)
        assert main(["table", str(tmp_path / "a.json")]) == 2
        error = capsys.readouterr().err
        assert "a.json holds no scores" in error and error.count("\n") == 1
