"""The command line: output, files and errors; downloads from a server on this machine."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest

import grefcoco
from grefcoco_data import building, collections, commands, official, show
from grefcoco_data.annotations import read_annotations
from grefcoco_data.arguments import ArgumentParser
from grefcoco_data.atomic_files import sha256, sole_writer, staging_folder
from grefcoco_data.collections import COLLECTIONS, COUNTED
from grefcoco_data.masks import decode_mask
from tests.tiny_grefcoco import write_genuine

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def genuine(tmp_path) -> Path:
    return write_genuine(tmp_path / "set")


@pytest.fixture
def built(genuine, tmp_path) -> Path:
    grefcoco.build(genuine, genuine / "train2014", tmp_path / "built")
    return tmp_path / "built"


def run(*arguments: object) -> int:
    return commands.main([str(argument) for argument in arguments])


def build(source: Path, images: Path, out: Path, *more: object) -> int:
    return run("build", "--annotations", source, "--images", images, "--out", out, *more)


def test_build_reports_what_it_built(genuine, tmp_path, capsys):
    assert build(genuine, genuine / "train2014", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "testA: 2 images" in printed and "load_dataset" in printed
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| testA | 2 |" in card and "$" not in card and "testA-*" in card


@pytest.mark.parametrize(
    "trouble", ["no images", "no annotations", "not json", "image gone", "image cut", "processes"]
)
def test_bad_input_is_one_line_and_code_2(genuine, tmp_path, capsys, trouble):
    images, more = genuine / "train2014", []
    picture = next(images.iterdir())
    if trouble == "no images":
        images = tmp_path / "nowhere"
    elif trouble == "no annotations":
        (genuine / "instances.json").unlink()
    elif trouble == "not json":
        (genuine / "instances.json").write_text("<html>")
    elif trouble == "image gone":
        picture.unlink()
    elif trouble == "image cut":
        picture.write_bytes(picture.read_bytes()[:500])
    else:
        more = ["--num-proc", 0]
    assert build(genuine, images, tmp_path / "out", *more) == 2
    named = {
        "no images": "nowhere",
        "no annotations": str(genuine),
        "not json": "instances.json",
        "processes": "--num-proc",
    }
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and named.get(trouble, picture.name) in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]


@pytest.mark.parametrize("out", ["~/built", "a[1]", "a::b", "a*b", "."])
def test_an_out_that_cannot_be_loaded_is_refused(genuine, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="--out"):
        grefcoco.build(genuine, genuine / "train2014", out)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_symbolic_link_as_out_is_followed(genuine, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "built")
    for _ in range(2):
        grefcoco.build(genuine, genuine / "train2014", tmp_path / "out")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "built" / "build.json").is_file()


def test_a_second_build_into_one_folder_is_refused(genuine, tmp_path, capsys):
    """It says who writes, and does not touch what the first has written."""
    with sole_writer(tmp_path / "out"):
        (staging_folder(tmp_path / "out") / "mine").touch()
        assert build(genuine, genuine / "train2014", tmp_path / "out") == 2
        assert f"written by process {os.getpid()}" in capsys.readouterr().err
        assert (tmp_path / ".out.partial" / "mine").exists()
    assert build(genuine, genuine / "train2014", tmp_path / "out") == 0
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


WORKERS = """
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
from grefcoco_data.building import _end_with_parent
def work(number):
    os.write(1, f"{os.getpid()}\\n".encode())  # one write: the two workers share the pipe
    time.sleep(100)
context = multiprocessing.get_context("fork")
with ProcessPoolExecutor(2, mp_context=context, initializer=_end_with_parent) as pool:
    list(pool.map(work, range(2)))
