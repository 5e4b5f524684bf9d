"""A lock file that keeps two runs from writing into one folder."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = "run.lock"


class FolderInUse(RuntimeError):
    """Another process writes into the folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder` during the block. The lock of a process that has ended is ignored.

    Raises:
        FolderInUse: another process holds it; the message names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            _refuse_running(folder, file.read())
            path.unlink(missing_ok=True)  # only processes that the ended one started still hold it
            file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (closed below)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        file.write(json.dumps(holder))
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            file.close()


def _refuse_running(folder: Path, text: str) -> None:
    """Raise FolderInUse unless the process that the lock names has ended."""
    holder = json.loads(text or "{}")
    if holder.get("host") == socket.gethostname() and not _is_running(holder["pid"]):
        return
    raise FolderInUse(
        f"{folder}: process {holder.get('pid')} on {holder.get('host')} writes there since {holder.get('since')}; "
        "wait for its end, or choose another --output_dir"
    )


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # a process of another user
        return True
    return True
