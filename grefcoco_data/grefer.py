"""GRefer: the interface of gRefCOCO's G_REFER, and of REFER for the RefCOCO family, on genuine or built files.

Method names, arguments and results are those of the original grefer.py, because existing code expects them. Where the
original raises or counts pixels twice (ref_id 0, crowd and RLE masks, overlapping polygons, unknown images, drawing),
this class returns the intended result.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.dataset as arrow_dataset
from PIL import Image

from grefcoco_data.annotation_json import without_garbage_collection
from grefcoco_data.annotations import as_list, read_files, targets
from grefcoco_data.building import REPORT, one_error, read_report
from grefcoco_data.collections import COLLECTIONS
from grefcoco_data.expressions import check_image_rows
from grefcoco_data.masks import decode_mask, merge_rles, to_rle

Ids = int | str | Iterable[int] | Iterable[str]


class GRefer:
    """Index over refs, annotations, images and categories.

    `Refs`, `Anns`, `Imgs`, `Cats`, `Sents` map ids to records (`Anns[-1]` is None, the annotation of no target);
    `imgToRefs`, `imgToAnns`, `refToAnn`, `annToRef`, `catToRefs`, `sentToRef`, `sentToTokens` link them. In the
    RefCOCO family, whose refs have one annotation each, `refToAnn` and `annToRef` hold a record and not a list.

    Args:
        data_root: Folder that holds the data set's folder or its files, or a folder `grefcoco.build` wrote.
        dataset: "grefcoco", "refcoco", "refcoco+", "refcocog", "refclef" or "ref-zom".
        splitBy: Author of the split: "unc", "google", "umd", "berkeley" or "final".

    Raises:
        FileNotFoundError, ValueError: as `read_files`; a ref whose annotation is missing.
    """

    def __init__(self, data_root: str | Path, dataset: str = "grefcoco", splitBy: str = "unc") -> None:
        names = {(collection.dataset, collection.split_by): name for name, collection in COLLECTIONS.items()}
        config = names.get((dataset, splitBy))
        if config is None:
            raise ValueError(f"No data set {dataset!r} split by {splitBy!r}; there are {', '.join(COLLECTIONS)}.")
        self.root = Path(data_root)
        self.single = COLLECTIONS[config].single_target
        self.built = (self.root / REPORT).is_file()
        refs, instances = self._read_built(config) if self.built else read_files(self.root, config, as_lists=True)
        places = ("images", "images/mscoco/images", ".")
        folders = [self.root / place / COLLECTIONS[config].image_folder for place in places]
        self.IMAGE_DIR = str(next((folder for folder in folders if folder.is_dir()), folders[0]))
        self.data = {"dataset": dataset, "refs": refs} | instances
        try:
            with without_garbage_collection():
                self.createIndex()
        except KeyError as error:
            raise ValueError(
                f"{self.root}: a record has no field {error}, or names an id {error} that does not exist."
            ) from error

    def createIndex(self) -> None:
        """Make the maps between ids and records, each in one pass."""
        self.Anns: dict[int, dict | None] = {-1: None} | {ann["id"]: ann for ann in self.data["annotations"]}
        self.Imgs = {image["id"]: image for image in self.data["images"]}
        self.Cats = {category["id"]: category["name"] for category in self.data["categories"]}
        self.imgToAnns = _grouped((ann["image_id"], ann) for ann in self.data["annotations"])
        refs = self.data["refs"]
        self.Refs = {ref["ref_id"]: ref for ref in refs}
        self.availableSplits = list(dict.fromkeys(ref["split"] for ref in refs))
        self.imgToRefs = _grouped((ref["image_id"], ref) for ref in refs)
        self.catToRefs = _grouped((key, ref) for ref in refs for key in dict.fromkeys(as_list(ref["category_id"])))
        self.refToAnn = {ref["ref_id"]: [self.Anns[key] for key in as_list(ref["ann_id"])] for ref in refs}
        self.annToRef = _grouped((key, ref) for ref in refs for key in as_list(ref["ann_id"]))
        if self.single:
            self.refToAnn = {key: anns[0] for key, anns in self.refToAnn.items()}
            self.annToRef = {key: group[-1] for key, group in self.annToRef.items()}
        self.Sents = {sentence["sent_id"]: sentence for ref in refs for sentence in ref["sentences"]}
        self.sentToRef = {sentence["sent_id"]: ref for ref in refs for sentence in ref["sentences"]}
        self.sentToTokens = {key: sentence["tokens"] for key, sentence in self.Sents.items()}
        self._ann_ids = {ann["id"] for ann in self.data["annotations"]}

    def getRefIds(self, image_ids: Ids = (), cat_ids: Ids = (), split: Ids = (), ref_ids: Ids = ()) -> list[int]:
        """Ids of the refs that fit all arguments. Raises ValueError for a split that the files do not have."""
        images, categories, splits, chosen = map(_ids, (image_ids, cat_ids, split, ref_ids))
        for name in splits:
            if not any(self._in_split(available, name) for available in self.availableSplits):
                raise ValueError(f"Invalid split name: {name}")
        refs = [ref for key in images for ref in self.imgToRefs.get(key, [])] if images else self.data["refs"]
        if categories:
            refs = [ref for ref in refs if not set(categories).isdisjoint(as_list(ref["category_id"]))]
        if splits:
            refs = [ref for ref in refs if any(self._in_split(ref["split"], name) for name in splits)]
        if chosen:
            refs = [ref for ref in refs if ref["ref_id"] in set(chosen)]
        return [ref["ref_id"] for ref in refs]

    def getAnnIds(self, image_ids: Ids = (), ref_ids: Ids = ()) -> list[int]:
        """Ids of the annotations of these images; with `ref_ids` only those of these refs, in ascending order."""
        images, refs = _ids(image_ids), _ids(ref_ids)
        of_images = [ann["id"] for key in images for ann in self.imgToAnns.get(key, [])]
        if not refs:
            return of_images if images else [ann["id"] for ann in self.data["annotations"]]
        of_refs = {key for ref_id in refs for key in targets(self.Refs[ref_id])}
        return sorted((set(of_images) if images else self._ann_ids) & of_refs)

    def getImgIds(self, ref_ids: Ids = ()) -> list[int]:
        """Ids of the images of these refs, or of all images."""
        refs = _ids(ref_ids)
        return list({self.Refs[key]["image_id"] for key in refs}) if refs else list(self.Imgs)

    def getCatIds(self) -> list[int]:
        """Ids of all categories."""
        return list(self.Cats)

    def loadRefs(self, ref_ids: Ids = ()) -> list[dict]:
        """Refs by id."""
        return [self.Refs[key] for key in _ids(ref_ids)]

    def loadAnns(self, ann_ids: Ids = ()) -> list[dict | None]:
        """Annotations by id; a string is read as one number."""
        return [self.Anns[key] for key in _ids(int(ann_ids) if isinstance(ann_ids, str) else ann_ids)]

    def loadImgs(self, image_ids: Ids = ()) -> list[dict]:
        """Image records by id."""
        return [self.Imgs[key] for key in _ids(image_ids)]

    def loadCats(self, cat_ids: Ids = ()) -> list[str]:
        """Category names by id."""
        return [self.Cats[key] for key in _ids(cat_ids)]

    def getRefBox(self, ref_id: int) -> list:
        """Boxes [x, y, w, h] in pixels of the ref's targets; in the RefCOCO family the one box, not a list."""
        if self.single:
            return self.refToAnn[ref_id]["bbox"]
        return [ann["bbox"] for ann in self.loadAnns(targets(self.Refs[ref_id]))]

    def getMask(self, ann: dict | None) -> dict | None:
        """`{"mask": (height, width) uint8 of 0 and 1, "area": pixels}` of an annotation, or of a ref as in REFER."""
        if not ann:
            return None
        if "ref_id" in ann:
            mask = self.getMaskByRef(ann, merge=True)["mask"]
        else:
            mask = decode_mask(self._rle(ann))
        return {"mask": mask, "area": float(mask.sum())}

    def getMaskByRef(self, ref: dict | None = None, ref_id: int | None = None, merge: bool = False) -> dict | list:
        """Mask of all targets, `{"mask", "empty"}`, with `merge` or for no target; else a list of `getMask` results.

        Crowd regions are ignored, except when a ref without any other target is merged. Raises ValueError without a
        ref.
        """
        if ref is None and ref_id is None:
            raise ValueError("getMaskByRef needs a ref or a ref_id.")
        record = self.Refs[ref_id] if ref is None else ref
        image = self.Imgs[record["image_id"]]
        if not targets(record) and (merge or (ref is not None and as_list(ref["ann_id"]) == [-1])):
            return {"mask": np.zeros((image["height"], image["width"]), np.uint8), "empty": True}
        anns = self.loadAnns(self.getAnnIds(ref_ids=ref_id) if ref is None else targets(ref))
        if not merge:
            return [self.getMask(ann) for ann in anns if not ann["iscrowd"]]
        crowd = [bool(ann["iscrowd"]) for ann in anns]
        rle = merge_rles([self._rle(ann) for ann in anns], crowd, image["height"], image["width"])
        return {"mask": decode_mask(rle), "empty": False}

    def showRef(self, ref: dict, seg_box: str = "seg") -> None:
        """Print the sentences of a ref; draw its image, with outlines ("seg") or boxes ("box"), with matplotlib."""
        from matplotlib import pyplot as plt

        axes = plt.gca()
        axes.imshow(self._image(ref["image_id"]))
        for number, sentence in enumerate(ref["sentences"], start=1):
            print(f"{number}. {sentence['sent']}")
        for ann in self.loadAnns(targets(ref)):
            if seg_box == "seg":
                axes.contour(decode_mask(self._rle(ann)), levels=[0.5], colors=["#f0386b"])
            else:
                x, y, width, height = ann["bbox"]
                axes.add_patch(plt.Rectangle((x, y), width, height, fill=False, edgecolor="#2e9e5b", linewidth=3))

    def showMask(self, ref: dict, seg_box: str = "seg") -> None:
        """Draw the merged mask of a ref with matplotlib."""
        from matplotlib import pyplot as plt

        plt.gca().imshow(self.getMaskByRef(ref, merge=True)["mask"])

    def _in_split(self, split: str, requested: str) -> bool:
        """REFER's rule for the RefCOCO family: "test" is every test split, and testAB is part of testA too."""
        if not self.single or not requested.startswith("test"):
            return split == requested
        return split.startswith("test") and set(requested[4:]) <= set(split[4:])

    def _rle(self, ann: dict) -> dict:
        image = self.Imgs[ann["image_id"]]
        return to_rle(ann["segmentation"], image["height"], image["width"])[0]

    def _image(self, image_id: int) -> Image.Image:
        if not self.built:
            return Image.open(Path(self.IMAGE_DIR) / self.Imgs[image_id]["file_name"])
        rows = arrow_dataset.dataset(self.root / "data").head(
            1, columns=["image"], filter=pc.field("image_id") == image_id
        )
        return Image.open(io.BytesIO(rows["image"][0].as_py()["bytes"]))

    def _read_built(self, config: str) -> tuple[list[dict], dict]:
        report = read_report(self.root)
        if report["config"] != config:
            raise ValueError(f"{self.root} was built with {report['config']!r}, not {config!r}.")
        columns = ["image_id", "file_name", "width", "height", "objects", "expressions"]
        refs, images, anns = [], {}, {}
        for shard in report["shards"]:
            split = Path(shard).name.split("-")[0]
            with one_error(self.root):
                table = arrow_dataset.dataset(self.root / shard).to_table(columns=columns)
                check_image_rows(table)
            for row in table.to_pylist():
                image = {"id": row["image_id"]} | {key: row[key] for key in ("file_name", "width", "height")}
                images[row["image_id"]] = image
                anns |= {item["ann_id"]: _annotation(item, row["image_id"]) for item in row["objects"]}
                refs.extend(self._refs(row, split, anns))
        refs.extend(ref for ref in report["refs_without_sentences"] if ref["image_id"] in images)
        refs.sort(key=lambda ref: ref["ref_id"])
        parts = {"images": list(images.values()), "annotations": list(anns.values())}
        return refs, parts | {"categories": report["categories"]}

    def _refs(self, row: dict, split: str, anns: dict[int, dict]) -> Iterable[dict]:
        for ref_id, group in _grouped((item["ref_id"], item) for item in row["expressions"]).items():
            ann_ids = group[0]["ann_ids"] or [-1]
            categories = [anns[key]["category_id"] if key != -1 else -1 for key in ann_ids]
            yield {
                "ref_id": ref_id,
                "image_id": row["image_id"],
                "split": split,
                "file_name": row["file_name"],
                "ann_id": ann_ids[0] if self.single else ann_ids,
                "category_id": categories[0] if self.single else categories,
                "no_target": group[0]["no_target"],
                "sent_ids": [item["sent_id"] for item in group],
                "sentences": [_sentence(item) for item in group],
            }


def _annotation(item: dict, image_id: int) -> dict:
    """A record as in instances.json. Boxes are stored as float32; their shortest decimals are those of the file."""
    return {
        "id": item["ann_id"],
        "image_id": image_id,
        "category_id": item["category_id"],
        "bbox": [float(str(np.float32(side))) for side in item["bbox"]],
        "area": float(str(np.float32(item["area"]))),
        "iscrowd": int(item["iscrowd"]),
        "segmentation": item["segmentation"],
    }


def _sentence(item: dict) -> dict:
    sentence = item["sentence"]
    return {"sent_id": item["sent_id"], "sent": sentence, "raw": item["raw"], "tokens": sentence.split()}


def _ids(value: Ids) -> list:
    if isinstance(value, (int, np.integer)):
        return [value]
    return [value] * bool(value) if isinstance(value, str) else list(value)


def _grouped(pairs: Iterable[tuple[int, dict]]) -> dict[int, list[dict]]:
    groups = defaultdict(list)
    for key, record in pairs:
        groups[key].append(record)
    return dict(groups)
