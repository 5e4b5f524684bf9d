"""Reading damaged files: every kind of damage gives a named problem or one clear error."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import resource
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from grefcoco_data import annotations, images
from tests.json_values import VALUES
from tests.processes import fork
from tests.sizes import MUTATED_FILES, MUTATED_ZIPS
from tests.tiny_grefcoco import HEIGHT, WIDTH, write_genuine, write_json

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def genuine(tmp_path) -> Path:
    return write_genuine(tmp_path / "set")


def change(path: Path, edit: object) -> None:
    content = json.loads(path.read_text())
    edit(content)
    write_json(path, content)


# ---- annotations -------------------------------------------------------------------------------------------------


def test_refs_and_objects_are_paired_by_image(genuine):
    notes = annotations.read_annotations(genuine)
    assert not notes.problems
    assert list(notes.splits) == ["train", "val", "testA", "testB"]
    for groups in notes.splits.values():
        for image_id, refs in groups.items():
            assert {ref["image_id"] for ref in refs} | {ann["image_id"] for ann in notes.objects[image_id]} == {
                image_id
            }


def test_annotations_are_parsed_once_until_a_file_changes(genuine):
    notes = annotations.read_annotations(genuine)
    assert annotations.read_annotations(genuine) is notes
    change(genuine / "instances.json", lambda content: content["categories"].append({"id": 9, "name": "kite"}))
    assert annotations.read_annotations(genuine).categories[-1]["name"] == "kite"


PROBLEMS = {
    "duplicate image id": ("instances.json", lambda x: x["images"].append(x["images"][0])),
    "annotation of an unknown image": ("instances.json", lambda x: x["annotations"][0].update(image_id=1)),
    "duplicate annotation id": ("instances.json", lambda x: x["annotations"].append(x["annotations"][0])),
    "ref with a missing annotation": ("grefs(unc).json", lambda x: x[1].update(ann_id=[5])),
    "ref with an annotation of another image": ("grefs(unc).json", lambda x: x[1].update(ann_id=x[-1]["ann_id"])),
    "ref of an unknown image": ("grefs(unc).json", lambda x: x[1].update(image_id=1)),
    "ref without sentences": ("grefs(unc).json", lambda x: x[1].update(sentences=[])),
    "no_target flag": ("grefs(unc).json", lambda x: x[0].update(no_target=False)),
    "duplicate ref id": ("grefs(unc).json", lambda x: x.append(x[0])),
    "duplicate sentence id": ("grefs(unc).json", lambda x: x.append(x[0])),
    "box of negative width": ("instances.json", lambda x: x["annotations"][0].update(bbox=[9, 9, -2, 3])),
    "ref that names an annotation twice": ("grefs(unc).json", lambda x: x[1].update(ann_id=x[1]["ann_id"] * 2)),
    "ref with more than 100 targets": ("grefs(unc).json", lambda x: x[1].update(ann_id=x[1]["ann_id"] * 101)),
    "empty sentence": ("grefs(unc).json", lambda x: x[0]["sentences"][0].update(sent=" ")),
}


@pytest.mark.parametrize("kind", PROBLEMS)
def test_problems_are_counted_and_named(genuine, kind):
    change(genuine / PROBLEMS[kind][0], PROBLEMS[kind][1])
    problems = annotations.read_annotations(genuine).problems
    assert [len(names) for name, names in problems.items() if name.startswith(kind)] == [1]


WRONG = {
    "not valid JSON": ("grefs(unc).json", '[{"ref_id": 1'),
    "NaN is not a JSON number": ("grefs(unc).json", "[NaN]"),
    "a list of refs": ("grefs(unc).json", "{}"),
    "refs[0] is int": ("grefs(unc).json", "[1]"),
    "no list 'images'": ("instances.json", "[]"),
    "recursion": ("grefs(unc).json", "[" * 100_000 + "]" * 100_000),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_file_that_is_not_an_annotation_file_is_one_error(genuine, message):
    name, text = WRONG[message]
    (genuine / name).write_text(text)
    with pytest.raises(ValueError, match=r"(?i)" + message.replace("[", r"\[")) as error:
        annotations.read_annotations(genuine)
    assert name in str(error.value) and str(genuine) in str(error.value)


FIELDS = {
    "images[0].width": ("instances.json", lambda x: x["images"][0].update(width="64")),
    "images[1] is": ("instances.json", lambda x: x["images"][1].update(height=10**6)),
    "annotations[2].bbox": ("instances.json", lambda x: x["annotations"][2].pop("bbox")),
    "annotations[0] needs": ("instances.json", lambda x: x["annotations"][0].update(bbox=[1, 2, 3, 1e300])),
    "refs[0].split": ("grefs(unc).json", lambda x: x[0].update(split="../train")),
    "refs[2].ann_id": ("grefs(unc).json", lambda x: x[2].update(ann_id=["1"])),
    "refs[3].category_id": ("grefs(unc).json", lambda x: x[3].update(category_id=[[1]])),
    "refs[1].image_id": ("grefs(unc).json", lambda x: x[1].update(image_id=[int("9" * 4_000)] * 3)),
    "refs[1].sentences[0].sent": ("grefs(unc).json", lambda x: x[1]["sentences"][0].update(sent="\ud800")),
    "refs[0].ref_id": ("grefs(unc).json", lambda x: x[0].update(ref_id=2**64)),
}


@pytest.mark.parametrize("place", FIELDS)
def test_wrong_fields_are_named_by_place(genuine, place):
    change(genuine / FIELDS[place][0], FIELDS[place][1])
    with pytest.raises(ValueError) as error:
        annotations.read_annotations(genuine)
    assert place in str(error.value)


def test_missing_files_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="--download"):
        annotations.read_annotations(tmp_path)


# ---- the RefCOCO family and pickles ------------------------------------------------------------------------------


def as_family(genuine: Path, protocol: int) -> None:
    """Turn the set into refcoco/refs(unc).p: scalar ids, no no_target flag, single targets only."""
    refs = [ref for ref in json.loads((genuine / "grefs(unc).json").read_text()) if len(ref["ann_id"]) == 1]
    refs = [
        ref | {"ann_id": ref["ann_id"][0], "category_id": ref["category_id"][0]}
        for ref in refs
        if ref["ann_id"] != [-1]
    ]
    for ref in refs:
        del ref["no_target"]
    (genuine / "refcoco").mkdir()
    (genuine / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol))
    (genuine / "instances.json").rename(genuine / "refcoco" / "instances.json")


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_family_reads_from_pickles(genuine, protocol):
    as_family(genuine, protocol)
    notes = annotations.read_annotations(genuine, "refcoco_unc")
    assert not notes.problems
    assert all(
        len(annotations.targets(ref)) == 1
        for groups in notes.splits.values()
        for refs in groups.values()
        for ref in refs
    )


def test_pickles_of_python_2_keep_their_text(genuine):
    as_family(genuine, 2)
    path = genuine / "refcoco" / "refs(unc).p"
    refs = pickle.loads(path.read_bytes())
    refs[0]["sentences"][0]["raw"] = "@@@@"
    binary_string = b"U\x05caf\xc3\xa9"  # SHORT_BINSTRING, what Python 2 wrote for str
    path.write_bytes(pickle.dumps(refs, 2).replace(b"X\x04\0\0\0@@@@", binary_string))
    notes = annotations.read_annotations(genuine, "refcoco_unc")
    texts = {s["raw"] for groups in notes.splits.values() for g in groups.values() for r in g for s in r["sentences"]}
    assert "café" in texts


class Canary:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def deep(depth: int) -> bytes:
    """A pickle of a list of a ref whose id is a list in a list in a list ..."""
    return b"\x80\x02]}U\x06ref_id" + b"]" * depth + b"a" * (depth - 1) + b"sa."


@pytest.mark.slow
@pytest.mark.parametrize("content", ["memo", "memo in text", "bytes", "deep"])
def test_pickles_that_take_much_memory_or_depth_are_refused(genuine, content):
    as_family(genuine, 2)
    bombs = {"memo": b"\x80\x02Nr\xff\xff\xff\x0f.", "memo in text": b"Np99999999\n.", "deep": deep(100_000)}
    bombs["bytes"] = b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b"."
    (genuine / "refcoco" / "refs(unc).p").write_bytes(bombs[content])
    done = fork(read_with_little_memory, genuine)
    assert done.returncode == 0, done.stderr


def read_with_little_memory(genuine: Path) -> None:
    """Read in at most 500 MB more than the process has now."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (500 << 20),) * 2)
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p") as error:
        annotations.read_annotations(genuine, "refcoco_unc")
    assert not isinstance(error.value.__cause__, MemoryError) and len(str(error.value)) < 600


