"""A training run's state on disk: written aside, sealed with hashes, renamed; what is broken is never read.

fill(temporary := aside(folder)); seal(temporary); put(temporary, folder)
broken_seal(folder)           # None, or what is wrong with it
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

MANIFEST = "manifest.json"


def aside(final: Path) -> Path:
    """An empty folder beside `final` to write into; what a killed run left there is removed."""
    temporary = final.with_name(".writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def seal(folder: Path) -> None:
    """Force every file of a folder to disk and write manifest.json with their sha256."""
    hashes = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        hashes[str(path.relative_to(folder))] = _sha256(path)
        flush(path)
    (folder / MANIFEST).write_text(json.dumps(hashes, indent=1))
    flush(folder / MANIFEST)
    flush(folder)


def put(temporary: Path, final: Path) -> None:
    """Rename `temporary` to `final`; a folder that was there goes once the new one is in its place."""
    former = final.with_name(".former")
    shutil.rmtree(former, ignore_errors=True)
    if final.exists():
        final.rename(former)
    temporary.rename(final)
    flush(final.parent)
    shutil.rmtree(former, ignore_errors=True)


def broken_seal(folder: Path) -> str | None:
    """What is wrong with a sealed folder, or None when every file is as it was sealed."""
    try:
        for name, sha256 in json.loads((folder / MANIFEST).read_text()).items():
            if _sha256(folder / name) != sha256:
                return f"{name} is damaged"
    except (OSError, ValueError) as error:
        return f"it is incomplete ({error})"
    return None


def flush(path: Path) -> None:
    """Force a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
