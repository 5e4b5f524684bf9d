"""The genuine files: annotations read, checked and paired by image id; images checked and read; masks as RLE.

Nothing in here trusts a file: types, ranges, sizes, names and run lengths are checked before they are used, and what
is wrong is either one clear `ValueError` or a named entry in `Problems`.
"""

from __future__ import annotations

import functools
import io
import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from huggingface_hub import snapshot_download
from PIL import Image, UnidentifiedImageError
from pycocotools import mask as coco_mask

from grefcoco_data.annotation_json import no_collector, read_instances, read_json

SPLITS = ("train", "val", "testA", "testB", "testC", "testAB", "testBC", "test")
REPORT = "build.json"  # its presence tells a built folder
# Configuration -> folder, name of the refs file without suffix.
CONFIGS = {
    "grefcoco": ("grefcoco", "grefs(unc)"),
    "refcoco_unc": ("refcoco", "refs(unc)"),
    "refcoco_google": ("refcoco", "refs(google)"),
    "refcoco+_unc": ("refcoco+", "refs(unc)"),
    "refcocog_umd": ("refcocog", "refs(umd)"),
    "refcocog_google": ("refcocog", "refs(google)"),
    "refclef_unc": ("refclef", "refs(unc)"),
    "refclef_berkeley": ("refclef", "refs(berkeley)"),
}
MAX_IMAGE_BYTES = 64 << 20
MAX_SIDE = 65_500  # pixels, the most a JPEG header can say
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
SENTENCE_FIELDS = {"sent_id": (int,), "sent": (str,), "raw": (str,)}


class Problems(dict[str, list[str]]):
    """What was found wrong in the genuine files: kind -> names of the places, nothing left out in silence."""

    def add(self, kind: str, name: object) -> None:
        self.setdefault(kind, []).append(str(name))

    def merge(self, other: dict[str, list[str]]) -> None:
        for kind, names in other.items():
            self.setdefault(kind, []).extend(names)

    def lines(self) -> list[str]:
        """One line per kind: how many, and the first three."""
        shown = ((kind, len(names), ", ".join(names[:3]) + ", ..." * (len(names) > 3)) for kind, names in self.items())
        return [f"{count} x {kind}: {names}" for kind, count, names in shown]


# ---- the genuine files -------------------------------------------------------------------------------------------


@dataclass
class Annotations:
    """The annotation files, checked and paired by image id.

    `splits` holds, per split and image id in order of first appearance, the refs that can be used; `objects` all
    annotations of an image; `wordless` the refs without sentences, which no row can show. What is wrong but survivable
    is in `problems`.
    """

    images: dict[int, dict]
    objects: dict[int, list[dict]]
    categories: list[dict]
    splits: dict[str, dict[int, list[dict]]]
    wordless: list[dict]
    problems: Problems = field(default_factory=Problems)


def find_files(folder: str | Path, config: str) -> tuple[Path, Path]:
    """Paths of the refs file (JSON before pickle) and of instances.json, in `folder` or in its data set's own folder.

    Raises:
        ValueError: unknown `config`.
        FileNotFoundError: one of the two is missing.
    """
    if config not in CONFIGS:
        raise ValueError(f"Unknown configuration {config!r}; choose one of {', '.join(CONFIGS)}.")
    subfolder, stem = CONFIGS[config]
    for place in (Path(folder), Path(folder) / subfolder):
        for refs in (place / f"{stem}.json", place / f"{stem}.p"):
            if refs.is_file() and (place / "instances.json").is_file():
                return refs, place / "instances.json"
    raise FileNotFoundError(
        f"{folder}: no {stem}.json or {stem}.p with an instances.json beside it. Point to the folder that holds both "
        "(`build --download` fetches gRefCOCO's)."
    )


