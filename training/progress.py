"""The progress of a run, in the file progress.json of every checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Progress:
    """The progress of a run, saved with every checkpoint."""

    step: int = 0  # optimiser steps
    seconds: float = 0.0
    waiting: float = 0.0  # seconds of them spent on waiting for the next batch
    skipped: int = 0  # steps without a finite gradient
    history: list[dict[str, float]] = field(default_factory=list)
    best: float | None = None
    losses: list[list[float]] = field(default_factory=list)  # of each process, of the steps since the last record