@pytest.mark.parametrize("content", ["canary", "cut", "text"])
def test_crafted_pickles_are_refused(genuine, tmp_path, content):
    as_family(genuine, 2)
    path = genuine / "refcoco" / "refs(unc).p"
    made = {"canary": pickle.dumps([Canary(tmp_path / "created")]), "cut": path.read_bytes()[:-40], "text": b"refs"}
    path.write_bytes(made[content])
    with pytest.raises(ValueError, match="not a pickle of plain values"):
        annotations.read_annotations(genuine, "refcoco_unc")
    assert not (tmp_path / "created").exists()


# ---- images ------------------------------------------------------------------------------------------------------


def record(name: str = "a.jpg", width: int = WIDTH, height: int = HEIGHT) -> dict:
    return {"id": 1, "file_name": name, "width": width, "height": height}


@pytest.mark.parametrize(
    "name", ["../a.jpg", "/etc/passwd", "a/../../b.jpg", "..", "a\\b.jpg", "a\0.jpg", "", ".hidden"]
)
def test_unsafe_file_names_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="unsafe"):
        images.read_image(images.ImageFolder(tmp_path), record(name))


@pytest.mark.parametrize("name", ["../a.jpg", "/a.jpg", "train2014/../../a.jpg", "..\\a.jpg"])
def test_zip_entries_that_leave_the_archive_are_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(name, b"x")
    with pytest.raises(ValueError, match="outside the archive"):
        images.ImageZip(tmp_path / "a.zip")


