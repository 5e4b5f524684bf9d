"""GRefer: the interface of gRefCOCO's G_REFER, and of REFER for the RefCOCO family, on genuine files or built ones.

Method names, arguments and results are those of the original grefer.py, as code in the field expects them. Where the
original raises or counts pixels twice (ref_id 0, crowd and RLE masks, overlapping polygons, unknown images, drawing),
this gives what was meant.
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
from pycocotools import mask as coco_mask

from grefcoco_data.annotation_json import no_collector
from grefcoco_data.files import CONFIGS, REPORT, as_list, merge_rles, read_files, read_report, targets, to_rle

Ids = int | str | Iterable[int] | Iterable[str]


class GRefer:
    """Index over refs, annotations, images and categories.

    `Refs`, `Anns`, `Imgs`, `Cats`, `Sents` map ids to records (`Anns[-1]` is None, the annotation of no target);
    `imgToRefs`, `imgToAnns`, `refToAnn`, `annToRef`, `catToRefs`, `sentToRef`, `sentToTokens` link them. In the
    RefCOCO family, whose refs have one annotation each, `refToAnn` and `annToRef` hold a record and not a list.

    Args:
        data_root: Folder that holds the data set's folder or its files, or a folder `grefcoco.build` wrote.
        dataset: "grefcoco", "refcoco", "refcoco+", "refcocog" or "refclef".
        splitBy: Author of the split: "unc", "google", "umd" or "berkeley".

    Raises:
        FileNotFoundError, ValueError: as `files.read_files`; a ref whose annotation is missing.
    """

    def __init__(self, data_root: str | Path, dataset: str = "grefcoco", splitBy: str = "unc") -> None:
        self.root = Path(data_root)
        self.single = dataset != "grefcoco"
        self.built = (self.root / REPORT).is_file()
        config = dataset if (dataset, splitBy) == ("grefcoco", "unc") else f"{dataset}_{splitBy}"
        if config not in CONFIGS:
            raise ValueError(f"No data set {dataset!r} split by {splitBy!r}; there are {', '.join(CONFIGS)}.")
        refs, instances = self._read_built(config) if self.built else read_files(self.root, config, as_lists=True)
        names = ("images/train2014", "images/mscoco/images/train2014", "train2014")
        folders = [self.root / name for name in (("images/saiapr_tc-12",) if dataset == "refclef" else names)]
        self.IMAGE_DIR = str(next((folder for folder in folders if folder.is_dir()), folders[0]))
        self.data = {"dataset": dataset, "refs": refs} | instances
        try:
            with no_collector():
                self.createIndex()
        except KeyError as error:
            raise ValueError(
                f"{self.root}: a record lacks {error}, or points at an id {error} that none has."
            ) from error

    def createIndex(self) -> None:
        """Make the maps between ids and records, in one pass each."""
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
            self.annToRef = {key: found[-1] for key, found in self.annToRef.items()}
        self.Sents = {sentence["sent_id"]: sentence for ref in refs for sentence in ref["sentences"]}
        self.sentToRef = {sentence["sent_id"]: ref for ref in refs for sentence in ref["sentences"]}
        self.sentToTokens = {key: sentence["tokens"] for key, sentence in self.Sents.items()}
        self._ann_ids = {ann["id"] for ann in self.data["annotations"]}

    def getRefIds(self, image_ids: Ids = (), cat_ids: Ids = (), split: Ids = (), ref_ids: Ids = ()) -> list[int]:
        """Ids of the refs that fit all that is given. Raises ValueError for a split the files do not have."""
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
        """Ids of the annotations on these images, of those what these refs point at, then in ascending order."""
        images, refs = _ids(image_ids), _ids(ref_ids)
        found = [ann["id"] for key in images for ann in self.imgToAnns.get(key, [])]
        if not refs:
            return found if images else [ann["id"] for ann in self.data["annotations"]]
        wanted = {key for ref_id in refs for key in as_list(self.Refs[ref_id]["ann_id"])}
        return sorted((set(found) if images else self._ann_ids) & wanted)

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
        """Boxes [x, y, w, h] in pixels of the ref's annotations, none for no target; the one box in REFER's manner."""
        if self.single:
            return self.refToAnn[ref_id]["bbox"]
        return [ann["bbox"] for ann in self.refToAnn[ref_id] if ann is not None]

    def getMask(self, ann: dict | None) -> dict | None:
        """`{"mask": (height, width) uint8 of 0 and 1, "area": pixels}` of an annotation, or, as in REFER, of a ref."""
        if not ann:
            return None
        if "ref_id" in ann:
            mask = self.getMaskByRef(ann, merge=True)["mask"]
        else:
            mask = coco_mask.decode(self._rle(ann))
        return {"mask": mask, "area": float(mask.sum())}

    def getMaskByRef(self, ref: dict | None = None, ref_id: int | None = None, merge: bool = False) -> dict | list:
        """Mask of all targets, `{"mask", "empty"}`, with `merge` or without target; else a `getMask` result for each.

        Crowd regions are left out, but for merging a ref that has no other target. Raises ValueError without a ref.
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
        return {"mask": coco_mask.decode(rle), "empty": False}

    def showRef(self, ref: dict, seg_box: str = "seg") -> None:
        """Draw the ref's image on the current axes, with outlines ("seg") or boxes ("box"); print its sentences."""
        from matplotlib import pyplot as plt

        axes = plt.gca()
        axes.imshow(self._picture(ref["image_id"]))
        for number, sentence in enumerate(ref["sentences"], start=1):
            print(f"{number}. {sentence['sent']}")
        for ann in self.loadAnns(targets(ref)):
            if seg_box == "seg":
                axes.contour(coco_mask.decode(self._rle(ann)), levels=[0.5], colors=["#f0386b"])
            else:
                x, y, width, height = ann["bbox"]
                axes.add_patch(plt.Rectangle((x, y), width, height, fill=False, edgecolor="#2e9e5b", linewidth=3))

    def showMask(self, ref: dict, seg_box: str = "seg") -> None:
        """Draw the merged mask of a ref on the current axes."""
        from matplotlib import pyplot as plt

        plt.gca().imshow(self.getMaskByRef(ref, merge=True)["mask"])

    def _in_split(self, found: str, asked: str) -> bool:
        """REFER's rule for the RefCOCO family: "test" is every test split, and testAB counts as testA too."""
        if not self.single or not asked.startswith("test"):
            return found == asked
        return found.startswith("test") and set(asked[4:]) <= set(found[4:])

    def _rle(self, ann: dict) -> dict:
        image = self.Imgs[ann["image_id"]]
        return to_rle(ann["segmentation"], image["height"], image["width"])[0]

    def _picture(self, image_id: int) -> Image.Image:
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
            for row in arrow_dataset.dataset(self.root / shard).to_table(columns=columns).to_pylist():
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
    """A record as in instances.json; of the float32 a box is stored in, the shortest decimals: 162.07, as it was."""
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
