"""Export: COCO-style JSON files of a data set, as MDETR's converter writes them or as pycocotools loads them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from grefcoco_data.annotations import as_list, targets
from grefcoco_data.atomic_files import write_text
from grefcoco_data.grefer import GRefer

# MDETR's converter numbers images and annotations through the splits in this order.
EXPORT_ORDER = ("testA", "testB", "testC", "testAB", "testBC", "test", "val", "train")


def export(refer: GRefer, out: Path, format: Literal["mdetr", "coco"] = "mdetr") -> dict[Path, dict]:
    """Write one file per split into `out`; returns their contents by path."""
    out.mkdir(parents=True, exist_ok=True)
    stem = f"finetune_{refer.data['dataset']}" if format == "mdetr" else "instances"
    contents = {}
    for split, content in (mdetr_format if format == "mdetr" else coco_format)(refer):
        contents[out / f"{stem}_{split}.json"] = content
        write_text(out / f"{stem}_{split}.json", json.dumps(content))
    return contents


def mdetr_format(refer: GRefer) -> Iterable[tuple[str, dict]]:
    """Each split as MDETR's converter for gRefCOCO writes it: an "image" per sentence, an annotation per target.

    Boxes are xywh in pixels. `tokens_positive` is the span of the whole sentence, as in the converter without a
    parser. No target is one annotation with an empty box, category -1 and iscrowd -1.
    """
    next_image = next_annotation = 0
    for split in _splits(refer):
        images, annotations = [], []
        for ref, sentence in _sentences(refer, split):
            span = [[0, len(sentence["sent"])]]
            image = refer.Imgs[ref["image_id"]]
            images.append(
                {key: image[key] for key in ("file_name", "height", "width")}
                | {"id": next_image, "original_id": image["id"], "caption": sentence["sent"]}
                | {"dataset_name": refer.data["dataset"], "tokens_negative": span}
            )
            for ann in refer.loadAnns(as_list(ref["ann_id"])):
                ids = {"image_id": next_image, "id": next_annotation, "tokens_positive": span}
                annotations.append(_mdetr_annotation(ann) | ids)
                next_annotation += 1
            next_image += 1
        yield split, _coco_file(refer, images, annotations)


def _mdetr_annotation(ann: dict | None) -> dict:
    if ann is None:
        empty = {"area": -1, "iscrowd": -1, "category_id": -1, "original_id": -1}
        return empty | {"bbox": [0, 0, 0, 0], "empty": True}
    fields = {key: ann[key] for key in ("area", "iscrowd", "category_id", "bbox")}
    return fields | {"original_id": ann["id"], "empty": False}


def coco_format(refer: GRefer) -> Iterable[tuple[str, dict]]:
    """Each split as COCO instances, which pycocotools' COCO class loads, with a list `expressions` added."""
    for split in _splits(refer):
        expressions = [
            {"id": sentence["sent_id"], "ref_id": ref["ref_id"], "image_id": ref["image_id"]}
            | {"sentence": sentence["sent"], "ann_ids": targets(ref), "no_target": not targets(ref)}
            for ref, sentence in _sentences(refer, split)
        ]
        image_ids = list(dict.fromkeys(expression["image_id"] for expression in expressions))
        images = refer.loadImgs(image_ids)
        annotations = refer.loadAnns(refer.getAnnIds(image_ids=image_ids))
        yield split, _coco_file(refer, images, annotations) | {"expressions": expressions}


def _splits(refer: GRefer) -> list[str]:
    return [split for split in EXPORT_ORDER if split in refer.availableSplits]


def _sentences(refer: GRefer, split: str) -> list[tuple[dict, dict]]:
    refs = (refer.Refs[ref_id] for ref_id in refer.getRefIds(split=split))
    return [(ref, sentence) for ref in refs for sentence in ref["sentences"]]


def _coco_file(refer: GRefer, images: list[dict], annotations: list[dict]) -> dict:
    head = {"info": refer.data.get("info", {}), "licenses": refer.data.get("licenses", [])}
    return head | {"images": images, "annotations": annotations, "categories": refer.data["categories"]}