def test_damaged_zips_are_refused(tmp_path, genuine):
    source = next((genuine / "train2014").iterdir())
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(source, "a.jpg")
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[200] ^= 1
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        images.read_image(images.ImageZip(tmp_path / "a.zip"), record())
    (tmp_path / "a.zip").write_bytes(data[:-30])
    with pytest.raises(ValueError, match="not a complete zip"):
        images.ImageZip(tmp_path / "a.zip")


@pytest.mark.parametrize("name", ["my photo (1).jpg", "a+b.jpg", "val2014/a.jpg", "p\u00e4r.jpg", "a'b,c.jpg"])
@pytest.mark.parametrize("kind", ["folder", "zip", "zip with backslashes"])
def test_harmless_names_are_read(tmp_path, genuine, name, kind):
    data = next((genuine / "train2014").iterdir()).read_bytes()
    if kind == "folder":
        (tmp_path / "images" / name).parent.mkdir(parents=True)
        (tmp_path / "images" / name).write_bytes(data)
        source = images.ImageFolder(tmp_path / "images")
    else:
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            info = zipfile.ZipInfo("x/" + name)
            info.filename = info.filename.replace("/", "\\") if "backslashes" in kind else info.filename
            archive.writestr(info, data)
        source = images.ImageZip(tmp_path / "a.zip")
    assert images.read_image(source, record(name)) == data


def zip_of(path: Path, data: bytes, method: int = zipfile.ZIP_DEFLATED) -> bytearray:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a.jpg", data)
    return bytearray(path.read_bytes())


def encrypted(content: bytearray) -> None:
    content[content.index(b"PK\1\2") + 8] |= 1


def damaged(content: bytearray) -> None:
    content[60:90] = b"\xff" * 30


def of_unknown_version(content: bytearray) -> None:
    content[content.index(b"PK\1\2") + 6] = 200


@pytest.mark.parametrize(
    ("damage", "message"),
    [(encrypted, "password"), (damaged, "damaged in the zip"), (of_unknown_version, "version")],
)
def test_faults_of_zips_are_named(tmp_path, genuine, damage, message):
    content = zip_of(tmp_path / "a.zip", next((genuine / "train2014").iterdir()).read_bytes())
    damage(content)
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        images.read_image(images.ImageZip(tmp_path / "a.zip"), record())


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_rare_compression_is_named(tmp_path, genuine, method):
    zip_of(tmp_path / "a.zip", next((genuine / "train2014").iterdir()).read_bytes(), method)
    with pytest.raises(ValueError, match=f"method {method}"):
        images.read_image(images.ImageZip(tmp_path / "a.zip"), record())


def test_two_entries_of_one_name_are_refused(tmp_path, genuine):
    data = next((genuine / "train2014").iterdir()).read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("train2014/a.jpg", data)
        archive.writestr("val2014/a.jpg", b"another")
    source = images.ImageZip(tmp_path / "a.zip")
    with pytest.raises(ValueError, match=r"'train2014/a\.jpg' and 'val2014/a\.jpg'"):
        images.read_image(source, record())
    assert images.read_image(source, record("train2014/a.jpg")) == data


def test_pipes_and_devices_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").symlink_to("/dev/zero")
    for name in ("a.jpg", "b.jpg"):
        with pytest.raises(ValueError, match="not a regular file"):
            images.read_image(images.ImageFolder(tmp_path), record(name))


