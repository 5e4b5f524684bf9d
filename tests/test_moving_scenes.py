"""The moving scenes: masks and sentences agree with the motions, and the normal reader reads the files."""

import json

import numpy as np
import pytest

import grefcoco
from demo import moving_scenes
from demo.moving_scenes import MOVES, main, make_moving_scene, write_moving_scenes
from grefcoco_data.masks import decode_mask


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("moving") / "videos"
    write_moving_scenes(out, {"train": 2, "valid_u": 6}, size=64, num_frames=8, no_target=0.4)
    return out


def test_the_reader_reads_them(folder, tmp_path):
    report = grefcoco.build_videos(folder, tmp_path / "built", config="mevis_v2", strict=True)
    assert not report["problems"]
    counts = report["splits"]["valid_u"]
    assert counts["videos"] == 6 and counts["no_target"] > 0 and counts["single"] > 0
    rows = grefcoco.load(tmp_path / "built", split="valid_u", layout="video")
    assert rows[0]["frames"][0].size == (64, 64)


def path_of(masks: list) -> tuple[np.ndarray, np.ndarray] | None:
    """First and last centre of an object that is whole on both frames, else None."""
    shown = [decode_mask(mask) for mask in masks if mask]
    if len(shown) < len(masks) or abs(int(shown[0].sum()) - int(shown[-1].sum())) > 12:
        return None
    return tuple(np.argwhere(mask)[:, ::-1].mean(axis=0) for mask in (shown[0], shown[-1]))


def test_targets_move_as_their_sentence_says(folder):
    checked = dict.fromkeys(["left", "right", "up", "down", "still", "appear"], 0)
    for split in ("train", "valid_u"):
        videos = json.loads((folder / split / "meta_expressions_v2.json").read_text())["videos"]
        masks = json.loads((folder / split / "mask_dict.json").read_text())
        for video in videos.values():
            assert len({e["exp"] for e in video["expressions"].values()}) == len(video["expressions"])
            for expression in video["expressions"].values():
                word = expression["exp"].split()[-1].removesuffix("s")
                for anno_id in expression["anno_id"]:
                    column = masks[str(anno_id)]
                    if word == "appear":
                        assert not any(column[:4]) and column[4]
                        checked["appear"] += 1
                    elif word in checked and (way := path_of(column)):
                        moved = way[1] - way[0]
                        expected = np.array(MOVES.get(word, (0, 0))) * moving_scenes.TRAVEL * 64
                        assert np.abs(moved - expected).max() < 2, expression["exp"]
                        checked[word] += 1
    assert all(checked.values()), checked


def test_a_scene_is_the_same_every_time():
    one, other = (make_moving_scene(3, "train", 5, 64, 6, 0.2) for _ in range(2))
    assert np.array_equal(one.masks, other.masks) and one.sentences == other.sentences
    assert all(map(np.array_equal, one.frames, other.frames))
    assert not (one.masks.sum(axis=0) > 1).any(), "masks of a frame are disjoint"
    assert len(make_moving_scene(3, "train", 6, 64, 6, 0.2).frames) == 6


def test_number_and_words_agree():
    assert moving_scenes.describe("circle", "red", "move left", 2) == "the two red circles that move left"
    assert moving_scenes.describe(None, None, "stop", 1) == "the shape that stops"
    assert moving_scenes.describe("star", None, "stay still", 0) == "the star that stays still"


@pytest.mark.parametrize(
    "options", [["--size", "9"], ["--num-frames", "1"], ["--no-target", "2"], ["--train", "0", "--valid-u", "0"]]
)
def test_bad_parameters_are_named(options, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["moving_scenes.py", str(tmp_path / "out"), *options])
    assert main() == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_the_command_writes_and_refuses_a_folder_that_exists(tmp_path, capsys, monkeypatch):
    options = ["--train", "1", "--valid-u", "0", "--size", "64"]
    monkeypatch.setattr("sys.argv", ["moving_scenes.py", str(tmp_path / "out"), *options])
    assert main() == 0 and "1 videos written" in capsys.readouterr().out
    assert main() == 2 and "exists" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
