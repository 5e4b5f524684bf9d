"""The annotation files: find, read and check them, and pair refs with objects by image id.

No file is trusted: types, ranges and texts are checked before they are used. What is wrong is either one clear
`ValueError` or a named entry in `Problems`.
"""

from __future__ import annotations

import functools
import pickle
import reprlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np

from grefcoco_data.annotation_json import read_instances, read_json, without_garbage_collection
from grefcoco_data.collections import COUNTED, collection_of

SPLITS = ("train", "val", "testA", "testB", "testC", "testAB", "testBC", "test")
MAX_SIDE = 65_500  # pixels, the most a JPEG header can say
MANY_TARGETS = 100  # models answer with at most so many boxes
IMAGE_FIELDS = {"id": (int,), "file_name": (str,), "width": (int,), "height": (int,)}
OBJECT_FIELDS = {
    "id": (int,),
    "image_id": (int,),
    "category_id": (int,),
    "bbox": (list,),
    "area": (int, float),
    "iscrowd": (int,),
    "segmentation": (list, dict),
}
REF_FIELDS = {"ref_id": (int,), "image_id": (int,), "split": (str,), "ann_id": (int, list), "sentences": (list,)}
CATEGORY_FIELDS = {"id": (int,), "name": (str,)}
SENTENCE_FIELDS = {"sent_id": (int,), "sent": (str,), "raw": (str,)}


class Problems(dict[str, list[str]]):
    """What is wrong in the source files: kind -> names of all places. Kinds that say "skipped" cost rows."""

    def add(self, kind: str, name: object) -> None:
        self.setdefault(kind, []).append(str(name))

    def merge(self, other: dict[str, list[str]]) -> None:
        for kind, names in other.items():
            self.setdefault(kind, []).extend(names)

    def lines(self) -> list[str]:
        """One line per kind: the number of places and the first three."""
        parts = ((kind, len(names), ", ".join(names[:3]) + ", ..." * (len(names) > 3)) for kind, names in self.items())
        return [f"{count} x {kind}: {names}" for kind, count, names in parts]


@dataclass
class Annotations:
    """The annotation files, checked and paired by image id.

    `splits` holds the usable refs per split and image id, in order of first appearance. `objects` holds all
    annotations of an image. `refs_without_sentences` have no row. What is wrong but can be skipped is in `problems`.
    """

    images: dict[int, dict]
    objects: dict[int, list[dict]]
    categories: list[dict]
    splits: dict[str, dict[int, list[dict]]]
    refs_without_sentences: list[dict]
    problems: Problems = field(default_factory=Problems)

    def counts(self) -> dict[str, dict[str, int]]:
        """Per split, the numbers that `COUNTED` names."""
        counts = {}
        for split, groups in self.splits.items():
            refs = [ref for group in groups.values() for ref in group]
            targets_each = np.repeat([len(targets(ref)) for ref in refs], [len(ref["sentences"]) for ref in refs])
            numbers = (len(groups), len(refs), len(targets_each), *count_kinds(targets_each))
            counts[split] = dict(zip(COUNTED, numbers))
        return counts


def count_kinds(targets_each: np.ndarray) -> tuple[int, int, int, int]:
    """Numbers of sentences with no, one and several targets, and the most targets; of the targets of each sentence."""
    kinds = (targets_each == 0).sum(), (targets_each == 1).sum(), (targets_each > 1).sum(), targets_each.max(initial=0)
    return tuple(map(int, kinds))


def find_files(folder: str | Path, config: str) -> tuple[Path, Path]:
    """Paths of the refs file (JSON before pickle) and of instances.json, in `folder` or in its folder of the data set.

    Raises:
        ValueError: unknown `config`.
        FileNotFoundError: one of the two is missing.
    """
    collection = collection_of(config)
    stem = collection.refs_stem
    for place in (Path(folder), Path(folder) / collection.dataset):
        for refs in (place / f"{stem}.json", place / f"{stem}.p"):
            if refs.is_file() and (place / "instances.json").is_file():
                return refs, place / "instances.json"
    raise FileNotFoundError(
        f"{folder}: no {stem}.json or {stem}.p with an instances.json beside it. Name the folder that holds both "
        "(`build --download` downloads those of gRefCOCO)."
    )


def read_files(folder: str | Path, config: str = "grefcoco", as_lists: bool = False) -> tuple[list[dict], dict]:
    """Refs and instances as the files hold them; only the outermost form is checked.

    Polygon rings may be float64 arrays; with `as_lists` they are lists, as in the files.

    Raises:
        ValueError: a file is not what its name says (JSON, pickle of plain values, list of refs, COCO instances).
        FileNotFoundError: as `find_files`.
    """
    refs_path, instances_path = find_files(folder, config)
    instances = read_instances(instances_path, as_lists)
    refs = _read_pickle(refs_path) if refs_path.suffix == ".p" else read_json(refs_path)
    if not isinstance(refs, list):
        raise ValueError(f"{refs_path}: expected a list of refs, got {type(refs).__name__}.")
    for key in ("images", "annotations", "categories"):
        if not isinstance(instances, dict) or not isinstance(instances.get(key), list):
            raise ValueError(f"{instances_path}: no list {key!r}; expected a COCO instances file.")
    return refs, instances


