"""The built data set and its rows: contents, order, sharding and resuming."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets.distributed import split_dataset_by_node
from PIL import Image, PngImagePlugin
from pycocotools import mask as coco_mask

import grefcoco
from grefcoco_data import building, pictures
from tests.tiny_grefcoco import HEIGHT, WIDTH, write_genuine, write_json

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "real"


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Keep the caches of `datasets` out of the folder of the user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def genuine(tmp_path_factory) -> Path:
    return write_genuine(tmp_path_factory.mktemp("genuine") / "set")


@pytest.fixture(scope="module")
def built(genuine) -> Path:
    """Shards of one or two images: small shards show errors of sharding."""
    out = genuine.parent / "built"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "shard_count", lambda num_images: min(4, num_images))
        grefcoco.build(genuine, genuine / "train2014", out)
    return out


def rows_of(dataset) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "image"} for row in dataset]


def expected_rows(genuine: Path, split: str) -> list[dict]:
    """Expression rows by plain loops over the files and pycocotools' own COCO rules."""
    instances = json.loads((genuine / "instances.json").read_text())
    images = {image["id"]: image for image in instances["images"]}
    anns = {ann["id"]: ann for ann in instances["annotations"]}
    rows = []
    for ref in json.loads((genuine / "grefs(unc).json").read_text()):
        image, ids = images[ref["image_id"]], [key for key in ref["ann_id"] if key != -1]
        masks = [decoded(anns[key]["segmentation"]) for key in ids]
        solid = [mask for mask, key in zip(masks, ids) if not anns[key]["iscrowd"]] or masks
        for sentence in ref["sentences"] if ref["split"] == split else []:
            row = {"image_id": image["id"], "file_name": image["file_name"], "width": WIDTH, "height": HEIGHT}
            row |= {"ref_id": ref["ref_id"], "sent_id": sentence["sent_id"], "sentence": sentence["sent"]}
            row |= {"raw": sentence["raw"], "no_target": not ids, "ann_ids": ids}
            row |= {"category_ids": [anns[key]["category_id"] for key in ids]}
            row |= {"boxes": [[float(x) for x in anns[key]["bbox"]] for key in ids], "masks": masks}
            rows.append(row | {"mask": np.any(solid, axis=0) if solid else np.zeros((HEIGHT, WIDTH), bool)})
    return rows


def decoded(segmentation: list | dict) -> np.ndarray:
    if isinstance(segmentation, list) or isinstance(segmentation["counts"], list):
        segmentation = coco_mask.frPyObjects(segmentation, HEIGHT, WIDTH)
    mask = coco_mask.decode(segmentation).astype(bool)
    return mask.any(axis=2) if mask.ndim == 3 else mask


@pytest.mark.parametrize("split", ["train", "val", "testA", "testB"])
def test_rows_are_those_of_the_files(genuine, built, split):
    loaded = {row["sent_id"]: row for row in rows_of(grefcoco.load(built, split=split))}
    expected = expected_rows(genuine, split)
    assert len(loaded) == len(expected) > 0
    for row in expected:
        row, other = dict(row), loaded[row["sent_id"]]
        assert np.array_equal(row.pop("mask"), coco_mask.decode(other["mask"]))
        assert all(
            np.array_equal(a, coco_mask.decode(b)) for a, b in zip(row.pop("masks"), other["masks"], strict=True)
        )
        assert {name: other[name] for name in row} == row


def test_every_way_of_loading_gives_the_same_rows(genuine, built):
    images = genuine / "train2014"
    first = grefcoco.load(built)
    for other in (
        grefcoco.load(built, streaming=True),
        grefcoco.load(genuine, images=images),
        grefcoco.load(genuine, images=images, streaming=True),
    ):
        assert list(other) == list(first) == ["train", "val", "testA", "testB"]
        for split in first:
            for row, same in zip(first[split], other[split], strict=True):
                assert list(row) == list(same) == list(grefcoco.EXPRESSION_FEATURES)
                assert row["image"].mode == same["image"].mode == "RGB"
                assert row.pop("image").tobytes() == same.pop("image").tobytes()
                assert row == same


def test_load_dataset_alone_gives_all_splits_and_features(genuine, built):
    stored = datasets.load_dataset(str(built))
    assert list(stored) == ["train", "val", "testA", "testB"]
    assert stored["train"].features == grefcoco.IMAGE_FEATURES
    stream = datasets.load_dataset(str(built), split="testA", streaming=True)
    assert stream.features == grefcoco.IMAGE_FEATURES
    assert [row["image_id"] for row in stream] == stored["testA"]["image_id"][:]


