"""Data sets about videos: genuine files to Parquet, rows of videos and of frames, and what is wrong is named."""

import json
import pickle
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco
from tiny_mevis import GOLDENS, write_mevis

import grefcoco
from grefcoco_data import mevis, video_building
from grefcoco_data.commands import main
from grefcoco_data.masks import decode_mask, encode_mask
from grefcoco_data.rows import EXPRESSION_FEATURES, explode
from grefcoco_data.video_commands import video_statistics
from grefcoco_data.video_rows import MAX_FRAMES, FrameTable, merged_masks
from tests import test_grefcoco_operations as operations

TRUTH = json.loads((GOLDENS / "valid_u/mask_dict.json").read_text())
SENTENCES = json.loads((GOLDENS / "valid_u/meta_expressions.json").read_text())["videos"]


@pytest.fixture(scope="module")
def genuine(tmp_path_factory) -> Path:
    return write_mevis(tmp_path_factory.mktemp("genuine"), ("train", "valid_u", "valid"))


@pytest.fixture(scope="module")
def built(genuine, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("built") / "mevis"
    grefcoco.build_videos(genuine, out)
    return out


@pytest.mark.slow
def test_video_rows_hold_the_genuine_files(genuine, built):
    rows = grefcoco.load(built, config="mevis", split="valid_u", layout="video")
    assert [row["video_id"] for row in rows] == list(SENTENCES)
    for row in rows:
        video = SENTENCES[row["video_id"]]
        assert row["frame_names"] == video["frames"]
        assert [e["raw"] for e in row["expressions"]] == [e["exp"] for e in video["expressions"].values()]
        assert [e["exp_id"] for e in row["expressions"]] == list(video["expressions"])
        assert [e["anno_ids"] for e in row["expressions"]] == [e["anno_id"] for e in video["expressions"].values()]
        for item in row["objects"]:
            assert item["segmentations"] == TRUTH[str(item["anno_id"])]
    stored = datasets.load_dataset(str(built), "mevis", split="valid_u")
    stored = stored.cast_column("frames", [datasets.Image(decode=False)])
    path = genuine / "valid_u/JPEGImages" / rows[0]["video_id"] / "00003.jpg"
    assert stored[0]["frames"][3]["bytes"] == path.read_bytes()
    assert rows[0]["expressions"][0]["sentence"] == "the bird flying away"


def test_frame_rows_are_expression_rows(built):
    rows = grefcoco.load(built, config="mevis", split="valid_u", layout="frame")
    assert rows.column_names == list(grefcoco.EXPRESSION_FEATURES)
    assert len(rows) == sum(len(video["frames"]) * len(video["expressions"]) for video in SENTENCES.values())
    small = rows.with_format(None)  # nothing is decoded
    for name in ("sent_id", "image_id", "file_name", "no_target", "ann_ids", "category_ids", "sentence", "height"):
        assert small[name][:] == rows[name][:]
    video = grefcoco.load(built, config="mevis", split="valid_u", layout="video")[0]
    names = list(SENTENCES[video["video_id"]]["expressions"])
    for index in (0, 5, 17, 60):
        frame, place = divmod(index, len(names))
        row, expression = rows[index], video["expressions"][place]
        parts = [TRUTH[str(anno_id)][frame] for anno_id in expression["anno_ids"]]
        assert row["masks"] == [mask for mask in parts if mask] and row["no_target"] == (not any(parts))
        assert row["mask"] == merged_masks(video, expression)[frame]
        assert row["file_name"] == f"{video['video_id']}/{frame:05}.jpg"
        assert divmod(row["sent_id"], MAX_FRAMES) == (expression["sent_id"], frame)
        assert row["image"].size == (row["width"], row["height"])
        assert np.array_equal(np.array(row["image"]), np.array(video["frames"][frame]))
        for box, mask in zip(row["boxes"], row["masks"], strict=True):
            assert box == coco.toBbox(mask).tolist()
    assert len(set(rows["image_id"])) == sum(len(video["frames"]) for video in SENTENCES.values())
    assert grefcoco.load(built, config="mevis", split="valid_u")[0] == rows[0]  # the default of data sets of images


def test_map_style_equals_streaming(built):
    for layout, columns in (("frame", ["sent_id", "mask", "image", "objects"]), ("video", None)):
        whole = grefcoco.load(built, config="mevis", split="valid_u", layout=layout, columns=columns)
        stream = grefcoco.load(built, config="mevis", split="valid_u", layout=layout, columns=columns, streaming=True)
        assert stream.column_names in (None, whole.column_names)
        number = 0
        for one, other in zip(whole, stream, strict=True):
            assert list(one) == list(other)
            assert {k: v for k, v in one.items() if k not in ("image", "frames")} == {
                k: v for k, v in other.items() if k not in ("image", "frames")
            }
            number += 1
        assert number == len(whole)


def test_a_copy_of_streamed_frames_has_their_values(built, tmp_path):
    stream = grefcoco.load(built, config="mevis", split="valid_u", streaming=True).take(40)
    stream.to_parquet(str(tmp_path / "copy.parquet"))
    copied = datasets.load_dataset("parquet", data_files=str(tmp_path / "copy.parquet"), split="train")
    assert copied.features.arrow_schema.types == grefcoco.EXPRESSION_FEATURES.arrow_schema.types
    for one, other in zip(stream, copied, strict=True):
        assert np.array_equal(one.pop("image"), other.pop("image")) and one == other


@pytest.fixture(scope="module")
def frames(built) -> datasets.Dataset:
    """Frame rows of two videos."""
    rows = grefcoco.load(built, config="mevis", split="valid_u", columns=operations.COLUMNS)
    rows = rows.select(range(40, 70))
    assert len(set(rows["width"])) > 1 and {len(ids) for ids in rows["ann_ids"]} >= {0, 1, 2}
    return rows


@pytest.fixture(scope="module")
def plain_frames(built, frames) -> datasets.Dataset:
    """The same rows as `datasets` itself makes them, of a stream."""
    stream = grefcoco.load(built, config="mevis", split="valid_u", columns=operations.COLUMNS, streaming=True)
    rows = list(stream.cast_column("image", datasets.Image(decode=False)).skip(40).take(30))
    return datasets.Dataset.from_list(rows, features=frames.features)


OPERATIONS = {
    **{name: operation for name, (operation, _) in (operations.BOTH | operations.MAP_ONLY).items()},
    **operations.AS_PLAIN,
    **operations.OF_TABLES,
}


def fast(name: str) -> object:
    """The name of an operation; those in two processes are slow."""
    return pytest.param(name, marks=pytest.mark.slow) if "two processes" in name else name


@pytest.mark.parametrize("name", map(fast, OPERATIONS))
def test_operations_on_frame_rows_give_what_they_give_on_plain_rows(frames, plain_frames, name):
    if "torch" in name or "loader" in name:
        pytest.importorskip("torch")
    results, expected = ([operations.simple(row) for row in OPERATIONS[name](rows)] for rows in (frames, plain_frames))
    assert results == expected and expected


@pytest.mark.parametrize("form", ["parquet", "json", "csv", "sql"])
def test_copies_of_frame_rows_in_files_are_those_of_plain_rows(frames, plain_frames, tmp_path, form):
    (tmp_path / "plain").mkdir()
    results = [operations.simple(row) for row in operations.read_back(frames, form, tmp_path)]
    expected = [operations.simple(row) for row in operations.read_back(plain_frames, form, tmp_path / "plain")]
    assert results == expected and expected


def test_frame_rows_survive_a_copy_on_disk(built, tmp_path):
    rows = grefcoco.load(built, config="mevis", split="valid_u")
    rows.save_to_disk(tmp_path / "copy", num_shards=2)
    copied = datasets.load_from_disk(tmp_path / "copy")
    assert [operations.simple(row) for row in copied] == [operations.simple(row) for row in rows]
    assert rows.features == EXPRESSION_FEATURES
    assert copied.features.arrow_schema.types == rows.features.arrow_schema.types


def test_large_columns_of_frame_rows_are_made_when_they_are_read(built):
    rows = grefcoco.load(built, config="mevis", split="valid_u", columns=operations.COLUMNS)
    whole = rows.data.table
    for part in (
        rows.data,
        rows.rename_column("mask", "union").select(range(9)).data,
        pickle.loads(pickle.dumps(rows.data)),
    ):
        assert isinstance(part, FrameTable) and part.stored.nbytes < 300 * len(part)
    assert rows.data.nbytes == pytest.approx(whole.nbytes, rel=0.2)
    addresses = {}  # all sentences on a frame point to the bytes of one image
    for image, image_id in zip(whole["image"].chunks, whole["image_id"].to_pylist()):
        address = image.field("bytes").buffers()[2].address, image.offset
        assert addresses.setdefault(image_id, address) == address
    assert len(pickle.dumps(rows)) < 20_000


def test_a_frame_is_an_image_row_of_a_stream(built):
    load = {"config": "mevis", "split": "valid_u", "streaming": True}
    images = grefcoco.load(built, **load, layout="image").cast_column("image", datasets.Image(decode=False))
    images = list(images)
    columns = [*EXPRESSION_FEATURES, "objects"]
    exploded = [row for image in images for row in rows_of(image, columns)]
    for one, other in zip(exploded, grefcoco.load(built, **load, columns=columns), strict=True):
        assert one.pop("image").tobytes() == other.pop("image").tobytes() and one == other
    light = grefcoco.load(built, **load, layout="image", columns=["expressions"])
    assert list(light) == [{"expressions": image["expressions"]} for image in images]
    with pytest.raises(ValueError, match="of a stream also 'image'"):
        grefcoco.load(built, config="mevis", split="valid_u", layout="image")


def rows_of(image: dict, columns: list[str]) -> list[dict]:
    """The expression rows of an image row."""
    rows = explode({name: [value] for name, value in image.items()}, columns)
    return [dict(zip(rows, values)) for values in zip(*rows.values())]


def test_a_stream_resumes_exactly(built):
    stream = grefcoco.load(built, config="mevis", split="valid_u", columns=["sent_id"], streaming=True)
    expected = [row["sent_id"] for row in stream]
    for stop in (1, 9, 70):
        stream = grefcoco.load(built, config="mevis", split="valid_u", columns=["sent_id"], streaming=True)
        first = []
        for row in stream:
            first.append(row["sent_id"])
            if len(first) == stop:
                break
        state = stream.state_dict()
        stream = grefcoco.load(built, config="mevis", split="valid_u", columns=["sent_id"], streaming=True)
        stream.load_state_dict(state)
        assert first + [row["sent_id"] for row in stream] == expected


def test_splits_without_masks(built):
    rows = grefcoco.load(built, config="mevis", split="valid", layout="video")
    assert all(not row["objects"] for row in rows)
    assert not any(e["no_target"] or e["anno_ids"] for row in rows for e in row["expressions"])
    frame = grefcoco.load(built, config="mevis", split="valid")[0]
    assert not frame["no_target"] and not coco.area(frame["mask"]) and frame["masks"] == []


def test_numbers_differ_between_splits(built):
    splits = grefcoco.load(built, config="mevis", columns=["sent_id", "image_id"])
    for column in ("sent_id", "image_id"):
        sets = [{row[column] for row in rows} for rows in splits.values()]
        assert len(set.union(*sets)) == sum(map(len, sets))


def test_a_tar_is_read_in_place_and_processes_agree(genuine, built, tmp_path):
    for split in ("train", "valid_u"):
        (tmp_path / split).mkdir()
        for name in ("mask_dict.json", "meta_expressions.json"):
            (tmp_path / split / name).write_bytes((genuine / split / name).read_bytes())
        with tarfile.open(tmp_path / split / "JPEGImages.tar", "w") as archive:
            archive.add(genuine / split / "JPEGImages", "./JPEGImages")
    grefcoco.build_videos(tmp_path, tmp_path / "out", num_proc=2)
    for split in ("train", "valid_u"):
        name = f"data/{split}-00000-of-00001.parquet"
        assert (tmp_path / "out" / name).read_bytes() == (built / name).read_bytes()


def test_version_two_has_names_of_its_own(tmp_path):
    write_mevis(tmp_path, ("valid_u",), "meta_expressions_v2")
    with pytest.raises(FileNotFoundError, match=r"no meta_expressions.json or meta_expressions_release.json"):
        grefcoco.build_videos(tmp_path, tmp_path / "out")
    report = grefcoco.build_videos(tmp_path, tmp_path / "out", config="mevis_v2")
    assert report["splits"]["valid_u"]["no_target"] == 4


def test_youtube_vos(tmp_path):
    """Another layout of the same reader: palette PNGs, one object a sentence, valid's file holds test's videos too."""
    rng = np.random.default_rng(0)
    video = {"frames": ["00000", "00005"], "expressions": {"0": {"exp": "A dog", "obj_id": "2"}}}
    untold = {"frames": ["00000"], "expressions": {"0": {"exp": "a dog"}}}
    contents = {"train": {"dogs": video}, "valid": {"cats": untold, "cows": untold}, "test": {"cows": untold}}
    for split, videos in contents.items():
        (tmp_path / "meta_expressions" / split).mkdir(parents=True)
        (tmp_path / "meta_expressions" / split / "meta_expressions.json").write_text(json.dumps({"videos": videos}))
        for video_id, entry in videos.items():
            for name in entry["frames"]:
                path = tmp_path / split / "JPEGImages" / video_id / f"{name}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (12, 20, 3), np.uint8)).save(path)
    pixels = np.zeros((2, 12, 20), np.uint8)
    pixels[0, 2:5, 3:9] = 2
    pixels[0, 7:, :] = 1
    for name, array in zip(video["frames"], pixels):
        path = tmp_path / "train/Annotations/dogs" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(array, "P")
        picture.putpalette(bytes(range(256)) * 3)
        picture.save(path)
    grefcoco.build_videos(tmp_path, tmp_path / "out", config="ref_youtube_vos")
    splits = grefcoco.load(tmp_path / "out", config="ref_youtube_vos", layout="video")
    assert {split: rows["video_id"][:] for split, rows in splits.items()} == {
        "train": ["dogs"],
        "valid": ["cats"],
        "test": ["cows"],
    }
    (item,) = splits["train"][0]["objects"]
    assert np.array_equal(decode_mask(item["segmentations"][0]), pixels[0] == 2)
    assert item["segmentations"][1] is None and item["obj_id"] == "2"


# ---- faults ------------------------------------------------------------------------------------------------------


def change(root: Path, name: str, edit) -> None:
    path = root / "valid_u" / name
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


FIRST = next(iter(SENTENCES))
FAULTS = {
    "mask of another size": lambda masks: masks["0"].__setitem__(2, {"size": [3, 3], "counts": "9"}),
    "mask that does not cover": lambda masks: masks["0"].__setitem__(2, {"size": [96, 128], "counts": "9"}),
    "mask that is no compressed RLE": lambda masks: masks["0"].__setitem__(2, {"size": [96, 128], "counts": [9]}),
    "object with 1 masks in a video of 8": lambda masks: masks.__setitem__("0", [None]),
    "object without masks": lambda masks: masks.pop("0"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_masks_cost_their_sentences(fault, tmp_path):
    change(write_mevis(tmp_path), "mask_dict.json", FAULTS[fault])
    report = grefcoco.build_videos(tmp_path, tmp_path / "out")
    ((kind, names),) = report["problems"].items()
    assert kind.startswith(fault) and "skipped" in kind and names == [f"{FIRST} anno_id 0"]
    using = sum(0 in e["anno_id"] for e in SENTENCES[FIRST]["expressions"].values())
    total = sum(len(video["expressions"]) for video in SENTENCES.values())
    assert report["splits"]["valid_u"]["expressions"] == total - using
    with pytest.raises(ValueError, match=fault):
        grefcoco.build_videos(tmp_path, tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()


def expression_faults():
    def edit(key, value):
        return lambda content: content["videos"][FIRST]["expressions"]["0"].__setitem__(key, value)

    return [edit("exp", None), edit("anno_id", ["0"]), edit("anno_id", 0), edit("obj_id", []), edit("anno_id", [-1])]


@pytest.mark.parametrize("edit", expression_faults())
def test_bad_sentences_are_skipped_and_named(edit, tmp_path):
    change(write_mevis(tmp_path), "meta_expressions.json", edit)
    problems = grefcoco.build_videos(tmp_path, tmp_path / "out")["problems"]
    assert list(problems.values()) == [[f"{FIRST} 0"]]


def test_bad_frames_are_named(tmp_path, capsys):
    write_mevis(tmp_path)
    folder = tmp_path / "valid_u/JPEGImages" / FIRST
    whole = (folder / "00002.jpg").read_bytes()
    command = ["build", "--config", "mevis", "--annotations", str(tmp_path), "--out", str(tmp_path / "out")]
    for content, fault in ((whole[:200], "damaged"), (b"text", "not a JPEG"), (None, "is missing")):
        (folder / "00002.jpg").unlink() if content is None else (folder / "00002.jpg").write_bytes(content)
        assert main(command) == 2
        assert f"{FIRST}/00002.jpg" in (line := capsys.readouterr().err) and fault in line and line.count("\n") == 1
    Image.new("RGB", (9, 9)).save(folder / "00002.jpg")
    assert main(command) == 2 and "(9, 9)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*command, "--skip-bad-images"]) == 0
    assert "1 x video with a bad frame, skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "broken after byte 0"),
        ('{"0": [', "broken after byte 0"),
        ('{"0": [], "1": [null}', "broken after byte 8"),
        ('{"0": {}}', "no list"),
        ('{"0": []} x', "broken"),
        ("[]", "broken"),
    ],
)
def test_broken_mask_files_are_named(text, fault, tmp_path):
    (tmp_path / "mask_dict.json").write_text(text)
    with pytest.raises(ValueError, match=rf"mask_dict.json is not.*{fault}"):
        mevis.MaskFile(tmp_path / "mask_dict.json")


@given(
    masks=st.dictionaries(
        st.integers(0, 10**6).map(str),
        st.lists(
            st.none() | st.fixed_dictionaries({"size": st.just([1, 1]), "counts": st.text(max_size=9)}), max_size=4
        ),
        max_size=6,
    ),
    block=st.integers(1, 80),
    indent=st.sampled_from([None, 1]),
)
def test_masks_are_read_in_blocks(tmp_path_factory, masks, block, indent):
    path = tmp_path_factory.mktemp("blocks") / "mask_dict.json"
    path.write_text(json.dumps(masks, indent=indent))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mevis, "BLOCK", block)
        file = mevis.MaskFile(path)
    content = path.read_bytes()
    assert {str(key): json.loads(content[slice(*place)]) for key, place in file.places.items()} == masks


@given(
    seed=st.integers(0, 2**32 - 1), fill=st.sampled_from([0, 0.3, 1]), change=st.booleans(), place=st.integers(0, 99)
)
def test_masks_are_checked_as_pycocotools_reads_them(seed, fill, change, place):
    rng = np.random.default_rng(seed)
    masks = [encode_mask(rng.random((7, 11)) < fill) for _ in range(3)]
    assert mevis.masks_fault([*masks, None], 4, 7, 11) is None
    text = masks[1]["counts"]
    masks[1]["counts"] = text[: place % len(text)] + chr(48 + place % 64) + text[place % len(text) + 1 :]
    if mevis.masks_fault(masks, 3, 7, 11) is None:
        assert coco.decode(masks[1]).shape == (7, 11)
        assert encode_mask(coco.decode(masks[1]))  # covers the frame: nothing was written beside it


def test_unsafe_names_are_refused(tmp_path):
    change(write_mevis(tmp_path), "meta_expressions.json", lambda c: c["videos"].update({"../x": c["videos"][FIRST]}))
    with pytest.raises(ValueError, match=r"unsafe name '../x'"):
        grefcoco.build_videos(tmp_path, tmp_path / "out")


@pytest.mark.slow
def test_a_killed_build_leaves_nothing_half_written(genuine, tmp_path):
    out = tmp_path / "out"
    grefcoco.build_videos(genuine, out)
    before = {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    code = """
import os, sys
from grefcoco_data import atomic_files, video_building
stop = int(sys.argv[3])
calls = 0
def counting(name, real):
    def call(*arguments):
        global calls
        calls += 1
        if calls == stop:
            os._exit(9)
        return real(*arguments)
    return call
for name in ("sha256", "sync", "publish", "_write_card", "_counts"):
    setattr(video_building, name, counting(name, getattr(video_building, name)))
video_building.build_videos(sys.argv[1], sys.argv[2])
"""
    for stop in (1, 4, 8, 30):
        done = subprocess.run([sys.executable, "-c", code, str(genuine), str(out), str(stop)], capture_output=True)
        after = {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        assert after == before and done.returncode in (0, 9)
    assert done.returncode == 0, "the last stop was never reached: the build ran to its end"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---- commands ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_commands(genuine, built, tmp_path, capsys):
    assert main(["check", str(built), "--config", "mevis"]) == 0
    assert "not the official release (which has videos 50, expressions 793)" in capsys.readouterr().out
    assert main(["check", str(genuine), "--config", "mevis"]) == 0
    assert "not the official release" in capsys.readouterr().out
    assert main(["stats", str(built), "--config", "mevis"]) == 0
    table = capsys.readouterr().out
    assert "| valid_u | 4 | 28 | 4 | " in table
    plots = tmp_path / "plots.png"
    assert main(["stats", str(built), "--config", "mevis", "--out", str(plots)]) == 0
    assert capsys.readouterr().out == f"{table}The plots are in {plots}\n" and Image.open(plots).width > 1500
    assert main(["show", str(built), "--config", "mevis", "--out", str(tmp_path / "page"), "--limit", "3"]) == 0
    assert len(list((tmp_path / "page").glob("*.png"))) == 3
    assert (tmp_path / "page/index.html").read_text().count("<figure>") == 3
    assert main(["show", str(built), "--config", "mevis", "--out", str(tmp_path / "page"), "--targets", "9"]) == 2
    assert main(["export", str(built), "--config", "mevis", "--out", str(tmp_path / "x")]) == 2
    assert main(["build", "--annotations", "a", "--out", "b"]) == 2
    assert "--images is missing" in capsys.readouterr().err


def test_video_statistics_are_counted_by_hand():
    """More masks than pycocotools measures at once; the target is on all frames but one."""
    quarter = encode_mask(np.arange(16).reshape(4, 4) < 4)
    expressions = [{"anno_ids": ids, "sentence": "a b"} for ids in ([7], [])]
    objects = [{"anno_id": 7, "segmentations": [quarter] * 399 + [None]}]
    video = {"frame_names": ["x"] * 400, "objects": objects, "expressions": expressions, "width": 4, "height": 4}
    values = {name: array.tolist() for name, array in video_statistics([video]).items()}
    assert values.pop("mask_share") == [25] * 399
    assert values == {"targets": [1, 0], "words": [2, 2], "frames": [400], "visible": [99.75]}


def test_check_finds_damage(genuine, tmp_path, capsys):
    grefcoco.build_videos(genuine, tmp_path / "out")
    with next((tmp_path / "out/data").glob("valid_u*")).open("r+b") as file:
        file.write(b"x")
    assert main(["check", str(tmp_path / "out"), "--config", "mevis"]) == 1
    assert "DAMAGED" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["video", "frame"])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("place", "value", "fault"),
    [
        ("size", [10**6, 10**6], "RLE"),
        ("size", [0, 0], "RLE"),
        ("counts", "202", "RLE"),
        ("counts", "0" * 100_000, "RLE"),
        ("counts", None, "RLE"),
        ("height", -1, "width and height"),
        ("segmentations", [], "per frame"),
    ],
)
def test_masks_of_a_strangers_file_are_refused_before_c_code_reads_them(
    built, tmp_path, place, value, fault, streaming, layout
):
    folder = tmp_path / tmp_path.name  # `datasets` caches by the folder's name
    shutil.copytree(built, folder)
    (path,) = folder.rglob("valid_u*.parquet")
    rows = pq.read_table(path)
    videos = rows.to_pylist()
    item = videos[0]["objects"][0]
    changed = next(mask for mask in item["segmentations"] if mask)
    {"height": videos[0], "segmentations": item}.get(place, changed)[place] = value
    pq.write_table(pa.Table.from_pylist(videos, rows.schema), path)
    load = {"config": "mevis", "split": "valid_u", "streaming": streaming, "layout": layout}
    with pytest.raises(ValueError, match=f"video {videos[0]['video_id']} .*{fault}"):
        next(iter(grefcoco.load(folder, **load)))


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"config": "mevis", "layout": "image"}, "Unknown layout 'image'; choose 'video' or 'frame'"),
        ({"config": "mevis", "columns": ["frames"]}, r"Unknown columns \['frames'\]"),
        ({"config": "mevis", "split": "testA"}, "testA"),
    ],
)
def test_wrong_options_are_named(built, options, fault):
    with pytest.raises(ValueError, match=fault):
        grefcoco.load(built, **options)