def test_any_zip_is_read_or_is_one_error(tmp_path, genuine):
    """Bytes changed, cut out and doubled at random places."""
    data = next((genuine / "train2014").iterdir()).read_bytes()
    whole = {method: zip_of(tmp_path / "a.zip", data, method) for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)}
    chance = random.Random(0)
    for number in range(MUTATED_ZIPS):
        content = bytearray(whole[chance.choice([*whole])])
        for _ in range(chance.randint(1, 4)):
            start = len(content) - chance.randrange(min(160, len(content)))  # the table of contents is at the end
            start = chance.choice([chance.randrange(90), min(start, len(content) - 1)])
            content[start : start + chance.randrange(3)] = chance.randbytes(chance.randrange(3))
        (tmp_path / f"{number}.zip").write_bytes(content)
        try:
            assert images.read_image(images.ImageZip(tmp_path / f"{number}.zip"), record()) == data
        except ValueError as error:
            assert "\n" not in str(error)
        (tmp_path / f"{number}.zip").unlink()


def png_header(width: int, height: int) -> bytes:
    """The header of a PNG without its pixels: small on disk, expensive to decode."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(head)) + chunk + struct.pack(">I", zlib.crc32(chunk))


@pytest.mark.parametrize(("width", "height"), [(60_000, 60_000), (5_000, 5_000)])
def test_decompression_bombs_are_refused_by_their_header(tmp_path, monkeypatch, width, height):
    (tmp_path / "a.jpg").write_bytes(png_header(width, height))
    monkeypatch.setattr(Image.Image, "load", None)
    with pytest.raises(ValueError, match=r"a\.jpg"):
        images.read_image(images.ImageFolder(tmp_path), record())


def test_deflate_bomb_in_a_zip_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", bytes(images.MAX_IMAGE_BYTES + 1))
    with pytest.raises(ValueError, match="too many"):
        images.read_image(images.ImageZip(tmp_path / "a.zip"), record())


def test_truncation_is_detected_at_any_length(genuine, tmp_path):
    whole = next((genuine / "train2014").iterdir()).read_bytes()
    for length in range(0, len(whole) - 2, 97):
        (tmp_path / "a.jpg").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"a\.jpg"):
            images.read_image(images.ImageFolder(tmp_path), record())


JPEG_KINDS = {
    "plain": {},
    "optimised": {"optimize": True},
    "progressive": {"progressive": True},
    "restart markers": {"restart_marker_blocks": 5},
    "no subsampling": {"subsampling": 0},
    "grey": {"mode": "L"},
    "CMYK": {"mode": "CMYK"},
    "two pictures": {"format": "MPO", "save_all": True, "append_images": [Image.new("RGB", (9, 9))]},
    "no Huffman tables": {},  # as in the frames of an MJPEG video
}


def jpeg(kind: str) -> bytes:
    options = {"format": "JPEG", "mode": "RGB", **JPEG_KINDS[kind]}
    pixels = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(options.pop("mode")).save(file, **options)
    data = file.getvalue()
    while kind == "no Huffman tables" and (start := data.find(b"\xff\xc4")) > 0:
        data = data[:start] + data[start + 2 + int.from_bytes(data[start + 2 : start + 4], "big") :]
    return data


@pytest.mark.parametrize("kind", JPEG_KINDS)
@pytest.mark.parametrize("after", [b"", b"\0\0", b"a comment\xff\xd9"])
def test_complete_jpegs_of_any_kind_are_accepted(tmp_path, kind, after):
    (tmp_path / "a.jpg").write_bytes(jpeg(kind) + after)
    assert images.read_image(images.ImageFolder(tmp_path), record()) == jpeg(kind) + after


@pytest.mark.parametrize("kind", JPEG_KINDS)
@pytest.mark.parametrize("part", [0.5, 0.75, 0.95])
def test_a_cut_jpeg_is_named_although_it_has_an_end_marker(tmp_path, kind, part):
    """The decoder paints grey what is missing."""
    data = jpeg(kind)
    start, end = data.index(b"\xff\xda"), data.index(b"\xff\xd9")
    cut = start + int((end - start) * part)
    for after in (b"\xff\xd9", b"\xff\xd9\0\0", b"\xff\xd9\xff\xd9"):
        (tmp_path / "a.jpg").write_bytes(data[:cut].rstrip(b"\xff") + after)
        with pytest.raises(ValueError, match="truncated"):
            images.read_image(images.ImageFolder(tmp_path), record())


def test_images_of_the_hub_are_downloaded_by_folder(tmp_path, monkeypatch):
    asked = []

    def fetch(name: str, repo_type: str, allow_patterns: list[str]) -> str:
        asked.append((name, repo_type, allow_patterns))
        return str(tmp_path)

    (tmp_path / "train2014").mkdir()
    monkeypatch.setattr(images, "snapshot_download", fetch)
    assert images.local_images("hf://datasets/me/coco/train2014") == str(tmp_path / "train2014")
    assert asked == [("me/coco", "dataset", ["train2014", "train2014/*"])] and images.local_images("a.zip") == "a.zip"


def test_wrong_hub_paths_are_one_error(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="hf://datasets/OWNER/NAME/PATH"):
        images.local_images("hf://datasets/me")
    monkeypatch.setattr(images, "snapshot_download", lambda *args, **kwargs: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="me/coco has no folder or zip 'nowhere'"):
        images.local_images("hf://datasets/me/coco/nowhere")


# ---- fuzz --------------------------------------------------------------------------------------------------------

FUZZ = """
import copy, json, random, sys
from pathlib import Path
from grefcoco_data import annotations, images, rows

