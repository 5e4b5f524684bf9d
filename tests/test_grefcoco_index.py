"""GRefer and the exports: the results of the original grefer.py and converter, and better ones where those fail."""

from __future__ import annotations

import json
import pickle
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

import grefcoco
from grefcoco_data.export import coco_format, mdetr_format
from tests.tiny_grefcoco import HEIGHT, WIDTH, write_genuine, write_json

GOLDENS = Path(__file__).parent / "goldens"
EXPECTED = json.loads((GOLDENS / "grefer_expected.json").read_text())


@pytest.fixture(scope="module")
def original() -> grefcoco.GRefer:
    return grefcoco.GRefer(GOLDENS / "grefer")


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory, original) -> grefcoco.GRefer:
    """The same index from a built folder; the pictures are made up."""
    folder = tmp_path_factory.mktemp("rebuilt")
    (folder / "images").mkdir()
    for image in original.loadImgs(original.getImgIds()):
        Image.new("RGB", (image["width"], image["height"])).save(folder / "images" / image["file_name"])
    grefcoco.build(GOLDENS / "grefer", folder / "images", folder / "built")
    return grefcoco.GRefer(folder / "built")


@pytest.fixture(params=["original", "rebuilt"])
def refer(request) -> grefcoco.GRefer:
    return request.getfixturevalue(request.param)


@pytest.fixture
def tiny(tmp_path) -> Path:
    return write_genuine(tmp_path / "set")


def crc(mask: np.ndarray) -> int:
    """Of the compressed RLE, as the goldens keep it."""
    return zlib.crc32(coco_mask.encode(np.asfortranarray(mask))["counts"])


def test_masks_and_boxes_equal_the_original(refer):
    for ref_id, expected in EXPECTED["refs"].items():
        if (ref := refer.Refs.get(int(ref_id))) is None:
            continue  # a ref without sentences on an image without any is in no built row
        merged = refer.getMaskByRef(ref, merge=True)
        assert merged["empty"] == expected["empty"] and merged["mask"].dtype == np.uint8
        assert (crc(merged["mask"]), merged["mask"].sum()) == (expected["mask"], expected["area"])
        each = [] if expected["empty"] else refer.getMaskByRef(ref)
        assert [crc(result["mask"]) for result in each] == expected["each"]
        assert all(result["area"] == result["mask"].sum() and result["mask"].max() <= 1 for result in each)
        assert np.allclose(refer.getRefBox(ref["ref_id"]), expected["boxes"] or [], rtol=1e-6)


def test_calls_equal_the_original(refer, original):
    calls = EXPECTED["calls"]
    image_id = original.getImgIds()[0]
    assert refer.getRefIds(cat_ids=1) == refer.getRefIds(cat_ids=[1]) == calls["getRefIds cat 1"]
    assert refer.getRefIds(cat_ids=-1) == calls["getRefIds cat -1"]
    assert refer.getRefIds(image_ids=image_id) == calls["getRefIds image0"]
    assert refer.getAnnIds(image_ids=[image_id]) == calls["getAnnIds image0"]
    assert refer.getAnnIds(ref_ids=29) == [] and refer.getAnnIds(ref_ids=2) == [1390, 1401]
    assert set(refer.availableSplits) == set(calls["splits"])
    with pytest.raises(ValueError, match="Invalid split name: test"):
        refer.getRefIds(split="test")


def test_built_and_genuine_indices_agree(original, rebuilt):
    assert original.Sents == rebuilt.Sents and original.Cats == rebuilt.Cats
    unseen = [ref for ref_id, ref in original.Refs.items() if ref_id not in rebuilt.Refs]
    assert all(
        not original.Refs[ref_id]["sentences"] for ref in unseen for ref_id in original.getRefIds(ref["image_id"])
    )
    for ref_id, ref in rebuilt.Refs.items():
        assert {**ref, "file_name": None} == {**original.Refs[ref_id], "file_name": None}
    assert set(rebuilt.getRefIds(split="train")) <= set(original.getRefIds(split="train"))