def read_files(folder: str | Path, config: str = "grefcoco", as_lists: bool = False) -> tuple[list[dict], dict]:
    """Refs and instances as the files hold them, unchecked but for their outer form.

    Rings of polygons may be float64 arrays; `as_lists` gives lists, as the files have them.

    Raises:
        ValueError: a file is not what its name says (JSON, pickle of plain values, list of refs, COCO instances).
        FileNotFoundError: as `find_files`.
    """
    refs_path, instances_path = find_files(folder, config)
    instances = read_instances(instances_path, as_lists)
    refs = _read_pickle(refs_path) if refs_path.suffix == ".p" else read_json(refs_path)
    if not isinstance(refs, list):
        raise ValueError(f"{refs_path}: a list of refs was expected, found {type(refs).__name__}.")
    for key in ("images", "annotations", "categories"):
        if not isinstance(instances, dict) or not isinstance(instances.get(key), list):
            raise ValueError(f"{instances_path}: no list {key!r}; a COCO instances file was expected.")
    return refs, instances


def read_report(folder: str | Path) -> dict:
    """The report `grefcoco.build` left in a built folder. Raises ValueError when it is damaged."""
    path = Path(folder) / REPORT
    report = read_json(path)
    if not isinstance(report, dict) or not {"config", "splits", "problems", "categories", "shards"} <= report.keys():
        raise ValueError(f"{path} is no build report; build again.")
    return report


def read_annotations(folder: str | Path, config: str = "grefcoco") -> Annotations:
    """Read and check the genuine files of one configuration; the last result is kept until a file changes.

    Worker processes that are forked after the first call find it in memory and parse nothing again.

    Raises:
        ValueError: a record lacks a field or holds one of another type, with its file and place.
        FileNotFoundError: as `find_files`.
    """
    stamps = tuple((path.stat().st_size, path.stat().st_mtime_ns) for path in find_files(folder, config))
    return _read_annotations(str(folder), config, stamps)


@functools.lru_cache(maxsize=1)
@no_collector()
def _read_annotations(folder: str, config: str, stamps: tuple) -> Annotations:
    refs_path, instances_path = find_files(folder, config)
    refs, instances = read_files(folder, config)
    _check_records(instances["images"], IMAGE_FIELDS, f"{instances_path}: images")
    _check_records(instances["annotations"], OBJECT_FIELDS, f"{instances_path}: annotations")
    _check_records(instances["categories"], {"id": (int,), "name": (str,)}, f"{instances_path}: categories")
    _check_records(refs, REF_FIELDS, f"{refs_path}: refs")
    for index, ref in enumerate(refs):
        _check_records(ref["sentences"], SENTENCE_FIELDS, f"{refs_path}: refs[{index}].sentences")
    _check_values(refs, instances, refs_path, instances_path)
    return _pair(refs, instances)


def _check_records(records: list, fields: dict[str, tuple[type, ...]], where: str) -> None:
    for index, record in enumerate(records):
        if type(record) is not dict:
            raise ValueError(f"{where}[{index}] is {type(record).__name__}; an object was expected.")
        for key, kinds in fields.items():
            value = record.get(key)
            if type(value) not in kinds:
                found = repr(value)[:60] if key in record else "nothing"
                raise ValueError(f"{where}[{index}].{key} is {found}; {kinds[0].__name__} was expected.")
            if type(value) is int and not -(2**63) <= value < 2**63:
                raise ValueError(f"{where}[{index}].{key} does not fit 64 bits.")
            if type(value) is str and not value.isascii():
                _check_text(value, f"{where}[{index}].{key}")


def _check_text(value: str, where: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} is not valid Unicode text ({error.reason}).") from error


def _check_values(refs: list[dict], instances: dict, refs_path: Path, instances_path: Path) -> None:
    """Ranges that types cannot express: sizes, boxes, category ids, split names, lists of ids."""
    for index, image in enumerate(instances["images"]):
        if not (0 < image["width"] <= MAX_SIDE and 0 < image["height"] <= MAX_SIDE):
            size = f"{image['width']} x {image['height']}"
            raise ValueError(
                f"{instances_path}: images[{index}] is {size} pixels; 1 to {MAX_SIDE} a side are possible."
            )
    for index, item in enumerate(instances["annotations"]):
        box = item["bbox"]
        if len(box) != 4 or not all(type(x) in (int, float) and abs(x) < 1e9 for x in (*box, item["area"])):
            raise ValueError(
                f"{instances_path}: annotations[{index}] needs a bbox of 4 finite numbers and a finite area."
            )
        if not 0 <= item["category_id"] < 2**31:
            raise ValueError(f"{instances_path}: annotations[{index}].category_id does not fit 31 bits.")
    for index, ref in enumerate(refs):
        if ref["split"] not in SPLITS:
            raise ValueError(f"{refs_path}: refs[{index}].split is {ref['split']!r}; one of {SPLITS} was expected.")
        if not all(type(ann_id) is int and abs(ann_id) < 2**63 for ann_id in as_list(ref["ann_id"])):
            raise ValueError(f"{refs_path}: refs[{index}].ann_id holds something that is no id.")