def read_annotations(folder: str | Path, config: str = "grefcoco") -> Annotations:
    """Read and check the annotation files of one configuration; the last result is cached until a file changes.

    Worker processes that are forked after the first call find it in memory and do not parse again.

    Raises:
        ValueError: a record lacks a field or holds one of another type; names the file and the place.
        FileNotFoundError: as `find_files`.
    """
    stamps = tuple((path.stat().st_size, path.stat().st_mtime_ns) for path in find_files(folder, config))
    return _read_annotations(str(folder), config, stamps)


@functools.lru_cache(maxsize=1)
@without_garbage_collection()
def _read_annotations(folder: str, config: str, stamps: tuple) -> Annotations:
    refs_path, instances_path = find_files(folder, config)
    refs, instances = read_files(folder, config)
    check_records(instances["images"], IMAGE_FIELDS, f"{instances_path}: images")
    check_records(instances["annotations"], OBJECT_FIELDS, f"{instances_path}: annotations")
    check_records(instances["categories"], CATEGORY_FIELDS, f"{instances_path}: categories")
    check_records(refs, REF_FIELDS, f"{refs_path}: refs")
    for index, ref in enumerate(refs):
        check_records(ref["sentences"], SENTENCE_FIELDS, f"{refs_path}: refs[{index}].sentences")
    _check_values(refs, instances, refs_path, instances_path)
    return _pair(refs, instances)


def as_list(value: object) -> list:
    """The value itself when it is a list, else a list of it: the RefCOCO family has plain numbers as ids."""
    return value if isinstance(value, list) else [value]


def targets(ref: dict) -> list[int]:
    """Annotation ids of the targets of a ref; empty for no target.

    gRefCOCO writes no target as [-1]. Ref-ZOM writes the source "zero"; its published loader ignores the ids then.
    """
    if ref.get("source") == "zero":
        return []
    return [ann_id for ann_id in as_list(ref["ann_id"]) if ann_id != -1]


def check_records(records: list, fields: dict[str, tuple[type, ...]], where: str) -> None:
    """Raise ValueError for the first record that lacks a field or holds one of another type; names its place."""
    for index, record in enumerate(records):
        if type(record) is not dict:
            raise ValueError(f"{where}[{index}] is {type(record).__name__}; expected an object.")
        for key, kinds in fields.items():
            value = record.get(key)
            if type(value) not in kinds:
                content = _short(value) if key in record else "missing"
                raise ValueError(f"{where}[{index}].{key} is {content}; expected {kinds[0].__name__}.")
            if type(value) is int and not -(2**63) <= value < 2**63:
                raise ValueError(f"{where}[{index}].{key} does not fit 64 bits.")
            if type(value) is str and not value.isascii():
                _check_text(value, f"{where}[{index}].{key}")


def _short(value: object) -> str:
    """The start of a value from a file for a message, whatever its size and depth."""
    try:
        return reprlib.repr(value)[:60]
    except ValueError:  # a number of thousands of digits
        return type(value).__name__


def _check_text(value: str, where: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} is not valid Unicode text ({error.reason}).") from error


def _check_values(refs: list[dict], instances: dict, refs_path: Path, instances_path: Path) -> None:
    """Check what types cannot express: sizes, boxes, category ids, split names, lists of ids."""
    for index, image in enumerate(instances["images"]):
        if not (0 < image["width"] <= MAX_SIDE and 0 < image["height"] <= MAX_SIDE):
            size = f"{image['width']} x {image['height']}"
            raise ValueError(f"{instances_path}: images[{index}] is {size} pixels; a side can have 1 to {MAX_SIDE}.")
        if image["id"] < 0:
            raise ValueError(f"{instances_path}: images[{index}].id is negative.")
    for index, item in enumerate(instances["annotations"]):
        box = item["bbox"]
        if len(box) != 4 or not all(type(x) in (int, float) and abs(x) < 1e9 for x in (*box, item["area"])):
            raise ValueError(
                f"{instances_path}: annotations[{index}] needs a bbox of 4 finite numbers and a finite area."
            )
        if item["id"] < 0:
            raise ValueError(f"{instances_path}: annotations[{index}].id is negative; -1 stands for no target.")
        if not 0 <= item["category_id"] < 2**31:
            raise ValueError(f"{instances_path}: annotations[{index}].category_id does not fit 31 bits.")
    for index, ref in enumerate(refs):
        if ref["split"] not in SPLITS:
            raise ValueError(f"{refs_path}: refs[{index}].split is {_short(ref['split'])}; expected one of {SPLITS}.")
        if not all(type(ann_id) is int and abs(ann_id) < 2**63 for ann_id in as_list(ref["ann_id"])):
            raise ValueError(f"{refs_path}: refs[{index}].ann_id holds a value that is not an id.")
        if not all(type(category) is int for category in as_list(ref.get("category_id", -1))):
            raise ValueError(f"{refs_path}: refs[{index}].category_id holds a value that is not an id.")
        if any(sentence["sent_id"] < 0 for sentence in ref["sentences"]):
            raise ValueError(f"{refs_path}: refs[{index}] has a negative sent_id.")


