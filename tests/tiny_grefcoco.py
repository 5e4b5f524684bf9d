"""A tiny data set in the genuine format, made for each test: every kind of segmentation and of target."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from grefcoco_data.collections import Collection

WIDTH, HEIGHT = 64, 48
SPLIT_OF = ["train"] * 7 + ["val", "val", "testA", "testB"]


def write_genuine(folder: Path, num_train: int = 7) -> Path:
    """Write grefs(unc).json, instances.json and train2014/ under `folder`; each image has three sentences or more."""
    (folder / "train2014").mkdir(parents=True)
    splits = ["train"] * num_train + [split for split in SPLIT_OF if split != "train"]
    images = [image_record(100 + (len(splits) - number)) for number in range(len(splits))]
    annotations = [item for image in images for item in object_records(image["id"])]
    refs = [ref for image, split in zip(images, splits) for ref in ref_records(image["id"], split)]
    val_image = next(image["id"] for image, split in zip(images, splits) if split == "val")
    refs.append(ref_record(9000, val_image, "testA", [val_image * 10], ["again in another split"]))
    for image in images:
        picture = np.random.default_rng(image["id"]).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        grey = image["id"] % 4 == 0
        Image.fromarray(picture[..., 0] if grey else picture).save(
            folder / "train2014" / image["file_name"], quality=80
        )
    categories = [{"id": 1, "name": "person", "supercategory": "person"}, {"id": 3, "name": "car"}]
    write_json(folder / "instances.json", {"images": images, "annotations": annotations, "categories": categories})
    write_json(folder / "grefs(unc).json", refs)
    return folder


def write_family(folder: Path, collection: Collection) -> Path:
    """Write the same images with the refs of another data set, as its own files hold them."""
    write_genuine(folder)
    if collection.name == "grefcoco":
        return folder
    refs = json.loads((folder / "grefs(unc).json").read_text())
    for ref in refs:
        del ref["no_target"]
    if collection.single_target:
        refs = [
            ref | {"ann_id": ref["ann_id"][0], "category_id": ref["category_id"][0]}
            for ref in refs
            if len(ref["ann_id"]) == 1 and ref["ann_id"] != [-1]
        ]
    else:
        kinds = {ref["ref_id"]: "many" if len(ref["ann_id"]) > 1 else "one" for ref in refs}
        kinds |= {ref["ref_id"]: "zero" for ref in refs if ref["ann_id"] == [-1]}
        refs = [ref | {"source": kinds[ref["ref_id"]]} for ref in refs]
        for ref in refs:
            if ref["source"] == "zero":  # the ids of these refs mean nothing
                ref["ann_id"], ref["category_id"] = [ref["image_id"] * 10], [1]
    (folder / "grefs(unc).json").unlink()
    (folder / collection.dataset).mkdir()
    (folder / "instances.json").rename(folder / collection.dataset / "instances.json")
    (folder / collection.dataset / f"{collection.refs_stem}.p").write_bytes(pickle.dumps(refs, 2))
    return folder


def image_record(image_id: int) -> dict:
    name = f"COCO_train2014_{image_id:012}.jpg"
    return {"id": image_id, "file_name": name, "width": WIDTH, "height": HEIGHT}


def object_records(image_id: int) -> list[dict]:
    """A polygon, two overlapping polygons, a compressed RLE, a crowd as plain run lengths."""
    shift = image_id % 7
    square = [5 + shift, 5, 20 + shift, 5, 20 + shift, 25, 5 + shift, 25]
    overlap = [[30, 10, 50, 10, 50, 30, 30, 30], [40.5, 20, 60, 20, 60, 40.25, 40.5, 40.25]]
    disc = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    disc[30:45, 10 : 20 + shift] = 1
    rle = coco_mask.encode(disc)
    crowd = [HEIGHT * 2, HEIGHT * 3, HEIGHT * (WIDTH - 5)]
    shapes = [
        ([square], [5 + shift, 5, 15, 20], 0),
        (overlap, [30, 10, 30, 30.25], 0),
        ({"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode()}, [10, 30, 10 + shift, 15], 0),
        ({"size": [HEIGHT, WIDTH], "counts": crowd}, [2, 0, 3, HEIGHT], 1),
    ]
    return [
        {"id": image_id * 10 + number, "image_id": image_id, "category_id": 1 + 2 * (number % 2), "bbox": box}
        | {"area": box[2] * box[3] / 2, "iscrowd": crowd, "segmentation": shape}
        for number, (shape, box, crowd) in enumerate(shapes)
    ]


def ref_records(image_id: int, split: str) -> list[dict]:
    """No target, one, two in descending order, a crowd and an object, only a crowd."""
    first = image_id * 10
    wanted = [[-1], [first], [first + 2, first + 1], [first + 3, first], [first + 3]]
    return [
        ref_record(
            image_id * 100 + number, image_id, split, ann_ids, [f"Thing {number}!", f"it {number}"][: 1 + number % 2]
        )
        for number, ann_ids in enumerate(wanted[: 3 + image_id % 3])
    ]


def ref_record(ref_id: int, image_id: int, split: str, ann_ids: list[int], raw: list[str]) -> dict:
    sentences = [
        {
            "sent_id": ref_id * 10 + number,
            "raw": text,
            "sent": text.lower().rstrip("!"),
            "tokens": text.lower().rstrip("!").split(),
        }
        for number, text in enumerate(raw)
    ]
    return {
        "ref_id": ref_id,
        "image_id": image_id,
        "split": split,
        "file_name": f"COCO_train2014_{image_id:012}_{ref_id}.jpg",
        "ann_id": ann_ids,
        "category_id": [-1 if ann_id == -1 else 1 + 2 * (ann_id % 10 % 2) for ann_id in ann_ids],
        "no_target": ann_ids == [-1],
        "sent_ids": [sentence["sent_id"] for sentence in sentences],
        "sentences": sentences,
    }


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