def test_image_layout_is_what_is_stored(built):
    rows = grefcoco.load(built, split="val", layout="image")
    assert rows.features == grefcoco.IMAGE_FEATURES
    assert [len(row["objects"]) for row in rows] == [4] * len(rows)
    assert grefcoco.load(built, split="val", layout="image", columns=["image_id"]).column_names == ["image_id"]


def test_image_bytes_are_untouched(genuine, built):
    rows = grefcoco.load(built, split="train", layout="image").cast_column("image", datasets.Image(decode=False))
    for row in rows:
        assert row["image"]["bytes"] == (genuine / "train2014" / row["file_name"]).read_bytes()


def test_an_image_is_decoded_once_per_batch(built, monkeypatch):
    calls = []
    decode = pictures._decode
    monkeypatch.setattr(pictures, "_decode", lambda data: calls.append(1) or decode(data))
    rows = grefcoco.load(built, split="train")
    image_ids = rows.with_format(None)["image_id"][:]
    assert not calls
    batch = rows.__getitems__(list(range(len(rows))))
    assert len(calls) == len(set(image_ids)) < len(batch)
    assert [row["image_id"] for row in batch] == image_ids
    assert all((a["image"] is b["image"]) == (a["image_id"] == b["image_id"]) for a in batch for b in batch)


def test_columns_without_image_decode_nothing(built, monkeypatch):
    monkeypatch.setattr(pictures, "_decode", None)
    for streaming in (False, True):
        rows = list(grefcoco.load(built, split="val", streaming=streaming, columns=["mask", "objects"]))
        assert all(list(row) == ["mask", "objects"] and len(row["objects"]) == 4 for row in rows)


def test_select_and_shuffle_keep_rows_intact(built):
    rows = grefcoco.load(built, split="train")
    order = rows.shuffle(seed=1).select(range(5))
    by_id = {row["sent_id"]: row for row in rows_of(rows)}
    assert all(row == by_id[row["sent_id"]] for row in rows_of(order))


def test_rows_survive_pickling(built):
    rows = grefcoco.load(built, split="val")
    assert rows_of(pickle.loads(pickle.dumps(rows))) == rows_of(rows)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("shuffled", [False, True])
def test_every_row_is_read_once_for_any_world_size(built, world, shuffled):
    stream = grefcoco.load(built, split="train", streaming=True, columns=["sent_id"])
    if shuffled:
        stream = grefcoco.shuffle_shards(stream, seed=4)
    sent_ids = [row["sent_id"] for rank in range(world) for row in split_dataset_by_node(stream, rank, world)]
    assert sorted(sent_ids) == sorted(grefcoco.load(built, split="train")["sent_id"])


@pytest.mark.slow
@pytest.mark.parametrize("shuffled", [False, True])
def test_stream_resumes_exactly_anywhere(built, shuffled):
    def stream() -> datasets.IterableDataset:
        rows = grefcoco.load(built, split="train", streaming=True, columns=["sent_id"])
        rows = grefcoco.shuffle_shards(rows, seed=4) if shuffled else rows
        rows.set_epoch(2)
        return rows

    whole = [row["sent_id"] for row in stream()]
    for cut in range(0, len(whole), 3):
        first, second = stream(), stream()
        iterator = iter(first)
        start = [next(iterator)["sent_id"] for _ in range(cut)]
        second.load_state_dict(first.state_dict())
        assert start + [row["sent_id"] for row in second] == whole


def test_workers_of_a_loader_share_the_stream(built):
    loading = pytest.importorskip("torch.utils.data")
    stream = grefcoco.load(built, split="train", streaming=True, columns=["sent_id"])
    mapped = grefcoco.load(built, split="train", columns=["sent_id", "image", "mask"])
    for rows in (stream, mapped):
        batches = loading.DataLoader(rows, batch_size=4, num_workers=2, collate_fn=list)
        sent_ids = [row["sent_id"] for batch in batches for row in batch]
        assert sorted(sent_ids) == sorted(mapped.with_format(None)["sent_id"])


@pytest.mark.slow
def test_builder_works_in_processes(genuine, built):
    builder = grefcoco.Grefcoco(annotations=str(genuine), images=str(genuine / "train2014"), hash="processes")
    builder.download_and_prepare(num_proc=2)
    stored = datasets.load_dataset(str(built), split="train")
    assert builder.as_dataset(split="train")["image_id"][:] == stored["image_id"][:]


def test_shuffled_shards_change_with_the_epoch(built):
    stream = grefcoco.shuffle_shards(grefcoco.load(built, split="train", streaming=True, columns=["sent_id"]), seed=4)
    epochs = []
    for epoch in range(4):
        stream.set_epoch(epoch)
        epochs.append([row["sent_id"] for row in stream])
    assert len({tuple(order) for order in epochs}) > 1
    assert len({tuple(sorted(order)) for order in epochs}) == 1