def _pair(refs: list[dict], instances: dict) -> Annotations:
    """Group objects and refs by image id; what cannot be paired is skipped and named."""
    problems = Problems()
    images = {image["id"]: image for image in instances["images"]}
    if duplicates := len(instances["images"]) - len(images):
        problems.add("duplicate image id, the last one is used", f"{duplicates} in instances.json")
    objects: dict[int, list[dict]] = {image_id: [] for image_id in images}
    image_of: dict[int, int] = {}  # annotation id -> image id
    for item in instances["annotations"]:
        if item["image_id"] not in images:
            problems.add("annotation of an unknown image, skipped", f"annotation {item['id']}")
        elif item["id"] in image_of:
            problems.add("duplicate annotation id, the first one is used", f"annotation {item['id']}")
        else:
            image_of[item["id"]] = item["image_id"]
            objects[item["image_id"]].append(item)
            if min(item["bbox"][2:]) < 0:
                problems.add("box of negative width or height, its corners are exchanged", f"annotation {item['id']}")
                item["bbox"] = _upright(item["bbox"])
    splits: dict[str, dict[int, list[dict]]] = {}
    for ref in refs:
        if _is_usable(ref, images, image_of, problems):
            splits.setdefault(ref["split"], {}).setdefault(ref["image_id"], []).append(ref)
    _note_sentences(refs, problems)
    ordered = {split: splits[split] for split in SPLITS if split in splits}
    silent = [ref for ref in refs if not ref["sentences"] and all(ann_id in image_of for ann_id in targets(ref))]
    return Annotations(images, objects, instances["categories"], ordered, silent, problems)


def _upright(box: list[float]) -> list[float]:
    """A box (xywh) whose width and height are not negative, with the same corners."""
    x, y, width, height = box
    return [min(x, x + width), min(y, y + height), abs(width), abs(height)]


def _is_usable(ref: dict, images: dict[int, dict], image_of: dict[int, int], problems: Problems) -> bool:
    name = f"ref {ref['ref_id']}"
    missing = [ann_id for ann_id in targets(ref) if ann_id not in image_of]
    foreign = [ann_id for ann_id in targets(ref) if image_of.get(ann_id, ref["image_id"]) != ref["image_id"]]
    if bool(ref.get("no_target", not targets(ref))) == bool(targets(ref)):
        problems.add("no_target flag that contradicts ann_id, ann_id is used", name)
    if ref["image_id"] not in images:
        problems.add("ref of an unknown image, skipped", f"{name} (image {ref['image_id']})")
    elif missing:
        problems.add("ref with a missing annotation, skipped", f"{name} (annotation {missing[0]})")
    elif foreign:
        problems.add("ref with an annotation of another image, skipped", f"{name} (annotation {foreign[0]})")
    elif not ref["sentences"]:
        problems.add("ref without sentences", name)
    else:
        if len(set(targets(ref))) < len(targets(ref)):
            problems.add("ref that names an annotation twice", name)
        if len(targets(ref)) > MANY_TARGETS:
            problems.add(f"ref with more than {MANY_TARGETS} targets", name)
        return True
    return False


def _note_sentences(refs: list[dict], problems: Problems) -> None:
    ref_ids: set[int] = set()
    sent_ids: set[int] = set()
    for ref in refs:
        if ref["ref_id"] in ref_ids:
            problems.add("duplicate ref id", f"ref {ref['ref_id']}")
        ref_ids.add(ref["ref_id"])
        for sentence in ref["sentences"]:
            if not sentence["sent"].strip():
                problems.add("empty sentence", f"sentence {sentence['sent_id']}")
            if sentence["sent_id"] in sent_ids:
                problems.add("duplicate sentence id", f"sentence {sentence['sent_id']}")
            sent_ids.add(sentence["sent_id"])


class _PlainUnpickler(pickle._Unpickler):
    """Unpickles lists, dictionaries, strings and numbers, which need no import; refuses everything else.

    This is the Python class of the standard library: the one in C reserves memory for any number of memo entries that
    a file of a few bytes asks for.
    """

    dispatch: ClassVar[dict] = {
        code: read
        for code, read in pickle._Unpickler.dispatch.items()
        if bytes([code]) not in (pickle.BYTEARRAY8, pickle.BUILD, pickle.REDUCE, pickle.PERSID, pickle.BINPERSID)
    }

    def find_class(self, module: str, name: str) -> type:
        raise pickle.UnpicklingError(f"it tries to import {module}.{name}")


def _read_pickle(path: Path) -> object:
    with path.open("rb") as file:
        try:
            return _PlainUnpickler(file, encoding="utf-8").load()  # the encoding is for pickles of Python 2
        except Exception as error:  # a broken pickle can raise any exception
            raise ValueError(
                f"{path} is not a pickle of plain values ({str(error)[:200] or type(error).__name__})."
            ) from error