"""


def test_workers_end_with_a_killed_build():
    build = subprocess.Popen([sys.executable, "-c", WORKERS], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    workers = [int(build.stdout.readline()) for _ in range(2)]
    build.kill()
    assert build.stdout.read() == ""  # ends when no worker holds the pipe any more
    assert build.wait() == -9 and len(set(workers)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_full_disk_is_one_line_and_leaves_nothing(genuine, tmp_path, processes):
    """A limit on the size of files acts as a full disk: writing fails halfway."""
    script = Path(grefcoco.__file__)
    options = f"--annotations {genuine} --images {genuine / 'train2014'} --out {tmp_path / 'out'}"
    command = f"ulimit -f 8; exec {sys.executable} {script} build {options} --num-proc {processes}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 2 and "could not be written" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and sorted(path.name for path in tmp_path.iterdir()) == ["set"]


def test_check_finds_damage(genuine, built, capsys):
    assert run("check", genuine) == run("check", built) == 0
    printed = capsys.readouterr().out
    assert "1 images shared between splits" in printed and "not the official release" in printed
    shard = next((built / "data").glob("val-*"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert run("check", built) == 1
    assert f"DAMAGED: {shard}" in capsys.readouterr().out
    shard.unlink()
    assert run("check", built) == 1
    grefcoco.build(genuine, genuine / "train2014", built)
    (built / "data" / "val-00009-of-00010.parquet").write_bytes(b"left over")
    assert run("check", built) == 1
    assert "val-00009-of-00010.parquet is not part" in capsys.readouterr().out
    for text in ("{", "{}"):
        (built / "build.json").write_text(text)
        assert run("check", built) == 2
        assert "build.json" in capsys.readouterr().err


def as_release(monkeypatch: pytest.MonkeyPatch, sums: dict[str, str], counts: dict, images: str = "") -> None:
    """Make these files the official ones of gRefCOCO."""
    release = dataclasses.replace(COLLECTIONS["grefcoco"].release, sha256=sums, images=images)
    official = dataclasses.replace(COLLECTIONS["grefcoco"], release=release, counts=counts)
    monkeypatch.setitem(collections.COLLECTIONS, "grefcoco", official)


def test_official_files_are_recognised(genuine, monkeypatch, capsys):
    sums = {name: sha256(genuine / name) for name in COLLECTIONS["grefcoco"].release.sha256}
    as_release(monkeypatch, sums, read_annotations(genuine).counts())
    assert run("check", genuine) == 0
    printed = capsys.readouterr().out
    assert printed.count("official release") == 2 + 4 and "not the official release" not in printed


def test_counts_agree_built_and_genuine(genuine, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "shard_count", lambda num_images: min(4, num_images))
    report = grefcoco.build(genuine, genuine / "train2014", tmp_path / "out")
    for split, counts in read_annotations(genuine).counts().items():
        assert list(counts) == list(COUNTED)
        assert {name: report["splits"][split][name] for name in counts} == counts


def test_official_counts_add_up():
    counts = [tuple(split[name] for name in COUNTED) for split in COLLECTIONS["grefcoco"].counts.values()]
    sums = [sum(column) for column in zip(*counts)]
    assert sums[1:6] == [94_050, 258_836, 37_166, 132_187, 89_483] and sums[0] == 19_994 + 1
    assert all(row[2] == sum(row[3:6]) for row in counts)


@pytest.mark.slow
def test_stats_and_show_write_pictures(genuine, built, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for source in (genuine, built):
        assert run("stats", source, "--out", tmp_path / "stats.png") == 0
        assert (tmp_path / "stats.png").read_bytes().startswith(b"\x89PNG")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| train")]
    assert len(rows) == 2 and rows[0] == rows[1]
    assert run("show", built, "--targets", 2, "--split", "val", "--out", tmp_path / "show") == 0
    page = (tmp_path / "show" / "index.html").read_text()
    assert page.count("<figure>") == len(list((tmp_path / "show").glob("*.png"))) > 0 and "2 targets" in page
    assert run("show", built, "--split", "none", "--out", tmp_path / "no") == 2
    assert run("show", built, "--limit", -1, "--out", tmp_path / "no") == 2
    assert run("stats", built, "--out", tmp_path / "new" / "folder" / "stats.png") == 0
    assert (tmp_path / "new" / "folder" / "stats.png").is_file()
    assert run("show", genuine, "--images", genuine / "train2014", "--id", 1, "--out", tmp_path / "no") == 2


def test_show_draws_a_sample_by_seed_and_filters(built, tmp_path):
    def shown(*options):
        assert run("show", built, "--split", "train", "--out", tmp_path / "show", *options) == 0
        page = (tmp_path / "show" / "index.html").read_text()
        return page, re.findall(r'src="(train-\d+\.png)"', page)

    page, everything = shown("--limit", 1000)
    assert "<h1>gRefCOCO, train</h1>" in page and f"{len(everything)} of {len(everything)} sentences, seed 0" in page
    samples = [shown("--limit", 3, "--seed", seed)[1] for seed in (0, 0, 1, 2, 3)]
    assert samples[0] == samples[1] and len({tuple(sample) for sample in samples}) > 1
    page, chosen = shown("--limit", 1000, "--targets", 0)
    assert 0 < len(chosen) < len(everything) and page.count(", 0 targets") == len(chosen)
    assert f"{len(chosen)} of {len(chosen)} sentences, --targets 0, seed 0" in page
    sentence = re.search(r'alt="(\w+)', page)[1]
    page, chosen = shown("--limit", 1000, "--text", sentence.upper())
    assert chosen and all(sentence in text for text in re.findall(r'alt="([^"]+)"', page))


def test_a_picture_without_targets_says_none(genuine):
    rows = grefcoco.load(genuine, images=genuine / "train2014", split="train")
    row = next(row for row in rows if not row["boxes"])
    picture, plain = np.asarray(show.draw_targets(row)), np.asarray(row["image"], np.float32) * 0.4
    assert (picture > 230).all(-1).any() and np.abs(picture - plain)[0].max() < 1, "letters in the middle alone"


def test_an_export_on_a_full_disk_leaves_nothing_unfinished(built, tmp_path, monkeypatch, capsys):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("grefcoco_data.atomic_files.sync", full)
    assert run("export", built, "--out", tmp_path / "export") == 2
    assert capsys.readouterr().err.count("\n") == 1 and not list((tmp_path / "export").iterdir())


@pytest.mark.parametrize("command", ["stats", "export"])
def test_unusable_refs_are_one_error(genuine, tmp_path, capsys, command):
    refs = json.loads((genuine / "grefs(unc).json").read_text())
    refs[0]["image_id"] = 5
    (genuine / "grefs(unc).json").write_text(json.dumps(refs))
    assert run(command, genuine, "--out", tmp_path / "out") == 2
    assert "Build it first" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["mdetr", "coco"])
def test_export_writes_a_file_per_split(built, tmp_path, kind):
    assert run("export", built, "--format", kind, "--out", tmp_path / "json") == 0
    assert len(list((tmp_path / "json").iterdir())) == 4
    assert all(json.loads(path.read_text())["annotations"] for path in (tmp_path / "json").iterdir())


# ---- download ----------------------------------------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.content` with ranges; stops after `server.limit` bytes of a body."""

    def do_GET(self) -> None:
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.server.asked.append(start)
        if start >= len(self.server.content):
            self.send_error(416)
            return
        body = self.server.content[start:]
        self.send_response(206 if start and self.server.ranges else 200)
        if not self.server.ranges:
            body = self.server.content
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.server.limit])

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[http.server.HTTPServer]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.content, server.limit, server.ranges, server.asked = bytes(range(256)) * 500, None, True, []
    server.url = f"http://127.0.0.1:{server.server_port}/file"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_continues(server, tmp_path, ranges):
    path, server.limit, server.ranges = tmp_path / "file", 40_000, ranges
    with pytest.raises(ValueError, match="cut off after 40000 of 128000"):
        official.download_file(server.url, path)
    assert not path.exists()
    server.limit = None
    official.download_file(server.url, path, hashlib.sha256(server.content).hexdigest())
    assert path.read_bytes() == server.content and server.asked == [0, 40_000]
    official.download_file(server.url, path)
    assert len(server.asked) == 2 and [item.name for item in tmp_path.iterdir()] == ["file"]