def test_loading_by_id(original):
    ref = original.loadRefs(2)[0]
    assert original.loadRefs([2, 3])[0] is ref and original.loadAnns("1390")[0]["id"] == 1390
    assert original.loadImgs(ref["image_id"])[0]["id"] == original.getImgIds(ref_ids=2)[0] == ref["image_id"]
    assert original.loadCats([1]) == [original.Cats[1]] and original.getCatIds()[0] == 1
    assert original.loadAnns(-1) == [None] and len(original.Anns) == len(original.data["annotations"]) + 1
    assert original.sentToRef[4] is ref and original.sentToTokens[4] == original.Sents[4]["tokens"]
    assert original.annToRef[1390] == [ref] and ref in original.catToRefs[32]


def test_cases_in_which_the_original_fails(tiny):
    change = json.loads((tiny / "grefs(unc).json").read_text())
    change[0]["ref_id"] = 0
    write_json(tiny / "grefs(unc).json", change)
    refer = grefcoco.GRefer(tiny)
    none, crowd = refer.Refs[0], next(ref for ref in change if len(ref["ann_id"]) == 1 and ref["ann_id"][0] % 10 == 3)
    mixed = next(ref for ref in change if len(ref["ann_id"]) == 2 and ref["ann_id"][0] % 10 == 3)
    assert (
        refer.getMaskByRef(ref_id=0, merge=True)["empty"]
        and not refer.getMaskByRef(ref_id=0, merge=True)["mask"].any()
    )
    assert refer.getMaskByRef(none)["empty"] and refer.getMaskByRef(ref_id=0) == [] and refer.getRefBox(0) == []
    assert refer.getMaskByRef(crowd) == [] and refer.getMaskByRef(crowd, merge=True)["mask"].sum() == 3 * HEIGHT
    assert refer.getMask(refer.Anns[crowd["ann_id"][0]])["area"] == 3 * HEIGHT and refer.getMask(None) is None
    alone = refer.getMask(refer.Anns[mixed["ann_id"][1]])["mask"]
    assert (
        np.array_equal(refer.getMaskByRef(mixed, merge=True)["mask"], alone)
        and len(refer.getRefBox(mixed["ref_id"])) == 2
    )
    assert refer.getRefIds(image_ids=12345) == refer.getAnnIds(image_ids=12345) == []
    with pytest.raises(ValueError, match="ref or a ref_id"):
        refer.getMaskByRef()


def test_odd_lists_of_ids(tiny):
    refs = json.loads((tiny / "grefs(unc).json").read_text())
    target = refs[1]["ann_id"][0]
    refs[0] |= {"ann_id": [], "category_id": []}
    refs[1] |= {"ann_id": [-1, target, target], "category_id": [-1, 1, 1]}
    write_json(tiny / "grefs(unc).json", refs)
    refer = grefcoco.GRefer(tiny)
    assert refer.getMaskByRef(refs[0]) == [] and refer.getMaskByRef(refs[0], merge=True)["empty"]
    alone = refer.getMask(refer.Anns[target])["mask"]
    assert np.array_equal(refer.getMaskByRef(refs[1], merge=True)["mask"], alone)
    assert len(refer.getMaskByRef(refs[1])) == len(refer.getRefBox(refs[1]["ref_id"])) == 2


def test_boxes_of_a_built_folder_equal_the_files(original, rebuilt):
    assert all(rebuilt.getRefBox(ref_id) == original.getRefBox(ref_id) for ref_id in rebuilt.Refs)


@pytest.mark.parametrize(("dataset", "split_by"), [("grefcoco", "umd"), ("refcoco", "berkeley"), ("flickr", "unc")])
def test_unknown_sets_are_named(tiny, dataset, split_by):
    with pytest.raises(ValueError, match=f"'{dataset}' split by '{split_by}'"):
        grefcoco.GRefer(tiny, dataset, split_by)


def test_dangling_ids_are_one_error(tiny):
    refs = json.loads((tiny / "grefs(unc).json").read_text())
    refs[1]["ann_id"] = [5]
    write_json(tiny / "grefs(unc).json", refs)
    with pytest.raises(ValueError, match="id 5"):
        grefcoco.GRefer(tiny)


