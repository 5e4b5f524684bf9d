"""The entries of collections.py: each gives a card with its own names, licence and citation, and can be built."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import datasets
import pytest
from huggingface_hub import DatasetCard
from pycocotools import mask as coco_mask

import grefcoco
from grefcoco_data.building import size_category
from grefcoco_data.collections import COLLECTIONS, COUNTED
from grefcoco_data.commands import main
from tests.tiny_grefcoco import write_family, write_genuine

ROOT = Path(__file__).resolve().parents[1]
FOREIGN_TO_REFCOCO = ("gRefCOCO", "GRES", "GREC", "FudanCVL", "CC BY-NC-SA", "cc-by-nc-sa", "62.58", "209,344")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def build(tmp_path: Path, config: str) -> DatasetCard:
    source = write_family(tmp_path / "set", COLLECTIONS[config])
    grefcoco.build(source, source / "train2014", tmp_path / "built", config=config)
    return DatasetCard.load(tmp_path / "built" / "README.md")


@pytest.mark.parametrize("config", COLLECTIONS)
def test_every_collection_builds_with_its_own_card(tmp_path, config):
    collection, card = COLLECTIONS[config], build(tmp_path, config)
    assert card.data.size_categories == ["n<1K"]
    assert card.data.pretty_name == collection.title and card.data.license == (collection.licence or "unknown")
    assert card.data.source_datasets == [collection.source_dataset]
    for fact in (f"# {collection.title}, configuration `{config}`", collection.homepage, collection.citation):
        assert fact in card.text
    assert collection.description in card.text and collection.image_terms in card.text
    assert f'config="{config}"' in card.text and not re.search(r"\$\w", card.text)
    rows = grefcoco.load(tmp_path / "built", config=config, split="val", columns=["sentence"])
    assert len(rows) > 0 and list(datasets.load_dataset(str(tmp_path / "built"))) == ["train", "val", "testA", "testB"]


def test_the_card_of_refcoco_is_not_that_of_grefcoco(tmp_path):
    card = build(tmp_path, "refcoco_unc")
    text = card.content.replace("import grefcoco", "").replace("grefcoco.load", "")
    assert not [word for word in FOREIGN_TO_REFCOCO if word in text] and "grefcoco" not in text
    assert "# RefCOCO, configuration `refcoco_unc`" in text
    assert "@inproceedings{RefCOCO," in text and "@inproceedings{ReferItGame," in text
    assert "The licence of the annotations is not known to this project" in text and "license: unknown" in text
    assert "| val | 1,500 | 3,811 | 10,834 | 0 | 10,834 | 0 | 1 |" in text
    assert "| testA | – | – | 5,657 | 0 | 5,657 | 0 | 1 |" in text


def test_the_card_of_grefcoco_keeps_its_facts(tmp_path):
    card = build(tmp_path, "grefcoco")
    assert all(word in card.content for word in ("gRefCOCO", "CC BY-NC-SA 4.0", "cc-by-nc-sa-4.0", "62.58"))
    assert "@inproceedings{GRES," in card.text and "@article{GREC," in card.text
    assert "| train | 16,994 | 78,930 | 209,344 | 19,140 | 120,624 | 69,580 | 18 |" in card.text


def test_ref_zom_marks_no_target_by_its_source(tmp_path):
    """One entry is all that Ref-ZOM needed: refs in a pickle, several targets, and the source "zero" for none."""
    source = write_family(tmp_path / "set", COLLECTIONS["ref-zom_final"])
    refs = pickle.loads((source / "ref-zom" / "refs(final).p").read_bytes())
    assert {ref["source"] for ref in refs} == {"zero", "one", "many"}
    assert main(["build", "--annotations", str(source), "--images", str(source / "train2014"), "--out",
                 str(tmp_path / "built"), "--config", "ref-zom_final"]) == 0  # fmt: skip
    card = (tmp_path / "built" / "README.md").read_text()
    assert "# Ref-ZOM" in card and "@inproceedings{RefZOM," in card and "gRefCOCO" not in card
    expected = {s["sent_id"]: ref for ref in refs for s in ref["sentences"]}
    splits = grefcoco.load(tmp_path / "built", config="ref-zom_final")
    rows = [row for split in splits.values() for row in split]
    assert sorted(row["sent_id"] for row in rows) == sorted(expected)
    for row in rows:
        ref = expected[row["sent_id"]]
        assert row["ann_ids"] == ([] if ref["source"] == "zero" else ref["ann_id"])
        assert row["no_target"] == (ref["source"] == "zero") != bool(coco_mask.area(row["mask"]))
    refer = grefcoco.GRefer(source, "ref-zom", "final")
    zero = next(ref for ref in refs if ref["source"] == "zero")
    assert refer.getMaskByRef(refer.Refs[zero["ref_id"]], merge=True)["empty"]
    assert refer.getMaskByRef(ref_id=zero["ref_id"]) == refer.getRefBox(zero["ref_id"]) == []


def test_official_counts_are_complete_or_of_known_names():
    for collection in COLLECTIONS.values():
        for counts in collection.counts.values():
            assert set(counts) <= set(COUNTED) and all(type(number) is int for number in counts.values())
        assert collection.release is None or all(
            re.fullmatch("[0-9a-f]{64}", d) for d in collection.release.sha256.values()
        )
    assert COLLECTIONS["refcoco_unc"].differences("val", dict.fromkeys(COUNTED, 0) | {"images": 1_500}) == {
        "refs": 3_811,
        "expressions": 10_834,
        "single": 10_834,
        "max_targets": 1,
    }
    assert COLLECTIONS["refcoco+_unc"].differences("val", dict.fromkeys(COUNTED, 0)) is None


def test_check_compares_what_is_known(tmp_path, capsys):
    source = write_family(tmp_path / "set", COLLECTIONS["refcoco_unc"])
    assert main(["check", str(source), "--config", "refcoco_unc"]) == 0
    printed = capsys.readouterr().out
    assert "refs 3,811" in printed and "expressions 10,834" in printed and printed.count("no official hash") == 2


def test_the_rows_of_a_family_have_one_target(tmp_path):
    source = write_family(tmp_path / "set", COLLECTIONS["refcoco_unc"])
    images = source / "train2014"
    rows = grefcoco.load(source, images=images, config="refcoco_unc", split="train")
    assert len(rows) > 0 and {len(row["ann_ids"]) for row in rows} == {1}


def test_card_template_is_valid_without_a_build():
    template = DatasetCard.load(ROOT / "dataset_card.md")
    assert template.data.language == ["en"] and "gRefCOCO" not in template.content.replace("grefcoco", "")
    assert json.dumps(template.data.to_dict())


def test_genuine_files_of_another_collection_are_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"refs\(unc\)\.json"):
        grefcoco.load(write_genuine(tmp_path / "set"), images=tmp_path, config="refcoco_unc")


@pytest.mark.parametrize(
    ("rows", "category"),
    [
        (0, "n<1K"),
        (999, "n<1K"),
        (1000, "1K<n<10K"),
        (19_994, "10K<n<100K"),
        (999_999, "100K<n<1M"),
        (1_000_000, "1M<n<10M"),
        (10_000_000, "n>10M"),
    ],
)
def test_size_categories_are_those_of_the_hub(rows, category):
    assert size_category(rows) == category