def test_download_killed_before_its_last_step_is_finished(server, tmp_path):
    (tmp_path / "file.part").write_bytes(server.content)
    official.download_file(server.url, tmp_path / "file", hashlib.sha256(server.content).hexdigest())
    assert [item.name for item in tmp_path.iterdir()] == ["file"] and server.asked == [128_000]


def test_a_file_with_a_wrong_checksum_is_deleted(server, tmp_path):
    with pytest.raises(ValueError, match="sha256"):
        official.download_file(server.url, tmp_path / "file", "0" * 64)
    assert not list(tmp_path.iterdir())


def test_full_disk_ends_a_download_in_one_line(server, tmp_path):
    (tmp_path / "file.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"file\.part: .*No space left.*Run again"):
        official.download_file(server.url, tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_a_full_disk_keeps_the_partial_download(server, tmp_path, monkeypatch):
    copy = official._copy

    def full(response: object, partial: Path, have: int, total: int) -> None:
        partial.write_bytes(response.read(1000))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(official, "_copy", full)
    with pytest.raises(OSError, match="No space left"):
        official.download_file(server.url, tmp_path / "file")
    monkeypatch.setattr(official, "_copy", copy)
    official.download_file(server.url, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == server.content and server.asked == [0, 1000]


def test_build_downloads_what_is_missing(server, genuine, tmp_path, monkeypatch):
    server.content = (genuine / "instances.json").read_bytes()
    (genuine / "instances.json").unlink()
    monkeypatch.setattr(official, "hf_hub_url", lambda *args, **kwargs: server.url)
    as_release(monkeypatch, {"instances.json": hashlib.sha256(server.content).hexdigest()}, {})
    assert build(genuine, genuine / "train2014", tmp_path / "out", "--download") == 0
    assert (tmp_path / "out" / "README.md").exists()
    assert build(genuine, genuine / "train2014", tmp_path / "out", "--download", "--config", "refcoco_unc") == 2


def test_no_server_is_one_line(genuine, tmp_path, monkeypatch, capsys):
    as_release(monkeypatch, {}, {}, images="http://127.0.0.1:9/train2014.zip")
    assert build(genuine, tmp_path / "train2014.zip", tmp_path / "out", "--download") == 2
    assert "127.0.0.1:9" in capsys.readouterr().err and not (tmp_path / "out").exists()


# ---- flags -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["dashes", "underscores"])
def test_flags_of_several_words_have_two_spellings(genuine, tmp_path, form):
    flags = ["--skip-bad-images", "--num-proc=2"]
    if form == "underscores":
        flags = [flag.replace("-b", "_b").replace("-i", "_i").replace("m-p", "m_p") for flag in flags]
        assert flags == ["--skip_bad_images", "--num_proc=2"]
    next((genuine / "train2014").iterdir()).unlink()
    assert build(genuine, genuine / "train2014", tmp_path / "out", *flags) == 0
    assert "bad image, skipped" in (tmp_path / "out" / "README.md").read_text()


def test_flags_are_not_abbreviated_and_values_not_changed(capsys):
    parser = ArgumentParser()
    parser.add_argument("--out-file")
    parser.add_argument("names", nargs="*")
    options = parser.parse_args(["--out_file=my_file", "--", "--a_b", "c_d"])
    assert options.out_file == "my_file" and options.names == ["--a_b", "c_d"]
    assert parser.parse_args(["--out_file", "x_y"]).out_file == "x_y"
    with pytest.raises(SystemExit) as error:
        parser.parse_args(["--out", "x"])
    line = capsys.readouterr().err
    assert error.value.code == 2 and line.count("\n") == 1 and "--out" in line


def test_download_is_a_command_of_its_own(server, genuine, tmp_path, monkeypatch, capsys):
    server.content = (genuine / "instances.json").read_bytes()
    monkeypatch.setattr(official, "hf_hub_url", lambda *args, **kwargs: server.url)
    digest = hashlib.sha256(server.content).hexdigest()
    as_release(monkeypatch, {"instances.json": digest}, {}, images=server.url)
    places = ["--annotations", tmp_path / "new", "--images", tmp_path / "images.zip"]
    assert run("download", *places) == 0
    assert (tmp_path / "new" / "instances.json").read_bytes() == server.content
    assert (tmp_path / "images.zip").exists() and "complete" in capsys.readouterr().out
    assert run("download", *places, "--config", "refcoco_unc") == 2
    assert "No download is known for refcoco_unc" in capsys.readouterr().err


def test_plots_without_matplotlib_are_one_line(built, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run("stats", built, "--out", tmp_path / "stats.png") == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "pip install 'grefcoco[plot]'" in line and not (tmp_path / "stats.png").exists()


def test_samples_show_every_target_in_its_colour(genuine):
    row = next(
        row for row in grefcoco.load(genuine, images=genuine / "train2014", split="train") if len(row["boxes"]) == 2
    )
    picture = np.asarray(show.draw_targets(row)).astype(int)
    assert picture.shape == (row["height"], row["width"], 3)
    plain = np.asarray(row["image"]).astype(int)
    inside = [decode_mask(rle).astype(bool) for rle in row["masks"]]
    assert np.abs(picture - plain * 0.8)[~(inside[0] | inside[1])].mean() < 40
    left, top = map(int, row["boxes"][-1][:2])
    assert tuple(picture[top, left]) == show.TARGET_COLOURS[1], "the box of the last target is drawn last"
    for target, colour in zip(inside, show.TARGET_COLOURS):
        distances = [np.abs(pixels[target] - np.array(colour)).mean() for pixels in (picture, plain)]
        assert distances[0] < distances[1]