def test_zip_and_processes_give_the_same_bytes(genuine, built, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "shard_count", lambda num_images: min(4, num_images))
    for kind, compression in (("stored", zipfile.ZIP_STORED), ("deflated", zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(tmp_path / f"{kind}.zip", "w", compression) as archive:
            for path in sorted((genuine / "train2014").iterdir()):
                archive.write(path, f"train2014/{path.name}")
        report = grefcoco.build(genuine, tmp_path / f"{kind}.zip", tmp_path / kind, num_proc=2)
        assert report == json.loads((built / "build.json").read_text())


def test_shard_counts_are_powers_of_two(built):
    counts = [building.shard_count(images) for images in (0, 1, 199, 200, 750, 1_501, 16_994, 10**6)]
    assert counts == [1, 1, 1, 2, 4, 8, 64, 64]
    assert len(list((built / "data").glob("train-*-of-00004.parquet"))) == 4


def test_row_groups_are_small(genuine, tmp_path):
    many = write_genuine(tmp_path / "many", num_train=130)
    grefcoco.build(many, many / "train2014", tmp_path / "out")
    file = pq.ParquetFile(next((tmp_path / "out" / "data").glob("train-*")))
    assert [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)] == [100, 30]


def test_changed_inputs_give_new_rows(tmp_path):
    source = write_genuine(tmp_path / "set")
    out, images = tmp_path / "out", source / "train2014"
    texts = []
    for word in ("before", "after!"):
        refs = json.loads((source / "grefs(unc).json").read_text())
        refs[0]["sentences"][0]["sent"] = word
        write_json(source / "grefs(unc).json", refs)
        grefcoco.build(source, images, out)
        texts.append(
            [
                grefcoco.load(place, **kw, split="train")[0]["sentence"]
                for place, kw in ((out, {}), (source, {"images": images}))
            ]
        )
    assert texts == [["before"] * 2, ["after!"] * 2]


def test_bad_images_are_named_or_refused(tmp_path):
    source = write_genuine(tmp_path / "set")
    paths = sorted((source / "train2014").iterdir())
    paths[0].unlink()
    paths[1].write_bytes(paths[1].read_bytes()[:600])
    Image.new("RGB", (WIDTH + 1, HEIGHT)).save(paths[2])
    paths[3].write_text("no image")
    with pytest.raises(ValueError, match="--skip-bad-images"):
        grefcoco.build(source, source / "train2014", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]
    with pytest.raises(ValueError, match=r"train2014.*\.jpg"):
        grefcoco.load(source, images=source / "train2014")
    report = grefcoco.build(source, source / "train2014", tmp_path / "out", skip_bad_images=True)
    named = report["problems"]["bad image, skipped with its sentences"]
    for path, reason in zip(paths, ["is missing", "truncated", "is 65 x 48", "not a JPEG or PNG"]):
        assert any(path.name in name and reason in name for name in named)
    assert set(report["splits"]) == set(grefcoco.load(tmp_path / "out"))


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def save_turned(picture: Image.Image, path: Path, kind: str) -> None:
    """Write `picture` with an orientation tag, as the file format `path` has by its name or as `kind` says."""
    exif = picture.getexif()
    exif[0x0112] = 6
    if kind == "XMP in PNG":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", XMP.decode())
        picture.save(path, format="PNG", pnginfo=info)
    elif kind == "XMP in JPEG":
        picture.save(path, format="JPEG", xmp=XMP, quality=95)
    else:
        picture.save(path, format=kind, exif=exif)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "XMP in JPEG", "XMP in PNG"])
def test_orientation_is_dropped_for_every_reader(tmp_path, kind):
    source = write_genuine(tmp_path / "set")
    path = max((source / "train2014").iterdir())
    save_turned(Image.open(path).convert("RGB"), path, kind)
    with Image.open(path) as image:
        assert image.getexif()[0x0112] == 6
        pixels = np.asarray(image.convert("RGB"))
    report = grefcoco.build(source, source / "train2014", tmp_path / "built")
    assert report["problems"] == {"orientation tag, which the masks ignore, removed from image": [path.name]}
    others = [
        grefcoco.load(source, images=source / "train2014", split="train"),
        grefcoco.load(tmp_path / "built", split="train"),
        grefcoco.load(tmp_path / "built", split="train", streaming=True),
        datasets.load_dataset(str(tmp_path / "built"), split="train"),
    ]
    for rows in others:
        row = next(iter(rows))
        assert row["file_name"] == path.name and row["image"].size == (WIDTH, HEIGHT)
        assert np.array_equal(np.asarray(row["image"]), pixels) and not row["image"].getexif()


