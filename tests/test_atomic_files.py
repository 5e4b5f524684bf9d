"""Files and folders appear whole or not at all, whatever interrupts the writer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import pytest

from grefcoco_data import building
from grefcoco_data.annotations import read_annotations
from grefcoco_data.atomic_files import (
    MANIFEST,
    new_file,
    publish,
    seal,
    seal_fault,
    sha256,
    staging_folder,
    staging_path,
    write_text,
)
from tests.tiny_grefcoco import write_genuine


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_text_is_replaced_whole(tmp_path):
    path = tmp_path / "a.txt"
    for text in ("first", "zweite \u00fc"):
        write_text(path, text)
        assert path.read_text(encoding="utf-8") == text and names(tmp_path) == ["a.txt"]


def test_a_writer_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(OSError, match="disk"), new_file(path) as temporary:
        temporary.write_text("half")
        raise OSError("the disk is full")
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_a_text_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(os, "fsync", lambda handle: events.append("fsync"))
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: events.append("rename") or replace(self, target))
    write_text(tmp_path / "a.txt", "text")
    assert events == ["fsync", "rename"]


def test_publish_syncs_every_file_and_folder_first(tmp_path, monkeypatch):
    staging = staging_folder(tmp_path / "out")
    (staging / "sub").mkdir()
    (staging / "sub" / "file").write_text("text")
    synced = []
    monkeypatch.setattr("grefcoco_data.atomic_files.sync", lambda path: synced.append((path, staging.exists())))
    publish(staging, tmp_path / "out")
    before = {path for path, was_staged in synced if was_staged}
    assert before == {staging, staging / "sub", staging / "sub" / "file"} and (tmp_path, False) in synced
    assert names(tmp_path) == ["out"]


def test_published_files_have_the_permissions_of_their_folder(tmp_path):
    staging = staging_folder(tmp_path / "out")
    staging.chmod(0o750)
    (staging / "weights").write_text("text")
    (staging / "weights").chmod(0o600)
    publish(staging, tmp_path / "out")
    assert (tmp_path / "out" / "weights").stat().st_mode & 0o777 == 0o640


def test_the_staging_folder_of_a_killed_process_is_emptied(tmp_path):
    final = tmp_path / "out"
    (staging_folder(final) / "left over").write_text("x")
    assert staging_folder(final) == staging_path(final) and names(staging_path(final)) == []


@pytest.mark.parametrize("damage", ["changed", "missing", "no manifest", "broken manifest"])
def test_a_seal_shows_every_damage(tmp_path, damage):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "file").write_text("text")
    seal(tmp_path)
    assert seal_fault(tmp_path) is None
    assert json.loads((tmp_path / MANIFEST).read_text()) == {"sub/file": hashlib.sha256(b"text").hexdigest()}
    if damage == "changed":
        (tmp_path / "sub" / "file").write_text("Text")
    elif damage == "missing":
        (tmp_path / "sub" / "file").unlink()
    elif damage == "no manifest":
        (tmp_path / MANIFEST).unlink()
    else:
        (tmp_path / MANIFEST).write_text("{")
    expected = "sub/file is damaged" if damage == "changed" else "it is incomplete"
    assert seal_fault(tmp_path).startswith(expected)


def test_sha256_reads_large_files_whole(tmp_path):
    data = os.urandom((1 << 20) + 17)
    (tmp_path / "file").write_bytes(data)
    assert sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_a_worker_of_a_killed_build_writes_nothing(tmp_path):
    genuine = write_genuine(tmp_path / "set")
    notes = read_annotations(genuine)
    images = str(genuine / "train2014")
    (job, *_) = building._shard_jobs(str(genuine), "grefcoco", images, tmp_path, notes, skip_bad_images=False)
    other = next(number for number in range(2**22, 2**22 + 9) if number not in (os.getpid(), os.getppid()))
    with pytest.raises(SystemExit, match="has ended"):
        building.write_shard(dataclasses.replace(job, process=other))
    assert not Path(job.path).exists()
    building.write_shard(job)
    assert Path(job.path).exists()
