"""Files and folders that appear on disk whole or not at all, and sha256 sums.

    with sole_writer(final): ...        # refuse to write while another process does
    staging = staging_folder(final)     # an empty folder beside `final`
    ...                                 # write files into `staging`
    seal(staging)                       # write manifest.json with the sha256 of every file
    publish(staging, final)             # force everything to disk, then rename
    seal_fault(final)                   # None, or what is wrong with the folder

    write_text(path, text)              # one file
    with new_file(path) as temporary: figure.savefig(temporary)

Builds, exports, pages and the checkpoints of training are written this way.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

MANIFEST = "manifest.json"


def staging_path(final: Path) -> Path:
    """Path of the staging folder of `final`: the same in every process, so that several can write into it."""
    return final.with_name(f".{final.name}.partial")


def staging_folder(final: Path) -> Path:
    """Make an empty folder beside `final` to write into; what a killed process left there is removed."""
    staging = staging_path(final)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


@contextlib.contextmanager
def sole_writer(final: Path) -> Iterator[None]:
    """Hold a lock on `final`, so that no other process replaces it meanwhile; it ends with the process at the latest.

    Raises:
        ValueError: another process holds the lock; names it.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    path = final.with_name(f".{final.name}.lock")
    while True:
        with open(path, "a+", encoding="ascii") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                writer = file.read(20) or "another one"
                raise ValueError(f"{final} is being written by process {writer}; wait for its end.") from None
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                continue  # the last holder has removed the file that was opened here
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def seal(folder: Path) -> None:
    """Write manifest.json with the sha256 of every file of a folder, and force all of them to disk."""
    sums = {str(path.relative_to(folder)): sha256(path) for path in sorted(_files(folder))}
    (folder / MANIFEST).write_text(json.dumps(sums, indent=1), encoding="utf-8")
    _sync_tree(folder)


def seal_fault(folder: Path) -> str | None:
    """What is wrong with a sealed folder; None when every file has the sha256 of the manifest."""
    try:
        sums = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return next((f"{name} is damaged" for name, digest in sums.items() if sha256(folder / name) != digest), None)
    except (OSError, ValueError) as error:
        return f"it is incomplete ({error})"


def publish(staging: Path, final: Path) -> None:
    """Force `staging` to disk and rename it to `final`; a former `final` is removed after the rename."""
    _sync_tree(staging)
    former = final.with_name(f".{final.name}.former")
    shutil.rmtree(former, ignore_errors=True)
    if final.exists():
        final.rename(former)
    staging.rename(final)
    sync(final.parent)
    shutil.rmtree(former, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; after the block it is forced to disk and renamed to `path`.

    When the block raises, the temporary file is removed and `path` stays as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path | str) -> None:
    """Force the content of a file, or the entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path | str) -> str:
    """Hexadecimal sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _sync_tree(folder: Path) -> None:
    """Force everything to disk; files get the folder's permissions (safetensors writes for the owner alone)."""
    readable = folder.stat().st_mode & 0o666
    for path in (*folder.rglob("*"), folder):
        if path.is_file():
            path.chmod(readable)
        sync(path)