def test_strict_raises_on_problems(tmp_path):
    source = write_genuine(tmp_path / "set")
    instances = json.loads((source / "instances.json").read_text())
    instances["annotations"][0]["segmentation"] = [[1, 2, 3, 4]]
    write_json(source / "instances.json", instances)
    report = grefcoco.build(source, source / "train2014", tmp_path / "out")
    assert [names for kind, names in report["problems"].items() if "3 points" in kind] == [
        [f"annotation {instances['annotations'][0]['id']}"]
    ]
    with pytest.raises(ValueError, match="3 points"):
        grefcoco.build(source, source / "train2014", tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()


def test_a_folder_that_is_not_a_build_is_not_replaced(genuine, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not an earlier build"):
        grefcoco.build(genuine, genuine / "train2014", tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("splits", [["train"], ["val", "testA"], ["val", "val", "train"]])
def test_category_ids_are_those_of_all_objects(built, splits):
    stored = datasets.load_dataset(str(built))
    expected = {item["category_id"] for split in splits for objects in stored[split]["objects"] for item in objects}
    ids = grefcoco.category_ids(built, splits)
    assert ids == sorted(expected) and all(type(number) is int for number in ids)
    with pytest.raises(ValueError, match="no split 'test'; choose one of train, val"):
        grefcoco.category_ids(built, [*splits, "test"])


KILLED_BUILD = """
import sys, time, grefcoco
from grefcoco_data import building
whole = building.write_shard
def slow(job):
    print("shard", flush=True)
    time.sleep(float(sys.argv[4]))
    return whole(job)
building.write_shard = slow
grefcoco.build(sys.argv[1], sys.argv[2], sys.argv[3])
"""


@pytest.mark.parametrize("former", [False, True])
def test_a_killed_build_leaves_the_old_build_or_nothing(genuine, tmp_path, former):
    images, out = genuine / "train2014", tmp_path / "out"
    before = grefcoco.build(genuine, images, out) if former else None
    arguments = [sys.executable, "-c", KILLED_BUILD, str(genuine), str(images), str(out), "30"]
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert process.stdout.readline() == b"shard\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert out.exists() == former
    assert not former or json.loads((out / "build.json").read_text()) == before
    grefcoco.build(genuine, images, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_replaced_zip_is_read_again(genuine, tmp_path):
    paths = sorted((genuine / "train2014").iterdir())
    for order in (paths, paths[::-1]):
        with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
            for path in order:
                archive.write(path, path.name)
        grefcoco.build(genuine, tmp_path / "images.zip", tmp_path / "out")
    assert grefcoco.load(tmp_path / "out", split="val", columns=["sentence"])[0]["sentence"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": "refcoco"}, "Unknown configuration"),
        ({"layout": "rows"}, "Unknown layout"),
        ({"columns": ["picture"]}, "Unknown columns"),
        ({"layout": "image", "columns": ["mask"]}, "Unknown columns"),
        ({"split": "test"}, "test"),
    ],
)
def test_wrong_arguments_are_named(built, arguments, message):
    with pytest.raises(ValueError, match=message):
        grefcoco.load(built, **arguments)


def test_genuine_files_need_their_images(genuine):
    with pytest.raises(ValueError, match="images="):
        grefcoco.load(genuine)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real samples are not here")
def test_real_samples():
    boxes = grefcoco.load(REAL / "grefcoco_grec_real", images=REAL / "grefcoco_grec_real" / "train2014")
    rows = [row for split in boxes.values() for row in rows_of(split)]
    anns = json.loads((REAL / "grefcoco_grec_real" / "instances.json").read_text())["annotations"]
    truth = {ann["id"]: ann["bbox"] for ann in anns}
    assert sorted(min(2, len(row["ann_ids"])) for row in rows) == [0] * 4 + [1] * 4 + [2] * 4
    assert all(np.allclose(row["boxes"], [truth[key] for key in row["ann_ids"]], atol=1e-4) for row in rows)

    source = REAL / "coco_realmask_authored"
    instances = json.loads((source / "instances.json").read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in instances["images"]}
    polygons = {ann["id"]: (ann["segmentation"], *sizes[ann["image_id"]]) for ann in instances["annotations"]}
    rows = rows_of(grefcoco.load(source, images=source / "images", split="val"))
    assert len(rows) == 34
    for row in rows:
        for key, rle in zip(row["ann_ids"], row["masks"], strict=True):
            assert rle["counts"].encode() == coco_mask.merge(coco_mask.frPyObjects(*polygons[key]))["counts"]