def test_download_then_build(tmp_path, capsys, monkeypatch):
    """The files of the Hub, here of a folder; what is there already is not read again."""
    hub = write_mevis(tmp_path / "hub", ("train", "valid_u", "valid"), "meta_expressions_v2")
    (hub / "valid/meta_expressions_v2.json").rename(hub / "valid/meta_expressions_v2_release.json")
    for split in ("train", "valid_u", "valid"):
        with tarfile.open(hub / split / "JPEGImages.tar", "w") as archive:
            archive.add(hub / split / "JPEGImages", "JPEGImages")
    asked = []

    def url_of(repo: str, name: str, repo_type: str, revision: str) -> str:
        asked.append((repo, name, repo_type, revision))
        return (hub / name).as_uri()

    monkeypatch.setattr(video_building, "hf_hub_url", url_of)
    command = ["build", "--config", "mevis_v2", "--annotations", str(tmp_path / "a"), "--out", str(tmp_path / "out")]
    assert main([*command, "--download"]) == 0
    assert {entry[0] for entry in asked} == {"FudanCVL/MeViSv2"} and len(asked) == 8
    assert "valid: 4 videos, 28 expressions" in capsys.readouterr().out
    (hub / "train/mask_dict.json").unlink()
    assert main(["download", "--config", "mevis_v2", "--annotations", str(tmp_path / "a")]) == 0
    assert main(["download", "--config", "mevis", "--annotations", str(tmp_path / "a")]) == 2
    assert "No download is known for mevis" in capsys.readouterr().err


def test_missing_files_are_named(tmp_path):
    write_mevis(tmp_path)
    (tmp_path / "valid_u/mask_dict.json").rename(tmp_path / "masks")
    with pytest.raises(
        FileNotFoundError, match=r"mask_dict.json is missing, and the sentences of valid_u have targets"
    ):
        grefcoco.build_videos(tmp_path, tmp_path / "out")
    (tmp_path / "masks").rename(tmp_path / "valid_u/mask_dict.json")
    (tmp_path / "valid_u/JPEGImages").rename(tmp_path / "frames")
    with pytest.raises(FileNotFoundError, match=r"JPEGImages is missing, and JPEGImages.tar too"):
        grefcoco.build_videos(tmp_path, tmp_path / "out")
    (tmp_path / "valid_u/JPEGImages.tar").write_bytes(b"x" * 2000)
    with pytest.raises(ValueError, match=r"JPEGImages.tar is not a complete tar"):
        grefcoco.build_videos(tmp_path, tmp_path / "out")