def _pair(refs: list[dict], instances: dict) -> Annotations:
    """Group objects and refs by image id; what cannot be paired is left out and named."""
    problems = Problems()
    images = {image["id"]: image for image in instances["images"]}
    if len(images) < len(instances["images"]):
        problems.add(
            "duplicate image id, last one kept", f"{len(instances['images']) - len(images)} in instances.json"
        )
    objects: dict[int, list[dict]] = {image_id: [] for image_id in images}
    owner: dict[int, int] = {}
    for item in instances["annotations"]:
        if item["image_id"] not in images:
            problems.add("annotation of an unknown image, left out", f"annotation {item['id']}")
        elif item["id"] in owner:
            problems.add("duplicate annotation id, first one kept", f"annotation {item['id']}")
        else:
            owner[item["id"]] = item["image_id"]
            objects[item["image_id"]].append(item)
    splits: dict[str, dict[int, list[dict]]] = {}
    for ref in refs:
        if _usable(ref, images, owner, problems):
            splits.setdefault(ref["split"], {}).setdefault(ref["image_id"], []).append(ref)
    _note_sentences(refs, problems)
    ordered = {split: splits[split] for split in SPLITS if split in splits}
    wordless = [ref for ref in refs if not ref["sentences"] and all(ann_id in owner for ann_id in targets(ref))]
    return Annotations(images, objects, instances["categories"], ordered, wordless, problems)


def _usable(ref: dict, images: dict[int, dict], owner: dict[int, int], problems: Problems) -> bool:
    name = f"ref {ref['ref_id']}"
    missing = [ann_id for ann_id in targets(ref) if ann_id not in owner]
    foreign = [ann_id for ann_id in targets(ref) if owner.get(ann_id, ref["image_id"]) != ref["image_id"]]
    if bool(ref.get("no_target", not targets(ref))) == bool(targets(ref)):
        problems.add("no_target flag that contradicts ann_id, ann_id believed", name)
    if ref["image_id"] not in images:
        problems.add("ref of an unknown image, left out", f"{name} (image {ref['image_id']})")
    elif missing:
        problems.add("ref with a missing annotation, left out", f"{name} (annotation {missing[0]})")
    elif foreign:
        problems.add("ref with an annotation of another image, left out", f"{name} (annotation {foreign[0]})")
    elif not ref["sentences"]:
        problems.add("ref without sentences", name)
    else:
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


def as_list(value: object) -> list:
    """A scalar id, as the RefCOCO family has them, as a list of one."""
    return value if isinstance(value, list) else [value]


def targets(ref: dict) -> list[int]:
    """Annotation ids a ref points at; empty for no target, which the files write as [-1]."""
    return [ann_id for ann_id in as_list(ref["ann_id"]) if ann_id != -1]


class _PlainUnpickler(pickle.Unpickler):
    """Admits lists, dicts, strings and numbers, which need no import; anything a pickle would import is refused."""

    def find_class(self, module: str, name: str) -> type:
        raise pickle.UnpicklingError(f"it wants to import {module}.{name}")


def _read_pickle(path: Path) -> object:
    with path.open("rb") as file:
        try:
            return _PlainUnpickler(file, encoding="utf-8").load()  # of Python 2, as REFER's are, too
        except Exception as error:  # a broken pickle raises whatever its opcodes stumble over
            raise ValueError(f"{path} is not a pickle of plain values ({error}).") from error


# ---- images ------------------------------------------------------------------------------------------------------