def test_refs_without_sentences_are_in_a_build(tiny):
    refs = json.loads((tiny / "grefs(unc).json").read_text())
    refs[1]["sentences"] = []
    write_json(tiny / "grefs(unc).json", refs)
    grefcoco.build(tiny, tiny / "train2014", tiny / "built")
    refer = grefcoco.GRefer(tiny / "built")
    assert refer.Refs[refs[1]["ref_id"]]["ann_id"] == refs[1]["ann_id"] and len(refer.Refs) == len(refs)


@pytest.mark.parametrize("built", [False, True])
def test_refer_of_the_family(tiny, built):
    refs = [ref for ref in json.loads((tiny / "grefs(unc).json").read_text()) if len(ref["ann_id"]) == 1]
    refs = [
        ref | {"ann_id": ref["ann_id"][0], "category_id": ref["category_id"][0]}
        for ref in refs
        if ref["ann_id"][0] > 0
    ]
    (tiny / "refcoco+").mkdir()
    (tiny / "refcoco+" / "refs(unc).p").write_bytes(pickle.dumps(refs, 2))
    (tiny / "instances.json").rename(tiny / "refcoco+" / "instances.json")
    if built:
        grefcoco.build(tiny, tiny / "train2014", tiny / "built", config="refcoco+_unc")
    refer = grefcoco.GRefer(tiny / "built" if built else tiny, "refcoco+", "unc")
    ref = refer.loadRefs(refs[0]["ref_id"])[0]
    assert ref["ann_id"] == refs[0]["ann_id"] and refer.refToAnn[ref["ref_id"]]["id"] == ref["ann_id"]
    assert refer.getRefBox(ref["ref_id"]) == refer.Anns[ref["ann_id"]]["bbox"]
    assert refer.annToRef[ref["ann_id"]]["ann_id"] == ref["ann_id"]
    assert refer.getMask(ref)["area"] == refer.getMask(refer.Anns[ref["ann_id"]])["area"] > 0
    assert refer.getAnnIds(ref_ids=[ref["ref_id"]]) == [ref["ann_id"]]
    tests = [ref["ref_id"] for ref in refs if ref["split"].startswith("test")]
    assert sorted(refer.getRefIds(split="test")) == sorted(tests) != sorted(refer.getRefIds(split="testA"))


def test_drawing(tiny, rebuilt, capsys):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    refer = grefcoco.GRefer(tiny)
    ref = next(ref for ref in refer.data["refs"] if len(ref["ann_id"]) == 2)
    for draw in (refer.showRef, refer.showMask):
        for seg_box in ("seg", "box"):
            pyplot.figure()
            draw(ref, seg_box)
            assert pyplot.gca().images[0].get_array().shape[:2] == (HEIGHT, WIDTH)
            assert len(pyplot.gca().patches) == 2 * (seg_box == "box" and draw == refer.showRef)
            pyplot.close()
    assert ref["sentences"][0]["sent"] in capsys.readouterr().out
    rebuilt.showRef(rebuilt.Refs[2])
    pyplot.close()


def test_mdetr_export_equals_the_converter(original):
    expected = json.loads((GOLDENS / "coco_format.json").read_text())
    made = dict(mdetr_format(original))
    assert list(made) == ["testA", "testB", "val", "train"]
    for split, content in made.items():
        assert content["images"] == expected[split]["images"]
        assert content["annotations"] == expected[split]["annotations"]
        assert content["categories"] == original.data["categories"] and content["info"] == original.data["info"]


def test_coco_export_loads_with_pycocotools(tiny, tmp_path, capsys):
    refer = grefcoco.GRefer(tiny)
    for split, content in coco_format(refer):
        write_json(tmp_path / "coco.json", content)
        coco = COCO(str(tmp_path / "coco.json"))
        assert [row["id"] for row in content["expressions"]] == [
            sentence["sent_id"]
            for ref in refer.loadRefs(refer.getRefIds(split=split))
            for sentence in ref["sentences"]
        ]
        for ann in coco.loadAnns(coco.getAnnIds()):
            assert np.array_equal(coco.annToMask(ann), refer.getMask(refer.Anns[ann["id"]])["mask"])
