"""Test code in processes of its own, forked from a server that has imported torch and transformers once.

A forked process holds no module of this repository until it imports one. `sys.executable` in a subprocess costs
the same imports again, about six seconds: the tests keep one such process for each command.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    ["torch", "torch._dynamo", "transformers.pipelines", "transformers.modeling_utils", "transformers.models.auto"]
    + [
        "datasets",
        "evaluate",
        "accelerate",
        "matplotlib.pyplot",
        "pycocotools.mask",
        "pytest",
        "yaml",
        "safetensors.torch",
    ]
)


class Forked:
    """A started process that calls `function(*arguments)`; what it returns is the exit code."""

    def __init__(self, function: Callable[..., int | None], *arguments: object, **variables: str) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="forked-")
        self.process = FORKED.Process(target=_call, args=(self.folder.name, variables, function, arguments))
        self.process.start()

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess:
        """Wait for the end; returns the exit code (negative for a signal) and what was printed."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        stdout, stderr = (Path(self.folder.name, name).read_text() for name in ("stdout", "stderr"))
        self.folder.cleanup()
        return subprocess.CompletedProcess((), self.process.exitcode, stdout, stderr)


def fork(function: Callable[..., int | None], *arguments: object, **variables: str) -> subprocess.CompletedProcess:
    """Call `function(*arguments)` in a process of its own with these environment variables, and wait for its end."""
    return Forked(function, *arguments, **variables).wait()


def start_group(
    number: int, function: Callable[..., int | None], *arguments: object, **variables: str
) -> list[Forked]:
    """Start `number` processes that find each other as those that torchrun starts do."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(number)}
    ranks = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number))
    return [Forked(function, *arguments, **variables, **rank) for rank in ranks]


def _call(folder: str, variables: dict[str, str], function: Callable[..., int | None], arguments: tuple) -> None:
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.update(variables)
    sys.exit(function(*arguments))