class ImageFolder:
    """Image files in one folder. `read` returns the bytes as they lie there."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def read(self, file_name: str) -> bytes:
        """Raises FileNotFoundError when there is no such file, ValueError when it is absurdly large."""
        path = self.path / file_name
        if (size := path.stat().st_size) > MAX_IMAGE_BYTES:
            raise ValueError(f"{size} bytes are too many for an image")
        return path.read_bytes()


class ImageZip:
    """Images in a zip, found by base name and read in place, without extraction.

    The entries' offsets are kept and read with `pread`, which moves no file position: one handle serves a process
    and its forks. Pickled, it opens its own.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.handle = os.open(self.path, os.O_RDONLY)
        try:
            with zipfile.ZipFile(self.path) as archive:
                entries = [entry for entry in archive.infolist() if not entry.is_dir()]
        except zipfile.BadZipFile as error:
            raise ValueError(f"{self.path} is not a whole zip file ({error}); fetch it again.") from error
        for entry in entries:
            if entry.filename.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", entry.filename):
                raise ValueError(f"{self.path}: entry {entry.filename!r} points outside the archive; refused.")
        self.entries = {entry.filename.rsplit("/", 1)[-1]: entry for entry in entries}

    def __reduce__(self) -> tuple:
        return type(self), (self.path,)

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            os.close(self.handle)

    def read(self, file_name: str) -> bytes:
        """Raises FileNotFoundError when there is no such entry, ValueError when it is damaged or absurdly large."""
        entry = self.entries.get(file_name)
        if entry is None:
            raise FileNotFoundError(f"no entry {file_name}")
        if max(entry.file_size, entry.compress_size) > MAX_IMAGE_BYTES:
            raise ValueError(f"{entry.file_size} bytes are too many for an image")
        header = os.pread(self.handle, 30, entry.header_offset)
        skip = 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        data = os.pread(self.handle, entry.compress_size, entry.header_offset + skip)
        if entry.compress_type == zipfile.ZIP_DEFLATED:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, entry.file_size)
        if zlib.crc32(data) != entry.CRC:
            raise ValueError("its checksum in the zip does not match")
        return data


def local_images(path: str) -> str:
    """`path` as it is, or, for `hf://datasets/OWNER/NAME/PATH`, where that folder or zip of the Hub was fetched to."""
    if not path.startswith("hf://datasets/"):
        return path
    owner, _, rest = path.removeprefix("hf://datasets/").partition("/")
    name, _, inner = rest.strip("/").partition("/")
    if not owner or not name:
        raise ValueError(f"{path} names no data set; write hf://datasets/OWNER/NAME/PATH.")
    patterns = [inner, f"{inner}/*"] if inner else None
    folder = os.path.join(snapshot_download(f"{owner}/{name}", repo_type="dataset", allow_patterns=patterns), inner)
    if not os.path.exists(folder):
        raise FileNotFoundError(f"{path}: {owner}/{name} has no folder or zip {inner!r}.")
    return folder