folder, seed, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
originals = {name: (folder / name).read_bytes() for name in ("grefs(unc).json", "instances.json")}
made = random.Random(seed)
JUNK = [None, True, -1, 0, 2**63, 1e308, "", "\\ud800", [], {}, [[]], [1e999], -1e9, "../x", [None], 10**400]

def places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))

def mutate(text):
    if made.random() < 0.3:
        data = bytearray(text)
        for _ in range(made.randint(1, 6)):
            position = made.randrange(len(data))
            noise = bytes(made.randrange(256) for _ in range(made.randint(0, 3)))
            data[position : position + made.randint(0, 3)] = noise
        return bytes(data)
    content = json.loads(text)
    for _ in range(made.randint(1, 3)):
        path = made.choice(list(places(content))[1:])
        holder = content
        for key in path[:-1]:
            holder = holder[key]
        if made.random() < 0.3:
            del holder[path[-1]]
        else:
            holder[path[-1]] = copy.deepcopy(made.choice(JUNK))
        if not content:
            break
    return json.dumps(content).encode()

loaded = refused = 0
for number in range(count):
    for name, text in originals.items():
        (folder / name).write_bytes(mutate(text) if made.random() < 0.6 else text)
    try:
        notes = annotations._read_annotations.__wrapped__(str(folder), "grefcoco", ())
    except ValueError as error:
        assert "json" in str(error), error
        refused += 1
        continue
    source = images.ImageFolder(folder / "train2014")
    for split, groups in notes.splits.items():
        problems = annotations.Problems()
        tables = list(rows.image_tables(notes, split, list(groups), source, problems, skip_bad_images=True))
        bad = len(problems.get("bad image, skipped with its sentences", []))
        assert sum(table.num_rows for table in tables) + bad == len(groups)
    loaded += 1
print(loaded, refused)
"""


def fuzz(genuine: Path, seed: int, count: int) -> tuple[int, int]:
    """Run in another process, so that a crash in C code is a failure of the test."""
    small = json.loads((genuine / "grefs(unc).json").read_text())[:6]
    write_json(genuine / "grefs(unc).json", small)
    change(genuine / "instances.json", lambda x: x.update(images=x["images"][:2], annotations=x["annotations"][:8]))
    arguments = [sys.executable, "-c", FUZZ, str(genuine), str(seed), str(count)]
    done = subprocess.run(arguments, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    loaded, refused = map(int, done.stdout.split())
    return loaded, refused


@pytest.mark.slow
def test_mutated_files_load_or_fail_clearly(genuine):
    loaded, refused = fuzz(genuine, seed=random.Random(1).randrange(10**6), count=300)
    assert loaded > 50 and refused > 50


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_thousands_of_mutated_files(genuine, seed):
    loaded, refused = fuzz(genuine, seed, count=MUTATED_FILES // 5)
    assert loaded + refused == MUTATED_FILES // 5


REFS = st.lists(
    st.fixed_dictionaries(
        {"ref_id": VALUES, "image_id": st.one_of(st.sampled_from([101, 102, 5]), VALUES)},
        optional={"split": st.sampled_from(["train", "val", "x", 3]), "ann_id": VALUES, "sentences": VALUES},
    ),
    max_size=4,
)


@pytest.mark.slow
@given(REFS)
@settings(max_examples=100, deadline=None)
def test_any_list_of_refs_loads_whole_or_fails_once(tmp_path_factory, refs):
    folder = tmp_path_factory.mktemp("refs")
    write_json(folder / "instances.json", {"images": [], "annotations": [], "categories": []})
    write_json(folder / "grefs(unc).json", refs)
    try:
        notes = annotations.read_annotations(folder)
    except ValueError as error:
        assert "grefs(unc).json" in str(error)
    else:
        named = sum(len(names) for kind, names in notes.problems.items() if "skipped" in kind or "without" in kind)
        assert named == len(refs)