def open_images(path: str) -> ImageFolder | ImageZip:
    """The image source at `path`, a folder or a zip; a zip's table of contents is read once until the file changes.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: neither a folder nor a zip.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"{path}: no such images folder or zip. gRefCOCO needs COCO train2014, "
            "http://images.cocodataset.org/zips/train2014.zip, extracted or not."
        )
    return ImageFolder(path) if os.path.isdir(path) else _open_zip(path, os.stat(path).st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _open_zip(path: str, stamp: int) -> ImageZip:
    return ImageZip(path)


def read_image(source: ImageFolder | ImageZip, image: dict) -> bytes:
    """Bytes of the image a record of instances.json names, after checking that they are that image.

    The size in the file's header is compared with the record's before anything is decoded, so that a decompression
    bomb costs nothing.

    Raises:
        ValueError: the file is missing, unsafe to open, not an image, truncated or of another size; says which.
    """
    name = image["file_name"]
    if not re.fullmatch(r"\w[\w.\-]*", name):
        raise ValueError(f"unsafe file name {name!r} of image {image['id']}, refused")
    try:
        data = source.read(name)
        fault = _image_fault(data, image["width"], image["height"])
    except FileNotFoundError:
        fault = "is missing"
    except (OSError, ValueError) as error:
        fault = f"cannot be read ({error})"
    if fault:
        raise ValueError(f"image {name} {fault}")
    return data


def _image_fault(data: bytes, width: int, height: int) -> str | None:
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            if image.size != (width, height):
                return f"is {image.size[0]} x {image.size[1]} where instances.json says {width} x {height}"
            # A whole JPEG ends with its end marker; only what does not is worth the decoding.
            if image.format != "JPEG" or not data.endswith(b"\xff\xd9"):
                image.load()
    except (UnidentifiedImageError, Image.DecompressionBombError):
        return "is no JPEG or PNG that can be read"
    except (OSError, SyntaxError, ValueError) as error:
        return f"is truncated or damaged ({error})"
    return None


# ---- masks -------------------------------------------------------------------------------------------------------


def to_rle(segmentation: list | dict, height: int, width: int) -> tuple[dict, str | None]:
    """COCO segmentation (polygons in pixels, or RLE, compressed or not) as `{"size": [h, w], "counts": str}`.

    Everything is checked before pycocotools sees it, since its C code trusts its input. Polygons of one object are
    united. Returns the RLE and what was wrong, if anything: the invalid polygons are then left out.
    """
    if isinstance(segmentation, dict):
        counts, fault = _checked_counts(segmentation, height, width)
        rle = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    else:
        rings = [_checked_ring(ring, height, width) for ring in segmentation]
        valid = [ring for ring, _ in rings if ring is not None]
        fault = next((fault for _, fault in rings if fault), None if rings else "no polygon")
        if not valid:
            return empty_rle(height, width), fault
        rles = coco_mask.frPyObjects(valid, height, width)
        rle = rles[0] if len(rles) == 1 else coco_mask.merge(rles)
    return {"size": [height, width], "counts": rle["counts"].decode()}, fault


def empty_rle(height: int, width: int) -> dict:
    """The RLE of a mask without a pixel."""
    rle = coco_mask.frPyObjects({"size": [height, width], "counts": [height * width]}, height, width)
    return {"size": [height, width], "counts": rle["counts"].decode()}


def merge_rles(rles: Sequence[dict], crowd: Sequence[bool], height: int, width: int) -> dict:
    """One RLE for all targets of a sentence.

    Crowd regions are left out when there is any other target, as the published evaluation does; a sentence that
    points at crowds alone, on which the original code fails, gets their union.
    """
    chosen = [rle for rle, is_crowd in zip(rles, crowd) if not is_crowd] or list(rles)
    if len(chosen) == 1:
        return chosen[0]
    if not chosen:
        return empty_rle(height, width)
    return {"size": [height, width], "counts": coco_mask.merge(chosen)["counts"].decode()}


def _checked_ring(ring: object, height: int, width: int) -> tuple[np.ndarray | None, str | None]:
    """Coordinates x, y, x, y, ... ready for C, or None with the reason."""
    if not isinstance(ring, (list, np.ndarray)) or len(ring) < 6 or len(ring) % 2:
        return None, "polygon with less than 3 points or an odd number of coordinates"
    try:
        points = np.asarray(ring)
    except (ValueError, OverflowError):
        return None, "polygon that is no list of numbers"
    if points.ndim != 1 or points.dtype.kind not in "if" or not np.isfinite(points).all():
        return None, "polygon that is no list of finite numbers"
    limits = np.tile([width, height], len(ring) // 2)
    if ((points >= -limits) & (points <= 2 * limits)).all():
        return points.astype(np.float64), None
    return np.clip(points, -limits, 2 * limits).astype(np.float64), "polygon far outside its image, clipped"


def _checked_counts(rle: dict, height: int, width: int) -> tuple[list[int], str | None]:
    """Run lengths that cover the image exactly; all background, with the reason, when those given do not."""
    counts = rle.get("counts")
    if isinstance(counts, str):
        counts = _decoded_counts(counts)
    if rle.get("size") != [height, width]:
        fault = f"RLE of size {rle.get('size')} in an image of {[height, width]}"
    elif not isinstance(counts, list) or not all(type(n) is int and n >= 0 for n in counts):
        fault = "RLE whose counts are no run lengths"
    elif sum(counts) != height * width:
        fault = "RLE that does not cover its image exactly"
    else:
        return counts, None
    return [height * width], fault


def _decoded_counts(text: str) -> list[int] | None:
    """Run lengths of a compressed RLE: 5 bits a character, low first, from the third on relative to two runs before.

    None when the text ends inside a number or holds other characters. (COCO's `rleFrString`.)
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 30:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return None if shift else counts
